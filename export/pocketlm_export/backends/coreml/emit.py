"""The graph as an ML Program: one table {node type -> emitter} over coremltools' MIL builder. Everything is fp16."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pocketlm_export.backends.coreml.attention import emit_attention
from pocketlm_export.backends.coreml.emission import AttentionForm, Emission
from pocketlm_export.backends.coreml.importing import coremltools, mil
from pocketlm_export.backends.coreml.layout import Layout
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Attention,
    Embedding,
    Graph,
    LastPositions,
    Linear,
    Multiply,
    RmsNorm,
)

__all__ = ["build_program"]

mb = mil.Builder


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
    name = {"name": "logits"} if emission.logits in node.outputs else {}
    y = mb.linear(x=emission.values[node.x], weight=emission.matrix(node.weights), bias=bias, **name)
    parts = [y] if len(node.outputs) == 1 else mb.split(x=y, split_sizes=[v.width for v in node.outputs], axis=-1)
    emission.values.update(zip(node.outputs, parts, strict=True))


def _rms_norm(emission: Emission, node: RmsNorm) -> None:
    weight = emission.layout.vector(node.weight, node.offset)
    emission.values[node.output] = emission.normalize(emission.values[node.x], weight, node.epsilon)


def _add(emission: Emission, node: Add) -> None:
    emission.values[node.output] = mb.add(x=emission.values[node.left], y=emission.values[node.right])


def _multiply(emission: Emission, node: Multiply) -> None:
    emission.values[node.output] = mb.mul(x=emission.values[node.left], y=emission.values[node.right])


ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "silu": lambda x: mb.silu(x=x),
    "gelu": lambda x: mb.gelu(x=x, mode="EXACT"),
    "gelu_tanh": lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
    "tanh": lambda x: mb.tanh(x=x),
    "sigmoid": lambda x: mb.sigmoid(x=x),
}


def _activation(emission: Emission, node: Activation) -> None:
    emission.values[node.output] = ACTIVATIONS[node.kind](emission.values[node.x])


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
    RmsNorm: _rms_norm,
    Attention: emit_attention,
    Add: _add,
    Multiply: _multiply,
    Activation: _activation,
    LastPositions: _last_positions,
}
