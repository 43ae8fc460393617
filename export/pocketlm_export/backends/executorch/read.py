"""The reader of a written .pte for verification: see :mod:`pocketlm_export.backends.reading`."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError
from pocketlm.manifest import Manifest
from pocketlm_export.backends.executorch.reading.arena import check_memory_plan
from pocketlm_export.backends.executorch.reading.attention import layer_attentions
from pocketlm_export.backends.executorch.reading.execution import DelegateCall, execute
from pocketlm_export.backends.executorch.reading.facts import stated_facts
from pocketlm_export.backends.executorch.reading.int8 import round_rows
from pocketlm_export.backends.executorch.reading.kernels import check_kernels
from pocketlm_export.backends.executorch.reading.matrices import (
    FloatMatrix,
    Matrix,
    embedding_table,
    filter_matrix,
)
from pocketlm_export.backends.executorch.reading.nodes import check_nodes
from pocketlm_export.backends.executorch.reading.parts import constant_bytes, run_parts, run_to_choices
from pocketlm_export.backends.executorch.reading.payload import Payload
from pocketlm_export.backends.executorch.reading.pieces import check_delegates_in_float32, check_quantized_linears
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.rebuilding import float32_program
from pocketlm_export.backends.executorch.reading.runtime import LoadedProgram, run_tokens
from pocketlm_export.backends.executorch.reading.steps import KernelStep
from pocketlm_export.backends.reading import (
    LARGEST_SESSION,
    Fact,
    NotRun,
    RowErrors,
    Run,
    StoredConstants,
    Trace,
    WrittenMatrix,
)

__all__ = ["ExecuTorchReader", "open_reader"]

WHOLE_LIMIT = 100_000_000  # weights of linears: a float32 copy and XNNPACK's packed one are 0.8 GB
DECODE_CALLS = 3


def open_reader(path: Path, manifest: Manifest) -> "ExecuTorchReader":  # noqa: ARG001  the file states all itself
    """Open ``model.pte``, refuse what PocketLM never writes, and check its memory plan."""
    return ExecuTorchReader(PteFile(path))


def _float32(value: float) -> float:
    return float(np.float32(value))


class ExecuTorchReader:
    """A :class:`pocketlm_export.backends.reading.Reader` of ``file``.

    Above ``whole_limit`` weights of linears the real runtime gets one delegate at a time at level 3.
    """

    stored = StoredConstants(
        table=np.float32,
        value=np.float32,
        epsilon=_float32,
        scale=_float32,
        reciprocal=lambda width: _float32(1 / width),
        constant=_float32,
    )
    unstated: frozenset[str] = frozenset()

    def __init__(self, file: PteFile, whole_limit: int = WHOLE_LIMIT) -> None:
        self.file = file
        check_kernels(file)
        for index, payload in enumerate(file.delegates):
            check_nodes(payload, f"{file.path}: delegate {index}")
        layer_attentions(file)
        planned = check_memory_plan(file)
        self._whole = _linear_weights(file) <= whole_limit
        self._quantized = any(payload.is_quantized(node) for payload in file.delegates for node in payload.nodes)
        self._observed: tuple[Run, list[DelegateCall]] | None = None
        self.round_activations = (lambda _weight, x: round_rows(x)) if self._quantized else None
        self._notes = (
            f"memory plan: of {planned} values none shares bytes with another that is alive at the same time",
            "level 3: the whole program without int8"
            if self._whole
            else "level 3: every delegate without int8, alone, on the inputs that float64 gave it",
            f"level 4: every quantized linear in the longest first call and up to {DECODE_CALLS} calls after it",
        )
        self.notes: tuple[str, ...] = self._notes

    def rows(self, entry: str, start: int, stop: int) -> WrittenMatrix | npt.NDArray[np.float32]:
        """Rows of ``constant/I`` or of what delegates find under a key, as the contract says."""
        matrix = self._matrix(entry)
        if not 0 <= start <= stop <= matrix.shape[0]:
            raise BundleError(f"{self.file.path}: {entry}: rows {start}..{stop} of {matrix.shape[0]}")
        found = matrix.written(slice(start, stop))
        self.file.release()
        return found

    def facts(self) -> Iterator[Fact]:
        """Attention, epsilons and limits."""
        return stated_facts(self.file)

    def execute(self, runs: Sequence[Run]) -> list[Trace]:
        """In float64; remembers what delegates read in the calls that levels 3 and 4 look at."""
        index = _chosen(runs)
        observed = [(index, number) for number in range(len(_beginning(runs[index]).calls))]
        execution = execute(self.file, runs, observed)
        self._observed = _beginning(runs[index]), execution.delegate_calls
        self._note_experts_that_rested(execution.ran)
        return execution.traces

    def meaning(self, runs: Sequence[Run]) -> list[Trace | None] | RowErrors | NotRun:
        """Without int8: the whole program where it fits, else every delegate alone."""
        if not self._whole:
            return check_delegates_in_float32(self.file, self._delegate_calls(runs))
        return run_tokens(LoadedProgram(float32_program(self.file), f"{self.file.path} without int8"), runs)

    def kernels(self, runs: Sequence[Run]) -> RowErrors | NotRun:
        """Every quantized linear as shipped."""
        if not self._quantized:
            return NotRun("nothing is quantized")
        return check_quantized_linears(self.file, self._delegate_calls(runs))

    def in_parts(self, runs: Sequence[Run]) -> list[Trace] | None:
        """Parts of the program in ExecuTorch, where it reads more than LARGEST_SESSION of constants."""
        return run_parts(self.file, runs) if constant_bytes(self.file, self.file.steps) > LARGEST_SESSION else None

    def chosen_experts(self, runs: Sequence[Run]) -> list[Trace]:
        """Parts of the program in ExecuTorch, which show their choices."""
        return run_to_choices(self.file, runs)

    def emulate(self, runs: Sequence[Run]) -> None:  # noqa: ARG002  the contract's
        """None: a session runs the artifact here."""
        return

    def _note_experts_that_rested(self, ran: Collection[int]) -> None:
        resting = len(self.file.delegates) - len(ran)
        note = (
            f"{resting} of {len(self.file.delegates)} delegates are experts that no token chose: level 1 alone saw them"
        )
        self.notes = (*self._notes, note) if resting else self._notes

    def _delegate_calls(self, runs: Sequence[Run]) -> list[DelegateCall]:
        beginning = _beginning(runs[_chosen(runs)])
        if self._observed is None or self._observed[0] != beginning:
            self.execute([beginning])
        assert self._observed is not None
        return self._observed[1]

    def _matrix(self, entry: str) -> Matrix:
        kind, _, number = entry.partition("/")
        if kind == "constant" and number.isdecimal():
            return self._constant(int(number))
        if entry not in self._named:
            raise BundleError(f"{self.file.path}: no delegate reads {entry[:80]!r}")
        payload, value = self._named[entry]
        return filter_matrix(self.file, payload, value)

    def _constant(self, index: int) -> Matrix:
        for step in self.file.steps:
            if not isinstance(step, KernelStep):
                continue
            table = embedding_table(self.file, step)
            if table is not None and self.file.tensor(step.arguments[0]).data_buffer_idx == index:
                return table
        content = self.file.constant(index)
        if content.dtype != np.float32 or content.ndim not in (1, 2):
            raise BundleError(f"{self.file.path}: constant {index} is {content.dtype} {list(content.shape)}, no weight")
        return FloatMatrix(content)

    @cached_property
    def _named(self) -> dict[str, tuple[Payload, int]]:
        """The first value of a delegate that stands for each key."""
        found: dict[str, tuple[Payload, int]] = {}
        for payload in self.file.delegates:
            for value in payload.values.values():
                if value.constant is not None:
                    found.setdefault(value.constant.key, (payload, value.id))
        return found


def _chosen(runs: Sequence[Run]) -> int:
    """The run whose first calls the checks of single delegates use: of those that begin empty the one with the longest
    first call."""
    lengths = [len(run.calls[0].tokens) if run.past is None else 0 for run in runs]
    return lengths.index(max(lengths))


def _beginning(run: Run) -> Run:
    return Run(run.name, run.calls[: 1 + DECODE_CALLS], run.past)


def _linear_weights(file: PteFile) -> int:
    return sum(
        math.prod(payload.values[node.inputs[1]].shape)
        for payload in file.delegates
        for node in payload.nodes
        if node.kind == "FullyConnected"
    )
