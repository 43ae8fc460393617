"""Sessions over packed weights: the same bits from a file that is made once, made anew where it is not as it was made,
and bounded."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import pocketlm
from pocketlm.artifact import ArtifactFile
from pocketlm.errors import BundleError, InputError, UnsupportedError
from pocketlm.runtimes.onnx_packed import packed_model
from pocketlm.runtimes.packed_copies import LIMIT, packed_folder

PROMPT = [7, 11, 13, 17, 19, 23]
# Tied and untied, dense and quantized, columns that are filled up.
CASES = [
    ("llama", "fp32", "int8"),
    ("llama", "int4", "int4"),
    ("llama-untied-biases", "int4", "int8"),
    ("llama-odd-widths", "int8", "int8"),
    ("qwen3", "int4", "int8"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return packed_folder()


@pytest.fixture
def bundle(tiny_bundle):
    return tiny_bundle("llama", "int4", "onnx")


def logits(bundle, *, packed: bool) -> list[np.ndarray]:
    """Of every position of a prompt, and of ten greedy steps behind it."""
    with bundle.session("onnx", threads=1, packed=packed) as session:
        found = [session.extend(PROMPT, logits=len(PROMPT))]
        for _ in range(10):
            found.append(session.extend([int(found[-1][-1].argmax())]))
        return found


def assert_equal(ours, others) -> None:
    for one, other in zip(ours, others, strict=True):
        np.testing.assert_array_equal(one, other)


def states(cache: Path) -> dict[Path, tuple[int, int, int]]:
    """Every file of the copies, and what changes when it is written."""
    return {
        path: (path.stat().st_size, path.stat().st_ino, path.stat().st_ctime_ns)
        for path in cache.rglob("*")
        if path.is_file()
    }


def copy_of_decoder(cache: Path) -> Path:
    """The larger of the two copies; the other is the head's."""
    return max(cache.iterdir(), key=lambda folder: (folder / "model.onnx").stat().st_size)


@pytest.mark.parametrize(("name", "scheme", "head"), CASES)
def test_logits_and_greedy_tokens_are_the_same_bits(name, scheme, head, tiny_bundle, cache):
    bundle = tiny_bundle(name, scheme, "onnx", head)
    plain = logits(bundle, packed=False)
    assert not cache.exists()
    assert_equal(logits(bundle, packed=True), plain)
    made = states(cache)
    assert len(list(cache.iterdir())) == 2
    assert_equal(logits(bundle, packed=True), plain)
    assert states(cache) == made


def test_the_packed_weights_are_mapped_from_the_file(bundle, cache):
    with bundle.session("onnx", packed=True):
        data = next(cache.iterdir()) / "model.onnx.data"
        assert str(data) in Path("/proc/self/maps").read_text(encoding="utf-8")


def cut(copy: Path) -> None:
    os.truncate(copy / "model.onnx.data", (copy / "model.onnx.data").stat().st_size - 1)


def flip_a_byte(copy: Path) -> None:
    """And set the time of modification back."""
    path = copy / "model.onnx.data"
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_the_model(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"\0" * (copy / "model.onnx").stat().st_size)


def lose_the_data(copy: Path) -> None:
    (copy / "model.onnx.data").unlink()


def garble_the_record(copy: Path) -> None:
    (copy / "packed.json").write_text("[" * 100_000, encoding="utf-8")


def take_another_machines(copy: Path) -> None:
    record = json.loads((copy / "packed.json").read_text(encoding="utf-8"))
    record["machine"]["cpu"] = "another"
    (copy / "packed.json").write_text(json.dumps(record), encoding="utf-8")


def bring_from_elsewhere(copy: Path) -> None:
    """A copy of the files has the same sizes and times, but is not what was recorded."""
    shutil.copytree(copy, copy.with_name("other"))
    shutil.rmtree(copy)
    copy.with_name("other").rename(copy)


def put_a_file_in_its_place(copy: Path) -> None:
    shutil.rmtree(copy)
    copy.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    (
        cut, flip_a_byte, replace_the_model, lose_the_data, garble_the_record, take_another_machines,
        bring_from_elsewhere, put_a_file_in_its_place,
    ),
)  # fmt: skip
def test_a_copy_that_is_not_as_it_was_made_is_made_again(damage, bundle, cache):
    plain = logits(bundle, packed=True)
    copy = copy_of_decoder(cache)
    damage(copy)
    damaged = states(cache)
    assert_equal(logits(bundle, packed=True), plain)
    remade = states(cache)
    assert remade.keys() >= {copy / name for name in ("model.onnx", "model.onnx.data", "packed.json")}
    assert all(remade[path] != damaged.get(path) for path in remade if path.parent == copy)
    assert_equal(logits(bundle, packed=True), plain)
    assert states(cache) == remade


def test_copies_for_another_runtime_or_cpu_and_of_killed_processes_are_removed(bundle, cache):
    logits(bundle, packed=True)
    copy = copy_of_decoder(cache)
    old = copy.with_name(copy.name.split("-")[0] + "-" + "0" * 24)
    copy.rename(old)
    (cache / ".new.killed").mkdir()
    logits(bundle, packed=True)
    assert copy.is_dir()
    assert not old.exists()
    assert not (cache / ".new.killed").exists()


def test_the_least_recently_used_copies_go_beyond_the_limit(bundle, cache):
    for age, name in ((2, "older-0"), (1, "newer-0")):
        (cache / name).mkdir(parents=True)
        (cache / name / "model.onnx.data").touch()
        os.truncate(cache / name / "model.onnx.data", LIMIT * 3 // 5)  # a hole: it takes no space
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    with bundle.session("onnx", packed=True):
        pass
    assert (cache / "newer-0").exists()
    assert not (cache / "older-0").exists()
    assert len(list(cache.iterdir())) == 2


def test_the_free_space_is_checked_before_anything_is_written(bundle, cache):
    files = {"model.onnx": ArtifactFile(sha256="0" * 64, size=1 << 60)}
    wanted = rf"^{cache}: \d+ MB free, but packed weights may need \d+ MB"
    with pytest.raises(InputError, match=wanted), packed_model(bundle.folder / "onnx/model.onnx", files):
        pass
    assert list(cache.iterdir()) == []


def test_a_model_that_the_runtime_refuses_is_named_and_not_the_cache(tmp_path, cache):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"not a model")
    files = {"model.onnx": ArtifactFile(sha256="0" * 64, size=11)}
    with pytest.raises(BundleError, match=f"^{model}: ONNX Runtime can't load it"), packed_model(model, files):
        pass
    assert list(cache.iterdir()) == []


def _logits_elsewhere(folder: Path) -> list[np.ndarray]:
    return logits(pocketlm.open(folder), packed=True)


def test_processes_that_open_a_bundle_at_once_make_one_copy(bundle, cache):
    plain = logits(bundle, packed=False)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        for found in pool.map(_logits_elsewhere, [bundle.folder] * 6, chunksize=1):
            assert_equal(found, plain)
    assert len(list(cache.iterdir())) == 2


def test_a_runtime_without_it_refuses_it_by_name(tiny_bundle):
    with pytest.raises(UnsupportedError, match=r"^packed weights: not supported by coreml; valid: executorch, onnx$"):
        tiny_bundle("llama", "int4", "coreml").session("coreml", packed=True)
