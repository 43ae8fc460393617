"""The five levels of the certificate, each from measurements to a verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pocketlm.certificate import LEVELS, Check, Level, rounded
from pocketlm.errors import PocketLMError, UnavailableError
from pocketlm_export.backends.reading import NotRun, RowErrors, Run, Trace
from pocketlm_export.verify.comparison import Likeness, cache_deviations, likeness, logit_deviations
from pocketlm_export.verify.thresholds import (
    FLOAT16_LARGEST,
    FLOAT32_PIECES,
    FLOAT32_REGRET,
    FLOAT32_RMS,
    FLOAT32_WHOLE_RMS,
    GRAPH,
    KERNEL_OUTLIERS,
    KERNEL_ROW,
    KERNEL_WORST,
    REGRET,
    ROUTER_TIE,
    WHOLE_KL,
    WHOLE_RMS,
    check,
)

__all__ = [
    "Greedy",
    "attempted",
    "emulated_level",
    "graph_level",
    "kernels_level",
    "level",
    "meaning_level",
    "not_run",
    "whole_level",
]

Facts = dict[str, float | int | str | None]


def attempted(number: int, work: Callable[[], Level]) -> Level:
    """What ``work`` returns; a refusal by name is a failure, a runtime that isn't here is "not run"."""
    try:
        return work()
    except UnavailableError as error:
        return Level(level=number, name=LEVELS[number], status="not run", reason=str(error))
    except PocketLMError as error:
        return Level(level=number, name=LEVELS[number], status="failed", reason=str(error))


def level(number: int, checks: Sequence[Check], facts: Mapping[str, float | int | str | None] = {}) -> Level:
    """Failed if a check did; the reason is the first."""
    failed = next((item for item in checks if not item.passed), None)
    return Level(
        level=number,
        name=LEVELS[number],
        status="passed" if failed is None else "failed",
        reason=None if failed is None else _words(failed),
        checks=list(checks),
        facts=dict(facts),
    )


def graph_level(runs: Sequence[Run], reference: Sequence[Trace], read: Sequence[Trace]) -> Level:
    """Level 2: the reader's float64 execution of the file against the float64 reference."""
    logits = logit_deviations(runs, reference, read)
    caches = cache_deviations(runs, reference, read)
    return level(
        2,
        [
            check(GRAPH, deviation.largest, subject=f"{what}, {phase}", where=deviation.where)
            for what, deviations in (("logits", logits), ("keys and values", caches))
            for phase, deviation in deviations.items()
        ],
    )


def meaning_level(
    runs: Sequence[Run],
    reference: Sequence[Trace],
    eager: Sequence[Trace],
    measured: Sequence[Trace | None] | RowErrors | NotRun,
) -> Level:
    """Level 3: the real runtime in float32. ``eager``: the reference in float32, whose distance is the floor."""
    match measured:
        case NotRun():
            return not_run(3, measured)
        case RowErrors():
            worst = float(measured.errors.max())
            facts: Facts = {"delegates": measured.pieces, "rows": len(measured.errors)}
            return level(3, [check(FLOAT32_PIECES, worst, where=measured.worst)], facts)
    checks = []
    for what, compare in (("logits", logit_deviations), ("keys and values", cache_deviations)):
        floors = compare(runs, reference, [e if m is not None else None for e, m in zip(eager, measured, strict=True)])
        for phase, deviation in compare(runs, reference, measured).items():
            floor = floors[phase].rms
            subject = f"{what}, {phase}"
            checks.append(check(FLOAT32_RMS, deviation.rms, subject=subject, floor=floor, where=deviation.where))
    return level(3, checks)


def kernels_level(measured: RowErrors | NotRun) -> Level:
    """Level 4: quantized linears, each recomputed from the inputs that the real runtime gave it."""
    if isinstance(measured, NotRun):
        return not_run(4, measured)
    beyond = float((~(measured.errors <= KERNEL_ROW)).mean())
    worst = float(measured.errors.max())
    checks = [check(KERNEL_OUTLIERS, beyond), check(KERNEL_WORST, worst, where=measured.worst)]
    facts: Facts = {
        "linears": measured.pieces,
        "rows": len(measured.errors),
        "median row": rounded(float(np.median(measured.errors))),
    }
    return level(4, checks, facts)


