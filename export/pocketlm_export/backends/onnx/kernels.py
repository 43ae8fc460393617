"""Every quantized product and every mixture of quantized experts of the shipped artifact in the real ONNX Runtime,
recomputed from the inputs that it had."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketlm.errors import UnsupportedError
from pocketlm.manifest import Model
from pocketlm_export.backends.onnx.execute import operator_of
from pocketlm_export.backends.onnx.file import OnnxFile, WrittenNode
from pocketlm_export.backends.onnx.matrices import QMOE, QuantizedMatrix, product, quantized_matrices
from pocketlm_export.backends.onnx.pieces import cut_pieces
from pocketlm_export.backends.onnx.runtime import Relay, exposing, run_decoder, run_head, start_session
from pocketlm_export.backends.reading import NotRun, RowErrors, Run

__all__ = ["CALLS", "activation_rounding", "check_kernels"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

CALLS = 4  # of each run: the prefill and the first decode steps
EXPOSED_BYTES = 128 << 20  # of inputs and outputs of products that a session gives at once
ROUNDED = 4  # MatMulNBits' accuracy_level of int8 activations


class _Piece(Protocol):
    """What is judged: ``reads`` and ``y`` are names of values, ``width`` their columns together."""

    @property
    def name(self) -> str: ...
    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def y(self) -> str: ...
    @property
    def width(self) -> int: ...

    def recomputed(self, file: OnnxFile, seen: Mapping[str, Array]) -> Array:
        """What ``y`` should be for the rows ``[positions, width]`` that were seen, float64."""


@dataclass(frozen=True, slots=True)
class _Product:
    """A product with the names of what it reads and makes."""

    name: str
    matrix: QuantizedMatrix
    x: str
    y: str
    bias: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    @property
    def width(self) -> int:
        return self.matrix.rows + self.matrix.columns

    def recomputed(self, file: OnnxFile, seen: Mapping[str, Array]) -> Array:
        x = seen[self.x]
        if self.matrix.accuracy_level == ROUNDED:
            x = _rounded(x, self.matrix.block)
        y = product(x.astype(np.float64), *self.matrix.packed(file), self.matrix.bits)
        return y + file.constant(self.bias) if self.bias else y


@dataclass(frozen=True, slots=True)
class _Mixture:
    """A mixture of experts: its choices are made anew from the scores that the kernel got."""

    node: WrittenNode
    reads: tuple[str, ...]
    width: int

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def y(self) -> str:
        return self.node.outputs[0]

    def recomputed(self, file: OnnxFile, seen: Mapping[str, Array]) -> Array:
        inputs = [
            seen[name].astype(np.float64) if name in self.reads else file.constant(name) if name else None
            for name in self.node.inputs
        ]
        (y,) = operator_of(file, self.node)(inputs)
        assert y is not None
        return y


def activation_rounding(
    decoder: OnnxFile, head: OnnxFile, entries: Mapping[str, str]
) -> Callable[[str, Floats], Floats] | None:
    """What the shipped products make of their inputs; None if none rounds them.

    ``entries``: weight -> the decoder's constant that holds it, or has the same bytes as what a product reads. Raises
    :class:`UnsupportedError` if products round the inputs of the same matrix in blocks of different sizes.
    """
    blocks: dict[tuple[Path, int, int] | str, int] = {}
    for file in (decoder, head):
        for piece in _products(file):
            codes, block = piece.matrix.codes, piece.matrix.block
            if piece.matrix.accuracy_level == ROUNDED and blocks.setdefault(_bytes_of(file, codes), block) != block:
                raise UnsupportedError(f"{file.path}: {piece.name}: rounds in blocks of {block}, another in others")
    if not blocks:
        return None
    of_weight = {
        weight: blocks[_bytes_of(decoder, entry)]
        for weight, entry in entries.items()
        if entry in decoder.constants and _bytes_of(decoder, entry) in blocks
    }
    return lambda weight, x: _rounded(x, of_weight[weight]) if weight in of_weight else x


def _bytes_of(file: OnnxFile, constant: str) -> tuple[Path, int, int] | str:
    """Where a constant's bytes lie; its name if they are in the model."""
    return file.place(constant) or constant


