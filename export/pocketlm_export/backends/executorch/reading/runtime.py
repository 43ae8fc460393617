"""Programs in memory in ExecuTorch's own runtime, the binding that is linked to torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError
from pocketlm.runtimes.executorch_log import captured_log
from pocketlm.runtimes.executorch_torch import load_binding
from pocketlm_export.backends.reading import Run, Trace

__all__ = ["LoadedProgram", "run_tokens"]


class LoadedProgram:
    """The method ``forward`` of a program. Raises :class:`BundleError` for one that the runtime refuses."""

    def __init__(self, content: bytes, name: str) -> None:
        self._name = name
        self._content = content  # the runtime reads weights from it and does not keep it alive
        binding = load_binding()
        with captured_log() as last_line:
            try:
                self._program = binding._load_program_from_buffer(content)
                self._forward = self._program.load_method("forward")
            except RuntimeError as error:
                raise BundleError(f"{name}: ExecuTorch can't load it: {error} ({last_line()})") from error

    def call(self, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        """The outputs for ``inputs``, copied out of the program's memory."""
        import torch

        tensors = [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in inputs]
        with captured_log() as last_line:
            try:
                outputs = self._forward.call(tensors, clone_outputs=False)
            except RuntimeError as error:
                raise BundleError(f"{self._name}: ExecuTorch can't run it: {error} ({last_line()})") from error
        return [output.numpy().copy() for output in outputs]


def run_tokens(program: LoadedProgram, runs: Sequence[Run]) -> list[Trace | None]:
    """The logits of ``runs`` in a program's ``forward``; None for a run over a past, which can't be put into it."""
    traces: list[Trace | None] = []
    for run in runs:
        if run.past is not None:
            traces.append(None)
            continue
        trace, position = Trace(), 0
        for call in run.calls:
            (logits,) = program.call(np.array([call.tokens], np.int64), np.array([position], np.int64))
            trace.logits.append(logits[0, -call.rows :])
            position += len(call.tokens)
        traces.append(trace)
    return traces
