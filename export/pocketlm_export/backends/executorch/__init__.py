"""ExecuTorch: a .pte written directly, one XNNPACK delegate a layer, ExecuTorch's own attention and caches between.

The file follows the contract of ExecuTorch's official runners for language models: method ``forward(tokens [1, S],
position [1]) -> logits``, and constant methods for the facts that they ask.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pocketlm.errors import UnsupportedError
from pocketlm_export.backends.base import Artifact, Lowering
from pocketlm_export.graph.graph import (
    Activation,
    Attention,
    Graph,
    Linear,
    MixtureOfExperts,
    Node,
    WeightInfo,
    weights_of,
)
from pocketlm_export.quantization.schemes import SchemeRow
from pocketlm_export.vendor_tokenizers import write_tokenizer_files

__all__ = ["check", "libraries", "write"]

LONGEST_CALL = 128  # activations and XNNPACK's workspace are reserved for it
LOGIT_ROWS = 8
RUNTIME = ">=1.5.1,<1.6"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid")


def check(graph: Graph, rows: Mapping[str, SchemeRow | None]) -> None:
    """Refuse what neither XNNPACK nor ExecuTorch's attention kernel can express."""
    for node in graph:
        if isinstance(node, Attention):
            _check_attention(node)
        elif isinstance(node, Activation) and node.kind not in ACTIVATIONS:
            raise UnsupportedError(f"executorch: activation {node.kind!r}; supported: {', '.join(ACTIVATIONS)}")
    matrices = {weight.name: weight for node in graph for weight in _matrices(node)}
    matrices[graph.embedding.weight.name] = graph.embedding.weight
    for name, weight in matrices.items():
        row = rows[name]
        if row is None or (row.bits == 8 and row.group is None):
            continue
        if row.bits != 4 or row.group is None or row.group % 32 or weight.shape[1] % row.group:
            raise UnsupportedError(
                f"executorch: {name} {list(weight.shape)} in {row.bits} bits, groups of {row.group}: XNNPACK takes "
                "8 bits without groups, or 4 bits in groups that are multiples of 32 and divide the columns"
            )


def _matrices(node: Node) -> tuple[WeightInfo, ...]:
    match node:
        case Linear():
            return node.weights
        case MixtureOfExperts():
            return weights_of(node)
        case _:
            return ()


def _check_attention(node: Attention) -> None:
    where = f"executorch: attention of layer {node.layer}"
    if node.rotary is not None and 2 * len(node.rotary.frequencies) > node.head_dim:
        raise UnsupportedError(f"{where}: rotary embedding wider than the head of {node.head_dim}")


def write(lowering: Lowering, folder: Path) -> Artifact:
    """Write ``model.pte``, and the ``tokenizer.json`` that its runner reads."""
    from pocketlm_export.backends.executorch.emit import emit
    from pocketlm_export.backends.executorch.packing import Packing
    from pocketlm_export.backends.executorch.program import constant_method
    from pocketlm_export.backends.executorch.writer import write_pte
    from pocketlm_export.graph.rewrites import keep_last_positions, merge_linears

    context = lowering.graph.context_length
    longest_call = min(LONGEST_CALL, context)
    rows = min(LOGIT_ROWS, longest_call)
    graph = merge_linears(keep_last_positions(lowering.graph, rows))
    emission = emit(graph, Packing(lowering.weights, lowering.progress), longest_call)
    facts = [constant_method(name, value) for name, value in _facts(lowering, longest_call).items()]
    rewritten = write_tokenizer_files("executorch", lowering.tokenizer_files, folder)
    keys = write_pte(folder / "model.pte", emission, facts)
    entries = {name: replace(entry, name=keys.get(entry.name, entry.name)) for name, entry in emission.entries.items()}
    return Artifact(
        runtime={"executorch": RUNTIME},
        longest_call=longest_call,
        rows=rows,
        entries=entries,
        notes=(*_notes(lowering, longest_call), *rewritten),
    )


def _facts(lowering: Lowering, longest_call: int) -> dict[str, bool | int | tuple[int, ...]]:
    """The constant methods that the official runners read (extension/llm/runner/constants.h)."""
    generation = lowering.generation
    facts: dict[str, bool | int | tuple[int, ...]] = {
        "get_max_seq_len": longest_call,
        "get_max_context_len": lowering.graph.context_length,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "get_vocab_size": lowering.config.vocabulary_size,
        "get_n_layers": len(lowering.graph.attentions),
    }
    if generation.bos_id is not None:
        facts["get_bos_id"] = generation.bos_id
    if generation.stop_ids:
        facts["get_eos_ids"] = generation.stop_ids
    return facts


def _notes(lowering: Lowering, longest_call: int) -> tuple[str, ...]:
    context = lowering.graph.context_length
    notes = []
    if longest_call < context:
        notes.append(
            f"calls take up to {longest_call} tokens; ExecuTorch's own runner splits longer prompts, but does not stop "
            f"at the context of {context}: there, bound prompt and new tokens yourself"
        )
    return (*notes, *lowering.context_notes)


def libraries() -> Mapping[str, str]:
    """ExecuTorch's version."""
    return {"executorch": importlib.metadata.version("executorch")}