def check_kernels(decoder: OnnxFile, head: OnnxFile, runs: Sequence[Run], model: Model) -> RowErrors | NotRun:
    """The first :data:`CALLS` calls of every run. Sessions follow one another, each exposes as many products of a piece
    as fit into :data:`EXPOSED_BYTES`; exposing changes no bit of what the runtime computes."""
    sample = [replace(run, calls=run.calls[:CALLS]) for run in runs]
    positions = sum(len(run.tokens) for run in sample)
    errors: dict[str, Array] = {}
    quantized: list[_Piece] = [*_products(decoder), *_mixtures(decoder)]
    relay = Relay(decoder, sample, model)
    for piece in cut_pieces(decoder, decoder.model) if quantized else []:
        judged = (part for part in quantized if part.y in piece.made)
        for group in list(_groups(judged, positions)) or [[]]:  # a piece without any is run for the next one
            names = _values_of(group)
            seen: dict[str, list[Array]] = defaultdict(list)

            def collect(_call: int, made: Mapping[str, Array], seen: dict[str, list[Array]] = seen) -> None:
                for name, value in made.items():
                    seen[name].append(value)

            relay.run(piece, exposing(piece.model, names), names, collect)
            errors |= {part.name: _row_errors(decoder, part, seen) for part in group}
    states = _hidden_states(decoder, sample, model)
    if states:
        for group in _groups(_products(head), sum(value.shape[1] for value in states)):
            seen = _head_values(head, group, states)
            errors |= {f"{head.path.name} {part.name}": _row_errors(head, part, seen) for part in group}
    if not errors:
        return NotRun("nothing is quantized")
    worst = max(errors, key=lambda name: float(errors[name].max()))
    return RowErrors(np.concatenate(list(errors.values())), worst, len(errors))


def _products(file: OnnxFile) -> Iterator[_Product]:
    for node, matrix in quantized_matrices(file):
        if node.operator.endswith("MatMulNBits"):
            yield _Product(node.name, matrix, node.input(0), node.outputs[0], node.input(5))


def _mixtures(file: OnnxFile) -> Iterator[_Mixture]:
    constants = set(file.constants)
    for node in file.nodes:
        if node.operator == QMOE:
            reads = tuple(name for name in node.inputs if name and name not in constants)
            down = file.constant(node.input(5))
            # x and y are as wide as the experts' results; of scores and shares there is one for each expert.
            yield _Mixture(node, reads, 2 * down.shape[1] + (len(reads) - 1) * down.shape[0])


def _groups(pieces: Iterator[_Piece], positions: int) -> Iterator[list[_Piece]]:
    group: list[_Piece] = []
    size = 0
    for piece in pieces:
        exposed = 4 * positions * piece.width
        if group and size + exposed > EXPOSED_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += exposed
    if group:
        yield group


def _hidden_states(file: OnnxFile, runs: Sequence[Run], model: Model) -> list[Array]:
    """What head.onnx gets as shipped: of the calls that want more than one row."""
    wanted = [run for run in runs if any(call.rows > 1 for call in run.calls)]
    if not wanted:
        return []
    calls = [call for run in wanted for call in run.calls]
    states: list[Array] = []

    def collect(call: int, made: Mapping[str, Array]) -> None:
        if calls[call].rows > 1:
            states.append(made["hidden_states"][:, -calls[call].rows :])

    run_decoder(file, file.model, wanted, model, ("hidden_states",), collect)
    return states


def _head_values(file: OnnxFile, group: Sequence[_Piece], states: Sequence[Array]) -> dict[str, list[Array]]:
    names = _values_of(group)
    session = start_session(file, exposing(file.model, names))
    seen: dict[str, list[Array]] = defaultdict(list)
    for state in states:
        for name, value in zip(names, run_head(session, file, state, names), strict=True):
            seen[name].append(value)
    return seen


def _values_of(group: Sequence[_Piece]) -> list[str]:
    return list(dict.fromkeys(name for piece in group for name in (*piece.reads, piece.y)))


def _row_errors(file: OnnxFile, piece: _Piece, seen: Mapping[str, Sequence[Array]]) -> npt.NDArray[np.float64]:
    rows = {
        name: np.concatenate([value.reshape(-1, value.shape[-1]) for value in seen[name]])
        for name in (*piece.reads, piece.y)
    }
    y = piece.recomputed(file, rows)
    difference = np.linalg.norm(rows[piece.y] - y, axis=1)
    return difference / np.maximum(np.linalg.norm(y, axis=1), np.finfo(np.float32).tiny)


def _rounded(x: Floats, block: int) -> Floats:
    """float32 ``[rows, K]`` -> int8 codes times their scale, symmetric for each block of columns, as MLAS does:
    ``x * (127 / max)``, rounded half to even."""
    rows, width = x.shape
    padded = np.zeros((rows, -(-width // block) * block), np.float32)
    padded[:, :width] = x
    blocks = padded.reshape(rows, -1, block)
    largest = np.abs(blocks).max(-1, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    blocks = np.rint(blocks * factor) * (largest / np.float32(127))
    return np.ascontiguousarray(blocks.reshape(rows, -1)[:, :width])
