"""The golden vectors of a bundle as questions to an implementation of its tokenizer or template.

FORMAT.md describes the files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pocketlm.bundle import Bundle
from pocketlm.errors import BundleError

__all__ = ["GOLDEN_FILES", "Answer", "Chat", "Kind", "Question", "Refused", "read_questions"]

ENCODINGS = "golden/tokenizer.jsonl"
CHATS = "golden/chat.jsonl"
LARGEST = 64 << 20

Kind = Literal["encode", "encode with special tokens", "decode", "render", "encode what was rendered"]
GOLDEN_FILES: Mapping[Kind, str] = {
    "encode": ENCODINGS,
    "encode with special tokens": ENCODINGS,
    "decode": ENCODINGS,
    "render": CHATS,
    "encode what was rendered": CHATS,
}


@dataclass(frozen=True, slots=True)
class Refused:
    """An error instead of an answer. Any two are equal: nobody promises the words."""

    words: str = field(default="an error", compare=False)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Encoding(_Record):
    text: str
    ids: list[TokenId]
    ids_with_special: list[TokenId]
    decoded: str


class Chat(_Record):
    """A line of chat.jsonl: ``text``, or ``error`` where the template refuses the messages."""

    messages: list[dict[str, Any]]
    arguments: dict[str, Any]
    now: datetime
    text: str | None = None
    error: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_answer(self) -> "Chat":
        if (self.text is None) is (self.error is None):
            raise ValueError("needs a text, or an error")
        return self

    @property
    def add_generation_prompt(self) -> bool:
        """Whether the text ends where the model begins to answer."""
        return self.arguments.get("add_generation_prompt", True) is not False

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        """The arguments that are the template's own."""
        return {name: value for name, value in self.arguments.items() if name != "add_generation_prompt"}


Answer = str | list[int] | Refused


@dataclass(frozen=True, slots=True)
class Question:
    """``asked``: the text to encode, the ids to decode, or the conversation to render. ``answer``: the right one."""

    kind: Kind
    asked: str | list[int] | Chat
    answer: Answer


def read_questions(bundle: Bundle) -> list[Question]:
    """All questions of the golden files, kind by kind. Raises :class:`BundleError` for a malformed or altered file."""
    bundle.check_files("golden/")
    encodings = list(_read(bundle, ENCODINGS, _Encoding))
    chats = list(_read(bundle, CHATS, Chat))
    rendered = [chat.text for chat in chats if chat.text is not None]
    return [
        *(Question("encode", line.text, line.ids) for line in encodings),
        *(Question("encode with special tokens", line.text, line.ids_with_special) for line in encodings),
        *(Question("decode", line.ids, line.decoded) for line in encodings),
        *(Question("render", chat, Refused() if chat.text is None else chat.text) for chat in chats),
        *(
            Question("encode what was rendered", text, bundle.tokenizer.encode(text, add_special_tokens=False))
            for text in rendered
        ),
    ]


RecordType = TypeVar("RecordType", bound=_Record)


def _read(bundle: Bundle, name: str, record: type[RecordType]) -> Iterator[RecordType]:
    if name not in bundle.manifest.files:
        return
    path = bundle.folder / name
    if path.stat().st_size > LARGEST:
        raise BundleError(f"{path}: too large")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            yield record.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise BundleError(f"{path}: line {number}: {place}: {first['msg']}") from error
