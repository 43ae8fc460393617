"""Reading checkpoints: both spellings, single and sharded files, the released models, and what fine-tunes add."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pocketlm.errors import CheckpointError, UnsupportedError
from pocketlm_export.architectures import SUPPRESSING_BIAS, build_graph
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.checkpoint.tensors import TensorFile
from pocketlm_export.checkpoint.text import open_text, with_tokenizer_stop
from pocketlm_export.selection import tensor_of
from tests.small_checkpoint import CONFIG, tensors_of, write_header_only, write_small_checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_small_checkpoint(tmp_path / "checkpoint")


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check(folder: Path, accept=()) -> None:
    checkpoint = open_checkpoint(folder, accept)
    checkpoint.check_tensors(build_graph(checkpoint.config, 16).weights(), accept)
    checkpoint.check_saved_head(accept)


def test_a_small_checkpoint_opens(folder):
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    assert (config.model_type, config.vocabulary_size, config.hidden_size) == ("llama", 300, 32)
    assert (len(config.layers), config.heads, config.kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert config.tied
    assert set(checkpoint.tensors.names()) == set(tensors_of(CONFIG))
    assert set(checkpoint.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    check(folder)


def test_both_spellings_give_one_configuration(folder):
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    change_config(folder, **older)
    first = open_checkpoint(folder).config
    newer = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    newer |= {"dtype": "float32", "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(newer))
    assert open_checkpoint(folder).config == first


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_values_are_exact_in_every_dtype(dtype, tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    values = torch.randn(37, 12, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    save_torch({"w": values}, tmp_path / "model.safetensors")
    file = TensorFile(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(file.values("w"), values.float().numpy())
    blocks = list(file.float_blocks("w", 5 * 12))
    assert [start for start, _ in blocks] == list(range(0, 37, 5))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), values.float().numpy())


def shard(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    weight_map = {}
    for name, held in parts.items():
        save_file({tensor: values[tensor] for tensor in held}, folder / name)
        weight_map |= dict.fromkeys(held, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": None, "weight_map": weight_map}))


def test_shards_hold_what_the_single_file_held(folder):
    single = open_checkpoint(folder)
    expected = {name: single.tensors.values(name) for name in single.tensors.names()}
    digest = single.digest(expected)
    shard(folder)
    sharded = open_checkpoint(folder)
    for name, values in expected.items():
        np.testing.assert_array_equal(sharded.tensors.values(name), values)
    assert sharded.digest(expected) == digest
    check(folder)


def test_the_index_wins_over_a_single_file(folder):
    values = load_file(folder / "model.safetensors")
    shard(folder)
    save_file({name: value * 2 for name, value in values.items()}, folder / "model.safetensors")
    np.testing.assert_array_equal(
        open_checkpoint(folder).tensors.values("model.norm.weight"), values["model.norm.weight"]
    )


def test_the_digest_follows_config_and_weights(folder):
    names = set(tensors_of(CONFIG))
    first = open_checkpoint(folder).digest(names)
    change_config(folder, rms_norm_eps=1e-6)
    second = open_checkpoint(folder).digest(names)
    values = load_file(folder / "model.safetensors")
    values["model.norm.weight"] = values["model.norm.weight"] + np.float32(1)
    save_file(values, folder / "model.safetensors")
    assert len({first, second, open_checkpoint(folder).digest(names)}) == 3


def test_stop_ids_are_the_union_of_both_files(folder):
    change_config(folder, eos_token_id=[1, 7])
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": 9, "bos_token_id": 3, "do_sample": True, "temperature": 0.6, "top_k": 20, "max_length": 5}
        )
    )
    generation = open_checkpoint(folder).generation
    assert generation.stop_ids == (1, 7, 9)
    assert generation.bos_id == 3
    assert generation.sampling == {"do_sample": True, "temperature": 0.6, "top_k": 20}


def test_the_tokenizers_end_of_sequence_stops_too(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|assistant|>"}))
    checkpoint = open_checkpoint(folder)
    tokenizer = open_text(checkpoint).tokenizer
    before = checkpoint.generation.stop_ids
    added = tokenizer.token_id("<|assistant|>")
    assert added not in before
    assert with_tokenizer_stop(checkpoint.generation, tokenizer).stop_ids == tuple(sorted({*before, added}))


@pytest.mark.parametrize("context", (2, 3, 7, 8, 9))
def test_a_short_context_is_traced(context, folder):
    assert build_graph(open_checkpoint(folder).config, context).context_length == context


def test_a_pad_token_does_not_stop(folder):
    change_config(folder, pad_token_id=5)
    generation = open_checkpoint(folder).generation
    assert generation.stop_ids == (1,)
    assert generation.pad_id == 5


def test_an_equal_saved_tied_head_is_dropped_and_a_different_one_refused(folder):
    values = load_file(folder / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    save_file(values, folder / "model.safetensors")
    check(folder)
    values["lm_head.weight"] = values["lm_head.weight"] + np.float32(1)
    save_file(values, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lm_head\.weight differs"):
        check(folder)
    check(folder, accept=["lm_head.weight"])


@pytest.mark.parametrize("name", ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"))
def test_saved_buffers_are_neutral(name, folder):
    values = load_file(folder / "model.safetensors")
    save_file({**values, name: np.ones(4, np.float32)}, folder / "model.safetensors")
    check(folder)


def test_unknown_tensors_are_refused_unless_accepted(folder):
    values = load_file(folder / "model.safetensors")
    save_file({**values, "model.layers.0.self_attn.sinks": np.ones(4, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.sinks.*--accept"):
        check(folder)
    check(folder, accept=["model.layers.0.self_attn.sinks"])


def test_unknown_keys_are_refused_unless_accepted_or_null(folder):
    change_config(folder, attention_multiplier=None)
    open_checkpoint(folder)
    change_config(folder, attention_multiplier=0.5)
    with pytest.raises(CheckpointError, match=r"config\.json: unknown key 'attention_multiplier'.*--accept"):
        open_checkpoint(folder)
    open_checkpoint(folder, ["attention_multiplier"])


def test_licences_are_found(folder):
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", "Licence.md"):
        (folder / name).write_text("terms")
    (folder / "LICENSES").mkdir()
    assert set(open_checkpoint(folder).license_files) == {"LICENSE", "LICENSE.txt", "NOTICE", "Licence.md"}


def test_the_prefixed_tensors_of_a_multimodal_model_are_not_taken_for_its_text_model(folder):
    values = load_file(folder / "model.safetensors")
    save_file({f"language_model.{name}": value for name, value in values.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight .* is missing"):
        check(folder)


# The files of released models, read where they lie.


@pytest.fixture(scope="session")
def released(data) -> Path:
    folder = data / "reference" / "released"
    if not folder.is_dir():
        pytest.skip("not run: no released configurations")
    return folder


def released_shapes(folder: Path, layers: int = 1000) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file, those of its first ``layers`` layers."""
    shapes = {}
    for entry in json.loads((folder / "tensors.json").read_text())["tensors"]:
        (first, last), (first_expert, last_expert) = entry.get("layers", (0, 0)), entry.get("experts", (0, 0))
        for layer in range(first, min(last + 1, layers)):
            for expert in range(first_expert, last_expert + 1):
                name = entry["name"].replace("{layer}", str(layer)).replace("{expert}", str(expert))
                shapes[name] = tuple(entry["shape"])
    return shapes


