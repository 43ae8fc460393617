"""A decoder in PocketLM's operators. Weights go by their Hugging Face names."""

from pocketlm_export.architectures._configuration import DecoderConfig, ExpertsConfig
from pocketlm_export.graph.builder import GraphBuilder
from pocketlm_export.graph.graph import BlockSparsity, Graph, Value, WeightInfo
from pocketlm_export.graph.rotary import LongRotary, Rotary
from pocketlm_export.selection import RowSelection

__all__ = ["Decoder"]


class Decoder:
    """Llama's form, for caches of ``context_length`` positions: attention and gated MLP, each after a norm and added to
    the residual. An architecture that differs overrides the name or the method that says it."""

    attention_name = "self_attn"
    output_name = "o_proj"
    mlp_name = "mlp"
    expert_names = ("gate_proj", "up_proj", "down_proj")
    final_norm_name = "model.norm"
    head_bias_name = "lm_head.bias"

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        self.config = config
        self.context_length = context_length
        self.build = GraphBuilder()

    def graph(self) -> Graph:
        """The whole of it, from token ids to logits."""
        x = self.embed(self.build.ids)
        for index in range(len(self.config.layers)):
            x = self.layer(x, f"model.layers.{index}", index)
        return self.build.graph(self.head(self.norm(x, self.final_norm_name)), self.context_length)

    def embed(self, ids: Value) -> Value:
        """``[1, S]`` -> ``[1, S, hidden]``."""
        return self.build.scale(
            self.build.embedding(ids, self._table("model.embed_tokens")), self.config.embedding_scale
        )

    def layer(self, x: Value, name: str, index: int) -> Value:
        """One layer of the residual."""
        normal = self.norm(x, f"{name}.input_layernorm")
        attended = self.attention(normal, f"{name}.{self.attention_name}", index)
        if self.config.parallel_residual:
            return self.add(x, self.build.add(attended, self.feed_forward(normal, name, index)))
        x = self.add(x, attended)
        return self.add(x, self.feed_forward(self.norm(x, f"{name}.post_attention_layernorm"), name, index))

    def add(self, x: Value, made: Value) -> Value:
        """What attention or MLP made, onto the residual."""
        return self.build.add(x, self.build.scale(made, self.config.residual_scale))

    def attention(self, x: Value, name: str, index: int) -> Value:
        """Grouped-query attention, with its projections."""
        query, key, value = self.query_key_value(x, name)
        return self.linear(
            self.attend(query, key, value, name, index),
            f"{name}.{self.output_name}",
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
            rotary=self.rotary(index),
            # A window that the exported context never leaves is no window.
            window=layer.window if layer.window is not None and layer.window < self.context_length else None,
            softcap=config.attention_softcap, query_norm=query_norm, key_norm=key_norm,
            norm_epsilon=config.norm_epsilon, norm_offset=config.norm_offset if query_norm else 0.0,
            sparsity=self.sparsity(index),
        )  # fmt: skip

    def rotary(self, index: int) -> Rotary | None:
        """The rotation of a layer; where the length decides, that of the exported context."""
        rotary = self.config.layers[index].rotary
        return rotary.at(self.context_length) if isinstance(rotary, LongRotary) else rotary

    def sparsity(self, index: int) -> BlockSparsity | None:
        """Which keys a layer sees; None: all that causality and the window leave."""
        del index
        return None

    def feed_forward(self, x: Value, layer: str, index: int) -> Value:
        """What follows attention in ``layer``: an MLP, or a mixture of experts where the configuration has one."""
        experts = self.config.layers[index].experts
        name = f"{layer}.{self.mlp_name}"
        return self.mlp(x, name) if experts is None else self.mixture_of_experts(x, name, experts)

    def mlp(self, x: Value, name: str) -> Value:
        """``down(activation(gate(x)) * up(x))``."""
        config = self.config
        gate, up = self.gate_and_up(x, name)
        gated = self.build.multiply(self.build.activation(config.activation, gate), up)
        return self.linear(gated, f"{name}.down_proj", config.hidden_size, config.mlp_bias)

    def gate_and_up(self, x: Value, name: str) -> tuple[Value, Value]:
        """The two projections of a gated MLP, ``[1, S, intermediate]`` each."""
        width, bias = self.config.intermediate_size, self.config.mlp_bias
        return self.linear(x, f"{name}.gate_proj", width, bias), self.linear(x, f"{name}.up_proj", width, bias)

    def mixture_of_experts(self, x: Value, name: str, experts: ExpertsConfig) -> Value:
        """Gated MLPs of which a router chooses."""
        inner, hidden = experts.intermediate_size, self.config.hidden_size
        gates, ups, downs = (
            [WeightInfo(f"{name}.experts.{expert}.{part}.weight", shape) for expert in range(experts.count)]
            for part, shape in zip(self.expert_names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True)
        )
        return self.build.mixture_of_experts(
            x, WeightInfo(f"{name}.gate.weight", (experts.count, hidden)), gates, ups, downs,
            chosen=experts.chosen, renormalize=experts.renormalize,
        )  # fmt: skip

    def norm(self, x: Value, name: str) -> Value:
        """A norm of the residual."""
        config, weight = self.config, WeightInfo(f"{name}.weight", (x.width,))
        if config.layer_norm:
            return self.build.layer_norm(x, weight, WeightInfo(f"{name}.bias", (x.width,)), config.norm_epsilon)
        return self.build.rms_norm(x, weight, config.norm_epsilon, config.norm_offset)

    def head(self, x: Value) -> Value:
        """Logits ``[1, S, vocabulary]``."""
        config = self.config
        bias = WeightInfo(self.head_bias_name, (config.vocabulary_size,)) if config.head_bias else None
        logits = self.build.linear(x, self._table("model.embed_tokens" if config.tied else "lm_head"), bias)
        logits = self.build.scale(logits, config.logit_scale)
        return logits if config.logit_softcap is None else self.build.softcap(logits, config.logit_softcap)

    def linear(self, x: Value, name: str, outputs: int, bias: bool = False, rows: RowSelection | None = None) -> Value:
        """``x @ weight.T``, with its bias where there is one; ``rows``: only those of a fused tensor of ``outputs``."""
        width = outputs if rows is None else rows.count(outputs)

        def weight(part: str, *shape: int) -> WeightInfo:
            tensor = f"{name}.{part}"
            return WeightInfo(tensor if rows is None else rows.of(tensor), shape)

        return self.build.linear(x, weight("weight", width, x.width), weight("bias", width) if bias else None)

    def _table(self, name: str) -> WeightInfo:
        return WeightInfo(f"{name}.weight", (self.config.vocabulary_size, self.config.hidden_size))
