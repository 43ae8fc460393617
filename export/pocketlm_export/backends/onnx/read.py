"""Reads an ONNX artifact back, by ONNX's own schema and the operators' documentation; shares nothing with the writer.

Integers and scales come in the weight store's convention, so that they can be compared with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from pocketlm.errors import BundleError
from pocketlm_export.backends.reading import WrittenMatrix

__all__ = ["OnnxFile", "WrittenNode", "read_weights"]


@dataclass(frozen=True, slots=True)
class WrittenNode:
    """An operator with the names of its inputs ("": left out) and outputs, and its attributes as Python values."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class OnnxFile:
    """One ``.onnx`` file; constants are mapped from the data file when they are asked for.

    Raises :class:`BundleError` naming the file and the constant for what lies outside the data file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(str(path), load_external_data=False)
        self._constants = {constant.name: constant for constant in self.model.graph.initializer}

    @property
    def constants(self) -> list[str]:
        """The names of all initializers."""
        return list(self._constants)

    @property
    def nodes(self) -> list[WrittenNode]:
        """The operators, in the order of the file."""
        return [
            WrittenNode(
                node.name,
                f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
                tuple(node.input),
                tuple(node.output),
                {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute},
            )
            for node in self.model.graph.node
        ]

    def place(self, name: str) -> tuple[Path, int, int] | None:
        """File, offset and size of a constant outside the model; None for one inside."""
        constant = self._constants[name]
        if constant.data_location != onnx.TensorProto.EXTERNAL:
            return None
        keys = {entry.key: entry.value for entry in constant.external_data}
        file = self.path.with_name(keys["location"])
        if Path(keys["location"]).name != keys["location"] or file.is_symlink() or not file.is_file():
            raise BundleError(f"{self.path}: {name}: {keys['location']!r} is no file beside the model")
        offset, size = int(keys["offset"]), int(keys["length"])
        expected = int(np.prod(constant.dims)) * onnx.helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize
        if offset < 0 or size != expected or offset + size > file.stat().st_size:
            raise BundleError(
                f"{self.path}: {name}: {size} bytes at {offset} of {file.name} are not its {expected} bytes"
            )
        return file, offset, size

    def constant(self, name: str) -> npt.NDArray[Any]:
        """The values of a constant; a mapped view if they are outside the model."""
        constant = self._constants[name]
        place = self.place(name)
        if place is None:
            return onnx.numpy_helper.to_array(constant)
        file, offset, _ = place
        dtype = onnx.helper.tensor_dtype_to_np_dtype(constant.data_type)
        return np.memmap(file, dtype, "r", offset, tuple(constant.dims))

    def matrices(self) -> Iterator[WrittenMatrix]:
        """Every quantized matrix, in the order of the operators that read it, once for each.

        An int8 matrix whose scales are equal along every row has one group.
        """
        for node in self.nodes:
            match node.operator:
                case "com.microsoft.MatMulNBits":
                    shape = node.attributes["N"], node.attributes["K"]
                    codes, scales, zero_points = node.inputs[1], node.inputs[2], node.inputs[3:4]
                case "com.microsoft.GatherBlockQuantized":
                    codes, scales, zero_points = node.inputs[0], node.inputs[2], node.inputs[3:4]
                    rows, width = self._constants[codes].dims
                    shape = rows, self._kept(node.outputs[0], width * 8 // node.attributes["bits"])
                case _:
                    continue
            if any(zero_points):
                raise BundleError(f"{self.path}: {node.name}: has zero points, but all schemes are symmetric")
            yield self._matrix(codes, scales, shape, node.attributes["bits"])

    def _kept(self, output: str, width: int) -> int:
        """The columns that a Slice of ``output`` keeps; all of them without one."""
        ends = [node.inputs[2] for node in self.nodes if node.operator == "Slice" and node.inputs[0] == output]
        return int(self.constant(ends[0])[0]) if ends else width

    def _matrix(self, codes: str, scales: str, shape: tuple[int, int], bits: int) -> WrittenMatrix:
        rows, columns = shape
        packed = self.constant(codes).reshape(rows, -1)
        if bits == 4:
            unsigned = np.stack((packed & 0xF, packed >> 4), -1).reshape(rows, -1)
        else:
            unsigned = packed
        zero = 1 << (bits - 1)
        signed = (unsigned.astype(np.int16) - zero).astype(np.int8)
        if signed[:, columns:].any():
            raise BundleError(f"{self.path}: {codes}: codes beyond column {columns} are not zero")
        groups = np.array(self.constant(scales).reshape(rows, -1))
        if bits == 8 and (groups == groups[:, :1]).all():
            groups = groups[:, :1]
        return WrittenMatrix(codes, bits, signed[:, :columns], groups)


def read_weights(folder: Path) -> dict[str, WrittenMatrix]:
    """Every quantized matrix of the artifact in ``folder`` by its initializer, model.onnx's and head.onnx's.

    Raises :class:`BundleError` if the two read one name differently.
    """
    found: dict[str, WrittenMatrix] = {}
    for name in ("model.onnx", "head.onnx"):
        for matrix in OnnxFile(folder / name).matrices():
            known = found.setdefault(matrix.name, matrix)
            if not (np.array_equal(known.codes, matrix.codes) and np.array_equal(known.scales, matrix.scales)):
                raise BundleError(f"{folder / name}: {matrix.name}: not what model.onnx holds under this name")
    return found
