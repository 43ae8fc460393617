"""Packed weights of each runtime that has them: what the cache's disk refuses is said, and nothing is left."""

import multiprocessing
import resource
from pathlib import Path

import pytest

import pocketlm
from pocketlm.bundle import PACKING
from pocketlm.errors import InputError
from pocketlm.runtimes.packed_copies import packed_folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return packed_folder()


def _open_with_a_limit(folder: Path, runtime: str, largest_file: int) -> tuple[str, str]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))  # a write beyond it fails as on a full disk
    try:
        pocketlm.open(folder).session(runtime, packed=True)
    except Exception as error:  # noqa: BLE001  whatever comes out is what the test is about
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("runtime", PACKING)
def test_a_disk_that_gets_full(runtime, tiny_bundle, cache):
    folder = tiny_bundle("llama", "int4", runtime).folder
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        kind, message = pool.apply(_open_with_a_limit, (folder, runtime, 50_000))
    assert kind == "InputError", message
    assert message.startswith(f"{cache}: packed weights can't be written: ")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("runtime", PACKING)
def test_a_cache_that_can_not_be_written(runtime, tiny_bundle, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_bytes(b"")
    with pytest.raises(InputError, match=f"^{cache}: packed weights can't be written: "):
        tiny_bundle("llama", "int4", runtime).session(runtime, packed=True)
