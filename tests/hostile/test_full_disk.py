"""What the machine refuses: a full disk, a place that is not writable. One error names the place, nothing is left."""

import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import pocketlm
from pocketlm.errors import InputError
from pocketlm_export import Progress
from tests.small_checkpoint import write_small_checkpoint

TARGETS = ("onnx", "executorch", "coreml")
FULL = {errno.EFBIG: "File too large", errno.ENOSPC: "No space left on device"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path, dict[str, int]]:
    """A checkpoint, a store that holds its weights, and the size of the largest file of each target."""
    root = tmp_path_factory.mktemp("prepared")
    source = write_small_checkpoint(root / "source")
    bundle = pocketlm.export(source, root / "bundle", store=root / "store", verify=False)
    sizes = {
        target: max(record.size for name, record in bundle.manifest.files.items() if name.startswith(target))
        for target in TARGETS
    }
    return source, root / "store", sizes


def _export(source: Path, output: Path, target: str, store: Path, largest_file: int | None) -> tuple[str, str, int]:
    """In a process of its own, with a limit that acts like a full disk: a write beyond it fails."""
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        pocketlm.export(source, output, targets=(target,), store=store, verify=False)
    except Exception as error:  # noqa: BLE001  whatever comes out is what the test is about
        return type(error).__name__, str(error), getattr(error, "exit_code", 1)
    return "", "", 0


def export(source: Path, output: Path, target: str, store: Path, largest_file: int | None = None) -> tuple:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_export, (source, output, target, store, largest_file))


@pytest.mark.parametrize("target", TARGETS)
def test_a_disk_that_gets_full_while_the_artifact_is_written(target, prepared, tmp_path):
    source, store, sizes = prepared
    place = tmp_path / "place"
    kind, message, code = export(source, place / "bundle", target, store, sizes[target] - 1)
    assert (kind, code) == ("InputError", 2), message
    assert message == f"{place / 'bundle'}: can't be written: File too large"
    assert not place.exists()


def test_a_disk_that_gets_full_while_the_store_is_written(prepared, tmp_path):
    source, _, _ = prepared
    kind, message, code = export(source, tmp_path / "place" / "bundle", "onnx", tmp_path / "store", 1024)
    assert (kind, code) == ("InputError", 2), message
    assert message.startswith(f"{tmp_path / 'store' / 'weights'}: the weight store can't be written: File too large")
    assert not (tmp_path / "place").exists()
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@contextlib.contextmanager
def small_file_system(place: Path, kilobytes: int) -> Iterator[Path]:
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("not run: needs the right to mount a small file system; the limits above act like one")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


NEEDS = r"the export needs \d\.\d MB there, and \d\.\d MB are free; make room, or choose other places"


@pytest.mark.parametrize("kilobytes", (16, 96, 1024))
def test_too_small_a_disk_for_the_bundle_is_refused_before_the_work(kilobytes, prepared, tmp_path):
    source, store, _ = prepared
    stages = []
    with small_file_system(tmp_path / "small-disk", kilobytes) as place:
        with pytest.raises(InputError, match=f"^{place / 'bundle'}: {NEEDS}"):
            export_here(source, place / "bundle", store, stages)
        assert list(place.iterdir()) == []
    assert stages == ["read"]


def test_too_small_a_disk_for_the_store_is_refused_before_the_work(prepared, tmp_path):
    source, _, _ = prepared
    stages = []
    with small_file_system(tmp_path / "small-disk", 1024) as place:
        with pytest.raises(InputError, match=f"^{place / 'weights'}: {NEEDS}"):
            export_here(source, tmp_path / "bundle", place, stages)
        assert not list((place / "weights").iterdir())
    assert stages == ["read"]
    assert not (tmp_path / "bundle").exists()


def test_one_disk_for_bundle_and_store_needs_the_sum(tmp_path):
    source = write_small_checkpoint(tmp_path / "source", num_hidden_layers=8, hidden_size=256, intermediate_size=512)
    places = f"{tmp_path / 'small-disk' / 'bundle'} and {tmp_path / 'small-disk' / 'store' / 'weights'}"
    with (
        small_file_system(tmp_path / "small-disk", 6500) as place,
        pytest.raises(InputError, match=f"^{places}: {NEEDS}"),
    ):
        export_here(source, place / "bundle", place / "store", [])


def test_what_the_store_holds_is_not_needed_again(tmp_path):
    source = write_small_checkpoint(tmp_path / "source", num_hidden_layers=8, hidden_size=256, intermediate_size=512)
    with small_file_system(tmp_path / "small-disk", 8500) as place:
        for _ in range(2):  # the second time there is room for the bundle alone
            export_here(source, place / "bundle", place / "store", []).check_files()
            shutil.rmtree(place / "bundle")


def export_here(source: Path, output: Path, store: Path, stages: list[str]) -> pocketlm.Bundle:
    progress = Progress(stage=lambda name, _elements: stages.append(name))
    return pocketlm.export(source, output, targets=("onnx",), store=store, verify=False, progress=progress)


def test_a_place_that_is_no_folder(prepared, tmp_path):
    source, store, _ = prepared
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file" / "bundle", Path("/proc/bundle"), Path("/dev/null/bundle")):
        with pytest.raises(InputError, match=f"{output.parent}: can't be written"):
            pocketlm.export(source, output, targets=("onnx",), store=store, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(InputError, match="weights: the weight store can't be written"):
        pocketlm.export(source, tmp_path / "bundle", targets=("onnx",), store=tmp_path / "file", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="not run: root may write anywhere")
def test_a_folder_without_the_right_to_write(prepared, tmp_path):
    source, store, _ = prepared
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(InputError, match=f"{locked}: can't be written: Permission denied"):
        pocketlm.export(source, locked / "bundle", targets=("onnx",), store=store, verify=False)
    assert list(locked.iterdir()) == []


def test_a_store_that_can_only_be_read_serves(prepared, tmp_path):
    source, store, _ = prepared
    copy = shutil.copytree(store, tmp_path / "store")
    for path in (*copy.rglob("*"), copy):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        pocketlm.export(source, tmp_path / "bundle", targets=("onnx",), store=copy, verify=False).check_files()
    finally:
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o700)
