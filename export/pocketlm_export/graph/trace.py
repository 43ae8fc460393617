"""Trace a decoder once, on fake tensors, into the graph that every backend lowers.

No weight is read: parameters and caches are placeholders. The traced program keeps PocketLM's operators whole, and
each of the few operator kinds becomes one typed node; any other kind is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind

from pocketlm.errors import UnsupportedError
from pocketlm_export.architectures._configuration import DecoderConfig
from pocketlm_export.architectures._decoder import Decoder
from pocketlm_export.graph.graph import (
    SEQUENCE,
    Activation,
    Add,
    Attention,
    Embedding,
    Graph,
    Linear,
    Multiply,
    Node,
    RmsNorm,
    Value,
    WeightInfo,
)
from pocketlm_export.graph.rotary import Rotary

__all__ = ["trace"]


def trace(config: DecoderConfig, context_length: int) -> Graph:
    """The graph of ``config`` for caches of ``context_length`` positions."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder(config, context_length).eval()
        example = (
            torch.zeros(1, min(8, context_length), dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
            model.make_caches(),
        )
        sequence = torch.export.Dim("sequence", min=1, max=max(2, context_length))
        shapes = ({1: sequence}, None, [None] * len(example[2]))
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    return _Importer(program).graph(context_length)


@dataclass(slots=True)
class _Importer:
    program: torch.export.ExportedProgram

    def graph(self, context_length: int) -> Graph:
        values: dict[str, Any] = {}
        nodes: list[Node] = []
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        users: list[str] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind is InputKind.PARAMETER:
                    values[node.name] = WeightInfo(str(spec.target), tuple(node.meta["val"].shape))
                else:
                    values[node.name] = _value(node)
                    users.append(node.name)
            elif node.op == "call_function":
                name = str(node.target)
                if name not in IMPORTERS:
                    raise UnsupportedError(f"the trace holds {name}, which no backend lowers")
                output = _value(node)
                arguments = [_resolve(argument, values) for argument in node.args]
                nodes.append(IMPORTERS[name](arguments, output, len([n for n in nodes if isinstance(n, Attention)])))
                values[node.name] = output
            elif node.op == "output":
                (logits,) = node.args[0]
        return Graph(tuple(nodes), values[users[0]], values[logits.name], context_length)


def _value(node: torch.fx.Node) -> Value:
    shape = tuple(int(size) if isinstance(size, int) else SEQUENCE for size in node.meta["val"].shape)
    return Value(node.name, shape)


def _resolve(argument: Any, values: dict[str, Any]) -> Any:
    return values[argument.name] if isinstance(argument, torch.fx.Node) else argument


def _embedding(arguments: list[Any], output: Value, layer: int) -> Node:
    ids, weight = arguments
    return Embedding(ids=ids, weight=weight, output=output)


def _linear(arguments: list[Any], output: Value, layer: int) -> Node:
    x, weight, bias = arguments
    return Linear(x=x, weights=(weight,), biases=(bias,), outputs=(output,))


def _rms_norm(arguments: list[Any], output: Value, layer: int) -> Node:
    x, weight, epsilon, offset = arguments
    return RmsNorm(x=x, weight=weight, epsilon=epsilon, offset=offset, output=output)


def _attention(arguments: list[Any], output: Value, layer: int) -> Node:
    (query, key, value, _k_cache, _v_cache, _position, query_norm, key_norm, heads, kv_heads, head_dim, scale,
     frequencies, rotary_scale, window, softcap, norm_epsilon) = arguments  # fmt: skip
    return Attention(
        layer=layer, query=query, key=key, value=value, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale,
        rotary=Rotary(tuple(frequencies), rotary_scale) if frequencies else None,
        window=window or None, softcap=softcap or None,
        query_norm=query_norm, key_norm=key_norm, norm_epsilon=norm_epsilon, output=output,
    )  # fmt: skip


def _add(arguments: list[Any], output: Value, layer: int) -> Node:
    left, right = arguments
    return Add(left=left, right=right, output=output)


def _multiply(arguments: list[Any], output: Value, layer: int) -> Node:
    left, right = arguments
    return Multiply(left=left, right=right, output=output)


def _activation(kind: str) -> Callable[[list[Any], Value, int], Node]:
    def importer(arguments: list[Any], output: Value, layer: int) -> Node:
        (x,) = arguments
        return Activation(kind=kind, x=x, output=output)

    return importer


IMPORTERS: dict[str, Callable[[list[Any], Value, int], Node]] = {
    "pocketlm.embedding.default": _embedding,
    "pocketlm.linear.default": _linear,
    "pocketlm.rms_norm.default": _rms_norm,
    "pocketlm.attention.default": _attention,
    "aten.add.Tensor": _add,
    "aten.mul.Tensor": _multiply,
    "aten.silu.default": _activation("silu"),
    "aten.tanh.default": _activation("tanh"),
    "aten.sigmoid.default": _activation("sigmoid"),
}
