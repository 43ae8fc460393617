"""certificate.json as types: what verification measured on the written bytes, bound to the manifest.

The JSON schema in runtime_bindings/schema is generated from here; FORMAT.md explains it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError

from pocketlm.errors import BundleError
from pocketlm.manifest import Closed, Sha256, TargetName, first_fault
from pocketlm.strict_json import parse_object

__all__ = [
    "CERTIFICATE_FILE",
    "LEVELS",
    "Certificate",
    "Check",
    "Evidence",
    "Level",
    "Loss",
    "Oracle",
    "TargetCertificate",
    "TextConformance",
    "read_certificate",
    "rounded",
]

CERTIFICATE_FILE = "certificate.json"
LARGEST_CERTIFICATE = 4 << 20
FORMAT_VERSION = "1.0"
LEVELS: Mapping[int, str] = {1: "bytes", 2: "graph", 3: "meaning", 4: "kernels", 5: "whole"}

Status = Literal["passed", "failed", "not run"]
Count = Annotated[int, Field(ge=0)]


def rounded(figure: float) -> float | None:
    """Three significant digits; None for what is not finite, which JSON can't hold."""
    return float(f"{figure:.2e}") if math.isfinite(figure) else None


class Check(Closed):
    """One figure against its threshold: passed if it is finite and at most that.

    ``floor``: what the threshold is a multiple of, measured on the same model; None for an absolute one. ``figure``
    None: not finite. ``where``: the place of the largest deviation.
    """

    name: str
    figure: float | None
    threshold: float
    floor: float | None = None
    where: str | None = None
    passed: bool


class Level(Closed):
    """One of the five levels of one artifact. ``reason``: why it failed or did not run."""

    level: Annotated[int, Field(ge=1, le=5)]
    name: str
    status: Status
    reason: str | None = None
    checks: list[Check] = Field(default_factory=list)
    facts: dict[str, float | int | str | None] = Field(default_factory=dict)


class TargetCertificate(Closed):
    """The five levels of one artifact. ``notes``: what a reader should know about how they were checked."""

    levels: list[Level]
    notes: list[str] = Field(default_factory=list)

    @property
    def failed(self) -> list[Level]:
        """The levels that failed."""
        return [level for level in self.levels if level.status == "failed"]


class Evidence(Closed):
    """What the artifacts were run on: texts, tokens of prefill and decode steps, and caches filled beforehand."""

    texts: Count
    prefill_tokens: Count
    decode_steps: Count
    judged_positions: Count
    probes: list[Count]


class Loss(Closed):
    """The reference on the bundle's weights against the original ones: nats a token on the texts, mean KL in nats, and
    root mean square over the deviation of the logits; None: not finite."""

    nats_per_token: float | None
    original_nats_per_token: float | None
    mean_kl: float | None
    rms: float | None


class Oracle(Closed):
    """An independent implementation on the original checkpoint against the reference on the same weights."""

    name: str
    version: str
    status: Status
    checks: list[Check]


class TextConformance(Closed):
    """One implementation of tokenizer or template on the golden vectors. Another's differences don't fail a bundle."""

    name: str
    version: str
    golden: str
    status: Literal["passed", "failed", "differs", "not run"]
    strings: Count
    differing: Count
    examples: list[str] = Field(default_factory=list)
    reason: str | None = None


class Certificate(Closed):
    """The whole of certificate.json. ``sha256`` is over everything else, see :meth:`digest`."""

    format_version: Literal["1.0"]
    manifest_sha256: Sha256
    pocketlm: str
    libraries: dict[str, str]
    machine: dict[str, str]
    evidence: Evidence
    targets: dict[TargetName, TargetCertificate]
    loss: Loss | None = None
    oracle: Oracle | None = None
    text: list[TextConformance]
    sha256: Sha256 = "0" * 64

    @property
    def failures(self) -> list[str]:
        """Every failure in words, each naming artifact and level; empty if the certificate is good."""
        words = [
            f"{target}: level {level.level} ({level.name}) failed: {level.reason}"
            for target, certificate in self.targets.items()
            for level in certificate.failed
        ]
        if self.oracle is not None and self.oracle.status == "failed":
            words.append(f"oracle: the reference differs from {self.oracle.name} {self.oracle.version}")
        words += [
            f"text: {result.name} differs on {result.differing} of {result.strings} strings of {result.golden}"
            for result in self.text
            if result.status == "failed"
        ]
        return words

    @property
    def passed(self) -> bool:
        """Nothing failed. A level that was not run is neither passed nor failed."""
        return not self.failures

    def digest(self) -> str:
        """sha256 of the document without ``sha256``, as JSON with sorted keys and no spaces."""
        document = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sealed(self) -> Self:
        """The same with its ``sha256``."""
        return self.model_copy(update={"sha256": self.digest()})

    def to_json(self) -> str:
        """The text of certificate.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def read_certificate(folder: Path) -> Certificate | None:
    """The certificate of the bundle in ``folder``; None if there is none.

    Raises :class:`BundleError` for one that is malformed, altered, or another manifest's.
    """
    path = folder / CERTIFICATE_FILE
    if not path.exists() and not path.is_symlink():
        return None
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path}: not a regular file")
    if path.stat().st_size > LARGEST_CERTIFICATE:
        raise BundleError(f"{path}: too large")
    try:
        certificate = Certificate.model_validate(parse_object(path.read_bytes()))
    except ValidationError as error:
        raise BundleError(f"{path}: {first_fault(error)}") from error
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from error
    if certificate.sha256 != certificate.digest():
        raise BundleError(
            f"{path}: altered: its sha256 says something else; delete it, then pocketlm verify issues a new one"
        )
    manifest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    if certificate.manifest_sha256 != manifest:
        raise BundleError(f"{path}: of another manifest; delete it, then pocketlm verify issues a new one")
    return certificate
