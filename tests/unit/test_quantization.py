"""What the integers and scales promise, whatever the weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocketlm_export.quantization.rounding import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    pack_nibbles,
    quantize_rows,
    unpack_nibbles,
)
from pocketlm_export.quantization.schemes import GROUPS, HEADS, SCHEMES, SchemeRow, fitting_row, scheme_row, stored_bits

INT4, INT8 = SCHEMES["int4"], SCHEMES["int8"]
ROWS = pytest.mark.parametrize("row", (INT4, INT8), ids=lambda row: row.name)
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)
USUAL = st.floats(-8, 8, width=32)


def matrices(elements=FLOATS):
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 4).map(lambda groups: 32 * groups))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


def by_group(values: np.ndarray, row: SchemeRow) -> np.ndarray:
    return values.reshape(values.shape[0], -1, row.group or values.shape[1]).astype(np.float64)


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(0, 4), st.integers(0, 40).map(lambda n: 2 * n)), elements=st.integers(-8, 7)
    )
)
def test_unpacking_nibbles_is_the_inverse_of_packing(codes):
    packed = pack_nibbles(codes)
    assert packed.shape == (codes.shape[0], codes.shape[1] // 2)
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


def test_the_even_column_is_the_low_nibble():
    assert pack_nibbles(np.array([[1, -2]], np.int8)).tolist() == [[0xE1]]


@ROWS
@settings(deadline=None)
@given(values=matrices())
def test_scales_are_positive_bounded_and_exact_in_both_half_types(row, values):
    _, scales = quantize_rows(values, row)
    assert scales.dtype == np.float32
    assert scales.shape == (values.shape[0], values.shape[1] // (row.group or values.shape[1]))
    assert (scales >= SMALLEST_SCALE).all()
    assert (scales <= LARGEST_SCALE).all()
    assert not (scales.view(np.uint32) & 0xFFFF).any(), "not a bfloat16"
    np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)


@ROWS
@settings(deadline=None)
@given(values=matrices())
def test_codes_stay_in_their_range(row, values):
    codes, _ = quantize_rows(values, row)
    assert codes.dtype == np.int8
    assert codes.shape == values.shape
    assert codes.min() >= (-8 if row.bits == 4 else -127)
    assert codes.max() <= (7 if row.bits == 4 else 127)


@ROWS
@settings(deadline=None)
@given(values=matrices(USUAL))
def test_the_error_is_at_most_half_a_scale(row, values):
    codes, scales = quantize_rows(values, row)
    grouped, wide = by_group(values, row), scales[:, :, None].astype(np.float64)
    lowest, highest = (-8, 7) if row.bits == 4 else (-127, 127)
    # Rounding a scale down to bfloat16 (by 2^-9 at most) can clip a group's largest value.
    representable = np.clip(grouped, lowest * wide, highest * wide)
    assert (np.abs(representable - by_group(codes, row) * wide) <= wide / 2 * (1 + 1e-6)).all()
    assert (np.abs(grouped - representable) <= np.abs(grouped) * 2**-8).all()


@ROWS
@settings(deadline=None)
@given(values=matrices(USUAL))
def test_a_group_uses_its_codes_to_the_end(row, values):
    codes, scales = quantize_rows(values, row)
    codes, ordinary = by_group(codes, row), scales > SMALLEST_SCALE
    top = 7 if row.bits == 4 else 127
    reaches = (codes.max(-1) >= top) | (codes.min(-1) <= -top)
    assert reaches[ordinary].all()


@ROWS
def test_the_input_is_left_as_it_is(row):
    values = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    values.setflags(write=False)
    quantize_rows(values, row)
    np.testing.assert_array_equal(values, np.linspace(-1, 1, 32, dtype=np.float32)[None])


@ROWS
def test_a_group_of_zeros_gets_the_smallest_scale(row):
    codes, scales = quantize_rows(np.zeros((3, 64), np.float32), row)
    assert (scales == SMALLEST_SCALE).all()
    assert not codes.any()


def test_int4_takes_the_side_that_needs_more():
    values = np.zeros((1, 64), np.float32)
    values[0, 0], values[0, 1] = 7.0, -4.0  # 7/7 beats 4/8
    values[0, 32], values[0, 33] = 3.5, -8.0  # 8/8 beats 3.5/7
    codes, scales = quantize_rows(values, INT4)
    assert scales.tolist() == [[1.0, 1.0]]
    assert (codes[0, 0], codes[0, 33]) == (7, -8)


def test_int8_is_symmetric():
    codes, scales = quantize_rows(np.array([[127.0, -127.0]], np.float32), INT8)
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[127, -127]]


@given(st.integers(1, 9), st.integers(1, 9))
def test_stored_bits_count_codes_and_scales(rows, groups):
    columns = 32 * groups
    assert stored_bits(INT4, (rows, columns)) == rows * columns * 4 + rows * groups * 16
    assert stored_bits(INT8, (rows, columns)) == rows * columns * 8 + rows * 16
    assert stored_bits(None, (rows, columns)) == rows * columns * 32


def test_the_tables_name_themselves():
    assert {name: row and row.name for name, row in SCHEMES.items()} == {"fp32": None, "int8": "int8", "int4": "int4"}
    assert {name: row.name for name, row in HEADS.items()} == {"int8": "int8", "int4": "int4"}


def test_rows_by_class_of_tensor(tiny_checkpoint):
    from pocketlm_export.architectures import build_graph
    from pocketlm_export.checkpoint.checkpoint import open_checkpoint
    from pocketlm_export.quantization.schemes import assign_rows

    folder, _ = tiny_checkpoint("llama-odd-widths")  # hidden 100 and intermediate 76: neither a multiple of 32
    graph = build_graph(open_checkpoint(folder).config, 160)
    rows = assign_rows(graph, "int4", "int4")
    names = {name: row and row.name for name, row in rows.items()}
    assert names["model.layers.0.self_attn.o_proj.weight"] == "int4"  # 4 heads x 32 columns
    assert names["model.layers.0.self_attn.q_proj.weight"] == "int8"
    assert names["model.layers.0.mlp.down_proj.weight"] == "int8"
    assert names["model.embed_tokens.weight"] == "int8"
    assert names["model.norm.weight"] is None
    assert set(assign_rows(graph, "fp32", "int4").values()) == {None}


@pytest.mark.parametrize(
    ("columns", "groups"),
    ((4864, (32, 64, 128)), (576, (32, 64, 64)), (96, (32, 32, 32)), (100, (None, None, None))),
)
def test_a_group_that_does_not_divide_the_columns_gives_way_to_a_smaller_one(columns, groups):
    rows = [fitting_row(scheme_row("int4", group), (8, columns)) for group in GROUPS]
    assert [row.group for row in rows] == list(groups)
    assert {row.name for row in rows} == {"int4" if groups[0] else "int8"}
    assert fitting_row(scheme_row("int8"), (8, columns)) == INT8
