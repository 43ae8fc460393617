"""A safetensors file whose tensors go by other names than they are stored under."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from pocketlm_export.checkpoint.tensors import TensorFile, TensorInfo
from pocketlm_export.selection import RowSelection

__all__ = ["RenamedFile"]


class RenamedFile:
    """Is read as ``file``, with the tensors that ``stored`` maps to their names in the file. Errors name those."""

    def __init__(self, file: TensorFile, stored: Mapping[str, str]) -> None:
        self.path = file.path
        self.tensors: Mapping[str, TensorInfo] = {name: file.tensors[old] for name, old in stored.items()}
        self._file, self._stored = file, stored

    def digest(self, name: str) -> str:
        """sha256 of the tensor's dtype, shape and bytes."""
        return self._file.digest(self._stored[name])

    def float_blocks(
        self, name: str, elements: int, selection: RowSelection | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """As :meth:`TensorFile.float_blocks`."""
        return self._file.float_blocks(self._stored[name], elements, selection)

    def release(self) -> None:
        """Let the kernel drop every mapped page."""
        self._file.release()
