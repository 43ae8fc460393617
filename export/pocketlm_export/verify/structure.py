"""Level 1: every code, scale, value, whole table and attribute of an artifact equals what it was made from."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketlm.certificate import Check
from pocketlm.errors import BundleError, CheckError
from pocketlm.manifest import Manifest, Weight
from pocketlm_export.backends.reading import Reader, StoredConstants, WrittenMatrix, described_blocks
from pocketlm_export.graph.graph import (
    Attention,
    BlockSparsity,
    Clamp,
    Graph,
    LayerNorm,
    MixtureOfExperts,
    RmsNorm,
    Scale,
)
from pocketlm_export.graph.residual import shift_residual
from pocketlm_export.graph.rotary import rotary_tables
from pocketlm_export.quantization.rounding import pack_nibbles
from pocketlm_export.quantization.store import ContentDigest
from pocketlm_export.verify.thresholds import DIFFERING, check

__all__ = ["Structure", "check_structure", "expected", "row_ranges"]

BLOCK_ELEMENTS = 1 << 20
Floats = npt.NDArray[np.float32]
Structure = tuple[list[Check], dict[str, int]]
"""Level 1's checks, and how many things of each kind were compared."""
Value = int | float | str | npt.NDArray[Any] | None


class Values(Protocol):
    """Where weights that aren't quantized are read, to compare with what an artifact rounded."""

    def blocks(self, name: str) -> Iterator[tuple[int, Floats]]:
        """``(first row, values)``."""


def check_structure(target: str, reader: Reader, graph: Graph, manifest: Manifest, values: Values | None) -> Structure:
    """Level 1. ``values`` None: nothing to compare rounded values with; those that aren't exact are counted as ``not
    comparable``.
    """
    weights, incomparable = _compare_weights(target, reader, manifest, values)
    facts = _compare_facts(reader, graph)
    checks = [
        check(DIFFERING, weights.differing, subject="weights", where=weights.first),
        check(DIFFERING, facts.differing, subject="tables and attributes", where=facts.first),
    ]
    counts = {"weights": weights.compared, "tables and attributes": facts.compared}
    return checks, counts | ({"not comparable without the checkpoint": incomparable} if incomparable else {})


def _compare_weights(target: str, reader: Reader, manifest: Manifest, values: Values | None) -> tuple["_Tally", int]:
    """And how many could not be compared."""
    tally, incomparable = _Tally(), 0
    for name, weight in manifest.weights.items():
        try:
            known = _weight_is_known(target, reader, name, weight, values)
        except BundleError as error:
            tally.differ(str(error))
            continue
        incomparable += known is None
        tally.count(name, known is not False)
    return tally, incomparable


def _compare_facts(reader: Reader, graph: Graph) -> "_Tally":
    tally = _Tally()
    stated: dict[tuple[str, str], Value] = {}
    try:
        for fact in reader.facts():
            key = fact.node, fact.name
            if key in stated and not _equal(stated[key], fact.value):
                tally.differ(f"{fact.name} of {fact.node} is stated twice, differently")
            stated[key] = fact.value
    except (BundleError, CheckError) as error:  # what the file says has no meaning, or two
        tally.differ(str(error))
        return tally
    wanted = {key: value for key, value in expected(graph, reader.stored).items() if key[1] not in reader.unstated}
    for (node, name), value in wanted.items():
        if (node, name) not in stated:
            tally.differ(f"{name} of {node} is not in the file")
        else:
            found = stated[node, name]
            tally.count(f"{name} of {node}: {_shown(found)}, not {_shown(value)}", _equal(found, value))
    for node, name in stated.keys() - wanted.keys():
        tally.differ(f"{name} of {node} is in the file, but not in the model")
    return tally


