"""Intervals by the percentile bootstrap: how far a median could have been off, had the repetitions come out otherwise.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocketlm.results import Figure

__all__ = ["median_figure", "ratio_figure"]

RESAMPLES = 2000
SEED = 20260101  # the same samples give the same interval
TAIL = 0.025  # on either side: 95 % in all


def median_figure(samples: Sequence[float]) -> Figure:
    """The median of ``samples`` with its interval. A single sample is its own interval: nothing is known of it."""
    return _figure(float(np.median(samples)), _resampled_medians(samples, np.random.default_rng(SEED)))


def ratio_figure(base: Sequence[float], other: Sequence[float]) -> Figure:
    """The median of ``other`` over that of ``base``, both positive, with the interval: both are resampled, each for
    itself, since repetitions of two results don't belong together."""
    generator = np.random.default_rng(SEED)
    below, above = _resampled_medians(base, generator), _resampled_medians(other, generator)
    return _figure(float(np.median(other)) / float(np.median(base)), above / below)


def _resampled_medians(samples: Sequence[float], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    values = np.asarray(samples, np.float64)
    drawn = values[generator.integers(0, values.size, (RESAMPLES, values.size))]
    medians: npt.NDArray[np.float64] = np.median(drawn, axis=1)
    return medians


def _figure(median: float, resampled: npt.NDArray[np.float64]) -> Figure:
    # Ends that were drawn, not interpolated: an interval of equal samples is exactly their value. A few draws of two
    # modes may all miss the median itself.
    low, high = np.quantile(resampled, (TAIL, 1 - TAIL), method="inverted_cdf")
    return Figure(median=median, low=min(float(low), median), high=max(float(high), median))
