"""XNNPACK's packed weights in the cache: the same bits from a file that is made once, and made anew where it is not as
it was made: XNNPACK believes whatever it finds there."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketlm.artifact import ArtifactFile
from pocketlm.errors import BundleError, InputError
from pocketlm.runtimes.executorch_native import open_session
from pocketlm.runtimes.packed_copies import packed_folder

PROMPT = [7, 11, 13, 17, 19, 23]
CASES = [
    ("llama", "int4", "int4"),
    ("llama", "fp32", "int8"),
    ("qwen3-biases", "int4", "int8"),
    ("qwen2", "int8", "int8"),
    ("gemma2", "int4", "int8"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return packed_folder()


@pytest.fixture
def bundle(tiny_bundle):
    return tiny_bundle("llama", "int4", "executorch", "int4")


def logits(bundle, *, packed: bool) -> np.ndarray:
    """Of every position of a prompt, and of ten greedy steps behind it."""
    with bundle.session("executorch", threads=1, packed=packed) as session:
        found = [session.extend(PROMPT, logits=len(PROMPT))]
        for _ in range(10):
            found.append(session.extend([int(found[-1][-1].argmax())]))
    return np.concatenate(found)


def weights_in(cache: Path) -> Path:
    (copy,) = cache.iterdir()
    return copy / "weights.xnnpack"


def state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_ino, status.st_ctime_ns


@pytest.mark.parametrize(("row", "scheme", "head"), CASES)
def test_the_bits_are_those_of_a_session_that_packs_into_memory(row, scheme, head, tiny_bundle, cache):
    bundle = tiny_bundle(row, scheme, "executorch", head)
    plain = logits(bundle, packed=False)
    assert not cache.exists()
    np.testing.assert_array_equal(logits(bundle, packed=True), plain)
    made = state(weights_in(cache))
    np.testing.assert_array_equal(logits(bundle, packed=True), plain)
    assert state(weights_in(cache)) == made


def test_the_weights_are_mapped_from_the_file(bundle, cache):
    with bundle.session("executorch", packed=True):
        assert str(weights_in(cache)) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_second_session_at_the_same_time_computes_the_same(bundle):
    """XNNPACK locks its file: the second packs into memory."""
    with bundle.session("executorch", packed=True) as first, bundle.session("executorch", packed=True) as second:
        np.testing.assert_array_equal(first.extend(PROMPT), second.extend(PROMPT))


def cut(weights: Path) -> None:
    os.truncate(weights, weights.stat().st_size // 2)


def empty(weights: Path) -> None:
    os.truncate(weights, 0)


def flip_bytes(weights: Path) -> None:
    """And set the time of modification back."""
    status = weights.stat()
    content = np.fromfile(weights, np.uint8)
    content[: len(content) // 2] ^= 0x55
    content.tofile(weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


def bring_from_elsewhere(weights: Path) -> None:
    """A copy of the files has the same sizes and times, but is not what was recorded."""
    copy = weights.parent
    shutil.copytree(copy, copy.with_name("other"))
    shutil.rmtree(copy)
    copy.with_name("other").rename(copy)


def take_another_machines(weights: Path) -> None:
    record = json.loads((weights.parent / "packed.json").read_text(encoding="utf-8"))
    record["machine"]["cpu"] = "another"
    (weights.parent / "packed.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("damage", [cut, empty, flip_bytes, bring_from_elsewhere, take_another_machines, Path.unlink])
def test_a_file_that_is_not_as_it_was_made_is_made_again(damage, bundle, cache):
    plain = logits(bundle, packed=True)
    weights = weights_in(cache)
    damage(weights)
    damaged = state(weights) if weights.exists() else None
    np.testing.assert_array_equal(logits(bundle, packed=True), plain)
    remade = state(weights)
    assert remade != damaged
    np.testing.assert_array_equal(logits(bundle, packed=True), plain)
    assert state(weights) == remade


def test_the_file_of_another_model_is_not_taken(bundle, tiny_bundle, cache):
    """Of the same shapes, so that XNNPACK would have run it."""
    other = tiny_bundle("llama-untied-biases", "int4", "executorch", "int4")
    plain, others = logits(bundle, packed=True), logits(other, packed=False)
    (copy,) = cache.iterdir()
    assert logits(other, packed=True).tobytes() == others.tobytes() != plain.tobytes()
    (copy_of_other,) = (folder for folder in cache.iterdir() if folder != copy)
    shutil.copy(copy_of_other / "weights.xnnpack", copy / "weights.xnnpack")
    np.testing.assert_array_equal(logits(bundle, packed=True), plain)


def test_the_free_space_is_checked_before_anything_is_written(bundle, cache):
    artifact = bundle.artifact("executorch")
    files = {"model.pte": ArtifactFile(sha256="0" * 64, size=1 << 60)}
    wanted = rf"^{cache}: \d+ MB free, but packed weights may need \d+ MB"
    with pytest.raises(InputError, match=wanted):
        open_session(replace(artifact, files=files), 1, packed=True)
    assert list(cache.iterdir()) == []


def test_a_path_that_the_option_does_not_hold_is_refused(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("long" * 50)))
    with pytest.raises(InputError, match="at most 255 bytes"):
        bundle.session("executorch", packed=True)


def test_a_program_that_is_refused_is_named_and_not_the_cache(bundle, tmp_path, cache):
    program = tmp_path / "model.pte"
    program.write_bytes(b"not a program")
    artifact = bundle.artifact("executorch")
    with pytest.raises(BundleError, match=f"^{program}: not a program of ExecuTorch"):
        open_session(replace(artifact, path=program), 1, packed=True)
    assert list(cache.iterdir()) == []
