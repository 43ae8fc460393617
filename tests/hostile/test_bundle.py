"""Damaged and hostile bundles: refused by one short error that names file and key, before a runtime loads anything."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pocketlm
from pocketlm.errors import BundleError, PocketLMError
from tests.hostile.damage import DAMAGED_JSON, LONGEST_MESSAGE

RUNTIMES = ("onnxruntime", "executorch", "pocketlm.runtimes.coreml_interpreter")
FILES = (
    "config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/chat_template.jinja",
    "onnx/model.onnx", "onnx/head.onnx",
    "onnx/model.onnx.data", "onnx/genai_config.json", "onnx/chat_template.jinja", "executorch/model.pte",
    "coreml/model.mlpackage/Manifest.json", "coreml/model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    "coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "golden/tokenizer.jsonl", "golden/chat.jsonl",
    "golden/replay.jsonl",
)  # fmt: skip
WATCHED_PROGRAM = """
import atexit, sys
atexit.register(lambda: print("modules:", *sys.modules, file=sys.stderr))
from pocketlm.cli.main import main
main()
"""
COMMANDS = {"inspect": (), "run": ("--prompt", "x"), "chat": (), "verify": ()}


@pytest.fixture(scope="module")
def original(demo_bundle) -> Path:
    return demo_bundle("int4").folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy whose files share their content with the original: replace a file, don't write into it."""
    return shutil.copytree(original, tmp_path / "bundle", copy_function=os.link)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def refused(bundle: Path, file: str, runtime: str | None = None) -> str:
    """The message of opening the bundle, its text files and a session over what holds ``file``, or of all files."""
    with pytest.raises(BundleError) as caught:
        opened = pocketlm.open(bundle)
        if file.startswith("tokenizer/"):
            _ = opened.tokenizer, opened.chat_template
        if runtime is not None:
            opened.session(runtime).close()
        opened.check_files()
    message = str(caught.value)
    assert file in message
    assert str(bundle) in message
    assert len(message) < LONGEST_MESSAGE + 2 * len(str(bundle))
    assert caught.value.exit_code == 2
    return message


def runtime_of(file: str) -> str | None:
    return next((name for name in ("onnx", "executorch", "coreml") if file.startswith(f"{name}/")), None)


def test_the_list_is_whole(original):
    manifest = pocketlm.open(original).manifest
    assert {name for name in manifest.files if not name.startswith(("onnx/tok", "executorch/tok", "LICENSE"))} == {
        *FILES
    }


