"""The weight store: content-addressed, whole entries only, made again where damaged."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from safetensors.numpy import save_file

from pocketlm.errors import CheckpointError
from pocketlm_export.checkpoint.checkpoint import Tensors
from pocketlm_export.checkpoint.tensors import TensorFile
from pocketlm_export.quantization.rounding import quantize_rows
from pocketlm_export.quantization.schemes import SCHEMES
from pocketlm_export.quantization.store import WeightStore, default_store
from pocketlm_export.quantization.weights import quantize

INT4, INT8 = SCHEMES["int4"], SCHEMES["int8"]


def tensors(folder: Path, **values: np.ndarray) -> Tensors:
    path = folder / f"model-{len(list(folder.iterdir()))}.safetensors"
    save_file(values, path)
    file = TensorFile(path)
    return Tensors(dict.fromkeys(values, file))


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(70, 96)).astype(np.float32)


@pytest.mark.parametrize("row", (INT4, INT8), ids=lambda row: row.name)
def test_an_entry_holds_what_the_rounding_gives(row, matrix, tmp_path):
    entry, made = WeightStore(tmp_path / "store").quantized(tensors(tmp_path, w=matrix), "w", row)
    codes, scales = quantize_rows(matrix, row)
    assert made
    np.testing.assert_array_equal(entry.codes(), codes)
    np.testing.assert_array_equal(entry.scales(), scales)
    np.testing.assert_array_equal(entry.codes(3, 9), codes[3:9])
    group = row.group or matrix.shape[1]
    np.testing.assert_array_equal(entry.dequantized(), codes * np.repeat(scales, group, 1))


@pytest.mark.parametrize("row", (INT4, INT8), ids=lambda row: row.name)
def test_an_entry_is_a_safetensors_file_that_the_reference_reader_reads(row, matrix, tmp_path):
    import torch
    from safetensors.torch import load_file as load_torch

    store = WeightStore(tmp_path / "store")
    entry, _ = store.quantized(tensors(tmp_path, w=matrix), "w", row)
    (path,) = store.entries()
    read = load_torch(path)
    assert read["scales"].dtype is torch.bfloat16
    np.testing.assert_array_equal(read["scales"].float().numpy(), entry.scales())
    assert read["codes"].dtype is (torch.uint8 if row.bits == 4 else torch.int8)


def test_the_second_time_is_read(matrix, tmp_path):
    store, source = WeightStore(tmp_path / "store"), tensors(tmp_path, w=matrix)
    assert quantize(source, {"w": INT4}, store).made == 1
    again = quantize(source, {"w": INT4}, WeightStore(tmp_path / "store"))
    assert again.made == 0
    np.testing.assert_array_equal(again.quantized("w").codes(), quantize_rows(matrix, INT4)[0])


def test_the_same_content_under_another_name_and_file_is_found(matrix, tmp_path):
    store = WeightStore(tmp_path / "store")
    store.quantized(tensors(tmp_path, w=matrix), "w", INT4)
    _, made = store.quantized(tensors(tmp_path, other=matrix), "other", INT4)
    assert not made


@pytest.mark.parametrize("change", ("row", "value", "dtype", "shape", "rule"))
def test_a_changed_input_is_another_entry(change, matrix, tmp_path):
    store = WeightStore(tmp_path / "store")
    store.quantized(tensors(tmp_path, w=matrix), "w", INT4)
    row, values = INT4, matrix.copy()
    match change:
        case "row":
            row = INT8
        case "value":
            values[0, 0] += 1
        case "dtype":
            values = values.astype(np.float16)
        case "shape":
            values = values.reshape(35, 192)
        case "rule":
            row = replace(INT4, scale_rule="absmax")
    _, made = store.quantized(tensors(tmp_path, w=values), "w", row)
    assert made
    assert len(list(store.entries())) == 2


@pytest.mark.parametrize("damage", ("flip", "truncate", "empty", "foreign"))
def test_a_damaged_entry_is_made_again(damage, matrix, tmp_path):
    store, source = WeightStore(tmp_path / "store"), tensors(tmp_path, w=matrix)
    store.quantized(source, "w", INT4)
    (path,) = store.entries()
    content = bytearray(path.read_bytes())
    size = len(content)
    match damage:
        case "flip":
            content[-1] ^= 1
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[:-7])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            save_file({"codes": np.zeros((2, 2), np.uint8)}, path)
    entry, made = store.quantized(source, "w", INT4)
    assert made
    np.testing.assert_array_equal(entry.codes(), quantize_rows(matrix, INT4)[0])
    assert path.stat().st_size == size


class StoredEntry:
    """A store with one entry of each row, and what they hold."""

    def __init__(self, folder: Path) -> None:
        values = np.random.default_rng(0).normal(size=(70, 96)).astype(np.float32)
        self.store = WeightStore(folder / "store")
        self.source = tensors(folder, w=values)
        self.paths, self.whole, self.codes, self.scales = {}, {}, {}, {}
        for row in (INT4, INT8):
            before = set(self.store.entries())
            self.store.quantized(self.source, "w", row)
            (self.paths[row],) = set(self.store.entries()) - before
            self.whole[row] = self.paths[row].read_bytes()
            self.codes[row], self.scales[row] = quantize_rows(values, row)

    def made_again(self, row, content: bytes) -> bool:
        """Put ``content`` in the place of the entry, ask for it, and see that it is right whether made or found."""
        self.paths[row].unlink()
        self.paths[row].write_bytes(content)
        entry, made = self.store.quantized(self.source, "w", row)
        np.testing.assert_array_equal(entry.codes(), self.codes[row])
        np.testing.assert_array_equal(entry.scales(), self.scales[row])
        if made:
            assert self.paths[row].read_bytes() == self.whole[row]
        return made


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> StoredEntry:
    return StoredEntry(tmp_path_factory.mktemp("stored"))


@hypothesis.given(row=strategies.sampled_from((INT4, INT8)), data=strategies.data())
def test_a_changed_byte_of_codes_or_scales_makes_the_entry_again(row, data, stored):
    content = bytearray(stored.whole[row])
    header = 8 + int.from_bytes(content[:8], "little")
    changes = strategies.tuples(strategies.integers(header, len(content) - 1), strategies.integers(1, 255))
    for place, change in data.draw(strategies.lists(changes, min_size=1, max_size=4, unique_by=lambda pair: pair[0])):
        content[place] ^= change
    assert stored.made_again(row, bytes(content))


@hypothesis.given(row=strategies.sampled_from((INT4, INT8)), data=strategies.data())
def test_a_changed_header_is_never_believed(row, data, stored):
    content = bytearray(stored.whole[row])
    header = 8 + int.from_bytes(content[:8], "little")
    changes = strategies.tuples(strategies.integers(0, header - 1), strategies.integers(1, 255))
    for place, change in data.draw(strategies.lists(changes, min_size=1, max_size=4)):
        content[place] ^= change
    stored.made_again(row, bytes(content))


@hypothesis.given(row=strategies.sampled_from((INT4, INT8)), data=strategies.data())
def test_a_truncated_or_longer_entry_is_made_again(row, data, stored):
    whole = stored.whole[row]
    if data.draw(strategies.booleans()):
        assert stored.made_again(row, whole[: data.draw(strategies.integers(0, len(whole) - 1))])
    else:
        assert stored.made_again(row, whole + data.draw(strategies.binary(min_size=1, max_size=9)))


@pytest.mark.parametrize(
    ("written", "another"),
    ((b'"BF16"', b'"F16" '), (b'"shape":[70,48]', b'"shape":[48,70]'), (b'"shape":[70,3]', b'"shape":[3,70]')),
)
def test_a_header_that_reads_the_same_bytes_otherwise_is_made_again(written, another, stored):
    assert written in stored.whole[INT4]
    assert stored.made_again(INT4, stored.whole[INT4].replace(written, another))


def test_an_entry_in_the_place_of_another_is_made_again(tmp_path):
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    store, source = WeightStore(tmp_path / "store"), tensors(tmp_path, a=values, b=-2 * values)
    store.quantized(source, "a", INT4)
    (first,) = store.entries()
    store.quantized(source, "b", INT4)
    (second,) = set(store.entries()) - {first}
    second.write_bytes(first.read_bytes())
    entry, made = store.quantized(source, "b", INT4)
    assert made
    np.testing.assert_array_equal(entry.codes(), quantize_rows(-2 * values, INT4)[0])


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_a_value_that_is_not_finite_names_tensor_and_index_and_leaves_nothing(bad, matrix, tmp_path):
    matrix[61, 5] = bad
    store = WeightStore(tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: w\[61, 5\] is not finite"):
        store.quantized(tensors(tmp_path, w=matrix), "w", INT4)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_prune_removes_the_least_recently_used(matrix, tmp_path):
    store = WeightStore(tmp_path / "store")
    source = tensors(tmp_path, a=matrix, b=matrix + 1, c=matrix + 2)
    for age, name in enumerate("abc"):
        store.quantized(source, name, INT8)
        for path in store.entries():
            if path.stat().st_mtime > 1e9:
                os.utime(path, (age, age))
    size = store.size() // 3
    assert store.prune(limit=size) == 2 * size
    _, made = store.quantized(source, "c", INT8)
    assert not made, "the newest entry must stay"
    assert store.prune() == size
    assert store.size() == 0


def test_what_is_pruned_stays_readable_where_it_is_open(matrix, tmp_path):
    store = WeightStore(tmp_path / "store")
    entry, _ = store.quantized(tensors(tmp_path, a=matrix), "a", INT4)
    assert store.prune() > 0
    entry.file.release()
    np.testing.assert_array_equal(entry.codes(), quantize_rows(matrix, INT4)[0])


def test_prune_removes_what_a_killed_process_was_writing_and_nothing_that_is_being_written(matrix, tmp_path):
    store, source = WeightStore(tmp_path / "store"), tensors(tmp_path, a=matrix)
    store.quantized(source, "a", INT4)
    (entry,) = store.entries()
    left = entry.with_name(f".{entry.name}.0123456789abcdef")
    held = entry.with_name(f".{entry.name}.fedcba9876543210")
    for path in (left, held):
        path.write_bytes(b"half")
    program = f"""
