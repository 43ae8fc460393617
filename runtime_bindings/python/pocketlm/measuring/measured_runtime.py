"""One runtime on one device, measured: processes there, their samples here."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pocketlm.agent import DECODE_WINDOW, PREFILL_WINDOW
from pocketlm.artifact import Artifact
from pocketlm.devices.base import Device, Outcome
from pocketlm.errors import UnavailableError
from pocketlm.job import Job, Measure, Replay
from pocketlm.measuring.figures import figures_of, no_figures, noise_of
from pocketlm.measuring.measurement import Begin, Measurement, read_begin, read_measurement
from pocketlm.measuring.profiles import read_profile
from pocketlm.replaying.answer import read_replay
from pocketlm.replaying.expectation import ExpectedSession
from pocketlm.results import (
    BenchRun,
    BenchSettings,
    DeviceRecord,
    Instructions,
    Profile,
    RuntimeRecord,
    Sample,
    Top1,
)

__all__ = ["Conditions", "MeasuredRuntime"]

NO_ANSWERS = "the bundle's golden replay has no answers"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is the same for each process. ``threads``, ``cores`` and ``packed`` are those of
    :class:`pocketlm.job.Job`; ``limit``: how many seconds it may take; ``cool_down``: how many a hot device may take
    before it."""

    threads: int | None
    cores: tuple[int, ...] | None
    packed: bool
    limit: float
    cool_down: float


