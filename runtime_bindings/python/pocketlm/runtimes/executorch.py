"""Sessions over a .pte: through PocketLM's native library where it is installed, else through torch.

:mod:`executorch_native` and :mod:`executorch_torch` have the same ``open_session`` for whoever wants a certain one, and
the environment variable ``POCKETLM_EXECUTORCH``, ``native`` or ``torch``, forces one for the process. ExecuTorch has
one thread pool for the process: ``threads`` sets its size for every session; None leaves it as it is.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from pocketlm.artifact import Artifact
from pocketlm.errors import InputError, UnavailableError, UnsupportedError
from pocketlm.runtimes.executorch_library import obstacle
from pocketlm.session import Session

__all__ = ["CHOICE", "binding", "open_session", "runtime_build"]

CHOICE = "POCKETLM_EXECUTORCH"
BINDINGS = ("native", "torch")


def open_session(
    artifact: Artifact, threads: int | None, *, packed: bool = False, profile: Path | None = None
) -> Session:
    """A session over a ``.pte``; see :func:`pocketlm.runtimes.executorch_native.open_session`.

    Raises :class:`UnavailableError` if neither binding can be loaded, :class:`UnsupportedError` for ``packed`` or
    ``profile`` without the native one, and what that raises.
    """
    if binding() == "native":
        from pocketlm.runtimes import executorch_native

        return executorch_native.open_session(artifact, threads, packed=packed, profile=profile)
    for wish, name in ((packed, "packed weights"), (profile, "a profile")):
        if wish:
            raise UnsupportedError(
                f"{name}: not supported by ExecuTorch's binding to torch; valid with pocketlm-native: {obstacle()}"
            )
    from pocketlm.runtimes import executorch_torch

    return executorch_torch.open_session(artifact, threads)


def runtime_build() -> tuple[str, str]:
    """The version of ExecuTorch, and what computes."""
    if binding() == "native":
        from pocketlm.runtimes import executorch_native

        return executorch_native.runtime_build()
    from pocketlm.runtimes import executorch_torch

    return executorch_torch.runtime_build()


def binding() -> str:
    """``native`` or ``torch``: what :envvar:`POCKETLM_EXECUTORCH` says, else native if it fits, else torch.

    Raises :class:`UnavailableError` if neither is installed, :class:`InputError` for another value.
    """
    wish = os.environ.get(CHOICE)
    if wish:
        if wish not in BINDINGS:
            raise InputError(f"{CHOICE}={wish!r}: unknown; valid: {', '.join(BINDINGS)}")
        return wish
    reason = obstacle()
    if not reason:
        return "native"
    if find_spec("torch") is None:
        raise UnavailableError(
            f"ExecuTorch can't be loaded: {reason}; or with torch: pip install 'pocketlm[executorch]'"
        )
    return "torch"
