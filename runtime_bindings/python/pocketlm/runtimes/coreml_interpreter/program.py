"""The MIL program of a package as plain data, checked when it is read.

Everything that can be known without running is refused here: unknown operators, parameters and data types, names
without a definition, blobs out of bounds, declared sizes that can't be.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, UnsupportedError

from .operators import OPERATORS
from .package import ELEMENT_TYPES, MAXIMUM_ELEMENTS, MAXIMUM_RANK, Package, element_type_name
from .tensors import BlockwiseShiftScale, LookupTable, PackedTensor, StoredTensor

__all__ = ["Function", "Operation", "TensorType", "read_function"]

Constant = StoredTensor | str

_STATE_PARAMETERS = {"read_state": {"input"}, "write_state": {"input", "data"}}
_CONSTANT_EXPRESSIONS: dict[str, tuple[set[str], set[str]]] = {  # required and optional parameters
    "constexpr_affine_dequantize": ({"quantized_data", "zero_point", "scale", "axis"}, set()),
    "constexpr_blockwise_shift_scale": ({"data", "scale"}, {"offset"}),
    "constexpr_cast": ({"source_val", "output_dtype"}, set()),
    "constexpr_lut_to_dense": ({"indices", "lut"}, {"vector_axis"}),
}
_VARIADIC_PARAMETER = "values"


@dataclass(frozen=True)
class TensorType:
    """A declared tensor: an element type's name (``"FLOAT16"``) and sizes, None where only a call decides."""

    element: str
    shape: tuple[int | None, ...]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            declared is None or declared == size for declared, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.element} {['?' if size is None else size for size in self.shape]}"


