"""What really ran: a runtime's own profile, read on the host. A runtime's name is a module of this package."""

import importlib
import importlib.util
from pathlib import Path

from pocketlm.artifact import Artifact
from pocketlm.errors import InputError, UnavailableError, UnsupportedError
from pocketlm.results import OperatorTime, Profile

__all__ = ["read_profile"]


def read_profile(runtime: str, profile: Path, artifact: Artifact, features: str | None) -> Profile:
    """The profile that ``runtime`` wrote while it ran ``artifact`` on a CPU with ``features``.

    A fallback is an operator that ran in another kernel than the artifact was written for; each runtime's module says
    which those are. Raises :class:`UnavailableError` for a file that is none, since it comes from a device, and
    :class:`UnsupportedError` for a runtime that writes none.
    """
    name = f"{__name__}.{runtime}"
    if importlib.util.find_spec(name) is None:
        raise UnsupportedError(f"a profile: not supported by {runtime}")
    try:
        operators: list[OperatorTime] = importlib.import_module(name).read_operators(profile, artifact, features or "")
    except InputError as error:
        raise UnavailableError(f"{runtime} wrote no profile that can be read: {error}") from error
    total = sum(operator.seconds for operator in operators)
    delegated = sum(operator.seconds for operator in operators if operator.delegated)
    slowest_first = sorted(operators, key=lambda operator: -operator.seconds)
    return Profile(operators=slowest_first, delegated_share=min(1.0, delegated / total) if total else None)
