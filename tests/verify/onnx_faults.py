"""Faults put into a written ONNX artifact by editing its files: operators with ``onnx``, weights in the mapped data.

:data:`FAULTS` maps a fault to the function that puts it into the folder of an artifact (a copy) at a :class:`Place`;
:func:`places` lists where an artifact can hold it: the first, the middle and the last layer, and whatever else differs.
Files stay valid for ONNX Runtime: each fault computes something else, none is a broken file.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from pocketlm.manifest import Manifest
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

MODELS = ("model.onnx", "head.onnx")
NORMS = (
    "RMSNormalization",
    "SkipSimplifiedLayerNormalization",
    "LayerNormalization",
    "SkipLayerNormalization",
)


def places(fault: str, folder: Path, manifest: Manifest) -> list[Place]:
    """Every place of the artifact in ``folder`` that differs for ``fault``; none if it can't hold the fault."""
    return list(PLACES[fault](folder, manifest))


# Editing of files


@contextmanager
def edited(path: Path) -> Iterator[ModelProto]:
    """The model at ``path``, written again when the block ends."""
    model = onnx.load(str(path), load_external_data=False)
    yield model
    path.write_bytes(model.SerializeToString())


def load(folder: Path) -> ModelProto:
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


def tensor(model: ModelProto, name: str) -> TensorProto:
    return next(constant for constant in model.graph.initializer if constant.name == name)


def mapped(folder: Path, constant: TensorProto) -> np.memmap:
    """The bytes of a constant in the data file, as they can be changed."""
    keys = {entry.key: entry.value for entry in constant.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(constant.data_type)
    return np.memmap(folder / keys["location"], dtype, "r+", int(keys["offset"]), tuple(constant.dims))


def appended(folder: Path, model: ModelProto, name: str, values: np.ndarray) -> None:
    """A constant at the end of the data file."""
    data = folder / "model.onnx.data"
    with data.open("ab") as file:
        file.write(b"\0" * (-file.tell() % 4096))
        offset = file.tell()
        file.write(values.tobytes())
    constant = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
    constant.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data.name), ("offset", offset), ("length", values.nbytes)):
        constant.external_data.add(key=key, value=str(value))
    model.graph.initializer.append(constant)


def attribute(node: NodeProto, name: str) -> onnx.AttributeProto:
    return next(found for found in node.attribute if found.name == name)


def attention(model: ModelProto, layer: int) -> NodeProto:
    past = f"past_key_values.{layer}.key"
    return next(node for node in model.graph.node if node.op_type == "GroupQueryAttention" and node.input[3] == past)


def rotations(model: ModelProto, layer: int) -> list[tuple[NodeProto, int]]:
    """The operators that rotate a layer, and which input of theirs is the sine; cosine comes before it."""
    node = attention(model, layer)
    if attribute(node, "do_rotary").i:
        return [(node, 8)]
    makers = {output: maker for maker in model.graph.node for output in maker.output}
    found = []
    for value in node.input[:2]:
        maker = makers[value]
        while maker.op_type in ("Reshape", "Pad"):
            maker = makers[maker.input[0]]
        if maker.op_type == "RotaryEmbedding":
            found.append((maker, 3))
    return found


def insert_before(model: ModelProto, node: NodeProto, new: NodeProto) -> None:
    model.graph.node.insert(list(model.graph.node).index(node), new)


# The faults


def swap_rotary_halves(folder: Path, place: Place) -> None:
    """Rotate by the negative angle, which is what exchanged halves do: the layer gets a sine of its own, negated."""
    with edited(folder / "model.onnx") as model:
        for index, (node, sine) in enumerate(rotations(model, place.layer)):
            if index == 0:
                values = -mapped(folder, tensor(model, node.input[sine]))
                model.graph.initializer.append(numpy_helper.from_array(values, "negative.sin"))
            node.input[sine] = "negative.sin"


def interleave_rotation(folder: Path, place: Place) -> None:
    """Pair neighbours instead of halves."""
    with edited(folder / "model.onnx") as model:
        for node, _ in rotations(model, place.layer):
            name = "rotary_interleaved" if node.op_type == "GroupQueryAttention" else "interleaved"
            attribute(node, name).i = 1


def shift_rotary_table(folder: Path, place: Place) -> None:
    """Position p rotates by the angle of p + 1; the last row stays."""
    model = load(folder)
    node, sine = rotations(model, place.layer)[0]
    for index in (sine - 1, sine):
        table = mapped(folder, tensor(model, node.input[index]))
        table[:-1] = table[1:].copy()


