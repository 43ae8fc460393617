"""The meaning of a .pte: every attribute of the graph, written, stated, executed in float64 and run by ExecuTorch,
against the float64 reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from pocketlm_export.architectures import build_graph
from pocketlm_export.backends import executorch as backend
from pocketlm_export.backends.base import Lowering
from pocketlm_export.backends.executorch.read import ExecuTorchReader
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.reading import Call, Past, Run
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import (
    Activation,
    Attention,
    BlockSparsity,
    Clamp,
    Graph,
    MixtureOfExperts,
    Multiply,
    RmsNorm,
    Scale,
)
from pocketlm_export.graph.rotary import Rotary, default_frequencies
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.comparison import cache_deviations, logit_deviations
from pocketlm_export.verify.lockstep import Lane, run_lanes
from pocketlm_export.verify.structure import expected
from tests.bundle.altered_graphs import altered, followed, with_capped_logits, with_layer_norms

TOKENS = (7, 300, 12, 45, 99, 7, 8, 250, 31, 6, 19, 77, 200, 5, 42, 9)
RUNS = (
    Run("two prompts and tokens", (Call(TOKENS[:9], 8), Call(TOKENS[9:14], 5), *(Call((t,), 1) for t in TOKENS[14:]))),
    *(Run(f"cache of {past}", (Call(TOKENS[:3], 3), Call(TOKENS[3:4], 1)), Past(past)) for past in (2, 31, 150)),
)  # fmt: skip

EXACT = 1e-10  # of the deviation: one in 5e10 is how well float32 holds the constants of a tanh-gelu
FLOAT32 = 3e-5


@pytest.fixture(scope="module")
def lowered(tiny_checkpoint, tmp_path_factory) -> Callable[[str], Lowering]:
    """What to lower of a row of the table, in float32."""

    @cache
    def lowering(row: str) -> Lowering:
        checkpoint = open_checkpoint(tiny_checkpoint(row)[0])
        graph = build_graph(checkpoint.config, checkpoint.config.context_length)
        store = WeightStore(tmp_path_factory.mktemp("store"))
        weights = quantize(checkpoint.tensors, assign_rows(graph, "fp32", "int8"), store)
        return Lowering(graph, weights, checkpoint.config, checkpoint.generation, checkpoint.tokenizer_files)

    return lowering


ALTERATIONS: dict[str, Callable[[Graph], Graph]] = {
    "soft cap": lambda graph: altered(graph, Attention, softcap=1.7),
    "soft cap and a window": lambda graph: altered(graph, Attention, softcap=1.7, window=5),
    "soft cap of one layer": lambda graph: replace(
        graph, nodes=tuple(replace(n, softcap=3.1) if isinstance(n, Attention) and n.layer == 1 else n for n in graph)
    ),
    "another scale": lambda graph: altered(graph, Attention, scale=0.1),
    "a window of one": lambda graph: altered(graph, Attention, window=1),
    "sparse blocks": lambda graph: altered(graph, Attention, sparsity=BlockSparsity(2, 1, 3, 1)),
    "sparse blocks alike": lambda graph: altered(graph, Attention, sparsity=BlockSparsity(4, 2, 2, 0)),
    "sparse blocks under a soft cap": lambda graph: altered(
        graph, Attention, sparsity=BlockSparsity(3, 2, 5, 2), softcap=1.7
    ),
    "weights from zero": lambda graph: altered(graph, RmsNorm, offset=1.0),
    "norms of heads from zero": lambda graph: altered(graph, Attention, norm_offset=1.0),
    "no query norm": lambda graph: altered(graph, Attention, query_norm=None),
    "layer norms": lambda graph: with_layer_norms(graph, biased=False),
    "layer norms with biases": lambda graph: with_layer_norms(graph, biased=True),
    "scales": lambda graph: followed(graph, Multiply, partial(Scale, factor=-0.3)),
    "a scale behind a norm": lambda graph: followed(graph, RmsNorm, partial(Scale, factor=0.22)),
    "a least": lambda graph: followed(graph, Multiply, partial(Clamp, least=-0.1, most=None)),
    "a most": lambda graph: followed(graph, Multiply, partial(Clamp, least=None, most=0.3)),
    "a least and a most": lambda graph: followed(graph, Multiply, partial(Clamp, least=-0.1, most=0.3)),
    "scaled and capped logits": with_capped_logits,
    "no rotation": lambda graph: altered(graph, Attention, rotary=None),
    "rotation of a part, scaled": lambda graph: altered(
        graph, Attention, rotary=Rotary(default_frequencies(1e4, 10), 1.19)
    ),
    **{kind: lambda graph, kind=kind: altered(graph, Activation, kind=kind) for kind in backend.ACTIVATIONS},
}
EXPERTS: dict[str, Callable[[Graph], Graph]] = {
    "as they are": lambda graph: graph,
    "one, alone": lambda graph: altered(graph, MixtureOfExperts, chosen=1, renormalize=True),
    "one with its share": lambda graph: altered(graph, MixtureOfExperts, chosen=1, renormalize=False),
    "all": lambda graph: altered(graph, MixtureOfExperts, chosen=8, renormalize=False),
    "all in one layer": lambda graph: replace(
        graph, nodes=tuple(replace(n, chosen=8) if n is last_experts(graph) else n for n in graph)
    ),
}
CASES = [
    *(pytest.param("qwen3-biases", change, id=name) for name, change in ALTERATIONS.items()),
    *(pytest.param("qwen3-moe", change, id=f"experts {name}") for name, change in EXPERTS.items()),
]


def last_experts(graph: Graph) -> MixtureOfExperts:
    return [node for node in graph if isinstance(node, MixtureOfExperts)][-1]


def write(lowering: Lowering, graph: Graph, folder: Path) -> ExecuTorchReader:
    backend.check(graph, dict.fromkeys(graph.weights()))
    config = replace(lowering.config, vocabulary_size=graph.logits.width)
    backend.write(replace(lowering, graph=graph, config=config), folder)
    return ExecuTorchReader(PteFile(folder / "model.pte"))


def largest(reference, traces) -> float:
    """Of the logits, and of cached keys and values, in units of their deviation."""
    found = [*logit_deviations(RUNS, reference, traces).values()]
    if traces[0] is not None and traces[0].keys:
        found += cache_deviations(RUNS, reference, traces).values()
    return max(deviation.largest for deviation in found)


@pytest.mark.parametrize(("row", "change"), CASES)
def test_every_attribute_means_what_the_graph_says(row, change, lowered, tmp_path):
    lowering = lowered(row)
    graph = change(lowering.graph)
    reader = write(lowering, graph, tmp_path)
    stated = {(fact.node, fact.name): fact.value for fact in reader.facts()}
    wanted = expected(graph, reader.stored)
    assert stated.keys() == wanted.keys()
    assert all((stated[key] == value) is True for key, value in wanted.items() if key[1] not in ("cosine", "sine"))
    lane = Lane(name="reference", runs=RUNS, weights=lowering.weights, stored=reader.stored)
    reference = run_lanes(graph, [lane])["reference"]
    traces = reader.execute(RUNS)
    assert largest(reference, traces) < EXACT
    assert largest(traces, reader.meaning(RUNS)) < FLOAT32
