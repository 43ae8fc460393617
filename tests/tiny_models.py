"""The table of tiny configurations: every architecture, with the odd sizes that released models have.

A row is a transformers configuration and a seed; :func:`write_checkpoint` makes the checkpoint that an export reads,
and so does ``python -m tests.tiny_models ROW FOLDER``.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.architectures import phi3small_model
from tests.outliers import OFFSET_NORMS, add_outliers, raise_residual
from tests.tiny_row import CONTEXT, Row

__all__ = ["CONTEXT", "ROWS", "WITH_EXPERTS", "Row", "initial_values", "write_checkpoint", "write_tokenizer"]

WITH_EXPERTS = ("mixtral", "qwen3_moe")

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
# Heads of 16, of which 12 elements are rotated: six pairs
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.25],
    "long_factor": [1.0, 1.5, 3.0, 7.0, 20.0, 40.0],
    "rope_theta": 1e4,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 1e4}
PHI = {key: value for key, value in BASE.items() if key != "rms_norm_eps"}
GEMMA = {**BASE, "head_dim": 32, "pad_token_id": 0}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.05,
    "logits_scaling": 8.0,
}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {**BASE, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

ROWS = [
    Row("llama", "llama", {**BASE, "tie_word_embeddings": True}),
    Row("llama-untied-biases", "llama", {**BASE, "attention_bias": True, "mlp_bias": True}, dtype="float16"),
    # SmolLM2's shape in small: 9 heads on 3, hidden 9 x 8
    Row(
        "llama-9-heads",
        "llama",
        {**BASE, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    ),
    Row(
        "llama-odd-head-dim",
        "llama",
        {**BASE, "hidden_size": 96, "head_dim": 20, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    Row("llama-odd-vocabulary", "llama", {**BASE, "vocab_size": 331, "tie_word_embeddings": True}, dtype="float32"),
    # Neither 100 nor 76 is a multiple of 32
    Row("llama-odd-widths", "llama", {**BASE, "hidden_size": 100, "head_dim": 32, "intermediate_size": 76}),
    Row(
        "llama-linear-rope",
        "llama",
        {**BASE, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}},
    ),
    Row("llama-llama3-rope", "llama", {**BASE, "head_dim": 32, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    Row("llama-yarn-rope", "llama", {**BASE, "head_dim": 32, "rope_parameters": YARN}),
    Row(
        "llama-dynamic-rope",
        "llama",
        {**BASE, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    Row("llama-outliers", "llama", {**BASE, "tie_word_embeddings": True}, outlier=1e3),
    Row("qwen2", "qwen2", {**BASE, "tie_word_embeddings": True}),
    Row("qwen2-window", "qwen2", {**BASE, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    Row("qwen2-outliers", "qwen2", {**BASE, "num_key_value_heads": 1}, outlier=1e3),
    Row("qwen3", "qwen3", {**BASE, "head_dim": 32, "tie_word_embeddings": True}),
    Row("qwen3-biases", "qwen3", {**BASE, "head_dim": 24, "attention_bias": True}),
    Row("mistral", "mistral", {**BASE, "sliding_window": None}),
    Row("mistral-window", "mistral", {**BASE, "sliding_window": 9, "head_dim": 32}),
    Row("smollm3", "smollm3", {**BASE, "num_hidden_layers": 4, "pad_token_id": 0}),
    Row(
        "smollm3-window",
        "smollm3",
        {**BASE, "no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 13, "pad_token_id": 0},
    ),
    Row("phi", "phi", {**PHI, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}, dtype="float16"),
    # Phi-2's heads of 80, of which 32 are rotated, in small: 20, of which 8
    Row("phi-2", "phi", {**PHI, "hidden_size": 80, "num_key_value_heads": 4, "partial_rotary_factor": 0.4}),
    Row("phi-grouped", "phi", {**PHI, "hidden_size": 72, "intermediate_size": 90, "num_attention_heads": 6}),
    Row("phi-outliers", "phi", {**PHI, "num_key_value_heads": 4}, outlier=1e3),
    Row("phi3", "phi3", {**BASE, "num_key_value_heads": 4, "pad_token_id": 0}),
    Row("phi3-window", "phi3", {**BASE, "hidden_size": 96, "sliding_window": 11, "pad_token_id": 0}),
    # Phi-4-mini's: partial rotation, tied, grouped
    Row(
        "phi3-long-rope",
        "phi3",
        {
            **BASE,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE,
        },
    ),
    Row(
        "phi3-short-rope",
        "phi3",
        {
            **BASE,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 640,
            "pad_token_id": 0,
            "original_max_position_embeddings": CONTEXT,
            "rope_parameters": LONGROPE,
        },
        context=CONTEXT,
    ),
    Row("phi3-outliers", "phi3", {**BASE, "pad_token_id": 0}, outlier=1e3),
    Row("gemma", "gemma", {**GEMMA, "num_key_value_heads": 1}),
    # Gemma 7B's: heads that together are wider than the residual, as many for keys; 9 is odd
    Row(
        "gemma-wide-heads",
        "gemma",
        {**GEMMA, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 9, "vocab_size": 331},
    ),
    Row("gemma-outliers", "gemma", {**GEMMA, "num_key_value_heads": 1}, outlier=1e3),
    # What attention or MLP adds exceeds float16, and the sum does by far
    Row("gemma-large-residual", "gemma", {**GEMMA, "num_key_value_heads": 1}, residual=7e4),
    Row("gemma2", "gemma2", {**GEMMA, "query_pre_attn_scalar": 24, "sliding_window": 9}),
    Row(
        "gemma2-no-caps",
        "gemma2",
        {
            **GEMMA,
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 1000,
        },
    ),
    Row("gemma2-outliers", "gemma2", {**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 11}, outlier=1e3),
    Row("gemma2-large-residual", "gemma2", {**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 11}, residual=7e4),
    Row("gemma3", "gemma3_text", {**GEMMA, "num_hidden_layers": 6, "num_key_value_heads": 1, "sliding_window": 9}),
    # Gemma 3 4B's rope, and a cap that no released one has
    Row(
        "gemma3-linear-rope",
        "gemma3_text",
        {
            **GEMMA,
            "hidden_size": 72,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 24,
            "sliding_window": 13,
            "final_logit_softcapping": 20.0,
            "layer_types": GEMMA3_LAYERS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    Row("gemma3-outliers", "gemma3_text", {**GEMMA, "sliding_window": 11, "layer_types": GEMMA3_LAYERS}, outlier=1e3),
    Row(
        "gemma3-large-residual",
        "gemma3_text",
        {**GEMMA, "sliding_window": 11, "layer_types": GEMMA3_LAYERS},
        residual=7e4,
    ),
    Row("mixtral", "mixtral", {**BASE, "num_local_experts": 4, "sliding_window": None}),
    # Three of five, in a window
    Row(
        "mixtral-window",
        "mixtral",
        {**BASE, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 11, "intermediate_size": 72},
    ),
    Row("mixtral-outliers", "mixtral", {**BASE, "num_local_experts": 4}, outlier=1e3),
    Row("qwen3-moe", "qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    Row("qwen3-moe-plain-shares", "qwen3_moe", {**EXPERTS, "norm_topk_prob": False, "attention_bias": True}),
    # Dense layers among those with experts; odd widths
    Row(
        "qwen3-moe-mixed",
        "qwen3_moe",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "hidden_size": 72,
            "head_dim": 24,
            "moe_intermediate_size": 40,
            "num_experts": 7,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 13,
        },
    ),
    Row("qwen3-moe-outliers", "qwen3_moe", {**EXPERTS, "norm_topk_prob": True}, outlier=1e3),
    *phi3small_model.ROWS,
    Row("olmo2", "olmo2", {**BASE, "pad_token_id": 0}),
    Row("olmo2-odd", "olmo2", {**BASE, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1}),
    # Its projections read the residual as it is: gate times up would leave float16 at 1e3
    Row("olmo2-outliers", "olmo2", {**BASE, "pad_token_id": 0}, outlier=1e2),
    Row("granite", "granite", {**BASE, **GRANITE, "tie_word_embeddings": True, "vocab_size": 331}),
    Row("granite-biases", "granite", {**BASE, **GRANITE, "attention_bias": True, "mlp_bias": True}),
    Row("granite-outliers", "granite", {**BASE, **GRANITE}, outlier=1e3),
    # StableLM 3B's heads of 80, of which 20 are rotated, in small: 40, of which 10
    Row("stablelm", "stablelm", {**PHI, "hidden_size": 80, "num_attention_heads": 2}),
    Row("stablelm-2", "stablelm", {**PHI, "num_key_value_heads": 4, "use_qkv_bias": True}),
    Row("stablelm-parallel", "stablelm", {**PHI, "use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    Row("stablelm-outliers", "stablelm", {**PHI}, outlier=1e3),
]


def write_checkpoint(row: Row, folder: Path) -> torch.nn.Module | phi3small_model.Phi3Small:
    """Write ``row``'s checkpoint with a tokenizer; returns transformers' model in float32 on the very stored values, or
    one in plain torch where transformers has no such class."""
    if row.model_type == "phi3small":
        folder.mkdir(exist_ok=True)
        write_tokenizer(folder, row.config["vocab_size"])
        return phi3small_model.write_checkpoint(row, folder)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(sum(map(ord, row.name)))
    config = AutoConfig.for_model(row.model_type, **row.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_values(name, parameter, center=0.0 if row.model_type in OFFSET_NORMS else 1.0))
        if row.outlier is not None:
            add_outliers(model, row.outlier)
        if row.residual is not None:
            raise_residual(model, row.residual)
    stored = model.to(getattr(torch, row.dtype))
    stored.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder, row.config["vocab_size"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def initial_values(name: str, parameter: torch.Tensor, center: float) -> torch.Tensor:
    """Random values that keep every layer's output near one; ``center`` is what the weights of norms lie around."""
    noise = torch.randn_like(parameter)
    if parameter.dim() == 1:
        return center + 0.2 * noise if "norm" in name and name.endswith(".weight") else 0.3 * noise
    return noise * parameter.shape[-1] ** -0.5


def write_tokenizer(folder: Path, vocabulary_size: int) -> None:
    """A byte-level BPE of at most ``vocabulary_size`` ids with ChatML-like special tokens and a template."""
    import json

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog", "def add(a, b):\n    return a + b\n"] * 4, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    import sys

    _, wanted, destination = sys.argv
    write_checkpoint(next(row for row in ROWS if row.name == wanted), Path(destination))
