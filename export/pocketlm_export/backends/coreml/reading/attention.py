"""An attention of a written program, followed back from its softmax or its fused operator."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.coreml.reading.mask import read_mask
from pocketlm_export.backends.coreml.reading.positions import Positions
from pocketlm_export.backends.coreml.reading.walk import Walk
from pocketlm_export.backends.coreml.reading.written import WrittenOperator

__all__ = ["MIXING", "WrittenAttention", "attention_of", "mixings"]

MIXING = ("softmax", "scaled_dot_product_attention")
"""The two forms of an attention by the operator that stands for it: explicit, and fused."""

WHOLE_AXES = [False, True, False, True]
BY_HEAD = [0, 2, 1, 3]
Table = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class WrittenAttention:
    """What the program states of one layer. ``cosine`` and ``sine``: fp16 ``[context, pairs]``, None without rotation;
    ``tables`` their names. ``sparsity`` is that of :class:`WrittenMask`. ``fused``: one operator, which divides by the
    root of the width itself."""

    fused: bool
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    sparsity: tuple[int, int, int, int] | None
    softcap: float | None
    cosine: Table | None
    sine: Table | None
    tables: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Parts:
    """Names of what an attention mixes."""

    query: str
    keys: str
    values: str
    mask: str
    mixed: str
    softcap: float | None


def mixings(walk: Walk) -> Iterator[WrittenOperator]:
    """What stands for each attention, in the order of execution; a router's softmax is of a linear."""
    return (o for o in walk.operators if o.kind in MIXING and walk.kind_of(*o.inputs.get("x", ("",))) != "linear")


def attention_of(walk: Walk, positions: Positions, layer: int, mixing: WrittenOperator) -> WrittenAttention:
    """The ``layer``-th attention. Raises :class:`pocketlm.BundleError` naming the value that has another form."""
    fused = mixing.kind == MIXING[1]
    parts = _fused(mixing) if fused else _explicit(walk, mixing)
    grouped = walk.maker(parts.query, "reshape")
    query, scale = _scaled(walk, grouped.inputs["x"][0])
    query, tables = _unrotated(walk, positions, query)
    key, key_tables = _unrotated(walk, positions, _cached(walk, positions, parts.keys, "k_cache", layer))
    value = _cached(walk, positions, parts.values, "v_cache", layer)
    if tables != key_tables:
        raise walk.refused(query, f"queries are rotated by {tables}, keys by {key_tables}")
    heads, head_dim = _heads(walk, query)
    kv_heads = _heads(walk, key)[0]
    if _heads(walk, key) != _heads(walk, value) or _heads(walk, key)[1] != head_dim or heads % kv_heads:
        raise walk.refused(query, f"heads {_heads(walk, query)}, of keys {_heads(walk, key)}")
    group = heads // kv_heads
    walk.expect(grouped, shape=[1, kv_heads, group if positions.steps else -1, head_dim])
    _expect_heads_side_by_side(walk, parts.mixed, positions, heads, head_dim)
    cosine, sine = _tables(walk, tables)
    mask = read_mask(walk, positions, parts.mask, heads, kv_heads)
    return WrittenAttention(
        fused, heads, kv_heads, head_dim, scale / head_dim**0.5 if fused else scale,
        mask.window, mask.sparsity, parts.softcap, cosine, sine, tables,
    )  # fmt: skip


def _fused(mixing: WrittenOperator) -> _Parts:
    query, keys, values, mask = (mixing.inputs[name][0] for name in ("query", "key", "value", "attn_mask"))
    return _Parts(query, keys, values, mask, mixing.outputs[0], None)


def _explicit(walk: Walk, softmax: WrittenOperator) -> _Parts:
    walk.expect(softmax, axis=-1)
    masked = walk.maker(softmax.inputs["x"][0], "add")
    scores, softcap = masked.inputs["x"][0], None
    if walk.kind_of(scores) == "mul":
        capped = walk.maker(scores, "mul")
        divided = walk.maker(walk.chain(scores, ("mul", "x"), ("tanh", "x")), "real_div")
        softcap = walk.number(capped, "y")
        walk.expect(divided, y=softcap)
        scores = divided.inputs["x"][0]
    product = walk.maker(scores, "matmul")
    walk.expect(product, transpose_x=False, transpose_y=True)
    mixing = walk.reader(softmax.outputs[0], "matmul")
    walk.expect(mixing, transpose_x=False, transpose_y=False)
    walk.same([*mixing.inputs["x"], *softmax.outputs], "weights of values")
    query, keys = (product.inputs[side][0] for side in ("x", "y"))
    return _Parts(query, keys, mixing.inputs["y"][0], masked.inputs["y"][0], mixing.outputs[0], softcap)


def _scaled(walk: Walk, name: str) -> tuple[str, float]:
    """What is scaled, and by what: 1 is left out."""
    if walk.kind_of(name) == "mul" and "y" in walk.maker(name, "mul").attributes:
        product = walk.maker(name, "mul")
        return product.inputs["x"][0], walk.number(product, "y")
    return name, 1.0


