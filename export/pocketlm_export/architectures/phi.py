"""Phi-1.5 and Phi-2: attention and MLP side by side behind one layer norm, biases everywhere, partial rotation."""

from dataclasses import replace

from pocketlm.errors import UnsupportedError
from pocketlm_export.architectures import _decoder
from pocketlm_export.architectures._configuration import DecoderConfig, Defaults, read_decoder
from pocketlm_export.architectures._rope import RopeDefaults
from pocketlm_export.fields import Fields
from pocketlm_export.graph.graph import Value


def configure(fields: Fields) -> DecoderConfig:
    """Half of each head rotates unless ``partial_rotary_factor`` says otherwise; the head has a bias, tied or not."""
    if fields.flag("qk_layernorm", False):
        raise UnsupportedError(f"{fields.source}: 'qk_layernorm' is true: layer norms of query and key heads")
    defaults = Defaults(
        rope=RopeDefaults(partial=0.5), norm_epsilon=1e-5, epsilon_key="layer_norm_eps", activation="gelu_new"
    )
    return replace(
        read_decoder(fields, defaults),
        query_key_value_bias=True, output_bias=True, mlp_bias=True, head_bias=True, layer_norm=True,
        parallel_residual=True,
    )  # fmt: skip


class Decoder(_decoder.Decoder):
    """An MLP of two matrices, and names of its own."""

    output_name = "dense"
    final_norm_name = "model.final_layernorm"

    def mlp(self, x: Value, name: str) -> Value:
        """``fc2(activation(fc1(x)))``."""
        config = self.config
        inner = self.build.activation(
            config.activation, self.linear(x, f"{name}.fc1", config.intermediate_size, config.mlp_bias)
        )
        return self.linear(inner, f"{name}.fc2", config.hidden_size, config.mlp_bias)
