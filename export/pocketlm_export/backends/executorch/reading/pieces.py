"""Delegates one at a time in the real runtime, on the inputs that the float64 execution had.

As they are shipped, each quantized linear against a recomputation from the very inputs it got; or without int8, each
delegate against what float64 made of the same inputs.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.executorch.reading.execution import DelegateCall
from pocketlm_export.backends.executorch.reading.int8 import round_rows
from pocketlm_export.backends.executorch.reading.matrices import filter_matrix, row_blocks
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadNode
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.rebuilding import delegate_program, exposing, with_float32_filters
from pocketlm_export.backends.executorch.reading.runtime import LoadedProgram
from pocketlm_export.backends.reading import RowErrors

__all__ = ["LARGEST_FLOAT32", "check_delegates_in_float32", "check_quantized_linears"]

LARGEST_FLOAT32 = 512 << 20  # bytes of a head in float32; the program and XNNPACK's packed copy take twice that

Floats = npt.NDArray[np.float32]
Errors = npt.NDArray[np.float64]


def check_delegates_in_float32(file: PteFile, calls: Sequence[DelegateCall]) -> RowErrors:
    """Every delegate with dequantized filters, its outputs against those of float64."""
    pieces: dict[str, Errors] = {}
    for index, payload in enumerate(file.delegates):
        name = f"delegate {index}"
        own = [call for call in calls if call.delegate == index]
        if not own:  # an expert that none of these tokens chose
            continue
        made: list[list[list[Floats]]] = [[] for _ in own]  # of each call the outputs of each range
        for rows in _head_ranges(payload):
            changed = with_float32_filters(file, payload, "float32", rows)
            program = LoadedProgram(delegate_program(file, changed.table, changed.filters), f"{file.path}: {name}")
            for call, ranges in zip(own, made, strict=True):
                ranges.append(program.call(*call.inputs))
            del program  # before the next one is built
            file.release()
        errors = []
        for call, ranges in zip(own, made, strict=True):
            for expected, *parts in zip(call.outputs, *ranges, strict=True):
                errors.append(_row_errors(np.concatenate(parts, -1), expected))
        pieces[name] = np.concatenate(errors)
    return _summary(pieces)


def _head_ranges(payload: Payload) -> list[slice | None]:
    """Ranges of the columns of a payload's only output, a FullyConnected's, that in float32 are at most
    LARGEST_FLOAT32; ``[None]`` if it is smaller, or the payload is no head."""
    node = payload.producers.get(payload.outputs[0])
    if len(payload.outputs) != 1 or node is None or node.kind != "FullyConnected":
        return [None]
    count, width = payload.values[node.inputs[1]].shape
    step = max(1, LARGEST_FLOAT32 // (4 * width))
    if count <= step:
        return [None]
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def check_quantized_linears(file: PteFile, calls: Sequence[DelegateCall]) -> RowErrors:
    """Every quantized linear of the delegates as shipped, but for more of their values being outputs."""
    pieces: dict[str, Errors] = {}
    for index, payload in enumerate(file.delegates):
        linears = [node for node in payload.nodes if payload.is_quantized(node)]
        own = [call for call in calls if call.delegate == index]
        if not linears or not own:
            continue
        name = f"delegate {index}"
        seen = list(dict.fromkeys(number for node in linears for number in (_float_input(payload, node), node.output)))
        inside = [number for number in seen if payload.values[number].external is None]
        program = LoadedProgram(delegate_program(file, exposing(payload, inside), {}), f"{file.path}: {name}")
        had: list[dict[int, Floats]] = []
        for call in own:
            outputs = program.call(*call.inputs)
            had.append(dict(zip((*payload.inputs, *payload.outputs, *inside), (*call.inputs, *outputs), strict=True)))
        del program
        for node in linears:
            pieces[f"{name}, value {node.output}"] = _linear_errors(file, payload, node, had)
        file.release()
    return _summary(pieces)


def _float_input(payload: Payload, node: PayloadNode) -> int:
    return payload.producers[node.inputs[0]].inputs[0]


def _linear_errors(file: PteFile, payload: Payload, node: PayloadNode, had: Sequence[dict[int, Floats]]) -> Errors:
    """``|difference| / |row|`` of the linear's output rows in all calls; the product is in float64."""
    x, y = (
        np.concatenate([values[number].reshape(-1, values[number].shape[-1]) for values in had])
        for number in (_float_input(payload, node), node.output)
    )
    rounded = round_rows(x).astype(np.float64)
    matrix = filter_matrix(file, payload, node.inputs[1])
    bias = filter_matrix(file, payload, node.inputs[2]).values(slice(None)) if len(node.inputs) == 3 else None
    difference, size = np.zeros(len(x)), np.zeros(len(x))
    for rows, values in row_blocks(matrix):
        expected = rounded @ values.T.astype(np.float64)
        if bias is not None:
            expected += bias[rows]
        size += np.square(expected).sum(-1)
        difference += np.square(y[:, rows] - expected).sum(-1)
    return _relative(difference, size)


def _row_errors(got: Floats, expected: npt.NDArray[np.float64]) -> Errors:
    return _relative(np.square(got - expected).sum(-1).ravel(), np.square(expected).sum(-1).ravel())


def _relative(difference: Errors, size: Errors) -> Errors:
    """Roots of sums of squares; a row of zeros is right if it is one."""
    errors: Errors = np.sqrt(difference / np.maximum(size, np.finfo(np.float64).tiny))
    return errors


def _summary(pieces: dict[str, Errors]) -> RowErrors:
    worst = max(pieces, key=lambda name: float(np.max(np.nan_to_num(pieces[name], nan=np.inf))))
    return RowErrors(np.concatenate(list(pieces.values())), worst, len(pieces))
