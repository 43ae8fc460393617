"""What an ONNX artifact states beside its weights, for comparison with the graph: attributes and whole tables."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pocketlm.errors import BundleError, CheckError
from pocketlm.manifest import Manifest
from pocketlm_export.backends.onnx.experts import MIXTURES
from pocketlm_export.backends.onnx.file import ATTENTIONS, MICROSOFT, OnnxFile, WrittenNode
from pocketlm_export.backends.onnx.matrices import quantized_matrices
from pocketlm_export.backends.onnx.sparse_attention import visible_blocks
from pocketlm_export.backends.reading import Fact, described_blocks

FactValue = int | float | str | None

__all__ = ["SPARSE", "check_same_place", "facts"]

SPARSE = f"{MICROSOFT}SparseAttention"
ROTATION = f"{MICROSOFT}RotaryEmbedding"
DEFAULT_EPSILON = {
    "RMSNormalization": 1e-5,
    "LayerNormalization": 1e-5,
    f"{MICROSOFT}SkipSimplifiedLayerNormalization": 1e-12,
    f"{MICROSOFT}SkipLayerNormalization": 1e-12,
}


def facts(decoder: OnnxFile, head: OnnxFile, manifest: Manifest) -> Iterator[Fact]:
    """Every fact, more than once where the files state it more than once.

    Raises :class:`CheckError` if a constant is no weight of the manifest, or the two files mean different bytes by one
    name.
    """
    tables: set[str] = set()
    for node in decoder.nodes:
        if node.operator in ATTENTIONS:
            tables.update(name for rotation in _rotations(decoder, node) for name in rotation)
            yield from _attention(decoder, node)
    counted, repeated = _counted(decoder), _counted(head)
    for kind, stated in counted.items():
        # What the head has is the end of what the decoder has.
        behind = range(len(stated) - len(repeated[kind]), len(stated))
        for index, values in (*enumerate(stated), *zip(behind, repeated[kind], strict=True)):
            yield from (Fact(f"{kind} {index}", name, value) for name, value in values.items())
    for file in (decoder, head):
        yield Fact("program", "vocabulary_size", file.last_size("logits"))
    yield Fact("program", "context_length", _context_length(decoder.path.with_name("genai_config.json")))
    for name in head.constants:
        check_same_place(decoder, head, name)
    for file in (decoder, head):
        _check_accounted(file, manifest, tables)


def check_same_place(decoder: OnnxFile, head: OnnxFile, name: str) -> None:
    """Raise :class:`CheckError` unless ``head`` means the same bytes by a name of ``decoder``, or does not have it."""
    if name not in head.constants or head.place(name) is None:
        return
    if name not in decoder.constants or decoder.place(name) != head.place(name):
        raise CheckError(f"{head.path}: {name}: not the bytes that {decoder.path.name} has under this name")


def _counted(file: OnnxFile) -> dict[str, list[dict[str, FactValue]]]:
    """What the operators state that go by their number: for each kind, in the order of the file."""
    found: dict[str, list[dict[str, FactValue]]] = {"norm": [], "scale": [], "clamp": [], "experts": []}
    constants = set(file.constants)
    for node in file.nodes:
        if node.operator in DEFAULT_EPSILON:
            epsilon = node.attributes.get("epsilon", DEFAULT_EPSILON[node.operator])
            found["norm"].append({"epsilon": epsilon})
        elif node.operator in MIXTURES:
            found["experts"].append({"chosen": node.attributes.get("k"), "renormalize": _renormalizes(node)})
        elif node.operator == "Mul" and constants & set(node.inputs):
            factor = next(name for name in node.inputs if name in constants)
            found["scale"].append({"factor": _number(file, node, factor)})
        elif node.operator == "Clip":
            bounds = {"least": node.input(1), "most": node.input(2)}
            found["clamp"].append({name: _number(file, node, x) if x else None for name, x in bounds.items()})
    return found


def _renormalizes(node: WrittenNode) -> bool:
    """QMoE without router weights does whatever its attribute says."""
    ignored = node.operator == f"{MICROSOFT}QMoE" and not node.input(14)
    return ignored or bool(node.attributes.get("normalize_routing_weights", 0))


def _number(file: OnnxFile, node: WrittenNode, name: str) -> float:
    values = file.constant(name)
    if values.dtype != np.float32 or values.size != 1:
        raise BundleError(f"{file.path}: {node.name}: {name!r} is no float32 number")
    return float(values.item())


def _attention(file: OnnxFile, node: WrittenNode) -> Iterator[Fact]:
    stated = node.attributes
    name = f"attention {node.input(3).removeprefix('past_key_values.').removesuffix('.key')}"
    width = file.last_size(node.input(3))
    if width is None or width < 1:
        raise BundleError(f"{file.path}: {node.name}: {node.input(3)!r} states no head size")
    yield Fact(name, "heads", stated.get("num_heads"))
    yield Fact(name, "kv_heads", stated.get("kv_num_heads"))
    yield Fact(name, "head_dim", width - _padding(file, node))
    yield Fact(name, "scale", stated.get("scale") or width**-0.5)
    window = stated.get("local_window_size", -1)
    yield Fact(name, "window", None if window == -1 else window)
    yield Fact(name, "softcap", stated.get("softcap") or None)
    yield Fact(name, "sparsity", _sparsity(file, node) if node.operator == SPARSE else None)
    rotations = _rotations(file, node)
    if not rotations:
        yield Fact(name, "cosine", None)
        yield Fact(name, "sine", None)
    for cosine, sine in rotations:
        yield Fact(name, "cosine", file.constant(cosine))
        yield Fact(name, "sine", file.constant(sine))


def _sparsity(file: OnnxFile, node: WrittenNode) -> str:
    size, heads = node.attributes.get("sparse_block_size"), node.attributes.get("num_heads")
    rows, columns = (file.constant(node.input(index)) for index in (5, 6))
    if not isinstance(size, int) or not isinstance(heads, int) or rows.ndim != 2 or columns.ndim != 2:
        raise BundleError(f"{file.path}: {node.name}: {node.input(5)!r} and {node.input(6)!r} are no mask of blocks")
    return described_blocks(size, visible_blocks(rows, columns, heads))


def _padding(file: OnnxFile, node: WrittenNode) -> int:
    """How much of each cached head is filling: what the Pad before the values adds."""
    pad = next((maker for maker in _chain(file, node.input(2)) if maker.operator == "Pad"), None)
    if pad is None:
        return 0
    widths = file.constant(pad.input(1))
    if widths.dtype != np.int64 or not widths.size:
        raise BundleError(f"{file.path}: {pad.name}: {pad.input(1)!r} are no widths")
    return int(widths.reshape(-1)[-1])


def _rotations(file: OnnxFile, node: WrittenNode) -> list[tuple[str, str]]:
    """The tables, cosine and sine, that rotate a layer's queries and keys: one pair if they are the same."""
    if node.attributes.get("do_rotary", 0):
        first = 9 if node.operator == SPARSE else 7
        return [(node.input(first), node.input(first + 1))]
    found = [
        (maker.input(2), maker.input(3))
        for value in (node.input(0), node.input(1))
        for maker in _chain(file, value)
        if maker.operator == ROTATION
    ]
    return list(dict.fromkeys(found))


