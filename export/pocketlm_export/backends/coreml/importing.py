"""coremltools, imported quickly and silently.

With torch and scikit-learn in the environment its import takes some twenty seconds and prints what it misses; without
them two. The backend builds programs with the MIL builder alone and needs neither. A coremltools imported first by this
module therefore has no torch frontend for the rest of the process.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from pocketlm.errors import UnavailableError

__all__ = ["coremltools", "mil", "mil_exporter"]

HIDDEN = ("torch", "sklearn", "tensorflow", "transformers", "xgboost", "libsvm")


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """``import name`` fails inside, for each of ``names``; what was imported before comes back after."""
    held: dict[str, ModuleType] = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: the import system's "not there"
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(held)


def _import() -> tuple[Any, Any, Any]:
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _hidden(HIDDEN), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (
                importlib.import_module("coremltools"),
                importlib.import_module("coremltools.converters.mil.mil"),
                importlib.import_module("coremltools.converters.mil.backend.mil.load"),
            )
    except ImportError as error:
        raise UnavailableError(
            f"Core ML packages are built with coremltools ({error}): pip install 'pocketlm[coreml]'"
        ) from error
    finally:
        logger.setLevel(level)


coremltools, mil, mil_exporter = _import()
"""The package; its ``mil.mil`` with Builder, Program and types; and the module that turns programs into messages."""


def _reshaped(elements: Any, shape: Any) -> list[Any]:
    """The unknown dimension of a reshape: one of ``shape`` is a new symbol, all others are known.

    coremltools gives this one linear equation to sympy's solver: 5 ms each, a quarter of the time of a package.
    """
    known, unknown = 1, []
    for index, size in enumerate(shape):
        if isinstance(size, int | np.integer):
            known *= int(size)
        else:
            unknown.append(index)
    if len(unknown) != 1:
        return list(_solve_reshape(elements, shape))
    return [elements / known if index == unknown[0] else size for index, size in enumerate(shape)]


_reshape = importlib.import_module("coremltools.converters.mil.mil.ops.defs.iOS15.tensor_transformation").reshape
_solve_reshape = _reshape.enforce_volumetric_constraint
_reshape.enforce_volumetric_constraint = staticmethod(_reshaped)
