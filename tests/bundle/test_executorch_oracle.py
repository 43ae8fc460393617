"""The vendor's own way to a .pte as the oracle: torch.export, torchao's tensors of our integers, the partitioner."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.executorch.emit import emit
from pocketlm_export.backends.executorch.packing import Packing
from pocketlm_export.backends.executorch.writer import write_pte
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import SEQUENCE, Embedding, Graph, Linear, Value, WeightInfo
from pocketlm_export.quantization.schemes import SCHEMES, assign_rows
from pocketlm_export.quantization.store import QuantizedTensor, WeightStore
from pocketlm_export.quantization.weights import quantize
from tests.architectures.parity import mean_kl

TOKENS = np.random.default_rng(3).integers(5, 320, 40)


def vendor_tensor(tensor: QuantizedTensor) -> torch.Tensor:
    """torchao's weight with our codes and scales, and dynamic int8 activations."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    group = tensor.row.group or tensor.shape[1]
    scales = torch.tensor(tensor.scales())
    return IntxUnpackedToInt8Tensor(
        qdata=torch.tensor(tensor.codes()),
        scale=scales,
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=torch.int4 if tensor.row.bits == 4 else torch.int8,
        block_size=(1, group),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )


def vendor_program(module: torch.nn.Module, example: tuple[torch.Tensor, ...]):
    """``module`` lowered by the vendor; returns a function from inputs to the first output."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module.eval(), example, strict=False)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        content = bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(content).load_method("forward")
    method._keep = content
    return lambda *inputs: method.execute(list(inputs))[0].numpy()


def run_pte(path: Path, tokens: np.ndarray) -> np.ndarray:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return method.execute([torch.tensor(tokens)[None], torch.tensor([0])])[0].numpy()


LINEARS = {
    "model.layers.0.self_attn.o_proj": "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.mlp.gate_proj": "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj": "model.layers.1.mlp.down_proj.weight",
}


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("linear", LINEARS)
def test_a_linear_equals_the_vendors(linear, scheme, tiny_checkpoint, tmp_path):
    """A program of one linear over the rows of another matrix; biases on."""
    folder, _ = tiny_checkpoint("llama-untied-biases")
    tensors = open_checkpoint(folder).tensors
    table, weight, bias = (
        WeightInfo(name, tensors.shape(name)) for name in (LINEARS[linear], f"{linear}.weight", f"{linear}.bias")
    )
    ids = Value("ids", (1, SEQUENCE))
    x, y = Value("x", (1, SEQUENCE, table.shape[1])), Value("y", (1, SEQUENCE, weight.shape[0]))
    nodes = (
        Embedding(ids=ids, weight=table, output=x),
        Linear(x=x, weights=(weight,), biases=(bias,), outputs=(y,)),
    )
    rows = {table.name: None, weight.name: SCHEMES[scheme], bias.name: None}
    weights = quantize(tensors, rows, WeightStore(tmp_path))
    emission = emit(Graph(nodes, ids, y, 64), Packing(weights, lambda _name, _elements: None), 64)
    write_pte(tmp_path / "linear.pte", emission, [])

    tokens = np.arange(24)
    inputs = torch.tensor(weights.values(table.name))[tokens][None]
    module = torch.nn.Linear(table.shape[1], weight.shape[0])
    module.weight = torch.nn.Parameter(vendor_tensor(weights.quantized(weight.name)), requires_grad=False)
    module.bias = torch.nn.Parameter(torch.tensor(weights.values(bias.name)))
    expected = vendor_program(module, (inputs,))(inputs)
    np.testing.assert_allclose(
        run_pte(tmp_path / "linear.pte", tokens), expected, atol=1e-6 * np.abs(expected).max(), rtol=0
    )


class WithoutCache(torch.nn.Module):
    """transformers' model from token ids to logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("row", [pytest.param("llama", marks=pytest.mark.long), "qwen3-biases"])
def test_a_whole_model_answers_like_the_vendors(row, tiny_checkpoint, tiny_bundle, tmp_path):
    """The same integers in transformers' model, lowered by the vendor, without a cache."""
    import copy

    folder, model = tiny_checkpoint(row)
    checkpoint = open_checkpoint(folder)
    graph = build_graph(checkpoint.config, checkpoint.config.context_length)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "int4", "int8"), WeightStore(tmp_path))
    vendor = copy.deepcopy(model)
    table = weights.quantized(graph.embedding.weight.name)
    vendor.lm_head = torch.nn.Linear(1, 1, bias=False)
    vendor.lm_head.weight = torch.nn.Parameter(vendor_tensor(weights.quantized(graph.head.weights[0].name)), False)
    vendor.model.embed_tokens.weight = torch.nn.Parameter(torch.tensor(table.dequantized()), False)
    for name, module in vendor.named_modules():
        if f"{name}.weight" in weights_of_linears(graph):
            module.weight = torch.nn.Parameter(vendor_tensor(weights.quantized(f"{name}.weight")), False)
    ids = torch.tensor(TOKENS)[None]
    expected = vendor_program(WithoutCache(vendor), (ids,))(ids)[0]
    with tiny_bundle(row, "int4", "executorch", "int8").session("executorch", threads=1) as session:
        logits = session.extend(TOKENS.tolist(), logits=len(TOKENS))
    # An activation on the edge of two int8 codes may fall to either side: linears are equal, whole models nearly.
    error = np.sqrt(((logits - expected) ** 2).mean()) / expected.std()
    assert error <= 5e-2
    assert mean_kl(logits.astype(np.float64), expected.astype(np.float64)) <= 2e-3
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.9


def weights_of_linears(graph: Graph) -> set[str]:
    head = graph.head.weights[0].name
    return {weight.name for node in graph if isinstance(node, Linear) for weight in node.weights} - {head}
