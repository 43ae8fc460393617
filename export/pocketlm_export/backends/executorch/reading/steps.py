"""The instructions of a method as steps: calls of kernels and of delegates, and jumps; what each reads and makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.executorch.importing import ScalarType, schema
from pocketlm_export.backends.executorch.reading.payload import Payload

__all__ = ["DelegateStep", "JumpStep", "KernelStep", "Step", "read_steps"]


@dataclass(frozen=True, slots=True)
class KernelStep:
    """``results = operator(*arguments)``; ``operator`` is ``namespace::name.overload``, the others value indices.

    ``read`` are the arguments, those in lists included.
    """

    operator: str
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    read: tuple[int, ...]

    @property
    def result(self) -> int:
        """The first result."""
        return self.results[0]

    @property
    def made(self) -> tuple[int, ...]:
        """The values that hold something else afterwards."""
        return self.results


@dataclass(frozen=True, slots=True)
class DelegateStep:
    """A call of delegate ``index`` with values in the order of its payload's inputs and outputs."""

    index: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """The values that it reads."""
        return self.inputs

    @property
    def made(self) -> tuple[int, ...]:
        """The values that hold something else afterwards."""
        return self.outputs


@dataclass(frozen=True, slots=True)
class JumpStep:
    """Where value ``condition``, a tensor of bools, is not all true, the next step is ``destination``, a later one."""

    condition: int
    destination: int

    @property
    def read(self) -> tuple[int, ...]:
        """The condition."""
        return (self.condition,)

    @property
    def made(self) -> tuple[int, ...]:
        """Nothing."""
        return ()


Step = KernelStep | DelegateStep | JumpStep


def read_steps(path: Path, plan: schema.ExecutionPlan, delegates: Sequence[Payload]) -> list[Step]:
    """The steps of ``plan``'s only chain. Raises :class:`BundleError` and :class:`UnsupportedError` that begin with
    ``path``."""
    reading = _Reading(path, plan, delegates)
    return [reading.step(number, item.instr_args) for number, item in enumerate(plan.chains[0].instructions)]


@dataclass(frozen=True, slots=True)
class _Reading:
    path: Path
    plan: schema.ExecutionPlan
    delegates: Sequence[Payload]

    def step(self, number: int, call: Any) -> Step:
        plan, where = self.plan, f"{self.path}: instruction {number}"
        if isinstance(call, schema.JumpFalseCall):
            return self._jump(number, call)
        if not isinstance(call, schema.KernelCall | schema.DelegateCall):
            raise UnsupportedError(f"{where} is a {type(call).__name__}")
        if not call.args or any(not 0 <= argument < len(plan.values) for argument in call.args):
            raise BundleError(f"{where}: arguments {call.args} of {len(plan.values)} values")
        if isinstance(call, schema.KernelCall):
            if not 0 <= call.op_index < len(plan.operators):
                raise BundleError(f"{where}: operator {call.op_index} of {len(plan.operators)}")
            return self._kernel(where, plan.operators[call.op_index], call.args)
        if not 0 <= call.delegate_index < len(plan.delegates):
            raise BundleError(f"{where}: delegate {call.delegate_index} of {len(plan.delegates)}")
        payload = self.delegates[call.delegate_index]
        if len(call.args) != len(payload.inputs) + len(payload.outputs):
            raise BundleError(f"{where}: {len(call.args)} arguments of delegate {call.delegate_index}")
        inputs, outputs = (
            tuple(call.args[payload.values[value].external or 0] for value in side)
            for side in (payload.inputs, payload.outputs)
        )
        return DelegateStep(call.delegate_index, inputs, outputs)

    def _kernel(self, where: str, operator: schema.Operator, args: Sequence[int]) -> KernelStep:
        name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        *arguments, returned = args
        value = self.plan.values[returned].val
        results = tuple(value.items) if isinstance(value, schema.TensorList) else (returned,)
        # The out arguments, then the same values as the result.
        if operator.overload.endswith("out") or len(results) > 1:
            arguments, outs = arguments[: -len(results)], tuple(arguments[-len(results) :])
            if outs != results:
                raise BundleError(f"{where}: {name} returns another value than its out argument")
        elif operator.name.endswith("_") and arguments[:1] != list(results):
            raise BundleError(f"{where}: {name} returns another value than it changes")
        read = (item for index in arguments for item in self._listed(index))
        return KernelStep(name, tuple(arguments), results, tuple(read))

    def _listed(self, index: int) -> list[int]:
        """What a list holds; else the value itself."""
        match self.plan.values[index].val:
            case schema.OptionalTensorList() as value:
                return [item for item in value.items if item >= 0]
            case schema.IntList() as value:
                return list(value.items)
            case _:
                return [index]

    def _jump(self, number: int, call: schema.JumpFalseCall) -> JumpStep:
        where, values = f"{self.path}: instruction {number}", self.plan.values
        if not 0 <= call.cond_value_index < len(values):
            raise BundleError(f"{where}: condition {call.cond_value_index} of {len(values)} values")
        condition = values[call.cond_value_index].val
        if not isinstance(condition, schema.Tensor) or condition.scalar_type != ScalarType.BOOL:
            raise UnsupportedError(f"{where}: a jump that is decided by no tensor of bools")
        count = len(self.plan.chains[0].instructions)
        if not number < call.destination_instruction < count:
            raise UnsupportedError(f"{where}: a jump to {call.destination_instruction} of {count}, not forward")
        return JumpStep(call.cond_value_index, call.destination_instruction)
