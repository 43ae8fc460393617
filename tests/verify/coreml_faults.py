"""Faults put into a written Core ML package by editing its files: operators in the message, weights in weight.bin.

:data:`FAULTS` maps a fault to the function that puts it into a package (a copy) at a :class:`Place`; :func:`places`
lists where a package can hold it: the first, the middle and the last layer in all functions, and one in each function
alone. Packages stay valid: each fault computes something else, none is a broken file.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pocketlm.manifest import Manifest
from tests.verify.coreml_editing import FUNCTIONS, appended, blocks, change, edited, mapped
from tests.verify.coreml_operators import Block, Layer
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

__all__ = ["FAULTS", "Place", "Rows", "functions_of", "places", "scoped"]


def places(fault: str, package: Path, manifest: Manifest) -> list[Place]:
    """Every place of ``package`` that differs for ``fault``; none if it can't hold the fault."""
    return scoped(PLACES[fault](package, manifest))


def scoped(everywhere: list[Place]) -> list[Place]:
    """These, in all functions, and the first of them in each function alone."""
    return [*everywhere, *(replace(place, scope=name) for place in everywhere[:1] for name in FUNCTIONS)]


def functions_of(place: Place) -> tuple[str, ...]:
    """The functions that get the fault: one of them, or all."""
    return (place.scope,) if place.scope else FUNCTIONS


# The faults


def swap_rotary_halves(package: Path, place: Place) -> None:
    """``negative``: rotate by the negative angle; ``in order``: each half meets the sine of itself."""
    with edited(package) as found:
        for name in functions_of(place):
            layer = Layer(found[name], place.layer)
            for rotated in layer.rotated():
                if place.part == "negative":
                    rotated.type = "sub"
                else:
                    crossed = found[name].maker(found[name].input(rotated, "y"))
                    swapped = found[name].maker(found[name].input(crossed, "x"))
                    first, second = (binding.name for binding in swapped.inputs["values"].arguments)
                    found[name].bind(swapped, "values", second, first)


def shift_rotary_table(package: Path, place: Place) -> None:
    """Position p rotates by the angle of p + 1; the last row stays."""

    def shift(arrays: dict[str, np.ndarray]) -> None:
        arrays["val"][:-1] = arrays["val"][1:].copy()

    for table in tables_of(package, place.layer):
        change(package, table, functions_of(place), shift)


def shift_position(package: Path, place: Place) -> None:
    """By one: where the layer's keys and values are written, what they and the queries are rotated by, or what the
    layer's mask hides."""
    with edited(package) as found:
        for name in functions_of(place):
            block, layer = found[name], Layer(found[name], place.layer)
            match place.part:
                case "cache":
                    for update in layer.updates():
                        for parameter in ("begin", "end"):
                            corner = block.clone(block.input(update, parameter), update)
                            row, position, head = (binding.name for binding in corner.inputs["values"].arguments)
                            block.bind(corner, "values", row, block.plus_one(position, corner), head)
                            block.bind(update, parameter, corner.outputs[0].name)
                case "rotation":
                    for rotated in layer.rotated():
                        for side in ("x", "y"):
                            product = block.maker(block.input(rotated, side))
                            gather = block.clone(block.input(product, "y"), product)
                            block.bind(gather, "indices", block.plus_one(block.input(gather, "indices"), gather))
                            block.bind(product, "y", gather.outputs[0].name)
                case "mask":
                    for comparison in block.masks(place.layer):
                        widened = block.maker(block.input(comparison, "y"))
                        if widened.type == "sub":
                            widened = block.maker(block.input(widened, "x"))
                        if not block.input(widened, "x").endswith("plus_one"):
                            block.bind(widened, "x", block.plus_one(block.input(widened, "x"), widened))


def drop_bias(package: Path, place: Place) -> None:
    """Zeros in its place."""
    (rows,) = place.rows

    def zero(arrays: dict[str, np.ndarray]) -> None:
        arrays["val"][rows.start : rows.stop] = 0

    change(package, rows.entry, functions_of(place), zero)


def swap_nibbles(package: Path, place: Place) -> None:
    """Of every byte of the tensor."""
    (rows,) = place.rows

    def swap(arrays: dict[str, np.ndarray]) -> None:
        codes = arrays["data"][rows.start : rows.stop]
        codes[:] = (codes << 4) | (codes >> 4)

    change(package, rows.entry, functions_of(place), swap)


