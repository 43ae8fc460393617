"""The two models of an artifact: the decoder, and its head for logits of more than one position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from pocketlm_export.backends.base import Entry
from pocketlm_export.backends.onnx.emission import MICROSOFT, Emission, tensor_value
from pocketlm_export.backends.onnx.emit import ROWS_SUFFIX, emit
from pocketlm_export.backends.onnx.layout import Codes, Layout, Matrix, Vector
from pocketlm_export.graph.graph import SEQUENCE, Graph, LastPositions
from pocketlm_export.quantization.schemes import SchemeRow
from pocketlm_export.selection import RowSelection

__all__ = ["Models", "build", "entries"]

OPSET = 23  # RMSNormalization; the norm that older runtimes have is no ONNX operator
IR_VERSION = 10
HEAD_INPUT = "hidden_states"


@dataclass(frozen=True, slots=True)
class Models:
    """``decoder`` is model.onnx, ``head`` is head.onnx: hidden states to logits, on the same bytes of the data file."""

    decoder: ir.Model
    head: ir.Model
    layout: Layout


def build(graph: Graph, rows: Mapping[str, SchemeRow | None]) -> Models:
    """Both models of a :func:`lowered` graph; weights are places in the data file."""
    layout = Layout(rows)
    cut = next(index for index, node in enumerate(graph.nodes) if isinstance(node, LastPositions))
    last = graph.nodes[cut]
    assert isinstance(last, LastPositions)

    decoder = Emission(graph, layout)
    ids = decoder.values[graph.ids] = tensor_value("input_ids", ir.DataType.INT64, (1, SEQUENCE))
    for node in graph:
        emit(decoder, node)
    hidden = _output(decoder.values[last.x], HEAD_INPUT, (1, SEQUENCE, last.x.width))
    logits = _output(decoder.values[graph.logits], "logits", (1, 1, graph.logits.width))
    presents = [_typed(value, _present_shape(decoder, name)) for name, value in decoder.presents.items()]

    head = Emission(replace(graph, nodes=graph.nodes[cut + 1 :]), layout)
    states = head.values[last.output] = tensor_value(HEAD_INPUT, ir.DataType.FLOAT, (1, "rows", last.x.width))
    for node in head.graph:
        emit(head, node)
    all_logits = _output(head.values[graph.logits], "logits", (1, "rows", graph.logits.width))
    return Models(
        _model(decoder, [ids, decoder.mask, *decoder.caches.values()], [logits, *presents, hidden]),
        _model(head, [states], [all_logits]),
        layout,
    )


def _output(value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
    node = value.producer()
    assert node is not None
    if node.name == value.name:
        node.name = name
    value.name = name
    return _typed(value, shape)


def _typed(value: ir.Value, shape: Sequence[int | str]) -> ir.Value:
    value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    return value


def _present_shape(emission: Emission, name: str) -> list[int | str]:
    past = emission.caches[name.replace("present", "past_key_values")].shape
    assert past is not None
    return [dimension if isinstance(dimension, int) else "present_sequence" for dimension in past]


def _model(emission: Emission, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=emission.nodes,
        initializers=list(emission.initializers.values()),
        opset_imports={"": OPSET, MICROSOFT: 1},
        name="main",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="pocketlm")


def entries(graph: Graph, layout: Layout) -> dict[str, Entry]:
    """The initializer and the first row there of every weight of ``graph``.

    Where rows of several weights take turns, an entry is a selection of rows (:mod:`pocketlm_export.selection`) of the
    initializer. An untied quantized embedding is only read row by row; a tied one goes by the head's name.
    """
    places: dict[str, Entry] = {}
    weights = graph.weights()
    for region in layout.regions:
        match region.content:
            case Codes(weights=names, alternating=turns) | Matrix(weights=names, alternating=turns):
                row = 0
                for index, name in enumerate(names):
                    turn = index % turns
                    entry = RowSelection(turn, turn + 1, turns).of(region.name) if turns > 1 else region.name
                    size = weights[name].shape[0]
                    places[name] = Entry(entry, (row - turn * size) // turns)
                    row += size
            case Vector(parts=parts):
                row = 0
                for part, size in parts:
                    if part is not None:
                        places[part] = Entry(region.name, row)
                    row += size
    embedding = graph.embedding.weight.name
    if not graph.tied and layout.codes((embedding,), *graph.embedding.weight.shape) is not None:
        places[embedding] = Entry(embedding + ROWS_SUFFIX)
    return places
