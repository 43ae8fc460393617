"""Measures a bundle on devices: from options to one result, each repetition a fresh process there."""

import datetime
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version

from pocketlm.bundle import PACKING, RUNTIMES, Bundle
from pocketlm.devices import open_device
from pocketlm.devices.base import Device
from pocketlm.errors import BundleError, ContextLengthError, InputError, UnavailableError, UnsupportedError
from pocketlm.machine import command_line
from pocketlm.measuring.measured_runtime import Conditions, MeasuredRuntime
from pocketlm.replaying.expectation import ExpectedSession
from pocketlm.replaying.golden_session import read_golden_session
from pocketlm.replaying.replay import EMULATED_LIMIT, LIMIT
from pocketlm.results import FORMAT_VERSION, BenchResult, BenchRun, BenchSettings, SubjectBundle

__all__ = ["USUAL_DEPTHS", "BenchOptions", "choose_runtimes", "measure_bundle", "settings_for"]

USUAL_DEPTHS = (0, 512, 2048)
# Runtimes in whose place something else computes on a host, and what.
INTERPRETED = {"coreml": "the reference interpreter computes in Core ML's place"}

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """``depths`` None: those of :data:`USUAL_DEPTHS` that fit. ``cold``: measure loads from the disk, too, at the first
    depth and unless the weights are packed. ``limit`` and ``cool_down`` are those of
    :class:`pocketlm.measuring.measured_runtime.Conditions`; no limit: a replay's. ``profile``: one more process for
    what really ran.

    An emulated device counts instructions instead: one repetition, one thread.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    depths: tuple[int, ...] | None = None
    threads: int | None = None
    cores: tuple[int, ...] | None = None
    packed: bool = False
    repetitions: int = 5
    cold: bool = True
    cool_down: float = 0.0
    limit: float | None = None
    profile: bool = False


def measure_bundle(
    bundle: Bundle, addresses: Sequence[str], runtimes: Sequence[str], options: BenchOptions, note: Note
) -> BenchResult:
    """Each of ``runtimes`` on each device at each depth; without runtimes the first that a device has.

    ``note`` is told of the progress. All devices are opened before anything is measured. Raises
    :class:`UnavailableError` for a device or runtime that isn't there, a device that is too hot, dies, takes longer
    than the limit or answers garbage, and :class:`InputError` for options that can't be measured.
    """
    settings = settings_for(bundle, options)
    golden = _golden_session(bundle)
    runs: list[BenchRun] = []
    with ExitStack() as stack:
        devices = [stack.enter_context(open_device(address)) for address in addresses]
        chosen = [choose_runtimes(bundle, device, runtimes, options) for device in devices]
        for device, names in zip(devices, chosen, strict=True):
            for name in names:
                bundle.check_files(f"{name}/")
            conditions = _conditions(device, options)
            measured = [MeasuredRuntime(device, name, bundle.artifact(name), conditions) for name in names]
            measure = _count_instructions if device.emulated else _measure_speed
            measure(measured, settings, options, note)
            for one in measured:
                note(f"{one.title}: {one.replay(golden).words}")
            runs += [one.as_run(setting) for one in measured for setting in settings]
    return BenchResult(
        format_version=FORMAT_VERSION,
        kind="bench",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        pocketlm=version("pocketlm"),
        bundle=SubjectBundle(name=bundle.folder.resolve().name, manifest_sha256=bundle.manifest_sha256),
        runs=runs,
    )


def settings_for(bundle: Bundle, options: BenchOptions) -> list[BenchSettings]:
    """One for each depth.

    Raises :class:`InputError` for options that can't be measured, :class:`ContextLengthError` for more tokens than the
    bundle's context holds.
    """
    for name, value, least in (
        ("--prompt-tokens", options.prompt_tokens, 1),
        ("--new-tokens", options.new_tokens, 2),
        ("--depth", min(options.depths or (0,)), 0),
        ("--threads", 1 if options.threads is None else options.threads, 1),
        ("--repetitions", options.repetitions, 1),
        ("--cool-down", options.cool_down, 0),
        ("--limit", 1 if options.limit is None else options.limit, 0.001),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, not {value:g}")
    context = bundle.manifest.model.context_length
    room = context - options.prompt_tokens - options.new_tokens
    depths = options.depths or (0, *(depth for depth in USUAL_DEPTHS if 0 < depth <= room))
    if max(depths) > room:
        raise ContextLengthError(
            f"--depth {max(depths)} + --prompt-tokens {options.prompt_tokens} + --new-tokens {options.new_tokens} "
            f"exceed the exported context of {context}"
        )
    return [
        BenchSettings(prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, depth=depth)
        for depth in dict.fromkeys(depths)
    ]


def choose_runtimes(bundle: Bundle, device: Device, wanted: Sequence[str], options: BenchOptions) -> list[str]:
    """``wanted``, or the first of the bundle's that can be measured on ``device``.

    Raises :class:`InputError` for an unknown runtime or one that the bundle has no artifact for,
    :class:`UnavailableError` for one that isn't installed, or interpreted here, and :class:`UnsupportedError` for
    packed weights or a profile where there is none.
    """
    measurable = [name for name in device.runtimes() if name in bundle.manifest.targets]
    for name in wanted:
        if name not in RUNTIMES:
            raise InputError(f"unknown runtime {name!r:.40}; valid: {', '.join(RUNTIMES)}")
        bundle.artifact(name)
        if name in measurable:
            continue
        if name in INTERPRETED:
            raise UnavailableError(
                f"{name} can't be measured on {device.address}: {INTERPRETED[name]}, and its speed means nothing; "
                f"measurable in this bundle: {', '.join(measurable) or 'nothing'}"
            )
        raise UnavailableError(f"the {name} runtime is not on {device.address}: pip install 'pocketlm[{name}]'")
    chosen = list(dict.fromkeys(wanted)) or measurable[:1]
    if not chosen:
        extras = " or ".join(f"'pocketlm[{name}]'" for name in bundle.manifest.targets if name not in INTERPRETED)
        raise UnavailableError(f"no runtime for this bundle can be measured on {device.address}; install {extras}")
    for name in chosen:
        if options.packed and name not in PACKING:
            raise UnsupportedError(f"packed weights: not supported by {name}; valid: {', '.join(PACKING)}")
    if options.profile and device.emulated:
        raise UnsupportedError(f"--profile: {device.address} is emulated, and its times mean nothing")
    return chosen


def _conditions(device: Device, options: BenchOptions) -> Conditions:
    return Conditions(
        threads=1 if device.emulated else options.threads,  # windows of instructions are one thread's
        cores=options.cores,
        packed=options.packed,
        limit=options.limit if options.limit is not None else EMULATED_LIMIT if device.emulated else LIMIT,
        cool_down=options.cool_down,
    )


def _measure_speed(
    measured: Sequence[MeasuredRuntime], settings: Sequence[BenchSettings], options: BenchOptions, note: Note
) -> None:
    """Round by round, so that a device that slows down slows all of them."""
    for one in measured:
        note(f"{one.title}: warming up{', making the packed weights unless they are there' if options.packed else ''}")
        one.warm_up(settings[0])
    cold = options.cold and not options.packed
    for number in range(1, options.repetitions + 1):
        for one in measured:
            for setting in settings:
                sample = one.measure(setting)
                rate = len(sample.decode_seconds) / sum(sample.decode_seconds)
                note(
                    f"{one.title}, depth {setting.depth}: repetition {number} of {options.repetitions}: "
                    f"{rate:.1f} tok/s of decode"
                )
            if cold:
                sample = one.measure(settings[0], cold=True)
                note(f"{one.title}: cold load {number} of {options.repetitions}: {sample.load_seconds:.2f} s")
    if options.profile:
        for one in measured:
            for setting in settings:
                note(f"{one.title}, depth {setting.depth}: profile")
                one.profile(setting)


def _count_instructions(
    measured: Sequence[MeasuredRuntime], settings: Sequence[BenchSettings], _options: BenchOptions, note: Note
) -> None:
    for one in measured:
        for setting in settings:
            counted = one.count_instructions(setting)
            note(f"{one.title}, depth {setting.depth}: {counted.per_decode_token / 1e6:.2f} M instructions a token")


def _golden_session(bundle: Bundle) -> ExpectedSession | None:
    """None where there are prompts only: the reference answers for small models."""
    try:
        return read_golden_session(bundle)
    except BundleError:  # altered or malformed
        raise
    except InputError:
        return None