def as_checkpoint(source: Path, folder: Path) -> Path:
    """``source``'s JSON files with weights of the promised shapes and no content."""
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    (folder / "tokenizer.json").write_text("{}")
    write_header_only(folder / "model.safetensors", released_shapes(source))
    return folder


def test_every_released_model_opens_and_has_the_tensors_that_its_graph_reads(released, tmp_path):
    sources = sorted(path.parent for path in released.glob("*/tensors.json"))
    assert len(sources) >= 29
    for source in sources:
        checkpoint = open_checkpoint(as_checkpoint(source, tmp_path / source.name))
        config = checkpoint.config
        weights = build_graph(replace(config, layers=config.layers[:2]), 16).weights()
        weights.pop(SUPPRESSING_BIAS, None)
        promised = released_shapes(source, layers=2)
        if config.tied:
            promised.pop("lm_head.weight", None)  # Qwen3-0.6B saves its copy
        assert {tensor_of(name) for name in weights} == set(promised), source.name
        assert {name: checkpoint.tensors.shape(name) for name in weights} == {
            name: weight.shape for name, weight in weights.items()
        }, source.name
        # Rows of a fused tensor are all read, and once.
        assert sum(math.prod(weight.shape) for weight in weights.values()) == sum(map(math.prod, promised.values()))
        layers = {int(name.split(".")[2]) for name in released_shapes(source) if name.startswith("model.layers.")}
        assert layers == set(range(len(config.layers)))


