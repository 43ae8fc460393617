"""The thresholds of the certificate as data, each with the reason for its value."""

from dataclasses import dataclass

from pocketlm.certificate import Check, rounded

__all__ = [
    "DIFFERING",
    "FLOAT16_LARGEST",
    "FLOAT32_PIECES",
    "FLOAT32_REGRET",
    "FLOAT32_RMS",
    "FLOAT32_WHOLE_RMS",
    "GRAPH",
    "KERNEL_OUTLIERS",
    "KERNEL_ROW",
    "KERNEL_WORST",
    "NOISE_TIE",
    "ORACLE_RMS",
    "REGRET",
    "ROUTER_TIE",
    "THRESHOLDS",
    "WHOLE_KL",
    "WHOLE_RMS",
    "Threshold",
    "check",
]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A figure passes at ``limit`` or below; with ``of_floor`` the limit is a multiple of a floor measured on the same
    model in the same run. Figures are over the standard deviation of the reference unless ``reason`` says otherwise."""

    level: int
    figure: str
    limit: float
    of_floor: str | None
    reason: str


DIFFERING = Threshold(1, "differing", 0, None, "what is stored is stored exactly: nothing may differ")
GRAPH = Threshold(
    2, "largest difference", 1e-9, None,
    "two float64 computations of the same function differ by 5e-14 at most; the faintest fault of the table by 1e-5",
)  # fmt: skip
FLOAT32_RMS = Threshold(
    3, "root mean square", 10, "eager float32 against float64",
    "runtimes add up in another order: 1.0 to 2.2 times that floor were measured; a wrong operator is 300 times it",
)  # fmt: skip
FLOAT32_PIECES = Threshold(
    3, "worst row of a delegate", 1e-5, None,
    "relative to the row; float32 delegates on the same inputs were measured at 1e-6",
)  # fmt: skip
KERNEL_ROW = 1e-5
KERNEL_OUTLIERS = Threshold(
    4, f"share of rows beyond {KERNEL_ROW:g}", 0.01, None,
    "an activation on the edge between two codes may be rounded either way: 0.2 % of the rows were measured",
)  # fmt: skip
KERNEL_WORST = Threshold(
    4, "worst row", 2e-2, None,
    "relative to the row; one code of an activation changes a row by 1e-3, a wrong kernel by the whole of it",
)  # fmt: skip
WHOLE_RMS = Threshold(
    5, "root mean square", 1.3, "the reference with simulated int8 activations",
    "the simulation predicts the size of the noise within 12 %",
)  # fmt: skip
WHOLE_KL = Threshold(
    5, "mean KL", 1.5, "the reference with simulated int8 activations",
    "in nats; a square of the noise, predicted within 15 %",
)  # fmt: skip
REGRET = Threshold(
    5, "greedy regret", 1.0, "largest difference of the simulation",
    "how far a chosen token's reference logit is below the largest: no more than the noise explains",
)  # fmt: skip
FLOAT32_WHOLE_RMS = Threshold(
    5, "root mean square", 10, "eager float32 against float64",
    "nothing is quantized, so the shipped artifact computes in float32: as at level 3",
)  # fmt: skip
FLOAT32_REGRET = Threshold(
    5, "greedy regret", 10, "largest difference of eager float32",
    "as the noise of int8, where nothing is quantized",
)  # fmt: skip
FLOAT16_LARGEST = Threshold(
    5, "largest difference", 5e-2, None,
    "fp16 by the interpreter: 2e-2 at most was measured on correct models; an overflow is 1 and more, or not finite",
)  # fmt: skip
ROUTER_TIE = Threshold(
    5, "near tie of two experts", 1e-2, None,
    "their distance over the deviation of the router's scores: fp16 rounds what it computes by up to 1e-2 of its "
    "deviation and may choose either; the reference follows that choice, and the largest difference is judged then",
)  # fmt: skip
NOISE_TIE = Threshold(
    5, "near tie of two experts", 1.0, "largest change between two scores in the simulation",
    "over the deviation of the router's scores: int8 activations may choose either; the reference follows that choice, "
    "and the greedy regret is judged then",
)  # fmt: skip
ORACLE_RMS = Threshold(
    0, "root mean square", 10, "eager float32 against float64",
    "the oracle computes in float32: as at level 3",
)  # fmt: skip

THRESHOLDS = (
    DIFFERING, GRAPH, FLOAT32_RMS, FLOAT32_PIECES, KERNEL_OUTLIERS, KERNEL_WORST, WHOLE_RMS, WHOLE_KL, REGRET,
    FLOAT32_WHOLE_RMS, FLOAT32_REGRET, FLOAT16_LARGEST, ROUTER_TIE, NOISE_TIE,
    ORACLE_RMS,
)  # fmt: skip


def check(
    threshold: Threshold, figure: float, *, subject: str = "", floor: float | None = None, where: str | None = None
) -> Check:
    """``figure`` against ``threshold``. ``subject`` says of what; NaN and infinity never pass."""
    assert (floor is None) == (threshold.of_floor is None)
    limit = threshold.limit if floor is None else threshold.limit * floor
    return Check(
        name=f"{subject}: {threshold.figure}" if subject else threshold.figure,
        figure=rounded(figure),
        threshold=rounded(limit) or 0.0,
        floor=None if floor is None else rounded(floor),
        where=where,
        passed=bool(figure <= limit),  # false for NaN
    )
