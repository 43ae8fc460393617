"""The decoder as small torch modules in PocketLM's operators. Parameters carry their Hugging Face names."""

import torch
from torch import Tensor, nn

from pocketlm_export.architectures._configuration import DecoderConfig, LayerConfig
from pocketlm_export.graph import operators  # noqa: F401  registers torch.ops.pocketlm

__all__ = ["Decoder"]

ops = torch.ops.pocketlm


class Linear(nn.Module):
    """``[N, K]`` with an optional bias."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RmsNorm(nn.Module):
    """RMS norm over the last axis."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.epsilon, 0.0)


class Embedding(nn.Module):
    """``[vocabulary, width]``."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)


class Attention(nn.Module):
    """Grouped-query attention over a KV cache of ``context_length`` positions."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, context_length: int) -> None:
        super().__init__()
        query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query, config.query_key_value_bias)
        self.k_proj = Linear(config.hidden_size, key_value, config.query_key_value_bias)
        self.v_proj = Linear(config.hidden_size, key_value, config.query_key_value_bias)
        self.o_proj = Linear(query, config.hidden_size, config.output_bias)
        if config.query_key_norm:
            self.q_norm = RmsNorm(config.head_dim, config.norm_epsilon)
            self.k_norm = RmsNorm(config.head_dim, config.norm_epsilon)
        self.config = config
        self.rotary = layer.rotary
        # A window that the exported context never leaves is no window.
        self.window = layer.window if layer.window is not None and layer.window < context_length else 0

    def forward(self, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        config, rotary = self.config, self.rotary
        mixed = ops.attention(
            self.q_proj(x), self.k_proj(x), self.v_proj(x), k_cache, v_cache, position,
            self.q_norm.weight if config.query_key_norm else None,
            self.k_norm.weight if config.query_key_norm else None,
            config.heads, config.kv_heads, config.head_dim, config.head_dim**-0.5,
            list(rotary.frequencies) if rotary else [], rotary.scale if rotary else 1.0,
            self.window, 0.0, config.norm_epsilon,
        )  # fmt: skip
        return self.o_proj(mixed)


class GatedMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, context_length: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.self_attn = Attention(config, layer, context_length)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = GatedMlp(config)

    def forward(self, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position, k_cache, v_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, layers and final norm, under the name ``model`` as in Hugging Face's files."""

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocabulary_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, context_length) for layer in config.layers)
        self.norm = RmsNorm(config.hidden_size, config.norm_epsilon)


class Decoder(nn.Module):
    """int64 ids ``[B, S]``, first position int64 ``[1]`` and the caches -> logits ``[B, S, vocabulary]``.

    ``caches`` holds key and value of layer 0, of layer 1, and so on, each ``[B, kv_heads, context_length, head_dim]``.
    """

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        super().__init__()
        self.config = config
        self.context_length = context_length
        self.model = Backbone(config, context_length)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocabulary_size)

    def forward(self, ids: Tensor, position: Tensor, caches: list[Tensor]) -> Tensor:
        x = self.model.embed_tokens(ids)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, position, caches[2 * index], caches[2 * index + 1])
        x = self.model.norm(x)
        head = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        return ops.linear(x, head, None)

    def make_caches(self, batch: int = 1) -> list[Tensor]:
        """Empty caches for ``batch`` sequences, in torch's default dtype."""
        shape = (batch, self.config.kv_heads, self.context_length, self.config.head_dim)
        return [torch.zeros(shape) for _ in range(2 * len(self.config.layers))]
