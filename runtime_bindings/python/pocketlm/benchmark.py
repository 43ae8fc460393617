"""Measures a bundle in a runtime on this machine: every repetition is a fresh process, watched from outside."""

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pocketlm.bundle import Bundle
from pocketlm.errors import ContextLengthError, InputError, PocketLMError, UnavailableError
from pocketlm.measurement import Measurement, MeasurementJob
from pocketlm.memory import ResidentMemory
from pocketlm.watched_process import MemoryPeak, run_watched

__all__ = ["Repetition", "check_job", "choose_runtime", "measure_once", "summarize"]

# Runtimes in whose place something else computes, and what.
EMULATED = {"coreml": "the reference interpreter computes in Core ML's place"}
ERRORS: Mapping[int, type[PocketLMError]] = {2: InputError, 3: UnavailableError}


@dataclass(frozen=True, slots=True)
class Repetition:
    """What one process measured of itself, and its memory at the highest: ever, while it loaded, and from the first
    call on; None where the system doesn't split memory, or no sample fell into that time."""

    measurement: Measurement
    peak: MemoryPeak | None
    load_peak: MemoryPeak | None
    generation_peak: MemoryPeak | None

    @property
    def decode_rate(self) -> float:
        """Tokens a second: n-1 tokens over n-1 intervals."""
        seconds = self.measurement.decode_seconds
        return len(seconds) / sum(seconds)


def choose_runtime(bundle: Bundle, wanted: str | None) -> str:
    """``wanted``, or the first of the bundle's runtimes that is installed and whose speed means something.

    Raises :class:`UnavailableError` for a runtime that is emulated here, or if there is no other.
    """
    measurable = [name for name in bundle.runtimes() if name not in EMULATED]
    name = wanted or next(iter(measurable or bundle.runtimes()), None)
    if name is None:
        raise UnavailableError(f"no runtime for this bundle is installed: pip install {_extras(bundle)}")
    if name in EMULATED:
        raise UnavailableError(
            f"{name} can't be measured here: {EMULATED[name]}, and its speed means nothing; "
            f"measurable in this bundle: {', '.join(measurable) or 'nothing'}"
        )
    return name


def _extras(bundle: Bundle) -> str:
    return " or ".join(f"'pocketlm[{name}]'" for name in bundle.manifest.targets if name not in EMULATED)


def check_job(bundle: Bundle, job: MeasurementJob) -> None:
    """Refuse a job that can't be measured, before a process is started for it."""
    for name, value, least in (
        ("--prompt-tokens", job.prompt_tokens, 1),
        ("--new-tokens", job.new_tokens, 2),
        ("--depth", job.depth, 0),
        ("--threads", 1 if job.threads is None else job.threads, 1),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")
    needed, context = job.depth + job.prompt_tokens + job.new_tokens, bundle.manifest.model.context_length
    if needed > context:
        raise ContextLengthError(
            f"--depth {job.depth} + --prompt-tokens {job.prompt_tokens} + --new-tokens {job.new_tokens} exceed the "
            f"exported context of {context}"
        )


def measure_once(job: MeasurementJob) -> Repetition:
    """One repetition. Raises the error that the process reported, or :class:`PocketLMError` if it died."""
    run = run_watched([sys.executable, "-m", "pocketlm.measurement", json.dumps(asdict(job))])
    line = run.output.strip().rpartition("\n")[2]
    try:
        result: dict[str, Any] = json.loads(line)
    except ValueError as error:
        ending = run.errors.strip().rpartition("\n")[2]
        raise PocketLMError(f"{job.bundle}: the measuring process ended with {run.exit_code}: {ending}") from error
    if "error" in result:
        raise ERRORS.get(result["exit_code"], PocketLMError)(result["error"])
    memory = {
        name: None if result[name] is None else ResidentMemory(**result[name])
        for name in ("before_load", "loaded", "first_token", "decoded")
    }
    measurement = Measurement(**{**result, **memory})
    moments = measurement.moments
    return Repetition(
        measurement=measurement,
        peak=_whole_peak(run.peak(), measurement),
        load_peak=run.peak(moments["load"], moments["prefill"]),
        generation_peak=run.peak(moments["prefill"], moments["end"]),
    )


def _whole_peak(peak: MemoryPeak | None, measurement: Measurement) -> MemoryPeak | None:
    """``peak`` with what the process saw of itself at its end, after the last sample."""
    if peak is None or measurement.decoded is None:
        return peak
    return MemoryPeak(
        resident=max(peak.resident, measurement.decoded.highest),
        anonymous=max(peak.anonymous, measurement.decoded.anonymous),
        file_backed=max(peak.file_backed, measurement.decoded.file_backed),
    )


def summarize(job: MeasurementJob, repetitions: Sequence[Repetition]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each figure over the repetitions; rates in tokens a second, memory in bytes.

    ``added_anonymous`` and ``added_file_backed`` are what the process held after decoding beyond what it held before
    loading, its libraries apart.
    """
    figures = [dict(_figures(job, repetition)) for repetition in repetitions]
    return {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name in figures[0]
        for values in [[figure[name] for figure in figures]]
    }


def _figures(job: MeasurementJob, repetition: Repetition) -> Iterator[tuple[str, float]]:
    measured = repetition.measurement
    for name in ("import_seconds", "check_seconds", "load_seconds", "first_token_seconds"):
        yield name, getattr(measured, name)
    if job.depth:
        yield "depth_seconds", measured.depth_seconds
    yield "prefill_tokens_per_second", job.prompt_tokens / measured.prefill_seconds
    yield "decode_tokens_per_second", repetition.decode_rate
    if repetition.peak is not None:
        yield "peak_resident", repetition.peak.resident
        yield "peak_anonymous", repetition.peak.anonymous
        yield "peak_file_backed", repetition.peak.file_backed
    if measured.before_load is not None and measured.decoded is not None:
        yield "added_anonymous", measured.decoded.anonymous - measured.before_load.anonymous
        yield "added_file_backed", measured.decoded.file_backed - measured.before_load.file_backed
