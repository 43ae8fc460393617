"""Replays a recorded session on runtimes and devices, and judges each by what noise explains."""

import datetime
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.devices import open_device
from pocketlm.devices.base import Device
from pocketlm.errors import InputError, UnavailableError
from pocketlm.job import Job
from pocketlm.machine import command_line
from pocketlm.measuring.measurement import read_begin
from pocketlm.replaying.answer import read_replay
from pocketlm.replaying.expectation import ExpectedSession
from pocketlm.replaying.golden_session import read_golden_session
from pocketlm.replaying.judgement import judge
from pocketlm.replaying.limits import Side, limits_of
from pocketlm.replaying.recording import read_session
from pocketlm.results import (
    FORMAT_VERSION,
    DeviceRecord,
    ReplayResult,
    ReplayRun,
    RuntimeRecord,
    SessionRecord,
    SubjectBundle,
    Top1,
    Unavailable,
)

__all__ = ["EMULATED_LIMIT", "LIMIT", "replay"]

LIMIT = 600.0  # seconds for one runtime on one device
EMULATED_LIMIT = 3600.0  # an emulator is some hundred times slower


def _say_nothing(_text: str) -> None:
    pass


def replay(
    bundle: Bundle | str | os.PathLike[str],
    session: str | os.PathLike[str] | None = None,
    *,
    devices: Sequence[str] = ("host",),
    runtimes: Sequence[str] | None = None,
    threads: int | None = None,
    limit: float | None = None,
    progress: Callable[[str], None] = _say_nothing,
) -> ReplayResult:
    """Feed the recorded tokens to each of ``runtimes`` on each of ``devices``, and judge what they make of them.

    ``session``: a file that ``pocketlm run --record`` wrote; None: the bundle's golden session. ``runtimes`` None:
    those of the bundle that a device runs unless others are asked for. ``limit``: seconds for one runtime on one
    device, by default :data:`LIMIT`, or :data:`EMULATED_LIMIT` for an emulated one.

    A run that fails is part of the result, and so is a device or a runtime that isn't there. Raises
    :class:`InputError` for a session that can't be replayed on this bundle, :class:`BundleError` for altered files.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    _check_options(opened, devices, runtimes, threads, limit)
    if session is None:
        expected = read_golden_session(opened)
    else:
        expected = read_session(Path(session), opened).expected(Path(session).name)

    runs: list[ReplayRun] = []
    unavailable: list[Unavailable] = []
    with ExitStack() as held:
        found: list[Device] = []
        for address in dict.fromkeys(devices):
            try:
                found.append(held.enter_context(open_device(address)))
            except UnavailableError as error:
                unavailable.append(Unavailable(address=address, runtime=None, reason=str(error)))
        for device in found:
            for runtime in runtimes or _runtimes_of(device, opened, unavailable):
                progress(f"replaying on {device.address} in {runtime}")
                try:
                    runs.append(_replay_on(device, runtime, opened, expected, threads, limit))
                except UnavailableError as error:
                    unavailable.append(Unavailable(address=device.address, runtime=runtime, reason=str(error)))
    return _result(opened, expected, runs, unavailable)


def _check_options(
    bundle: Bundle, devices: Sequence[str], runtimes: Sequence[str] | None, threads: int | None, limit: float | None
) -> None:
    if isinstance(devices, str) or not devices:
        raise InputError('devices must be a list of addresses such as ["host"]')
    for runtime in runtimes or ():
        bundle.artifact(runtime)
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    if limit is not None and not limit > 0:
        raise InputError(f"the limit must be more than 0 seconds, not {limit:g}")


def _runtimes_of(device: Device, bundle: Bundle, unavailable: list[Unavailable]) -> list[str]:
    chosen = [runtime for runtime in device.runtimes() if runtime in bundle.manifest.targets]
    if not chosen:
        reason = f"{device.address}: runs none of this bundle's targets, {', '.join(bundle.manifest.targets)}"
        unavailable.append(Unavailable(address=device.address, runtime=None, reason=reason))
    return chosen


def _replay_on(
    device: Device, runtime: str, bundle: Bundle, expected: ExpectedSession, threads: int | None, limit: float | None
) -> ReplayRun:
    bundle.check_files(f"{runtime}/")
    artifact = bundle.artifact(runtime)
    job = Job(runtime, device.place(artifact), expected.work, threads=threads)
    with tempfile.TemporaryDirectory(prefix="pocketlm-replay-") as folder:
        outcome = device.run(job, Path(folder), limit=limit or (EMULATED_LIMIT if device.emulated else LIMIT))
    begin = read_begin(device.address, outcome)
    limits = limits_of(
        bundle.certificate,
        replayed_by=Side(runtime, begin.machine),
        recorded_by=_recorder(expected),
        deviation=expected.deviation,
    )
    judged = judge(expected.sequences, read_replay(device.address, expected.sequences, outcome), limits)
    return ReplayRun(
        device=DeviceRecord(address=device.address, emulated=device.emulated, facts=dict(device.facts())),
        runtime=RuntimeRecord(name=runtime, version=begin.runtime_version, build=begin.runtime_build),
        files={name: file.sha256 for name, file in artifact.files.items()},
        threads=threads,
        cores=None,
        packed=False,
        top1=Top1(agreement=judged.agreeing / judged.steps, positions=judged.steps, reason=None),
        first_divergence=judged.first_divergence,
        widest_divergence=judged.widest_divergence,
        largest_drift=judged.largest_drift,
        mean_kl=judged.mean_kl,
        limits=limits,
        passed=not judged.failures,
        failures=judged.failures,
        notes=judged.notes,
    )


def _recorder(expected: ExpectedSession) -> Side | None:
    if expected.recorded_by is None:
        return None
    return Side(expected.recorded_by.name, expected.recorded_on or {})


def _result(
    bundle: Bundle, expected: ExpectedSession, runs: list[ReplayRun], unavailable: list[Unavailable]
) -> ReplayResult:
    return ReplayResult(
        format_version=FORMAT_VERSION,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        pocketlm=importlib.metadata.version("pocketlm"),
        bundle=SubjectBundle(name=bundle.folder.resolve().name, manifest_sha256=bundle.manifest_sha256),
        kind="replay",
        session=SessionRecord(
            name=expected.name,
            recorded_by=expected.recorded_by,
            sequences=len(expected.sequences),
            steps=expected.steps,
        ),
        runs=runs,
        unavailable=unavailable,
    )
