"""From the samples of a run to its figures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from pocketlm.measuring.bootstrap import median_figure
from pocketlm.results import BenchSettings, Figure, Figures, Sample

__all__ = ["QUIET_CORES", "figure_samples", "figures_of", "no_figures", "noise_of"]

QUIET_CORES = 0.1  # that others may keep busy

Reading = Callable[[Sample, BenchSettings], float | None]


def _decode_rate(sample: Sample, _settings: BenchSettings) -> float:
    return len(sample.decode_seconds) / math.fsum(sample.decode_seconds)


def _peak(name: str) -> Reading:
    def peak(sample: Sample, _settings: BenchSettings) -> float | None:
        return None if sample.memory.peak is None else float(getattr(sample.memory.peak, name))

    return peak


def _added(name: str) -> Reading:
    def added(sample: Sample, _settings: BenchSettings) -> float | None:
        before, after = sample.memory.before_load, sample.memory.decoded
        if before is None or after is None:
            return None
        return float(getattr(after, name) - getattr(before, name))

    return added


def _seconds(name: str) -> Reading:
    return lambda sample, _settings: float(getattr(sample, name))


def _joules_per_prompt_token(sample: Sample, settings: BenchSettings) -> float | None:
    joules = sample.energy.prefill_joules
    return None if joules is None else joules / settings.prompt_tokens


def _joules_per_decode_token(sample: Sample, settings: BenchSettings) -> float | None:
    joules = sample.energy.decode_joules
    return None if joules is None else joules / (settings.new_tokens - 1)


# What each field of Figures is of one sample, None where it has none.
WARM: Mapping[str, Reading] = {
    "import_seconds": _seconds("import_seconds"),
    "check_seconds": _seconds("check_seconds"),
    "load_seconds": _seconds("load_seconds"),
    "depth_seconds": lambda sample, settings: sample.depth_seconds if settings.depth else None,
    "first_token_seconds": _seconds("first_token_seconds"),
    "prefill_tokens_per_second": lambda sample, settings: settings.prompt_tokens / sample.prefill_seconds,
    "decode_tokens_per_second": _decode_rate,
    "peak_resident": _peak("resident"),
    "peak_anonymous": _peak("anonymous"),
    "peak_file_backed": _peak("file_backed"),
    "added_anonymous": _added("anonymous"),
    "added_file_backed": _added("file_backed"),
    "prefill_joules_per_token": _joules_per_prompt_token,
    "decode_joules_per_token": _joules_per_decode_token,
}
COLD: Mapping[str, Reading] = {
    "cold_load_seconds": _seconds("load_seconds"),
    "cold_first_token_seconds": _seconds("first_token_seconds"),
}


def figures_of(samples: Sequence[Sample], settings: BenchSettings) -> Figures:
    """Median and interval of each figure; None for one that not every sample has."""
    return Figures(**{name: _figure(figure_samples(name, samples, settings)) for name in (*WARM, *COLD)})


def no_figures() -> Figures:
    """Those of an emulated device."""
    return Figures(**dict.fromkeys((*WARM, *COLD)))


def figure_samples(name: str, samples: Sequence[Sample], settings: BenchSettings) -> list[float]:
    """The figure ``name`` of each sample that it is of; empty if one has none."""
    reading, cold = (COLD[name], True) if name in COLD else (WARM[name], False)
    values = [reading(sample, settings) for sample in samples if sample.cold == cold]
    return [] if None in values else [value for value in values if value is not None]


def noise_of(samples: Sequence[Sample]) -> Iterator[str]:
    """What disturbed the repetitions, in words."""
    known = [sample.others_cores for sample in samples if sample.others_cores is not None]
    busy = [cores for cores in known if cores > QUIET_CORES]
    if busy:
        yield f"others kept up to {max(busy):.1f} cores busy in {len(busy)} of {len(samples)} repetitions"


def _figure(values: Sequence[float]) -> Figure | None:
    return median_figure(values) if values else None
