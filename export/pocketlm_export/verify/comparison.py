"""How far two computations of the same runs are apart: figures in units of the reference's standard deviation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.reading import Run, Trace

__all__ = ["Deviation", "Likeness", "cache_deviations", "likeness", "logit_deviations", "router_noise"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Deviation:
    """The largest and the root mean square difference of what is compared, over the reference's deviation; NaN where
    something is not finite, infinite where shapes differ. ``where`` names the place of the largest."""

    largest: float
    rms: float
    where: str


@dataclass(frozen=True, slots=True)
class Likeness:
    """``largest`` and ``rms`` as in :class:`Deviation`; ``mean_kl`` in nats; ``top1`` is the share of equal choices."""

    largest: float
    rms: float
    mean_kl: float
    top1: float
    positions: int


def phase(run: Run, index: int) -> str:
    """``probe``, ``prefill`` or ``decode``: where call ``index`` of ``run`` belongs; the three are judged apart."""
    if run.past is not None:
        return "probe"
    return "decode" if len(run.calls[index].tokens) == 1 else "prefill"


def logit_deviations(
    runs: Sequence[Run], reference: Sequence[Trace], other: Sequence[Trace | None]
) -> dict[str, Deviation]:
    """By phase. Runs whose other trace is None are left out."""
    deviation = _deviation(row for trace in reference for row in trace.logits)
    parts = _Parts(deviation)
    for run, left, right in zip(runs, reference, other, strict=True):
        if right is None:
            continue
        for index in range(len(run.calls)):
            there = right.logits[index] if index < len(right.logits) else None
            parts.add(phase(run, index), f"call {index + 1} of {run.name}", left.logits[index], there)
    return parts.deviations()


def cache_deviations(
    runs: Sequence[Run], reference: Sequence[Trace], other: Sequence[Trace | None]
) -> dict[str, Deviation]:
    """Cached keys and values of every layer by phase, each in units of its own layer's deviation. Empty where the other
    computation's caches can't be seen."""
    parts = _Parts(1.0)
    for side in ("keys", "values"):
        seen = [trace for trace in other if trace is not None and getattr(trace, side)]
        if not seen:
            continue
        for layer in range(len(getattr(reference[0], side))):
            deviation = _deviation(getattr(trace, side)[layer] for trace in reference)
            for run, left, right in zip(runs, reference, other, strict=True):
                if right is None:
                    continue
                ours, theirs = getattr(left, side)[layer], getattr(right, side)
                there = theirs[layer] if layer < len(theirs) else None
                for name, positions in _positions(run):
                    place = f"{side} of layer {layer} in {run.name}"
                    if there is None or there.shape != ours.shape:
                        parts.add(name, place, ours, None)
                    else:
                        parts.add(name, place, ours[:, positions] / deviation, there[:, positions] / deviation)
    return parts.deviations()


def likeness(reference: Sequence[Trace], other: Sequence[Trace]) -> Likeness:
    """Of the logits of all positions together."""
    deviation = _deviation(row for trace in reference for row in trace.logits)
    largest = squares = divergence = 0.0
    same = positions = elements = 0
    for left, right in _pairs(reference, other):
        difference = right.astype(np.float64) - left
        largest = max(largest, float(np.abs(difference).max())) if np.isfinite(difference).all() else float("nan")
        squares += float(np.square(difference).sum())
        divergence += float(_kl(left, right).sum())
        same += int((left.argmax(-1) == right.argmax(-1)).sum())
        positions += len(left)
        elements += left.size
    rms = float(np.sqrt(squares / elements))
    return Likeness(largest / deviation, rms / deviation, divergence / positions, same / positions, positions)


def router_noise(reference: Sequence[Trace], other: Sequence[Trace]) -> float:
    """The most by which the distance of two experts' scores differs, over the deviation of their mixture's scores."""
    largest = 0.0
    for mixture in range(len(reference[0].scores)):
        left, right = (np.concatenate([trace.scores[mixture] for trace in traces]) for traces in (reference, other))
        change = right.astype(np.float64) - left
        largest = max(largest, float(np.ptp(change, axis=-1).max()) / _deviation([left]))
    return largest


class _Parts:
    def __init__(self, deviation: float) -> None:
        self._deviation = deviation
        self._figures: dict[str, tuple[float, str, float, int]] = {}

    def add(self, name: str, place: str, reference: Array, other: Array | None) -> None:
        largest, where, squares, count = self._figures.get(name, (0.0, place, 0.0, 0))
        if other is None or other.shape != reference.shape:
            here, square = float("inf"), float("inf")
        else:
            difference = np.abs(other.astype(np.float64) - reference)
            here, square = float(difference.max(initial=0.0)), float(np.square(difference).sum())
        if not (here <= largest or np.isnan(largest)):  # the first NaN stays
            largest, where = here, place
        self._figures[name] = largest, where, squares + square, count + reference.size

    def deviations(self) -> dict[str, Deviation]:
        return {
            name: Deviation(largest / self._deviation, float(np.sqrt(squares / count)) / self._deviation, where)
            for name, (largest, where, squares, count) in self._figures.items()
            if count
        }


def _positions(run: Run) -> Iterator[tuple[str, slice]]:
    start = 0
    for index, call in enumerate(run.calls):
        yield phase(run, index), slice(start, start + len(call.tokens))
        start += len(call.tokens)


def _deviation(arrays: Iterable[Array]) -> float:
    """The standard deviation of all elements together; 1 where they are all equal."""
    count, total, squares = 0, 0.0, 0.0
    for array in arrays:
        wide = array.astype(np.float64)
        count += wide.size
        total += float(wide.sum())
        squares += float(np.square(wide).sum())
    variance = squares / count - (total / count) ** 2 if count else 0.0
    return float(np.sqrt(variance)) if variance > 0 else 1.0


def _pairs(reference: Sequence[Trace], other: Sequence[Trace]) -> Iterator[tuple[Array, Array]]:
    for left, right in zip(reference, other, strict=True):
        yield from zip(left.logits, right.logits, strict=True)


def _kl(reference: Array, other: Array) -> Array:
    """KL(reference || other) of each row, nats, float64."""
    left, right = _log_softmax(reference), _log_softmax(other)
    return np.asarray((np.exp(left) * (left - right)).sum(-1))


def _log_softmax(logits: Array) -> Array:
    with np.errstate(invalid="ignore"):  # infinity in, NaN out: the caller's figure says so
        shifted = logits.astype(np.float64)
        shifted = shifted - shifted.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
