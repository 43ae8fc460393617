"""Sessions over a .pte through ExecuTorch's own Python binding, which is linked to torch: no other module imports it.

It takes no load options: no packed weights, no profile.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.artifact import Artifact
from pocketlm.errors import BundleError, PocketLMError, UnavailableError
from pocketlm.runtimes.executorch_file import RELEASE_LINE, Bounds, check_header, check_signature
from pocketlm.runtimes.executorch_log import captured_log
from pocketlm.runtimes.executorch_threads import choose_threads, open_sessions
from pocketlm.session import Session

__all__ = ["TorchLinkedSession", "load_binding", "open_session", "runtime_build"]

KERNELS = ("extension/llm/custom_ops/libcustom_ops_aot_lib", "kernels/quantized/libquantized_ops_aot_lib")


def open_session(artifact: Artifact, threads: int | None) -> "TorchLinkedSession":
    """A session over a ``.pte``.

    Raises :class:`UnavailableError` for another ExecuTorch than 1.5.x, :class:`BundleError` for a file that it refuses,
    :class:`PocketLMError` for a thread count other than that of the sessions still open.
    """
    binding = load_binding()
    with captured_log():
        choose_threads(threads, binding._threadpool_get_thread_count(), binding._unsafe_reset_threadpool)
    return TorchLinkedSession(binding, artifact)


def runtime_build() -> tuple[str, str]:
    """ExecuTorch's version, and which of its bindings this is."""
    load_binding()
    return importlib.metadata.version("executorch"), "its own binding, linked to torch"


class TorchLinkedSession(Session):
    """One program in memory; its caches are part of it, and a rewind is a position to write from."""

    def __init__(self, binding: Any, artifact: Artifact) -> None:
        super().__init__(
            runtime="executorch",
            context_length=artifact.context_length,
            vocabulary_size=artifact.vocabulary_size,
            longest_call=artifact.longest_call,
            rows=artifact.rows,
        )
        self.description = f"ExecuTorch {importlib.metadata.version('executorch')}, binding linked to torch"
        path = artifact.path
        check_header(artifact)
        with captured_log() as last_line:
            try:
                # Minimal: the file was hashed, and the binding has no other verification compiled in.
                self._program = binding._load_program(str(path), program_verification=binding.Verification.Minimal)
                _check_signature(artifact, self._program.method_meta("forward"))
                self._forward = self._program.load_method("forward")
            except RuntimeError as error:
                raise BundleError(f"{path}: ExecuTorch can't load it: {error} ({last_line()})") from error
        open_sessions.add(self)

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
        open_sessions.discard(self)


def _check_signature(artifact: Artifact, forward: Any) -> None:
    inputs = [forward.input_tensor_meta(index) for index in range(forward.num_inputs())]
    outputs = [forward.output_tensor_meta(index) for index in range(forward.num_outputs())]
    check_signature(artifact, [_bounds(tensor) for tensor in inputs], [_bounds(tensor) for tensor in outputs])


def _bounds(tensor: Any) -> Bounds:
    return tensor.dtype(), tuple(tensor.sizes())


def load_binding() -> Any:
    """The binding's extension module, with the kernels of attention and quantized embeddings registered.

    Its documented wrapper imports ExecuTorch's exporter, which takes seconds.
    """
    version = importlib.metadata.version("executorch")
    if version.rpartition(".")[0] != RELEASE_LINE:
        raise UnavailableError(
            f"executorch {version} is installed; PocketLM runs with {RELEASE_LINE}.x: "
            "pip install 'pocketlm[executorch]'"
        )
    try:
        import executorch
        import torch  # first: the binding is linked to its libraries

        with captured_log():
            from executorch.extension.pybindings import _C

            for kernels in KERNELS:
                (library,) = (file for root in executorch.__path__ for file in Path(root).glob(f"{kernels}.*"))
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (ImportError, OSError, ValueError) as error:
        raise UnavailableError(f"ExecuTorch can't be loaded: {error}; install 'pocketlm[executorch]'") from error
    return _C
