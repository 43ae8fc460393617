"""One call of one function: the operations in order, on arrays."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, CheckError

from .movement import write_slice
from .operators import OPERATORS
from .program import Function, Operation
from .tensors import Precision, WeightCache, WeightReader

__all__ = ["Call", "Settings"]

Array = NDArray[Any]
_OPERATOR_ERRORS = (ArithmeticError, IndexError, MemoryError, TypeError, ValueError)


@dataclass(frozen=True)
class Settings:
    """What all calls of an interpreter share."""

    precision: Precision
    cache: WeightCache
    allow_infinite_masks: bool


@dataclass(frozen=True)
class Call:
    """``values`` begins as the inputs, as held; ``state`` and ``magnitudes`` are the caller's and are updated."""

    program: Function
    values: dict[str, Array]
    state: dict[str, Array]
    settings: Settings
    magnitudes: dict[str, float]

    def run(self) -> dict[str, Array]:
        """The function's results, copied: what a later call writes doesn't reach them."""
        with np.errstate(all="ignore"):
            for operation in self.program.operations:
                self._execute(operation)
                for finished in operation.last_uses:
                    del self.values[finished]
        return {name: np.array(self._value(name)) for name in self.program.outputs}

    def _execute(self, operation: Operation) -> None:
        if operation.type == "read_state":
            self.values[operation.outputs[0][0]] = self.state[str(operation.state)]
            return
        if operation.type == "write_state":
            self._write_state(operation)
            return
        results = self._results(operation)
        if len(results) != len(operation.outputs):
            raise BundleError(f"{operation.where}: {len(operation.outputs)} outputs, where it gives {len(results)}")
        computes, precision = OPERATORS[operation.type].computes, self.settings.precision
        for (name, declared), result in zip(operation.outputs, results, strict=True):
            if not declared.accepts(result.shape):
                raise BundleError(f"{operation.where}: output {name!r} is {list(result.shape)}, declared {declared}")
            held = precision.hold(result, declared.element) if computes else result
            if held.dtype != precision.held_dtype(declared.element):
                raise BundleError(f"{operation.where}: output {name!r} is {held.dtype}, declared {declared}")
            if computes and held.dtype.kind == "f":
                self._scan(operation, name, held)
            self.values[name] = held

    def _results(self, operation: Operation) -> tuple[Array, ...]:
        row = OPERATORS[operation.type]
        arguments: dict[str, Any] = {}
        try:
            for parameter, names in operation.inputs.items():
                read = self._reader_or_value if parameter in row.takes_stored else self._value
                given = tuple(read(name) for name in names)
                arguments[parameter] = given if parameter == "values" else given[0]
            in_place = operation.state is not None and arguments["x"] is self.state[operation.state]
            result = (write_slice if in_place else row.function)(**arguments)
        except _OPERATOR_ERRORS as error:
            message = str(error) or type(error).__name__
            raise BundleError(f"{operation.where}: {message}") from error
        return tuple(np.asarray(part) for part in result) if isinstance(result, tuple) else (np.asarray(result),)

    def _value(self, name: str) -> Any:
        """An array, or the text of a string constant."""
        value = self._reader_or_value(name)
        return value.whole() if isinstance(value, WeightReader) else value

    def _reader_or_value(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        constant = self.program.constants[name]
        if isinstance(constant, str):
            return constant
        return WeightReader(constant, self.settings.precision, self.settings.cache)

    def _write_state(self, operation: Operation) -> None:
        name = str(operation.state)
        declared = self.program.states[name]
        data = self._value(operation.inputs["data"][0])
        if not isinstance(data, np.ndarray) or not declared.accepts(data.shape):
            raise BundleError(f"{operation.where}: the data is {list(np.shape(data))}, the state {declared}")
        if data is not self.state[name]:  # else written in place; a copy, because data may be a view of something else
            self.state[name] = np.array(self.settings.precision.hold(data, declared.element))

    def _scan(self, operation: Operation, name: str, result: Array) -> None:
        if not result.size:
            return
        largest = float(max(result.max(), -result.min()))
        if not math.isfinite(largest):
            if not (self.settings.allow_infinite_masks and self._inherits_infinity(operation, result)):
                what = "NaN" if np.isnan(result).any() else "infinity"
                raise CheckError(f"{operation.where}: output {name!r} holds {what} ({self.settings.precision.name})")
            largest = float(np.abs(result[np.isfinite(result)]).max(initial=0.0))
        self.magnitudes[name] = max(largest, self.magnitudes.get(name, 0.0))

    def _inherits_infinity(self, operation: Operation, result: Array) -> bool:
        if np.isnan(result).any() or np.isposinf(result).any():
            return False
        given = [self._value(name) for names in operation.inputs.values() for name in names]
        return any(bool(np.isneginf(value).any()) for value in given if getattr(value, "dtype", None) == result.dtype)
