"""Golden texts through PocketLM's tokenizer and template and through the vendors', as the certificate counts them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

import pocketlm
from pocketlm.certificate import TextConformance
from pocketlm.errors import BundleError
from pocketlm.tokenizer import Tokenizer
from pocketlm_export.vendor_tokenizers import write_tokenizer_files
from pocketlm_export.verify.golden_questions import Question
from pocketlm_export.verify.text import check_text
from pocketlm_export.verify.vendor_text import VENDORS, ask_vendor
from tests.small_checkpoint import write_small_checkpoint

GENAI, EXECUTORCH = VENDORS
OWN = ["pocketlm: encode", "pocketlm: encode with special tokens", "pocketlm: decode", "pocketlm: render"]


@pytest.fixture(scope="module")
def composing(tmp_path_factory) -> pocketlm.Bundle:
    """A bundle whose tokenizer composes its text, as Qwen's."""
    root = tmp_path_factory.mktemp("composing")
    source = write_small_checkpoint(root / "source")
    tokenizer = Backend.from_file(str(source / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(source / "tokenizer.json"))
    return pocketlm.export(source, root / "bundle", targets=("onnx", "executorch"), store=root / "store", verify=False)


@pytest.fixture
def edited(composing: pocketlm.Bundle, tmp_path: Path) -> Callable[..., pocketlm.Bundle]:
    """``edited(name, change)`` -> a copy in which ``change`` was applied to a file's bytes, and the manifest agrees;
    None instead of bytes: the file is left out."""

    def make(name: str, change: Callable[[bytes], bytes | None]) -> pocketlm.Bundle:
        folder = tmp_path / "edited"
        shutil.copytree(composing.folder, folder)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        content = change((folder / name).read_bytes())
        if content is None:
            del manifest["files"][name]
        else:
            (folder / name).write_bytes(content)
            manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return pocketlm.open(folder)

    return make


def by_name(bundle: pocketlm.Bundle) -> dict[str, TextConformance]:
    return {result.name: result for result in check_text(bundle)}


def test_the_demo_bundle_conforms(demo_bundle):
    results = by_name(demo_bundle("int4"))
    for name in OWN:
        assert results[name].status == "passed", name
        assert results[name].strings >= 29
    for kind in EXECUTORCH.kinds:
        assert results[f"pytorch_tokenizers: {kind}"].status == "passed"
    for kind in ("render", "encode what was rendered"):
        assert results[f"onnxruntime-genai: {kind}"].status == "passed"
    encoded = results["onnxruntime-genai: encode"]
    assert (encoded.status, encoded.differing, encoded.version) == ("differs", 2, "0.18.0")
    assert all("\\x00" in example for example in encoded.examples)  # its interface ends a text at a NUL


def test_a_composing_tokenizer_is_right_in_executorch_and_counted_in_genai(composing):
    results = by_name(composing)
    assert [results[name].status for name in OWN] == ["passed"] * 4
    rewritten = results["pocketlm: encode with executorch/tokenizer.json"]
    assert rewritten.status == "passed"
    assert rewritten.strings >= 200
    assert "pocketlm: encode with onnx/tokenizer.json" not in results  # its bytes are the model's own
    executorch, genai = results["pytorch_tokenizers: encode"], results["onnxruntime-genai: encode"]
    assert (executorch.status, executorch.differing) == ("differs", 2)
    assert genai.status == "differs"
    assert genai.differing > executorch.differing
    assert "e\\u0301" in genai.examples[0]


@pytest.mark.parametrize(
    ("name", "key", "value", "result"),
    [
        ("golden/tokenizer.jsonl", "ids", [5], "pocketlm: encode"),
        ("golden/tokenizer.jsonl", "ids_with_special", [5], "pocketlm: encode with special tokens"),
        ("golden/tokenizer.jsonl", "decoded", "another", "pocketlm: decode"),
        ("golden/chat.jsonl", "text", "another", "pocketlm: render"),
    ],
)
def test_a_golden_value_that_is_not_reproduced_fails(name, key, value, result, edited):
    def change(content: bytes) -> bytes:
        first, rest = content.split(b"\n", 1)
        return json.dumps({**json.loads(first), key: value}).encode() + b"\n" + rest

    failed = by_name(edited(name, change))[result]
    assert (failed.status, failed.differing, failed.golden) == ("failed", 1, name)
    assert len(failed.examples) == 1


def test_a_refusal_that_does_not_come_fails(edited):
    def change(content: bytes) -> bytes:
        record = json.loads(content.splitlines()[0])
        del record["text"]
        return json.dumps({**record, "error": True}).encode() + b"\n"

    results = by_name(edited("golden/chat.jsonl", change))
    assert (results["pocketlm: render"].status, results["pocketlm: render"].differing) == ("failed", 1)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_vendor_s_file_that_says_something_else_fails(target, edited):
    def change(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), "normalizer": {"type": "Lowercase"}}).encode()

    failed = by_name(edited(f"{target}/tokenizer.json", change))[f"pocketlm: encode with {target}/tokenizer.json"]
    assert failed.status == "failed"
    assert 0 < failed.differing < failed.strings


