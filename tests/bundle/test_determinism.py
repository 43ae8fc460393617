"""The same checkpoint, options and versions give the same bytes; an export is there whole, or not at all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pocketlm
from pocketlm_export import Progress
from tests.small_checkpoint import write_small_checkpoint

PROGRAM = """
import sys, pocketlm
source, output, store, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
pocketlm.export(source, output, store=store, verify=False)
"""


def hashes(bundle: Path) -> dict[str, str]:
    return {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in bundle.rglob("*")
        if path.is_file()
    }


def test_two_exports_are_byte_identical_in_other_folders_and_processes(tmp_path):
    found = []
    for name, threads, locale, zone in (("one", "1", "C", "UTC"), ("another place", "2", "C.UTF-8", "Asia/Tokyo")):
        source = write_small_checkpoint(tmp_path / name / "checkpoint")
        output = tmp_path / name / "bundle"
        environment = {**os.environ, "LC_ALL": locale, "TZ": zone, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", PROGRAM, source, output, tmp_path / name / "store", threads]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found.append(hashes(output))
    assert {name.split("/")[0] for name in found[0]} >= {"onnx", "executorch", "coreml", "golden", "tokenizer"}
    assert found[0] == found[1]


def test_a_store_that_was_there_changes_nothing(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    for name in ("first", "second"):
        pocketlm.export(source, tmp_path / name, targets=("onnx",), store=tmp_path / "store", verify=False)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


def test_the_checkpoint_of_shards_gives_the_same_weights(tmp_path):
    from tests.unit.test_checkpoint import shard

    source = write_small_checkpoint(tmp_path / "checkpoint")
    pocketlm.export(source, tmp_path / "single", targets=("onnx",), store=tmp_path / "store", verify=False)
    shard(source)
    pocketlm.export(source, tmp_path / "sharded", targets=("onnx",), store=tmp_path / "store", verify=False)
    assert hashes(tmp_path / "single") == hashes(tmp_path / "sharded")


class Stop(BaseException):
    """What a signal raises in the middle."""


@pytest.mark.parametrize("stage", ("read", "quantize", "write onnx", "golden", "finish"))
def test_stopped_at_any_stage_it_leaves_nothing(stage, tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    seen = []

    def stop(name: str, _elements: int) -> None:
        seen.append(name)
        if name == stage:
            raise Stop

    output = tmp_path / "not" / "there" / "yet" / "bundle"
    with pytest.raises(Stop):
        pocketlm.export(
            source, output, targets=("onnx",), store=tmp_path / "store", progress=Progress(stage=stop), verify=False
        )
    assert seen[-1] == stage
    assert not (tmp_path / "not").exists()


def test_a_failed_replacement_leaves_the_old_bundle(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    output = tmp_path / "place" / "bundle"
    pocketlm.export(source, output, targets=("onnx",), store=tmp_path / "store", verify=False)
    before = hashes(output)

    def stop(name: str, _elements: int) -> None:
        if name == "finish":
            raise Stop

    with pytest.raises(Stop):
        pocketlm.export(
            source,
            output,
            targets=("onnx",),
            scheme="int8",
            store=tmp_path / "store",
            force=True,
            progress=Progress(stage=stop),
            verify=False,
        )
    assert hashes(output) == before
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_force_replaces_bundles_only(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    with pytest.raises(pocketlm.InputError, match=r"precious: exists and is not a bundle"):
        pocketlm.export(source, precious, targets=("onnx",), store=tmp_path / "store", force=True, verify=False)
    assert (precious / "file").read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(precious)
    with pytest.raises(pocketlm.InputError, match="exists already"):
        pocketlm.export(source, link, targets=("onnx",), store=tmp_path / "store", force=True, verify=False)
    (tmp_path / "a-file").write_text("mine")
    with pytest.raises(pocketlm.InputError, match="can't be written"):
        pocketlm.export(
            source, tmp_path / "a-file" / "bundle", targets=("onnx",), store=tmp_path / "store", verify=False
        )


def test_the_manifest_says_what_it_was_made_from(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    first = pocketlm.export(source, tmp_path / "first", targets=("onnx",), store=tmp_path / "store", verify=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    second = pocketlm.export(source, tmp_path / "second", targets=("onnx",), store=tmp_path / "store", verify=False)
    one, two = first.manifest.provenance, second.manifest.provenance
    assert one.checkpoint_sha256 != two.checkpoint_sha256
    assert one.pocketlm == pocketlm.__version__
    assert {"numpy", "onnx", "onnx-ir"} <= set(one.libraries)
