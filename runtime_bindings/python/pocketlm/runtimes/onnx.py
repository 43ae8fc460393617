"""A session over ONNX Runtime on the CPU: one shared KV buffer a layer and side, bound once, never copied."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]

from pocketlm.artifact import Artifact
from pocketlm.errors import PocketLMError, UnavailableError
from pocketlm.memory import untouched_zeros
from pocketlm.runtimes.onnx_loading import RUNTIME_ERRORS, load_model
from pocketlm.runtimes.onnx_packed import packed_model
from pocketlm.session import Session

__all__ = ["OnnxSession", "open_session", "runtime_build"]

HEAD_FILE = "head.onnx"
DATA_FILE = "model.onnx.data"  # of both


def open_session(
    artifact: Artifact, threads: int | None, *, packed: bool = False, profile: Path | None = None
) -> "OnnxSession":
    """A session over a ``model.onnx``; ``threads`` None leaves the number to ONNX Runtime.

    ``packed``: over copies of the models whose weights are packed for this machine already, see
    :mod:`pocketlm.runtimes.onnx_packed`. It computes the same bits. ``profile``: the file that ONNX Runtime's profile
    of ``model.onnx`` is written to when the session is closed.

    Raises :class:`UnavailableError` if ONNX Runtime is older than what the artifact states, because older kernels may
    compute something else, and :class:`BundleError` naming the file that ONNX Runtime refuses.
    """
    floor = artifact.requirements["onnxruntime"].removeprefix(">=")
    if _release(onnxruntime.__version__) < _release(floor):
        raise UnavailableError(
            f"{artifact.path}: needs onnxruntime {floor} or newer, but {onnxruntime.__version__} is installed: "
            f"pip install 'onnxruntime>={floor}'"
        )
    return OnnxSession(artifact, threads, packed=packed, profile=profile)


def runtime_build() -> tuple[str, str]:
    """ONNX Runtime's version, and what it says of how it was built."""
    return onnxruntime.__version__, onnxruntime.get_build_info()


class OnnxSession(Session):
    """The last position's logits come from the decoder; those of more from its hidden states through ``head.onnx``,
    which is loaded when they are first asked for."""

    def __init__(
        self, artifact: Artifact, threads: int | None, *, packed: bool = False, profile: Path | None = None
    ) -> None:
        super().__init__(
            runtime="onnx",
            context_length=artifact.context_length,
            vocabulary_size=artifact.vocabulary_size,
            longest_call=artifact.longest_call,
            rows=artifact.rows,
        )
        self._path = artifact.path
        self._threads = threads
        self._packed = packed
        self._files = artifact.files
        self._profile = profile
        self._decoder = self._load(artifact.path, profile)
        self._head: onnxruntime.InferenceSession | None = None
        self._mask = np.ones((1, self.context_length), np.int64)
        self._logits = np.empty((1, 1, self.vocabulary_size), np.float32)
        self._buffers = [self._logits]  # a binding does not keep the arrays that it writes to
        self._last_only = onnxruntime.IOBinding(self._decoder)
        self._with_states = onnxruntime.IOBinding(self._decoder)
        self._hidden_size = artifact.hidden_size
        logits = onnxruntime.OrtValue.ortvalue_from_numpy(self._logits)
        self._last_only.bind_ortvalue_output("logits", logits)
        for value in self._decoder.get_inputs():
            if value.name.startswith("past_key_values."):
                _, kv_heads, _, head_dim = value.shape
                cache = untouched_zeros((1, kv_heads, self.context_length, head_dim), np.float32)
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
            self._head = self._load(path)
        with self._named(path):
            (logits,) = self._head.run(None, {"hidden_states": states})
        return np.asarray(logits[0], np.float32)

    def _load(self, path: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)  # ONNX Runtime adds the time
        if not self._packed:
            return load_model(path, self._threads, options=options)
        with packed_model(path, {name: self._files[name] for name in (path.name, DATA_FILE)}) as copy:
            return load_model(copy, self._threads, options=options)

    def _close(self) -> None:
        if self._profile is not None:
            Path(self._decoder.end_profiling()).replace(self._profile)
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
