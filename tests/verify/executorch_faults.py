"""Faults put into a written .pte: weights and tables in place, everything else by writing the program anew around the
same segments.

:data:`FAULTS` maps a fault to the function that puts it into a file (a copy) at a :class:`Place`; :func:`places` lists
where a file can hold it: the first, the middle and the last layer, and whatever else differs. Files stay valid for
ExecuTorch: each fault computes something else, none is a broken file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.manifest import Manifest
from pocketlm_export.backends.executorch.importing import schema
from pocketlm_export.backends.executorch.reading.attention import layer_attentions, number
from pocketlm_export.backends.executorch.reading.facts import rotary_constants, stated_facts
from pocketlm_export.backends.executorch.reading.kernels import UPDATE_CACHE
from pocketlm_export.backends.executorch.reading.payload import PayloadNode
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, KernelStep
from tests.verify import executorch_expert_faults as experts
from tests.verify.executorch_rewriting import Rewriting, reader_of, stored_codes, stored_scales
from tests.verify.fault_places import (
    Place,
    Rows,
    all_layers,
    bias_places,
    chosen_layers,
    int4_places,
    kv_head_places,
    scale_places,
)

__all__ = ["FAULTS", "Place", "Rows", "places"]


def places(fault: str, path: Path, manifest: Manifest) -> list[Place]:
    """Every place of the file at ``path`` that differs for ``fault``; none if it can't hold the fault."""
    return list(PLACES[fault](PteFile(path), manifest))


# What a program holds


def delegate_of(file: PteFile, value: int) -> DelegateStep:
    """The call that makes ``value``."""
    return next(step for step in file.steps if isinstance(step, DelegateStep) and value in step.outputs)


def updates(file: PteFile, layer: int) -> list[KernelStep]:
    """The two that write into the layer's caches."""
    attention = layer_attentions(file)[layer]
    caches = attention.keys, attention.values
    return [
        step
        for step in file.steps
        if isinstance(step, KernelStep) and step.operator == UPDATE_CACHE and step.arguments[1] in caches
    ]


def rotated(file: PteFile, layer: int) -> tuple[int, int, int] | None:
    return rotary_constants(file, layer_attentions(file)[layer].query)


def table_arguments(file: PteFile, layer: int) -> tuple[DelegateStep, list[int]]:
    """The delegate that rotates the layer's queries and keys, and which of its arguments are rows of the tables."""
    step = delegate_of(file, layer_attentions(file)[layer].query)
    constants = set(rotated(file, layer)[:2])
    sources = {
        value: file.tensor(file.producers[value].arguments[0]).data_buffer_idx
        for value in step.inputs
        if value in file.producers and file.producers[value].operator.startswith("aten::slice")
    }
    return step, [value for value, constant in sources.items() if constant in constants]


def replace_arguments(rewriting: Rewriting, step: DelegateStep | KernelStep, values: Mapping[int, int]) -> None:
    call = rewriting.call(step)
    call.args = [values.get(argument, argument) for argument in call.args]


def norm_means(file: PteFile) -> list[tuple[int, int]]:
    """For every norm, in order of execution: the delegate and the value that holds epsilon."""
    found = []
    for step in file.steps:
        if isinstance(step, DelegateStep):
            payload = file.delegates[step.index]
            roots = [node for node in payload.nodes if node.kind == "ReciprocalSquareRoot"]
            found += [(step.index, payload.producers[node.inputs[0]].inputs[2]) for node in roots]
    return found


def reads_a_number(file: PteFile, step: DelegateStep, node: PayloadNode) -> bool:
    return any(number(file, step, value) is not None for value in node.inputs)


def tensor_of(graph: dict[str, Any], number: int) -> dict[str, Any]:
    unions = (item["xvalue_union"] for item in graph["xvalues"])
    return next(t for t in (union.get("tensor_value", union) for union in unions) if t["id_out"] == number)


# The faults


