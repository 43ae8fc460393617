"""What is kept of one step's logits: enough to compare two distributions without a whole vocabulary."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LogitSummary", "summarize"]


@dataclass(frozen=True, slots=True)
class LogitSummary:
    """Of float32 logits ``[vocabulary]``, in float64. What isn't finite stays so.

    ``choice``: the id of the largest, the lowest where several are; ``top``: id and value of the largest, in that
    order; ``log_sum``: the logarithm of the sum of all exponentials; ``deviation``: the standard deviation.
    """

    choice: int
    top: tuple[tuple[int, float], ...]
    log_sum: float
    deviation: float


def summarize(logits: npt.NDArray[Any], top: int) -> LogitSummary:
    """The summary of ``logits`` with its ``top`` largest, or all where there are fewer."""
    wide = logits.astype(np.float64)
    choice = int(wide.argmax())
    largest = float(wide[choice])
    with np.errstate(invalid="ignore"):  # infinity in, NaN out
        log_sum = largest + float(np.log(np.exp(wide - largest).sum()))
        deviation = float(wide.std())
    return LogitSummary(
        choice, tuple((int(place), float(wide[place])) for place in _largest(wide, top)), log_sum, deviation
    )


def _largest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The places of the ``count`` largest in descending order, equal ones by place."""
    if count == 0:
        return np.empty(0, np.int64)
    candidates = np.arange(values.size)
    if count < values.size:  # sorting few instead of a vocabulary; a NaN is below nothing, and stays
        candidates = np.flatnonzero(~(values < np.partition(values, -count)[-count]))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
