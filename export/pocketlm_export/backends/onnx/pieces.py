"""The decoder cut into pieces, so that ONNX Runtime holds a few layers at a time.

It packs a model's weights into anonymous memory when it loads the model: more than the data file once again. Where all
tokens are known a piece can take all calls of all runs before the next one is loaded; what it computes is bit by bit
what the whole model computes, because a cut lies between two operators that the runtime never fuses.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx

from pocketlm_export.backends.onnx.file import ATTENTIONS, OnnxFile

__all__ = ["LARGEST_PIECE", "Piece", "cut_pieces", "submodel"]

LARGEST_PIECE = 512 << 20  # bytes of constants, unless one layer has more


@dataclass(frozen=True, slots=True)
class Piece:
    """Operators that follow one another, as a model of their own.

    ``reads``: what earlier pieces made, all of it float32; ``carries``: what later ones read; ``made``: every value of
    its operators; ``layers``: whose caches it reads and writes.
    """

    model: onnx.ModelProto
    reads: tuple[str, ...]
    carries: tuple[str, ...]
    made: frozenset[str]
    layers: tuple[int, ...]


def cut_pieces(file: OnnxFile, model: onnx.ModelProto) -> list[Piece]:
    """``model``, which is ``file``'s or made from it, cut before attentions; one piece if LARGEST_PIECE is enough."""
    groups = _groups(file, model)
    timing = _independent_of_tokens(model)
    pieces = []
    for index, group in enumerate(groups):
        nodes = [*_needed(timing, group), *group]
        made = {name for node in nodes for name in node.output if name}
        later = {name for rest in groups[index + 1 :] for node in rest for name in node.input}
        independent = {name for node in timing for name in node.output}
        given = {"", *(value.name for value in model.graph.input), *file.constants, *made}
        reads = tuple(dict.fromkeys(name for node in nodes for name in node.input if name not in given))
        carries = tuple(sorted((made & later) - independent))
        pieces.append(Piece(_model_of(model, nodes, reads, carries), reads, carries, frozenset(made), _layers(nodes)))
    return pieces


def submodel(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A copy of ``model`` that has only ``nodes`` and the constants that they read."""
    read = {name for node in nodes for name in node.input}
    constants = [constant for constant in model.graph.initializer if constant.name in read]
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for field, kept in (("node", nodes), ("output", outputs), ("input", inputs), ("initializer", constants)):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        part.graph.ClearField(field)
        getattr(part.graph, field).extend(copies)
    return part


def _model_of(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], reads: Collection[str], carries: Sequence[str]
) -> onnx.ModelProto:
    read, made = ({name for node in nodes for name in getattr(node, side)} for side in ("input", "output"))
    values = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    inputs = [value for value in model.graph.input if value.name in read]
    outputs = [value for value in model.graph.output if value.name in made]
    added = set(carries) - {value.name for value in outputs}
    return submodel(
        model,
        nodes,
        [*inputs, *(onnx.ValueInfoProto(name=name, type=values) for name in reads)],
        [*outputs, *(onnx.ValueInfoProto(name=name) for name in sorted(added))],
    )


def _groups(file: OnnxFile, model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """Whole layers, each from its attention on, together as long as their constants fit."""
    layers: list[list[onnx.NodeProto]] = [[]]
    for node in model.graph.node:
        if _is_attention(node) and any(map(_is_attention, layers[-1])):
            layers.append([])
        layers[-1].append(node)
    groups: list[list[onnx.NodeProto]] = []
    size = 0
    for layer in layers:
        names = {name for node in layer for name in node.input}
        places = [file.place(name) for name in names if name in file.constants]
        bytes_read = sum(place[2] for place in places if place is not None)
        if not groups or size + bytes_read > LARGEST_PIECE:
            groups.append([])
            size = 0
        groups[-1] += layer
        size += bytes_read
    return groups


def _is_attention(node: onnx.NodeProto) -> bool:
    return f"{node.domain}.{node.op_type}" in ATTENTIONS


def _independent_of_tokens(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """What counts positions, by the mask and the number of tokens: every piece computes it again."""
    inputs = {value.name for value in model.graph.input}
    dependent = inputs - {"attention_mask"}
    found = []
    for node in model.graph.node:
        counts = node.op_type == "Shape" and set(node.input) <= inputs
        if dependent & set(node.input) and not counts:
            dependent.update(node.output)
        else:
            found.append(node)
    return found


def _needed(timing: Sequence[onnx.NodeProto], group: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Of ``timing`` what ``group`` reads and doesn't hold, in the order of the file."""
    wanted = {name for node in group for name in node.input} - {name for node in group for name in node.output}
    needed: list[onnx.NodeProto] = []
    for node in reversed(timing):
        if wanted & set(node.output):
            needed.insert(0, node)
            wanted.update(node.input)
    return needed


def _layers(nodes: Sequence[onnx.NodeProto]) -> tuple[int, ...]:
    """By the names of the caches, which the reader's execution has checked."""
    return tuple(int(node.input[3].split(".")[1]) for node in nodes if _is_attention(node))
