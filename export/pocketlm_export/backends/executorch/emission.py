"""What the emitters of :mod:`emit` share: the method, the open delegate, and what is made once for many nodes."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketlm_export.backends.base import Entry
from pocketlm_export.backends.executorch.importing import ScalarType
from pocketlm_export.backends.executorch.layout import NamedConstant
from pocketlm_export.backends.executorch.packing import Packing, Piece, array_piece
from pocketlm_export.backends.executorch.program import MethodBuilder
from pocketlm_export.backends.executorch.xnnpack import XnnpackGraph
from pocketlm_export.graph.graph import SEQUENCE, Graph, Value, WeightInfo
from pocketlm_export.graph.rotary import Rotary, rotary_tables

__all__ = ["Emission", "Emitter", "OpenDelegate", "Shape", "Table"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Emission:
    """The method as built, its output, the constants that its delegates find by key, and the place of each weight.

    An entry is named ``constant/I``, the program's constant I, or by the placeholder of a named constant.
    """

    method: MethodBuilder
    output: int
    named: Sequence[NamedConstant]
    entries: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class OpenDelegate:
    """The delegate being built: where each value is in its graph, and its arguments in the method."""

    graph: XnnpackGraph
    outputs: frozenset[Value]
    values: dict[Value, int] = field(default_factory=dict)
    int8: dict[int, int] = field(default_factory=dict)
    constants: dict[int, int] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Table:
    """The embedding's pieces, for a tied head to read: codes or values, and the scales where they are float32."""

    codes: Piece | None
    float_scales: Piece | None