@dataclass(frozen=True, slots=True)
class Greedy:
    """Tokens that an artifact chose, and the reference's logits of each choice, ``[steps, vocabulary]``. ``tie``: up to
    where the reference followed its choices of experts; None if it didn't. ``runtime``: how it ran, if not in a session
    that goes on with its own choices."""

    chosen: Sequence[int]
    reference: Sequence[Trace]
    tie: float | None = None
    runtime: str | None = None


def whole_level(
    reference: Sequence[Trace],
    simulated: Sequence[Trace],
    shipped: Sequence[Trace],
    greedy: Greedy,
    *,
    quantized: bool,
) -> Level:
    """Level 5: the artifact as users run it. ``simulated``: the reference with the activations' rounding that the
    kernels have; for an artifact that isn't ``quantized`` the eager float32 reference."""
    floor, found = likeness(reference, simulated), likeness(reference, shipped)
    regret, facts = _greedy_regret(greedy)
    if quantized:
        checks = [
            check(WHOLE_RMS, found.rms, floor=floor.rms),
            check(WHOLE_KL, found.mean_kl, floor=floor.mean_kl),
            check(REGRET, regret, floor=floor.largest),
        ]
    else:
        checks = [
            check(FLOAT32_WHOLE_RMS, found.rms, floor=floor.rms),
            check(FLOAT32_REGRET, regret, floor=floor.largest),
        ]
    return level(5, checks, {**_likeness_facts(found), **facts})


def emulated_level(reference: Sequence[Trace], emulated: Sequence[Trace], followed: Sequence[Trace]) -> Level:
    """Level 5 where the runtime exists nowhere here: the interpreter in the artifact's own precision.

    ``followed``: the reference that follows the artifact's choices of experts at near ties; ``reference`` itself where
    there are no experts. What rounding chooses at a near tie changes its position and, through the cache, all behind
    it, by no fault and to no limit. Followed, every position has to agree, and any other wrong choice shows.
    """
    found = likeness(reference, emulated)
    facts: Facts = {**_likeness_facts(found), "runtime": "interpreter"}
    checks = [check(FLOAT16_LARGEST, likeness(followed, emulated).largest)]
    return level(5, checks, {**facts, **_followed_facts(followed, ROUTER_TIE.limit)})


def _followed_facts(followed: Sequence[Trace], tie: float) -> Facts:
    """How many choices of experts are the artifact's; none where no trace has any."""
    conceded = [np.stack(trace.conceded) for trace in followed if trace.conceded]  # [mixtures, positions]
    if not conceded:
        return {}
    margins = np.concatenate(conceded, axis=1)
    excused = (margins > 0) & (margins <= tie)
    return {
        "choices of experts": margins.size,
        "followed at a near tie": int(excused.sum()),
        "positions with such a tie": int(excused.any(0).sum()),
        "others that differ": int((margins > tie).sum()),
    }


def _likeness_facts(found: Likeness) -> Facts:
    return {
        "rms": rounded(found.rms),
        "mean KL": rounded(found.mean_kl),
        "top-1": rounded(found.top1),
        "positions": found.positions,
    }


def _greedy_regret(greedy: Greedy) -> tuple[float, Facts]:
    """The largest regret over the logits' deviation, and where the choices leave the reference's."""
    logits = np.concatenate([row for trace in greedy.reference for row in trace.logits]).astype(np.float64)
    chosen = np.asarray(greedy.chosen)
    steps = np.arange(len(chosen))
    deviation = float(logits.std()) or 1.0
    regrets = (logits.max(-1) - logits[steps, chosen]) / deviation
    apart = np.flatnonzero(regrets > 0)
    facts: Facts = {"greedy steps": len(chosen), "greedy steps off the reference's choice": len(apart)}
    if greedy.tie is not None:
        facts |= {"near tie": rounded(greedy.tie), **_followed_facts(greedy.reference, greedy.tie)}
    if greedy.runtime is not None:
        facts["runtime"] = greedy.runtime
    if len(apart):
        first = int(apart[0])
        second, best = np.partition(logits[first], -2)[-2:]
        facts["first divergence at step"] = first
        facts["reference's margin there"] = rounded(float(best - second) / deviation)
    return float(regrets.max()), facts


def not_run(number: int, reason: NotRun) -> Level:
    """Neither passed nor failed."""
    return Level(level=number, name=LEVELS[number], status="not run", reason=reason.reason)


def _words(item: Check) -> str:
    figure = "not finite" if item.figure is None else f"{item.figure:g}"
    place = f" ({item.where})" if item.where else ""
    return f"{item.name} {figure}, threshold {item.threshold:g}{place}"
