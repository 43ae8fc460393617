"""Bad checkpoints: each gets one short message that names the file and the key or tensor, and leaves nothing behind."""

import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import pocketlm
from pocketlm.errors import InputError
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.checkpoint.tensors import TensorFile
from tests.small_checkpoint import CONFIG, write_small_checkpoint

LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Bad:
    """What is done to a sound checkpoint, and what the message must say."""

    name: str
    damage: Callable[[Path], object]
    says: str
    file: str = "config.json"


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def without(key: str) -> Callable[[Path], object]:
    left = {name: value for name, value in CONFIG.items() if name != key}
    return lambda folder: (folder / "config.json").write_text(json.dumps(left))


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors")

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Rewrite the header of the safetensors file and keep its data."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        written = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])

    return damage


def index(weight_map: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def emptied(*names: str, add: tuple[str, ...] = ()) -> Callable[[Path], object]:
    """Without its weights and ``names``, with empty files ``add``."""

    def damage(folder: Path) -> None:
        for name in ("model.safetensors", *names):
            (folder / name).unlink()
        for name in add:
            (folder / name).touch()

    return damage


def poke(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(values: dict[str, np.ndarray]) -> None:
        values[name][place] = value

    return change


def tokenizer_config(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    extra = {"id": 300, "content": "<|late|>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**extra, "normalized": False, "special": True})
    content["model"]["vocab"] |= {f"filler{i}": i for i in range(261, 300)}
    path.write_text(json.dumps(content))


WEIGHTS, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"

CONFIGURATIONS = [
    Bad("no-config", lambda f: (f / "config.json").unlink(), "no config.json", file=""),
    Bad("config-is-a-folder", replaced("config.json", Path.mkdir), "not a regular file"),
    Bad("config-is-a-pipe", replaced("config.json", os.mkfifo), "not a regular file"),
    Bad("config-is-a-device", replaced("config.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    Bad("broken-json", text("config.json", '{"model_type": '), "not a valid JSON object"),
    Bad("not-utf8", text("config.json", b"\xff\xfe{}"), "not a valid JSON object"),
    Bad("a-list", text("config.json", "[1, 2]"), "not a valid JSON object: holds a list"),
    Bad("deep", text("config.json", "[" * 200_000), "not a valid JSON object"),
    Bad("deep-object", text("config.json", '{"a":' * 200_000), "not a valid JSON object"),
    Bad(
        "deep-value",
        text("config.json", '{"rope_scaling":' + "[" * 90_000 + "]" * 90_000 + "}"),
        "not a valid JSON object",
    ),
    Bad("empty", text("config.json", ""), "not a valid JSON object"),
    Bad(
        "huge-integer",
        text("config.json", '{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}"),
        "not a valid JSON object",
    ),
    Bad("no-model-type", without("model_type"), "'model_type' is missing"),
    Bad(
        "unknown-model-type",
        config(model_type="lama"),
        r"'lama' is not supported; did you mean llama\? .*Known: .*mistral",
    ),
    Bad("model-type-is-a-path", config(model_type="../../etc/passwd"), "is not supported"),
    Bad("model-type-is-a-module", config(model_type="os.path"), "is not supported"),
    Bad("model-type-is-private", config(model_type="_decoder"), "is not supported"),
    Bad("model-type-is-a-number", config(model_type=5), "'model_type' must be a string"),
    *(
        Bad(f"no-{key}", without(key), f"'{key}' is missing")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ),
    *(
        Bad(f"{key}-{value}", config(**{key: value}), f"'{key}' must be")
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for value in (-1, 0, 10**12, True, 2.5, "32", [1], {})
    ),
    Bad(
        "epsilon-nan",
        text("config.json", json.dumps({**CONFIG, "rms_norm_eps": float("nan")})),
        "'rms_norm_eps' must be a finite",
    ),
    Bad("epsilon-zero", config(rms_norm_eps=0), "'rms_norm_eps' must be greater than zero"),
    Bad("epsilon-text", config(rms_norm_eps="1e-5"), "'rms_norm_eps' must be a finite number"),
    Bad("theta-negative", config(rope_theta=-1), "'rope_theta' must be at least 1"),
    Bad(
        "theta-infinite",
        text("config.json", json.dumps({**CONFIG, "rope_theta": float("inf")})),
        "'rope_theta' must be a finite",
    ),
    Bad(
        "heads-not-divisible", config(num_key_value_heads=3), "'num_key_value_heads' is 3, which does not divide the 4"
    ),
    Bad(
        "hidden-not-divisible", config(num_attention_heads=5, num_key_value_heads=1), "'hidden_size' is 32, which the 5"
    ),
    Bad("odd-head", config(head_dim=7), "'head_dim' is 7"),
    Bad("tied-is-text", config(tie_word_embeddings="yes"), "'tie_word_embeddings' must be true or false"),
    Bad("activation", config(hidden_act="relu"), "'hidden_act' is \"relu\"; supported: silu"),
    Bad("rope-unknown", config(rope_scaling={"rope_type": "spiral"}), "rope type 'spiral' is not supported"),
    Bad(
        "rope-two-types",
        config(rope_scaling={"rope_type": "linear", "type": "llama3", "factor": 2.0}),
        "which one was meant",
    ),
    Bad("rope-no-factor", config(rope_scaling={"rope_type": "linear"}), "'factor' is missing"),
    Bad("rope-is-a-list", config(rope_scaling=[1]), "'rope_scaling' must be an object"),
    Bad(
        "rope-stray-key",
        config(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 1}),
        "'beta_fast' has no meaning",
    ),
    Bad("rope-type-is-a-number", config(rope_scaling={"rope_type": 3}), "rope type '3' is not supported"),
    Bad("architectures", config(architectures=["LlamaForSequenceClassification"]), "'architectures' is LlamaForSeq"),
    Bad("architectures-text", config(architectures="LlamaForCausalLM"), "'architectures' must be a list"),
    Bad("eos-text", config(eos_token_id="2"), "'eos_token_id' must be a token id"),
    Bad("eos-nested", config(eos_token_id=[[2]]), "'eos_token_id' must be a token id"),
    Bad("unknown-key", config(logit_scale=2.0), "unknown key 'logit_scale'.*--accept logit_scale"),
    Bad("quantized", config(quantization_config={"quant_method": "gptq"}), "already quantized \\(gptq\\)"),
    Bad("quantized-not-an-object", config(quantization_config="awq"), "already quantized"),
    Bad("generation-broken", text(GENERATION, "{"), "not a valid JSON object", GENERATION),
    Bad(
        "generation-temperature",
        text(GENERATION, '{"temperature": "hot"}'),
        "'temperature' must be",
        GENERATION,
    ),
    Bad(
        "generation-top-k",
        text(GENERATION, '{"top_k": -1}'),
        "'top_k' must be",
        GENERATION,
    ),
    Bad(
        "generation-penalty",
        text(GENERATION, '{"repetition_penalty": 0}'),
        "'repetition_penalty' must be",
        GENERATION,
    ),
]

FILES = [
    Bad("adapter", emptied("config.json", add=("adapter_config.json",)), "a PEFT adapter.*merge it", file=""),
    Bad("adapter-with-config", emptied(add=("adapter_config.json",)), "a PEFT adapter.*merge it", file=""),
    Bad("gguf", emptied("config.json", add=("model-q4.gguf",)), "holds GGUF.*original safetensors", file=""),
    Bad("gguf-with-config", emptied(add=("model-q4.gguf",)), "holds GGUF.*original safetensors", file=""),
    Bad("pickle", emptied(add=("pytorch_model.bin",)), "pickle files only.*safe_serialization", file=""),
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
    Bad("huge-shape", header(lambda h: h[NORM].update(shape=[2**62, 2**62])), f"{NORM}: F32 .* needs", WEIGHTS),
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
    Bad("template-a-number", tokenizer_config(chat_template=5), "chat_template", file="chat_template"),
]


def check_refused(bad: Bad, root: Path, targets: tuple[str, ...] = ("onnx",)) -> None:
    source = write_small_checkpoint(root / "checkpoint")
    bad.damage(source)
    place = root / "place"
    with pytest.raises(InputError, match=bad.says) as caught:
        pocketlm.export(source, place / "bundle", targets=targets, store=root / "store")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE + len(str(source))
    assert bad.file in message
    assert str(source) in message
    assert not place.exists()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("bad", CONFIGURATIONS, ids=lambda bad: bad.name)
def test_a_bad_configuration_is_refused(bad, tmp_path):
    check_refused(bad, tmp_path)


@pytest.mark.parametrize("bad", FILES, ids=lambda bad: bad.name)
def test_bad_files_are_refused(bad, tmp_path):
    check_refused(bad, tmp_path)


def test_a_weight_beyond_fp16_is_refused_by_core_ml_alone(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    tensors(poke(NORM, (7,), 1e5))(source)
    with pytest.raises(InputError, match=rf"coreml: {NORM}.*7.*fp16"):
        pocketlm.export(source, tmp_path / "coreml", targets=("coreml",), store=tmp_path / "store")
    assert not (tmp_path / "coreml").exists()
    pocketlm.export(source, tmp_path / "onnx", targets=("onnx",), store=tmp_path / "store")


def test_what_is_accepted_by_name_passes(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    add_token(source)
    config(logit_scale=2.0)(source)
    pocketlm.export(
        source, tmp_path / "b", targets=("onnx",), store=tmp_path / "store", accept=("<|late|>", "logit_scale")
    )


def test_no_code_of_the_checkpoint_runs(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    trap = tmp_path / "trapped"
    for name in ("modeling_llama.py", "configuration_llama.py", "llama.py"):
        (source / name).write_text(f"open({str(trap)!r}, 'w')")
    config(auto_map={"AutoModelForCausalLM": "modeling_llama.Model", "AutoConfig": "configuration_llama.Config"})(
        source
    )
    pocketlm.export(source, tmp_path / "bundle", targets=("onnx",), store=tmp_path / "store")
    assert not trap.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    key=st.sampled_from(sorted({*CONFIG, "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "layer_types"})),
    value=JSON,
)
def test_any_value_of_a_key_opens_or_is_refused(key, value, tmp_path):
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_small_checkpoint(folder)
    config(**{key: value})(folder)
    try:
        open_checkpoint(folder)
    except InputError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < LONGEST_MESSAGE + len(str(folder))


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
