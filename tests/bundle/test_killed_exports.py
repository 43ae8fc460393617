"""Exports that are killed, and what the next one makes of it; exports that run beside each other."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pocketlm
from pocketlm_export.quantization.store import WeightStore
from tests.bundle.test_determinism import hashes
from tests.small_checkpoint import write_small_checkpoint

LAYERS = 8
# One line for each stage and for each weight of it, as the export comes to it.
PROGRAM = """
import sys, pocketlm
from pocketlm_export import Progress
source, output, store = sys.argv[1:]
progress = Progress(stage=lambda name, _: print(name, flush=True), advance=lambda name, _: print(name, flush=True))
pocketlm.export(source, output, store=store, progress=progress, verify=False, force=True)
"""


def start(source: Path, output: Path, store: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, source, output, store]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finish(process: subprocess.Popen) -> list[str]:
    """The lines that an export printed."""
    stdout, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return stdout.splitlines()


def kill_at(process: subprocess.Popen, event: int, delay: float) -> None:
    """SIGKILL ``delay`` seconds after the line number ``event``."""
    for _ in range(event):
        process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def inodes(store: Path) -> dict[str, int]:
    """The entries; one that is made again has another inode."""
    return {path.name: path.stat().st_ino for path in WeightStore(store).entries()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    shape = {"num_hidden_layers": LAYERS, "hidden_size": 256, "intermediate_size": 512}
    return write_small_checkpoint(tmp_path_factory.mktemp("killed") / "source", **shape)


@pytest.fixture(scope="module")
def undisturbed(source) -> tuple[dict[str, str], dict[str, bytes], list[str]]:
    """Hashes of the bundle, the entries of the store, and the lines printed, where nothing is killed."""
    store = source.parent / "store"
    lines = finish(start(source, source.parent / "bundle", store))
    return hashes(source.parent / "bundle"), {e.name: e.read_bytes() for e in WeightStore(store).entries()}, lines


@pytest.mark.parametrize("kills", (3, pytest.param(20, marks=pytest.mark.long)))
def test_a_killed_export_resumes_from_the_store(kills, source, undisturbed, tmp_path):
    bundle, entries, lines = undisturbed
    output, store = tmp_path / "place" / "bundle", tmp_path / "store"
    chance = random.Random(kills)
    quantized = range(lines.index("quantize") + 1, lines.index("write onnx"))
    made: dict[str, int] = {}
    for kill in range(kills):
        # Every other one while weights are quantized, the others anywhere.
        event = chance.choice(quantized) if kill % 2 == 0 else chance.randrange(1, len(lines) - 1)
        kill_at(start(source, output, store), event, chance.uniform(0, 0.02))
        found = inodes(store)
        assert made.items() <= found.items(), "what had been quantized was quantized again"
        for entry in WeightStore(store).entries():
            assert entry.read_bytes() == entries[entry.name]
        assert not output.exists()
        made = found
    assert made
    finish(start(source, output, store))
    assert made.items() <= inodes(store).items()
    assert inodes(store).keys() == entries.keys()
    assert hashes(output) == bundle
    assert [path.name for path in output.parent.iterdir()] == ["bundle"], "what killed exports had begun is removed"
    assert not list(store.rglob(".*"))


def abandoned_scratch(output: Path) -> Path:
    scratch = output.parent / f".{output.name}.a1b2c3_4.partial"
    (scratch / "new").mkdir(parents=True)
    return scratch


def export(source: Path, output: Path, store: Path, **options: object) -> pocketlm.Bundle:
    return pocketlm.export(source, output, targets=("onnx",), store=store, verify=False, **options)


def test_a_bundle_that_was_being_replaced_when_its_export_was_killed_is_put_back(tmp_path):
    source, output, store = write_small_checkpoint(tmp_path / "source"), tmp_path / "place" / "bundle", tmp_path / "s"
    export(source, output, store)
    before = hashes(output)
    output.rename(abandoned_scratch(output) / "replaced")
    with pytest.raises(pocketlm.InputError, match="exists already"):
        export(source, output, store)
    assert hashes(output) == before
    assert list(output.parent.iterdir()) == [output]


def test_only_abandoned_scratch_of_this_place_is_removed(tmp_path):
    source, output, store = write_small_checkpoint(tmp_path / "source"), tmp_path / "place" / "bundle", tmp_path / "s"
    mine = abandoned_scratch(output)
    others = [abandoned_scratch(tmp_path / "place" / name) for name in ("other", "bundle.old")]
    others += [tmp_path / "place" / name for name in (".bundle.backup.partial", ".bundle.a1b2c3d4", "bundle.partial")]
    linked = tmp_path / "precious"
    linked.mkdir()
    (tmp_path / "place" / ".bundle.11112222.partial").symlink_to(linked)
    for folder in others[2:]:
        folder.mkdir()
    export(source, output, store)
    assert not mine.exists()
    assert all(folder.is_dir() for folder in (*others, linked))


def test_the_scratch_of_an_export_that_runs_is_left_alone(source, tmp_path):
    output, store = tmp_path / "place" / "bundle", tmp_path / "store"
    running = start(source, output, store)
    while running.stdout.readline() != "quantize\n":
        pass
    (scratch,) = output.parent.iterdir()
    os.kill(running.pid, signal.SIGSTOP)
    try:
        export(write_small_checkpoint(tmp_path / "source"), output, store)
        assert scratch.is_dir()
    finally:
        os.kill(running.pid, signal.SIGCONT)
    finish(running)
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_two_exports_share_a_store_that_is_pruned_under_them(source, undisturbed, tmp_path):
    bundle, _, _ = undisturbed
    store = tmp_path / "store"
    outputs = [tmp_path / name for name in ("one", "two")]
    both = [start(source, output, store) for output in outputs]
    pruned = 0
    while any(process.poll() is None for process in both):
        pruned += WeightStore(store).prune()
        time.sleep(0.02)
    for process in both:
        finish(process)
    assert pruned > 0
    assert [hashes(output) for output in outputs] == [bundle, bundle]
    assert not list(store.rglob(".*"))


def test_two_exports_that_share_some_weights_leave_each_of_them_once(source, undisturbed, tmp_path):
    bundle, entries, _ = undisturbed
    store, shorter = tmp_path / "store", tmp_path / "shorter"
    shape = {"num_hidden_layers": LAYERS // 2, "hidden_size": 256, "intermediate_size": 512}
    write_small_checkpoint(shorter, **shape)  # the first layers are the same
    both = [start(source, tmp_path / "long", store), start(shorter, tmp_path / "short", store)]
    for process in both:
        finish(process)
    assert {entry.name: entry.read_bytes() for entry in WeightStore(store).entries()} == entries
    assert hashes(tmp_path / "long") == bundle
    shutil.rmtree(store)
    finish(start(shorter, tmp_path / "alone", store))
    assert hashes(tmp_path / "short") == hashes(tmp_path / "alone")