def exchange_scales(package: Path, place: Place) -> None:
    """``row``: of two groups of one row; ``columns``: of two groups, in all rows; ``rows``: of two rows."""
    (rows,) = place.rows

    def exchange(arrays: dict[str, np.ndarray]) -> None:
        scales = arrays["scale"][rows.start : rows.stop]
        match place.part:
            case "rows":
                other = int((scales[:, 0] != scales[0, 0]).argmax())
                scales[[0, other]] = scales[[other, 0]]
            case "columns":
                scales[:, [0, 1]] = scales[:, [1, 0]]
            case "row":
                row = int((scales[:, 0] != scales[:, 1]).argmax())
                scales[row, [0, 1]] = scales[row, [1, 0]]

    change(package, rows.entry, functions_of(place), exchange)


def enlarge_epsilon(package: Path, place: Place) -> None:
    """A thousand times."""
    with edited(package) as found:
        for name in functions_of(place):
            block = found[name]
            inverse = block.of_kind("rsqrt")[place.index]
            squared = block.maker(block.input(block.maker(block.input(inverse, "x")), "y"))
            root = block.maker(block.input(squared, "x"))
            stored = block.maker(block.input(root, "x")).attributes["val"].immediateValue.tensor.bytes
            enlarged = np.frombuffer(stored.values, "<f2").astype(np.float64) * 1000**0.5
            stored.values = enlarged.astype("<f2").tobytes()


def skip_layer(package: Path, place: Place) -> None:
    """What comes out of the layer is what went in; its caches are still written."""
    with edited(package) as found:
        for name in functions_of(place):
            block = found[name]
            sums = block.residuals()
            before, after = block.input(sums[2 * place.layer], "x"), sums[2 * place.layer + 1].outputs[0].name
            block.read_instead(after, before)


def ignore_window(package: Path, place: Place) -> None:
    """Every key that doesn't lie ahead is seen."""
    with edited(package) as found:
        for name in functions_of(place):
            block = found[name]
            either = block.own_mask(place.layer)
            block.read_instead(either.outputs[0].name, block.input(either, "x"))


def widen_window(package: Path, place: Place) -> None:
    """One key more is seen."""
    with edited(package) as found:
        for name in functions_of(place):
            block = found[name]
            either = block.own_mask(place.layer)
            behind = block.clone(block.input(either, "y"), either)
            bound = block.clone(block.input(behind, "y"), behind)
            block.bind(bound, "y", block.plus_one(block.input(bound, "y"), bound))
            block.bind(behind, "y", bound.outputs[0].name)
            block.bind(either, "y", behind.outputs[0].name)


def ignore_soft_cap(package: Path, place: Place) -> None:
    """Scores stay as they are."""
    with edited(package) as found:
        for name in functions_of(place):
            layer = Layer(found[name], place.layer)
            found[name].bind(layer.masked, "x", layer.product.outputs[0].name)


def reverse_kv_heads(package: Path, place: Place) -> None:
    """The heads' rows of a layer's keys and values, with their scales and biases, in reverse."""
    heads = int(place.part.split()[0])
    for entry in dict.fromkeys(rows.entry for rows in place.rows):
        parts = [rows for rows in place.rows if rows.entry == entry]

        def reverse(arrays: dict[str, np.ndarray], parts: list[Rows] = parts) -> None:
            for array in arrays.values():
                for _, start, stop in parts:
                    rows = array[start:stop]
                    rows[:] = rows.reshape(heads, -1, *rows.shape[1:])[::-1].reshape(rows.shape)

        change(package, entry, functions_of(place), reverse)


def untie_head(package: Path, place: Place) -> None:
    """The head, or the embedding, reads a copy in which a twentieth of the codes is off by one (``noise``), or row 7 is
    replaced by row 8 (``row``)."""
    kind, _, where = place.part.partition(" of ")
    parameter = "x" if where == "the embedding" else "weight"
    with edited(package) as found:
        ends = {name: (b.embedding() if where == "the embedding" else b.maker("logits")) for name, b in found.items()}
        entry = found[FUNCTIONS[0]].input(ends[FUNCTIONS[0]], parameter)
        offsets = {part: appended(package, value) for part, value in found[FUNCTIONS[0]].parts(entry).items()}
        for name in functions_of(place):
            copied = found[name].clone(entry, ends[name], "_untied")
            for part, value in found[name].parts(copied.outputs[0].name).items():
                value.blobFileValue.offset = offsets[part]
            found[name].bind(ends[name], parameter, copied.outputs[0].name)
        values = found[functions_of(place)[0]].parts(f"{entry}_untied")
        alter_codes({part: mapped(package, value) for part, value in values.items()}, kind)


