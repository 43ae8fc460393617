"""Executes a written artifact in float64, operator by operator, each over all calls of all runs (in lockstep).

A product unpacks its matrix once, by blocks of rows, for the positions of all calls together. A value lives until its
last reader has run, a layer's caches only while its attention does.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, CheckError, PocketLMError, UnsupportedError
from pocketlm.manifest import Model
from pocketlm_export.backends.onnx.file import ATTENTIONS, OnnxFile, WrittenNode
from pocketlm_export.backends.onnx.operators import OPERATORS, WITH_MATRIX
from pocketlm_export.backends.reading import Run, Trace

__all__ = ["execute", "operator_of", "own_positions"]

Array = npt.NDArray[Any]
Values = Sequence[Array]  # one for each call
Operator = Callable[[Sequence[Any]], Sequence[Array | None]]

CACHES = slice(3, 5)  # the inputs of an attention that are its buffers


def execute(decoder: OnnxFile, head: OnnxFile, runs: Sequence[Run], model: Model) -> list[Trace]:
    """Traces in float64, with the inputs that a runtime gives: ids, masks of ones, caches as long as the context.

    A call that wants one row has it from ``decoder``; those of more come from its hidden states through ``head``.
    Raises :class:`UnsupportedError` naming an operator, attribute or input that is not known, and :class:`CheckError`
    or :class:`BundleError` naming the operator whose inputs don't fit it.
    """
    calls = [call for run in runs for call in run.calls]
    inputs = {
        "input_ids": [np.array([call.tokens], np.int64) for call in calls],
        "attention_mask": [np.ones((1, end), np.int64) for run in runs for end in _ends(run)],
    }
    caches = _Caches(runs, model)
    values = _outputs(decoder, inputs, caches, {"logits", "hidden_states"})
    logits = [value[0] for value in values["logits"]]
    many = [index for index, call in enumerate(calls) if call.rows > 1]
    if many:
        states = [values["hidden_states"][index][:, -calls[index].rows :] for index in many]
        rows = _outputs(head, {"hidden_states": states}, caches, {"logits"})["logits"]
        for index, value in zip(many, rows, strict=True):
            logits[index] = value[0]
    return caches.traces(decoder, logits)


def own_positions(cache: Array, run: Run, head_dim: int, name: str) -> Array:
    """``[kv_heads, T, D]`` -> ``[kv_heads, positions, head_dim]``: what the run's tokens added to a buffer.

    Raises :class:`CheckError` if anything lies past the head's own size, which is filled up with zeros.
    """
    rows = cache[:, run.start : run.start + len(run.tokens)]
    if rows[..., head_dim:].any():
        raise CheckError(f"{name}: not zero past the head size of {head_dim}")
    return rows[..., :head_dim].copy()


def _ends(run: Run) -> list[int]:
    """Positions after each call."""
    return (run.start + np.cumsum([len(call.tokens) for call in run.calls])).tolist()


class _Caches:
    """Makes a layer's buffers for each run when its attention comes, and keeps the rows that the run's tokens added."""

    def __init__(self, runs: Sequence[Run], model: Model) -> None:
        self._runs = runs
        self._model = model
        self._added: list[dict[int, tuple[Array, Array]]] = [{} for _ in runs]

    def attend(self, file: OnnxFile, node: WrittenNode, arguments: Sequence[Values | Array | None]) -> list[Values]:
        """Call after call, over buffers of its own for each run."""
        layer = _layer(file, node)
        compute = operator_of(file, node)
        outputs: list[Array] = []
        index = 0
        for run, added in zip(self._runs, self._added, strict=True):
            buffers = self._buffers(file, node, layer, run)
            for _ in run.calls:
                inputs = [_of_call(argument, index) for argument in arguments]
                inputs[CACHES] = buffers
                output, *_ = compute(inputs)
                assert output is not None
                outputs.append(output)
                index += 1
            keys, values = (
                own_positions(buffer[0], run, self._model.head_dim, f"{file.path}: {node.name}: {name}")
                for buffer, name in zip(buffers, node.outputs[1:3], strict=True)
            )
            added[layer] = keys, values
        return [outputs]

    def traces(self, file: OnnxFile, logits: Sequence[Array]) -> list[Trace]:
        """Of every run: its part of ``logits``, which are of all calls, and keys and values of every layer."""
        layers = range(self._model.layers)
        remaining = iter(logits)
        traces = []
        for run, added in zip(self._runs, self._added, strict=True):
            if sorted(added) != list(layers):
                raise CheckError(f"{file.path}: has attention layers {sorted(added)}, not {len(layers)} from 0 on")
            keys, values = ([added[layer][part] for layer in layers] for part in (0, 1))
            traces.append(Trace([next(remaining) for _ in run.calls], keys, values))
        return traces

    def _buffers(self, file: OnnxFile, node: WrittenNode, layer: int, run: Run) -> list[Array]:
        shape = file.inputs.get(node.inputs[CACHES][0], (None,))
        kv_heads, width = self._model.kv_heads, shape[-1]
        if shape[:2] != (1, kv_heads) or not isinstance(width, int) or width < self._model.head_dim:
            raise CheckError(f"{file.path}: {node.inputs[CACHES][0]}: {shape} is no cache of {kv_heads} heads")
        # Zeros that are never touched take no memory.
        buffers = [np.zeros((1, kv_heads, self._model.context_length, width)) for _ in range(2)]
        if run.past is not None:
            past = run.past.layer(layer, kv_heads, self._model.head_dim)
            for buffer, rows in zip(buffers, past, strict=True):
                buffer[0, :, : run.start, : self._model.head_dim] = rows
        return buffers


def _layer(file: OnnxFile, node: WrittenNode) -> int:
    """The layer whose buffers ``node`` reads and writes: the runtime binds them by these names."""
    past = node.inputs[CACHES]
    parts = past[0].split(".") if past else []
    layer = int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else -1
    expected = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    presents = tuple(f"present.{layer}.{part}" for part in ("key", "value"))
    if list(past) != expected or node.outputs[1:] != presents or not set(presents) <= set(file.outputs):
        raise CheckError(f"{file.path}: {node.name}: reads the caches {past} and writes {node.outputs[1:]}")
    return layer


def _outputs(
    file: OnnxFile, inputs: Mapping[str, Values], caches: _Caches, wanted: Collection[str]
) -> dict[str, Values]:
    values: dict[str, Values] = dict(inputs)
    constants = set(file.constants)
    last_reader = {name: index for index, node in enumerate(file.nodes) for name in node.inputs}
    for index, node in enumerate(file.nodes):
        arguments: list[Values | Array | None] = []
        for position, name in enumerate(node.inputs):
            if not name or (node.operator in ATTENTIONS and position in (3, 4)):
                arguments.append(None)
            elif name in constants:
                arguments.append(file.constant(name))
            elif name in values:
                arguments.append(values[name])
            else:
                raise BundleError(f"{file.path}: {node.name}: reads {name!r}, which nothing has made")
        if node.operator in ATTENTIONS:
            results = caches.attend(file, node, arguments)
        elif node.operator in WITH_MATRIX:
            results = _together(file, node, arguments)
        else:
            results = _one_by_one(file, node, arguments, len(next(iter(inputs.values()))))
        for name, result in zip(node.outputs, results, strict=False):
            if name and (name in last_reader or name in wanted):
                values[name] = result
        for name in node.inputs:
            if last_reader[name] == index and name not in wanted:
                values.pop(name, None)
    missing = [name for name in wanted if name not in values]
    if missing:
        raise BundleError(f"{file.path}: has no output {missing[0]!r}")
    return {name: values[name] for name in wanted}


def _of_call(argument: Values | Array | None, index: int) -> Array | None:
    return argument if argument is None or isinstance(argument, np.ndarray) else argument[index]


def _one_by_one(
    file: OnnxFile, node: WrittenNode, arguments: Sequence[Values | Array | None], calls: int
) -> list[Values]:
    compute = operator_of(file, node)
    results = [compute([_of_call(argument, index) for argument in arguments]) for index in range(calls)]
    made: list[Values] = []
    for name, values in zip(node.outputs, zip(*results, strict=True), strict=False):
        if name and any(value is None for value in values):
            raise UnsupportedError(f"{file.path}: {node.name}: output {name!r} is not supported")
        made.append(values)
    return made


def _together(file: OnnxFile, node: WrittenNode, arguments: Sequence[Values | Array | None]) -> list[Values]:
    joined: list[Array | None] = []
    for position, argument in enumerate(arguments):
        if argument is None or isinstance(argument, np.ndarray):
            joined.append(argument)
        elif position in WITH_MATRIX[node.operator]:
            joined.append(np.concatenate(argument, -2))
        else:
            raise UnsupportedError(f"{file.path}: {node.name}: only products with a constant matrix are supported")
    x = arguments[0]
    if x is None or isinstance(x, np.ndarray):
        raise UnsupportedError(f"{file.path}: {node.name}: a product of constants is not supported")
    (y,) = operator_of(file, node)(joined)
    assert y is not None
    return [np.split(y, np.cumsum([value.shape[-2] for value in x])[:-1].tolist(), -2)]


def operator_of(file: OnnxFile, node: WrittenNode) -> Operator:
    """What computes ``node`` for the inputs of one call. Refuses what the operator's function doesn't know."""
    function = OPERATORS.get(node.operator)
    if function is None:
        raise UnsupportedError(f"{file.path}: {node.name}: operator {node.operator!r} is not known")
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    attributes = {name.lower(): value for name, value in node.attributes.items()}
    unknown = [name for name in node.attributes if name.lower() not in known]
    if unknown:
        raise UnsupportedError(f"{file.path}: {node.name}: attribute {unknown[0]!r} of {node.operator} is not known")
    inputs = len(parameters) - len(known)
    if len(node.inputs) > inputs:
        raise UnsupportedError(
            f"{file.path}: {node.name}: {len(node.inputs)} inputs of {node.operator}; known are {inputs}"
        )

    def compute(arguments: Sequence[Any]) -> Sequence[Array | None]:
        try:
            results = function(*arguments, **attributes)
        except PocketLMError as error:
            raise type(error)(f"{file.path}: {node.name}: {error}") from error
        except (ArithmeticError, AttributeError, IndexError, MemoryError, TypeError, ValueError) as error:
            raise BundleError(f"{file.path}: {node.name}: {node.operator} does not fit its inputs: {error}") from error
        return [results] if isinstance(results, np.ndarray) else results

    return compute
