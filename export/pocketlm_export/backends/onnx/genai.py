"""genai_config.json: what makes onnxruntime-genai load the folder as it is.

Its parser refuses unknown keys: https://onnxruntime.ai/docs/genai/reference/config.html. ``decoder`` is its generic
model type.
"""

from collections.abc import Mapping
from typing import Any

from pocketlm_export.architectures import DecoderConfig
from pocketlm_export.backends.onnx.attention import cache_head_dim
from pocketlm_export.checkpoint.generation import Generation

__all__ = ["UNKNOWN_SAMPLING", "genai_config"]

UNKNOWN_SAMPLING = ("min_p",)  # keys of generation_config.json that onnxruntime-genai does not have


def genai_config(config: DecoderConfig, generation: Generation, context_length: int) -> dict[str, Any]:
    """The content of genai_config.json for ``model.onnx``."""
    stop = list(generation.stop_ids)
    # A pad id must exist. The checkpoint's may be absent or past the vocabulary; nothing is padded in a batch of one.
    pad = generation.pad_id if generation.pad_id is not None else stop[0] if stop else 0
    model: dict[str, Any] = {
        "type": "decoder",
        "context_length": context_length,
        "vocab_size": config.vocabulary_size,
        "pad_token_id": pad,
        "eos_token_id": stop,
    }
    if generation.bos_id is not None:
        model["bos_token_id"] = generation.bos_id
    model["decoder"] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": cache_head_dim(config.head_dim),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "num_hidden_layers": len(config.layers),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {"model": model, "search": _search(generation.sampling, context_length)}


def _search(sampling: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    stated = {key: value for key, value in sampling.items() if key not in UNKNOWN_SAMPLING}
    return {"do_sample": False, **stated, "max_length": context_length, "past_present_share_buffer": True}