@dataclass(frozen=True)
class Operation:
    """One step. ``inputs``: parameter -> names; ``last_uses``: the names that nothing after it reads.

    ``state`` is the state that read_state and write_state name, and, of a slice_update, the one whose buffer it may
    write into because nobody reads the old content any more.
    """

    type: str
    where: str
    inputs: dict[str, tuple[str, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    state: str | None = None
    last_uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Function:
    """``state_views``: the names whose array may be a state's or a part of it, and of which; ``computed``: those whose
    array is always a new one."""

    inputs: dict[str, TensorType]
    states: dict[str, TensorType]
    outputs: tuple[str, ...]
    constants: dict[str, Constant]
    operations: tuple[Operation, ...]
    state_views: dict[str, tuple[str, ...]]
    computed: frozenset[str]


def read_function(package: Package, name: str) -> Function:
    """One function of the package's program; BundleError or UnsupportedError names file, function and operator."""
    return _Reader(package, name).read()


@dataclass
class _Reader:
    package: Package
    function: str
    inputs: dict[str, TensorType] = field(default_factory=dict)
    states: dict[str, TensorType] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    defined: set[str] = field(default_factory=set)

    def read(self) -> Function:
        message = self.package.model.mlProgram.functions[self.function]
        where = self._where("function", self.function)
        if message.opset not in message.block_specializations:
            raise BundleError(f"{where}: no block for its operator set {message.opset!r}")
        for entry in message.inputs:
            kind = entry.type.WhichOneof("type")
            place = self._where("input", entry.name)
            self._define(entry.name, place)
            if kind == "stateType":
                self.states[entry.name] = self._tensor_type(entry.type.stateType.wrappedType, place)
                if None in self.states[entry.name].shape:
                    raise BundleError(f"{place}: a state of unknown size")
            else:
                self.inputs[entry.name] = self._tensor_type(entry.type, place)
        block = message.block_specializations[message.opset]
        operations = []
        for position, operation in enumerate(block.operations):
            read = self._operation(operation, position)
            if read is not None:
                operations.append(read)
        outputs = tuple(block.outputs)
        for output in outputs:
            if output not in self.defined or output in self.states or isinstance(self.constants.get(output), str):
                raise BundleError(f"{where}: output {output!r} is not a tensor of the program")
        planned, views = _plan_state_updates(tuple(operations), outputs)
        planned = _with_last_uses(planned, outputs)
        return Function(self.inputs, self.states, outputs, self.constants, planned, views, _computed(planned))

    def _operation(self, message: Any, position: int) -> Operation | None:
        """None for what is a constant, which becomes an entry of ``constants``."""
        kind = str(message.type)
        label = message.outputs[0].name if message.outputs else f"number {position}"
        where = self._where(kind, label)
        if message.blocks:
            raise UnsupportedError(f"{where}: operators with blocks of their own are not supported")
        if kind == "const":
            self._define_constant(message, where, lambda: self._value(message.attributes["val"], where))
            return None
        if kind in _CONSTANT_EXPRESSIONS:
            self._define_constant(message, where, lambda: self._constant_expression(message, kind, where))
            return None
        if kind in _STATE_PARAMETERS:
            known = required = frozenset(_STATE_PARAMETERS[kind])
        elif kind in OPERATORS:
            known, required = OPERATORS[kind].known, OPERATORS[kind].required
        else:
            raise UnsupportedError(
                f"{where}: operator {kind if kind.isidentifier() else repr(kind)} is not one that the interpreter knows"
            )
        self._check_parameters(set(message.inputs), set(required), set(known), where)
        unknown = set(message.attributes) - {"name"}
        if unknown:
            raise UnsupportedError(f"{where}: attribute {min(unknown)!r} is not supported")
        inputs = {parameter: self._argument(message, parameter, where) for parameter in sorted(message.inputs)}
        state = self._state_of(kind, inputs, where)
        outputs = tuple((entry.name, self._tensor_type(entry.type, where)) for entry in message.outputs)
        for name, _ in outputs:
            self._define(name, where)
        if len(outputs) != 1 and kind not in {"split", "topk", "write_state"}:
            raise BundleError(f"{where}: {len(outputs)} outputs")
        return Operation(kind, where, inputs, outputs, state)

    def _state_of(self, kind: str, inputs: dict[str, tuple[str, ...]], where: str) -> str | None:
        state = inputs.pop("input")[0] if kind in _STATE_PARAMETERS else None
        if state is not None and state not in self.states:
            raise BundleError(f"{where}: {state!r} is not a state")
        for parameter, names in inputs.items():
            if any(name in self.states for name in names):
                raise BundleError(f"{where}: parameter {parameter!r} is a state, not a tensor")
        return state

    def _argument(self, message: Any, parameter: str, where: str) -> tuple[str, ...]:
        bindings = message.inputs[parameter].arguments
        if len(bindings) != 1 and (parameter != _VARIADIC_PARAMETER or not bindings):
            raise BundleError(f"{where}: parameter {parameter!r} has {len(bindings)} arguments")
        names = []
        for number, binding in enumerate(bindings):
            name = str(binding.name)
            if binding.WhichOneof("binding") == "value":
                name = f"{where} {parameter} {number}"
                self._define(name, where)
                self.constants[name] = self._value(binding.value, where)
            elif name not in self.defined:
                raise BundleError(f"{where}: parameter {parameter!r} reads {name!r}, which nothing before it defines")
            names.append(name)
        return tuple(names)

    def _define_constant(self, message: Any, where: str, make: Callable[[], Constant]) -> None:
        if len(message.outputs) != 1:
            raise BundleError(f"{where}: {len(message.outputs)} outputs")
        name = message.outputs[0].name
        constant = make()
        if isinstance(constant, StoredTensor):
            declared = self._tensor_type(message.outputs[0].type, where)
            if declared.element != constant.element or not declared.accepts(constant.shape):
                raise BundleError(f"{where}: holds {constant.element} {list(constant.shape)}, declared {declared}")
        self._define(name, where)
        self.constants[name] = constant

    def _constant_expression(self, message: Any, kind: str, where: str) -> StoredTensor:
        required, optional = _CONSTANT_EXPRESSIONS[kind]
        attributes = set(message.attributes) - {"name"}  # where the forms before iOS 18 keep their parameters
        self._check_parameters(set(message.inputs) | attributes, required, required | optional, where)
        values: dict[str, Constant] = {name: self._value(message.attributes[name], where) for name in attributes}
        for parameter in message.inputs:
            name = self._argument(message, parameter, where)[0]
            if name not in self.constants:
                raise BundleError(f"{where}: parameter {parameter!r} is not a constant")
            values[parameter] = self.constants[name]
        element = self._tensor_type(message.outputs[0].type, where).element
        tensors = {name: value for name, value in values.items() if isinstance(value, StoredTensor)}
        try:
            return _build_expression(kind, tensors, element)
        except (ValueError, KeyError) as error:
            raise BundleError(f"{where}: {error}") from error

    def _value(self, message: Any, where: str) -> Constant:
        """A constant of the file; BundleError where the bytes don't fill the declared shape exactly."""
        if message.type.WhichOneof("type") != "tensorType":
            raise UnsupportedError(f"{where}: a constant that is no tensor is not supported")
        immediate = message.immediateValue.tensor
        if message.WhichOneof("value") == "immediateValue" and immediate.WhichOneof("value") == "strings":
            if message.type.tensorType.dimensions or len(immediate.strings.values) != 1:
                raise UnsupportedError(f"{where}: a list of strings is not supported")
            return str(immediate.strings.values[0])
        declared = self._tensor_type(message.type, where)
        if None in declared.shape:
            raise BundleError(f"{where}: a constant of unknown size")
        shape = tuple(size for size in declared.shape if size is not None)
        if message.WhichOneof("value") == "blobFileValue":
            blob = message.blobFileValue
            data = self.package.blob(blob.fileName, blob.offset, declared.element, shape, where)
            return PackedTensor(data, declared.element, shape, (blob.fileName, blob.offset, declared.element, shape))
        if message.WhichOneof("value") != "immediateValue":
            raise BundleError(f"{where}: a constant without a value")
        data = _immediate_bytes(immediate, declared.element, math.prod(shape), where)
        return PackedTensor(data, declared.element, shape, (declared.element, shape, data.tobytes()))

    def _tensor_type(self, message: Any, where: str) -> TensorType:
        if message.WhichOneof("type") != "tensorType":
            raise UnsupportedError(f"{where}: type {message.WhichOneof('type')} is not supported; only tensors are")
        tensor = message.tensorType
        element = element_type_name(tensor.dataType, where)
        sizes = []
        for dimension in tensor.dimensions:
            fixed = dimension.WhichOneof("dimension") == "constant"
            if not fixed and dimension.unknown.variadic:
                raise UnsupportedError(f"{where}: a tensor of unknown rank is not supported")
            sizes.append(int(dimension.constant.size) if fixed else None)
        known = [size for size in sizes if size is not None]
        if math.prod(known) > MAXIMUM_ELEMENTS or max(known, default=0) > MAXIMUM_ELEMENTS or len(sizes) > MAXIMUM_RANK:
            raise BundleError(f"{where}: a tensor of shape {str(sizes)[:200]}")
        return TensorType(element, tuple(sizes))

    def _define(self, name: str, where: str) -> None:
        if not name or name in self.defined:
            raise BundleError(f"{where}: the name {name!r} is empty or defined twice")
        self.defined.add(name)

    def _check_parameters(self, given: set[str], required: set[str], known: set[str], where: str) -> None:
        if given - known:
            listing = ", ".join(sorted(known))
            raise UnsupportedError(f"{where}: parameter {min(given - known)!r} is not supported; supported: {listing}")
        if required - given:
            raise BundleError(f"{where}: parameter {min(required - given)!r} is missing")

    def _where(self, kind: str, name: str) -> str:
        function, kind = (text if text.isidentifier() else repr(text) for text in (self.function, kind))
        return f"{self.package.model_file}: {function}: {kind} {name!r}"


def _build_expression(kind: str, values: dict[str, StoredTensor], element: str) -> StoredTensor:
    identity = (kind, element, *((name, values[name].identity) for name in sorted(values)))
    if kind == "constexpr_blockwise_shift_scale":
        return BlockwiseShiftScale(values["data"], values["scale"], values.get("offset"), element, identity)
    if kind == "constexpr_lut_to_dense":
        vector_axis = _scalar(values["vector_axis"]) if "vector_axis" in values else None
        return LookupTable(values["indices"], values["lut"], vector_axis, element, identity)
    if kind == "constexpr_cast":
        source = values["source_val"]
        if (source.element, element) != ("FLOAT16", "FLOAT32"):
            raise ValueError(f"a cast from {source.element} to {element}")
        one = PackedTensor(np.ones((), "<f4").reshape(1).view(np.uint8), "FLOAT32", (1,) * len(source.shape), "one")
        return BlockwiseShiftScale(source, one, None, element, identity)
    data, axis = values["quantized_data"], _scalar(values["axis"])
    rank = len(data.shape)
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of a tensor of rank {rank}")
    scale, zero_point = (_along_axis(values[name], rank, axis % rank) for name in ("scale", "zero_point"))
    return BlockwiseShiftScale(data, scale, zero_point, element, identity)


def _along_axis(tensor: StoredTensor, rank: int, axis: int) -> StoredTensor:
    if not isinstance(tensor, PackedTensor) or len(tensor.shape) > 1:
        raise ValueError(f"scale or zero_point of shape {list(tensor.shape)}")
    return tensor.reshaped(tuple(tensor.shape[0] if tensor.shape and i == axis else 1 for i in range(rank)))


def _scalar(tensor: StoredTensor) -> int:
    if not isinstance(tensor, PackedTensor) or tensor.shape or ELEMENT_TYPES[tensor.element].is_float:
        raise ValueError(f"{tensor.element} {list(tensor.shape)}, where an integer is needed")
    return tensor.scalar()


def _immediate_bytes(message: Any, element: str, count: int, where: str) -> NDArray[np.uint8]:
    kind = ELEMENT_TYPES[element]
    field_name = message.WhichOneof("value")
    if field_name == "bytes":
        data = np.frombuffer(message.bytes.values, np.uint8)
    elif field_name in {"floats", "ints", "bools", "longInts", "doubles"}:
        values = np.array(getattr(message, field_name).values)
        stored = values.astype(kind.storage)
        if not np.array_equal(stored, values, equal_nan=values.dtype.kind == "f"):
            raise BundleError(f"{where}: an immediate value beyond {element}")
        data = stored.view(np.uint8)
    elif field_name is None and not count:
        data = np.empty(0, np.uint8)
    else:
        raise UnsupportedError(f"{where}: an immediate value of {field_name} is not supported")
    if data.size != -(-count * kind.bits // 8):
        raise BundleError(f"{where}: {data.size} bytes for {count} elements of {element}")
    return data


def _plan_state_updates(
    operations: tuple[Operation, ...], outputs: Iterable[str]
) -> tuple[tuple[Operation, ...], dict[str, tuple[str, ...]]]:
    """Marks each slice_update whose result goes back into the state that it was read from, and nowhere else.

    Such an update may be written into the state's buffer, unless some later step still reads the old content: the
    value of a read_state or a view of one. Beside the operations: each such name, and the states that it may show.
    """
    uses = _use_positions(operations, outputs)
    shares: defaultdict[str, set[str]] = defaultdict(set)  # state -> names that may share its buffer
    planned = list(operations)
    for position, operation in enumerate(operations):
        if operation.type == "read_state" and operation.state is not None:
            shares[operation.state].add(operation.outputs[0][0])
        if operation.type == "slice_update":
            state = _updated_state(operations, position, uses, shares)
            if state is not None:
                planned[position] = Operation(
                    operation.type, operation.where, operation.inputs, operation.outputs, state
                )
        row = OPERATORS.get(operation.type)
        if row is not None and row.may_view:
            read = {name for names in operation.inputs.values() for name in names}
            for names in shares.values():
                if names & read:
                    names.update(name for name, _ in operation.outputs)
    views: dict[str, tuple[str, ...]] = {}
    for state, names in shares.items():
        for name in names:
            views[name] = (*views.get(name, ()), state)
    return tuple(planned), views


def _computed(operations: tuple[Operation, ...]) -> frozenset[str]:
    rows = ((OPERATORS.get(operation.type), operation) for operation in operations)
    return frozenset(
        name
        for row, operation in rows
        if row is not None and row.computes and not row.may_view
        for name, _ in operation.outputs
    )


def _updated_state(
    operations: tuple[Operation, ...], position: int, uses: dict[str, list[int]], shares: dict[str, set[str]]
) -> str | None:
    updated = operations[position].outputs[0][0]
    if len(uses[updated]) != 1 or uses[updated][0] >= len(operations):
        return None
    write_position = uses[updated][0]
    write = operations[write_position]
    state = write.state
    if write.type != "write_state" or state is None or operations[position].inputs["x"][0] not in shares[state]:
        return None
    between = operations[position + 1 : write_position]
    if any(other.state == state for other in between):
        return None
    still_read = any(use > position for name in shares[state] for use in uses[name])
    return None if still_read else state


def _use_positions(operations: tuple[Operation, ...], outputs: Iterable[str]) -> dict[str, list[int]]:
    """Name -> positions of the operations that read it; a result of the function counts as one past the last."""
    uses: dict[str, list[int]] = defaultdict(list)
    for position, operation in enumerate(operations):
        for names in operation.inputs.values():
            for name in names:
                uses[name].append(position)
    for name in outputs:
        uses[name].append(len(operations))
    return uses


def _with_last_uses(operations: tuple[Operation, ...], outputs: Iterable[str]) -> tuple[Operation, ...]:
    uses = _use_positions(operations, outputs)
    ends: dict[int, list[str]] = defaultdict(list)
    for position, operation in enumerate(operations):
        for name, _ in operation.outputs:
            ends[max(uses.get(name, [position]))].append(name)
    return tuple(
        Operation(o.type, o.where, o.inputs, o.outputs, o.state, tuple(ends[position]))
        for position, o in enumerate(operations)
    )