def _cached(walk: Walk, positions: Positions, name: str, state: str, layer: int) -> str:
    """What was written at this call's positions into the row of ``state`` that ``name`` is: it must be ``layer``."""
    row = walk.maker(name, "slice_by_index")
    walk.expect(row, begin=[layer, 0, 0, 0], end=[layer + 1, 0, 0, 0], end_mask=[False, True, True, True])
    whole = walk.maker(row.inputs["x"][0], "read_state")
    before = walk.operators[: walk.operators.index(whole)]
    writes = [o for o in before if o.kind == "write_state" and o.inputs["input"] == (state,)]
    if whole.inputs["input"] != (state,) or not writes:
        raise walk.refused(name, f"not read from what was written into {state}")
    update = walk.maker(writes[-1].inputs["data"][0], "slice_update")
    walk.expect(update, begin_mask=WHOLE_AXES, end_mask=WHOLE_AXES)
    for parameter, row_number, position in (("begin", layer, positions.begin), ("end", layer + 1, positions.end)):
        corner = walk.maker(update.inputs[parameter][0], "concat")
        walk.expect(corner, axis=0, interleave=False)
        if walk.numbers(corner, "values") != [row_number, 0] or corner.inputs["values"][1] != position:
            raise walk.refused(corner.outputs[0], f"not row {row_number} at {position}")
    return update.inputs["update"][0]


def _unrotated(walk: Walk, positions: Positions, name: str) -> tuple[str, tuple[str, ...]]:
    """What ``x * cosine + swapped(x) * sine`` rotates, and the names of the two tables; as it is if it isn't."""
    rest: tuple[str, ...] = ()
    if walk.kind_of(name) == "concat":
        outer = walk.maker(name, "concat")
        walk.expect(outer, axis=-1, interleave=False)
        name, *others = outer.inputs["values"]
        rest = tuple(others)
    elif walk.kind_of(name) != "add":
        return name, ()
    total = walk.maker(name, "add")
    straight, crossed = (walk.maker(total.inputs[side][0], "mul") for side in ("x", "y"))
    swapped = walk.maker(crossed.inputs["x"][0], "concat")
    split = walk.maker(swapped.inputs["values"][0], "split")
    halves = split.outputs[:2]
    sizes = walk.numbers(split, "split_sizes")
    walk.expect(split, axis=-1)
    walk.expect(swapped, axis=-1, interleave=False)
    turned = straight.inputs["x"][0]
    unturned = split.inputs["x"][0]
    if rest:
        walk.expect(walk.maker(turned, "concat"), axis=-1, interleave=False)
        whole = walk.maker(turned, "concat").inputs["values"] == halves
    else:
        whole = turned == unturned
    if not whole or swapped.inputs["values"] != halves[::-1] or split.outputs[2:] != rest or sizes[0] != sizes[1]:
        raise walk.refused(name, "not a rotation of the two halves of the first elements")
    return unturned, tuple(_gathered(walk, positions, product.inputs["y"][0]) for product in (straight, crossed))


def _gathered(walk: Walk, positions: Positions, name: str) -> str:
    gather = walk.maker(name, "gather")
    walk.expect(gather, axis=0, batch_dims=0)
    walk.same([*gather.inputs["indices"], positions.each], "a table read at another position")
    return gather.inputs["x"][0]


def _tables(walk: Walk, names: tuple[str, ...]) -> tuple[Table | None, Table | None]:
    """Each is stored twice side by side, sine with the minus of the first half."""
    if not names:
        return None, None
    halves = []
    for name, sign in zip(names, (1, -1), strict=True):
        whole: Any = walk.table(name)
        first, second = np.split(whole, 2, axis=1) if whole.ndim == 2 and whole.shape[1] % 2 == 0 else (whole, None)
        if second is None or not np.array_equal(first, sign * second):
            raise walk.refused(name, "its halves are not one table twice")
        halves.append(second)
    return halves[0], halves[1]


def _heads(walk: Walk, name: str) -> tuple[int, int]:
    """``[1, S, heads * width]`` -> ``[1, heads, S, width]``, normalized or not: heads and width."""
    transpose = walk.maker(name, "transpose")
    walk.expect(transpose, perm=BY_HEAD)
    source = transpose.inputs["x"][0]
    if walk.kind_of(source) == "mul":
        source = walk.chain(source, ("mul", "x"), ("mul", "x"), ("real_div", "x"))
    shape = walk.numbers(walk.maker(source, "reshape"), "shape")
    if len(shape) != 4 or shape[0] != 1:
        raise walk.refused(source, f"shape {shape}, where [1, S, heads, width] is expected")
    return shape[2], shape[3]


def _expect_heads_side_by_side(walk: Walk, mixed: str, positions: Positions, heads: int, head_dim: int) -> None:
    """``[1, kv_heads, group * S, width]`` goes back to ``[1, S, heads * width]``."""
    length = 1 if positions.steps else -1
    apart = walk.reader(mixed, "reshape")
    walk.expect(apart, shape=[1, heads, length, head_dim])
    turned = walk.reader(apart.outputs[0], "transpose")
    walk.expect(turned, perm=BY_HEAD)
    walk.expect(walk.reader(turned.outputs[0], "reshape"), shape=[1, length, heads * head_dim])