def expected(graph: Graph, stored: StoredConstants) -> dict[tuple[str, str], Value]:
    """``(node, name) -> value`` of every fact, rounded as the artifact stores it.

    Nodes: ``program``; ``attention L``; ``norm I``, in the order of execution, those of queries and keys included;
    ``scale I``, ``clamp I`` and ``experts I``.
    """
    facts: dict[tuple[str, str], Value] = {
        ("program", "context_length"): graph.context_length,
        ("program", "vocabulary_size"): graph.logits.width,
    }
    listed: dict[str, list[dict[str, Value]]] = {"norm": [], "scale": [], "clamp": [], "experts": []}
    for node in shift_residual(graph, stored.residual_shift):
        match node:
            case RmsNorm() | LayerNorm():
                listed["norm"].append({"epsilon": stored.epsilon(node.epsilon)})
            case Scale():
                listed["scale"].append({"factor": stored.constant(node.factor)})
            case Clamp():
                bounds = {"least": node.least, "most": node.most}
                listed["clamp"].append({k: None if v is None else stored.constant(v) for k, v in bounds.items()})
            case MixtureOfExperts():
                listed["experts"].append({"chosen": node.chosen, "renormalize": node.renormalize})
            case Attention():
                norms = sum(norm is not None for norm in (node.query_norm, node.key_norm))
                listed["norm"] += [{"epsilon": stored.epsilon(node.norm_epsilon)}] * norms
                softcap = None if node.softcap is None else stored.constant(node.softcap)
                cosine: Value = None
                sine: Value = None
                if node.rotary is not None:
                    cosine, sine = (t.astype(stored.table) for t in rotary_tables(node.rotary, graph.context_length))
                facts |= {
                    (f"attention {node.layer}", name): value
                    for name, value in (
                        ("heads", node.heads), ("kv_heads", node.kv_heads), ("head_dim", node.head_dim),
                        ("scale", stored.scale(node.scale)), ("window", node.window), ("softcap", softcap),
                        ("sparsity", _seen_blocks(node, graph.context_length)), ("cosine", cosine), ("sine", sine),
                    )
                }  # fmt: skip
            case _:
                pass
    return facts | {
        (f"{kind} {index}", name): value
        for kind, nodes in listed.items()
        for index, node_facts in enumerate(nodes)
        for name, value in node_facts.items()
    }


def _seen_blocks(node: Attention, context_length: int) -> str | None:
    """As :class:`BlockSparsity` defines them; it is constant within blocks."""
    if node.sparsity is None:
        return None
    return described_blocks(
        node.sparsity.block_size,
        (_seen_by_head(node.sparsity, head, context_length) for head in range(node.heads)),
    )


def _seen_by_head(sparsity: BlockSparsity, head: int, context_length: int) -> npt.NDArray[np.bool_]:
    blocks = np.arange(-(-context_length // sparsity.block_size))
    local = blocks[:, None] - blocks < sparsity.local_blocks
    seen: npt.NDArray[np.bool_] = local | ((blocks + head * sparsity.head_shift + 1) % sparsity.stride == 0)
    return seen


def row_ranges(shape: tuple[int, ...] | list[int]) -> Iterator[tuple[int, int]]:
    """Blocks of rows of about a million elements."""
    step = max(1, BLOCK_ELEMENTS // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


@dataclass(slots=True)
class _Tally:
    compared: int = 0
    differing: int = 0
    first: str | None = field(default=None)

    def count(self, what: str, equal: bool) -> None:
        self.compared += 1
        if not equal:
            self.differ(what)

    def differ(self, what: str) -> None:
        self.differing += 1
        self.first = self.first or what


def _weight_is_known(target: str, reader: Reader, name: str, weight: Weight, values: Values | None) -> bool | None:
    """Whether the artifact's rows are the weight that the manifest knows; None where that can't be told."""
    place = weight.places.get(target)
    if place is None:
        return False
    content, plain = ContentDigest(), hashlib.sha256()
    for start, stop in row_ranges(weight.shape):
        found = reader.rows(place.entry, place.first_row + start, place.first_row + stop)
        if isinstance(found, WrittenMatrix):
            if weight.scheme == "fp32" or found.bits != {"int4": 4, "int8": 8}[weight.scheme]:
                return False
            if found.codes.shape != (stop - start, *weight.shape[1:]):
                return False
            if found.scales.shape != (stop - start, weight.shape[1] // (weight.group or weight.shape[1])):
                return False
            packed = pack_nibbles(found.codes) if found.bits == 4 else np.ascontiguousarray(found.codes)
            half, exact = _bfloat16(found.scales)
            if not exact:
                return False
            content.update(packed.data.cast("B"), half.data.cast("B"))
        elif weight.scheme != "fp32" or found.shape != (stop - start, *weight.shape[1:]):
            return False
        else:
            plain.update(np.ascontiguousarray(found, "<f4").data.cast("B"))
    if weight.scheme != "fp32":
        return content.hexdigest() == weight.sha256
    if plain.hexdigest() == weight.sha256:
        return True
    if reader.stored.value is np.float32:
        return False
    if values is None:
        return None
    for start, block in values.blocks(name):
        found = reader.rows(place.entry, place.first_row + start, place.first_row + start + len(block))
        stored = block.astype(reader.stored.value).astype(np.float32)
        if isinstance(found, WrittenMatrix) or not np.array_equal(found, stored):
            return False
    return True


def _bfloat16(scales: Floats) -> tuple[npt.NDArray[np.uint16], bool]:
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16), not (bits & 0xFFFF).any()


def _equal(left: Value, right: Value) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return isinstance(left, np.ndarray) and isinstance(right, np.ndarray) and np.array_equal(left, right)
    return left == right


def _shown(value: Value) -> str:
    return f"a table {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
