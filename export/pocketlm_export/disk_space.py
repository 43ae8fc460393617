"""The disk that an export needs, known before its work begins.

Codes, scales, values and tables are counted from the graph and the scheme rows. What stands around them (programs,
golden vectors, manifest) is bounded by so many bytes for each node, as measured on the models of the tests. Together
this is at least what is written: 2 percent more for SmolLM2-135M, at most 15 where all is a few hundred kilobytes.
"""

import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import InputError
from pocketlm_export.checkpoint.checkpoint import Checkpoint
from pocketlm_export.graph.graph import (
    Attention,
    Embedding,
    Graph,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    RmsNorm,
    WeightInfo,
    weights_of,
)
from pocketlm_export.graph.rewrites import merge_linears
from pocketlm_export.quantization.schemes import SchemeRow, stored_bits
from pocketlm_export.quantization.store import WeightStore

__all__ = ["bundle_bytes", "require_space", "store_bytes"]

BLOCK = 4096  # of the file system: the last one of every file is taken whole
PAGE = 4096  # where onnx and executorch let large tensors begin
FILES = 20  # of a bundle with all targets
GOLDEN = 88 << 10
MANIFEST_WEIGHT, MANIFEST_PLACE = 300, 140  # bytes of manifest.json for each weight, and for where a target has it
ENTRY_HEADER = 376
MARGIN_FRACTION, MARGIN = 0.01, 1 << 20  # for directories, journals, and what others write meanwhile
Rows = Mapping[str, SchemeRow | None]


@dataclass(frozen=True, slots=True)
class Format:
    """What a target's files take: ``value`` and ``scale`` are bytes of a number, ``int8_block`` the columns that share
    a scale of int8 (None: the row). ``program``, ``attention``, ``linear``, ``norm`` and ``bias`` bound the program's
    text: of all, and of each node of that type with what belongs to it; ``experts`` of a mixture, ``expert`` of each.
    """

    value: int
    int4_scale: int
    int8_scale: int
    int8_block: int | None
    program: int
    attention: int
    linear: int
    norm: int
    bias: int
    experts: int = 0
    expert: int = 0


FORMATS = {
    "onnx": Format(4, 4, 4, 32, program=4 << 10, attention=4600, linear=500, norm=600, bias=300, experts=5000),
    "executorch": Format(
        4, 2, 4, None, program=16 << 10, attention=4000, linear=900, norm=900, bias=300, experts=3000, expert=4000
    ),
    "coreml": Format(2, 2, 2, None, program=36 << 10, attention=47000, linear=1600, norm=8000, bias=700, experts=14000),
}
MASK_ROWS = 128  # executorch's longest call: a mask has so many rows over twice the context
EXPLICIT_ATTENTION = 5000  # bytes more of executorch's program where no kernel has the whole attention


def require_space(
    output: Path, store: WeightStore, checkpoint: Checkpoint, graph: Graph, rows: Rows, targets: Collection[str]
) -> None:
    """Raise :class:`InputError` naming the places, what they need and what is free, if a file system is too small.

    ``output``'s parent must exist. Entries that the store has already are looked for (which reads the whole checkpoint)
    only where there is no room for all.
    """
    bundle = bundle_bytes(checkpoint, graph, rows, targets)
    matrices = [weight for weight in graph.weights().values() if rows[weight.name] is not None]
    if _shortage(output, bundle, store.root, store_bytes(matrices, rows)):
        missing = [weight for weight in matrices if not _stored(checkpoint, store, weight, rows)]
        shortage = _shortage(output, bundle, store.root, store_bytes(missing, rows))
        if shortage:
            raise InputError(f"{shortage}; make room, or choose other places with --output and --store")


def bundle_bytes(checkpoint: Checkpoint, graph: Graph, rows: Rows, targets: Collection[str]) -> int:
    """Bytes on the disk, about, of a bundle without its certificate."""
    text = sum(path.stat().st_size for path in checkpoint.tokenizer_files.values()) * (1 + len(targets))
    licenses = sum(path.stat().st_size for path in checkpoint.license_files.values())
    manifest = (MANIFEST_WEIGHT + MANIFEST_PLACE * len(targets)) * len(graph.weights())
    artifacts = sum(_artifact_bytes(target, graph, rows) for target in targets)
    return artifacts + text + licenses + manifest + GOLDEN + FILES * BLOCK // 2


