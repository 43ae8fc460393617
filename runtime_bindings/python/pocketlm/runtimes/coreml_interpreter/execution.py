"""One call of one function: the operations in order, on arrays."""

import math
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, CheckError, UnsupportedError

from .contractions import add_bias, multiply
from .movement import slice_by_index, write_slice
from .operators import OPERATORS
from .program import Function, Operation
from .tensors import Precision, WeightCache, WeightReader
from .turns import Turn

__all__ = ["Call", "Product", "Settings", "answers"]

Array = NDArray[Any]
_OPERATOR_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


@dataclass(frozen=True)
class Settings:
    """What all calls of an interpreter share."""

    precision: Precision
    cache: WeightCache
    allow_infinite_masks: bool


@dataclass(frozen=True)
class Product:
    """What a call waits for: ``x @ weight.T``, x ``[..., K]``, of a stored weight ``[N, K]`` with ``identity``.

    ``where`` names the operator in errors.
    """

    x: Array
    weight: WeightReader
    identity: Hashable
    where: str


def answers(products: Sequence[Product], *, stacked: bool = False) -> list[Array]:
    """The results of ``products``, all with one weight; ``stacked`` as :func:`multiply` has it."""
    try:
        return multiply([product.x for product in products], products[0].weight, stacked=stacked)
    except _OPERATOR_ERRORS as error:
        raise BundleError(f"{products[0].where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class Call:
    """``values`` begins as the inputs, as held; ``state`` and ``magnitudes`` are the caller's and are updated.

    ``turn`` is its place among the calls that share ``state`` and run together; None for one that runs alone. ``also``:
    computed values that are given beside the function's results.
    """

    program: Function
    values: dict[str, Array]
    state: dict[str, Array]
    settings: Settings
    magnitudes: dict[str, float]
    turn: Turn | None = None
    also: tuple[str, ...] = ()

    def run(self) -> dict[str, Array]:
        """The function's results, copied: what a later call writes doesn't reach them."""
        steps = self.steps()
        with np.errstate(all="ignore"):
            try:
                product = next(steps)
                while True:
                    product = steps.send(answers([product])[0])
            except StopIteration as finished:
                return dict(finished.value)

    def steps(self) -> Generator[Product, Array, dict[str, Array]]:
        """:meth:`run`, stopping at each product with a stored weight: takes the result, which becomes this call's own.

        Whoever drives it silences numpy's warnings; infinity and NaN are reported by :meth:`_scan`.
        """
        for operation in self.program.operations:
            product = None
            if operation.type == "linear" and operation.inputs["weight"][0] in self.program.constants:
                product = yield self._product(operation)
            self._execute(operation, product)
            for finished in operation.last_uses:
                if finished not in self.also:
                    del self.values[finished]
        results = {name: self._result(name) for name in (*self.program.outputs, *self.also)}
        self.values.clear()
        return results

    def _result(self, name: str) -> Array:
        """A computed array is this call's alone; any other may be an input, a constant or the state."""
        value = self._value(name)
        if self.turn is not None:
            self.turn.take(self.program.state_views.get(name, ()), value, name)
        return value if name in self.program.computed else np.array(value)

    def _product(self, operation: Operation) -> Product:
        x, constant = self._value(operation.inputs["x"][0]), self.program.constants[operation.inputs["weight"][0]]
        if isinstance(x, str) or isinstance(constant, str):
            raise BundleError(f"{operation.where}: a text, where a tensor is needed")
        if len(constant.shape) != 2 or not x.ndim or x.shape[-1] != constant.shape[1]:
            raise BundleError(f"{operation.where}: x {list(x.shape)} and a weight {list(constant.shape)}")
        weight = WeightReader(constant, self.settings.precision, self.settings.cache)
        return Product(x, weight, constant.identity, operation.where)

    def _execute(self, operation: Operation, product: Array | None) -> None:
        if operation.type == "read_state":
            self.values[operation.outputs[0][0]] = self.state[str(operation.state)]
            return
        if operation.type == "write_state":
            self._write_state(operation)
            return
        results = self._results(operation, product)
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

    def _results(self, operation: Operation, product: Array | None) -> tuple[Array, ...]:
        row = OPERATORS[operation.type]
        arguments: dict[str, Any] = {}
        in_place = False
        try:
            if product is not None:
                result: Any = add_bias(product, *(self._value(name) for name in operation.inputs.get("bias", ())))
            else:
                for parameter, names in operation.inputs.items():
                    read = self._reader_or_value if parameter in row.takes_stored else self._value
                    given = tuple(read(name) for name in names)
                    arguments[parameter] = given if parameter == "values" else given[0]
                in_place = operation.state is not None and arguments["x"] is self.state[operation.state]
                result = (write_slice if in_place else row.function)(**arguments)
            results = tuple(np.asarray(part) for part in (result if isinstance(result, tuple) else (result,)))
            if self.turn is not None:
                self._take_turn(self.turn, operation, arguments if in_place else None, results)
        except _OPERATOR_ERRORS as error:
            raise BundleError(f"{operation.where}: {_reason(error)}") from error
        return results

    def _take_turn(
        self, turn: Turn, operation: Operation, in_place: dict[str, Any] | None, results: tuple[Array, ...]
    ) -> None:
        """Note which rows of the state ``operation`` read or, with the arguments ``in_place``, wrote.

        A result that is a view has read nothing yet: what takes it will.
        """
        if in_place is not None:
            written = slice_by_index(**{name: value for name, value in in_place.items() if name != "update"})
            turn.take((str(operation.state),), written, operation.where)
        for parameter, names in operation.inputs.items():
            for name in names:
                states = self.program.state_views.get(name)
                if states is None or (in_place is not None and parameter == "x"):
                    continue
                part = self.values[name]
                if not (OPERATORS[operation.type].may_view and any(np.may_share_memory(r, part) for r in results)):
                    turn.take(states, part, operation.where)

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
            if self.turn is not None:
                raise UnsupportedError(f"{operation.where}: replaces {name!r}, which calls that run together can't")
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