class MeasuredRuntime:
    """The runtime ``name`` on ``device``, where ``artifact``, the bundle's own, is placed.

    Each method that starts a process raises what :meth:`Device.run` does, and :class:`UnavailableError` for a device
    that is too hot and for an answer that is none.
    """

    def __init__(self, device: Device, name: str, artifact: Artifact, conditions: Conditions) -> None:
        self.device = device
        self.name = name
        self._artifact = artifact
        self._placed = device.place(artifact)
        self._conditions = conditions
        self._facts = device.facts()
        self._begin: Begin | None = None
        self._tokens: dict[BenchSettings, set[str]] = {}
        self._samples: dict[BenchSettings, list[Sample]] = {}
        self._heat: dict[BenchSettings, int] = {}
        self._instructions: dict[BenchSettings, Instructions] = {}
        self._profiles: dict[BenchSettings, Profile] = {}
        self._top1 = Top1(agreement=None, positions=0, reason="not replayed")

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} on {self.device.address}"

    def warm_up(self, settings: BenchSettings) -> None:
        """One process whose figures nobody keeps: it fills the page cache, and makes packed weights."""
        with TemporaryDirectory() as folder:
            self._measure(_work(settings), settings, Path(folder))

    def measure(self, settings: BenchSettings, *, cold: bool = False) -> Sample:
        """One repetition."""
        self.device.check_ready(cool_down=self._conditions.cool_down)
        with TemporaryDirectory() as folder:
            measurement, _ = self._measure(_work(settings, cold=cold), settings, Path(folder))
        sample = measurement.as_sample(cold=cold)
        self._samples.setdefault(settings, []).append(sample)
        self._note_heat(settings)
        self._tokens.setdefault(settings, set()).add(sample.tokens_sha256)
        return sample

    def count_instructions(self, settings: BenchSettings) -> Instructions:
        """One process of an emulated device. Raises :class:`UnavailableError` if the device doesn't count."""
        with TemporaryDirectory() as folder:
            measurement, outcome = self._measure(_work(settings, windows=True), settings, Path(folder))
        counted = outcome.instructions or {}
        if PREFILL_WINDOW not in counted or DECODE_WINDOW not in counted:
            raise UnavailableError(f"{self.device.address}: no instructions of prefill and decode were counted")
        prefill, decode = counted[PREFILL_WINDOW], counted[DECODE_WINDOW]
        instructions = Instructions(
            prefill=prefill,
            decode=decode,
            per_prompt_token=prefill / settings.prompt_tokens,
            per_decode_token=decode / (settings.new_tokens - 1),
        )
        self._instructions[settings] = instructions
        self._tokens[settings] = {measurement.tokens_sha256}
        return instructions

    def profile(self, settings: BenchSettings) -> Profile:
        """One process in which the runtime writes its own profile. Raises :class:`UnavailableError` if it didn't."""
        with TemporaryDirectory() as folder:
            _, outcome = self._measure(_work(settings, profile=True), settings, Path(folder))
            if outcome.profile is None:
                raise UnavailableError(f"{self.device.address}: {self.name} wrote no profile")
            self._profiles[settings] = self._read_profile(outcome.profile)
        return self._profiles[settings]

    def replay(self, golden: ExpectedSession | None) -> Top1:
        """How often the runtime's first choice is the reference's, whose tokens it is fed; None: nobody knows."""
        if golden is None:
            self._top1 = Top1(agreement=None, positions=0, reason=NO_ANSWERS)
            return self._top1
        sequences = golden.sequences
        with TemporaryDirectory() as folder:
            outcome = self._run(golden.work, Path(folder))
        steps = read_replay(self.device.address, sequences, outcome)
        pairs = [
            (expected.choice, step.choice)
            for sequence, answered in zip(sequences, steps, strict=True)
            for expected, step in zip(sequence.steps, answered, strict=True)
        ]
        agreeing = sum(expected == chosen for expected, chosen in pairs)
        self._top1 = Top1(agreement=agreeing / len(pairs), positions=len(pairs), reason=None)
        return self._top1

    def as_run(self, settings: BenchSettings) -> BenchRun:
        """All that was measured with ``settings``."""
        begin = self._begin
        assert begin is not None, "nothing was measured"
        samples = self._samples.get(settings, [])
        tokens = self._tokens[settings]
        return BenchRun(
            device=DeviceRecord(address=self.device.address, emulated=self.device.emulated, facts=dict(self._facts)),
            runtime=RuntimeRecord(name=self.name, version=begin.runtime_version, build=begin.runtime_build),
            files={name: file.sha256 for name, file in self._placed.files.items()},
            threads=self._conditions.threads,
            cores=None if self._conditions.cores is None else list(self._conditions.cores),
            packed=self._conditions.packed,
            settings=settings,
            features=begin.machine.get("features"),
            governor=begin.machine.get("governor"),
            noisy=[*noise_of(samples), *self._heat_of(settings)],
            samples=samples,
            figures=figures_of(samples, settings) if samples else no_figures(),
            tokens_sha256=next(iter(tokens)) if len(tokens) == 1 else None,
            top1=self._top1,
            instructions=self._instructions.get(settings),
            profile=self._profiles.get(settings),
        )

    def _note_heat(self, settings: BenchSettings) -> None:
        """It was ready before; a device that tells a thermal status may have become too hot meanwhile."""
        status = self.device.facts().get("thermal_status")
        if isinstance(status, int) and status > self._heat.get(settings, 0):
            self._heat[settings] = status

    def _heat_of(self, settings: BenchSettings) -> list[str]:
        status = self._heat.get(settings)
        return [] if status is None else [f"the device became hot: thermal status up to {status}"]

    def _read_profile(self, profile: Path) -> Profile:
        features = self._begin.machine.get("features") if self._begin is not None else None
        return read_profile(self.name, profile, self._artifact, features)

    def _measure(self, work: Measure, settings: BenchSettings, folder: Path) -> tuple[Measurement, Outcome]:
        outcome = self._run(work, folder)
        return read_measurement(self.device.address, outcome, settings.new_tokens), outcome

    def _run(self, work: Measure | Replay, folder: Path) -> Outcome:
        conditions = self._conditions
        job = Job(self.name, self._placed, work, conditions.threads, conditions.cores, conditions.packed)
        outcome = self.device.run(job, folder, limit=conditions.limit)
        self._begin = read_begin(self.device.address, outcome)
        return outcome


def _work(settings: BenchSettings, *, cold: bool = False, windows: bool = False, profile: bool = False) -> Measure:
    return Measure(settings.prompt_tokens, settings.new_tokens, settings.depth, cold, windows, profile)