@pytest.mark.parametrize("file", FILES)
def test_a_file_whose_content_changed(file, bundle):
    content = (bundle / file).read_bytes()
    other = next(name for name in FILES if name != file)
    for damaged in (
        b"",
        content[:1],
        content[:-1],
        content[: len(content) // 2],
        content + b"\0",
        flipped(content, 0),
        flipped(content, len(content) // 2),
        flipped(content, -1),
        (bundle / other).read_bytes(),
    ):
        replace(bundle / file, damaged)
        assert "altered" in refused(bundle, file, runtime_of(file))
    replace(bundle / file, content)
    pocketlm.open(bundle).check_files()


@pytest.mark.parametrize("file", ("manifest.json", *FILES))
def test_what_is_no_file(file, bundle, tmp_path):
    path, outside = bundle / file, tmp_path / "outside"
    path.rename(outside)
    assert "missing" in refused(bundle, file) or file == "manifest.json"
    for make, says in (
        (lambda: path.symlink_to(outside), "is a link"),
        (lambda: path.symlink_to(bundle / "nowhere"), "is a link"),
        (lambda: path.symlink_to("/dev/zero"), "is a link"),
        (path.mkdir, "not a regular file"),
        (lambda: os.mkfifo(path), "not a regular file"),
    ):
        make()
        assert says in refused(bundle, file)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("folder", ("tokenizer", "onnx", "executorch", "coreml/model.mlpackage/Data", "golden"))
def test_a_folder_that_is_a_link(folder, bundle, tmp_path):
    (bundle / folder).rename(tmp_path / "outside")
    (bundle / folder).symlink_to(tmp_path / "outside")
    assert "is a link" in refused(bundle, folder)


@pytest.mark.parametrize("name", ("other.jinja", "additional_chat_templates/default.jinja", "added_tokens.json"))
def test_a_text_file_that_was_added(name, bundle):
    path = bundle / "tokenizer" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{{ 'something else' }}")
    assert "not in the manifest" in refused(bundle, f"tokenizer/{name}")


def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    replace(path, json.dumps(content).encode())


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a JSON value; of a list and of a table of files or weights only the first entry."""
    if isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else [0]
        for key in keys[:1] if path in {("files",), ("weights",)} else keys:
            yield (*path, key)
            yield from places(value[key], (*path, key))


STRANGE: tuple[Any, ...] = (None, True, -1, 1.5, "text", [], {}, [[]], {"a": 1}, float("nan"), float("-inf"), 10**30)


def kind(value: Any) -> str:
    return "number" if isinstance(value, float) else type(value).__name__


def test_no_key_takes_another_type(bundle):
    path = bundle / "manifest.json"
    sound = json.loads(path.read_text(encoding="utf-8"))
    optional = (
        "bos_id",
        "pad_id",
        "group",
        "sampling",
        "accepted",
        "notes",
        "libraries",
        "places",
        "runtime",
        "stop_ids",
    )
    tried = 0
    for place in places(sound):
        held = sound
        for key in place:
            held = held[key]
        for value in STRANGE:
            if kind(value) == kind(held) or any(key in optional for key in place):
                continue
            changed = copy.deepcopy(sound)
            target = changed
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
            replace(path, json.dumps(changed).encode())
            with pytest.raises(BundleError, match=rf"manifest\.json: .*{place[0]}"):
                assert pocketlm.open(bundle) is None, (place, value)
            tried += 1
    assert tried > 300


def test_no_object_takes_another_key_or_the_same_twice(bundle):
    path = bundle / "manifest.json"
    sound = json.loads(path.read_text(encoding="utf-8"))
    free = {("files",), ("weights",), ("provenance", "libraries"), ("targets", "onnx", "runtime")}
    for place in [(), *places(sound)]:
        changed = copy.deepcopy(sound)
        target = changed
        for key in place:
            target = target[key]
        if not isinstance(target, dict) or place in free or place[-1:] == ("runtime",):
            continue
        target["surprise"] = 1
        replace(path, json.dumps(changed).encode())
        with pytest.raises(BundleError, match="surprise"):
            pocketlm.open(bundle)
        if target := {key: value for key, value in target.items() if key != "surprise"}:
            first = json.dumps(next(iter(target)))
            text = json.dumps(changed).replace('"surprise"', first, 1)
            replace(path, text.encode())
            with pytest.raises(BundleError, match="stands twice in one object"):
                pocketlm.open(bundle)


@pytest.mark.parametrize("case", [*DAMAGED_JSON])
def test_a_manifest_that_is_no_object(case, bundle):
    content, says = DAMAGED_JSON[case]
    replace(bundle / "manifest.json", content)
    with pytest.raises(BundleError, match=f"manifest\\.json: .*(?:{says})"):
        pocketlm.open(bundle)


def test_a_manifest_that_is_too_large(bundle):
    replace(bundle / "manifest.json", b"")
    os.truncate(bundle / "manifest.json", 65 << 20)
    with pytest.raises(BundleError, match=r"manifest\.json: too large"):
        pocketlm.open(bundle)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "negative-size": (lambda m: m["files"]["config.json"].update(size=-1), "files.config.json.size"),
    "huge-size": (lambda m: m["files"]["config.json"].update(size=1 << 62), "config.json: .* the manifest says"),
    "outside": (lambda m: m["files"].update({"../x": m["files"]["config.json"]}), "not a path inside"),
    "inner-parent": (lambda m: m["files"].update({"onnx/../x": m["files"]["config.json"]}), "not a path inside"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": m["files"]["config.json"]}), "not a path inside"),
    "nul": (lambda m: m["files"].update({"a\0b": m["files"]["config.json"]}), "missing"),
    "surrogate": (lambda m: m["files"].update({"a\ud800b": m["files"]["config.json"]}), "missing"),
    "long-name": (lambda m: m["files"].update({"a" * 5000: m["files"]["config.json"]}), "not a path inside"),
    "target-outside": (lambda m: m["targets"]["onnx"].update(path="../model.onnx"), "not a path inside"),
    "target-elsewhere": (lambda m: m["targets"]["onnx"].update(path="config.json"), "not below onnx/"),
    "target-of-another": (lambda m: m["targets"]["onnx"].update(path="executorch/model.pte"), "not below onnx/"),
    "target-unhashed": (lambda m: m["files"].pop("onnx/model.onnx"), "not among the files"),
    "version-2": (lambda m: m.update(format_version="2.0"), r"'format_version' is '2\.0'.*reads 1\.x"),
    "version-11": (lambda m: m.update(format_version="11.0"), r"'format_version' is '11\.0'"),
    "version-0": (lambda m: m.update(format_version="0.9"), r"'format_version' is '0\.9'"),
    "version-word": (lambda m: m.update(format_version="1.x"), "format_version"),
    "version-number": (lambda m: m.update(format_version=1.0), "'format_version' is 1.0"),
    "newer-with-more": (lambda m: m.update(format_version="1.7", signature="x"), "signature"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_manifest(name, bundle):
    edit, says = CHANGES[name]
    change(bundle, edit)
    with pytest.raises(BundleError, match=says) as caught:
        pocketlm.open(bundle).check_files()
    assert str(bundle) in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(bundle))


def test_a_newer_minor_version_with_known_keys_opens(bundle):
    (bundle / "certificate.json").unlink(missing_ok=True)
    change(bundle, lambda m: m.update(format_version="1.7"))
    assert pocketlm.open(bundle).manifest.format_version == "1.7"


def adopted(bundle: Path, file: str, content: bytes) -> None:
    """Another file in the place of ``file``, and the manifest says so."""
    (bundle / "certificate.json").unlink(missing_ok=True)
    replace(bundle / file, content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    change(bundle, lambda manifest: manifest["files"].update({file: record}))


FOREIGN = {
    "add.pte": "with an extended header: damaged, or an older one's",
    "linear.pte": "extended header",
    "deprecated_constant_buffer.pte": "extended header",
    "deprecated_no_constant_segment.pte": "extended header",
    "keyword_spotting.pte": "another model's program",
    "xor.pte": "another model's program",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_program_that_the_manifest_vouches_for(name, bundle, data):
    adopted(bundle, "executorch/model.pte", (data / "data" / "pte" / name).read_bytes())
    with pytest.raises(BundleError, match=FOREIGN[name]):
        pocketlm.open(bundle).session("executorch")


@pytest.mark.parametrize(
    ("file", "length"),
    (
        ("executorch/model.pte", 0),
        ("executorch/model.pte", 16),
        ("executorch/model.pte", 4096),
        ("onnx/model.onnx", 0),
        ("onnx/model.onnx", 4096),
        ("onnx/model.onnx.data", 4096),
        ("coreml/model.mlpackage/Data/com.apple.CoreML/model.mlmodel", 4096),
        ("coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin", 4096),
    ),
)
def test_a_truncated_artifact_that_the_manifest_vouches_for(file, length, bundle):
    adopted(bundle, file, (bundle / file).read_bytes()[:length])
    with pytest.raises(PocketLMError) as caught:
        pocketlm.open(bundle).session(runtime_of(file)).extend([1, 2, 3])
    assert "model" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("damage", ("manifest", "file", "certificate"))
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_before_a_runtime_is_imported(command, damage, bundle):
    file = {"manifest": "manifest.json", "file": "executorch/model.pte", "certificate": "certificate.json"}[damage]
    (bundle / "certificate.json").unlink(missing_ok=True)
    content = b"{}" if damage == "certificate" else flipped((bundle / file).read_bytes(), 100)
    (bundle / file).unlink(missing_ok=True)
    (bundle / file).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_PROGRAM, command, bundle, *COMMANDS[command]],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    *errors, modules = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "modules: "))]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(errors) == 1, done.stderr
    assert file in errors[0]
    imported = set(modules.split())
    assert "pocketlm.bundle" in imported
    assert not imported & {*RUNTIMES}
