"""Bad checkpoints: each gets one short message that names the file and the key or tensor, and leaves nothing behind."""

import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import pocketlm
from pocketlm.errors import InputError
from pocketlm_export.checkpoint.tensors import TensorFile
from tests.hostile.damage import (
    DAMAGED_JSON,
    Bad,
    add_token,
    check_refused,
    config,
    emptied,
    header,
    index,
    poke,
    post_processor,
    replaced,
    tensors,
    text,
    tokenizer_config,
    vocabulary,
)
from tests.small_checkpoint import write_small_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
ADAPTER = "adapter_config.json"
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"

FILES = [
    Bad("no-folder", shutil.rmtree, "no such folder", file=""),
    Bad("a-file", lambda f: (shutil.rmtree(f), f.write_text("")), "not a folder", file=""),
    Bad("adapter", emptied("config.json", add=(ADAPTER,)), "a PEFT adapter.*merge it", ADAPTER),
    Bad("adapter-with-config", emptied(add=(ADAPTER,)), "a PEFT adapter.*merge it", ADAPTER),
    Bad("adapter-beside-a-model", text(ADAPTER, "{}"), "a PEFT adapter.*merge it", ADAPTER),
    Bad("gguf", emptied("config.json", add=("model-q4.gguf",)), "GGUF.*original safetensors", "model-q4.gguf"),
    Bad("gguf-with-config", emptied(add=("model-q4.gguf",)), "GGUF.*original safetensors", "model-q4.gguf"),
    Bad("pickle", emptied(add=("pytorch_model.bin",)), "a pickle, .*safe_serialization", "pytorch_model.bin"),
    *(
        Bad(f"{name}-{case}", text(name, content), says, name)
        for name in (INDEX, "tokenizer_config.json", "tokenizer.json")
        for case, (content, says) in DAMAGED_JSON.items()
    ),
    *(
        Bad(f"header-{case}", text(WEIGHTS, struct.pack("<Q", len(content)) + content), f"header .*{says}", WEIGHTS)
        for case, (content, says) in DAMAGED_JSON.items()
    ),
    Bad("mistral-format", emptied(add=("consolidated.safetensors",)), "consolidated.safetensors only", file=""),
    Bad("no-weights", emptied(), "no model.safetensors", file=""),
    Bad("weights-are-a-folder", replaced(WEIGHTS, Path.mkdir), "not a regular file", WEIGHTS),
    Bad("weights-are-a-pipe", replaced(WEIGHTS, os.mkfifo), "not a regular file", WEIGHTS),
    Bad("weights-are-a-device", replaced(WEIGHTS, lambda p: p.symlink_to("/dev/zero")), "not a regular file", WEIGHTS),
    Bad("empty-file", text(WEIGHTS, b""), "truncated", WEIGHTS),
    Bad("seven-bytes", text(WEIGHTS, b"1234567"), "truncated", WEIGHTS),
    Bad("truncated", lambda f: os.truncate(f / WEIGHTS, 5000), "outside the file|truncated", WEIGHTS),
    Bad(
        "one-byte-short",
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1),
        "outside the file|truncated",
        WEIGHTS,
    ),
    Bad("trailing-bytes", lambda f: (f / WEIGHTS).open("ab").write(b"\0"), "truncated or altered", WEIGHTS),
    Bad("header-beyond-file", text(WEIGHTS, struct.pack("<Q", 10**9) + b"{}"), "header's length", WEIGHTS),
    Bad("header-of-2^64", text(WEIGHTS, b"\xff" * 64), "header's length", WEIGHTS),
    Bad("header-not-json", text(WEIGHTS, struct.pack("<Q", 4) + b"abcd"), "not a valid JSON object", WEIGHTS),
    Bad("header-deep", text(WEIGHTS, struct.pack("<Q", 200_000) + b"[" * 200_000), "not a valid JSON object", WEIGHTS),
    Bad("header-a-list", text(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "holds a list", WEIGHTS),
    Bad(
        "pickle-in-disguise",
        text(WEIGHTS, b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n"),
        "header's length",
        WEIGHTS,
    ),
    Bad("entry-malformed", header(lambda h: h.update({NORM: {"dtype": "F32"}})), f"{NORM}: malformed", WEIGHTS),
    Bad("entry-a-number", header(lambda h: h.update({NORM: 3})), f"{NORM}: malformed", WEIGHTS),
    Bad("negative-shape", header(lambda h: h[NORM].update(shape=[-32])), f"{NORM}: malformed", WEIGHTS),
    Bad("shape-of-true", header(lambda h: h[NORM].update(shape=[True])), f"{NORM}: malformed", WEIGHTS),
    Bad("huge-shape", header(lambda h: h[NORM].update(shape=[2**62, 2**62])), f"{NORM}: no tensor of 2", WEIGHTS),
    Bad("huge-empty-shape", header(lambda h: h[NORM].update(shape=[2**62, 0])), f"{NORM}: no tensor of 2", WEIGHTS),
    Bad("unknown-dtype", header(lambda h: h[NORM].update(dtype="Q4")), f"{NORM}: unknown dtype 'Q4'", WEIGHTS),
    Bad(
        "offsets-outside",
        header(lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 128])),
        f"{NORM}: its bytes",
        WEIGHTS,
    ),
    Bad(
        "offsets-reversed",
        header(lambda h: h[NORM].update(data_offsets=h[NORM]["data_offsets"][::-1])),
        f"{NORM}: its bytes",
        WEIGHTS,
    ),
    Bad(
        "offsets-overlap",
        header(lambda h: h[NORM].update(data_offsets=[0, 128])),
        "overlaps another tensor|leaves a hole",
        WEIGHTS,
    ),
    Bad("size-mismatch", header(lambda h: h[NORM].update(shape=[31])), f"{NORM}: F32 .* needs 124 bytes", WEIGHTS),
    Bad("index-broken", text(INDEX, "{"), "not a valid JSON object", INDEX),
    Bad("index-a-list", text(INDEX, "[]"), "holds a list", INDEX),
    Bad("index-empty", index({}), "'weight_map' must be", INDEX),
    Bad(
        "index-outside",
        index({NORM: "../model.safetensors"}),
        f"{NORM}: '\\.\\./model.safetensors' is not the name",
        INDEX,
    ),
    Bad("index-absolute", index({NORM: "/dev/zero.safetensors"}), f"{NORM}: .* is not the name", INDEX),
    Bad("index-number", index({NORM: 3}), f"{NORM}: 3 is not the name", INDEX),
    Bad("index-pickle", index({NORM: "pytorch_model.bin"}), f"{NORM}: .* is not the name", INDEX),
    Bad("index-missing-shard", index({NORM: "model-2.safetensors"}), "shard model-2.safetensors is missing", INDEX),
    Bad(
        "index-shard-is-a-pipe",
        lambda f: (index({NORM: "pipe.safetensors"})(f), os.mkfifo(f / "pipe.safetensors")),
        "not a regular file",
        file="pipe.safetensors",
    ),
    Bad(
        "index-shard-is-a-device",
        lambda f: (index({NORM: "zero.safetensors"})(f), (f / "zero.safetensors").symlink_to("/dev/zero")),
        "not a regular file",
        file="zero.safetensors",
    ),
    Bad("index-promises-more", index({"model.nothing": WEIGHTS}), "tensor model.nothing is missing", WEIGHTS),
    Bad("index-is-a-pipe", lambda f: os.mkfifo(f / INDEX), "not a regular file", INDEX),
    Bad("tensor-missing", tensors(lambda t: t.pop(UP)), f"{UP} .* is missing", file=""),
    Bad(
        "tensor-unknown",
        tensors(lambda t: t.update({"model.extra": np.zeros(3, np.float32)})),
        "model.extra.*--accept",
        file="",
    ),
    Bad(
        "tensor-shape",
        tensors(lambda t: t.update({UP: t[UP][:-1].copy()})),
        f"{UP} has shape \\[63, 32\\].*\\[64, 32\\]",
        WEIGHTS,
    ),
    Bad("tensor-integers", tensors(lambda t: t.update({UP: t[UP].astype(np.int8)})), f"{UP} has dtype I8", WEIGHTS),
    Bad(
        "tensor-f64", tensors(lambda t: t.update({NORM: t[NORM].astype(np.float64)})), f"{NORM} has dtype F64", WEIGHTS
    ),
    Bad("weight-nan", tensors(poke(UP, (3, 5), np.nan)), re.escape(f"{UP}[3, 5] is not finite"), WEIGHTS),
    Bad("weight-infinite", tensors(poke(UP, (63, 31), np.inf)), re.escape(f"{UP}[63, 31] is not finite"), WEIGHTS),
    Bad("vector-nan", tensors(poke(NORM, (7,), np.nan)), re.escape(f"{NORM}[7] is not finite"), WEIGHTS),
    Bad("no-tokenizer", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json.*save_pretrained", file=""),
    Bad("tokenizer-broken", text("tokenizer.json", "{"), "not a tokenizer", file="tokenizer.json"),
    Bad("tokenizer-empty-object", text("tokenizer.json", "{}"), "not a tokenizer", file="tokenizer.json"),
    Bad("tokenizer-not-utf8", text("tokenizer.json", b"\xff\xfe"), "tokenizer", file="tokenizer.json"),
    Bad("tokenizer-beyond-rows", add_token, "<\\|late\\|>.*beyond the 300 rows.*--accept", file="tokenizer.json"),
    Bad(
        "tokenizer-undefined-token",
        post_processor(
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {},
            }
        ),
        "the tokenizers library fails with it",
        file="tokenizer.json",
    ),
    Bad("token-beyond-memory", vocabulary(late=(1 << 32) - 1), "'late'.*beyond the 300 rows", file="tokenizer.json"),
    Bad("tokenizer-is-a-pipe", replaced("tokenizer.json", os.mkfifo), "not a regular file", "tokenizer.json"),
    Bad(
        "tokenizer-config-is-a-pipe",
        replaced("tokenizer_config.json", os.mkfifo),
        "not a regular file",
        "tokenizer_config.json",
    ),
    Bad(
        "tokenizer-config-broken",
        text("tokenizer_config.json", "{"),
        "not a valid JSON object",
        file="tokenizer_config.json",
    ),
    Bad("tokenizer-config-a-list", text("tokenizer_config.json", "[]"), "list", file="tokenizer_config.json"),
    Bad("template-syntax", tokenizer_config(chat_template="{% for m in %}"), "line 1|syntax", file="chat_template"),
    Bad("template-endless", tokenizer_config(chat_template=ENDLESS), "chat_template", file="chat_template"),
    Bad(
        "template-internals",
        tokenizer_config(chat_template="{{ ().__class__.__base__.__subclasses__() }}"),
        "chat_template",
        file="chat_template",
    ),
    Bad(
        "template-import",
        tokenizer_config(chat_template="{% include '/etc/passwd' %}"),
        "chat_template",
        file="chat_template",
    ),
    Bad(
        "template-is-a-pipe",
        lambda f: os.mkfifo(f / "chat_template.jinja"),
        "not a regular file",
        file="chat_template.jinja",
    ),
    Bad(
        "other-template-is-a-pipe",
        lambda f: ((f / "additional_chat_templates").mkdir(), os.mkfifo(f / "additional_chat_templates" / "rag.jinja")),
        "not a regular file",
        file="rag.jinja",
    ),
    Bad("template-a-number", tokenizer_config(chat_template=5), "chat_template", file="chat_template"),
]


