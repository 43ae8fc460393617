"""Synthetic checkpoints: what is written opens as a checkpoint of its shape, exports, and is the same every time."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pocketlm.errors import InputError
from pocketlm_bench.synthetic import SHAPES, shape_named, write_checkpoint
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.checkpoint.text import open_text
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 128,
    "bos_token_id": 300, "eos_token_id": [301, 305],
}  # fmt: skip


def tiny(name: str) -> dict:
    config = {**SHAPES[name], **TINY}
    if name != "Llama-3.2-1B":
        config |= {"eos_token_id": 301, "sliding_window": 32}
    return config


@pytest.mark.parametrize("name", SHAPES)
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


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"Qwen2\.5-0\.5B, Llama-3\.2-1B, Mistral-7B"):
        shape_named("Gemma")
    with pytest.raises(InputError, match="--layers must be at least 1, not 0"):
        shape_named("Mistral-7B", 0)
    (tmp_path / "something").write_text("")
    with pytest.raises(InputError, match="not empty"):
        write_checkpoint(tiny("Mistral-7B"), tmp_path)
    huge = {**shape_named("Mistral-7B"), "num_hidden_layers": 1_000_000}
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
