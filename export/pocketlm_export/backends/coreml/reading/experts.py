"""The mixtures of experts of a written program, followed from the choice of the largest shares."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pocketlm_export.backends.coreml.reading.walk import Walk

__all__ = ["WrittenExperts", "read_experts"]


@dataclass(frozen=True, slots=True)
class WrittenExperts:
    """How many experts a token has, and whether their shares are divided by their sum; ``indices`` is the value that
    says which, ``tables`` are the names of those that count the rows of a matrix."""

    chosen: int
    renormalize: bool
    indices: str
    tables: tuple[str, ...]


def read_experts(walk: Walk) -> Iterator[WrittenExperts]:
    """In the order of execution. Raises :class:`pocketlm.BundleError` where what is chosen from is no softmax, or what
    is gathered is another choice's."""
    for top in walk.of_kind("topk"):
        chosen = int(walk.number(top, "k"))
        walk.expect(top, axis=-1, ascending=False)
        shares = walk.maker(top.inputs["x"][0], "softmax")
        walk.expect(shares, axis=-1)
        walk.chain(shares.inputs["x"][0], ("linear", "x"))
        values, indices = top.outputs
        tables = tuple(_row_tables(walk, indices, chosen))
        sums = [o for o in walk.of_kind("reduce_sum") if o.inputs["x"] == (values,)]
        mixed = values
        for total in sums:
            walk.expect(total, axes=[-1], keep_dims=True)
            quotient = walk.reader(total.outputs[0], "real_div")
            walk.same([*quotient.inputs["x"], values], "other shares divided by the sum")
            (mixed,) = quotient.outputs
        apart = walk.reader(mixed, "reshape")
        walk.expect(apart, shape=[chosen, 1, 1])
        walk.reader(apart.outputs[0], "mul")
        yield WrittenExperts(chosen, bool(sums), indices, tables)


def _row_tables(walk: Walk, indices: str, chosen: int) -> Iterator[str]:
    """Of the rows ``index * count + (0, 1, ...)`` of each of three matrices."""
    apart = walk.reader(indices, "reshape")
    walk.expect(apart, shape=[chosen, 1])
    firsts = [o for o in walk.of_kind("mul") if o.inputs["x"] == apart.outputs]
    if len(firsts) != 3:
        raise walk.refused(indices, f"rows of {len(firsts)} matrices, where three are expected")
    for first in firsts:
        rows = walk.reader(first.outputs[0], "add")
        gather = walk.reader(rows.outputs[0], "gather")
        walk.expect(gather, axis=0, batch_dims=0)
        walk.same([*gather.inputs["indices"], *rows.outputs], "rows of another choice")
        (table,) = rows.inputs["y"]
        if not np.array_equal(walk.table(table), np.arange(int(walk.number(first, "y")))):
            raise walk.refused(table, "not the numbers of the rows of one expert")
        yield table
