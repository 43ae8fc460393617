"""Gates: limits of ratios between two results, as ``pocketlm compare --gate`` takes them.

gates  = gate { "," gate }
gate   = figure operator number
figure = a name of :data:`pocketlm.measuring.comparison.FIGURES`, or "arm64_instructions"
operator = ">=" | "<="
number = a positive decimal number
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from pocketlm.errors import InputError
from pocketlm.manifest import Closed
from pocketlm.measuring.comparison import FIGURES, Comparison, Ratio

__all__ = ["GROUPS", "Gate", "GateVerdict", "judge", "parse_gates"]

# Names that stand for several figures, each of which has to keep the limit.
GROUPS = {"arm64_instructions": ("prefill_instructions", "decode_instructions")}
PATTERN = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=)\s*([0-9]+(?:\.[0-9]+)?)\s*")


class Gate(Closed):
    """``figure`` of B over that of A is to be at least, or at most, ``limit``."""

    figure: str
    operator: Literal[">=", "<="]
    limit: float

    def __str__(self) -> str:
        return f"{self.figure}{self.operator}{self.limit:g}"

    def keeps(self, ratio: float) -> bool:
        """Whether ``ratio`` is on the right side of the limit, or on it."""
        return ratio >= self.limit if self.operator == ">=" else ratio <= self.limit


class GateVerdict(Closed):
    """A gate on one pair of runs. ``uncertain``: the ratio's interval includes the limit."""

    gate: str
    where: str
    ratio: Ratio
    passed: bool
    uncertain: bool
    noisy: bool

    @property
    def words(self) -> str:
        """For people: the figure, its limit and its interval."""
        value = self.ratio.ratio
        interval = "" if value.low == value.high else f" ({value.low:.4f} to {value.high:.4f})"
        noisy = ", noisy" if self.noisy else ""
        return f"{self.where}: {self.ratio.figure} is {value.median:.4f}{interval}, limit {self.gate}{noisy}"


def parse_gates(text: str) -> tuple[Gate, ...]:
    """The gates of ``text``. Raises :class:`InputError` naming the one that can't be read, and what is valid."""
    gates = []
    for part in text.split(","):
        match = PATTERN.fullmatch(part)
        if match is None:
            raise InputError(f"--gate {part.strip()!r:.60}: must be FIGURE>=NUMBER or FIGURE<=NUMBER")
        figure, operator, number = match.groups()
        if figure not in FIGURES and figure not in GROUPS:
            raise InputError(f"--gate {part.strip():.60}: unknown figure; valid: {', '.join((*FIGURES, *GROUPS))}")
        limit = float(number)
        if not 0 < limit < math.inf:
            raise InputError(f"--gate {part.strip():.60}: the limit must be a positive number")
        gates.append(Gate(figure=figure, operator=">=" if operator == ">=" else "<=", limit=limit))
    return tuple(gates)


def judge(comparison: Comparison, gates: Sequence[Gate]) -> list[GateVerdict]:
    """Each gate on each pair that has its figure.

    Raises :class:`InputError` for a gate whose figure no pair has, or that one of two results has and the other lacks.
    """
    verdicts: list[GateVerdict] = []
    for gate in gates:
        for figure in GROUPS.get(gate.figure, (gate.figure,)):
            verdicts += _judge(comparison, gate, figure)
    return verdicts


def _judge(comparison: Comparison, gate: Gate, figure: str) -> Iterator[GateVerdict]:
    found = False
    for pair in comparison.pairs:
        if figure in pair.lost:
            raise InputError(f"--gate {gate}: {pair.name}: only one of the results has it")
        for ratio in pair.ratios:
            if ratio.figure == figure:
                found = True
                yield GateVerdict(
                    gate=str(gate),
                    where=pair.name,
                    ratio=ratio,
                    passed=gate.keeps(ratio.ratio.median),
                    uncertain=ratio.ratio.low < gate.limit < ratio.ratio.high,
                    noisy=bool(pair.noisy),
                )
    if not found:
        raise InputError(f"--gate {gate}: no pair of runs has {figure}")
