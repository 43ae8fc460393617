"""What a mask of a written program hides: what lies ahead, behind a window, and in blocks that a head skips."""

from dataclasses import dataclass

import numpy as np

from pocketlm_export.backends.coreml.reading.positions import Positions
from pocketlm_export.backends.coreml.reading.walk import Walk
from pocketlm_export.backends.coreml.reading.written import WrittenOperator

__all__ = ["WrittenMask", "read_mask"]

MASKED = -30000.0


@dataclass(frozen=True, slots=True)
class WrittenMask:
    """``sparsity``: size of a block, local blocks, stride, and shift from head to head; None: every block is seen."""

    window: int | None
    sparsity: tuple[int, int, int, int] | None


def read_mask(walk: Walk, positions: Positions, name: str, heads: int, kv_heads: int) -> WrittenMask:
    """Of the mask ``name``, with 0 where a key is seen and MASKED where it is not. Raises
    :class:`pocketlm.BundleError` naming the value that has another form."""
    group = heads // kv_heads
    if walk.kind_of(name) == "reshape":
        apart = walk.maker(name, "reshape")
        rows = group if positions.steps else -1
        walk.expect(apart, shape=[1, kv_heads, rows, positions.context_length])
        either = walk.maker(_hidden(walk, apart.inputs["x"][0]), "logical_or")
        window = _window(walk, positions, either.inputs["x"][0])
        return WrittenMask(window, _sparsity(walk, positions, either.inputs["y"][0], heads))
    if group > 1 and not positions.steps:
        walk.expect(walk.maker(name, "tile"), reps=[1, 1, group, 1])
        name = walk.chain(name, ("tile", "x"))
    widened = walk.maker(name, "expand_dims")
    walk.expect(widened, axes=[0, 1])
    return WrittenMask(_window(walk, positions, _hidden(walk, widened.inputs["x"][0])), None)


def _hidden(walk: Walk, name: str) -> str:
    valued = walk.maker(name, "mul")
    walk.expect(valued, y=MASKED)
    return walk.chain(valued.inputs["x"][0], ("cast", "x"))


def _window(walk: Walk, positions: Positions, hidden: str) -> int | None:
    window = None
    if walk.kind_of(hidden) == "logical_or":
        either = walk.maker(hidden, "logical_or")
        hidden = either.inputs["x"][0]
        behind = walk.maker(either.inputs["y"][0], "less_equal")
        bound = walk.maker(behind.inputs["y"][0], "sub")
        _expect_axis(walk, behind.inputs["x"][0], positions.every, 0)
        _expect_axis(walk, bound.inputs["x"][0], positions.each, 1)
        window = int(walk.number(bound, "y"))
    ahead = walk.maker(hidden, "greater")
    _expect_axis(walk, ahead.inputs["x"][0], positions.every, 0)
    _expect_axis(walk, ahead.inputs["y"][0], positions.each, 1)
    return window


def _sparsity(walk: Walk, positions: Positions, name: str, heads: int) -> tuple[int, int, int, int]:
    """Of ``far and phase != 0``: as many blocks behind the query's as are local, and not of a block of the stride."""
    both = walk.maker(name, "logical_and")
    far = walk.maker(both.inputs["x"][0], "greater_equal")
    distance = walk.maker(far.inputs["x"][0], "sub")
    of_query, of_key = (walk.maker(distance.inputs[side][0], "floor_div") for side in ("x", "y"))
    _expect_axis(walk, of_query.inputs["x"][0], positions.each, 1)
    _expect_axis(walk, of_key.inputs["x"][0], positions.every, 0)
    block_size = int(walk.number(of_query, "y"))
    walk.expect(of_key, y=block_size)
    off = walk.maker(both.inputs["y"][0], "not_equal")
    walk.expect(off, y=0)
    phase = walk.maker(off.inputs["x"][0], "mod")
    shifted = walk.maker(phase.inputs["x"][0], "add")
    walk.same([*shifted.inputs["x"], *of_key.outputs], "a phase of other blocks")
    shift, stride = _shift(walk, shifted, heads), int(walk.number(phase, "y"))
    if block_size < 1 or stride < 1:
        raise walk.refused(name, f"blocks of {block_size} positions, every {stride}th seen")
    return block_size, int(walk.number(far, "y")), stride, shift


def _shift(walk: Walk, shifted: WrittenOperator, heads: int) -> int:
    """Of ``1, 1 + shift, 1 + 2 * shift, ...``, one for each head."""
    stated = shifted.attributes.get("y")
    if not isinstance(stated, np.ndarray) or stated.shape != (heads, 1, 1) or stated.dtype.kind != "i":
        raise walk.refused(shifted.outputs[0], f"not one shift for each of {heads} heads")
    each = stated.reshape(-1)
    shift = int(each[1] - each[0]) if heads > 1 else 0
    if not np.array_equal(each, 1 + shift * np.arange(heads)):
        raise walk.refused(shifted.outputs[0], "shifts that don't grow by the same from head to head")
    return shift


def _expect_axis(walk: Walk, name: str, source: str, axis: int) -> None:
    """``name`` is ``source`` with a new axis there."""
    widened = walk.maker(name, "expand_dims")
    walk.expect(widened, axes=[axis])
    walk.same([*widened.inputs["x"], source], "a mask of other positions")
