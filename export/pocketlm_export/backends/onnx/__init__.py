"""ONNX for ONNX Runtime on CPUs, and for onnxruntime-genai: ``com.microsoft`` operators on shared KV buffers.

``model.onnx`` takes the ids, a mask of ones as long as all positions so far, and the caches; it gives the last
position's logits ``[1, 1, vocabulary]`` and ``hidden_states``, every position's residual *before* the final norm.
``head.onnx`` turns such states into logits: final norm and lm head, on the same bytes of ``model.onnx.data``.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from pocketlm.errors import UnsupportedError
from pocketlm_export.backends.base import Artifact, Lowering
from pocketlm_export.backends.onnx.attention import lowered
from pocketlm_export.backends.onnx.block_mask import BLOCK_SIZES
from pocketlm_export.backends.onnx.layout import DATA_FILE
from pocketlm_export.backends.onnx.writer import write_data
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Attention,
    Clamp,
    Embedding,
    Graph,
    LastPositions,
    Linear,
    MixtureOfExperts,
    Multiply,
    Norm,
    Scale,
    WeightInfo,
)
from pocketlm_export.quantization.schemes import SchemeRow
from pocketlm_export.vendor_tokenizers import write_tokenizer_files

__all__ = ["check", "libraries", "write"]

ACTIVATIONS = frozenset({"gelu", "gelu_tanh", "sigmoid", "silu", "tanh"})
LOWERED = (
    Activation, Add, Attention, Clamp, Embedding, LastPositions, Linear, MixtureOfExperts, Multiply, Norm, Scale,
)  # fmt: skip
BLOCKS = (16, 32, 64, 128, 256)  # of MatMulNBits
LONGEST_CALL = 256  # GroupQueryAttention keeps float32 scores [heads, call, context]


def check(graph: Graph, rows: Mapping[str, SchemeRow | None]) -> None:
    """Refuse by name what ONNX Runtime's CPU kernels can't do."""
    for name, row in rows.items():
        if row is not None and (row.bits, row.group is None) not in ((4, False), (8, True)):
            raise UnsupportedError(
                f"onnx: {name}: scheme {row.name!r} is not supported; supported: int4 in groups, int8 per row"
            )
        if row is not None and row.group is not None and row.group not in BLOCKS:
            raise UnsupportedError(
                f"onnx: {name}: groups of {row.group} are not supported; supported: {', '.join(map(str, BLOCKS))}"
            )
    for node in lowered(graph):
        match node:
            case Linear() if len({rows[weight.name] for weight in node.weights}) > 1:
                names = ", ".join(weight.name for weight in node.weights)
                raise UnsupportedError(f"onnx: {names} have the same input and must have the same scheme")
            case MixtureOfExperts() if len({rows[weight.name] for weight in _experts(node)}) > 1:
                raise UnsupportedError(
                    f"onnx: {node.gates[0].name} and the other matrices of its layer's experts must have one scheme"
                )
            case MixtureOfExperts() if rows[node.router.name] is not None:
                raise UnsupportedError(f"onnx: {node.router.name}: a quantized router is not supported")
            case Activation() if node.kind not in ACTIVATIONS:
                raise UnsupportedError(
                    f"onnx: activation {node.kind!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}"
                )
            case Attention() if node.rotary is not None and 2 * len(node.rotary.frequencies) > node.head_dim:
                raise UnsupportedError(f"onnx: layer {node.layer} rotates more than its head size of {node.head_dim}")
            case Attention() if node.sparsity is not None and (node.window is not None or node.softcap is not None):
                raise UnsupportedError(
                    f"onnx: layer {node.layer}: block-sparse attention with a window or a soft cap is not supported"
                )
            case Attention() if node.sparsity is not None and node.sparsity.block_size not in BLOCK_SIZES:
                raise UnsupportedError(
                    f"onnx: layer {node.layer}: sparse blocks of {node.sparsity.block_size} positions are not "
                    f"supported; supported: {', '.join(map(str, BLOCK_SIZES))}"
                )
            case _ if not isinstance(node, LOWERED):
                raise UnsupportedError(f"onnx: {type(node).__name__} is not supported")
    shapes = {(node.kv_heads, node.head_dim) for node in graph.attentions}
    if len(shapes) > 1:
        raise UnsupportedError(
            "onnx: layers with different numbers or sizes of key/value heads are not supported by onnxruntime-genai"
        )


def _experts(node: MixtureOfExperts) -> tuple[WeightInfo, ...]:
    return (*node.gates, *node.ups, *node.downs)


def write(lowering: Lowering, folder: Path) -> Artifact:
    """Write model.onnx, head.onnx, model.onnx.data, genai_config.json and the tokenizer's files."""
    import onnx_ir

    from pocketlm_export.backends.onnx.floors import runtime_floor
    from pocketlm_export.backends.onnx.genai import UNKNOWN_SAMPLING, genai_config
    from pocketlm_export.backends.onnx.model import build, entries

    graph = lowered(lowering.graph)
    models = build(graph, {name: lowering.weights.row(name) for name in graph.weights()})
    write_data(models.layout, lowering.weights, folder / DATA_FILE, lowering.progress)
    for name, model in (("model.onnx", models.decoder), ("head.onnx", models.head)):
        content = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
        (folder / name).write_bytes(content)
    config = genai_config(lowering.config, lowering.generation, graph.context_length)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    rewritten = write_tokenizer_files("onnx", lowering.tokenizer_files, folder)
    unknown = [key for key in UNKNOWN_SAMPLING if key in lowering.generation.sampling]
    call = min(LONGEST_CALL, graph.context_length)
    return Artifact(
        runtime={"onnxruntime": f">={runtime_floor(models.decoder)}"},
        longest_call=call,
        rows=call,
        entries=entries(graph, models.layout),
        notes=(
            *(f"onnxruntime-genai has no {key}: genai_config.json leaves it out" for key in unknown),
            *rewritten,
            *lowering.context_notes,
        ),
    )


def libraries() -> Mapping[str, str]:
    """What serialized the models."""
    return {name: importlib.metadata.version(name) for name in ("onnx", "onnx-ir")}
