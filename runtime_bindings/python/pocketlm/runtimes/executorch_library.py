"""The native library of ExecuTorch sessions (``pocketlm-native``) through ctypes: programs, their methods, arrays.

It stands for the C++ in runtime_bindings/native, which is linked to the executorch wheel's own libraries and not to
torch.
"""

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import PocketLMError, UnavailableError
from pocketlm.runtimes.executorch_file import Bounds
from pocketlm.runtimes.executorch_log import captured_log

__all__ = ["LIBRARY", "Program", "built_for", "load_library", "obstacle", "thread_count", "use_instructions"]

LIBRARY = "libpocketlm_executorch.so"
MOST_DIMENSIONS = 8
# ExecuTorch's ScalarType, executorch/runtime/core/portable_type/scalar_type.h
TYPES: dict[int, npt.DTypeLike] = {0: np.uint8, 1: np.int8, 3: np.int32, 4: np.int64, 5: np.float16, 6: np.float32}
CODES = {np.dtype(kind): code for code, kind in TYPES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * MOST_DIMENSIONS),
        ("data", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Where the library is, and the version of ExecuTorch beside it; None where its libraries were copied alone."""

    path: Path
    executorch: str | None


def obstacle() -> str:
    """Why the native library can't be used here; empty if it can."""
    try:
        load_library()
    except UnavailableError as error:
        return str(error)
    return ""


@cache
def load_library() -> ctypes.CDLL:
    """The library, its functions declared.

    Raises :class:`UnavailableError` if it isn't installed, or was built for another ExecuTorch than the installed one.
    """
    found = _find()
    try:
        library = ctypes.CDLL(str(found.path))
    except OSError as error:
        raise UnavailableError(f"{found.path}: can't be loaded: {error}") from error
    _declare(library)
    if found.executorch is not None and _release(found.executorch) != built_for(library):
        raise UnavailableError(
            f"pocketlm-native is built for executorch {built_for(library)}, but {found.executorch} is installed: "
            f"pip install executorch=={built_for(library)}"
        )
    return library


def built_for(library: ctypes.CDLL) -> str:
    """The release of ExecuTorch whose classes are compiled into ``library``."""
    return _release(library.pocketlm_built_for().decode())


def _find() -> _Found:
    package = importlib.util.find_spec("pocketlm_native")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / LIBRARY
        if path.exists():
            try:
                return _Found(path, importlib.metadata.version("executorch"))
            except importlib.metadata.PackageNotFoundError:
                return _Found(path, None)
    raise UnavailableError("pocketlm-native is not installed: pip install 'pocketlm[native]'")


def _release(version: str) -> str:
    return version.partition("+")[0]


def _declare(library: ctypes.CDLL) -> None:
    text, number, handle, tensors = ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Tensor)
    for name, result, arguments in (
        ("built_for", text, ()),
        ("use_instructions", text, (text,)),
        ("threads", number, (number,)),
        ("open", handle, (text, text, number)),
        ("close", None, (handle,)),
        ("error", text, (handle,)),
        ("log", text, (handle,)),
        ("signature", number, (handle, text, number, tensors, number)),
        ("load", number, (handle, text)),
        ("run", number, (handle, text, tensors, number, tensors, number)),
        ("write_trace", number, (handle, text)),
    ):
        function = getattr(library, f"pocketlm_{name}")
        function.restype, function.argtypes = result, arguments


def thread_count(change_to: int = 0) -> int:
    """How many threads ExecuTorch's pool has, after giving it ``change_to`` if that is positive."""
    with captured_log():
        return load_library().pocketlm_threads(change_to)


def use_instructions(name: str | None = None) -> str:
    """Let attention use ``baseline``, ``avx2`` or ``avx512`` from now on, by default the best; return its name.

    Raises :class:`UnavailableError` for what this CPU lacks.
    """
    used = load_library().pocketlm_use_instructions(name.encode() if name is not None else None)
    if used is None:
        raise UnavailableError(f"attention in {name}: not supported by this CPU")
    return used.decode()


class Program:
    """A ``.pte`` mapped into memory. One thread at a time; raises :class:`PocketLMError` with ExecuTorch's reason."""

    def __init__(self, path: Path, *, packed_weights: Path | None = None, profile: bool = False) -> None:
        """``packed_weights``: XNNPACK's file of packed weights, written if it is missing, else mapped and trusted.
        ``profile``: trace every call."""
        self._library = load_library()
        self._output_counts: dict[str, int] = {}  # of the loaded methods
        packed = os.fsencode(packed_weights) if packed_weights is not None else None
        with captured_log():  # of the vendor's binding, which may have the process's log until here
            self._handle = self._library.pocketlm_open(os.fsencode(path), packed, profile)
        self._free = weakref.finalize(self, self._library.pocketlm_close, self._handle)
        reason = self._library.pocketlm_error(self._handle)
        if reason:
            self.close()
            raise PocketLMError(reason.decode(errors="replace"))

    def signature(self, method: str) -> tuple[list[Bounds], list[Bounds]]:
        """The bounds of a method's inputs and outputs; of type -1 what is no tensor."""
        return self._bounds(method, of_outputs=False), self._bounds(method, of_outputs=True)

    def load(self, method: str) -> str:
        """Get a method ready: its memory, its kernels, its packed weights. Returns what ExecuTorch complained of."""
        self._check(self._library.pocketlm_load(self._handle, method.encode()))
        complaints = self._library.pocketlm_log(self._handle).decode(errors="replace")
        self._output_counts[method] = self._count(method, of_outputs=True)
        return complaints

    def run(self, method: str, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Run a loaded method. The outputs are views into its memory: valid until it runs again, or is closed."""
        arrays = [np.ascontiguousarray(array) for array in inputs]
        given = (_Tensor * len(arrays))(*(_as_tensor(array) for array in arrays))
        made = (_Tensor * self._output_counts[method])()
        name = method.encode()
        self._check(self._library.pocketlm_run(self._handle, name, given, len(given), made, len(made)))
        return [_as_array(tensor) for tensor in made]

    def write_trace(self, path: Path) -> None:
        """Write what was traced so far as an ETDump."""
        self._check(self._library.pocketlm_write_trace(self._handle, os.fsencode(path)))

    def close(self) -> None:
        """Free the memory; no other method may be called afterwards."""
        self._free()

    def _count(self, method: str, *, of_outputs: bool) -> int:
        return self._check(self._library.pocketlm_signature(self._handle, method.encode(), of_outputs, None, 0))

    def _bounds(self, method: str, *, of_outputs: bool) -> list[Bounds]:
        tensors = (_Tensor * self._count(method, of_outputs=of_outputs))()
        name = method.encode()
        self._check(self._library.pocketlm_signature(self._handle, name, of_outputs, tensors, len(tensors)))
        return [(tensor.dtype, tuple(tensor.sizes[: tensor.dimensions])) for tensor in tensors]

    def _check(self, result: int) -> int:
        if result < 0:
            raise PocketLMError(self._library.pocketlm_error(self._handle).decode(errors="replace"))
        return result


def _as_tensor(array: npt.NDArray[Any]) -> _Tensor:
    sizes = (ctypes.c_int64 * MOST_DIMENSIONS)(*array.shape)
    return _Tensor(CODES[array.dtype], array.ndim, sizes, array.ctypes.data)


def _as_array(tensor: _Tensor) -> npt.NDArray[Any]:
    shape = tuple(tensor.sizes[: tensor.dimensions])
    kind = np.dtype(TYPES[tensor.dtype])
    size = math.prod(shape) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(tensor.data or 0), kind).reshape(shape)
