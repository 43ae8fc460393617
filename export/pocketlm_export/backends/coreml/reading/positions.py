"""The positions of a call as a function of a written program computes them."""

from dataclasses import dataclass

import numpy as np

from pocketlm_export.backends.coreml.reading.walk import Walk

__all__ = ["Positions", "read_positions"]


@dataclass(frozen=True, slots=True)
class Positions:
    """Names: ``begin`` the position of the call's first token, ``end`` past the last, ``each`` one for each token,
    ``every`` the table 0, 1, ... of the whole context. ``steps``: the function takes one token a call."""

    begin: str
    end: str
    each: str
    every: str
    context_length: int
    steps: bool


def read_positions(walk: Walk) -> Positions:
    """Raises :class:`pocketlm.BundleError` where ``begin`` isn't the input, or the table not 0, 1, ..."""
    begin, every = "position", "positions"
    table = walk.table(every)
    if table.dtype.kind != "i" or not np.array_equal(table, np.arange(len(table))):
        raise walk.refused(every, "not the numbers from 0 to the context's last")
    end = _end(walk, begin)
    steps = not walk.kind_of(end[1])
    each = begin
    if not steps:
        walk.chain(end[1], ("slice_by_size", "x"), ("shape", "x"))
        size = walk.maker(end[1], "slice_by_size")
        walk.expect(size, begin=[1], size=[1])
        walk.same([walk.chain(end[1], ("slice_by_size", "x"), ("shape", "x")), "input_ids"], "a length of two inputs")
        cuts = [o for o in walk.of_kind("slice_by_index") if o.inputs["x"][0] == every]
        if len(cuts) != 1 or cuts[0].inputs["begin"][0] != begin or cuts[0].inputs["end"][0] != end[0]:
            raise walk.refused(every, "not cut from the first to the last position of the call")
        if any(name in cuts[0].inputs for name in ("stride", "begin_mask", "end_mask", "squeeze_mask")):
            raise walk.refused(every, "cut with a stride or a mask")
        each = cuts[0].outputs[0]
    return Positions(begin, end[0], each, every, len(table), steps)


def _end(walk: Walk, begin: str) -> tuple[str, str]:
    """The one sum of the position, and what is added: the length, or the one of a step."""
    sums = [o for o in walk.of_kind("add") if begin in (*o.inputs["x"], *o.inputs["y"])]
    if len(sums) != 1 or sums[0].inputs["x"][0] != begin:
        raise walk.refused(begin, f"in {len(sums)} sums, where one is expected: the end of the call")
    added = sums[0].inputs["y"][0]
    if not walk.kind_of(added):
        walk.expect(sums[0], y=[1])
    return sums[0].outputs[0], added
