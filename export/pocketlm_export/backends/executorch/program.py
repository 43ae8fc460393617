"""Builds one method of an ExecuTorch program in the wheel's schema dataclasses: values, instructions, memory plan."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pocketlm_export.backends.executorch.importing import ScalarType, schema
from pocketlm_export.backends.executorch.memory import ALIGNMENT, Lifetime, plan_arena
from pocketlm_export.backends.executorch.packing import Piece
from pocketlm_export.backends.executorch.xnnpack import XnnpackGraph

__all__ = ["MethodBuilder", "constant_method"]

ARENA, CACHES = 1, 2  # memory 0 is the schema's own
ITEM_BYTES = {ScalarType.FLOAT: 4, ScalarType.LONG: 8, ScalarType.BOOL: 1}

LEAF = '{"type": null, "context": null, "children_spec": []}'
Shape = tuple[int, ...]
Scalar = bool | int | float | None


class MethodBuilder:
    """Values are indices into the method's table; shapes are upper bounds of what a call makes of them."""

    def __init__(self) -> None:
        self.constants: list[Piece] = []
        self.delegates: dict[XnnpackGraph, int] = {}
        self._values: list[schema.EValue] = []
        self._scalars: dict[tuple[type, Scalar], int] = {}
        self._lists: dict[int, tuple[int, ...]] = {}
        self._operators: dict[tuple[str, str], int] = {}
        self._instructions: list[schema.Instruction] = []
        self._inputs: list[int] = []
        self._activations: list[int] = []
        self._cache_bytes = 0

    def scalar(self, value: Scalar) -> int:
        """A constant argument of a kernel."""
        key = (type(value), value)
        if key not in self._scalars:
            self._scalars[key] = self._add(_scalar(value))
        return self._scalars[key]

    def integers(self, *values: int) -> int:
        """A list of integers as an argument of a kernel."""
        items = [self.scalar(value) for value in values]
        return self._add_list(schema.IntList(items), items)

    def optional_tensors(self, *tensors: int | None) -> int:
        """A list of tensors, or None in their places, as an argument of a kernel."""
        given = [tensor for tensor in tensors if tensor is not None]
        items = [-1 if tensor is None else tensor for tensor in tensors]
        return self._add_list(schema.OptionalTensorList(items), given)

    def integer(self) -> int:
        """An integer that a kernel computes."""
        return self._add(schema.Int(0))

    def input(self, dtype: ScalarType, shape: Shape, *, static: bool = False) -> int:
        """An argument of the method, in memory of the caller."""
        self._inputs.append(self._add(_tensor(dtype, shape, static=static)))
        return self._inputs[-1]

    def activation(self, shape: Shape, dtype: ScalarType = ScalarType.FLOAT) -> int:
        """A tensor in the arena."""
        self._activations.append(self._add(_tensor(dtype, shape)))
        return self._activations[-1]

    def cache(self, shape: Shape) -> int:
        """A float32 tensor that keeps its content from call to call."""
        tensor = _tensor(ScalarType.FLOAT, shape, static=True)
        tensor.allocation_info = _allocation(CACHES, self._cache_bytes)
        self._cache_bytes += -(-4 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
        return self._add(tensor)

    def constant(self, shape: Shape, dtype: ScalarType, piece: Piece) -> int:
        """A tensor whose bytes are in the file. :meth:`buffer_index` tells where."""
        self.constants.append(piece)
        return self._add(_tensor(dtype, shape, static=True, buffer=len(self.constants)))

    def buffer_index(self, constant: int) -> int:
        """The constant's index among the constants of the program, from 1."""
        index: int = self._values[constant].val.data_buffer_idx
        return index

    def kernel(self, operator: str, arguments: Sequence[int], *results: int) -> int:
        """Call ``namespace::name.overload``; ``results`` are its out arguments, or its value if it has none: an integer
        or, where the name ends in ``_``, the argument that it changes. Returns the first."""
        name, _, overload = operator.partition(".")
        index = self._operators.setdefault((name, overload), len(self._operators))
        returned = results[0] if len(results) == 1 else self._add_list(schema.TensorList(list(results)), results)
        outs = results if overload.endswith("out") or len(results) > 1 else ()
        call = schema.KernelCall(op_index=index, args=[*arguments, *outs, returned])
        self._instructions.append(schema.Instruction(call))
        return results[0]

    def delegate(self, graph: XnnpackGraph, arguments: Sequence[int]) -> None:
        """Call a delegate with its inputs, then its outputs; a graph that is called again is one delegate."""
        index = self.delegates.setdefault(graph, len(self.delegates))
        self._instructions.append(schema.Instruction(schema.DelegateCall(delegate_index=index, args=list(arguments))))

    @contextmanager
    def only_if(self, flag: int) -> Iterator[None]:
        """What is called inside is jumped over unless ``flag``, a tensor of one bool, is true. Its activations have the
        arena's bytes between their first and last use, as everywhere: jumps only lead forward."""
        jump = schema.JumpFalseCall(cond_value_index=flag, destination_instruction=0)
        self._instructions.append(schema.Instruction(jump))
        yield
        jump.destination_instruction = len(self._instructions)

    def finish(self, name: str, output: int, delegate_segments: Sequence[int]) -> schema.ExecutionPlan:
        """The method with its memory planned."""
        arena = self._plan_memory(output)
        inputs = ", ".join([LEAF] * len(self._inputs))
        arguments = f'{{"type": "builtins.tuple", "context": "null", "children_spec": [{inputs}]}}'
        keywords = '{"type": "builtins.dict", "context": "[]", "children_spec": []}'
        call = f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{arguments}, {keywords}]}}]'
        return schema.ExecutionPlan(
            name=name,
            container_meta_type=schema.ContainerMetadata(call, f"[1, {LEAF}]"),
            values=self._values,
            inputs=self._inputs,
            outputs=[output],
            chains=[schema.Chain(inputs=[], outputs=[], instructions=self._instructions, stacktrace=None)],
            operators=[schema.Operator(*names) for names in self._operators],
            delegates=[
                schema.BackendDelegate(
                    "XnnpackBackend", schema.BackendDelegateDataReference(schema.DataLocation.SEGMENT, segment), []
                )
                for segment in delegate_segments
            ],
            non_const_buffer_sizes=[0, arena, self._cache_bytes],
        )

    def _plan_memory(self, output: int) -> int:
        uses: dict[int, list[int]] = {index: [] for index in self._activations}
        for position, instruction in enumerate(self._instructions):
            for value in self._used_by(instruction.instr_args):
                if value in uses:
                    uses[value].append(position)
        uses[output].append(len(self._instructions))
        lifetimes = []
        for index in self._activations:
            tensor = self._values[index].val
            size = max(1, math.prod(tensor.sizes)) * ITEM_BYTES[tensor.scalar_type]
            lifetimes.append(Lifetime(size, min(uses[index]), max(uses[index])))
        offsets, arena = plan_arena(lifetimes)
        for index, offset in zip(self._activations, offsets, strict=True):
            self._values[index].val.allocation_info = _allocation(ARENA, offset)
        return arena

    def _used_by(self, call: schema.InstructionArguments) -> Iterator[int]:
        if isinstance(call, schema.JumpFalseCall):
            yield call.cond_value_index
            return
        for argument in call.args:
            yield from self._lists.get(argument, (argument,))

    def _add_list(self, value: schema.KernelTypes, items: Sequence[int]) -> int:
        index = self._add(value)
        self._lists[index] = tuple(items)
        return index

    def _add(self, value: schema.KernelTypes) -> int:
        self._values.append(schema.EValue(value))
        return len(self._values) - 1


