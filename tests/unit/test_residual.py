"""The shifted residual is the same function, and its parts are as small as it says."""

from dataclasses import replace

import numpy as np
import pytest

from pocketlm.errors import UnsupportedError
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.reading import Call, Run
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import Add, Linear, Norm, Scale, outputs_of, substitute
from pocketlm_export.graph.residual import shift_residual
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.lockstep import Lane, run_lanes

RUNS = [Run("tokens", (Call(tuple(range(7, 47)), 40),))]


@pytest.mark.parametrize("row", ["gemma", "gemma2", "gemma3", "phi-2", "llama-untied-biases"])
def test_what_comes_out_is_the_same(row, tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint(row)[0])
    graph = build_graph(checkpoint.config, 64)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "int4", "int8"), WeightStore(tmp_path))
    traces = [
        run_lanes(changed, [Lane(name="", runs=RUNS, weights=weights)])[""][0]
        for changed in (graph, shift_residual(graph, 6))
    ]
    for name in ("logits", "keys", "values"):
        plain, shifted = (np.concatenate(getattr(trace, name)) for trace in traces)
        assert np.abs(plain - shifted).max() < 1e-11 * plain.std()


def test_every_part_is_scaled_before_what_makes_it(tiny_checkpoint):
    graph = build_graph(open_checkpoint(tiny_checkpoint("gemma")[0]).config, 64)
    shifted = shift_residual(graph, 6)
    assert shift_residual(graph, 0) is graph
    makers = {value: node for node in shifted for value in outputs_of(node)}
    for node in shifted:
        if isinstance(node, Add):
            added = makers[node.right]
            assert isinstance(added, Linear)  # of a value that was scaled, or made of one that was
            assert not isinstance(makers[added.x], Norm)
    scales = [node.factor for node in shifted if isinstance(node, Scale)]
    assert scales[0] == graph.nodes[1].factor / 64
    assert scales[1:] == [2.0**-6] * (2 * len(graph.attentions))
    epsilons = {node.epsilon for node in shifted if isinstance(node, Norm)}
    assert epsilons == {next(node.epsilon for node in graph if isinstance(node, Norm)) / 4096}


def test_a_linear_of_the_residual_itself_is_refused_by_name(tiny_checkpoint):
    graph = build_graph(open_checkpoint(tiny_checkpoint("llama")[0]).config, 64)
    nodes = [node for node in graph if not isinstance(node, Norm)]
    bare = {node.output: node.x for node in graph if isinstance(node, Norm)}
    linear = replace(graph, nodes=tuple(substitute(node, bare) for node in nodes))
    with pytest.raises(UnsupportedError, match="linear: Linear of the residual itself"):
        shift_residual(linear, 6)
