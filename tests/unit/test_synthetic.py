"""Synthetic checkpoints: what is written opens as a checkpoint of its shape, exports, and is the same every time."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pocketlm.errors import InputError
from pocketlm_bench.shapes import COMMITTED, RELEASED, shape_named
from pocketlm_bench.synthetic import checkpoint_bytes, write_checkpoint
from pocketlm_export.architectures import build_graph
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.checkpoint.text import open_text
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.reference import ReferenceSession

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 128,
    "bos_token_id": 300, "eos_token_id": [301, 305],
}  # fmt: skip


def tiny(name: str) -> dict:
    config = {**COMMITTED[name], **TINY}
    if name != "Llama-3.2-1B":
        config |= {"eos_token_id": 301, "sliding_window": 32}
    return config


def tiny_released(name: str) -> dict:
    """A released configuration with small sizes, and what else must then change with them."""
    config = {**shape_named(name, 2), **TINY}
    if "sliding_window" in config:
        config["sliding_window"] = 32
    changes = {
        "num_key_value_heads": 1 if config["model_type"] == "gemma" else 4 if "phi" in config["model_type"] else 2,
        "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32, "ff_intermediate_size": 96,
        "query_pre_attn_scalar": 16, "pad_token_id": 0, "blocksparse_block_size": 8, "blocksparse_num_local_blocks": 2,
    }  # fmt: skip
    return {**config, **{key: value for key, value in changes.items() if key in config}}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_shape_has_the_size_that_its_file_has(name, data):
    promised = json.loads((data / "reference" / "released" / RELEASED[name] / "tensors.json").read_text())
    size = {"BF16": 2, "F16": 2, "F32": 4}[promised["dtype"]]
    saved_copy = 0
    if promised["tied"]:
        heads = [entry for entry in promised["tensors"] if entry["name"] == "lm_head.weight"]
        saved_copy = sum(entry["shape"][0] * entry["shape"][1] for entry in heads)
    assert checkpoint_bytes(name) == 2 * (promised["total_size"] // size - saved_copy)


@pytest.mark.parametrize("name", ("Phi-2", "Phi-3-mini", "Gemma-2B", "Gemma-2-2B", "Gemma-3-1B", "Mixtral-8x7B"))
def test_a_released_family_has_a_sane_scale(name, data, tmp_path):  # noqa: ARG001  the shapes are read there
    folder = write_checkpoint(tiny_released(name), tmp_path / "checkpoint")
    checkpoint = open_checkpoint(folder)
    graph = build_graph(checkpoint.config, 64)
    checkpoint.check_tensors(graph.weights())
    weights = quantize(checkpoint.tensors, assign_rows(graph, "fp32", "int8"), WeightStore(tmp_path / "store"))
    logits = ReferenceSession(graph, weights).all_logits(list(range(20, 60)))
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 10


def test_fewer_layers_keep_what_each_layer_is(data):  # noqa: ARG001  the shapes are read there
    config = shape_named("SmolLM3-3B", 6)
    assert config["num_hidden_layers"] == 6
    assert config["no_rope_layers"] == [1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("name", COMMITTED)
def test_each_family_opens_and_exports(name, tmp_path):
    folder = write_checkpoint(tiny(name), tmp_path / "checkpoint", shard_bytes=40_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.vocabulary_size == 320
    options = ExportOptions(targets=("onnx",), scheme="int4", head="int4", store=tmp_path / "store", verify=False)
    bundle = export_bundle(str(folder), tmp_path / "bundle", options)
    assert 301 in bundle.stop_ids
    with bundle.session("onnx", threads=1) as session:
        logits = session.extend(bundle.tokenizer.encode("A text.", add_special_tokens=True))
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 10


def test_the_tokenizer_has_exactly_the_vocabulary(tmp_path):
    folder = write_checkpoint(tiny("Llama-3.2-1B"), tmp_path / "checkpoint")
    text = open_text(open_checkpoint(folder))
    assert text.tokenizer.token_id("<|begin|>") == 300
    assert text.tokenizer.token_id("<|end|>") == 301
    assert not text.tokenizer.tokens_from(320)
    assert text.tokenizer.tokens_from(319)
    words = "Grüße, 世界!\n"
    assert text.tokenizer.decode(text.tokenizer.encode(words, add_special_tokens=False)) == words
    assert text.template is not None
    rendered = text.template.render([{"role": "user", "content": "Hello"}])
    assert rendered.startswith("<|user|>Hello<|end|>")


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    config = tiny("Qwen2.5-0.5B")

    def digest(name: str, **options: int) -> dict[str, str]:
        folder = write_checkpoint(config, tmp_path / name, **options)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    first, again, other = digest("first"), digest("again"), digest("other", seed=1)
    assert first == again
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]


def test_blocks_and_shards_do_not_change_a_tensor(tmp_path, monkeypatch):
    config = tiny("Mistral-7B")
    whole = open_checkpoint(write_checkpoint(config, tmp_path / "whole")).tensors
    monkeypatch.setattr("pocketlm_bench.synthetic.BLOCK_VALUES", 640)
    parts = open_checkpoint(write_checkpoint(config, tmp_path / "parts", shard_bytes=10_000)).tensors
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        values = [np.concatenate([block for _, block in tensors.blocks(name, 1000)]) for tensors in (whole, parts)]
        np.testing.assert_array_equal(*values)


def test_scale_and_outliers(tmp_path):
    folder = write_checkpoint(tiny("Mistral-7B"), tmp_path / "checkpoint")
    tensors = open_checkpoint(folder).tensors

    def deviations(name: str) -> np.ndarray:
        return np.concatenate([block for _, block in tensors.blocks(name, 1 << 20)]).std(axis=1)

    ordinary = deviations("model.layers.1.mlp.down_proj.weight")
    outlying = deviations("model.layers.0.mlp.down_proj.weight")
    assert ordinary.mean() == pytest.approx((96 * 4) ** -0.5, rel=0.1)  # added by four matrices of 96 columns
    assert (outlying > 4 * np.median(outlying)).sum() == 4
    assert deviations("model.embed_tokens.weight").mean() == pytest.approx(1, rel=0.05)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"Qwen2\.5-0\.5B, Llama-3\.2-1B, Mistral-7B"):
        shape_named("Gemma")
    monkeypatch.setenv("POCKETLM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere.*phi-2/config.json: no such file: Phi-2 is the shape"):
        shape_named("Phi-2")
    with pytest.raises(InputError, match="--layers must be at least 1, not 0"):
        shape_named("Mistral-7B", 0)
    (tmp_path / "something").write_text("")
    with pytest.raises(InputError, match="not empty"):
        write_checkpoint(tiny("Mistral-7B"), tmp_path)
    huge = {**shape_named("Mistral-7B"), "vocab_size": 1 << 24, "hidden_size": 1 << 20}
    with pytest.raises(InputError, match="the disk has"):
        write_checkpoint(huge, tmp_path / "huge")
    assert list((tmp_path / "huge").iterdir()) == []


def test_the_command(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pocketlm_bench.synthetic", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = run("Gemma", str(tmp_path / "folder"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: unknown shape 'Gemma'")
    assert not Path(tmp_path / "folder").exists()
