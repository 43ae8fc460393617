"""Sessions over a .pte through ExecuTorch's Python binding, which is linked to torch: the one module that imports it.

ExecuTorch has one thread pool for the process. ``threads`` sets its size for every session; None leaves it as it is.
"""

import importlib.metadata
import os
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.artifact import Artifact
from pocketlm.errors import BundleError, PocketLMError, UnavailableError
from pocketlm.session import Session

__all__ = ["ExecuTorchSession", "captured_log", "load_binding", "open_session"]

SUPPORTED = "1.5"
# executorch/runtime/executor/program.cpp and schema/extended_header.h: root offset, identifier, magic, header's length,
# program's size, start of the segments.
HEADER = struct.Struct("<I4s4sIQQ")
FILE_IDENTIFIER, HEADER_MAGIC = b"ET12", b"eh00"
KERNELS = ("extension/llm/custom_ops/libcustom_ops_aot_lib", "kernels/quantized/libquantized_ops_aot_lib")

_sessions: "weakref.WeakSet[ExecuTorchSession]" = weakref.WeakSet()


def open_session(artifact: Artifact, threads: int | None) -> Session:
    """A session over a ``.pte``.

    Raises :class:`UnavailableError` for another ExecuTorch than 1.5.x, :class:`BundleError` for a file that it refuses,
    :class:`PocketLMError` for a thread count other than that of the sessions still open.
    """
    binding = load_binding()
    _set_threads(binding, threads)
    return ExecuTorchSession(
        binding,
        artifact.path,
        context_length=artifact.context_length,
        vocabulary_size=artifact.vocabulary_size,
        longest_call=artifact.longest_call,
        rows=artifact.rows,
    )


class ExecuTorchSession(Session):
    """One program in memory; its caches are part of it, and a rewind is a position to write from."""

    def __init__(
        self, binding: Any, path: Path, *, context_length: int, vocabulary_size: int, longest_call: int, rows: int
    ) -> None:
        super().__init__(
            runtime="executorch",
            context_length=context_length,
            vocabulary_size=vocabulary_size,
            longest_call=longest_call,
            rows=rows,
        )
        _check_header(path)
        with captured_log() as last_line:
            try:
                # Minimal: the file was hashed, and the binding has no other verification compiled in.
                self._program = binding._load_program(str(path), program_verification=binding.Verification.Minimal)
                _check_signature(path, self._program.method_meta("forward"), longest_call, rows, vocabulary_size)
                self._forward = self._program.load_method("forward")
            except RuntimeError as error:
                raise BundleError(f"{path}: ExecuTorch can't load it: {error} ({last_line()})") from error
        _sessions.add(self)

    def _run(self, tokens: npt.NDArray[np.int64], position: int, rows: int) -> npt.NDArray[np.float32]:
        import torch

        inputs = (torch.from_numpy(tokens)[None], torch.tensor([position]))
        try:
            (logits,) = self._forward.call(inputs, clone_outputs=False)
        except RuntimeError as error:
            raise PocketLMError(f"ExecuTorch failed on {len(tokens)} tokens at position {position}: {error}") from error
        result: npt.NDArray[np.float32] = logits.numpy()[0, logits.shape[1] - rows :].copy()
        return result

    def _close(self) -> None:
        self._forward = self._program = None
        _sessions.discard(self)


def _check_header(path: Path) -> None:
    """Refuse what the runtime would read past its end, or not at all: it trusts the sizes of the extended header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size or start[4:8] != FILE_IDENTIFIER or start[8:12] != HEADER_MAGIC:
        raise BundleError(
            f"{path}: not a program of ExecuTorch {SUPPORTED} with an extended header: damaged, or an older exporter's"
        )
    program, segments = HEADER.unpack(start)[-2:]
    if not HEADER.size <= program <= segments <= size:
        raise BundleError(f"{path}: the header says {program} bytes of program, but the file has {size}: truncated")


def _check_signature(path: Path, forward: Any, longest_call: int, rows: int, vocabulary_size: int) -> None:
    inputs = [forward.input_tensor_meta(index).sizes() for index in range(forward.num_inputs())]
    outputs = [forward.output_tensor_meta(index).sizes() for index in range(forward.num_outputs())]
    expected = [(1, longest_call), (1,)], [(1, rows, vocabulary_size)]
    if ([*map(tuple, inputs)], [*map(tuple, outputs)]) != expected:
        raise BundleError(
            f"{path}: another model's program: from {inputs} it makes {outputs}; the manifest says {expected}"
        )


def load_binding() -> Any:
    """The binding's extension module, with the kernels of attention and quantized embeddings registered.

    Its documented wrapper imports ExecuTorch's exporter, which takes seconds.
    """
    version = importlib.metadata.version("executorch")
    if version.rpartition(".")[0] != SUPPORTED:
        raise UnavailableError(
            f"executorch {version} is installed; PocketLM runs with {SUPPORTED}.x: pip install 'pocketlm[executorch]'"
        )
    try:
        import executorch
        import torch  # first: the binding is linked to its libraries
        from executorch.extension.pybindings import _C

        with captured_log():
            for kernels in KERNELS:
                (library,) = (file for root in executorch.__path__ for file in Path(root).glob(f"{kernels}.*"))
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (ImportError, OSError, ValueError) as error:
        raise UnavailableError(f"ExecuTorch can't be loaded: {error}; install 'pocketlm[executorch]'") from error
    return _C


def _set_threads(binding: Any, threads: int | None) -> None:
    with captured_log():
        current = binding._threadpool_get_thread_count()
    if threads is None or threads == current:
        return
    if len(_sessions):  # their graphs hold the pool that a change would free
        raise PocketLMError(
            f"ExecuTorch's thread count is process-wide now {current}: close the other sessions, then ask for {threads}"
        )
    with captured_log():
        binding._unsafe_reset_threadpool(threads)


@contextmanager
def captured_log() -> Iterator[Callable[[], str]]:
    """Keep what ExecuTorch logs off the terminal; yields the last line: an error's reason is only there."""
    with tempfile.TemporaryFile() as log:
        terminal = os.dup(2)
        os.dup2(log.fileno(), 2)

        def last_line() -> str:
            log.seek(0)
            return log.read().decode(errors="replace").strip().rpartition("\n")[2]

        try:
            yield last_line
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