@pytest.mark.parametrize("change", [lambda _: None, lambda _: b""], ids=["missing", "empty"])
def test_without_golden_vectors_nothing_passes(change, edited):
    results = check_text(edited("golden/tokenizer.jsonl", change))
    encodings = [result for result in results if result.golden == "golden/tokenizer.jsonl"]
    assert len(encodings) == 8
    assert {result.status for result in encodings} == {"not run"}


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'{"text": "a"}', b'{"text": "a", "ids": [-1], "ids_with_special": [], "decoded": ""}', b"[" * 9999],
)
def test_a_malformed_golden_file_is_refused_by_line(line, edited):
    bundle = edited("golden/tokenizer.jsonl", lambda content: content + line + b"\n")
    with pytest.raises(BundleError, match=r"golden/tokenizer\.jsonl: line \d{3}: "):
        check_text(bundle)


def test_a_vendor_that_crashes_ends_nothing_else(edited):
    # PyTorch's tokenizer reads normalizers recursively, without a bound.
    def nested(content: bytes) -> bytes:
        deep = b'{"type":"Sequence","normalizers":[' * 100_000 + b"]}" * 100_000
        return (
            json.dumps({**json.loads(content), "normalizer": 0})
            .encode()
            .replace(b'"normalizer": 0', b'"normalizer": ' + deep)
        )

    results = by_name(edited("executorch/tokenizer.json", nested))
    crashed = results["pytorch_tokenizers: encode"]
    assert crashed.status == "not run"
    assert "SIGSEGV" in str(crashed.reason)
    assert results["pocketlm: encode"].status == "passed"
    assert results["pocketlm: encode with executorch/tokenizer.json"].status == "failed"


def test_a_tokenizer_that_the_vendor_does_not_know_is_not_run_with_the_reason(edited):
    def change(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), "normalizer": {"type": "NFKD"}}).encode()

    result = by_name(edited("executorch/tokenizer.json", change))["pytorch_tokenizers: encode"]
    assert result.status == "not run"
    assert "executorch/" in str(result.reason)


def test_a_vendor_that_does_not_end_is_ended(composing, tmp_path):
    # PyTorch's tokenizer looks for ever for a pattern that matches nothing.
    content = json.loads((composing.folder / "executorch" / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    told = ask_vendor(EXECUTORCH, tmp_path, [Question("decode", [70], "A"), Question("encode", "A", [70])], seconds=3)
    assert len(told.answers) == 1
    assert told.trouble == "was ended after its time, after 1 of 2 questions"


def test_phi_3_in_both_vendors(data, tmp_path):
    source = data / "data" / "tokenizers" / "phi-3-mini"
    files = {path.name: path for path in source.iterdir()}
    lines = (data / "data/tokenizers/golden_encodings.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [Question("encode", row["text"], row["ids"]["phi-3"]) for row in map(json.loads, lines)]
    assert len(questions) == 47
    for vendor in VENDORS:
        folder = tmp_path / vendor.target
        folder.mkdir()
        write_tokenizer_files(vendor.target, files, folder)
        model = {"type": "decoder", "context_length": 16, "vocab_size": 10, "decoder": {}}
        (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
        assert ask_vendor(vendor, folder, questions).answers == [question.answer for question in questions]


def test_phi_3_in_86_languages(data, tmp_path):
    source = data / "data" / "tokenizers" / "phi-3-mini"
    tokenizer = Tokenizer.open(source)
    lines = (data / "data/text/udhr.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 86
    questions = [Question("encode", text, tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    for question in questions:
        assert tokenizer.decode(question.answer) == question.asked
    write_tokenizer_files("executorch", {"tokenizer.json": source / "tokenizer.json"}, tmp_path)
    assert ask_vendor(EXECUTORCH, tmp_path, questions).answers == [question.answer for question in questions]