def swap_rotary_halves(path: Path, place: Place) -> None:
    """Rotate by the negative angle, which is what exchanged halves do: the layer gets a sine of its own, negated."""
    rewriting = Rewriting(path)
    file = rewriting.file
    step, arguments = table_arguments(file, place.layer)
    sine = rotated(file, place.layer)[1]
    value = next(v for v in arguments if file.tensor(file.producers[v].arguments[0]).data_buffer_idx == sine)
    replace_arguments(rewriting, step, {value: rewriting.with_other_content(value, lambda values: -values)})
    rewriting.save()


def shift_rotary_table(path: Path, place: Place) -> None:
    """Position p rotates by the angle of p + 1; the last row stays."""
    rewriting = Rewriting(path)
    step, arguments = table_arguments(rewriting.file, place.layer)

    def shifted(values: np.ndarray) -> np.ndarray:
        values[:-1] = values[1:].copy()
        return values

    changed = {value: rewriting.with_other_content(value, shifted) for value in arguments}
    replace_arguments(rewriting, step, changed)
    rewriting.save()


def shift_position(path: Path, place: Place) -> None:
    """The layer's cache is written one row further on; or read so, where no mask says what is seen."""
    rewriting = Rewriting(path)
    file = rewriting.file
    written = updates(file, place.layer)
    steps = written if place.part == "cache" else [layer_attentions(file)[place.layer].step]
    slot = 2 if place.part == "cache" else 3
    start = written[0].arguments[2]
    shifted, one = rewriting.value(schema.Int(0)), rewriting.value(schema.Int(1))
    for step in steps:
        rewriting.call(step).args[slot] = shifted
    made = next(s for s in file.steps if isinstance(s, KernelStep) and s.result == start)
    rewriting.kernel(rewriting.position_of(made) + 1, "executorch_prim::add.Scalar", [start, one, shifted])
    rewriting.save()


def drop_bias(path: Path, place: Place) -> None:
    """Zeros in its place."""
    (rows,) = place.rows
    stored_codes(PteFile(path), rows.entry)[rows.start : rows.stop] = 0


def swap_nibbles(path: Path, place: Place) -> None:
    """Of every byte of the tensor."""
    (rows,) = place.rows
    codes = stored_codes(PteFile(path), rows.entry)[rows.start : rows.stop]
    codes[:] = (codes << 4) | (codes >> 4)


def exchange_scales(path: Path, place: Place) -> None:
    """``row``: of two groups of one row; ``columns``: of two groups, in all rows; ``rows``: of two rows."""
    (rows,) = place.rows
    scales = stored_scales(PteFile(path), rows.entry)[rows.start : rows.stop]
    match place.part:
        case "rows":
            other = int((scales[:, 0] != scales[0, 0]).argmax())
            scales[[0, other]] = scales[[other, 0]]
        case "columns":
            scales[:, [0, 1]] = scales[:, [1, 0]]
        case "row":
            row = int((scales[:, 0] != scales[:, 1]).argmax())
            scales[row, [0, 1]] = scales[row, [1, 0]]


def enlarge_epsilon(path: Path, place: Place) -> None:
    """A thousand times."""
    rewriting = Rewriting(path)
    delegate, number = norm_means(rewriting.file)[place.index]
    constant = rewriting.file.delegates[delegate].values[number].constant
    epsilon = rewriting.file.named_data(constant.key, constant.size).view("<f4")
    index = rewriting.named_constant(delegate, (epsilon * np.float32(1000)).tobytes())
    tensor_of(rewriting.graph(delegate), number)["constant_buffer_idx"] = index
    rewriting.save()


