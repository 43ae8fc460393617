"""Rows of a tensor as a weight of its own: names, shapes, and values that are numpy's."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pocketlm.errors import CheckpointError
from pocketlm_export.checkpoint.checkpoint import Tensors
from pocketlm_export.checkpoint.tensors import TensorFile
from pocketlm_export.selection import RowSelection, selected, tensor_of

NAME = "model.layers.0.self_attn.qkv_proj.weight"


@st.composite
def selections(draw) -> tuple[RowSelection, int]:
    """A selection, and a number of rows that it fits."""
    period = draw(st.integers(1, 12))
    start = draw(st.integers(0, period - 1))
    return RowSelection(start, draw(st.integers(start + 1, period)), period), period * draw(st.integers(1, 7))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("selection") / "model.safetensors"


@given(selections())
def test_a_name_gives_back_tensor_and_selection(drawn):
    selection, _ = drawn
    assert selected(selection.of(NAME)) == (NAME, selection)
    assert tensor_of(selection.of(NAME)) == NAME


@pytest.mark.parametrize("name", (NAME, f"{NAME}[1:2]", f"{NAME}[1:2 of x]", f"{NAME}[1:2 of 3] ", "[0:1 of 2]"))
def test_any_other_name_is_a_tensor(name):
    assert selected(name) == (name, None)


@given(selections(), st.integers(1, 5), st.integers(1, 60))
def test_blocks_are_the_rows_that_numpy_selects(path, drawn, width, elements):
    selection, rows = drawn
    values = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    save_file({NAME: values, "bias": values[:, 0].copy()}, path)
    expected = values[[selection.start <= row % selection.period < selection.stop for row in range(rows)]]
    assert selection.fits(rows)
    assert selection.count(rows) == len(expected)
    file = TensorFile(path)
    blocks = list(file.float_blocks(NAME, elements, selection))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), expected)
    assert [start for start, _ in blocks] == np.cumsum([0, *(len(block) for _, block in blocks[:-1])]).tolist()
    assert all(len(block) <= max(1, elements // width) for _, block in blocks)

    tensors = Tensors({NAME: file, "bias": file})
    assert selection.of(NAME) in tensors
    assert tensors.shape(selection.of(NAME)) == expected.shape
    np.testing.assert_array_equal(tensors.values(selection.of(NAME)), expected)
    np.testing.assert_array_equal(tensors.values(selection.of("bias")), expected[:, 0])


@given(selections())
def test_pieces_of_a_period_together_are_the_tensor(drawn):
    selection, rows = drawn
    cuts = sorted({0, selection.start, selection.stop, selection.period})
    pieces = [RowSelection(start, stop, selection.period) for start, stop in pairwise(cuts)]
    assert sum(piece.count(rows) for piece in pieces) == rows


@pytest.mark.parametrize(
    ("selection", "rows"), [((0, 2, 3), 7), ((2, 2, 3), 6), ((1, 4, 3), 6), ((0, 1, 1), 0), ((0, 0, 0), 5)]
)
def test_what_does_not_fit_is_not_there(selection, rows):
    assert not RowSelection(*selection).fits(rows)


def test_a_digest_is_of_the_tensor_and_of_which_rows(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    names = [RowSelection(0, 1, 2).of("w"), RowSelection(1, 2, 2).of("w"), RowSelection(0, 3, 6).of("w")]
    digests = set()
    for scale in (1, 2):
        save_file({"w": values * scale}, tmp_path / f"{scale}.safetensors")
        tensors = Tensors({"w": TensorFile(tmp_path / f"{scale}.safetensors")})
        digests |= {tensors.digest(name) for name in (*names, "w")}
    assert len(digests) == 8


def test_a_value_that_is_not_finite_is_named_by_its_row_of_the_selection(tmp_path):
    values = np.zeros((6, 4), np.float32)
    values[3, 2] = np.inf
    save_file({"w": values}, tmp_path / "model.safetensors")
    tensors = Tensors({"w": TensorFile(tmp_path / "model.safetensors")})
    assert not tensors.values(RowSelection(0, 1, 2).of("w")).any()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w\[1:2 of 2\]\[1, 2\] is not finite"):
        tensors.values(RowSelection(1, 2, 2).of("w"))
