"""Executes the functions of a Core ML package on numpy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, InputError
from pocketlm.memory import untouched_zeros

from .execution import Call, Settings
from .lockstep import run_together
from .package import ELEMENT_TYPES, Package
from .program import Function, TensorType, read_function
from .tensors import Precision, PrecisionName, WeightCache
from .turns import Turn, Turns

__all__ = ["InputDescription", "Interpreter", "Request"]

Array = NDArray[Any]
_DEFAULT_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class InputDescription:
    """What a call must give: ``type``, and for each axis the (smallest, largest) size, None for unbounded.

    ``shapes`` is the list of permitted shapes where the package enumerates them, else empty.
    """

    type: TensorType
    bounds: tuple[tuple[int, int | None], ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if not self.type.accepts(shape) or (self.shapes and shape not in self.shapes):
            return False
        pairs = zip(shape, self.bounds, strict=True)
        return all(low <= size and (high is None or size <= high) for size, (low, high) in pairs)


@dataclass(frozen=True)
class Request:
    """A call to make, as :meth:`Interpreter.predict` takes it. ``also`` names values that the function computes on the
    way, which are given beside its results."""

    inputs: dict[str, Array]
    state: dict[str, Array]
    function: str | None = None
    also: tuple[str, ...] = ()


class Interpreter:
    """A reference for the meaning of an ``.mlpackage``, not an imitation of any Core ML device and not a fast one.

    ``precision``: ``"float32"`` and ``"float64"`` hold and compute every floating-point tensor in that type;
    ``"float16"`` rounds each result that the file declares fp16 to fp16, with float32 inside an operator.
    ``cache_bytes`` bounds the decoded weights that are kept between calls; 0 decodes them in blocks at each use.
    ``allow_infinite_masks`` lets a result hold negative infinity where an input of the operator or a constant does;
    otherwise any infinity or NaN in a computed result is a CheckError that names operator and output.

    Opening refuses what it can't execute: BundleError for a malformed file, UnsupportedError for an operator, data type
    or parameter that it doesn't know, UnavailableError without coremltools' messages.
    One thread at a time.
    """

    def __init__(
        self,
        path: str | Path,
        precision: PrecisionName = "float16",
        *,
        cache_bytes: int = _DEFAULT_CACHE_BYTES,
        allow_infinite_masks: bool = False,
    ) -> None:
        if precision not in get_args(PrecisionName):
            raise InputError(f"precision {precision!r}; valid: {', '.join(get_args(PrecisionName))}")
        self._package = Package(Path(path))
        self._precision = Precision(precision)
        self._settings = Settings(self._precision, WeightCache(cache_bytes), allow_infinite_masks)
        names = sorted(self._package.model.mlProgram.functions)
        if not names:
            raise BundleError(f"{self._package.model_file}: no functions")
        self._functions = {name: read_function(self._package, name) for name in names}
        self._states = self._shared_states()
        self._descriptions = {name: self._describe(name) for name in names}
        self.magnitudes: dict[str, float] = {}

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(self._functions)

    @property
    def default_function(self) -> str:
        """The one that the package names, else ``main``, else the first."""
        named = self._package.model.description.defaultFunctionName
        candidates = [name for name in (named, "main") if name in self._functions]
        return candidates[0] if candidates else self.functions[0]

    @property
    def metadata(self) -> dict[str, str]:
        """The package's user-defined metadata."""
        return dict(self._package.model.description.metadata.userDefined)

    @property
    def states(self) -> dict[str, TensorType]:
        """Of all functions together, which share them."""
        return dict(self._states)

    @property
    def largest_magnitude(self) -> float:
        """The largest finite absolute value of all floating-point results so far; 0.0 before the first call.

        ``magnitudes`` has it for each computed result by name.
        """
        return max(self.magnitudes.values(), default=0.0)

    def inputs(self, function: str | None = None) -> dict[str, InputDescription]:
        return dict(self._descriptions[self._function_name(function)])

    def outputs(self, function: str | None = None) -> tuple[str, ...]:
        return self._functions[self._function_name(function)].outputs

    def held_dtype(self, state: str) -> np.dtype[Any]:
        """Of the arrays that hold ``state``: float32, or float64 in that precision, where it is floating-point."""
        return self._precision.held_dtype(self._states[state].element)

    def make_state(self) -> dict[str, Array]:
        """Zeros for every state, in its :meth:`held_dtype`."""
        shapes = {name: [size or 0 for size in kind.shape] for name, kind in self._states.items()}
        return {name: untouched_zeros(shape, self.held_dtype(name)) for name, shape in shapes.items()}

    def predict(
        self, inputs: dict[str, Array], state: dict[str, Array] | None = None, function: str | None = None
    ) -> dict[str, Array]:
        """One call. Results that are floating-point are float32, or float64 in that precision, and owned by the caller.

        ``state`` is updated: in its arrays where it can be, else by new arrays in the dict. After an error its content
        is undefined. InputError for inputs or states that don't fit; CheckError for infinity or NaN; BundleError where
        the program can't be executed on these inputs.
        """
        return self._call(Request(inputs, state if state is not None else {}, function)).run()

    def predict_together(self, requests: Sequence[Request]) -> list[dict[str, Array]]:
        """The results of ``requests`` as :meth:`predict` gives them one after another, each weight decoded once.

        Requests with the very same ``state`` dict follow one another on it. Raises :class:`UnsupportedError` naming the
        operator where a program handles its state so that this order can't be kept; errors as :meth:`predict` besides.
        """
        turns: dict[int, Turns] = {}
        owners: dict[int, int] = {}  # where an array lies -> whose it is
        calls = []
        for number, request in enumerate(requests):
            for name, array in request.state.items():
                if not array.flags.c_contiguous:
                    raise InputError(f"state {name!r} is not C-contiguous")
                if array.size and owners.setdefault(array.ctypes.data, id(request.state)) != id(request.state):
                    raise InputError(f"state {name!r} is an array of another state too")
            if id(request.state) not in turns:
                turns[id(request.state)] = Turns(request.state)
            calls.append(self._call(request, Turn(turns[id(request.state)], number)))
        return run_together(calls, self._package.release)

    def _call(self, request: Request, turn: Turn | None = None) -> Call:
        name = self._function_name(request.function)
        program = self._functions[name]
        for value in request.also:
            if value not in program.computed:
                raise InputError(f"{name}: {value!r} is not a value that the function computes")
        self._check_state(program, request.state)
        inputs = self._held_inputs(name, request.inputs)
        return Call(program, inputs, request.state, self._settings, self.magnitudes, turn, request.also)

    def _held_inputs(self, function: str, inputs: dict[str, Array]) -> dict[str, Array]:
        expected = self._descriptions[function]
        if set(inputs) != set(expected):
            raise InputError(f"{function}: inputs {sorted(inputs)}, where it takes {sorted(expected)}")
        held = {}
        for name, description in expected.items():
            given = np.asarray(inputs[name])
            if not description.accepts(given.shape):
                raise InputError(f"{function}: input {name!r} is {list(given.shape)}, declared {description.type}")
            element = description.type.element
            if ELEMENT_TYPES[element].is_float != (given.dtype.kind == "f"):
                raise InputError(f"{function}: input {name!r} is {given.dtype}, declared {description.type}")
            with np.errstate(all="ignore"):
                held[name] = self._precision.hold(given, element)
            if given.dtype.kind != "f" and not np.array_equal(held[name], given):
                raise InputError(f"{function}: input {name!r} holds values beyond {element}")
            if given.dtype.kind == "f" and not self._is_acceptable(held[name]):
                raise InputError(f"{function}: input {name!r} holds infinity or NaN ({self._precision.name})")
        return held

    def _is_acceptable(self, values: Array) -> bool:
        finite = np.isfinite(values)
        return bool(np.all(finite | np.isneginf(values) if self._settings.allow_infinite_masks else finite))

    def _check_state(self, program: Function, state: dict[str, Array]) -> None:
        for name, kind in program.states.items():
            if name not in state:
                raise InputError(f"state {name!r} is missing; make_state() gives one")
            held = state[name]
            if not held.flags.writeable:
                raise InputError(f"state {name!r} is read-only")
            if not kind.accepts(held.shape) or held.dtype != self._precision.held_dtype(kind.element):
                raise InputError(f"state {name!r} is {held.dtype} {list(held.shape)}, declared {kind}")

    def _shared_states(self) -> dict[str, TensorType]:
        states: dict[str, TensorType] = {}
        for function, program in self._functions.items():
            for name, kind in program.states.items():
                if states.setdefault(name, kind) != kind:
                    raise BundleError(
                        f"{self._package.model_file}: {function}: state {name!r} is {kind}, elsewhere {states[name]}"
                    )
        return states

    def _describe(self, function: str) -> dict[str, InputDescription]:
        description = self._package.model.description
        features = next((entry.input for entry in description.functions if entry.name == function), description.input)
        arrays = {feature.name: feature.type.multiArrayType for feature in features}
        described = {}
        for name, kind in self._functions[function].inputs.items():
            bounds: tuple[tuple[int, int | None], ...] = tuple((size or 0, size) for size in kind.shape)
            shapes: tuple[tuple[int, ...], ...] = ()
            array = arrays.get(name)
            flexibility = array.WhichOneof("ShapeFlexibility") if array is not None else None
            if array is not None and flexibility == "shapeRange":
                ranges = array.shapeRange.sizeRanges
                if len(ranges) != len(kind.shape):
                    raise BundleError(f"{self._package.model_file}: {function}: input {name!r}: {len(ranges)} ranges")
                bounds = tuple((int(r.lowerBound), None if r.upperBound < 0 else int(r.upperBound)) for r in ranges)
            elif array is not None and flexibility == "enumeratedShapes":
                shapes = tuple(tuple(int(size) for size in entry.shape) for entry in array.enumeratedShapes.shapes)
            described[name] = InputDescription(kind, bounds, shapes)
        return described

    def _function_name(self, function: str | None) -> str:
        name = self.default_function if function is None else function
        if name not in self._functions:
            raise InputError(f"function {name!r}; valid: {', '.join(self._functions)}")
        return name