def test_a_tensor_of_a_released_model_of_another_shape_is_refused(released, tmp_path):
    folder = as_checkpoint(released / "Qwen2.5-0.5B-Instruct", tmp_path / "model")
    change_config(folder, intermediate_size=4863, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.weight has shape \[4864, 896\].*\[4863, 896\]"):
        check(folder)


def test_layers_left_over_are_refused(released, tmp_path):
    folder = as_checkpoint(released / "Qwen2.5-0.5B-Instruct", tmp_path / "model")
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"tensors that the model does not use: model\.layers\.10\."):
        check(folder)


VARIANTS = {
    "Llama-3.1-70B-Instruct.modelopt-fp8.config.json": None,
    "Llama-3.1-8B.bnb-int8.config.json": "'quantization_config'.*bitsandbytes",
    "Llama-4-Scout-17B-16E.config.json": "'llama4' is not supported.*multimodal",
    "Orpheus-3B.unsloth-bnb-nf4.config.json": "'quantization_config'.*bitsandbytes",
    "Phi-3-vision-128k-instruct.su.config.json": "'phi3_v' is not supported.*multimodal",
    "Qwen2.5-VL-7B-Instruct.config.json": "'qwen2_5_vl' is not supported.*multimodal",
    "Qwen3-30B-A3B.fp8.config.json": "'quantization_config'.*fp8",
    "Qwen3.5-27B.config.json": "'qwen3_5' is not supported.*multimodal",
    "TinyLlama-1.1B-Chat.saved-by-transformers-5.config.json": None,
    "gemma-3-4b-it.config.json": None,
    "granite-3.3-8b-instruct.compressed-tensors-fp8.config.json": "'quantization_config'.*compressed-tensors",
    "phi-1_5.phi-msft.config.json": "'phi-msft' is not supported",
    "phi-1_5.phi-old-keys.config.json": "an old Phi configuration",
    "phi-2.gptq.config.json": "'quantization_config'.*gptq",
    "phi-4-mini-reasoning.wrong-model_type.config.json": "'phi4' is not supported",
    "stablelm-2-1_6b.bnb-nf4.config.json": "'quantization_config'.*bitsandbytes",
    "stablelm-2-1_6b.stablelm_epoch.config.json": "'stablelm_epoch' is not supported",
}


def test_variants_are_read_or_refused_by_name(released, folder):
    found = {path.name for path in (released / "variants").glob("*.config.json")}
    assert found == set(VARIANTS)
    for name, reason in VARIANTS.items():
        shutil.copy(released / "variants" / name, folder / "config.json")
        if reason is None:
            open_checkpoint(folder)
        else:
            with pytest.raises((CheckpointError, UnsupportedError), match=rf"config\.json.*{reason}"):
                open_checkpoint(folder)


def test_a_modelopt_file_beside_the_configuration_is_refused(released, folder):
    for part in ("config", "hf_quant_config"):
        shutil.copy(released / "variants" / f"Llama-3.1-70B-Instruct.modelopt-fp8.{part}.json", folder / f"{part}.json")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: the weights are already quantized"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ("adapter_config.phi-1_5.json", "adapter_config.phi-3-mini.json"))
def test_an_adapter_is_refused(name, released, tmp_path):
    shutil.copy(released / "variants" / name, tmp_path / "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"a PEFT adapter.*--adapter .* will merge it"):
        open_checkpoint(tmp_path)


def test_what_fine_tunes_add_is_neutral_or_refused(released, folder):
    items = {item["id"]: item for item in json.loads((released / "fine-tunes.json").read_text())["items"]}
    neutral = ("unsloth", "pretraining_tp", "auto_map-elsewhere")
    refused = ("bitsandbytes-nf4", "fp8-block", "mlx")
    original = (folder / "config.json").read_text()
    expected = open_checkpoint(folder).config
    for name in neutral:
        assert items[name]["action"] == "neutral"
        change_config(folder, **items[name]["example"])
        assert open_checkpoint(folder).config == expected
    for name in refused:
        assert items[name]["action"] == "refuse"
        (folder / "config.json").write_text(original)
        change_config(folder, **items[name]["example"])
        with pytest.raises(CheckpointError, match="already quantized"):
            open_checkpoint(folder)


def test_an_edited_rope_is_honoured_as_it_stands(released, folder):
    items = {item["id"]: item for item in json.loads((released / "fine-tunes.json").read_text())["items"]}
    plain = open_checkpoint(folder).config.layers[0].rotary
    change_config(folder, **items["rope-edited"]["example"])
    scaled = open_checkpoint(folder).config.layers[0].rotary
    np.testing.assert_allclose(np.array(plain.frequencies) / 8, scaled.frequencies, rtol=1e-7)
