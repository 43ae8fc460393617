"""Executes ``forward`` in float64, instruction by instruction over all calls of all runs, activations never rounded.

Valid because the tokens are given: a call needs in each layer what the layer before made of it, and the rows of the
caches that earlier calls of its run wrote. Each weight is unpacked once, by blocks of rows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError
from pocketlm_export.backends.executorch.importing import schema
from pocketlm_export.backends.executorch.reading.attention import LayerAttention, layer_attentions
from pocketlm_export.backends.executorch.reading.caches import CacheRows, WrittenCache
from pocketlm_export.backends.executorch.reading.kernels import ATTENTION, KERNELS, SLICE, UPDATE_CACHE, attend
from pocketlm_export.backends.executorch.reading.matrices import embedding_table, filter_matrix, row_blocks
from pocketlm_export.backends.executorch.reading.nodes import compute
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadNode
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, JumpStep, KernelStep
from pocketlm_export.backends.reading import Call, Run, Trace

__all__ = ["DelegateCall", "Execution", "execute"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DelegateCall:
    """What one call gave a delegate, rounded to float32, and what float64 made of it, in the order of its payload."""

    delegate: int
    inputs: tuple[npt.NDArray[np.float32], ...]
    outputs: tuple[npt.NDArray[np.float64], ...]


@dataclass(frozen=True, slots=True)
class Execution:
    """``traces`` of the runs, what delegates read and made in the observed calls, and which delegates any call ran."""

    traces: list[Trace]
    delegate_calls: list[DelegateCall]
    ran: frozenset[int]


@dataclass(slots=True)
class _CallState:
    """The values of one call by index."""

    call: Call
    observed: bool
    values: dict[int, Any]
    resumes: int = 0  # the step that a jump leads to


@dataclass(slots=True)
class _RunState:
    run: Run
    calls: list[_CallState]
    caches: dict[int, WrittenCache] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)


def execute(file: PteFile, runs: Sequence[Run], observed: Collection[tuple[int, int]] = ()) -> Execution:
    """Execute ``runs``; ``observed`` are calls by the index of the run and of the call.

    The file must have passed ``layer_attentions``, ``check_kernels`` and ``check_nodes``.
    """
    attentions = layer_attentions(file)
    layers = {attention.step: layer for layer, attention in enumerate(attentions)}
    caches = {cache: (layer, part) for layer, attention in enumerate(attentions)
              for part, cache in enumerate((attention.keys, attention.values))}  # fmt: skip
    states = [_begin(file, index, run, observed) for index, run in enumerate(runs)]
    calls = [call for state in states for call in state.calls]
    delegate_calls: list[DelegateCall] = []
    ran: set[int] = set()
    last_uses = _last_uses(file)
    for number, (step, unneeded) in enumerate(zip(file.steps, last_uses, strict=True)):
        running = [call for call in calls if call.resumes <= number]
        if isinstance(step, DelegateStep):
            delegate_calls += _run_delegate(file, step, running)
            ran.update([step.index] if running else [])
            file.release()
        elif isinstance(step, JumpStep):
            for call in running:
                if not np.all(_value(file, call, step.condition)):
                    call.resumes = step.destination
        elif step.operator == UPDATE_CACHE:
            for state in states:
                _write(file, step, state, *caches[step.arguments[1]])
        elif step.operator == ATTENTION:
            for state in states:
                _attend(file, step, state)
        elif step.operator == SLICE and step.arguments[0] in caches:
            for state in states:
                _take_rows(file, step, state)
        else:
            _run_kernel(file, step, running)
        if step in layers:
            for state in states:
                _trace(state, attentions[layers[step]])
        for call in calls:
            for index in unneeded:
                call.values.pop(index, None)
    (output,) = file.forward.outputs
    for state in states:
        state.trace.logits = [_value(file, call, output)[0, -call.call.rows :] for call in state.calls]
    return Execution([state.trace for state in states], delegate_calls, frozenset(ran))


def _begin(file: PteFile, index: int, run: Run, observed: Collection[tuple[int, int]]) -> _RunState:
    tokens, position = file.forward.inputs
    calls, start = [], run.start
    for number, call in enumerate(run.calls):
        values = {tokens: np.array([call.tokens], np.int64), position: np.array([start], np.int64)}
        calls.append(_CallState(call, (index, number) in observed, values))
        start += len(call.tokens)
    return _RunState(run, calls)


def _last_uses(file: PteFile) -> list[list[int]]:
    """For each instruction the values that none after it reads."""
    last: dict[int, int] = {}
    for number, step in enumerate(file.steps):
        last.update(dict.fromkeys((*step.read, *step.made), number))
    last.update(dict.fromkeys(file.forward.outputs, -1))
    unneeded: list[list[int]] = [[] for _ in file.steps]
    for index, number in last.items():
        if number >= 0:
            unneeded[number].append(index)
    return unneeded


def _value(file: PteFile, call: _CallState, index: int) -> Any:
    """What ``call`` computed for a value, or the constant that it is."""
    if index in call.values:
        value = call.values[index]
        return value.array() if isinstance(value, CacheRows) else value
    item = file.forward.values[index].val
    if isinstance(item, schema.OptionalTensorList):
        return [None if tensor < 0 else _value(file, call, tensor) for tensor in item.items]
    if not isinstance(item, schema.Tensor):
        return file.scalar(index)
    content = file.constant_tensor(index)
    if content is None:
        raise BundleError(f"{file.path}: value {index} is read before it is made")
    return content


def _run_kernel(file: PteFile, step: KernelStep, calls: Sequence[_CallState]) -> None:
    table = embedding_table(file, step)
    for call in calls:
        try:
            if table is not None:
                (ids,) = _value(file, call, step.arguments[1 if step.operator.startswith("aten") else 5])
                call.values[step.result] = table.values(ids).astype(np.float64)[None]
            else:
                arguments = [_value(file, call, index) for index in step.arguments]
                made = KERNELS[step.operator](*arguments)
                call.values.update(zip(step.results, made if len(step.results) > 1 else (made,), strict=True))
        except (IndexError, TypeError, ValueError, AttributeError) as error:  # arguments that don't fit the operator
            raise BundleError(f"{file.path}: {step.operator} into value {step.result}: {error}") from error


def _write(file: PteFile, step: KernelStep, state: _RunState, layer: int, part: int) -> None:
    """The rows of all calls of a run into a cache: the keys (0) or values (1) of a layer."""
    value, cache, position = step.arguments
    shape, past = file.shape(cache), state.run.past
    begun = None if past is None else past.layer(layer, *shape[2:])[part]
    state.caches[cache] = WrittenCache(shape, begun)
    for call in state.calls:
        state.caches[cache].write(_value(file, call, position), _value(file, call, value), str(file.path))


def _take_rows(file: PteFile, step: KernelStep, state: _RunState) -> None:
    """For explicit attention."""
    cache, _, _, stop, _ = step.arguments
    for number, call in enumerate(state.calls):
        call.values[step.result] = CacheRows(state.caches[cache], number + 1, _value(file, call, stop))


def _attend(file: PteFile, step: KernelStep, state: _RunState) -> None:
    """The attention of a layer in all calls of a run."""
    query, keys, values, start, mask, _, _, scale = step.arguments
    context = file.shape(keys)[1]
    for number, call in enumerate(state.calls):
        x = _value(file, call, query)
        first, addend, factor = (_value(file, call, index) for index in (start, mask, scale))
        if not 0 <= first <= context - x.shape[1]:
            raise BundleError(f"{file.path}: attention of {x.shape[1]} queries at {first} over a cache of {context}")
        if addend is not None and addend.shape != (x.shape[1], context):
            raise BundleError(f"{file.path}: a mask {list(addend.shape)} for {x.shape[1]} queries and {context} rows")
        k_cache, v_cache = (state.caches[cache].after(number + 1) for cache in (keys, values))
        call.values[step.result] = attend(x, k_cache, v_cache, first, addend, factor)


def _trace(state: _RunState, attention: LayerAttention) -> None:
    """The rows that the run's own tokens added; its caches are needed no more."""
    own = slice(state.run.start, state.run.start + len(state.run.tokens))
    for cache, traced in ((attention.keys, state.trace.keys), (attention.values, state.trace.values)):
        traced.append(state.caches.pop(cache).after(len(state.calls))[0, own].swapaxes(0, 1).copy())


