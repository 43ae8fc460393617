"""What replays and measures, in a process of its own, on whatever device: ``python -m pocketlm.agent JOB RESULT``.

JOB is a file as :mod:`pocketlm.job` describes it, RESULT a file of JSON lines. The first has ``"kind": "begin"``, the
last ``"end"`` or ``"error"``; a result without either was cut off. The exit code is that of the error, else 0.

It needs numpy, one vendor's library, the runtimes of this package and what they import: neither torch nor pydantic. So
the same file runs on the host, under an emulator and on a phone.
"""

import contextlib
import datetime
import hashlib
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from pocketlm.energy import EnergyCounter
from pocketlm.errors import BundleError, InputError, PocketLMError, UnavailableError
from pocketlm.job import FORMAT_VERSION, ForcedTokens, Job, Measure, Replay
from pocketlm.machine import machine_facts, processor_seconds
from pocketlm.memory import resident_memory
from pocketlm.memory_watch import MemoryWatch
from pocketlm.strict_json import parse_object

__all__ = ["DECODE_WINDOW", "PREFILL_WINDOW", "PROFILE_FILE", "decode", "run"]

WARM_UP_STEPS = 2  # of decode, before those that are timed: a runtime's first are slower
PROFILE_FILE = "profile"  # beside RESULT, where a job asks for one
# A counter of instructions sees getpriority(PRIO_PROCESS, WINDOW + n): it closes its window and opens window n, or none
# for 0. The call asks for a process that doesn't exist, and is harmless where nobody counts.
WINDOW = 0x504B0000
PREFILL_WINDOW, DECODE_WINDOW = 1, 2


class Report:
    """Writes the lines of RESULT, each whole as soon as it is known."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def line(self, kind: str, **values: Any) -> None:
        """One line. What isn't finite becomes null."""
        self._file.write(json.dumps({"kind": kind, **_finite(values)}, allow_nan=False) + "\n")
        self._file.flush()


def run(job: Job, report: Report, profile: Path) -> None:
    """Do what ``job`` says; ``profile``: where the runtime's own goes if it asks for one.

    Raises :class:`BundleError` for altered files, :class:`UnavailableError` for a runtime or a core that isn't here.
    """
    if job.cores is not None:
        _stay_on(job.cores)
    if isinstance(job.work, Replay):
        _begin(job, report)
        _check_files(job)
        _replay(job, job.work, report)
        return
    # A counter of instructions counts one process.
    with contextlib.nullcontext() if job.work.windows else MemoryWatch() as watch:
        begin = time.monotonic()
        _begin(job, report)
        imported = time.monotonic()
        _check_files(job)
        checked = time.monotonic()
        times = {"import_seconds": imported - begin, "check_seconds": checked - imported}
        _measure(job, job.work, report, profile, times, watch)