from pathlib import Path
from pocketlm_export.ownership import hold
assert hold(Path({str(held)!r})) is not None
print(flush=True)
input()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        store.prune(limit=store.size())
        assert (entry.exists(), left.exists(), held.exists()) == (True, False, True)
        writer.kill()
    store.prune(limit=store.size())
    assert (entry.exists(), held.exists()) == (True, False)


def test_using_an_entry_makes_it_recent(matrix, tmp_path):
    store = WeightStore(tmp_path / "store")
    source = tensors(tmp_path, a=matrix)
    store.quantized(source, "a", INT8)
    (path,) = store.entries()
    os.utime(path, (1, 1))
    store.quantized(source, "a", INT8)
    assert path.stat().st_mtime > 1e9


def test_the_default_place_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "pocketlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_store() == tmp_path / "home" / ".cache" / "pocketlm"


def test_two_processes_at_once_agree(matrix, tmp_path):
    save_file({f"w{i}": matrix + i for i in range(6)}, tmp_path / "model.safetensors")
    program = f"""
from pathlib import Path
from pocketlm_export.checkpoint.checkpoint import Tensors
from pocketlm_export.checkpoint.tensors import TensorFile
from pocketlm_export.quantization.schemes import SCHEMES
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
folder = Path({str(tmp_path)!r})
file = TensorFile(folder / "model.safetensors")
source = Tensors(dict.fromkeys(file, file))
weights = quantize(source, dict.fromkeys(file, SCHEMES["int4"]), WeightStore(folder / "store"))
print(sum(int(weights.quantized(name).codes().astype(int).sum()) for name in file))
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = {process.communicate(timeout=60)[0] for process in running}
    expected = sum(int(quantize_rows(matrix + i, INT4)[0].astype(int).sum()) for i in range(6))
    assert results == {f"{expected}\n"}
    store = WeightStore(tmp_path / "store")
    files = [path for path in store.root.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(store.entries())
    assert len(files) == 6