def _run_delegate(file: PteFile, step: DelegateStep, calls: Sequence[_CallState]) -> list[DelegateCall]:
    """All calls together where weights are read, else call by call."""
    payload = file.delegates[step.index]
    weighs = any(node.kind == "FullyConnected" for node in payload.nodes)
    observed = []
    for group in [calls] if weighs and calls else [[call] for call in calls]:
        insides = []
        for call in group:
            inputs = [np.asarray(_value(file, call, index), np.float64) for index in step.inputs]
            insides.append(dict(zip(payload.inputs, inputs, strict=True)))
        arguments = [[inside[number] for number in payload.inputs] if call.observed else []
                     for inside, call in zip(insides, group, strict=True)]  # fmt: skip
        _run_nodes(file, payload, insides, f"{file.path}: delegate {step.index}")
        for call, inside, inputs in zip(group, insides, arguments, strict=True):
            outputs = tuple(inside[number] for number in payload.outputs)
            call.values.update(zip(step.outputs, outputs, strict=True))
            if call.observed:
                rounded = tuple(array.astype(np.float32) for array in inputs)
                observed.append(DelegateCall(step.index, rounded, outputs))
    return observed


def _run_nodes(file: PteFile, payload: Payload, insides: Sequence[dict[int, Array]], where: str) -> None:
    """Run a payload's nodes one by one, each in all calls; what no later node reads is dropped."""
    kept = set(payload.outputs)
    last = {number: node for node in payload.nodes for number in node.inputs}
    for node in payload.nodes:
        if node.kind == "FullyConnected":
            _fully_connected(file, payload, node, insides)
        else:
            for inside in insides:
                inputs = [inside[number] for number in node.inputs]
                # int8 is how the runtime carries activations, not what they mean
                inside[node.output] = inputs[0] if node.kind == "Convert" else compute(node, inputs, where)
        for number in node.inputs:
            if last[number] is node and number not in kept:
                for inside in insides:
                    inside.pop(number, None)


