"""What a written package holds, by the message and blob formats alone; shares nothing with the writer.

Integers and scales come in the weight store's convention, so that they can be compared with it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError
from pocketlm.runtimes.coreml_interpreter.package import ELEMENT_TYPES, Package, element_type_name, unpack_bits
from pocketlm_export.backends.reading import WrittenMatrix

__all__ = ["WrittenOperator", "WrittenPackage"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class WrittenOperator:
    """An operator of a function. ``inputs`` holds names, ``attributes`` the first value of each input that the message
    states itself, numbers and words."""

    kind: str
    inputs: Mapping[str, tuple[str, ...]]
    attributes: Mapping[str, Array | str]
    outputs: tuple[str, ...]


class WrittenPackage:
    """One ``.mlpackage``; what is large is mapped and decoded when it is asked for.

    Raises :class:`BundleError` naming file, function and constant for what is malformed or differs between functions.
    """

    def __init__(self, path: Path) -> None:
        self._package = Package(path)
        self._functions: Mapping[str, Any] = {
            name: function.block_specializations[function.opset]
            for name, function in sorted(self._package.model.mlProgram.functions.items())
        }
        self._values: dict[str, Any] = {}
        self._quantized: dict[str, tuple[Any, Any]] = {}
        for function, block in self._functions.items():
            for operation in block.operations:
                self._index(function, operation)

    @property
    def file(self) -> Path:
        """The message's, which errors name."""
        return self._package.model_file

    @property
    def functions(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(self._functions)

    @property
    def names(self) -> tuple[str, ...]:
        """The unquantized constants that lie in weight.bin: matrices, vectors and tables."""
        return tuple(self._values)

    @property
    def quantized(self) -> tuple[str, ...]:
        """The quantized matrices."""
        return tuple(self._quantized)

    def release(self) -> None:
        """Let the kernel drop the mapped pages: resident memory counts them."""
        self._package.release()

    def constant(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """The stored values of rows ``start..stop``, in their own type."""
        return self._rows(self._values[name], name, start, stop)

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> WrittenMatrix:
        """Rows ``start..stop`` of a quantized matrix."""
        data, scales = self._quantized[name]
        bits = ELEMENT_TYPES[self._element(data, name)].bits
        if _shape(scales)[:1] != _shape(data)[:1]:
            raise BundleError(f"{self.file}: {name}: codes {_shape(data)} and scales {_shape(scales)}, not one by row")
        wide = self._rows(scales, name, start, stop).astype(np.float32)
        return WrittenMatrix(name, bits, self._rows(data, name, start, stop), wide)

    def row_count(self, name: str) -> int:
        """The first axis of a constant or a quantized matrix. Raises :class:`BundleError` if there is none."""
        if name not in self._quantized and name not in self._values:
            raise BundleError(f"{self.file}: {name}: no such constant")
        shape = _shape(self._quantized[name][0] if name in self._quantized else self._values[name])
        return shape[0] if shape else 1

    def output_shape(self, function: str, name: str) -> tuple[int | None, ...]:
        """The declared shape of what an operator of ``function`` makes; None where a call decides."""
        for operation in self._functions[function].operations:
            for output in operation.outputs:
                if output.name == name:
                    dimensions = output.type.tensorType.dimensions
                    return tuple(int(d.constant.size) if d.HasField("constant") else None for d in dimensions)
        raise BundleError(f"{self.file}: {function}: nothing makes {name!r}")

    def operators(self, function: str) -> Iterator[WrittenOperator]:
        """The operators of ``function`` in the order of the file, constants left out."""
        small: dict[str, Array | str] = {}
        for operation in self._functions[function].operations:
            outputs = tuple(output.name for output in operation.outputs)
            if operation.type == "const":
                value = operation.attributes["val"]
                if value.WhichOneof("value") == "immediateValue":
                    small[outputs[0]] = self._immediate(value, outputs[0])
            elif not operation.type.startswith("constexpr_"):
                inputs = {key: tuple(binding.name for binding in a.arguments) for key, a in operation.inputs.items()}
                attributes = {key: small[names[0]] for key, names in inputs.items() if names[0] in small}
                yield WrittenOperator(operation.type, inputs, attributes, outputs)

    def _index(self, function: str, operation: Any) -> None:
        """Note where the constant of ``operation`` lies, and that no other function says otherwise."""
        where = f"{self._package.model_file}: {function}"
        if operation.type == "const" and operation.attributes["val"].WhichOneof("value") == "blobFileValue":
            name, value = operation.outputs[0].name, operation.attributes["val"]
            known, found = self._values.setdefault(name, value), value
        elif operation.type == "constexpr_blockwise_shift_scale":
            name, parameters = operation.outputs[0].name, {k: v.arguments[0].value for k, v in operation.inputs.items()}
            if set(parameters) != {"data", "scale"}:
                raise BundleError(f"{where}: {name}: has {sorted(parameters)}, but all schemes are symmetric")
            found = parameters["data"], parameters["scale"]
            known = self._quantized.setdefault(name, found)
        elif operation.type.startswith("constexpr_"):
            raise BundleError(f"{where}: {operation.outputs[0].name}: {operation.type}, which no scheme is stored as")
        else:
            return
        if known != found:
            raise BundleError(f"{where}: {name}: not what another function holds under this name")

    def _element(self, value: Any, name: str) -> str:
        return element_type_name(value.type.tensorType.dataType, f"{self._package.model_file}: {name}")

    def _rows(self, value: Any, name: str, start: int, stop: int | None) -> Array:
        element, shape = self._element(value, name), _shape(value)
        where = f"{self._package.model_file}: {name}"
        if value.WhichOneof("value") != "blobFileValue":
            raise BundleError(f"{where}: does not lie in a weight file")
        data = self._package.blob(value.blobFileValue.fileName, value.blobFileValue.offset, element, shape, where)
        width = math.prod(shape[1:])
        row_bits = width * ELEMENT_TYPES[element].bits
        if row_bits % 8:
            raise BundleError(f"{where}: {element} {list(shape)}: rows that end inside a byte")
        first, end, _ = slice(start, stop).indices(shape[0])
        content = data[first * row_bits // 8 : end * row_bits // 8]
        return unpack_bits(content, (end - first) * width, ELEMENT_TYPES[element]).reshape(end - first, *shape[1:])

    def _immediate(self, value: Any, name: str) -> Array | str:
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind == "strings":
            return str(tensor.strings.values[0])
        dtype, shape = ELEMENT_TYPES[self._element(value, name)].storage, _shape(value)
        if kind == "bytes":
            return np.frombuffer(tensor.bytes.values, dtype).reshape(shape)
        return np.array(getattr(tensor, kind).values, dtype).reshape(shape)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(dimension.constant.size) for dimension in value.type.tensorType.dimensions)