def store_bytes(matrices: Collection[WeightInfo], rows: Rows) -> int:
    """Bytes on the disk of the entries of ``matrices``."""
    bits = (stored_bits(rows[matrix.name], matrix.shape) for matrix in matrices)
    return sum(_align(ENTRY_HEADER + size // 8, BLOCK) for size in bits)


def _stored(checkpoint: Checkpoint, store: WeightStore, weight: WeightInfo, rows: Rows) -> bool:
    row = rows[weight.name]
    assert row is not None
    return store.has(checkpoint.tensors, weight.name, row)


def _shortage(output: Path, bundle: int, store: Path, entries: int) -> str | None:
    """What is short, in words; None if there is room for all."""
    if output.parent.stat().st_dev == store.stat().st_dev:
        needs = {f"{output} and {store}": (output.parent, bundle + entries)}
    else:
        needs = {str(output): (output.parent, bundle), str(store): (store, entries)}
    for name, (place, needed) in needs.items():
        needed += int(needed * MARGIN_FRACTION) + MARGIN if needed else 0
        free = shutil.disk_usage(place).free
        if needed > free:
            return f"{name}: the export needs {needed / 1e6:,.1f} MB there, and {free / 1e6:,.1f} MB are free"
    return None


def _artifact_bytes(target: str, graph: Graph, rows: Rows) -> int:
    form = FORMATS[target]
    program = form.program
    regions = list(_tables(target, graph))
    for node in merge_linears(graph):
        match node:
            case Embedding():
                if not graph.tied:
                    regions += _matrix(form, [node.weight], rows)
                elif target == "executorch":
                    regions += list(_matrix(form, [node.weight], rows))[
                        1:
                    ]  # the head wants other scales than the table
            case Linear():
                program += form.linear
                regions += _matrix(form, node.weights, rows)
                if any(node.biases):
                    program += form.bias * len(node.biases)
                    regions.append(form.value * sum(weight.shape[0] for weight in node.weights))
            case RmsNorm() | LayerNorm():
                program += form.norm
                regions += [form.value * vector.shape[0] for vector in weights_of(node)]
            case MixtureOfExperts():
                program += form.experts + form.expert * len(node.gates)
                regions.append(form.value * math.prod(node.router.shape))
                for stacked in _expert_matrices(target, node):
                    regions += _matrix(form, stacked, rows)
            case Attention():
                program += form.attention
                if target == "executorch" and _is_explicit(node):
                    program += EXPLICIT_ATTENTION
                for norm in (node.query_norm, node.key_norm):
                    if norm is not None:
                        program += form.norm
                        regions.append(form.value * norm.shape[0])
            case _:
                pass
    return program + sum(_placed(target, region) for region in regions)


def _expert_matrices(target: str, node: MixtureOfExperts) -> list[tuple[WeightInfo, ...]]:
    """What lies together: the matrices of all experts, or, in executorch, of each by itself."""
    if target != "executorch":
        return [node.gates + node.ups, node.downs]
    pairs = zip(node.gates, node.ups, strict=True)
    return [*pairs, *((down,) for down in node.downs)]


def _matrix(form: Format, weights: Sequence[WeightInfo], rows: Rows) -> Iterator[int]:
    """Bytes of codes, and of scales, of matrices below each other; of values where there are no codes."""
    row = rows[weights[0].name]
    count, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    if row is None:
        yield count * columns * form.value
    elif row.bits == 4:
        yield count * columns // 2
        yield count * row.groups(columns) * form.int4_scale
    else:
        blocks = 1 if form.int8_block is None else -(-columns // form.int8_block)
        yield count * (columns if form.int8_block is None else blocks * form.int8_block)
        yield count * blocks * form.int8_scale


def _tables(target: str, graph: Graph) -> Iterator[int]:
    """Bytes of each table that the graph implies: cosines and sines of every rotary, masks, positions."""
    context = graph.context_length
    sparse = {(node.sparsity, node.heads) for node in graph.attentions if node.sparsity is not None}
    for rotary, head_dim in {(node.rotary, node.head_dim) for node in graph.attentions if node.rotary is not None}:
        pairs = len(rotary.frequencies)
        table = context * {"onnx": 4 * pairs, "executorch": 4 * head_dim, "coreml": 4 * pairs}[target]
        yield table
        yield table
    if target == "executorch":
        rows = min(MASK_ROWS, context)
        for _window in {node.window for node in graph.attentions if node.window is not None or _is_explicit(node)}:
            yield 8 * rows * context
        for sparsity, heads in sparse:
            yield 8 * (rows + sparsity.block_size - 1) * context
            yield 4 * heads * context
    if target == "onnx":
        for sparsity, heads in sparse:
            blocks, layouts = -(-context // sparsity.block_size), min(heads, sparsity.stride)
            yield 4 * layouts * (blocks + 1)
            yield 4 * layouts * blocks * min(blocks, sparsity.local_blocks + -(-blocks // sparsity.stride))
    if target == "coreml":
        yield 4 * context


def _is_explicit(node: Attention) -> bool:
    return node.softcap is not None or node.sparsity is not None


def _placed(target: str, size: int) -> int:
    """Bytes of a region of ``size`` with what lies before it: its record, and the way to its boundary."""
    match target:
        case "onnx":
            return _align(size, PAGE)
        case "executorch":
            return _align(size, 64) + (PAGE if size > 1 << 16 else 0)
        case _:
            return _align(size, 64) + 64


def _align(size: int, boundary: int) -> int:
    return -(-size // boundary) * boundary