def _fully_connected(file: PteFile, payload: Payload, node: PayloadNode, insides: Sequence[dict[int, Array]]) -> None:
    """``x @ filter.T + bias`` over the rows of all calls together."""
    source, filter_number, *bias = node.inputs
    inputs = [inside[source] for inside in insides]
    matrix = filter_matrix(file, payload, filter_number)
    width = inputs[0].shape[-1]
    if len(matrix.shape) != 2 or matrix.shape[1] != width:
        raise BundleError(f"{file.path}: FullyConnected of {width} columns with a filter {list(matrix.shape)}")
    x = np.concatenate([array.reshape(-1, width) for array in inputs])
    y = np.empty((len(x), matrix.shape[0]))
    for rows, values in row_blocks(matrix):
        np.matmul(x, values.T.astype(np.float64), out=y[:, rows])
    if bias:
        vector = filter_matrix(file, payload, bias[0])
        if vector.shape != (matrix.shape[0],):
            raise BundleError(f"{file.path}: FullyConnected of {matrix.shape[0]} rows with a bias {vector.shape}")
        y += vector.values(slice(None))
    first = 0
    for inside, array in zip(insides, inputs, strict=True):
        count = array.size // width
        inside[node.output] = y[first : first + count].reshape(*array.shape[:-1], matrix.shape[0])
        first += count
