"""A decoder in PocketLM's operators. Weights go by their Hugging Face names."""

from pocketlm_export.architectures._configuration import DecoderConfig
from pocketlm_export.graph.builder import GraphBuilder
from pocketlm_export.graph.graph import Graph, Value, WeightInfo

__all__ = ["Decoder"]


class Decoder:
    """Llama's form, for caches of ``context_length`` positions: attention and gated MLP, each after a norm and added to
    the residual. An architecture that differs overrides the method that says it."""

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        self.config = config
        self.context_length = context_length
        self.build = GraphBuilder()

    def graph(self) -> Graph:
        """The whole of it, from token ids to logits."""
        x = self.embed(self.build.ids)
        for index in range(len(self.config.layers)):
            x = self.layer(x, f"model.layers.{index}", index)
        return self.build.graph(self.head(self.norm(x, "model.norm")), self.context_length)

    def embed(self, ids: Value) -> Value:
        """``[1, S]`` -> ``[1, S, hidden]``."""
        return self.build.scale(
            self.build.embedding(ids, self._table("model.embed_tokens")), self.config.embedding_scale
        )

    def layer(self, x: Value, name: str, index: int) -> Value:
        """One layer of the residual."""
        x = self.add(x, self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", index))
        return self.add(x, self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp"))

    def add(self, x: Value, made: Value) -> Value:
        """What attention or MLP made, onto the residual."""
        return self.build.add(x, self.build.scale(made, self.config.residual_scale))

    def attention(self, x: Value, name: str, index: int) -> Value:
        """Grouped-query attention, with its projections."""
        query, key, value = self.query_key_value(x, name)
        return self.linear(
            self.attend(query, key, value, name, index),
            f"{name}.o_proj",
            self.config.hidden_size,
            self.config.output_bias,
        )

    def query_key_value(self, x: Value, name: str) -> tuple[Value, Value, Value]:
        """The projections before attention: ``[1, S, heads * head_dim]`` and twice ``[1, S, kv_heads * head_dim]``."""
        config = self.config
        width, bias = config.kv_heads * config.head_dim, config.query_key_value_bias
        return (
            self.linear(x, f"{name}.q_proj", config.heads * config.head_dim, bias),
            self.linear(x, f"{name}.k_proj", width, bias),
            self.linear(x, f"{name}.v_proj", width, bias),
        )

    def attend(self, query: Value, key: Value, value: Value, name: str, index: int) -> Value:
        """Attention over the layer's cache, before the output projection."""
        config, layer = self.config, self.config.layers[index]
        query_norm, key_norm = (
            WeightInfo(f"{name}.{part}_norm.weight", (config.head_dim,)) if config.query_key_norm else None
            for part in ("q", "k")
        )
        return self.build.attention(
            query, key, value,
            layer=index, heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim,
            scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
            rotary=layer.rotary,
            # A window that the exported context never leaves is no window.
            window=layer.window if layer.window is not None and layer.window < self.context_length else None,
            softcap=config.attention_softcap, query_norm=query_norm, key_norm=key_norm,
            norm_epsilon=config.norm_epsilon, norm_offset=config.norm_offset if query_norm else 0.0,
        )  # fmt: skip

    def mlp(self, x: Value, name: str) -> Value:
        """``down(activation(gate(x)) * up(x))``."""
        config = self.config
        gate = self.build.activation(
            config.activation, self.linear(x, f"{name}.gate_proj", config.intermediate_size, config.mlp_bias)
        )
        up = self.linear(x, f"{name}.up_proj", config.intermediate_size, config.mlp_bias)
        return self.linear(self.build.multiply(gate, up), f"{name}.down_proj", config.hidden_size, config.mlp_bias)

    def norm(self, x: Value, name: str) -> Value:
        """A norm of the residual."""
        config, weight = self.config, WeightInfo(f"{name}.weight", (x.width,))
        if config.layer_norm:
            return self.build.layer_norm(x, weight, WeightInfo(f"{name}.bias", (x.width,)), config.norm_epsilon)
        return self.build.rms_norm(x, weight, config.norm_epsilon, config.norm_offset)

    def head(self, x: Value) -> Value:
        """Logits ``[1, S, vocabulary]``."""
        config = self.config
        bias = WeightInfo("lm_head.bias", (config.vocabulary_size,)) if config.head_bias else None
        logits = self.build.linear(x, self._table("model.embed_tokens" if config.tied else "lm_head"), bias)
        logits = self.build.scale(logits, config.logit_scale)
        return logits if config.logit_softcap is None else self.build.softcap(logits, config.logit_softcap)

    def linear(self, x: Value, name: str, outputs: int, bias: bool = False) -> Value:
        """``x @ weight.T``, with its bias where there is one."""
        weight = WeightInfo(f"{name}.weight", (outputs, x.width))
        return self.build.linear(x, weight, WeightInfo(f"{name}.bias", (outputs,)) if bias else None)

    def _table(self, name: str) -> WeightInfo:
        return WeightInfo(f"{name}.weight", (self.config.vocabulary_size, self.config.hidden_size))
