"""The reader of an ONNX artifact, by ONNX's schema and the operators' documentation; shares nothing with the writer.

Integers and scales come in the weight store's convention, so that they can be compared with it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnavailableError
from pocketlm.manifest import Manifest
from pocketlm_export.backends.onnx.execute import execute
from pocketlm_export.backends.onnx.facts import check_same_place, facts
from pocketlm_export.backends.onnx.file import OnnxFile
from pocketlm_export.backends.onnx.kernels import CALLS, activation_rounding, check_kernels
from pocketlm_export.backends.onnx.matrices import QuantizedMatrix, quantized_matrices, signed_codes
from pocketlm_export.backends.onnx.runtime import chosen_experts, meaning, shipped, unmet_floor
from pocketlm_export.backends.reading import (
    LARGEST_SESSION,
    Fact,
    NotRun,
    RowErrors,
    Run,
    StoredConstants,
    Trace,
    WrittenMatrix,
)
from pocketlm_export.selection import RowSelection

Rows = slice | npt.NDArray[np.int64]

__all__ = ["OnnxReader", "open_reader"]


def open_reader(path: Path, manifest: Manifest) -> "OnnxReader":
    """The reader of ``model.onnx`` at ``path`` and of the ``head.onnx`` beside it."""
    return OnnxReader(path, manifest)


class OnnxReader:
    """See :class:`pocketlm_export.backends.reading.Reader`."""

    stored = StoredConstants(
        table=np.float32,
        epsilon=lambda epsilon: float(np.float32(epsilon)),
        scale=lambda scale: float(np.float32(scale)),
        constant=lambda value: float(np.float32(value)),
    )
    unstated: frozenset[str] = frozenset()

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        self._decoder = OnnxFile(path)
        self._head = OnnxFile(path.with_name("head.onnx"))
        self._matrices = self._read_matrices()
        entries = {name: w.places["onnx"].entry for name, w in manifest.weights.items() if "onnx" in w.places}
        self.round_activations = activation_rounding(self._decoder, self._head, entries)
        self.notes = (*([f"kernels: the first {CALLS} calls of each run"] if self.round_activations else []),)

    def rows(self, entry: str, start: int, stop: int) -> WrittenMatrix | npt.NDArray[np.float32]:
        """Rows of a constant of model.onnx, one of more axes is one matrix below another; an int8 matrix whose scales
        are equal along every row has one group.

        Raises :class:`CheckError` if head.onnx means other bytes by this name.
        """
        constant, selection = self._decoder.entry(entry)
        check_same_place(self._decoder, self._head, constant)
        rows = slice(start, stop) if selection is None else _row_numbers(selection, start, stop)
        matrix = self._matrices.get(constant)
        if matrix is not None:
            return self._matrix_rows(matrix, rows)
        values = self._decoder.constant(constant)
        if values.dtype != np.float32:
            raise BundleError(f"{self._decoder.path}: {constant}: {values.dtype} is no float32")
        return np.array((values if values.ndim <= 2 else values.reshape(-1, values.shape[-1]))[rows])

    def facts(self) -> Iterator[Fact]:
        """Attributes of both files, whole tables, sizes; see :func:`pocketlm_export.backends.onnx.facts.facts`."""
        return facts(self._decoder, self._head, self._manifest)

    def execute(self, runs: Sequence[Run]) -> list[Trace]:
        """In float64."""
        return execute(self._decoder, self._head, runs, self._manifest.model)

    def meaning(self, runs: Sequence[Run]) -> list[Trace | None] | NotRun:
        """ONNX Runtime with every product at accuracy_level 0."""
        unmet = self._unmet_floor()
        if unmet:
            return NotRun(unmet)
        return list(meaning(self._decoder, self._head, runs, self._manifest.model))

    def kernels(self, runs: Sequence[Run]) -> RowErrors | NotRun:
        """ONNX Runtime's products as shipped."""
        unmet = self._unmet_floor()
        return NotRun(unmet) if unmet else check_kernels(self._decoder, self._head, runs, self._manifest.model)

    def in_parts(self, runs: Sequence[Run]) -> list[Trace] | None:
        """Pieces of the decoder in ONNX Runtime, where its constants are more than LARGEST_SESSION."""
        if self._decoder.constant_bytes <= LARGEST_SESSION:
            return None
        self._require_floor()
        return shipped(self._decoder, self._head, runs, self._manifest.model)

    def chosen_experts(self, runs: Sequence[Run]) -> list[Trace]:
        """Pieces of the decoder in ONNX Runtime, which show their routers' scores."""
        self._require_floor()
        return chosen_experts(self._decoder, runs, self._manifest.model)

    def emulate(self, _runs: Sequence[Run]) -> None:
        """A session runs the artifact here."""
        return

    def _require_floor(self) -> None:
        unmet = self._unmet_floor()
        if unmet:
            raise UnavailableError(unmet)

    def _unmet_floor(self) -> str | None:
        return unmet_floor(self._manifest.targets["onnx"].runtime["onnxruntime"])

    def _read_matrices(self) -> dict[str, QuantizedMatrix]:
        found: dict[str, QuantizedMatrix] = {}
        for file in (self._decoder, self._head):
            for node, matrix in quantized_matrices(file):
                if found.setdefault(matrix.codes, matrix) != matrix:
                    raise BundleError(f"{file.path}: {node.name}: reads {matrix.codes} as {matrix}, not as before")
        return found

    def _matrix_rows(self, matrix: QuantizedMatrix, rows: Rows) -> WrittenMatrix:
        packed, scales = matrix.packed(self._decoder)
        codes = signed_codes(packed[rows], matrix.bits)
        if codes[:, matrix.columns :].any():
            raise BundleError(
                f"{self._decoder.path}: {matrix.codes}: codes beyond column {matrix.columns} are not zero"
            )
        groups = np.array(scales[rows])
        if matrix.bits == 8 and (groups == groups[:, :1]).all():
            groups = groups[:, :1]
        return WrittenMatrix(matrix.codes, matrix.bits, codes[:, : matrix.columns], groups)


def _row_numbers(selection: RowSelection, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Where the selected rows ``start..stop`` lie."""
    period, within = np.divmod(np.arange(start, stop), selection.stop - selection.start)
    return period * selection.period + selection.start + within
