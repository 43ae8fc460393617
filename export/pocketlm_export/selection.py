"""Rows of a checkpoint's tensor as a weight of its own: what a fused projection is taken apart with.

A weight ``NAME[start:stop of period]`` has the rows ``start..stop`` of every ``period`` rows of the tensor ``NAME``, in
order. A period of all rows cuts out one piece (Phi-3's fused query, key and value); a short one, every n-th row or
groups of rows (Phi-3 small's interleaved gate and up).
"""

import re
from dataclasses import dataclass

__all__ = ["RowSelection", "selected", "tensor_of"]

SELECTED = re.compile(r"(?P<tensor>.+)\[(?P<start>\d+):(?P<stop>\d+) of (?P<period>\d+)\]")


@dataclass(frozen=True, slots=True)
class RowSelection:
    """Rows ``start..stop`` of every ``period`` rows."""

    start: int
    stop: int
    period: int

    def of(self, tensor: str) -> str:
        """The name of the weight that these rows of ``tensor`` are."""
        return f"{tensor}[{self.start}:{self.stop} of {self.period}]"

    def fits(self, rows: int) -> bool:
        """Whether a tensor of ``rows`` rows holds whole periods."""
        return 0 <= self.start < self.stop <= self.period and rows > 0 and rows % self.period == 0

    def count(self, rows: int) -> int:
        """How many of ``rows`` rows are selected."""
        return rows // self.period * (self.stop - self.start)


def selected(name: str) -> tuple[str, RowSelection | None]:
    """The tensor that a weight is in, and which rows of it; None for the tensor itself."""
    match = SELECTED.fullmatch(name)
    if match is None:
        return name, None
    return match["tensor"], RowSelection(int(match["start"]), int(match["stop"]), int(match["period"]))


def tensor_of(name: str) -> str:
    """The tensor that a weight is in."""
    return selected(name)[0]
