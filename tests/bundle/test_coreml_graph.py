"""The meaning of the package: every attribute of the graph, in both forms of attention, against the eager operators."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from pocketlm.errors import UnsupportedError
from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends import coreml
from pocketlm_export.backends.base import Lowering
from pocketlm_export.backends.coreml.writer import FORMS, write_package
from pocketlm_export.backends.reading import Call, Run
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import (
    Activation,
    Attention,
    BlockSparsity,
    Clamp,
    Graph,
    LastPositions,
    Multiply,
    RmsNorm,
    Scale,
    Value,
)
from pocketlm_export.graph.rotary import Rotary
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import Weights, quantize
from pocketlm_export.verify.lockstep import Lane, run_lanes
from tests.architectures.parity import difference
from tests.bundle.altered_graphs import altered, followed, with_capped_logits, with_layer_norms

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


def evaluate(graph: Graph, weights: Weights, tokens: list[int]) -> np.ndarray:
    """The graph by the reference: float64 ``[len(tokens), vocabulary]``."""
    runs = [Run("tokens", (Call(tuple(tokens), len(tokens)),))]
    return run_lanes(graph, [Lane(name="exact", runs=runs, weights=weights)])["exact"][0].logits[0]


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
    "norms of heads from zero": lambda graph: altered(graph, Attention, norm_offset=1.0),
    "layer norms": lambda graph: with_layer_norms(graph, biased=False),
    "layer norms with biases": lambda graph: with_layer_norms(graph, biased=True),
    "scales": lambda graph: followed(graph, Multiply, partial(Scale, factor=-0.5)),
    "a scale behind a norm": lambda graph: followed(graph, RmsNorm, partial(Scale, factor=0.25)),
    "a least": lambda graph: followed(graph, Multiply, partial(Clamp, least=-0.25, most=None)),
    "a most": lambda graph: followed(graph, Multiply, partial(Clamp, least=None, most=0.5)),
    "a least and a most": lambda graph: followed(graph, Multiply, partial(Clamp, least=-0.25, most=0.5)),
    "scaled and capped logits": with_capped_logits,
    "sparse blocks": lambda graph: altered(graph, Attention, sparsity=BlockSparsity(2, 1, 3, 1)),
    "sparse blocks alike": lambda graph: altered(graph, Attention, sparsity=BlockSparsity(3, 2, 2, 0)),
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
        (altered(graph, RmsNorm, offset=0.5), {}, "offset of 0.5"),
        (altered(graph, Attention, norm_offset=2.0), {}, "offset of 2.0"),
        (altered(graph, Attention, softcap=1e5), {}, "softcap 100000 is beyond fp16"),
        (followed(graph, Multiply, partial(Scale, factor=1e-5)), {}, "factor 1e-05 is beyond fp16"),
        (followed(graph, Multiply, partial(Clamp, least=None, most=7e4)), {}, "most 70000 is beyond fp16"),
        (altered(graph, Activation, kind="relu2"), {}, "activation 'relu2'; supported: silu"),
        (replace(graph, nodes=(*graph.nodes, last)), {}, "cut keeps the last 3 positions"),
        (replace(graph, nodes=uneven), {}, "different"),
        (graph, {"lm_head.weight": row}, "lm_head.weight: 3-bit scheme row 'int3'"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            coreml.check(refused, rows)
