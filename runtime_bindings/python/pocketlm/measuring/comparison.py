"""Two results of ``pocketlm bench`` beside each other: runs paired, ratios of B to A with their intervals."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pocketlm.errors import InputError
from pocketlm.manifest import Closed
from pocketlm.measuring.bootstrap import ratio_figure
from pocketlm.measuring.figures import figure_samples
from pocketlm.results import BenchResult, BenchRun, Figure

__all__ = ["FIGURES", "Comparison", "PairedRuns", "Ratio", "compare"]

# What can be compared and gated, by the field of Figures that it is; None for what isn't one of them.
FIGURES: Mapping[str, str | None] = {
    "load": "load_seconds",
    "cold_load": "cold_load_seconds",
    "first_token": "first_token_seconds",
    "cold_first_token": "cold_first_token_seconds",
    "prefill": "prefill_tokens_per_second",
    "decode": "decode_tokens_per_second",
    "resident": "peak_resident",
    "anonymous": "peak_anonymous",
    "file_backed": "peak_file_backed",
    "added_anonymous": "added_anonymous",
    "prefill_energy": "prefill_joules_per_token",
    "decode_energy": "decode_joules_per_token",
    "prefill_instructions": None,
    "decode_instructions": None,
    "top1": None,
}


class Ratio(Closed):
    """``figure`` in A and in B, and B's over A's. What has no repetitions has an interval of its own value."""

    figure: str
    a: float
    b: float
    ratio: Figure


class PairedRuns(Closed):
    """A run of A and its counterpart in B. ``lost``: the figures that only one of them has; ``same_tokens``: whether
    they answered the same, None where repetitions of one differ; ``differences``: circumstances that may explain a
    ratio; ``noisy``: what disturbed either."""

    name: str
    ratios: list[Ratio]
    lost: list[str]
    same_tokens: bool | None
    differences: list[str]
    noisy: list[str]


class Comparison(Closed):
    """``unpaired``: runs without a counterpart, in words."""

    a: str
    b: str
    pairs: list[PairedRuns]
    unpaired: list[str]


@dataclass(frozen=True, slots=True)
class _Key:
    """What two runs share. A phone may be another of its kind, an emulated CPU may not."""

    device: str
    runtime: str
    depth: int
    packed: bool

    def __str__(self) -> str:
        return f"{self.runtime} on {self.device}, depth {self.depth}{', packed' if self.packed else ''}"


def compare(a: BenchResult, b: BenchResult, names: tuple[str, str]) -> Comparison:
    """Every run of ``a`` with its counterpart in ``b``; ``names``: what to call them.

    Raises :class:`InputError` if there is no pair, and for a pair that measured other numbers of tokens or threads.
    """
    several = _several(a.runs) | _several(b.runs)
    left, right = ({_key(run, several): run for run in result.runs} for result in (a, b))
    both = [key for key in left if key in right]
    if not both:
        raise InputError(
            f"no run of {names[0]} has a counterpart in {names[1]}: there are {_listed(left)} and {_listed(right)}"
        )
    unpaired = [f"only in {names[0]}: {key}" for key in left if key not in right]
    unpaired += [f"only in {names[1]}: {key}" for key in right if key not in left]
    pairs = [_pair(key, left[key], right[key]) for key in both]
    return Comparison(a=names[0], b=names[1], pairs=pairs, unpaired=unpaired)


def _several(runs: Sequence[BenchRun]) -> set[str]:
    """The kinds of which there is more than one device: those are told apart by their addresses."""
    kinds = Counter(address.partition(":")[0] for address in {run.device.address for run in runs})
    return {kind for kind, count in kinds.items() if count > 1}


def _key(run: BenchRun, several: set[str]) -> _Key:
    whole = run.device.emulated or run.device.kind in several
    return _Key(run.device.address if whole else run.device.kind, run.runtime.name, run.settings.depth, run.packed)


def _listed(keys: Mapping[_Key, BenchRun]) -> str:
    return "; ".join(map(str, keys))


def _pair(key: _Key, a: BenchRun, b: BenchRun) -> PairedRuns:
    for name, first, second in (
        ("prompt_tokens", a.settings.prompt_tokens, b.settings.prompt_tokens),
        ("new_tokens", a.settings.new_tokens, b.settings.new_tokens),
        ("threads", a.threads, b.threads),
        ("cores", a.cores, b.cores),
    ):
        if first != second:
            raise InputError(
                f"{key}: not comparable: '{name}' is {first} in the first and {second} in the second result"
            )
    ratios, lost = [], []
    for figure in FIGURES:
        base, other = _samples(figure, a), _samples(figure, b)
        if bool(base) != bool(other):
            lost.append(figure)
        elif base and min(*base, *other) > 0:  # nothing is a multiple of 0
            medians = statistics.median(base), statistics.median(other)
            ratios.append(Ratio(figure=figure, a=medians[0], b=medians[1], ratio=ratio_figure(base, other)))
    known = a.tokens_sha256 is not None and b.tokens_sha256 is not None
    return PairedRuns(
        name=str(key),
        ratios=ratios,
        lost=lost,
        same_tokens=a.tokens_sha256 == b.tokens_sha256 if known else None,
        differences=list(_differences(a, b)),
        noisy=[f"{name}: {noise}" for name, run in (("A", a), ("B", b)) for noise in run.noisy],
    )


def _samples(figure: str, run: BenchRun) -> list[float]:
    """Those that the figure's median is of; the one value of what was counted once; empty without any."""
    field = FIGURES[figure]
    if field is not None:
        return figure_samples(field, run.samples, run.settings)
    single: float | None
    if figure == "top1":
        single = run.top1.agreement
    elif run.instructions is None:
        single = None
    else:
        counted = run.instructions
        single = counted.per_prompt_token if figure == "prefill_instructions" else counted.per_decode_token
    return [] if single is None else [single]


def _differences(a: BenchRun, b: BenchRun) -> Iterator[str]:
    for name, mine, other in (
        ("device", a.device.address, b.device.address),
        ("cpu", a.device.facts.get("cpu"), b.device.facts.get("cpu")),
        ("CPU features", a.features, b.features),
        ("governor", a.governor, b.governor),
        (f"version of {a.runtime.name}", a.runtime.version, b.runtime.version),
        (f"build of {a.runtime.name}", a.runtime.build, b.runtime.build),
    ):
        if mine != other:
            yield f"{name}: {mine} in A, {other} in B"
