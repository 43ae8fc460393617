"""How far a replay may be off: what the bundle's certificate says of the noise of each target."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pocketlm.certificate import Certificate
from pocketlm.results import ReplayLimits

__all__ = ["WIDE_MARGIN", "Side", "limits_of"]

WIDE_MARGIN = 0.25  # of the deviation, where nobody measured the noise; FORMAT.md states it
WHOLE = 5  # the level that judges the artifact as users run it


@dataclass(frozen=True, slots=True)
class Side:
    """Who computed: a runtime, and what its machine says of itself (:func:`pocketlm.machine.machine_facts`)."""

    runtime: str
    machine: Mapping[str, str]

    @property
    def rounds_by_rows(self) -> bool:
        """Whether it is ONNX Runtime and rounds activations by rows, as XNNPACK does: in the kernels that it takes from
        Arm's KleidiAI (qai8dxp) where the CPU has dot products. In all others it rounds by blocks of 32."""
        features = self.machine.get("features")
        if features is None:  # macOS tells none, and its arm64 CPUs all have them
            return self.runtime == "onnx" and self.machine.get("cpu") == "arm64"
        return self.runtime == "onnx" and "asimddp" in features.split()


@dataclass(frozen=True, slots=True)
class _Noise:
    """Of one target against the float64 reference: ``margin`` over the deviation, ``mean_kl`` in nats."""

    margin: float
    mean_kl: float


def limits_of(
    certificate: Certificate | None, *, replayed_by: Side, recorded_by: Side | None, deviation: float
) -> ReplayLimits:
    """For a replay of what ``recorded_by`` recorded, None for the float64 reference.

    ``deviation``: of the recorded logits, in nats. Without a certificate that knows the noise of both sides a wide
    margin is :data:`WIDE_MARGIN`, and neither drift nor mean KL has a limit.
    """
    sides = [replayed_by] if recorded_by is None else [replayed_by, recorded_by]
    noises = [_noise(certificate, side, deviation) for side in sides]
    known = [noise for noise in noises if noise is not None]
    if len(known) < len(noises):
        return ReplayLimits(margin=WIDE_MARGIN, drift=None, mean_kl=None, certified=False)
    # A recording is itself off the reference. One side's choice is below the reference's by its margin at most, and the
    # other may see that choice below its own by its margin more.
    margin = math.fsum(noise.margin for noise in known)
    return ReplayLimits(
        margin=margin,
        # Certificates allow a margin as wide as the largest difference of one logit, and of two logits both move.
        drift=2 * margin,
        # KL is half the variance, under the distribution, of what separates two sets of logits. So its root is a
        # distance while noise is small, and the triangle inequality holds for the roots.
        mean_kl=math.fsum(math.sqrt(noise.mean_kl) for noise in known) ** 2,
        certified=True,
    )


def _noise(certificate: Certificate | None, side: Side, deviation: float) -> _Noise | None:
    own = _target_noise(certificate, side.runtime, deviation)
    if own is None or not side.rounds_by_rows or "mean KL" not in _thresholds(certificate, side.runtime):
        return own
    # For ONNX Runtime the certificate simulates blocks. Rows are simulated for ExecuTorch, on the same weights.
    by_rows = _target_noise(certificate, "executorch", deviation)
    if by_rows is None:
        return None
    return _Noise(max(own.margin, by_rows.margin), max(own.mean_kl, by_rows.mean_kl))


def _target_noise(certificate: Certificate | None, target: str, deviation: float) -> _Noise | None:
    stated = _thresholds(certificate, target)
    margin, mean_kl, largest = (stated.get(name) for name in ("greedy regret", "mean KL", "largest difference"))
    if margin is None and largest is not None:
        margin = 2 * largest  # both logits may be off by that
    if margin is None:
        return None
    if mean_kl is None:
        # Where nothing is rounded to int8 the level limits no KL. Logits that are off by d at most have
        # KL = ln E[exp(e)] - E[e] <= d^2 / 2, by Hoeffding's lemma.
        mean_kl = ((margin if largest is None else largest) * deviation) ** 2 / 2
    return _Noise(margin, mean_kl)


def _thresholds(certificate: Certificate | None, target: str) -> Mapping[str, float]:
    """Of the level that judges the whole, by the names of its checks; empty where it did not run."""
    if certificate is None or target not in certificate.targets:
        return {}
    levels = certificate.targets[target].levels
    return {check.name: check.threshold for level in levels if level.level == WHOLE for check in level.checks}