def constant_method(name: str, values: bool | int | Sequence[int]) -> schema.ExecutionPlan:
    """A method that returns a constant, or several: how the official runner reads a program's facts."""
    items = [values] if isinstance(values, int) else list(values)
    leaves = ", ".join([LEAF] * len(items))
    returned = f'{{"type": "builtins.list", "context": "null", "children_spec": [{leaves}]}}'
    if isinstance(values, int):
        returned = LEAF
    return schema.ExecutionPlan(
        name=name,
        container_meta_type=schema.ContainerMetadata("", f"[1, {returned}]"),
        values=[schema.EValue(_scalar(item)) for item in items],
        inputs=[],
        outputs=list(range(len(items))),
        chains=[schema.Chain(inputs=[], outputs=[], instructions=[], stacktrace=None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )


def _scalar(value: Scalar) -> schema.KernelTypes:
    if value is None:
        return schema.Null()
    if isinstance(value, bool):
        return schema.Bool(value)
    return schema.Int(value) if isinstance(value, int) else schema.Double(value)


def _allocation(memory: int, offset: int) -> schema.AllocationDetails:
    low, high = offset & 0xFFFFFFFF, offset >> 32
    return schema.AllocationDetails(memory_id=memory, memory_offset_low=low, memory_offset_high=high)


def _tensor(dtype: ScalarType, shape: Shape, *, static: bool = False, buffer: int = 0) -> schema.Tensor:
    dynamism = schema.TensorShapeDynamism.STATIC if static or not shape else schema.TensorShapeDynamism.DYNAMIC_BOUND
    return schema.Tensor(
        scalar_type=dtype, storage_offset=0, sizes=list(shape), dim_order=list(range(len(shape))), requires_grad=False,
        layout=0, data_buffer_idx=buffer, allocation_info=None, shape_dynamism=dynamism,
    )  # fmt: skip
