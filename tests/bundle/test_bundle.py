"""Opening a bundle: what is checked before anything is loaded."""

import json
import os
import shutil
from pathlib import Path

import pytest

import pocketlm
from pocketlm.errors import BundleError, InputError
from tests.small_checkpoint import write_small_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    source = write_small_checkpoint(root / "source")
    (source / "LICENSE").write_text("terms")
    pocketlm.export(source, root / "bundle", targets=("onnx",), store=root / "store", verify=False)
    return root / "bundle"


@pytest.fixture
def bundle(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "bundle")


def change_manifest(bundle: Path, change) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_it_holds_what_the_format_promises(original):
    manifest = pocketlm.open(original).manifest
    assert {
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "onnx/model.onnx", "onnx/model.onnx.data",
        "onnx/genai_config.json", "golden/tokenizer.jsonl", "golden/chat.jsonl", "golden/replay.jsonl", "LICENSE",
    } <= set(manifest.files)  # fmt: skip
    on_disk = {path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file()}
    assert on_disk == {*manifest.files, "manifest.json"}
    assert manifest.model.context_length == 64
    assert manifest.model.stop_ids == [1]
    assert manifest.weights["model.embed_tokens.weight"].scheme == "int8"
    assert manifest.weights["model.layers.0.mlp.up_proj.weight"].scheme == "int4"
    assert manifest.weights["model.norm.weight"].scheme == "fp32"


def test_open_gives_what_the_contract_names(original):
    bundle = pocketlm.open(original)
    assert bundle.certificate is None
    assert bundle.tokenizer.decode(bundle.tokenizer.encode("abc", add_special_tokens=False)) == "abc"
    assert bundle.chat_template.render([{"role": "user", "content": "x"}]) == "<|user|>x<|end|><|assistant|>"
    assert bundle.stop_ids == {1}
    assert isinstance(bundle, pocketlm.Bundle)
    with bundle.session("onnx", threads=1) as session:
        assert isinstance(session, pocketlm.Session)
        assert session.extend([5, 6, 7], logits=2).shape == (2, 300)
        assert (session.position, session.context_length, session.vocabulary_size) == (3, 64, 300)
    pieces = list(pocketlm.generate(bundle, "ab", max_new_tokens=3, temperature=0.0))
    assert all(isinstance(piece, pocketlm.Piece) for piece in pieces)
    assert pieces[-1].finish_reason in ("stop", "length")


def test_an_absent_or_foreign_folder_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no such bundle"):
        pocketlm.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.json: not a bundle"):
        pocketlm.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="not a folder"):
        pocketlm.open(tmp_path / "file")


@pytest.mark.parametrize("content", ("", "{", "[]", "[" * 200_000, '"manifest"', "\x00"), ids=range(6))
def test_a_manifest_that_is_no_object_is_refused(content, bundle):
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        pocketlm.open(bundle)


