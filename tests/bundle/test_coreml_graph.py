"""The meaning of the package: every attribute of the graph, in both forms of attention, against the eager operators."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pocketlm.errors import UnsupportedError
from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends import coreml
from pocketlm_export.backends.base import Lowering
from pocketlm_export.backends.coreml.writer import FORMS, write_package
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
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
    Value,
)
from pocketlm_export.graph.rotary import Rotary
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import Weights, quantize
from tests.architectures.parity import difference

TOKENS = [7, 300, 12, 45, 99, 7, 8, 250, 31, 6, 19, 77]


@pytest.fixture(scope="module")
def lowering(tiny_checkpoint, tmp_path_factory) -> Lowering:
    """int4, so that every matrix is exact in the artifact; the constants of the graph are such as fp16 holds."""
    checkpoint = open_checkpoint(tiny_checkpoint("qwen3-biases")[0])
    graph = build_graph(checkpoint.config, checkpoint.config.context_length)
    epsilon = float(np.float16(1e-5**0.5)) ** 2
    graph = altered(altered(graph, Attention, scale=0.203125, norm_epsilon=epsilon), RmsNorm, epsilon=epsilon)
    store = WeightStore(tmp_path_factory.mktemp("store"))
    weights = quantize(checkpoint.tensors, assign_rows(graph, "int4", "int8"), store)
    return Lowering(graph, weights, checkpoint.config, checkpoint.generation, checkpoint.tokenizer_files)


def altered(graph: Graph, changed: type, **changes) -> Graph:
    return replace(graph, nodes=tuple(replace(n, **changes) if isinstance(n, changed) else n for n in graph.nodes))


def evaluate(graph: Graph, weights: Weights, tokens: list[int]) -> np.ndarray:
    """The graph through PocketLM's eager operators in float64: float64 ``[len(tokens), vocabulary]``."""
    ops, functional = torch.ops.pocketlm, torch.nn.functional
    values = {graph.ids: torch.tensor([tokens])}
    activations = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }

    def weight(info):
        if info is None:
            return None
        blocks = [block for _, block in weights.blocks(info.name)]
        return torch.from_numpy(np.concatenate(blocks).reshape(info.shape)).double()

    for node in graph:
        match node:
            case Embedding():
                values[node.output] = ops.embedding(values[node.ids], weight(node.weight))
            case Linear():
                for matrix, bias, output in zip(node.weights, node.biases, node.outputs, strict=True):
                    values[output] = ops.linear(values[node.x], weight(matrix), weight(bias))
            case RmsNorm():
                values[node.output] = ops.rms_norm(values[node.x], weight(node.weight), node.epsilon, node.offset)
            case Attention():
                cache = torch.zeros(1, node.kv_heads, graph.context_length, node.head_dim).double()
                rotary = node.rotary or Rotary(())
                values[node.output] = ops.attention(
                    values[node.query], values[node.key], values[node.value], cache, cache.clone(), torch.tensor([0]),
                    weight(node.query_norm), weight(node.key_norm), node.heads, node.kv_heads, node.head_dim,
                    node.scale, list(rotary.frequencies), rotary.scale, node.window or 0, node.softcap or 0.0,
                    node.norm_epsilon,
                )  # fmt: skip
            case Activation():
                values[node.output] = activations[node.kind](values[node.x])
            case Add():
                values[node.output] = values[node.left] + values[node.right]
            case Multiply():
                values[node.output] = values[node.left] * values[node.right]
    return values[graph.logits][0].numpy()


def run(package, precision: str) -> np.ndarray:
    inputs = {"input_ids": np.array([TOKENS], np.int32), "position": np.array([0], np.int32)}
    interpreter = Interpreter(package, precision)
    return interpreter.predict(inputs, interpreter.make_state(), "score")["logits"][0].astype(np.float64)


ALTERATIONS = {
    "as it is": lambda graph: graph,
    "soft cap": lambda graph: altered(graph, Attention, softcap=1.5),
    "another scale": lambda graph: altered(graph, Attention, scale=0.125),
    "a window of one": lambda graph: altered(graph, Attention, window=1),
    "a window of five": lambda graph: altered(graph, Attention, window=5),
    "no query norm": lambda graph: altered(graph, Attention, query_norm=None),
    "weights from zero": lambda graph: altered(graph, RmsNorm, offset=1.0),
    "a large epsilon": lambda graph: altered(graph, RmsNorm, epsilon=0.125**2),
    **{kind: lambda graph, kind=kind: altered(graph, Activation, kind=kind) for kind in coreml.ACTIVATIONS[1:]},
}


@pytest.mark.parametrize("form", ["explicit", "fused"])
@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_every_attribute_means_what_the_operators_say(alteration, form, lowering, tmp_path):
    """Without rotation, whose tables are rounded, nothing but the order of sums lies between the two."""
    graph = ALTERATIONS[alteration](altered(lowering.graph, Attention, rotary=None))
    node = graph.attentions[0]
    if form == "fused" and node.softcap is None:  # what fp16 must hold is then the scale beside the operator's own
        graph = altered(graph, Attention, scale=node.scale * node.head_dim**-0.5)
    coreml.check(graph, {})
    artifact = write_package(replace(lowering, graph=graph), tmp_path / "model.mlpackage", form)
    assert artifact.notes[0].startswith(f"attention is {FORMS[form]};")
    expected = evaluate(graph, lowering.weights, TOKENS)
    assert difference(run(tmp_path / "model.mlpackage", "float64"), expected)[0] < 1e-9
    largest, rms = difference(run(tmp_path / "model.mlpackage", "float16"), expected)
    assert largest < 5e-2 and rms < 1e-2


@pytest.mark.parametrize(("part", "scale"), [(1, 1.0), (2, 1.0), (3, 0.5)])
def test_rotation_of_whole_heads_and_of_a_part(part, scale, lowering, tmp_path):
    """The tables are fp16, cosines off by up to 2^-12."""
    rotary = Rotary(lowering.graph.attentions[0].rotary.frequencies[::part], scale)
    graph = altered(lowering.graph, Attention, rotary=rotary)
    write_package(replace(lowering, graph=graph), tmp_path / "model.mlpackage")
    expected = evaluate(graph, lowering.weights, TOKENS)
    largest, rms = difference(run(tmp_path / "model.mlpackage", "float64"), expected)
    assert largest < 5e-3 and rms < 1e-3
    unrotated = evaluate(altered(graph, Attention, rotary=None), lowering.weights, TOKENS)
    assert difference(unrotated, expected)[1] > 1e-2


def test_what_cannot_be_expressed_is_refused_by_name(lowering):
    graph = lowering.graph
    last = LastPositions(x=graph.logits, rows=3, output=Value("cut", (1, 3, 320)))
    uneven = tuple(replace(n, kv_heads=4) if isinstance(n, Attention) and n.layer == 1 else n for n in graph.nodes)
    row = replace(assign_rows(graph, "int8", "int8")["model.embed_tokens.weight"], name="int3", bits=3)
    for refused, rows, message in (
        (altered(graph, RmsNorm, epsilon=0.0), {}, "epsilon of 0.0"),
        (altered(graph, RmsNorm, epsilon=0.1), {}, "epsilon of 0.1"),
        (altered(graph, Activation, kind="relu2"), {}, "activation 'relu2'; supported: silu"),
        (replace(graph, nodes=(*graph.nodes, last)), {}, "cut keeps the last 3 positions"),
        (replace(graph, nodes=uneven), {}, "different"),
        (graph, {"lm_head.weight": row}, "lm_head.weight: 3-bit scheme row 'int3'"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            coreml.check(refused, rows)