def skip_layer(path: Path, place: Place) -> None:
    """What comes out of the layer is what went in; its caches are still written."""
    rewriting = Rewriting(path)
    file = rewriting.file
    mixed = layer_attentions(file)[place.layer].result
    step = next(step for step in file.steps if isinstance(step, DelegateStep) and mixed in step.inputs)
    payload = file.delegates[step.index]
    sums = [
        node
        for node in payload.nodes
        if node.kind == "Add" and len(payload.values[node.output].shape) == 3 and not reads_a_number(file, step, node)
    ]
    before = next(number for number in sums[0].inputs if number in payload.inputs)
    width = payload.values[before].shape[-1]
    for item in rewriting.graph(step.index)["xnodes"]:
        if item["xnode_union"]["output_id"] == sums[1].output:
            item["xnode_union_type"] = "XNNStaticReshape"
            item["xnode_union"] = {
                "num_dims": 3, "new_shape": [1, 0, width], "input_id": before, "output_id": sums[1].output, "flags": 0,
            }  # fmt: skip
    rewriting.save()


def ignore_window(path: Path, place: Place) -> None:
    """Every key up to the query is seen."""

    def causal(values: np.ndarray) -> np.ndarray:
        rows, columns = values.shape
        seen = np.arange(columns) - columns // 2 <= np.arange(rows)[:, None]
        return np.where(seen, 0, -np.inf).astype(values.dtype)

    change_mask(path, place, causal)


def widen_window(path: Path, place: Place) -> None:
    """One key more is seen."""

    def widened(values: np.ndarray) -> np.ndarray:
        values[:, :-1] = np.maximum(values[:, :-1], values[:, 1:])
        return values

    change_mask(path, place, widened)


def change_mask(path: Path, place: Place, change: Callable[[np.ndarray], np.ndarray]) -> None:
    rewriting = Rewriting(path)
    attention = layer_attentions(rewriting.file)[place.layer]
    replace_arguments(rewriting, attention.step, {attention.mask: rewriting.with_other_content(attention.mask, change)})
    rewriting.save()


def ignore_soft_cap(path: Path, place: Place) -> None:
    """Ten thousand times as high, it is out of reach of every score."""
    rewriting = Rewriting(path)
    file = rewriting.file
    attention = layer_attentions(file)[place.layer]
    inputs = file.delegates[attention.step.index].inputs
    numbers = zip(attention.step.inputs, (number(file, attention.step, value) for value in inputs), strict=True)
    cap = next(value for value, content in numbers if content == attention.softcap[0])
    replace_arguments(
        rewriting, attention.step, {cap: rewriting.with_other_content(cap, lambda values: values * 10_000)}
    )
    rewriting.save()


def reverse_kv_heads(path: Path, place: Place) -> None:
    """The heads' rows of a layer's keys and values, with their scales and biases, in reverse."""
    file = PteFile(path)
    heads = file.shape(layer_attentions(file)[place.layer].keys)[2]
    for entry, start, stop in place.rows:
        payload, number = reader_of(file, entry)
        parts = [stored_codes(file, entry)]
        if payload.values[number].scales is not None:
            parts.append(stored_scales(file, entry))
        for part in parts:
            rows = part[start:stop]
            rows[:] = rows.reshape(heads, -1, *rows.shape[1:])[::-1].reshape(rows.shape)


def untie_head(path: Path, place: Place) -> None:
    """The head reads a copy of its matrix, in which a twentieth of the codes is off by one (``noise``), or row 7 is
    replaced by row 8 (``row``)."""
    rewriting = Rewriting(path)
    file = rewriting.file
    step = delegate_of(file, file.forward.outputs[0])
    payload = file.delegates[step.index]
    head = [node for node in payload.nodes if node.kind == "FullyConnected"][-1]  # a soft cap may follow
    value = payload.values[head.inputs[1]]
    content = file.named_data(value.constant.key, value.constant.size).copy()
    if place.part == "row":
        rows = content.reshape(value.shape[0], -1)
        rows[7] = rows[8]
    else:
        off_by_one(content.view("<f4") if value.datatype == "fp32" else content, value.datatype)
    index = rewriting.named_constant(step.index, content.tobytes())
    tensor_of(rewriting.graph(step.index), value.id)["constant_buffer_idx"] = index
    rewriting.save()


