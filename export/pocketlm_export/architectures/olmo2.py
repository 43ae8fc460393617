"""OLMo 2: norms behind attention and MLP instead of before them, and of queries and keys over their whole width."""

from dataclasses import replace

from pocketlm_export.architectures import _decoder, llama
from pocketlm_export.architectures._configuration import DecoderConfig, Defaults
from pocketlm_export.fields import Fields
from pocketlm_export.graph.graph import Value


def configure(fields: Fields) -> DecoderConfig:
    """Llama's keys; the MLP never has a bias."""
    fields.value("clip_qkv")  # transformers' class does not read it
    return replace(llama.configure(fields, Defaults(norm_epsilon=1e-5)), mlp_bias=False)


class Decoder(_decoder.Decoder):
    """No norm before a projection."""

    def layer(self, x: Value, name: str, index: int) -> Value:
        """``x += norm(attention(x))``, ``x += norm(mlp(x))``."""
        made = self.attention(x, f"{name}.{self.attention_name}", index)
        x = self.add(x, self.norm(made, f"{name}.post_attention_layernorm"))
        return self.add(x, self.norm(self.feed_forward(x, name, index), f"{name}.post_feedforward_layernorm"))

    def query_key_value(self, x: Value, name: str) -> tuple[Value, Value, Value]:
        """Norms of all heads together, where Qwen3's are of each."""
        query, key, value = super().query_key_value(x, name)
        return self.norm(query, f"{name}.q_norm"), self.norm(key, f"{name}.k_norm"), value
