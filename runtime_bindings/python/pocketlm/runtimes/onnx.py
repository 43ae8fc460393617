"""A session over ONNX Runtime on the CPU: one shared KV buffer a layer and side, bound once, never copied."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]

from pocketlm.errors import BundleError, PocketLMError, UnavailableError
from pocketlm.manifest import Manifest
from pocketlm.session import Session

__all__ = ["RUNTIME_ERRORS", "OnnxSession", "open_session"]

FATAL_ONLY = 4  # ONNX Runtime's log severity: errors are raised, and need no printing
HEAD_FILE = "head.onnx"
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


def open_session(path: Path, manifest: Manifest, threads: int | None) -> "OnnxSession":
    """A session over ``model.onnx`` at ``path``; ``threads`` None leaves the number to ONNX Runtime.

    Raises :class:`UnavailableError` if ONNX Runtime is older than what the artifact states, because older kernels may
    compute something else, and :class:`BundleError` naming the file that ONNX Runtime refuses.
    """
    floor = manifest.targets["onnx"].runtime["onnxruntime"].removeprefix(">=")
    if _release(onnxruntime.__version__) < _release(floor):
        raise UnavailableError(
            f"{path}: needs onnxruntime {floor} or newer, but {onnxruntime.__version__} is installed: "
            f"pip install 'onnxruntime>={floor}'"
        )
    return OnnxSession(path, manifest, threads)


class OnnxSession(Session):
    """The last position's logits come from the decoder; those of more from its hidden states through ``head.onnx``,
    which is loaded when they are first asked for."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None) -> None:
        target, model = manifest.targets["onnx"], manifest.model
        super().__init__(
            runtime="onnx",
            context_length=model.context_length,
            vocabulary_size=model.vocabulary_size,
            longest_call=target.longest_call,
            rows=target.rows,
        )
        self._path = path
        self._threads = threads
        self._decoder = _load(path, threads)
        self._head: onnxruntime.InferenceSession | None = None
        self._mask = np.ones((1, self.context_length), np.int64)
        self._logits = np.empty((1, 1, self.vocabulary_size), np.float32)
        self._buffers = [self._logits]  # a binding does not keep the arrays that it writes to
        self._last_only = onnxruntime.IOBinding(self._decoder)
        self._with_states = onnxruntime.IOBinding(self._decoder)
        self._hidden_size = model.hidden_size
        logits = onnxruntime.OrtValue.ortvalue_from_numpy(self._logits)
        self._last_only.bind_ortvalue_output("logits", logits)
        for value in self._decoder.get_inputs():
            if value.name.startswith("past_key_values."):
                _, kv_heads, _, head_dim = value.shape
                # Zeros that were never touched take no memory.
                cache = np.zeros((1, kv_heads, self.context_length, head_dim), np.float32)
                self._buffers.append(cache)
                shared = onnxruntime.OrtValue.ortvalue_from_numpy(cache)
                for binding in (self._last_only, self._with_states):
                    binding.bind_ortvalue_input(value.name, shared)
                    binding.bind_ortvalue_output(value.name.replace("past_key_values.", "present."), shared)

    def _run(self, tokens: npt.NDArray[np.int64], position: int, rows: int) -> npt.NDArray[np.float32]:
        binding = self._last_only if rows <= 1 else self._with_states
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens)[None])
        binding.bind_cpu_input("attention_mask", self._mask[:, : position + tokens.size])
        if rows <= 1:
            with self._named(self._path):
                self._decoder.run_with_iobinding(binding)
            return self._logits[0].copy()
        states = np.empty((1, tokens.size, self._hidden_size), np.float32)
        binding.bind_ortvalue_output("hidden_states", onnxruntime.OrtValue.ortvalue_from_numpy(states))
        with self._named(self._path):
            self._decoder.run_with_iobinding(binding)
        return self._run_head(np.ascontiguousarray(states[:, -rows:]))

    def _run_head(self, states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        path = self._path.with_name(HEAD_FILE)
        if self._head is None:
            self._head = _load(path, self._threads)
        with self._named(path):
            (logits,) = self._head.run(None, {"hidden_states": states})
        return np.asarray(logits[0], np.float32)

    def _close(self) -> None:
        del self._last_only, self._with_states, self._decoder
        self._head = None
        self._buffers.clear()

    @staticmethod
    @contextmanager
    def _named(path: Path) -> Iterator[None]:
        try:
            yield
        except RUNTIME_ERRORS as error:
            raise PocketLMError(f"{path}: ONNX Runtime failed: {error}") from error


def _release(version: str) -> tuple[int, ...]:
    """``1.23.2`` and ``1.23.2.dev1`` alike."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def _load(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
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
