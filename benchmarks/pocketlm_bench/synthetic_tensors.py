"""The tensors of a synthetic checkpoint: names and shapes from the graph of its model, values by what each is for.

Norms keep activations near 1, and what a layer adds to the residual is small enough that all layers together add about
1. A few channels of the residual are outliers: they appear in the first layer and stay, as those of trained models do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pocketlm_export.architectures import SUPPRESSING_BIAS, DecoderConfig, build_graph, load_architecture
from pocketlm_export.fields import Fields
from pocketlm_export.graph.graph import (
    Add,
    Graph,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Node,
    RmsNorm,
    Scale,
    Value,
    WeightInfo,
    outputs_of,
    weights_of,
)
from pocketlm_export.selection import selected

__all__ = ["OUTLIER_CHANNELS", "SyntheticTensor", "synthetic_tensors"]

BYTES_PER_VALUE = 2
OUTLIER_CHANNELS = 4  # of the residual stream; together they are about as large as all others
LOGITS_DEVIATION = 2.0
DEVIATION = 0.1  # of norms and biases


@dataclass(frozen=True, slots=True)
class SyntheticTensor:
    """Values are ``mean + deviation * normal``, less ``offset``; ``outlier_gain`` multiplies what stands before that at
    the outlier channels, which are rows of a matrix and elements of a vector."""

    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0
    outlier_gain: float = 1.0
    offset: float = 0.0

    @property
    def size(self) -> int:
        """Bytes in bfloat16."""
        return prod(self.shape) * BYTES_PER_VALUE


def _adding(graph: Graph) -> list[Value]:
    """What linears, experts and norms make that is added to the residual, scaled or not."""
    makers = {value: node for node in graph for value in outputs_of(node)}
    found = []
    for add in (node for node in graph if isinstance(node, Add)):
        for value in (add.left, add.right):
            while isinstance(scale := makers[value], Scale):
                value = scale.x
            if isinstance(makers[value], Linear | MixtureOfExperts | RmsNorm):
                found.append(value)
    return found


def synthetic_tensors(fields: Mapping[str, Any]) -> dict[str, SyntheticTensor]:
    """Every tensor of the model that config.json's ``fields`` describe, in the order of first use."""
    config = load_architecture(fields["model_type"], "the shape").configure(Fields(fields, "the shape"))
    graph = build_graph(config, 2)
    return _Tensors(config, graph).all()


class _Tensors:
    def __init__(self, config: DecoderConfig, graph: Graph) -> None:
        self._config, self._graph = config, graph
        self._added = (2 * len(config.layers)) ** -0.5
        self._outlier = (config.hidden_size / OUTLIER_CHANNELS) ** 0.5
        adding = _adding(graph)
        self._adding, self._first = set(adding), adding[1]  # the MLP of the first layer

    def all(self) -> dict[str, SyntheticTensor]:
        tensors: dict[str, SyntheticTensor] = {}
        for node in self._graph:
            for weight in weights_of(node):
                name, selection = selected(weight.name)
                if name in tensors or name == SUPPRESSING_BIAS:
                    continue
                rows = weight.shape[0]
                if selection is not None:
                    rows = rows // (selection.stop - selection.start) * selection.period
                tensors[name] = self._tensor(node, weight, (rows, *weight.shape[1:]))
        return tensors

    def _tensor(self, node: Node, weight: WeightInfo, shape: tuple[int, ...]) -> SyntheticTensor:
        if weight.name in (self._graph.head.weights[0].name, self._graph.embedding.weight.name):
            deviation = LOGITS_DEVIATION * shape[1] ** -0.5 / self._config.logit_scale
            makes_logits = weight.name == self._graph.head.weights[0].name
            return SyntheticTensor(shape, deviation if makes_logits else 1.0)
        if isinstance(node, RmsNorm | LayerNorm) and weight == node.weight:
            return self._norm(node, shape)
        if len(shape) == 1:
            is_norm = not isinstance(node, Linear | LayerNorm)  # of queries or keys
            return SyntheticTensor(shape, DEVIATION, mean=float(is_norm), offset=self._config.norm_offset * is_norm)
        deviation = shape[1] ** -0.5
        inner = isinstance(node, MixtureOfExperts) and weight not in node.downs
        if inner or outputs_of(node)[0] not in self._adding:
            return SyntheticTensor(shape, deviation)
        return SyntheticTensor(shape, self._added * deviation, outlier_gain=self._gain(node))

    def _norm(self, node: RmsNorm | LayerNorm, shape: tuple[int, ...]) -> SyntheticTensor:
        offset = node.offset if isinstance(node, RmsNorm) else 0.0
        if node.output in self._adding:
            return SyntheticTensor(shape, DEVIATION * self._added, self._added, self._gain(node), offset)
        gain = 1 / self._outlier if shape[0] == self._config.hidden_size else 1.0
        return SyntheticTensor(shape, DEVIATION, 1.0, gain, offset)

    def _gain(self, node: Node) -> float:
        return self._outlier / self._added if outputs_of(node)[0] == self._first else 1.0
