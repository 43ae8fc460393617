"""Schemes as rows of data. A scheme names a row for each class of tensors; a backend translates a row or refuses it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pocketlm.manifest import SchemeName
from pocketlm_export.graph.graph import Graph, Linear

__all__ = ["HEADS", "SCHEMES", "SchemeRow", "assign_rows", "fitting_row", "stored_bits"]


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


INT4 = SchemeRow("int4", 4, 32, "fit")
INT8 = SchemeRow("int8", 8, None, "absmax")

SCHEMES: Mapping[SchemeName, SchemeRow | None] = {"fp32": None, "int8": INT8, "int4": INT4}
HEADS: Mapping[SchemeName, SchemeRow] = {"int8": INT8, "int4": INT4}


def assign_rows(graph: Graph, scheme: SchemeName, head: SchemeName) -> dict[str, SchemeRow | None]:
    """The row of every weight of ``graph``; None keeps its values.

    Matrices of linears take the scheme's row, embedding and lm head the head's, vectors none. Rows whose group does
    not divide a matrix's columns fall back to int8.
    """
    rows: dict[str, SchemeRow | None] = dict.fromkeys(graph.weights())
    if SCHEMES[scheme] is None:
        return rows
    for node in graph:
        if isinstance(node, Linear):
            for weight in node.weights:
                rows[weight.name] = fitting_row(SCHEMES[scheme], weight.shape)
    for table in (graph.head.weights[0], graph.embedding.weight):
        rows[table.name] = fitting_row(HEADS[head], table.shape)
    return rows


def fitting_row(row: SchemeRow | None, shape: tuple[int, ...]) -> SchemeRow | None:
    """``row``, or int8 where its groups don't divide the columns."""
    if row is not None and row.group is not None and shape[-1] % row.group:
        return INT8
    return row


def stored_bits(row: SchemeRow | None, shape: tuple[int, ...]) -> int:
    """Bits that the store holds for a tensor: codes and 16-bit scales; float32 values without a row."""
    elements = math.prod(shape)
    if row is None:
        return 32 * elements
    return elements * row.bits + elements // shape[-1] * row.groups(shape[-1]) * 16
