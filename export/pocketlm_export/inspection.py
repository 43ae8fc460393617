"""What can be said of a checkpoint before any work, from headers and without torch: sizes and memory."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pocketlm.errors import UnsupportedError
from pocketlm.manifest import SchemeName
from pocketlm_export.architectures import SUPPRESSING_BIAS, DecoderConfig, build_graph
from pocketlm_export.backends.base import TARGETS, load_backend
from pocketlm_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pocketlm_export.checkpoint.hub import locate
from pocketlm_export.graph.graph import Graph
from pocketlm_export.pipeline import resolve_context
from pocketlm_export.quantization.schemes import SCHEMES, assign_rows, stored_bits

__all__ = ["CheckpointReport", "inspect_checkpoint"]


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """``weight_bytes`` is the size of the weights in the store by scheme, embedding and head in int8.

    ``kv_values`` is how many values the key/value cache of ``context_length`` positions holds. ``targets``: for each
    the reason why it can't express the model, None where it can. ``left_out``: in words, which parts of a multimodal
    checkpoint are not exported.
    """

    source: str
    config: DecoderConfig
    context_length: int
    dtypes: Mapping[str, int]
    parameters: int
    weight_bytes: Mapping[str, int]
    kv_values: int
    targets: Mapping[str, str | None]
    has_chat_template: bool
    stop_ids: tuple[int, ...]
    left_out: str | None


def inspect_checkpoint(
    source: str, *, context_length: int | None = None, accept: Collection[str] = ()
) -> CheckpointReport:
    """Read configuration and tensor headers of ``source``, a folder or ``org/name[@revision]``, and ask each target.

    No weight is read.

    Raises :class:`UnsupportedError` for a model that can't be exported, :class:`CheckpointError` for a broken one.
    """
    checkpoint = open_checkpoint(locate(source), accept)
    config, context = checkpoint.config, resolve_context(checkpoint, context_length)
    graph = build_graph(config, context)
    checkpoint.check_tensors(graph.weights(), accept)
    dtypes: dict[str, int] = {}
    for weight in graph.weights().values():
        if weight.name == SUPPRESSING_BIAS:
            continue  # no file has it
        dtype = checkpoint.tensors.dtype(weight.name)
        dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(weight.shape)
    return CheckpointReport(
        source=source,
        config=config,
        context_length=context,
        dtypes=dtypes,
        parameters=sum(dtypes.values()),
        weight_bytes={scheme: _weight_bytes(graph, scheme) for scheme in SCHEMES},
        kv_values=sum(2 * node.kv_heads * node.head_dim * context for node in graph.attentions),
        targets={name: _ask(name, graph) for name in TARGETS},
        has_chat_template=_has_chat_template(checkpoint),
        stop_ids=checkpoint.generation.stop_ids,
        left_out=checkpoint.left_out,
    )


def _ask(target: str, graph: Graph) -> str | None:
    try:
        load_backend(target).check(graph, assign_rows(graph, "int4", "int8"))
    except UnsupportedError as error:
        return str(error)
    return None


def _weight_bytes(graph: Graph, scheme: SchemeName) -> int:
    rows, weights = assign_rows(graph, scheme, "int8"), graph.weights()
    return sum(stored_bits(row, weights[name].shape) for name, row in rows.items()) // 8


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    from pocketlm.template import ChatTemplate

    # With a tokenizer that has to be made a template is made too.
    return (
        "tokenizer.json" not in checkpoint.tokenizer_files or ChatTemplate.open(checkpoint.tokenizer_folder) is not None
    )
