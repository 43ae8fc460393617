"""The contract between verification and a backend's reader of written artifacts.

A reader is ``pocketlm_export.backends.NAME.read.open_reader``. It shares nothing with the backend's writer beyond the
vendor's schema: it finds weights by the manifest's places, and executes what the file says, not what was meant.
Verification gives it :class:`Run`\\ s, whose tokens are all known, so everything can go instruction by instruction over
all calls (in lockstep), and each weight is unpacked once, by blocks of rows.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketlm.manifest import Manifest

__all__ = [
    "EXACT",
    "LARGEST_SESSION",
    "Call",
    "Fact",
    "NotRun",
    "Past",
    "Reader",
    "RowErrors",
    "Run",
    "StoredConstants",
    "Trace",
    "WrittenMatrix",
    "described_blocks",
    "open_reader",
]

LARGEST_SESSION = 1 << 30
"""Bytes of an artifact's weights that verification loads into a runtime at once, which packs them into memory anew."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class WrittenMatrix:
    """Rows of a quantized matrix as a reader finds them in a written artifact, in the weight store's convention.

    ``codes`` int8 ``[n, K]``, signed; ``scales`` float32 ``[n, groups]``; ``name`` is the artifact's own.
    """

    name: str
    bits: int
    codes: npt.NDArray[np.int8]
    scales: Floats