def _begin(job: Job, report: Report) -> None:
    """Load the runtime's libraries, and say what it is and where."""
    version, build = _runtime(job).runtime_build()
    report.line(
        "begin",
        format_version=FORMAT_VERSION,
        runtime=job.runtime,
        runtime_version=version,
        runtime_build=build,
        python=platform.python_version(),
        numpy=importlib.import_module("numpy").__version__,
        machine=machine_facts(),
        clock=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _runtime(job: Job) -> Any:
    try:
        return importlib.import_module(f"pocketlm.runtimes.{job.runtime}")
    except ImportError as error:
        raise UnavailableError(f"the {job.runtime} runtime can't be loaded: {error}") from error


def _stay_on(cores: Sequence[int]) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise UnavailableError("cores can't be chosen on this system")
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        there = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise UnavailableError(f"no such cores: {', '.join(map(str, cores))}; this process may use {there}") from error


def _check_files(job: Job) -> None:
    """The artifact is what the job says, and the page cache holds it from here on."""
    if not job.artifact.path.exists():
        raise BundleError(f"{job.artifact.path}: no such artifact")
    for name, known in job.artifact.files.items():
        path = job.artifact.path.parent / name
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != known.size or hashlib.file_digest(file, "sha256").hexdigest() != known.sha256:
                    raise BundleError(f"{path}: its content is not what the job says: altered, or not all of it came")
        except OSError as error:
            raise BundleError(f"{path}: can't be read: {error.strerror}") from error


def _open(job: Job, profile: Path | None = None) -> Any:
    wishes: dict[str, Any] = {"packed": True} if job.packed else {}
    if profile is not None:
        wishes["profile"] = profile
    return _runtime(job).open_session(job.artifact, job.threads, **wishes)


def _replay(job: Job, work: Replay, report: Report) -> None:
    with _open(job) as session:
        for index, sequence in enumerate(work.sequences):
            session.rewind(0)
            report.line("sequence", index=index, steps=list(_forced(session, sequence, work.top)))


def _forced(session: Any, sequence: ForcedTokens, top: int) -> Iterator[dict[str, Any]]:
    """What the session answers before each of the sequence's tokens."""
    if sequence.ids and len(sequence.ids) != len(sequence.tokens):
        raise InputError(f"{len(sequence.tokens)} tokens, but ids of {len(sequence.ids)} steps")
    wanted = sequence.ids or [()] * len(sequence.tokens)
    fed: Sequence[int] = sequence.prompt
    for token, ids in zip(sequence.tokens, wanted, strict=True):
        yield _step(session.extend(fed)[-1], token, ids, top)
        fed = [token]


def _step(logits: Any, token: int, ids: Sequence[int], top: int) -> dict[str, Any]:
    """``logits`` float32 ``[vocabulary]``: the choice and its logit, that of ``token`` and of ``ids``, the ``top``
    largest, the logarithm of the sum of their exponentials, and their standard deviation; in float64."""
    from pocketlm.logit_summary import summarize

    if not all(0 <= number < logits.size for number in (token, *ids)):
        raise InputError(f"the recorded tokens are not in the model's vocabulary of {logits.size}")
    summary = summarize(logits, top)
    return {
        "choice": summary.choice,
        "choice_logit": float(logits[summary.choice]),
        "token_logit": float(logits[token]),
        "values": [float(logits[number]) for number in ids],
        "top": summary.top,
        "log_sum": summary.log_sum,
        "deviation": summary.deviation,
    }


def _measure(
    job: Job, work: Measure, report: Report, profile: Path, times: dict[str, float], watch: MemoryWatch | None
) -> None:
    """Load and run. Tokens of prompt and depth are random, the new ones greedy; nothing stops them."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, job.artifact.vocabulary_size, work.depth + work.prompt_tokens)
    filling, prompt = drawn[: work.depth].tolist(), drawn[work.depth :].tolist()
    if work.cold:
        _drop_from_page_cache(job)
    before = resident_memory()
    load_average = os.getloadavg()[0]
    busy_before, own_before = processor_seconds(), time.process_time()
    energy = EnergyCounter.open()

    load = time.monotonic()
    with _open(job, profile if work.profile else None) as session:
        ready = time.monotonic()
        loaded = resident_memory()

        fill = time.monotonic()
        if filling:
            session.extend(filling, logits=0)
        filled = time.monotonic()
        token = _next_token(session, prompt)
        answered = time.monotonic()
        first_token = resident_memory()
        for _ in range(min(WARM_UP_STEPS, work.new_tokens - 1)):
            token = _next_token(session, [token])

        session.rewind(work.depth)
        energy_before = energy and energy.read()
        _window(PREFILL_WINDOW, work)
        prefill = time.monotonic()
        token = _next_token(session, prompt)
        prefilled = time.monotonic()
        energy_prefilled = energy and energy.read()
        _window(DECODE_WINDOW, work)
        tokens, intervals = decode(session, token, work.new_tokens)
        _window(0, work)
        last = time.monotonic()
        energy_decoded = energy and energy.read()
        decoded = resident_memory()
        busy_after, own_after = processor_seconds(), time.process_time()
        if watch is not None:
            watch.stop()
    report.line(
        "measurement",
        **times,
        load_seconds=ready - load,
        depth_seconds=filled - fill if filling else 0.0,
        first_token_seconds=answered - filled,
        prefill_seconds=prefilled - prefill,
        decode_seconds=intervals,
        tokens=tokens,
        memory={
            "before_load": _as_object(before),
            "loaded": _as_object(loaded),
            "first_token": _as_object(first_token),
            "decoded": _as_object(decoded),
            "load_peak": _as_object(watch and watch.peak(load, filled)),
            "generation_peak": _as_object(watch and watch.peak(filled, last)),
            "peak": _as_object(watch and watch.peak()),
        },
        energy={
            "method": energy and energy.method,
            "prefill_joules": _joules(energy, energy_before, energy_prefilled),
            "decode_joules": _joules(energy, energy_prefilled, energy_decoded),
        },
        load_average=load_average,
        others_cores=_others(busy_before, busy_after, own_after - own_before, last - load),
    )


def decode(session: Any, token: int, count: int) -> tuple[list[int], list[float]]:
    """``count`` tokens, ``token`` the first, each next the most likely one after it, and the seconds between them."""
    tokens, intervals, last = [token], [], time.monotonic()
    for _ in range(count - 1):
        token = _next_token(session, [token])
        now = time.monotonic()
        intervals.append(now - last)
        last = now
        tokens.append(token)
    return tokens, intervals


def _next_token(session: Any, tokens: Sequence[int]) -> int:
    return int(session.extend(tokens)[-1].argmax())


def _window(number: int, work: Measure) -> None:
    if work.windows:
        with contextlib.suppress(OSError):  # ESRCH, as meant
            os.getpriority(os.PRIO_PROCESS, WINDOW + number)


def _drop_from_page_cache(job: Job) -> None:
    """Written pages are dropped, and those that no process maps."""
    if not hasattr(os, "posix_fadvise"):
        raise UnavailableError("a cold load can't be measured on this system: files stay in its cache; leave it out")
    for name in job.artifact.files:
        file = os.open(job.artifact.path.parent / name, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _others(before: float | None, after: float | None, own: float, seconds: float) -> float | None:
    """How many cores other processes kept busy meanwhile, on average; None where the system doesn't tell."""
    if before is None or after is None or seconds <= 0:
        return None
    return max(0.0, (after - before - own) / seconds)


def _joules(energy: EnergyCounter | None, before: Any, after: Any) -> float | None:
    return None if energy is None else energy.joules(before, after)


def _as_object(value: Any) -> Any:
    return None if value is None else asdict(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def main() -> None:
    """Do the job of the command line. Its errors go to RESULT and to stderr."""
    if len(sys.argv) != 3:
        print("usage: python -m pocketlm.agent JOB RESULT", file=sys.stderr)
        sys.exit(2)
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    with target.open("w", encoding="utf-8") as file:
        report = Report(file)
        try:
            run(_read(source), report, target.with_name(PROFILE_FILE))
        except PocketLMError as error:
            report.line("error", exit_code=error.exit_code, error=type(error).__name__, message=str(error))
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        report.line("end")


def _read(source: Path) -> Job:
    try:
        return Job.from_json(parse_object(source.read_bytes()))
    except OSError as error:
        raise InputError(f"{source}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{source}: not a job: {error}") from error


if __name__ == "__main__":
    main()
