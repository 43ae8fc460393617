"""A model file into ONNX Runtime on the CPU: one way to load it, for sessions and for packing."""

from pathlib import Path

import onnxruntime  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]

from pocketlm.errors import BundleError

__all__ = ["RUNTIME_ERRORS", "load_model"]

FATAL_ONLY = 4  # ONNX Runtime's log severity: errors are raised, and need no printing
RUNTIME_ERRORS = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
    RuntimeError,  # what a binding's run raises
)


def load_model(
    path: Path, threads: int | None = None, *, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """The model at ``path``; ``threads`` None leaves the number to ONNX Runtime. ``options`` hold what else is wished.

    Raises :class:`BundleError` naming a file that ONNX Runtime refuses.
    """
    options = onnxruntime.SessionOptions() if options is None else options
    options.log_severity_level = FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads spin within a call, where it saves time, and not between two, where it burns the caller's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise BundleError(f"{path}: ONNX Runtime can't load it: {error}") from error