@dataclass(frozen=True, slots=True)
class Call:
    """The tokens of one call, and for how many of them, the last ones, logits are wanted: at least one."""

    tokens: tuple[int, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Past:
    """What a cache holds before a run: ``positions`` rows of keys and values for every layer, made from ``seed``.

    Values are exact in fp16, so that every artifact's cache holds the very same.
    """

    positions: int
    seed: int = 0

    def layer(self, layer: int, kv_heads: int, head_dim: int) -> tuple[Floats, Floats]:
        """Keys and values, float32 ``[kv_heads, positions, head_dim]``: unit normal, and half of it."""
        digest = hashlib.sha256(f"past {self.seed} {layer}".encode()).digest()
        random = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
        shape = (2, kv_heads, self.positions, head_dim)
        keys, values = random.standard_normal(shape, np.float32).astype(np.float16).astype(np.float32)
        return keys, values * np.float32(0.5)


@dataclass(frozen=True, slots=True)
class Run:
    """Calls one after another over a cache of their own, which begins empty, or as ``past`` says."""

    name: str
    calls: tuple[Call, ...]
    past: Past | None = None

    @property
    def start(self) -> int:
        """The position of the first token."""
        return 0 if self.past is None else self.past.positions

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of all calls."""
        return tuple(token for call in self.calls for token in call.tokens)


@dataclass(slots=True)
class Trace:
    """What one run gave. ``logits``: for each call ``[call.rows, vocabulary]``. ``keys`` and ``values``: for each layer
    ``[kv_heads, positions, head_dim]``, the rows that the run's own tokens added, as cached (keys rotated); empty where
    the caches can't be seen. ``experts``: for each mixture of experts the numbers of those that each position chose,
    ``[positions, chosen]``; empty where the choices can't be seen. ``scores``: for each mixture what its router gave
    every expert, ``[positions, experts]``, of computations of the reference. ``conceded``: where another's choices were
    given, for each mixture how far they fall short of this computation's own, ``[positions]``: the score of the best
    expert left out less that of the last one chosen, over the deviation of the scores; 0 where they are the same.
    """

    logits: list[Array] = field(default_factory=list)
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    experts: list[Array] = field(default_factory=list)
    scores: list[Array] = field(default_factory=list)
    conceded: list[Array] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredConstants:
    """How an artifact stores what the graph states exactly. This rounding is all that the reference adopts from it.

    ``table`` is the dtype of rotary tables, ``value`` that of vectors and of matrices that aren't quantized.
    ``reciprocal`` is the factor that stands for 1/width in the mean of a norm, ``constant`` what a factor, a bound or a
    soft cap is stored as. Facts are those of the graph with its residual shifted by ``residual_shift``
    (:func:`pocketlm_export.graph.residual.shift_residual`); what is computed is compared with the graph as it is.
    """

    table: type[np.floating[Any]] = np.float32
    value: type[np.floating[Any]] = np.float32
    epsilon: Callable[[float], float] = lambda epsilon: epsilon
    scale: Callable[[float], float] = lambda scale: scale
    reciprocal: Callable[[int], float] = lambda width: 1 / width
    constant: Callable[[float], float] = lambda value: value
    residual_shift: int = 0


EXACT = StoredConstants()


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that the file states and the graph has too: level 1 compares them.

    ``node`` is ``attention L`` (layer L), ``norm I`` (the I-th normalization in the order of execution, those of
    queries and keys included), ``scale I``, ``clamp I`` or ``experts I`` likewise, or ``program``. Names are those of
    :func:`pocketlm_export.verify.structure.expected`.
    """

    node: str
    name: str
    value: int | float | str | Array | None


@dataclass(frozen=True, slots=True)
class NotRun:
    """Why a level could not run here. It is never passed."""

    reason: str


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Pieces of an artifact that the real runtime ran alone, each against a recomputation from the same inputs.

    ``errors``: ``|difference| / |row|`` for each row of every piece's output, float64. ``worst`` names the piece with
    the largest.
    """

    errors: npt.NDArray[np.float64]
    worst: str
    pieces: int


class Reader(Protocol):
    """A written artifact opened for verification. Malformed files raise :class:`pocketlm.BundleError`, operators that
    it doesn't know :class:`pocketlm.UnsupportedError` by name."""

    stored: StoredConstants
    """How this artifact rounds constants."""

    unstated: frozenset[str]
    """Names of facts that this kind of file does not state in one place; level 2 judges them alone."""

    notes: tuple[str, ...]
    """What a reader of the certificate should know about the checks of this artifact."""

    round_activations: Callable[[str, Floats], Floats] | None
    """Hugging Face name of a quantized linear's weight, float32 ``[rows, K]`` -> what the shipped kernels make of such
    inputs; None: no rounding."""

    def rows(self, entry: str, start: int, stop: int) -> WrittenMatrix | Floats:
        """Rows ``start..stop`` of an entry of the manifest's ``places``: codes and scales, or float32 values."""

    def facts(self) -> Iterator[Fact]:
        """Every attribute and whole table that the file states."""

    def execute(self, runs: Sequence[Run]) -> list[Trace]:
        """Execute the written file in float64, activations never rounded, in lockstep over all calls of all runs."""

    def meaning(self, runs: Sequence[Run]) -> list[Trace | None] | RowErrors | NotRun:
        """The real runtime on the written bytes with activations in float32; None for a run that it can't begin."""

    def kernels(self, runs: Sequence[Run]) -> RowErrors | NotRun:
        """Every quantized linear of the shipped artifact in the real runtime, recomputed from the inputs it had."""

    def in_parts(self, runs: Sequence[Run]) -> list[Trace] | None:
        """The shipped artifact in the real runtime, one part in memory after another, over all calls of all runs; None
        if it is small enough for a session, or if no runtime is here. Caches may stay unseen."""

    def chosen_experts(self, runs: Sequence[Run]) -> list[Trace]:
        """Traces of ``experts`` alone: which ones the shipped artifact chooses in the real runtime, over all calls of
        all runs, which begin empty. Raises :class:`UnavailableError` if no runtime is here."""

    def emulate(self, runs: Sequence[Run]) -> list[Trace] | None:
        """The artifact in its own precision where its runtime exists nowhere here; None if a session runs it."""


def described_blocks(block_size: int, heads: Iterable[npt.NDArray[np.bool_]]) -> str:
    """The value of the fact ``sparsity``, equal for equal masks, however a file states them.

    ``heads``: which blocks of keys each query head sees, bool ``[blocks of queries, blocks of keys]``; what lies ahead
    doesn't count.
    """
    digest, seen = hashlib.sha256(), 0
    for blocks in heads:
        behind = np.tril(blocks)
        seen += int(behind.sum())
        digest.update(np.packbits(behind).data)
    return f"{seen} blocks of {block_size} positions seen, sha256 {digest.hexdigest()[:16]}"


def open_reader(target: str, path: Path, manifest: Manifest) -> Reader:
    """The reader of ``target``'s artifact at ``path``, whose files were hashed and are the manifest's."""
    module = importlib.import_module(f"pocketlm_export.backends.{target}.read")
    reader: Reader = module.open_reader(path, manifest)
    return reader
