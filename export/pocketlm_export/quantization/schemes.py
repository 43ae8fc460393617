"""Schemes as rows of data. A scheme names a row for each class of tensors; a backend translates a row or refuses it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pocketlm.manifest import SchemeName
from pocketlm_export.graph.graph import Graph, Linear, MixtureOfExperts, Node, WeightInfo

__all__ = ["GROUPS", "HEADS", "SCHEMES", "SchemeRow", "assign_rows", "fitting_row", "scheme_row", "stored_bits"]

GROUPS = (32, 64, 128)  # sizes of int4's groups that every backend's kernels take; the first is the default


@dataclass(frozen=True, slots=True)
class SchemeRow:
    """Symmetric integers of ``bits``, one scale for each ``group`` of columns, or for each row if it is None.

    ``scale_rule`` names the way a scale is chosen: ``fit`` is max(max/7, -min/8) of the group, so that nothing is
    clipped on either side; ``absmax`` is max|w|/127. Codes lie in ``-2^(bits-1)..2^(bits-1)-1``, for int8 in -127..127.
    """

    name: SchemeName
    bits: int
    group: int | None
    scale_rule: str

    def groups(self, columns: int) -> int:
        """How many scales a row of ``columns`` has."""
        return columns // (self.group or columns)


INT4 = SchemeRow("int4", 4, GROUPS[0], "fit")
INT8 = SchemeRow("int8", 8, None, "absmax")

SCHEMES: Mapping[SchemeName, SchemeRow | None] = {"fp32": None, "int8": INT8, "int4": INT4}
HEADS: Mapping[SchemeName, SchemeRow] = {"int8": INT8, "int4": INT4}


def scheme_row(name: SchemeName, group: int | None = GROUPS[0]) -> SchemeRow | None:
    """The row of a scheme, as a manifest states it; ``group`` is int4's alone."""
    row = SCHEMES[name]
    return row if row is None or row.group is None else replace(row, group=group)


def assign_rows(
    graph: Graph, scheme: SchemeName, head: SchemeName, group: int = GROUPS[0]
) -> dict[str, SchemeRow | None]:
    """The row of every weight of ``graph``; None keeps its values.

    Matrices of linears and experts take the scheme's row, embedding and lm head the head's, vectors and routers none;
    ``group`` is the size of
    int4's groups, where it fits: see :func:`fitting_row`.
    """
    rows: dict[str, SchemeRow | None] = dict.fromkeys(graph.weights())
    if SCHEMES[scheme] is None:
        return rows
    for node in graph:
        for weight in _matrices(node):
            rows[weight.name] = fitting_row(scheme_row(scheme, group), weight.shape)
    for table in (graph.head.weights[0], graph.embedding.weight):
        rows[table.name] = fitting_row(scheme_row(head, group), table.shape)
    return rows


def _matrices(node: Node) -> tuple[WeightInfo, ...]:
    match node:
        case Linear():
            return node.weights
        case MixtureOfExperts():
            return (*node.gates, *node.ups, *node.downs)
        case _:
            return ()


def fitting_row(row: SchemeRow | None, shape: tuple[int, ...]) -> SchemeRow | None:
    """``row``, with the largest of :data:`GROUPS` up to its own that divides the columns; int8 where none does."""
    if row is None or row.group is None:
        return row
    fitting = [group for group in GROUPS if group <= row.group and shape[-1] % group == 0]
    return replace(row, group=max(fitting)) if fitting else INT8


def stored_bits(row: SchemeRow | None, shape: tuple[int, ...]) -> int:
    """Bits that the store holds for a tensor: codes and 16-bit scales; float32 values without a row."""
    elements = math.prod(shape)
    if row is None:
        return 32 * elements
    return elements * row.bits + elements // shape[-1] * row.groups(shape[-1]) * 16
