"""One written ``.onnx`` file by ONNX's own schema: its operators, and its constants as they lie in the data file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google.protobuf.message  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import onnx

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.selection import RowSelection, selected

__all__ = ["ATTENTIONS", "MICROSOFT", "OnnxFile", "WrittenNode"]

MICROSOFT = "com.microsoft."
ATTENTIONS = (f"{MICROSOFT}GroupQueryAttention", f"{MICROSOFT}SparseAttention")
# The versions of the operators' documentation that reading and execution follow.
OPSETS = {"": 23, "com.microsoft": 1}


@dataclass(frozen=True, slots=True)
class WrittenNode:
    """An operator with the names of its inputs ("": left out) and outputs, and its attributes as Python values."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def input(self, index: int) -> str:
        """The name of an input; "" if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


class OnnxFile:
    """One ``.onnx`` file; constants are mapped from the data file when they are asked for.

    Raises :class:`BundleError` naming the file and the constant for what can't be read or lies outside the data file,
    and :class:`UnsupportedError` for parts of ONNX whose meaning is not read: functions, sparse constants, opsets.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except (google.protobuf.message.DecodeError, OSError) as error:
            raise BundleError(f"{path}: not an ONNX model: {error}") from error
        opsets = {opset.domain: opset.version for opset in self.model.opset_import}
        if opsets != OPSETS:
            raise UnsupportedError(f"{path}: opset_import: {opsets} is not supported; supported: {OPSETS}")
        if self.model.functions or self.model.graph.sparse_initializer:
            raise UnsupportedError(f"{path}: functions and sparse constants are not supported")
        self._constants = {constant.name: constant for constant in self.model.graph.initializer}
        self.nodes = [self._written(node) for node in self.model.graph.node]
        """The operators, in the order of the file."""
        self._check_names()

    @property
    def constants(self) -> list[str]:
        """The names of all initializers."""
        return list(self._constants)

    @property
    def constant_bytes(self) -> int:
        """Of all constants outside the model."""
        places = {self.place(name) for name in self._constants}
        return sum(place[2] for place in places if place is not None)

    @property
    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """The shapes of the graph's inputs; a string stands for a size that a call decides."""
        return {value.name: _shape(value) for value in self.model.graph.input}

    @property
    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """The shapes of the graph's outputs."""
        return {value.name: _shape(value) for value in self.model.graph.output}

    def place(self, name: str) -> tuple[Path, int, int] | None:
        """File, offset and size of a constant outside the model; None for one inside."""
        constant = self._tensor(name)
        if constant.data_location != onnx.TensorProto.EXTERNAL:
            return None
        keys = {entry.key: entry.value for entry in constant.external_data}
        location = keys.get("location")
        # protobuf gives bytes where a string is no UTF-8
        if not isinstance(location, str) or not location or Path(location).name != location:
            raise BundleError(f"{self.path}: {name}: {location!r} is no file beside the model")
        file = self.path.with_name(location)
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{self.path}: {name}: {location!r} is no file beside the model")
        try:
            offset, size = int(keys["offset"]), int(keys["length"])
            expected = math.prod(constant.dims) * self._dtype(constant).itemsize
        except (KeyError, ValueError) as error:
            raise BundleError(f"{self.path}: {name}: its place in {location!r} can't be read: {error}") from error
        if offset < 0 or size != expected or offset + size > file.stat().st_size:
            raise BundleError(
                f"{self.path}: {name}: {size} bytes at {offset} of {file.name} are not its {expected} bytes"
            )
        return file, offset, size

    def constant(self, name: str) -> npt.NDArray[Any]:
        """The values of a constant; a mapped view if they are outside the model."""
        constant = self._tensor(name)
        place = self.place(name)
        try:
            if place is None:
                return onnx.numpy_helper.to_array(constant)
            file, offset, _ = place
            return np.memmap(file, self._dtype(constant), "r", offset, tuple(constant.dims))
        except (TypeError, ValueError) as error:
            raise BundleError(f"{self.path}: {name}: {error}") from error

    def entry(self, name: str) -> tuple[str, RowSelection | None]:
        """The constant that an entry of the manifest's places is in, and which of its rows, where several weights' take
        turns."""
        return (name, None) if name in self._constants else selected(name)

    def last_size(self, value: str) -> int | None:
        """The last axis of an input or an output of the graph; None if it has none, or no fixed one."""
        shape = {**self.inputs, **self.outputs}.get(value)
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    def maker(self, value: str) -> WrittenNode | None:
        """The operator that makes ``value``; None for an input or a constant of the graph."""
        return self._makers.get(value)

    def _written(self, node: onnx.NodeProto) -> WrittenNode:
        try:
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        except ValueError as error:
            raise BundleError(f"{self.path}: {node.name}: {error}") from error
        if not node.output or None in attributes.values():
            raise BundleError(f"{self.path}: {node.name}: has no output, or an attribute without a value")
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        return WrittenNode(node.name, operator, tuple(node.input), tuple(node.output), attributes)

    def _tensor(self, name: str) -> onnx.TensorProto:
        if name not in self._constants:
            raise BundleError(f"{self.path}: has no constant {name!r}")
        return self._constants[name]

    def _dtype(self, constant: onnx.TensorProto) -> np.dtype[Any]:
        try:
            return onnx.helper.tensor_dtype_to_np_dtype(constant.data_type)
        except KeyError as error:
            raise BundleError(f"{self.path}: {constant.name}: unknown type {constant.data_type}") from error

    def _check_names(self) -> None:
        """Every name is given once, as an input, a constant or an output of one operator, and before it is read."""
        given = [*self.inputs, *(constant.name for constant in self.model.graph.initializer)]
        given += [output for node in self.nodes for output in node.outputs if output]
        if len(given) != len(set(given)):
            twice = next(name for name in given if given.count(name) > 1)
            raise BundleError(f"{self.path}: {twice}: given more than once")
        known = {*self.inputs, *self._constants, ""}
        for node in self.nodes:
            unmade = next((name for name in node.inputs if name not in known), None)
            if unmade is not None:
                raise BundleError(f"{self.path}: {node.name}: reads {unmade!r}, which nothing before it makes")
            known.update(node.outputs)
        self._makers = {output: node for node in self.nodes for output in node.outputs if output}


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dimensions = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dimensions)
