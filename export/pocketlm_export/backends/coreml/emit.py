"""The graph as an ML Program: one table {node type -> emitter} over coremltools' MIL builder. Everything is fp16."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pocketlm_export.backends.coreml.attention import emit_attention
from pocketlm_export.backends.coreml.emission import AttentionForm, Emission, Var
from pocketlm_export.backends.coreml.experts import emit_mixture_of_experts
from pocketlm_export.backends.coreml.importing import coremltools, mil
from pocketlm_export.backends.coreml.layout import Layout
from pocketlm_export.backends.coreml.norms import emit_layer_norm, emit_rms_norm
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Attention,
    Clamp,
    Embedding,
    Graph,
    LastPositions,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Multiply,
    RmsNorm,
    Scale,
)

__all__ = ["build_program"]

mb = mil.Builder
GELU_TANH_BOUND = 8.0  # where tanh is 1 in float64


def build_program(
    functions: Mapping[str, tuple[Graph, int | None]], longest_call: int, layout: Layout, form: AttentionForm
) -> Any:
    """A MIL program of functions over the same constants and states; the first is the default one.

    ``functions`` maps a name to its graph and the length S of its input, None for any of 1 to ``longest_call``.
    Inputs: ``input_ids`` int32 ``[1, S]``, ``position`` int32 ``[1]``, the first of the call; states ``k_cache`` and
    ``v_cache`` fp16 ``[layers, kv_heads, context, head_dim]``; output ``logits`` fp16 ``[1, S or 1, vocabulary]``.
    """
    program = mil.Program()
    for name, (graph, length) in functions.items():
        mb.name_count.clear()  # or names would depend on what this process has built before
        program.add_function(name, _function(graph, length, longest_call, layout, form))
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = True
    return program


def _function(graph: Graph, length: int | None, longest_call: int, layout: Layout, form: AttentionForm) -> Any:
    attention = graph.attentions[0]
    cache = (len(graph.attentions), attention.kv_heads, graph.context_length, attention.head_dim)
    size: Any = length or coremltools.RangeDim(1, longest_call, default=longest_call)
    placeholder, state = mil.program.Placeholder, mil.program.StateTensorPlaceholder
    inputs = {
        "input_ids": placeholder((1, size if length else size.symbol), mil.types.int32, name="input_ids"),
        "position": placeholder((1,), mil.types.int32, name="position"),
        "k_cache": state(cache, mil.types.fp16, name="k_cache"),
        "v_cache": state(cache, mil.types.fp16, name="v_cache"),
    }
    with mil.Function(inputs, opset_version=coremltools.target.iOS18) as function:
        emission = Emission(graph, layout, form, length, function.inputs)
        for node in graph:
            EMITTERS[type(node)](emission, node)
        function.set_outputs([emission.values[graph.logits]])
    shapes = {"input_ids": (1, size), "position": (1,)}
    function.set_input_types(
        tuple(coremltools.TensorType(name=name, shape=shape, dtype=np.int32) for name, shape in shapes.items())
    )
    return function


def _embedding(emission: Emission, node: Embedding) -> None:
    table = emission.matrix((node.weight,))
    ids = emission.values[node.ids]
    emission.values[node.output] = mb.gather(x=table, indices=ids, axis=0, validate_indices=False)


def _linear(emission: Emission, node: Linear) -> None:
    bias = emission.constant(emission.layout.bias(node.weights, node.biases))
    name, weight = emission.name_of(*node.outputs), emission.matrix(node.weights)
    y = mb.linear(x=emission.values[node.x], weight=weight, bias=bias, **name)
    parts = [y] if len(node.outputs) == 1 else mb.split(x=y, split_sizes=[v.width for v in node.outputs], axis=-1)
    emission.values.update(zip(node.outputs, parts, strict=True))


def _add(emission: Emission, node: Add) -> None:
    emission.values[node.output] = mb.add(x=emission.values[node.left], y=emission.values[node.right])


def _multiply(emission: Emission, node: Multiply) -> None:
    emission.values[node.output] = mb.mul(x=emission.values[node.left], y=emission.values[node.right])


def _scale(emission: Emission, node: Scale) -> None:
    if node.output not in emission.values:  # a norm has taken the scale behind it along
        x, factor = emission.values[node.x], np.float16(node.factor)
        emission.values[node.output] = mb.mul(x=x, y=factor, **emission.name_of(node.output))


def _clamp(emission: Emission, node: Clamp) -> None:
    x = emission.values[node.x]
    if node.least is not None and node.most is not None:
        x = mb.clip(x=x, alpha=np.float16(node.least), beta=np.float16(node.most))
    elif node.least is not None:
        x = mb.maximum(x=x, y=np.float16(node.least))
    elif node.most is not None:
        x = mb.minimum(x=x, y=np.float16(node.most))
    emission.values[node.output] = x


def _gelu_tanh(x: Var, **name: str) -> Var:
    """Its cube leaves fp16's range from 41 on: what is beyond GELU_TANH_BOUND, where gelu(x) is x or 0, is added."""
    bound = np.float16(GELU_TANH_BOUND)
    near = mb.gelu(x=mb.clip(x=x, alpha=-bound, beta=bound), mode="TANH_APPROXIMATION")
    return mb.add(x=near, y=mb.sub(x=mb.maximum(x=x, y=bound), y=bound), **name)


ACTIVATIONS: Mapping[str, Callable[..., Var]] = {
    "silu": mb.silu,
    "gelu": functools.partial(mb.gelu, mode="EXACT"),
    "gelu_tanh": _gelu_tanh,
    "tanh": mb.tanh,
    "sigmoid": mb.sigmoid,
}


def _activation(emission: Emission, node: Activation) -> None:
    emission.values[node.output] = ACTIVATIONS[node.kind](x=emission.values[node.x], **emission.name_of(node.output))


def _last_positions(emission: Emission, node: LastPositions) -> None:
    x = emission.values[node.x]
    if emission.length != 1:
        x = mb.slice_by_index(
            x=x, begin=[0, -1, 0], end=[0, 0, 0], begin_mask=[True, False, True], end_mask=[True, True, True]
        )
    emission.values[node.output] = x


EMITTERS: Mapping[type, Callable[[Emission, Any], None]] = {
    Embedding: _embedding,
    Linear: _linear,
    RmsNorm: emit_rms_norm,
    LayerNorm: emit_layer_norm,
    Attention: emit_attention,
    MixtureOfExperts: emit_mixture_of_experts,
    Add: _add,
    Multiply: _multiply,
    Scale: _scale,
    Clamp: _clamp,
    Activation: _activation,
    LastPositions: _last_positions,
}
