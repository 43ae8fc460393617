"""What is asked of a comparison, and whether its rounds show it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketlm.errors import InputError

__all__ = ["EXPORT_GOALS", "RATE_GOALS", "Goal", "Rounds", "Verdict", "judge"]

Rounds = Mapping[str, Sequence[Mapping[str, float]]]
"""Of each way its rounds, in each the measured figures by name. Round i of all ways ran next to each other."""

GB = 1e9


@dataclass(frozen=True, slots=True)
class Goal:
    """``measure`` of ``way``, divided by the same of ``against`` in the same round; absolute without one.

    ``must`` and ``reach`` are upper bounds, or lower ones with ``at_least``; ``needs`` is the CPU feature without which
    the goal is not asked for.
    """

    title: str
    way: str
    against: str | None
    measure: str
    must: float
    reach: float | None
    at_least: bool = False
    needs: str | None = None

    def met(self, value: float, limit: float) -> bool:
        """Whether ``value`` is on the right side of ``limit``, or on it."""
        return value >= limit if self.at_least else value <= limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """``values`` has one for each round; ``status`` is by their median: ``reached for``, ``must``, ``missed``, or
    ``not asked`` on a CPU without what the goal needs."""

    goal: Goal
    values: tuple[float, ...]
    status: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)


EXPORT_GOALS = (
    Goal("ONNX alone, wall", "onnx", "genai", "wall_seconds", 0.35, 0.15),
    Goal("ONNX alone, peak memory", "onnx", "genai", "peak_resident", 0.35, 0.2),
    Goal("ONNX alone, size", "onnx", "genai", "size", 1.0, None),
    Goal("all three, wall", "all", "genai", "wall_seconds", 1.0, 0.5),
    Goal("all three, peak memory", "all", None, "peak_resident", 1.6 * GB, 1.0 * GB),
    Goal("all three again, store warm, wall", "warm", "all", "wall_seconds", 0.6, 0.3),
)
RATE_GOALS = (
    Goal("ONNX, decode", "onnx", "genai", "decode", 1.0, 1.1, at_least=True),
    Goal("ONNX, prefill-128", "onnx", "genai", "prefill", 1.3, 1.6, at_least=True),
    Goal(".pte, decode", "executorch", "onnx", "decode", 1.25, 1.5, at_least=True, needs="avx512_vnni"),
    Goal(".pte, prefill-128", "executorch", "onnx", "prefill", 1.8, 2.2, at_least=True, needs="avx512_vnni"),
    Goal(".pte, decode", "executorch", "llama_cpp", "decode", 1.0, 1.3, at_least=True, needs="avx512_vnni"),
    Goal(".pte, prefill-128", "executorch", "llama_cpp", "prefill", 1.0, 1.5, at_least=True, needs="avx512_vnni"),
)


def judge(goals: Sequence[Goal], rounds: Rounds, features: Sequence[str]) -> list[Verdict]:
    """The goals whose ways were measured, each with a value for each round.

    Raises :class:`InputError` if two ways that are compared have not as many rounds.
    """
    return [
        _verdict(goal, rounds, features)
        for goal in goals
        if goal.way in rounds and (goal.against is None or goal.against in rounds)
    ]


def _verdict(goal: Goal, rounds: Rounds, features: Sequence[str]) -> Verdict:
    values = [figures[goal.measure] for figures in rounds[goal.way]]
    if goal.against is not None:
        others = [figures[goal.measure] for figures in rounds[goal.against]]
        if len(values) != len(others):
            raise InputError(f"{goal.way} has {len(values)} rounds, but {goal.against} {len(others)}")
        values = [value / other for value, other in zip(values, others, strict=True)]
    if not values:
        raise InputError(f"{goal.way} has no rounds")
    return Verdict(goal, tuple(values), _status(goal, statistics.median(values), features))


def _status(goal: Goal, value: float, features: Sequence[str]) -> str:
    if goal.needs is not None and goal.needs not in features:
        return "not asked"
    if goal.reach is not None and goal.met(value, goal.reach):
        return "reached for"
    return "must" if goal.met(value, goal.must) else "missed"