def shift_position(folder: Path, place: Place) -> None:
    """The layer's cache is written one row further on; or, if it is rotated before its attention, the rotation."""
    with edited(folder / "model.onnx") as model:
        node = attention(model, place.layer)
        if place.part == "cache":
            new = helper.make_node("Cast", ["total_int64"], ["last_position.shifted"], to=TensorProto.INT32)
            insert_before(model, node, new)
            node.input[5] = "last_position.shifted"
            return
        found = rotations(model, place.layer)
        one = numpy_helper.from_array(np.ones(1, np.int64), "one")
        model.graph.initializer.append(one)
        new = helper.make_node("Add", ["first_position", "one"], ["first_position.shifted"])
        insert_before(model, found[0][0], new)
        for rotation, _ in found:
            rotation.input[1] = "first_position.shifted"


def drop_bias(folder: Path, place: Place) -> None:
    """Zeros in its place."""
    (rows,) = place.rows
    mapped(folder, tensor(load(folder), rows.entry))[rows.start : rows.stop] = 0


def swap_nibbles(folder: Path, place: Place) -> None:
    """Of every byte of the tensor."""
    (rows,) = place.rows
    codes = mapped(folder, tensor(load(folder), rows.entry))[rows.start : rows.stop]
    codes[:] = (codes << 4) | (codes >> 4)


def exchange_scales(folder: Path, place: Place) -> None:
    """``row``: of two groups of one row; ``columns``: of two groups, in all rows; ``rows``: of two rows."""
    (rows,) = place.rows
    scales = mapped(folder, tensor(load(folder), f"{rows.entry.removesuffix('.rows')}.scales"))
    scales = scales[rows.start : rows.stop]
    match place.part:
        case "rows":
            other = int((scales[:, 0] != scales[0, 0]).argmax())
            scales[[0, other]] = scales[[other, 0]]
        case "columns":
            scales[:, [0, 1]] = scales[:, [1, 0]]
        case "row":
            row = int((scales[:, 0] != scales[:, 1]).argmax())
            scales[row, [0, 1]] = scales[row, [1, 0]]


def enlarge_epsilon(folder: Path, place: Place) -> None:
    """A thousand times."""
    with edited(folder / place.scope) as model:
        attribute(norms(model)[place.index], "epsilon").f *= 1000


def skip_layer(folder: Path, place: Place) -> None:
    """What comes out of the layer is what went in; its caches are still written."""
    with edited(folder / "model.onnx") as model:
        sums = residuals(model)
        before, after = sums[2 * place.layer].input[0], sums[2 * place.layer + 1]
        width = tensor(model, norms(model)[0].input[1]).dims[0]
        model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, width]), "unchanged"))
        total = after.output[3] if len(after.output) > 3 else after.output[0]
        insert_before(model, after, helper.make_node("Reshape", [before, "unchanged"], [total], name=f"{total}.same"))
        if after.op_type == "SkipSimplifiedLayerNormalization":
            epsilon = attribute(after, "epsilon").f
            inputs, outputs = [total, after.input[2]], [after.output[0]]
            insert_before(model, after, helper.make_node("RMSNormalization", inputs, outputs, epsilon=epsilon, axis=-1))
        model.graph.node.remove(after)


def ignore_window(folder: Path, place: Place) -> None:
    """Every key is seen."""
    with edited(folder / "model.onnx") as model:
        attribute(attention(model, place.layer), "local_window_size").i = -1


def widen_window(folder: Path, place: Place) -> None:
    """One key more is seen."""
    with edited(folder / "model.onnx") as model:
        attribute(attention(model, place.layer), "local_window_size").i += 1


def ignore_soft_cap(folder: Path, place: Place) -> None:
    """Scores stay as they are."""
    with edited(folder / "model.onnx") as model:
        attribute(attention(model, place.layer), "softcap").f = 0.0


def reverse_kv_heads(folder: Path, place: Place) -> None:
    """The heads' rows of a layer's keys and values, with their scales and biases, in reverse."""
    model = load(folder)
    names = {constant.name for constant in model.graph.initializer}
    heads = attribute(attention(model, place.layer), "kv_num_heads").i
    for entry, start, stop in place.rows:
        for name in {entry, f"{entry}.scales"} & names:
            rows = mapped(folder, tensor(model, name))[start:stop]
            rows[:] = rows.reshape(heads, -1, *rows.shape[1:])[::-1].reshape(rows.shape)


def untie_head(folder: Path, place: Place) -> None:
    """A copy of the head's matrix, or the embedding's, lies at the end of the data and is read in its place.

    In the copy a twentieth of the codes is off by one (``noise``), or row 7 is replaced by row 8 (``row``).
    """
    kind, _, where = place.part.partition(" of ")
    for index, name in enumerate(MODELS if place.scope == "both" else (place.scope,)):
        with edited(folder / name) as model:
            node, position = embedding(model) if where == "the embedding" else head(model)
            source = tensor(model, node.input[position])
            if index == 0:
                copy = altered(np.array(mapped(folder, source)), kind, bits=4 if is_int4(node) else 8)
                appended(folder, model, "untied", copy)
                added = model.graph.initializer[-1]
            else:
                model.graph.initializer.append(added)
            node.input[position] = "untied"
            if not any(source.name in other.input for other in model.graph.node):
                model.graph.initializer.remove(source)