def _chain(file: OnnxFile, value: str) -> Iterator[WrittenNode]:
    """The operators before ``value`` that only move, fill up or rotate it, from the last on."""
    maker = file.maker(value)
    while maker is not None and maker.operator in ("Reshape", "Pad", ROTATION):
        yield maker
        maker = file.maker(maker.input(0))


def _context_length(path: Path) -> int:
    """What onnxruntime-genai takes for it."""
    try:
        length = json.loads(path.read_text(encoding="utf-8"))["model"]["context_length"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path}: model.context_length can't be read: {error}") from error
    if not isinstance(length, int):
        raise BundleError(f"{path}: model.context_length is {length!r}, no number")
    return length


def _check_accounted(file: OnnxFile, manifest: Manifest, tables: set[str]) -> None:
    """Every constant outside the model is a weight of the manifest, another view of its bytes, its scales or a table.

    What no weight accounts for would be compared with nothing.
    """
    entries = {weight.places["onnx"].entry for weight in manifest.weights.values()}
    known = {file.entry(entry)[0] for entry in entries} | tables
    scales: dict[object, str] = {}
    for node, matrix in quantized_matrices(file):
        place = file.place(matrix.codes)
        if scales.setdefault(place, matrix.scales) != matrix.scales:
            raise CheckError(f"{file.path}: {node.name}: reads {matrix.codes} with other scales than before")
    places = {file.place(name) for name in known if name in file.constants}
    for name in file.constants:
        place = file.place(name)
        if place is not None and place not in places and name not in scales.values():
            raise CheckError(f"{file.path}: {name}: no weight of the manifest accounts for it")