MANIFEST_CHANGES = {
    "future-major": (lambda m: m.update(format_version="2.0"), r"'format_version' is '2\.0'.*1\.x"),
    "version-type": (lambda m: m.update(format_version=1), "'format_version' is 1"),
    "no-version": (lambda m: m.pop("format_version"), "'format_version' is None"),
    "unknown-key": (lambda m: m.update(extra=1), "'extra'"),
    "unknown-nested-key": (lambda m: m["model"].update(extra=1), r"'model\.extra'"),
    "missing-key": (lambda m: m.pop("weights"), "'weights'"),
    "wrong-type": (lambda m: m["model"].update(layers="2"), r"'model\.layers'"),
    "negative": (lambda m: m["model"].update(vocabulary_size=-1), r"'model\.vocabulary_size'"),
    "huge": (lambda m: m["model"].update(context_length=10**15), r"'model\.context_length'"),
    "bad-hash": (lambda m: m["files"]["LICENSE"].update(sha256="00"), "sha256"),
    "absolute": (
        lambda m: m["files"].update({"/etc/passwd": m["files"]["LICENSE"]}),
        "'/etc/passwd' is not a path inside",
    ),
    "parent": (lambda m: m["files"].update({"../x": m["files"]["LICENSE"]}), r"'\.\./x' is not a path inside"),
    "inner-parent": (lambda m: m["files"].update({"onnx/../../x": m["files"]["LICENSE"]}), "is not a path inside"),
    "backslash": (lambda m: m["files"].update({"..\\x": m["files"]["LICENSE"]}), "is not a path inside"),
    "dot": (lambda m: m["files"].update({"./LICENSE": m["files"]["LICENSE"]}), "is not a path inside"),
    "empty-name": (lambda m: m["files"].update({"": m["files"]["LICENSE"]}), "is not a path inside"),
    "target-outside": (lambda m: m["targets"]["onnx"].update(path="../../model.onnx"), "is not a path inside"),
    "unlisted-file": (lambda m: m["files"].update({"onnx/other": m["files"]["LICENSE"]}), "onnx/other: missing"),
    "unlisted-target": (lambda m: m["files"].pop("onnx/model.onnx"), "onnx/model.onnx is not among the files"),
    "unknown-target": (lambda m: m["targets"].update(tflite=m["targets"]["onnx"]), r"'targets\.tflite"),
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
def test_a_changed_manifest_is_refused(name, bundle):
    change, message = MANIFEST_CHANGES[name]
    change_manifest(bundle, change)
    with pytest.raises(BundleError, match=message) as caught:
        pocketlm.open(bundle)
    assert "\n" not in str(caught.value)
    assert str(bundle) in str(caught.value)


@pytest.mark.parametrize("name", ("onnx/model.onnx", "onnx/model.onnx.data", "onnx/genai_config.json"))
@pytest.mark.parametrize("damage", ("flip", "truncate", "grow", "empty", "swap"))
def test_an_altered_artifact_is_refused_before_it_is_loaded(name, damage, bundle):
    path = bundle / name
    match damage:
        case "flip":
            flip(path)
        case "truncate":
            os.truncate(path, path.stat().st_size - 1)
        case "grow":
            path.write_bytes(path.read_bytes() + b"\0")
        case "empty":
            path.write_bytes(b"")
        case "swap":
            shutil.copy(bundle / "tokenizer" / "tokenizer.json", path)
    with pytest.raises(BundleError, match=f"{name}: .*altered"):
        pocketlm.open(bundle).session("onnx")


@pytest.mark.parametrize("kind", ("file-link", "folder-link", "missing", "folder", "pipe"))
def test_a_file_that_is_no_file_of_the_bundle_is_refused_at_once(kind, bundle, original):
    path = bundle / "onnx" / "model.onnx"
    match kind:
        case "folder-link":
            shutil.rmtree(bundle / "onnx")
            (bundle / "onnx").symlink_to(original / "onnx")
        case _:
            path.unlink()
            if kind == "file-link":
                path.symlink_to(original / "onnx" / "model.onnx")
            elif kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
    expected = {"file-link": "is a link", "folder-link": "is a link", "missing": "missing"}.get(
        kind, "not a regular file"
    )
    with pytest.raises(BundleError, match=expected):
        pocketlm.open(bundle)


def test_an_altered_tokenizer_is_refused_where_it_is_used(bundle):
    flip(bundle / "tokenizer" / "tokenizer.json")
    opened = pocketlm.open(bundle)
    with pytest.raises(BundleError, match=r"tokenizer/tokenizer\.json: .*altered"):
        _ = opened.tokenizer
    with pytest.raises(BundleError, match=r"tokenizer/tokenizer\.json: .*altered"):
        _ = opened.chat_template


def test_a_file_changed_after_it_was_checked_is_checked_again(bundle):
    opened = pocketlm.open(bundle)
    opened.check_files()
    opened.check_files()
    flip(bundle / "onnx" / "model.onnx.data")
    with pytest.raises(BundleError, match=r"onnx/model\.onnx\.data"):
        opened.check_files()


def test_every_file_is_covered_by_a_hash(bundle):
    for name in pocketlm.open(bundle).manifest.files:
        opened = pocketlm.open(bundle)
        content = (bundle / name).read_bytes()
        flip(bundle / name)
        with pytest.raises(BundleError, match="altered"):
            opened.check_files()
        (bundle / name).write_bytes(content)
    pocketlm.open(bundle).check_files()


def test_what_the_bundle_does_not_have_is_refused_by_name(original):
    bundle = pocketlm.open(original)
    with pytest.raises(InputError, match=r"no coreml artifact; this bundle has onnx"):
        bundle.session("coreml")
    with pytest.raises(InputError, match=r"unknown runtime 'tflite'; valid: executorch, onnx, coreml"):
        bundle.session("tflite")
    assert bundle.runtimes() == ["onnx"]


def test_a_newer_minor_version_with_the_same_keys_opens(bundle):
    change_manifest(bundle, lambda m: m.update(format_version="1.7"))
    assert pocketlm.open(bundle).manifest.format_version == "1.7"


def test_a_certificate_that_is_no_object_is_refused(bundle):
    (bundle / "certificate.json").write_text("[]")
    with pytest.raises(BundleError, match=r"certificate\.json"):
        _ = pocketlm.open(bundle).certificate
