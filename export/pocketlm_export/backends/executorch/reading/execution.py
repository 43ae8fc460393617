"""Executes ``forward`` in float64, instruction by instruction over all calls of all runs, activations never rounded.

Valid because the tokens are given: a call needs in each layer what the layer before made of it, and the rows of the
caches that earlier calls of its run wrote. Each weight is unpacked once, by blocks of rows.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError
from pocketlm_export.backends.executorch.importing import schema
from pocketlm_export.backends.executorch.reading.kernels import ATTENTION, KERNELS, UPDATE_CACHE, attend
from pocketlm_export.backends.executorch.reading.matrices import embedding_table, filter_matrix, row_blocks
from pocketlm_export.backends.executorch.reading.nodes import compute
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadNode
from pocketlm_export.backends.executorch.reading.pte import DelegateStep, KernelStep, PteFile
from pocketlm_export.backends.reading import Call, Run, Trace

__all__ = ["DelegateCall", "attention_steps", "execute"]

LARGEST_CACHE = 1 << 30  # elements

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DelegateCall:
    """What one call gave a delegate, rounded to float32, and what float64 made of it, in the order of its payload."""

    delegate: int
    inputs: tuple[npt.NDArray[np.float32], ...]
    outputs: tuple[npt.NDArray[np.float64], ...]


@dataclass(slots=True)
class _CallState:
    """The values of one call by index; ``updates``: for each cache the first position and the rows to write there."""

    call: Call
    observed: bool
    values: dict[int, Any]
    updates: dict[int, tuple[int, Array]] = field(default_factory=dict)


@dataclass(slots=True)
class _RunState:
    run: Run
    calls: list[_CallState]
    trace: Trace = field(default_factory=Trace)


def execute(
    file: PteFile, runs: Sequence[Run], observed: Collection[tuple[int, int]] = ()
) -> tuple[list[Trace], list[DelegateCall]]:
    """Traces of ``runs``, and what delegates read and made in the calls ``observed`` (index of the run, of the call).

    The file must have passed :func:`attention_steps`, ``check_kernels`` and ``check_nodes``.
    """
    states = [_begin(file, index, run, observed) for index, run in enumerate(runs)]
    calls = [call for state in states for call in state.calls]
    delegate_calls: list[DelegateCall] = []
    last_uses = _last_uses(file)
    layer = 0
    for step, unneeded in zip(file.steps, last_uses, strict=True):
        if isinstance(step, DelegateStep):
            delegate_calls += _run_delegate(file, step, calls)
            file.release()
        elif step.operator == UPDATE_CACHE:
            value, cache, position = step.arguments
            for call in calls:
                call.updates[cache] = _value(file, call, position), _value(file, call, value)
        elif step.operator == ATTENTION:
            for state in states:
                _attend(file, step, layer, state)
            layer += 1
        else:
            _run_kernel(file, step, calls)
        for call in calls:
            for index in unneeded:
                call.values.pop(index, None)
    (output,) = file.forward.outputs
    for state in states:
        state.trace.logits = [call.values[output][0, -call.call.rows :] for call in state.calls]
    return [state.trace for state in states], delegate_calls


def attention_steps(file: PteFile) -> list[KernelStep]:
    """The attention of each layer. Raises :class:`BundleError` unless every cache is written once, then read once by
    attention and by nothing else: only then can calls go in lockstep."""
    written: set[int] = set()
    attentions = []
    for step in file.steps:
        if isinstance(step, KernelStep) and step.operator == UPDATE_CACHE:
            value, cache, _ = step.arguments
            if cache in written or file.tensor(cache).allocation_info is None or len(file.shape(cache)) != 4:
                raise BundleError(f"{file.path}: value {cache} is written twice, or is no cache")
            if file.shape(value)[2:] != file.shape(cache)[2:]:
                raise BundleError(f"{file.path}: rows {file.shape(value)} into a cache {file.shape(cache)}")
            written.add(cache)
        elif isinstance(step, KernelStep) and step.operator == ATTENTION:
            query, keys, values, *_ = step.arguments
            if not {keys, values} <= written:
                raise BundleError(f"{file.path}: attention over caches {keys} and {values} that nothing has written")
            if file.shape(keys) != file.shape(values) or len(file.shape(query)) != 4:
                raise BundleError(f"{file.path}: caches {file.shape(keys)} and {file.shape(values)} of one layer")
            _, _, heads, head_dim = file.shape(query)
            _, _, kv_heads, cached_dim = file.shape(keys)
            if (
                kv_heads == 0
                or heads % kv_heads
                or head_dim != cached_dim
                or math.prod(file.shape(keys)) > LARGEST_CACHE
            ):
                raise BundleError(f"{file.path}: queries {file.shape(query)} over caches {file.shape(keys)}")
            attentions.append(step)
    caches = [cache for step in attentions for cache in step.arguments[1:3]]
    if len(caches) != len(set(caches)) or set(caches) != written:
        raise BundleError(f"{file.path}: a cache that two layers read, or none")
    for step in file.steps:
        used = step.inputs + step.outputs if isinstance(step, DelegateStep) else (*step.arguments, step.result)
        if written & set(used) and (isinstance(step, DelegateStep) or step.operator not in (UPDATE_CACHE, ATTENTION)):
            raise BundleError(f"{file.path}: a cache is read by another operator than attention")
    return attentions


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
        used = step.inputs + step.outputs if isinstance(step, DelegateStep) else (*step.arguments, step.result)
        last.update(dict.fromkeys(used, number))
    last.update(dict.fromkeys(file.forward.outputs, -1))
    unneeded: list[list[int]] = [[] for _ in file.steps]
    for index, number in last.items():
        if number >= 0:
            unneeded[number].append(index)
    return unneeded


def _value(file: PteFile, call: _CallState, index: int) -> Any:
    """What ``call`` computed for a value, or the constant that it is."""
    if index in call.values:
        return call.values[index]
    if not isinstance(file.forward.values[index].val, schema.Tensor):
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
                call.values[step.result] = KERNELS[step.operator](*arguments)
        except (IndexError, TypeError, ValueError, AttributeError) as error:  # arguments that don't fit the operator
            raise BundleError(f"{file.path}: {step.operator} into value {step.result}: {error}") from error


def _attend(file: PteFile, step: KernelStep, layer: int, state: _RunState) -> None:
    """The attention of a layer in all calls of a run, over caches that live here alone."""
    query, keys, values, start, mask, _, _, scale = step.arguments
    _, context, kv_heads, head_dim = file.shape(keys)
    caches = {index: np.zeros((1, context, kv_heads, head_dim)) for index in (keys, values)}  # touched where written
    if state.run.past is not None:
        for cache, past in zip(caches.values(), state.run.past.layer(layer, kv_heads, head_dim), strict=True):
            cache[0, : past.shape[1]] = past.swapaxes(0, 1)
    for call in state.calls:
        for index, cache in caches.items():
            position, rows = call.updates.pop(index)
            if not 0 <= position <= context - rows.shape[1]:
                raise BundleError(f"{file.path}: {rows.shape[1]} rows at {position} of a cache of {context}")
            cache[:, position : position + rows.shape[1]] = rows
        x = _value(file, call, query)
        first, addend, factor = (_value(file, call, index) for index in (start, mask, scale))
        if not 0 <= first <= context - x.shape[1]:
            raise BundleError(f"{file.path}: attention of {x.shape[1]} queries at {first} over a cache of {context}")
        if addend is not None and addend.shape != (x.shape[1], context):
            raise BundleError(f"{file.path}: a mask {list(addend.shape)} for {x.shape[1]} queries and {context} rows")
        call.values[step.result] = attend(x, caches[keys], caches[values], first, addend, factor)
    own = slice(state.run.start, state.run.start + len(state.run.tokens))
    state.trace.keys.append(caches[keys][0, own].swapaxes(0, 1).copy())
    state.trace.values.append(caches[values][0, own].swapaxes(0, 1).copy())


def _run_delegate(file: PteFile, step: DelegateStep, calls: Sequence[_CallState]) -> list[DelegateCall]:
    payload = file.delegates[step.index]
    observed = []
    insides = []
    for call in calls:
        inputs = [np.asarray(_value(file, call, index), np.float64) for index in step.inputs]
        insides.append(dict(zip(payload.inputs, inputs, strict=True)))
    arguments = [[inside[number] for number in payload.inputs] if call.observed else []
                 for inside, call in zip(insides, calls, strict=True)]  # fmt: skip
    _run_nodes(file, payload, insides, f"{file.path}: delegate {step.index}")
    for call, inside, inputs in zip(calls, insides, arguments, strict=True):
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
        inside[node.output] = y[first : first + count].reshape(*array.shape[:-1], -1)
        first += count
