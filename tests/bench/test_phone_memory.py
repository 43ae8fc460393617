"""The benchmark of a phone's memory: what it runs and reports. How fast or small anything is, no test asks."""

import json
import subprocess
import sys

import pytest

import pocketlm
from pocketlm.errors import InputError
from pocketlm_bench.phone_memory import variants_of
from tests.small_checkpoint import write_small_checkpoint

PACKED = ["packed, first run", "packed, later runs"]
NAMES = [" ".join((runtime, kind)).strip() for runtime in ("onnx", "executorch") for kind in ("", *PACKED)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("phone")
    checkpoint = write_small_checkpoint(root / "checkpoint")
    return pocketlm.export(
        checkpoint, root / "bundle", targets=("onnx", "executorch"), store=root / "store", verify=False
    )


def test_every_variant_in_its_own_processes(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- phone memory -->\nan older table\n<!-- end of phone memory -->\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pocketlm_bench.phone_memory", bundle.folder, "--rounds", 2, "--cold",
        "--json", tmp_path / "results" / "phone.json", "--page", page,
    ]  # fmt: skip
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    document = json.loads((tmp_path / "results" / "phone.json").read_text(encoding="utf-8"))
    assert [variant["name"] for variant in document["variants"]] == NAMES
    sizes = {variant["name"]: variant["disk_bytes"] for variant in document["variants"]}
    for runtime in ("onnx", "executorch"):
        first, later = (sizes[f"{runtime} {kind}"] for kind in PACKED)
        assert sizes[runtime] < first == later
    for variant in document["variants"]:
        assert len(variant["samples"]) == 2
        for name in ("added_anonymous", "highest_added_anonymous", "added_file_backed"):
            assert variant["summary"][name]["low"] <= variant["summary"][name]["high"]
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == NAMES
    assert "an older table" not in page.read_text(encoding="utf-8")
    assert not list((tmp_path / "cache" / "pocketlm").iterdir()), "the copies are removed"


def test_a_bundle_without_either_artifact_is_refused(tiny_bundle):
    with pytest.raises(InputError, match="no artifact for onnx or executorch"):
        variants_of(tiny_bundle("llama", "int4", "coreml"))