class Emitter:
    """State of one translation. Tensors are indices into the method, values of the open delegate into its graph."""

    def __init__(self, graph: Graph, packing: Packing, longest_call: int) -> None:
        self.graph = graph
        self.packing = packing
        self.longest_call = longest_call
        self.method = method = MethodBuilder()
        self.named: list[NamedConstant] = []
        self.entries: dict[str, Entry] = {}
        self.table = Table(None, None)
        self.open: OpenDelegate
        self._shared: dict[object, Any] = {}

        ids = method.input(ScalarType.LONG, (1, longest_call))
        position = method.input(ScalarType.LONG, (1,), static=True)
        self.tensors: dict[Value, int] = {graph.ids: ids}
        first = method.activation((), ScalarType.LONG)
        method.kernel("aten::select_copy.int_out", [position, method.scalar(0), method.scalar(0)], first)
        self.start = method.kernel("aten::_local_scalar_dense", [first], method.integer())
        self.length = method.kernel("aten::sym_size.int", [ids, method.scalar(1)], method.integer())
        self.stop = self.integer("add", self.start, self.length)

    # The method

    def shape(self, value: Value) -> Shape:
        """The bounds of ``value``."""
        return tuple(self.longest_call if size == SEQUENCE else int(size) for size in value.shape)

    def integer(self, operation: str, left: int, right: int) -> int:
        """``add``, ``sub`` or ``mod`` of two integers of the method."""
        return self.method.kernel(f"executorch_prim::{operation}.Scalar", [left, right], self.method.integer())

    def slice(self, x: int, dimension: int, start: int, stop: int, shape: Shape) -> int:
        """Positions ``start..stop``, integers of the method, along ``dimension``."""
        scalar = self.method.scalar
        result = self.method.activation(shape)
        return self.method.kernel("aten::slice_copy.Tensor_out", [x, scalar(dimension), start, stop, scalar(1)], result)

    def make(self, value: Value) -> int:
        """The tensor of the method for ``value``."""
        if value not in self.tensors:
            self.tensors[value] = self.method.activation(self.shape(value))
        return self.tensors[value]

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for this key the first time."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def vector(self, weight: WeightInfo) -> int:
        """A vector as a constant of the program."""

        def make() -> int:
            piece = self.packing.vectors([(weight.name, weight.shape[0])])
            constant = self.method.constant(weight.shape, ScalarType.FLOAT, piece)
            self.entries[weight.name] = Entry(f"constant/{self.method.buffer_index(constant)}")
            return constant

        return self.once(("vector", weight.name), make)

    def number(self, value: float) -> int:
        """A float32 ``[1]`` as a constant of the program."""

        def make() -> int:
            return self.method.constant((1,), ScalarType.FLOAT, array_piece(lambda: np.array([value], np.float32), 4))

        return self.once(("number", float(np.float32(value))), make)

    def rotary(self, rotary: Rotary, head_dim: int) -> tuple[int, int]:
        """Rows of the two tables at the positions of the call: cosine, and sine with the sign of its half."""

        def make() -> tuple[int, int]:
            context, half, width = self.graph.context_length, len(rotary.frequencies), head_dim
            rest = width - 2 * half

            def cosine() -> np.ndarray[Any, Any]:
                cos, _ = rotary_tables(rotary, context)
                return np.concatenate((cos, cos, np.ones((context, rest), np.float32)), 1)

            def sine() -> np.ndarray[Any, Any]:
                _, sin = rotary_tables(rotary, context)
                return np.concatenate((-sin, sin, np.zeros((context, rest), np.float32)), 1)

            rows = []
            for table in (cosine, sine):
                piece = array_piece(table, 4 * context * width)
                constant = self.method.constant((context, 1, width), ScalarType.FLOAT, piece)
                rows.append(self.slice(constant, 0, self.start, self.stop, (self.longest_call, 1, width)))
            return rows[0], rows[1]

        return self.once(("rotary", rotary, head_dim), make)

    # The open delegate

    def read(self, value: Value) -> int:
        """``value`` in the open delegate; an input of it if it was made outside."""
        if value not in self.open.values:
            self.open.values[value] = self.open.graph.input(self.shape(value))
            self.open.inputs.append(self.tensors[value])
        return self.open.values[value]

    def read_constant(self, tensor: int, shape: Shape) -> int:
        """A constant tensor of the program as an input of the open delegate."""
        if tensor not in self.open.constants:
            self.open.constants[tensor] = self.open.graph.input(shape)
            self.open.inputs.append(tensor)
        return self.open.constants[tensor]

    def output(self, value: Value) -> int | None:
        """An output of the open delegate if ``value`` is read outside, else None."""
        if value not in self.open.outputs:
            return None
        self.open.results.append(self.make(value))
        return self.open.graph.output(self.shape(value))

    def name(self, description: str, *parts: Piece) -> NamedConstant:
        """A constant that XNNPACK packs; ``parts`` are all the bytes that are packed with it."""
        placeholder = hashlib.sha256(f"placeholder {len(self.named)}".encode()).hexdigest()
        self.named.append(NamedConstant(description, parts, placeholder))
        return self.named[-1]

    def mean(self, x: int, epsilon: float | None = None) -> int:
        """mean(x) + epsilon over the last axis, with a filter of 1/width: XNNPACK's schema has no mean."""

        def filled(length: int, value: float) -> NamedConstant:
            piece = array_piece(lambda: np.full(length, value, np.float32), 4 * length)
            return self.once(("filled", length, value), lambda: self.name(f"float32 [{length}] {value}", piece))

        graph, width = self.open.graph, self.open.graph.shape(x)[-1]
        bias = None if epsilon is None else graph.constant((1,), filled(1, epsilon))
        return graph.fully_connected(x, graph.constant((1, width), filled(width, 1 / width)), bias)

    def with_number(self, kind: str, x: int, value: float, output: int | None = None) -> int:
        """The binary operation ``kind`` of ``x`` and a number."""
        return self.open.graph.binary(kind, x, self.read_constant(self.number(value), (1,)), output)

    def center(self, x: int) -> int:
        """x - mean(x) over the last axis."""
        graph = self.open.graph
        return graph.binary("Subtract", x, self.mean(x))

    def normalize(
        self, x: int, epsilon: float, weight: WeightInfo, offset: float = 0.0, output: int | None = None
    ) -> int:
        """x / sqrt(mean(x^2) + epsilon) * (weight + offset) over the last axis."""
        graph = self.open.graph
        root = graph.unary("ReciprocalSquareRoot", self.mean(graph.unary("Square", x), epsilon))
        normal = graph.binary("Multiply", x, root)
        factors = self.read_constant(self.vector(weight), weight.shape)
        if offset:
            factors = self.with_number("Add", factors, offset)
        return graph.binary("Multiply", normal, factors, output)