def alter_codes(arrays: dict[str, np.ndarray], kind: str) -> None:
    if kind == "row":
        for array in arrays.values():
            array[7] = array[8]
        return
    codes = arrays["data"] if "data" in arrays else arrays["val"]
    flat = codes.reshape(-1)
    chosen = np.random.default_rng(5).choice(flat.size, flat.size // 20, replace=False)
    if codes.dtype == np.float16:
        flat[chosen] *= np.float16(1 + 2**-7)
    elif codes.dtype == np.int8:
        flat[chosen] += np.where(flat[chosen] < 127, 1, -1).astype(np.int8)
    else:  # the low one of two codes of four bits, -8 to 7
        flat[chosen] = (flat[chosen] & 0xF0) | ((flat[chosen] ^ 1) & 0xF)


# Where each fault can be


def tables_of(package: Path, layer: int) -> tuple[str, ...]:
    """The names of a layer's cosine and sine; none without rotation."""
    block = blocks(package)[FUNCTIONS[0]]
    found = Layer(block, layer).rotated()
    if not found:
        return ()
    products = [block.maker(block.input(found[0], side)) for side in ("x", "y")]
    return tuple(block.input(block.maker(block.input(product, "y")), "x") for product in products)


def layers_where(package: Path, manifest: Manifest, holds: Callable[[Block, int], bool]) -> list[int]:
    block = blocks(package)[FUNCTIONS[0]]
    return chosen_layers(layer for layer in range(manifest.model.layers) if holds(block, layer))


def rotated_layers(package: Path, manifest: Manifest) -> list[Place]:
    layers = layers_where(package, manifest, lambda block, layer: bool(Layer(block, layer).rotated()))
    return [Place(layer, part) for part in ("negative", "in order") for layer in layers]


def rotary_tables(package: Path, manifest: Manifest) -> list[Place]:
    """A layer for each table."""
    layers: dict[tuple[str, ...], int] = {}
    for layer in range(manifest.model.layers):
        layers.setdefault(tables_of(package, layer), layer)
    return [Place(layer) for tables, layer in layers.items() if tables]


def position_places(package: Path, manifest: Manifest) -> list[Place]:
    rotated = layers_where(package, manifest, lambda block, layer: bool(Layer(block, layer).rotated()))
    parts = {"cache": chosen_layers(range(manifest.model.layers)), "rotation": rotated, "mask": [0]}
    return [Place(layer, part) for part, layers in parts.items() for layer in layers]


def norm_places(package: Path, _manifest: Manifest) -> list[Place]:
    """Every one."""
    return [Place(index=index) for index in range(len(blocks(package)[FUNCTIONS[0]].of_kind("rsqrt")))]


def windowed_layers(package: Path, manifest: Manifest) -> list[Place]:
    return [Place(x) for x in layers_where(package, manifest, lambda block, layer: len(block.masks(layer)) > 1)]


def soft_capped_layers(package: Path, manifest: Manifest) -> list[Place]:
    return [Place(x) for x in layers_where(package, manifest, lambda block, layer: Layer(block, layer).capped)]


def head_places(_package: Path, manifest: Manifest) -> list[Place]:
    """The head; where it is the embedding, that too."""
    ends = ("the head", "the embedding") if manifest.model.tied else ("the head",)
    return [Place(part=f"{kind} of {end}") for end in ends for kind in ("noise", "row")]


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
}

PLACES: Mapping[str, Callable[[Path, Manifest], list[Place]]] = {
    "rotary halves swapped": rotated_layers,
    "rotary table one row off": rotary_tables,
    "position off by one": position_places,
    "a bias missing": lambda _, manifest: bias_places("coreml", manifest),
    "nibbles swapped": lambda _, manifest: int4_places("coreml", manifest),
    "scales of two groups exchanged": lambda _, manifest: scale_places("coreml", manifest),
    "a norm's epsilon x1000": norm_places,
    "one layer skipped": lambda _, manifest: all_layers(manifest),
    "window ignored": windowed_layers,
    "window one too wide": windowed_layers,
    "soft cap ignored": soft_capped_layers,
    "key/value heads paired wrongly": lambda _, manifest: kv_head_places("coreml", manifest),
    "lm head untied": head_places,
}
