"""The golden session of a bundle: what the float64 reference says after a few prompts. FORMAT.md describes the file."""

from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from pocketlm.bundle import Bundle
from pocketlm.errors import BundleError, InputError
from pocketlm.manifest import Closed, TokenId, first_fault
from pocketlm.replaying.expectation import HALF_DIGIT, ExpectedSequence, ExpectedSession, GoldenStep
from pocketlm.strict_json import parse_object

__all__ = ["GOLDEN_FILE", "read_golden_session"]

GOLDEN_FILE = "golden/replay.jsonl"
LARGEST_GOLDEN = 64 << 20

Figure = Annotated[float, Field(ge=0, le=1e30)]


class GoldenLine(Closed):
    """One prompt, and of small models how the reference goes on."""

    prompt: str
    prompt_ids: Annotated[list[TokenId], Field(min_length=1)]
    tokens: Annotated[list[TokenId], Field(min_length=1)] | None = None
    margins: list[Figure] | None = None
    deviation: Figure | None = None

    @model_validator(mode="after")
    def _continuation_is_whole(self) -> Self:
        stated = [value is not None for value in (self.tokens, self.margins, self.deviation)]
        if any(stated) and not all(stated):
            raise ValueError("tokens, margins and deviation belong together")
        if self.tokens is not None and self.margins is not None and len(self.tokens) != len(self.margins):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.margins)} margins")
        return self


def read_golden_session(bundle: Bundle) -> ExpectedSession:
    """The bundle's golden session, its file checked.

    Raises :class:`InputError` for a bundle that has prompts only or none, :class:`BundleError` naming file and line for
    an altered or malformed file.
    """
    path = bundle.folder / GOLDEN_FILE
    sequences = []
    if GOLDEN_FILE in bundle.manifest.files:
        bundle.check_files(GOLDEN_FILE)
        if path.stat().st_size > LARGEST_GOLDEN:
            raise BundleError(f"{path}: too large")
        for number, data in enumerate(path.read_bytes().splitlines(), 1):
            line = _parsed(f"{path}: line {number}", data)
            if line.tokens is not None:
                sequences.append(_expected(f"{path}: line {number}", line, bundle))
    if not sequences:
        raise InputError(
            f"{bundle.folder}: no golden session to compare with: the float64 reference is recorded for small models "
            "only. Record one with pocketlm run --record FILE, and replay it with --session FILE"
        )
    return ExpectedSession("golden session", None, None, tuple(sequences))


def _parsed(place: str, data: bytes) -> GoldenLine:
    try:
        return GoldenLine.model_validate(parse_object(data))
    except ValidationError as error:
        raise BundleError(f"{place}: {first_fault(error)}") from error
    except ValueError as error:
        raise BundleError(f"{place}: not a JSON object: {str(error)[:100]}") from error


def _expected(place: str, line: GoldenLine, bundle: Bundle) -> ExpectedSequence:
    assert line.tokens is not None and line.margins is not None and line.deviation is not None
    model = bundle.manifest.model
    if max(line.prompt_ids + line.tokens) >= model.vocabulary_size:
        raise BundleError(f"{place}: an id is outside the model's vocabulary of {model.vocabulary_size}")
    if len(line.prompt_ids) + len(line.tokens) - 1 > model.context_length:
        raise BundleError(f"{place}: longer than the context of {model.context_length}")
    return ExpectedSequence(
        prompt=tuple(line.prompt_ids),
        tokens=tuple(line.tokens),
        steps=tuple(GoldenStep(token, margin) for token, margin in zip(line.tokens, line.margins, strict=True)),
        deviation=line.deviation + HALF_DIGIT,  # as large as it may have been: a margin over it is at least that
    )
