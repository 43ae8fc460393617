"""Phi-3 small, of which transformers has no class: tiny checkpoints, and the model in plain torch.

The model computes a whole text at once, from the tensors as they lie in the file.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from tests.tiny_row import CONTEXT, Row

__all__ = ["DEFAULTS", "ROWS", "Phi3Small", "write_checkpoint"]

# What the released class means by a key that is absent.
DEFAULTS = {
    "vocab_size": 100352,
    "hidden_size": 4096,
    "ff_intermediate_size": 14336,
    "ff_dim_multiplier": None,
    "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "gegelu",
    "tie_word_embeddings": True,
    "rope_embedding_base": 1e6,
    "rope_position_scale": 1.0,
    "rope_scaling": None,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2,
    "attention_dropout_prob": 0.0,
    "embedding_dropout_prob": 0.1,
    "ffn_dropout_prob": 0.1,
}

# Two blocks of 16 positions near the query, and every fourth one.
BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "ff_intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "gegelu_limit": 2.0,
    "mup_width_multiplier": 1.5,
    "blocksparse_block_size": 16,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A short and a long factor for each of 8 pairs.
LONGROPE = {
    "type": "su",
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0],
    "long_factor": [1.0, 1.3, 1.9, 2.6, 3.4, 4.1, 5.0, 6.0],
    "original_max_position_embeddings": 40,
}
ROWS = [
    Row("phi3small", "phi3small", BASE),
    # As the released model within 1,024 positions: everything is local.
    Row("phi3small-dense", "phi3small", {**BASE, "blocksparse_num_local_blocks": CONTEXT // 16}, dtype="float16"),
    # More heads than the stride, so that some see the same blocks; only the last of three layers is dense.
    Row(
        "phi3small-12-heads",
        "phi3small",
        {
            **BASE,
            "hidden_size": 96,
            "num_attention_heads": 12,
            "num_key_value_heads": 3,
            "blocksparse_vert_stride": 5,
            "dense_attention_every_n_layers": 3,
        },
    ),
    # Shifts of more than one block from head to head; widths that are no multiple of 32
    Row(
        "phi3small-odd-widths",
        "phi3small",
        {
            **BASE,
            "vocab_size": 331,
            "hidden_size": 72,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "blocksparse_vert_stride": 7,
            "ff_intermediate_size": None,
            "ff_dim_multiplier": 2,
            "gegelu_pad_to_256": False,
        },
        dtype="float32",
    ),
    Row("phi3small-odd-blocks", "phi3small", {**BASE, "blocksparse_block_size": 5, "blocksparse_num_local_blocks": 3}),
    Row(
        "phi3small-same-heads",
        "phi3small",
        {
            **BASE,
            "blocksparse_homo_head_pattern": True,
            "dense_attention_every_n_layers": None,
            "gegelu_limit": None,
            "mup_width_multiplier": 8.0,
        },
    ),
    Row(
        "phi3small-no-mup",
        "phi3small",
        {
            **BASE,
            "mup_use_scaling": False,
            "mup_embedding_multiplier": None,
            "mup_width_multiplier": None,
            "rope_position_scale": 0.5,
        },
    ),
    Row("phi3small-128k", "phi3small", {**BASE, "rope_scaling": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2}}),
    Row(
        "phi3small-128k-default-scale",
        "phi3small",
        {**BASE, "rope_scaling": {**LONGROPE, "type": "longrope", "long_mscale": -1}},
    ),
    Row(
        "phi3small-128k-short",
        "phi3small",
        {
            **BASE,
            "max_position_embeddings": 400,
            "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 200, "short_mscale": 1.1},
        },
        context=150,
    ),
    Row("phi3small-outliers", "phi3small", BASE, outlier=1e3),
]  # fmt: skip


def write_checkpoint(row: Row, folder: Path) -> "Phi3Small":
    """Write ``row``'s checkpoint without a tokenizer; returns the model in float32 on the very stored values."""
    config = {
        "architectures": ["Phi3SmallForCausalLM"],
        "model_type": "phi3small",
        "hidden_act": "gegelu",
        **row.config,
    }
    model = Phi3Small(config, {})
    generator = torch.Generator().manual_seed(sum(map(ord, row.name)))
    values = {name: _initial(name, shape, generator) for name, shape in model.shapes().items()}
    if row.outlier is not None:
        _add_outliers(values, row.outlier / model.embedding_scale, generator)
    stored = {name: value.to(getattr(torch, row.dtype)) for name, value in values.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return Phi3Small(config, {name: value.float() for name, value in stored.items()}, row.context)


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 2:
        return noise * shape[1] ** -0.5
    return 1 + 0.2 * noise if name.endswith("weight") else 0.3 * noise


def _add_outliers(values: dict[str, Tensor], size: float, generator: torch.Generator) -> None:
    """Drive two residual channels to about ``size`` times the embedding's multiplier, as released models do."""
    table = values["model.embed_tokens.weight"]
    for channel, sign in ((5, 1.0), (17, -1.0)):
        table[:, channel] = sign * size * (1 + 0.1 * torch.randn(len(table), generator=generator))
    for name, value in values.items():
        if name.endswith("self_attn.dense.weight"):
            value[5] *= 20
        elif name.endswith("down_proj.weight"):
            value[17] *= 20
        elif name.endswith("layernorm.weight"):
            value[[5, 17]] *= 0.05


class Phi3Small:
    """The logits of a text, as an export for ``context`` positions, by default all, rotates it.

    Keys of the configuration that are absent mean what the released class says.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], context: int | None = None) -> None:
        self.config = {**DEFAULTS, **config}
        self.tensors = tensors
        self.context = context or self.config["max_position_embeddings"]
        self.hidden, self.heads, self.kv_heads = (
            self.config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        self.head_dim = self.hidden // self.heads
        self.embedding_scale = self.config["mup_embedding_multiplier"] or 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file."""
        inner = self.config["ff_intermediate_size"] or self.config["ff_dim_multiplier"] * (self.hidden // 3) * 2
        rows = {
            "self_attn.query_key_value": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "self_attn.dense": (self.hidden, self.hidden),
            "mlp.up_proj": (2 * inner, self.hidden),
            "mlp.down_proj": (self.hidden, inner),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.config["num_hidden_layers"]):
            for name, shape in rows.items():
                shapes[f"model.layers.{layer}.{name}.weight"] = shape
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        shapes |= {f"model.final_layernorm.{part}": (self.hidden,) for part in ("weight", "bias")}
        return {"model.embed_tokens.weight": (self.config["vocab_size"], self.hidden), **shapes}

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        """``logits`` ``[1, S, vocabulary]`` of ids ``[1, S]``."""
        (text,) = ids
        table = self.tensors["model.embed_tokens.weight"]
        x = table[text] * self.embedding_scale
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", layer)
            x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        logits = self.norm(x, "model.final_layernorm") @ table.T
        return SimpleNamespace(logits=logits[None] / (self.config["mup_width_multiplier"] or 1.0))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """With weight and bias."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(x, (self.hidden,), weight, bias, self.config["layer_norm_epsilon"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        """With a bias."""
        return linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def attention(self, x: Tensor, name: str, layer: int) -> Tensor:
        """One head after the other."""
        fused = self.linear(x, f"{name}.query_key_value").split(self.head_dim, dim=1)
        group = self.heads // self.kv_heads
        scale = self.config["mup_attn_multiplier"] / self.head_dim
        if not self.config["mup_use_scaling"]:
            scale = 1 / math.sqrt(self.head_dim)
        made = []
        for head in range(self.heads):
            # Of each key/value head: its query heads, the key, the value.
            first = head // group * (group + 2)
            query, key = (self.rotated(fused[at]) for at in (first + head % group, first + group))
            scores = (query @ key.T * scale).masked_fill(~self.seen(len(x), layer, head), -math.inf)
            made.append(scores.softmax(-1) @ fused[first + group + 1])
        return self.linear(torch.cat(made, dim=1), f"{name}.dense")

    def seen(self, length: int, layer: int, head: int) -> Tensor:
        """``[S, S]``: whether a query, the row, sees a key, position by position."""
        config = self.config
        every = config["dense_attention_every_n_layers"]
        dense = bool(every) and (layer + 1) % every == 0
        size, local, stride = (
            config[f"blocksparse_{key}"] for key in ("block_size", "num_local_blocks", "vert_stride")
        )
        shift = 0 if config["blocksparse_homo_head_pattern"] else head * max(1, int(stride / self.heads))

        def sees(query: int, key: int) -> bool:
            near = query // size - key // size < local
            return key <= query and (dense or near or (key // size + shift + 1) % stride == 0)

        return torch.tensor([[sees(query, key) for key in range(length)] for query in range(length)])

    def rotated(self, x: Tensor) -> Tensor:
        """Element ``i`` of ``[S, head_dim]`` turns with element ``i + head_dim / 2``."""
        config, half = self.config, self.head_dim // 2
        angles = torch.arange(len(x), dtype=torch.float32)
        frequencies = config["rope_embedding_base"] ** -(torch.arange(half) * 2 / self.head_dim)
        magnitude, rope = 1.0, config["rope_scaling"]
        if rope is None:
            angles = angles * config["rope_position_scale"]
        else:
            longest, original = config["max_position_embeddings"], rope["original_max_position_embeddings"]
            if self.context > original:
                factors, magnitude = rope["long_factor"], rope.get("long_mscale", -1)
                if magnitude <= 0:
                    magnitude = math.sqrt(1 + math.log(longest / original) / math.log(original))
            else:
                factors, magnitude = rope["short_factor"], rope.get("short_mscale", 1.0)
            frequencies = frequencies / torch.tensor(factors)
        turned = torch.polar(torch.full((len(x), half), magnitude), torch.outer(angles, frequencies))
        made = torch.complex(x[:, :half], x[:, half:]) * turned
        return torch.cat((made.real, made.imag), dim=1)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """GEGELU of the even and the odd channels."""
        gate, up = self.linear(x, f"{name}.up_proj").view(len(x), -1, 2).unbind(-1)
        limit = self.config["gegelu_limit"]
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self.linear(gate * torch.sigmoid(1.702 * gate) * (up + 1), f"{name}.down_proj")
