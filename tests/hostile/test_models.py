"""What is particular to a model and wrong: experts, rope factors, windows, kinds of layers, biases, adapters."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import pocketlm
from pocketlm.errors import InputError
from tests.hostile.damage import LONGEST_MESSAGE, Bad, check_refused, config
from tests.small_checkpoint import write_small_checkpoint

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False}
PHI3 = {"model_type": "phi3", "tie_word_embeddings": False, "original_max_position_embeddings": 32, "pad_token_id": 0}
GEMMA2 = {
    "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 8, "query_pre_attn_scalar": 8,
    "sliding_window": 16,
}  # fmt: skip


def longrope(short: list, long: list, kind: str = "longrope") -> dict:
    return {**PHI3, "rope_scaling": {"type": kind, "short_factor": short, "long_factor": long}}


MODELS = [
    Bad("two-expert-counts", config(**MIXTRAL, num_experts=5), "'num_local_experts' is 4 but 'num_experts' is 5"),
    Bad("more-chosen-than-experts", config(**MIXTRAL, num_experts_per_tok=5), "'num_experts_per_tok' must be between"),
    Bad("fewer-experts-than-chosen", config(**{**MIXTRAL, "num_local_experts": 1}), "'num_experts_per_tok' is 2"),
    Bad("no-experts", config(**{**MIXTRAL, "num_local_experts": 0}), "'num_local_experts' must be between 1"),
    Bad("router-missing", config(**MIXTRAL), r"block_sparse_moe\.gate\.weight \[4, 32\] is missing", ""),
    Bad("factors-too-few", config(**longrope([1.0] * 3, [1.0] * 4)), "'short_factor' must be a list of 4 numbers"),
    Bad("factors-too-many", config(**longrope([1.0] * 4, [1.0] * 5)), "'long_factor' must be a list of 4 numbers"),
    Bad("factors-zero", config(**longrope([1.0] * 4, [0.0] * 4)), "'long_factor' holds 0"),
    Bad("factors-text", config(**longrope(["1"] * 4, [1.0] * 4)), "'short_factor' holds \"1\""),
    Bad("rope-type-unknown", config(**longrope([1.0] * 4, [1.0] * 4, "spiral")), "rope type 'spiral'"),
    *(
        Bad(f"window-zero-{kind['model_type']}", config(**{**kind, "sliding_window": 0}), "'sliding_window' must be")
        for kind in (MIXTRAL, PHI3, GEMMA2, {"model_type": "mistral"})
    ),
    Bad("layer-types-too-few", config(**GEMMA2, layer_types=["full_attention"]), "'layer_types' must be a list of 2"),
    Bad("layer-type-unknown", config(**GEMMA2, layer_types=["full_attention", "odd"]), "'layer_types' holds \"odd\""),
    Bad("bias-promised", config(attention_bias=True), r"self_attn\.q_proj\.bias \[32\] is missing", ""),
    Bad("mlp-bias-promised", config(mlp_bias=True), r"mlp\.gate_proj\.bias \[64\] is missing", ""),
]


@pytest.mark.parametrize("bad", MODELS, ids=lambda bad: bad.name)
def test_a_bad_model_is_refused(bad, tmp_path):
    check_refused(bad, tmp_path)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    recipe = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query_key_value"]}
    (adapter / "adapter_config.json").write_text(json.dumps(recipe))
    name = "base_model.model.transformer.h.0.self_attention.query_key_value"
    factors = {"lora_A": np.zeros((2, 32), np.float32), "lora_B": np.zeros((96, 2), np.float32)}
    save_file(
        {f"{name}.{part}.weight": value for part, value in factors.items()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(InputError, match=r"has no matrix .*query_key_value.*adapter for another base") as caught:
        pocketlm.export(source, tmp_path / "place" / "bundle", adapter=adapter, store=tmp_path / "store", verify=False)
    assert len(str(caught.value)) < LONGEST_MESSAGE + len(str(adapter))
    assert not (tmp_path / "place").exists()
