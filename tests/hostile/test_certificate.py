"""Damaged and hostile certificates: a bundle that has one which says nothing of its files is not opened."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import pocketlm
from pocketlm.certificate import Certificate, Check, Evidence, Level, TargetCertificate
from pocketlm.errors import BundleError
from tests.hostile.damage import DAMAGED_JSON

STRANGE: tuple[Any, ...] = (None, True, -1, "text", [], {}, [[]], {"a": 1}, float("nan"), 10**30)


@pytest.fixture
def bundle(demo_bundle, tmp_path: Path) -> Path:
    """A copy whose files share their content with the original."""
    copy = shutil.copytree(demo_bundle("int4").folder, tmp_path / "bundle", copy_function=os.link)
    (copy / "certificate.json").unlink(missing_ok=True)
    return copy


def certificate_of(bundle: Path) -> Certificate:
    """A small one that passes, for the manifest as it is."""
    check = Check(name="integers", figure=0.0, threshold=0.0, passed=True)
    levels = [Level(level=1, name="bytes", status="passed", checks=[check], facts={"weights": 9})]
    return Certificate(
        format_version="1.0",
        manifest_sha256=hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        pocketlm="0.1.0",
        libraries={"numpy": "2.3"},
        machine={"system": "Linux"},
        evidence=Evidence(texts=1, prefill_tokens=8, decode_steps=1, judged_positions=1, probes=[]),
        targets={"onnx": TargetCertificate(levels=levels)},
        text=[],
    ).sealed()


def refused(bundle: Path, says: str = "") -> None:
    with pytest.raises(BundleError, match=rf"certificate\.json: .*{says}") as caught:
        pocketlm.open(bundle)
    assert str(bundle) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_sound_one_opens(bundle):
    certificate = certificate_of(bundle)
    (bundle / "certificate.json").write_text(certificate.to_json(), encoding="utf-8")
    assert pocketlm.open(bundle).certificate == certificate


@pytest.mark.parametrize("case", [*DAMAGED_JSON, "empty-object"])
def test_what_is_no_certificate(case, bundle):
    (bundle / "certificate.json").write_bytes(b"{}" if case == "empty-object" else DAMAGED_JSON[case][0])
    refused(bundle)


@pytest.mark.parametrize("kind", ("link", "dangling-link", "pipe", "folder", "huge"))
def test_what_is_no_file(kind, bundle, tmp_path):
    path, outside = bundle / "certificate.json", tmp_path / "outside.json"
    outside.write_text(certificate_of(bundle).to_json(), encoding="utf-8")
    match kind:
        case "link":
            path.symlink_to(outside)
        case "dangling-link":
            path.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "huge":
            path.touch()
            os.truncate(path, 65 << 20)
    refused(bundle, "too large" if kind == "huge" else "not a regular file")


def test_no_value_changes_unnoticed(bundle):
    sound = json.loads(certificate_of(bundle).to_json())

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if not isinstance(value, dict | list):
            return []
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        return [(*path, key) for key in keys] + [place for key in keys for place in places(value[key], (*path, key))]

    for place in places(sound):
        for strange in STRANGE:
            changed = json.loads(json.dumps(sound))
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            if holder[place[-1]] == strange and type(holder[place[-1]]) is type(strange):
                continue
            holder[place[-1]] = strange
            (bundle / "certificate.json").write_text(json.dumps(changed), encoding="utf-8")
            refused(bundle)


def test_a_failed_level_that_is_called_passed(bundle):
    text = certificate_of(bundle).to_json()
    (bundle / "certificate.json").write_text(text.replace('"figure": 0.0', '"figure": 1.0'), encoding="utf-8")
    refused(bundle, "altered")


def test_another_manifests(bundle):
    certificate = certificate_of(bundle)
    manifest = bundle / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.write_bytes(content + b"\n")
    (bundle / "certificate.json").write_text(certificate.to_json(), encoding="utf-8")
    refused(bundle, "of another manifest")
