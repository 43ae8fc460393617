"""Sessions over a .pte through PocketLM's native library: no torch, load options, a trace of what ran."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm.artifact import Artifact
from pocketlm.errors import BundleError, PocketLMError
from pocketlm.runtimes.executorch_file import check_header, check_signature
from pocketlm.runtimes.executorch_library import Program, built_for, load_library, thread_count, use_instructions
from pocketlm.runtimes.executorch_packed import packed_weights
from pocketlm.runtimes.executorch_threads import choose_threads, open_sessions
from pocketlm.session import Session

__all__ = ["NativeSession", "open_session", "runtime_build"]

METHOD = "forward"


def open_session(
    artifact: Artifact, threads: int | None, *, packed: bool = False, profile: Path | None = None
) -> "NativeSession":
    """A session over a ``.pte``.

    ``packed``: the weights as XNNPACK packs them for this machine are mapped from a file in the user's cache, see
    :mod:`pocketlm.runtimes.executorch_packed`; it computes the same bits. ``profile``: the file that an ETDump of all
    calls is written to when the session is closed.

    Raises :class:`UnavailableError` if the library isn't installed or is another ExecuTorch's, :class:`BundleError` for
    a file that ExecuTorch refuses, :class:`InputError` if there's no place for packed weights,
    :class:`PocketLMError` for a thread count other than that of the sessions still open.
    """
    choose_threads(threads, thread_count(), thread_count)
    if not packed:
        return NativeSession(artifact, profile=profile)
    with packed_weights(artifact, _version(), lambda file: _pack(artifact, file)) as weights:
        return NativeSession(artifact, weights, profile)


def runtime_build() -> tuple[str, str]:
    """The version of ExecuTorch, and what computes."""
    return _version(), f"PocketLM's native session, attention in {use_instructions()}"


class NativeSession(Session):
    """One program in memory; its caches are part of it, and a rewind is a position to write from."""

    def __init__(self, artifact: Artifact, weights: Path | None = None, profile: Path | None = None) -> None:
        super().__init__(
            runtime="executorch",
            context_length=artifact.context_length,
            vocabulary_size=artifact.vocabulary_size,
            longest_call=artifact.longest_call,
            rows=artifact.rows,
        )
        self.description = f"ExecuTorch {_version()}, native session"
        self._profile = profile
        self._program = _open(artifact, weights, profile=profile is not None)
        _load(artifact, self._program)
        open_sessions.add(self)

    def _run(self, tokens: npt.NDArray[np.int64], position: int, rows: int) -> npt.NDArray[np.float32]:
        try:
            (logits,) = self._program.run(METHOD, tokens[None], np.array([position], np.int64))
        except PocketLMError as error:
            raise PocketLMError(f"ExecuTorch failed on {len(tokens)} tokens at position {position}: {error}") from error
        result: npt.NDArray[np.float32] = logits[0, logits.shape[1] - rows :].copy()
        return result

    def _close(self) -> None:
        open_sessions.discard(self)
        try:
            if self._profile is not None:
                self._program.write_trace(self._profile)
        finally:
            self._program.close()


def _version() -> str:
    return built_for(load_library())


def _open(artifact: Artifact, weights: Path | None, *, profile: bool = False) -> Program:
    check_header(artifact)
    with _named(artifact):
        program = Program(artifact.path, packed_weights=weights, profile=profile)
        check_signature(artifact, *program.signature(METHOD))
    return program


def _load(artifact: Artifact, program: Program) -> str:
    with _named(artifact):
        return program.load(METHOD)


def _pack(artifact: Artifact, weights: Path) -> str:
    """Write ``weights``; returns what ExecuTorch complained of."""
    program = _open(artifact, weights)
    complaints = _load(artifact, program)
    program.close()
    return complaints


@contextmanager
def _named(artifact: Artifact) -> Iterator[None]:
    try:
        yield
    except BundleError:
        raise
    except PocketLMError as error:
        raise BundleError(f"{artifact.path}: ExecuTorch can't load it: {error}") from error
