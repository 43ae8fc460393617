"""The shapes of real models: their configurations, by the names that a benchmark calls them.

Three are written down here. The others are read from released files, which are not PocketLM's to copy:
``$POCKETLM_DATA/reference/released/FOLDER/config.json``.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketlm.errors import InputError
from pocketlm_export.fields import read_json

__all__ = ["SHAPES", "shape_named"]

# config.json of Qwen/Qwen2.5-0.5B-Instruct, meta-llama/Llama-3.2-1B-Instruct and mistralai/Mistral-7B-v0.1, as far as
# it says something about the model.
COMMITTED: Mapping[str, Mapping[str, Any]] = {
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21, "tie_word_embeddings": True,
        "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16",
    },
    "Mistral-7B": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip

RELEASED = {
    "Phi-2": "phi-2",
    "Phi-3-mini": "Phi-3-mini-4k-instruct",
    "Phi-3-mini-128k": "Phi-3-mini-128k-instruct",
    "Phi-3-small": "Phi-3-small-8k-instruct",
    "Phi-4-mini": "Phi-4-mini-instruct",
    "Gemma-2B": "gemma-2b",
    "Gemma-7B": "gemma-7b-it",
    "Gemma-2-2B": "gemma-2-2b-it",
    "Gemma-3-1B": "gemma-3-1b-it",
    "Mixtral-8x7B": "Mixtral-8x7B-v0.1",
    "Qwen3-0.6B": "Qwen3-0.6B",
    "Qwen3-30B-A3B": "Qwen3-30B-A3B",
    "SmolLM3-3B": "SmolLM3-3B",
    "OLMo-2-1B": "OLMo-2-0425-1B",
    "Granite-3.0-2B": "granite-3.0-2b-instruct",
    "StableLM-3B": "stablelm-3b-4e1t",
}
"""The folder of each shape that is read."""

# Keys that hold an item for each layer.
OF_EACH_LAYER = ("layer_types", "no_rope_layers")


class _Shapes(Mapping[str, Mapping[str, Any]]):
    """All shapes by name; a released file is read when its shape is asked for."""

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        if name in COMMITTED:
            return COMMITTED[name]
        path = _released() / RELEASED[name] / "config.json"
        if not path.exists():
            raise InputError(f"{path}: no such file: {name} is the shape of a released file; POCKETLM_DATA says where")
        return read_json(path)

    def __iter__(self) -> Iterator[str]:
        return iter((*COMMITTED, *RELEASED))

    def __len__(self) -> int:
        return len(COMMITTED) + len(RELEASED)


SHAPES: Mapping[str, Mapping[str, Any]] = _Shapes()


def shape_named(name: str, layers: int | None = None) -> dict[str, Any]:
    """The configuration of ``name``, with another number of layers if one is given: the first ones, over again if there
    are not as many."""
    if name not in list(SHAPES):
        raise InputError(f"unknown shape {name!r}; valid: {', '.join(SHAPES)}")
    if layers is not None and layers < 1:
        raise InputError(f"--layers must be at least 1, not {layers}")
    config = dict(SHAPES[name])
    if layers is None:
        return config
    for key in OF_EACH_LAYER:
        if config.get(key):
            config[key] = [config[key][index % len(config[key])] for index in range(layers)]
    return {**config, "num_hidden_layers": layers}


def _released() -> Path:
    return Path(os.environ.get("POCKETLM_DATA", Path(__file__).parents[3] / "shared")) / "reference" / "released"
