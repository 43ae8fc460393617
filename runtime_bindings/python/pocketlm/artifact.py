"""What a runtime has to know of an artifact, without the manifest: an agent on a device is told it by a job."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Artifact", "ArtifactFile"]


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file's sha256 (hexadecimal) and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Artifact:
    """One target's file or folder at ``path``, with what its session needs of the model.

    ``requirements``: the packages that run it and their version ranges (``{"onnxruntime": ">=1.23.2"}``).
    ``longest_call``: the most tokens of one call; ``rows``: the most logits that it returns.
    ``files``: what was checked of it, by names relative to the folder that ``path`` lies in.
    """

    path: Path
    requirements: Mapping[str, str]
    context_length: int
    vocabulary_size: int
    hidden_size: int
    longest_call: int
    rows: int
    files: Mapping[str, ArtifactFile]