@pytest.mark.parametrize("bad", FILES, ids=lambda bad: bad.name)
def test_bad_files_are_refused(bad, tmp_path):
    check_refused(bad, tmp_path)


def test_a_weight_beyond_fp16_is_refused_by_core_ml_alone(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    tensors(poke(NORM, (7,), 1e5))(source)
    with pytest.raises(InputError, match=rf"coreml: {NORM}.*7.*fp16"):
        pocketlm.export(source, tmp_path / "coreml", targets=("coreml",), store=tmp_path / "store", verify=False)
    assert not (tmp_path / "coreml").exists()
    pocketlm.export(source, tmp_path / "onnx", targets=("onnx",), store=tmp_path / "store", verify=False)


def test_what_is_accepted_by_name_passes(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    add_token(source)
    config(logit_scale=2.0)(source)
    pocketlm.export(
        source,
        tmp_path / "b",
        targets=("onnx",),
        store=tmp_path / "store",
        accept=("<|late|>", "logit_scale"),
        verify=False,
    )


def test_no_code_of_the_checkpoint_runs(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    trap = tmp_path / "trapped"
    for name in ("modeling_llama.py", "configuration_llama.py", "llama.py"):
        (source / name).write_text(f"open({str(trap)!r}, 'w')")
    config(auto_map={"AutoModelForCausalLM": "modeling_llama.Model", "AutoConfig": "configuration_llama.Config"})(
        source
    )
    pocketlm.export(source, tmp_path / "bundle", targets=("onnx",), store=tmp_path / "store", verify=False)
    assert not trap.exists()


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_a_changed_byte_of_a_header_reads_or_is_refused(data, tmp_path):
    source = tmp_path / WEIGHTS
    save_file({"a": np.ones((4, 3), np.float32), "b": np.zeros(5, np.float16)}, source)
    content = bytearray(source.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    source.write_bytes(content)
    try:
        file = TensorFile(source)
    except InputError as error:
        assert "\n" not in str(error)
        return
    for name in file:
        assert file.buffer(name).nbytes <= len(content)


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_file_or_refused(content, tmp_path):
    path = tmp_path / WEIGHTS
    path.write_bytes(content)
    try:
        TensorFile(path)
    except InputError as error:
        assert str(path) in str(error)