def altered(values: np.ndarray, kind: str, bits: int) -> np.ndarray:
    if kind == "row":
        values[7] = values[8]
        return values
    flat = values.reshape(-1)
    chosen = np.random.default_rng(5).choice(flat.size, flat.size // 20, replace=False)
    if values.dtype == np.float32:
        flat[chosen] *= np.float32(1 + 2**-7)
    else:
        limit = 15 if bits == 4 else 255  # of a byte's low code
        low = flat[chosen] & limit
        flat[chosen] += np.where(low < limit, 1, -1).astype(flat.dtype)
    return values


# What a model holds


def norms(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type in NORMS]


def residuals(model: ModelProto) -> list[NodeProto]:
    """The operators that add to the residual: two a layer."""
    return [
        node
        for node in model.graph.node
        if node.op_type == "SkipSimplifiedLayerNormalization" or "hidden_states" in node.output
    ]


def head(model: ModelProto) -> tuple[NodeProto, int]:
    """The operator that makes the logits, and which of its inputs is the matrix."""
    return next(node for node in model.graph.node if "logits" in node.output), 1


def embedding(model: ModelProto) -> tuple[NodeProto, int]:
    """The operator that reads the ids, and which of its inputs is the matrix."""
    return next(node for node in model.graph.node if len(node.input) > 1 and node.input[1] == "input_ids"), 0


def is_int4(node: NodeProto) -> bool:
    return any(found.name == "bits" and found.i == 4 for found in node.attribute)


# Where each fault can be


def rotated_layers(folder: Path, manifest: Manifest) -> list[Place]:
    model = load(folder)
    return [Place(layer) for layer in chosen_layers(x for x in range(manifest.model.layers) if rotations(model, x))]


def rotary_tables(folder: Path, manifest: Manifest) -> list[Place]:
    """A layer for each table."""
    model = load(folder)
    layers: dict[str, int] = {}
    for layer in range(manifest.model.layers):
        for node, sine in rotations(model, layer):
            layers.setdefault(node.input[sine], layer)
    return [Place(layer) for layer in layers.values()]


def position_places(folder: Path, manifest: Manifest) -> list[Place]:
    model = load(folder)
    layers = chosen_layers(range(manifest.model.layers))
    outside = [
        layer for layer in layers if any(node.op_type == "RotaryEmbedding" for node, _ in rotations(model, layer))
    ]
    return [Place(layer, "cache") for layer in layers] + [Place(layer, "rotation") for layer in outside]


def norm_places(folder: Path, _manifest: Manifest) -> list[Place]:
    """Every one of both models."""
    return [
        Place(index=index, scope=file)
        for file in MODELS
        for index in range(len(norms(onnx.load(str(folder / file), load_external_data=False))))
    ]


def windowed_layers(folder: Path, manifest: Manifest) -> list[Place]:
    model = load(folder)
    layers = range(manifest.model.layers)
    windows = [layer for layer in layers if attribute(attention(model, layer), "local_window_size").i != -1]
    return [Place(layer) for layer in chosen_layers(windows)]


def soft_capped_layers(folder: Path, manifest: Manifest) -> list[Place]:
    model = load(folder)
    layers = range(manifest.model.layers)
    return [Place(layer) for layer in chosen_layers(x for x in layers if attribute(attention(model, x), "softcap").f)]


def head_places(_folder: Path, _manifest: Manifest) -> list[Place]:
    heads = [Place(part=part, scope=file) for part in ("noise", "row") for file in ("both", *MODELS)]
    return [*heads, *(Place(part=f"{kind} of the embedding", scope="model.onnx") for kind in ("noise", "row"))]


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {
    "rotary halves swapped": swap_rotary_halves,
    "rotary pairs interleaved": interleave_rotation,
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
}

PLACES: Mapping[str, Callable[[Path, Manifest], list[Place]]] = {
    "rotary halves swapped": rotated_layers,
    "rotary pairs interleaved": rotated_layers,
    "rotary table one row off": rotary_tables,
    "position off by one": position_places,
    "a bias missing": lambda _, manifest: bias_places("onnx", manifest),
    "nibbles swapped": lambda _, manifest: int4_places("onnx", manifest),
    "scales of two groups exchanged": lambda _, manifest: scale_places("onnx", manifest),
    "a norm's epsilon x1000": norm_places,
    "one layer skipped": lambda _, manifest: all_layers(manifest),
    "window ignored": windowed_layers,
    "window one too wide": windowed_layers,
    "soft cap ignored": soft_capped_layers,
    "key/value heads paired wrongly": lambda _, manifest: kv_head_places("onnx", manifest),
    "lm head untied": head_places,
}
