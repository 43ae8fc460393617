"""The nodes of an ONNX model, without the onnx package: five fields of its messages, everything else is passed over.

Source: onnx.proto3 of ONNX; protobuf comes with ONNX Runtime.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pocketlm.errors import BundleError

__all__ = ["Node", "read_nodes"]

Field = descriptor_pb2.FieldDescriptorProto
# Message -> its fields: name, number, whether it is repeated, and the message that it holds, or the scalar's type.
MESSAGES: Mapping[str, tuple[tuple[str, int, bool, str | int], ...]] = {
    "ModelProto": (("graph", 7, False, "GraphProto"),),
    "GraphProto": (("node", 1, True, "NodeProto"),),
    "NodeProto": (
        ("name", 3, False, Field.TYPE_STRING),
        ("op_type", 4, False, Field.TYPE_STRING),
        ("attribute", 5, True, "AttributeProto"),
    ),
    "AttributeProto": (("name", 1, False, Field.TYPE_STRING), ("i", 3, False, Field.TYPE_INT64)),
}
PACKAGE = "pocketlm.onnx"


@dataclass(frozen=True, slots=True)
class Node:
    """``kind``: the operator's type; ``accuracy_level``: as stated, 0 if it isn't."""

    kind: str
    accuracy_level: int


def read_nodes(model: Path) -> Mapping[str, Node]:
    """The nodes of the main graph by their names. Raises :class:`BundleError` for a file that is no model."""
    message = _model_type()()
    try:
        message.ParseFromString(model.read_bytes())
    except DecodeError as error:
        raise BundleError(f"{model}: not an ONNX model: {error}") from error
    return {node.name: Node(node.op_type, _accuracy_level(node)) for node in message.graph.node}


def _accuracy_level(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "accuracy_level"), 0)


@cache
def _model_type() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="pocketlm_onnx_nodes.proto", package=PACKAGE, syntax="proto2")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, repeated, kind in fields:
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            if isinstance(kind, str):
                held = f".{PACKAGE}.{kind}"
                message.field.add(name=field, number=number, label=label, type=Field.TYPE_MESSAGE, type_name=held)
            else:
                message.field.add(name=field, number=number, label=label, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.ModelProto"))
