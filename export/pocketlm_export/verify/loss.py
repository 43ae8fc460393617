"""What quantization costs: the reference on the bundle's weights against the one on the original ones."""

from collections.abc import Sequence

import numpy as np

from pocketlm.certificate import Loss, rounded
from pocketlm_export.backends.reading import Run, Trace
from pocketlm_export.verify.comparison import likeness

__all__ = ["measure_loss"]


def measure_loss(runs: Sequence[Run], original: Sequence[Trace], own: Sequence[Trace]) -> Loss:
    """Over the judged positions of ``runs``."""
    found = likeness(original, own)
    return Loss(
        nats_per_token=rounded(_nats_per_token(runs, own)),
        original_nats_per_token=rounded(_nats_per_token(runs, original)),
        mean_kl=rounded(found.mean_kl),
        rms=rounded(found.rms),
    )


def _nats_per_token(runs: Sequence[Run], traces: Sequence[Trace]) -> float:
    """The mean cost of the tokens that follow judged positions."""
    costs = []
    for run, trace in zip(runs, traces, strict=True):
        tokens, stop = run.tokens, 0
        for call, logits in zip(run.calls, trace.logits, strict=True):
            stop += len(call.tokens)
            for row, position in zip(logits, range(stop - call.rows, stop), strict=True):
                if position + 1 < len(tokens):
                    wide = row.astype(np.float64)
                    costs.append(float(np.logaddexp.reduce(wide) - wide[tokens[position + 1]]))
    return float(np.mean(costs))
