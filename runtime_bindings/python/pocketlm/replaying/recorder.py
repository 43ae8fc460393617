"""Records generations while they run, to be replayed elsewhere."""

import datetime
import importlib
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm.bundle import Bundle
from pocketlm.errors import InputError, PocketLMError
from pocketlm.generate import FinishReason, Observer
from pocketlm.logit_summary import LogitSummary, summarize
from pocketlm.machine import machine_facts
from pocketlm.replaying.recording import (
    FORMAT_VERSION,
    RecordedSampling,
    SequenceLine,
    SessionLine,
    StepLine,
    write_session,
)
from pocketlm.results import RuntimeRecord
from pocketlm.sampling import Sampling

__all__ = ["TOP", "Recorder"]

TOP = 32  # of the largest logits that a step keeps


class _Generation:
    """One generation so far."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt = list(prompt)
        self.sampling = sampling
        self.steps: list[tuple[int, LogitSummary]] = []  # the token, and the logits that it was chosen from
        self.finish_reason: FinishReason | None = None


class Recorder(Observer):
    """Keeps what it sees of the generations of ``bundle`` on ``runtime``; give it to :func:`pocketlm.generate`.

    About 1 kB a step. A generation that was broken off is kept as far as it came.
    """

    def __init__(self, bundle: Bundle, runtime: str) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._generations: list[_Generation] = []

    @property
    def steps(self) -> int:
        """How many steps have been recorded."""
        return sum(len(generation.steps) for generation in self._generations)

    def begin(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self._generations.append(_Generation(prompt, sampling))

    def step(self, logits: npt.NDArray[np.float32], token: int) -> None:
        summary = summarize(logits, TOP)
        if not all(map(math.isfinite, (summary.deviation, summary.log_sum))):
            raise PocketLMError("the model's logits hold NaN or infinity: such a step can't be recorded")
        self._generations[-1].steps.append((token, summary))  # one call: Ctrl-C comes before or after it

    def end(self, reason: FinishReason) -> None:
        self._generations[-1].finish_reason = reason

    def save(self, path: Path) -> None:
        """Write the session file, whole or not at all. Raises :class:`InputError` if there is nothing to record, or if
        it can't be written."""
        recorded = [generation for generation in self._generations if generation.steps]
        if not recorded:
            raise InputError(f"{path}: nothing was generated, so nothing is recorded")
        try:
            write_session(path, self._head(), [self._lines(generation) for generation in recorded])
        except OSError as error:
            raise InputError(f"{path}: can't be written: {error.strerror}") from error

    def _head(self) -> SessionLine:
        version, build = importlib.import_module(f"pocketlm.runtimes.{self._runtime}").runtime_build()
        return SessionLine(
            kind="session",
            format_version=FORMAT_VERSION,
            model_sha256=self._bundle.manifest.model_sha256(),
            manifest_sha256=self._bundle.manifest_sha256,
            runtime=RuntimeRecord(name=self._runtime, version=version, build=build),
            pocketlm=importlib.metadata.version("pocketlm"),
            machine=machine_facts(),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def _lines(self, generation: _Generation) -> tuple[SequenceLine, list[StepLine]]:
        sequence = SequenceLine(
            kind="sequence",
            prompt=self._bundle.tokenizer.decode(generation.prompt, skip_special_tokens=False),
            prompt_ids=generation.prompt,
            tokens=[token for token, _ in generation.steps],
            finish_reason=generation.finish_reason,
            sampling=RecordedSampling(**asdict(generation.sampling)),
        )
        return sequence, [_step_line(summary) for _, summary in generation.steps]


def _step_line(step: LogitSummary) -> StepLine:
    return StepLine(
        kind="step",
        ids=[number for number, _ in step.top],
        logits=[value for _, value in step.top],
        log_sum=step.log_sum,
        deviation=step.deviation,
    )
