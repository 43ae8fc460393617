"""All weights of an export: quantized once through the store, vectors and unquantized matrices from the checkpoint."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from pocketlm_export.checkpoint.checkpoint import Tensors
from pocketlm_export.quantization.schemes import SchemeRow
from pocketlm_export.quantization.store import QuantizedTensor, WeightStore

__all__ = ["Weights", "quantize"]


class Weights:
    """What backends read. Names are Hugging Face's."""

    def __init__(self, tensors: Tensors, quantized: Mapping[str, QuantizedTensor], made: int) -> None:
        self._tensors = tensors
        self._quantized = quantized
        self.made = made  # entries that had to be computed; the others were in the store

    def row(self, name: str) -> SchemeRow | None:
        """The scheme row of ``name``; None if its values are kept."""
        found = self._quantized.get(name)
        return found.row if found is not None else None

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a weight whose :meth:`row` is not None."""
        return self._quantized[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return self._tensors.shape(name)

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """The checkpoint's values of a whole tensor, float32: for vectors."""
        return self._tensors.values(name)

    def sha256(self, name: str) -> str:
        """What the manifest knows a weight by: of codes and scales (:class:`ContentDigest`), else of float32 values."""
        found = self._quantized.get(name)
        if found is not None:
            return found.sha256
        digest = hashlib.sha256()
        for _, values in self._tensors.blocks(name):
            digest.update(np.ascontiguousarray(values, "<f4").data)
        return digest.hexdigest()

    def blocks(self, name: str) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """``(first row, float32 values)``: what the artifact means, dequantized where it is quantized."""
        found = self._quantized.get(name)
        if found is None:
            yield from self._tensors.blocks(name)
            return
        for start, stop in found.row_ranges():
            yield start, found.dequantized(start, stop)

    def release(self) -> None:
        """Let the kernel drop mapped pages of the checkpoint and the store."""
        self._tensors.release()
        for tensor in self._quantized.values():
            tensor.file.release()


def quantize(
    tensors: Tensors,
    rows: Mapping[str, SchemeRow | None],
    store: WeightStore,
    progress: Callable[[str, int], None] = lambda _name, _elements: None,
) -> Weights:
    """Bring every weight with a row into ``store``, one tensor a core at a time.

    ``progress`` is called after each with its name and number of elements, from any thread.
    """
    wanted = {name: row for name, row in rows.items() if row is not None}

    def work(name: str) -> tuple[str, QuantizedTensor, bool]:
        entry, made = store.quantized(tensors, name, wanted[name])
        progress(name, entry.shape[0] * entry.shape[1])
        return name, entry, made

    # numpy and hashlib release the interpreter's lock, so threads are enough; the largest first, to end together.
    order = sorted(wanted, key=lambda name: -int(np.prod(tensors.shape(name))))
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ) as pool:
        try:
            results = list(pool.map(work, order))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Weights(tensors, {name: entry for name, entry, _ in results}, sum(made for *_, made in results))
