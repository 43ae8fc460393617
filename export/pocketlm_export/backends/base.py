"""The contract between the pipeline and a backend.

A backend is a module ``pocketlm_export.backends.NAME`` with the three functions of :class:`Backend`. It gets the graph
as written down, merged by no rewrite: it applies the shared rewrites that suit it.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pocketlm.errors import InputError
from pocketlm_export.architectures import DecoderConfig
from pocketlm_export.checkpoint.generation import Generation
from pocketlm_export.graph.graph import Graph
from pocketlm_export.graph.rotary import LongRotary
from pocketlm_export.quantization.schemes import SchemeRow
from pocketlm_export.quantization.weights import Weights

__all__ = ["TARGETS", "Artifact", "Backend", "Entry", "Lowering", "load_backend", "merged_name"]

TARGETS = ("onnx", "executorch", "coreml")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a weight lies: the name of the artifact's own entry, and the first of its rows there."""

    name: str
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a backend wrote. ``runtime`` maps a package to the versions that can run what was emitted.

    ``longest_call`` is the most tokens that one call takes, ``rows`` the most positions whose logits it returns.
    ``entries`` maps every weight's Hugging Face name to its place. ``notes`` say in words what a user should know, such
    as a window that was dropped because the exported context fits into it.
    """

    runtime: Mapping[str, str]
    longest_call: int
    rows: int
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lowering:
    """The input of a backend: what to write, for whom, and the files that make a vendor's runner work as it is.
    ``left_out``: in words, which parts of the checkpoint the graph doesn't have; None if it has all."""

    graph: Graph
    weights: Weights
    config: DecoderConfig
    generation: Generation
    tokenizer_files: Mapping[str, Path]
    progress: Callable[[str, int], None] = field(default=lambda _name, _elements: None)
    left_out: str | None = None

    @property
    def context_notes(self) -> tuple[str, ...]:
        """What is left out, and what the exported context decided: each sliding window that no artifact has because
        the context fits into it, and which factors of LongRoPE apply."""
        context = self.graph.context_length
        windows = sorted({layer.window for layer in self.config.layers if layer.window is not None})
        rotations = [layer.rotary for layer in self.config.layers if isinstance(layer.rotary, LongRotary)]
        return (
            *(() if self.left_out is None else (self.left_out,)),
            *(
                f"sliding window {window} dropped: the context of {context} fits into it"
                for window in windows
                if window >= context
            ),
            *(
                f"LongRoPE: short factors, for contexts of up to {original}"
                if context <= original
                else f"LongRoPE: long factors from the first token, as the context of {context} exceeds {original}; "
                f"transformers takes the short ones up to there"
                for original in sorted({rotary.original_context for rotary in rotations})
            ),
        )


class Backend(Protocol):
    """The functions of a backend's module."""

    def check(self, graph: Graph, rows: Mapping[str, SchemeRow | None]) -> None:
        """Raise :class:`pocketlm.UnsupportedError`, naming the attribute, if the graph can't be expressed.

        It runs before any work, and imports no vendor library.
        """

    def write(self, lowering: Lowering, folder: Path) -> Artifact:
        """Write the artifact into ``folder``, which exists and is empty; stream the weights; be deterministic."""

    def libraries(self) -> Mapping[str, str]:
        """Package and version of what wrote the artifact, for the manifest's provenance."""


def load_backend(name: str) -> Backend:
    """The backend named ``name``. Raises :class:`InputError` for a name that is no backend."""
    if name not in TARGETS and name != "null":
        raise InputError(f"unknown target {name!r}; valid: {', '.join(TARGETS)}")
    module: Backend = importlib.import_module(f"pocketlm_export.backends.{name}")
    return module


def merged_name(names: tuple[str, ...]) -> str:
    """``a.q.weight``, ``a.k.weight`` -> ``a.q+k.weight``: the parts that differ, joined."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join("+".join(dict.fromkeys(parts)) for parts in columns)