def off_by_one(values: np.ndarray, datatype: str) -> None:
    chosen = np.random.default_rng(5).choice(values.size, values.size // 20, replace=False)
    if datatype == "fp32":
        values[chosen] *= np.float32(1 + 2**-7)
        return
    # of an int8 code as of a byte's low nibble, towards zero: never out of range
    low = values[chosen] & 15 if datatype == "qbint4" else values[chosen].view(np.int8)
    values[chosen] -= np.sign(low - 8 if datatype == "qbint4" else low).astype(np.uint8)


# Where each fault can be


def rotated_layers(file: PteFile, manifest: Manifest) -> list[Place]:
    return [Place(layer) for layer in chosen_layers(x for x in range(manifest.model.layers) if rotated(file, x))]


def windowed(file: PteFile, layer: int) -> bool:
    stated = {(fact.node, fact.name): fact.value for fact in stated_facts(file)}
    return stated[f"attention {layer}", "window"] is not None


def capped_layers(file: PteFile, _manifest: Manifest) -> list[Place]:
    attentions = layer_attentions(file)
    return [Place(layer) for layer in chosen_layers(x for x, found in enumerate(attentions) if found.softcap)]


def windowed_layers(file: PteFile, manifest: Manifest) -> list[Place]:
    return [Place(layer) for layer in chosen_layers(x for x in range(manifest.model.layers) if windowed(file, x))]


def position_places(file: PteFile, manifest: Manifest) -> list[Place]:
    """A mask makes the kernel's own position idle, and explicit attention has none."""
    layers = range(manifest.model.layers)
    attentions = layer_attentions(file)
    read = chosen_layers(layer for layer in layers if attentions[layer].mask is None)
    return [Place(layer, "cache") for layer in chosen_layers(layers)] + [Place(layer, "attention") for layer in read]


def grouped_scale_places(file: PteFile, manifest: Manifest) -> list[Place]:
    """Not between the groups of a row that has one."""
    found = scale_places("executorch", manifest)
    return [p for p in found if p.part == "rows" or stored_scales(file, p.rows[0].entry).shape[1] > 1]


def norm_places(file: PteFile, _manifest: Manifest) -> list[Place]:
    return [Place(index=index) for index in range(len(norm_means(file)))]


def head_places(_file: PteFile, _manifest: Manifest) -> list[Place]:
    return [Place(part=part) for part in ("noise", "row")]


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {
    "rotary halves swapped": swap_rotary_halves,
    "rotary table one row off": shift_rotary_table,
    "position off by one": shift_position,
    "a bias missing": drop_bias,
    "nibbles swapped": swap_nibbles,
    "scales of two groups exchanged": exchange_scales,
    "a norm's epsilon x1000": enlarge_epsilon,
    "one layer skipped": skip_layer,
    "window ignored": ignore_window,
    "window one too wide": widen_window,
    "soft cap ignored": ignore_soft_cap,
    "key/value heads paired wrongly": reverse_kv_heads,
    "lm head untied": untie_head,
    **experts.FAULTS,
}

PLACES: Mapping[str, Callable[[PteFile, Manifest], list[Place]]] = {
    "rotary halves swapped": rotated_layers,
    "rotary table one row off": rotated_layers,
    "position off by one": position_places,
    "a bias missing": lambda _, manifest: bias_places("executorch", manifest),
    "nibbles swapped": lambda _, manifest: int4_places("executorch", manifest),
    "scales of two groups exchanged": grouped_scale_places,
    "a norm's epsilon x1000": norm_places,
    "one layer skipped": lambda _, manifest: all_layers(manifest),
    "window ignored": windowed_layers,
    "window one too wide": windowed_layers,
    "soft cap ignored": capped_layers,
    "key/value heads paired wrongly": lambda _, manifest: kv_head_places("executorch", manifest),
    "lm head untied": head_places,
    **experts.PLACES,
}
