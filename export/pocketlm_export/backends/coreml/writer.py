"""Writes the package: the program's message, and its constants streamed into weight.bin without ever being whole.

Formats: MILBlob's storage version 2 for weight.bin (64-byte header; for each blob a 64-byte record, then its data at
the next multiple of 64); libmodelpackage's Manifest.json. Nothing in them depends on time, place or chance.
"""

import json
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pocketlm.errors import PocketLMError
from pocketlm_export.backends.base import Artifact, Lowering
from pocketlm_export.backends.coreml.emission import AttentionForm
from pocketlm_export.backends.coreml.emit import build_program
from pocketlm_export.backends.coreml.importing import coremltools, mil_exporter
from pocketlm_export.backends.coreml.layout import Constant, Layout
from pocketlm_export.graph.graph import MixtureOfExperts
from pocketlm_export.graph.residual import shift_residual
from pocketlm_export.graph.rewrites import keep_last_positions, merge_linears

__all__ = ["FORMS", "write_package"]

LONGEST_CALL = 128
IOS18 = 9  # specification version
BLOB_CODES = {"float16": 1, "int8": 4, "int4": 8, "int32": 14}
EXPERTS_NOTE = (
    "a prompt goes token by token, because the rows of each token's experts are gathered from the quantized matrices; "
    "whether Core ML keeps those quantized in memory was not seen"
)
FORMS: Mapping[AttentionForm, str] = {"explicit": "matrix products and softmax", "fused": "one fused operator"}


def write_package(lowering: Lowering, package: Path, form: AttentionForm = "explicit") -> Artifact:
    """Write ``package`` (``*.mlpackage``), which must not exist, with attention in ``form``.

    Raises :class:`pocketlm.UnsupportedError` naming the tensor and index of a value that fp16 can't hold.
    """
    shift = lowering.config.residual_shift
    graph = merge_linears(shift_residual(lowering.graph, shift))
    last = keep_last_positions(graph, 1)
    # Experts of several tokens at once would be gathered for each of them, or all be computed.
    has_experts = any(isinstance(node, MixtureOfExperts) for node in graph)
    longest_call = 1 if has_experts else min(LONGEST_CALL, graph.context_length)
    length = 1 if has_experts else None
    layout = Layout(lowering)
    functions = {"prefill": (last, length), "decode": (last, 1), "score": (graph, length)}
    program = build_program(functions, longest_call, layout, form)

    model = package / "Data" / "com.apple.CoreML"
    (model / "weights").mkdir(parents=True)
    with _WeightFile(model / "weights" / "weight.bin") as weights:
        specification = _specification(program, layout, weights)
    if shift:
        specification.description.metadata.userDefined["pocketlm.residual_shift"] = str(shift)
    (model / "model.mlmodel").write_bytes(specification.SerializeToString(deterministic=True))
    _write_manifest(package)
    return Artifact(
        runtime={"iOS": ">=18.0", "macOS": ">=15.0"},
        longest_call=longest_call,
        rows=longest_call,
        entries=layout.entries,
        notes=_notes(lowering, form, longest_call, shift, has_experts),
    )


def _notes(
    lowering: Lowering, form: AttentionForm, longest_call: int, shift: int, has_experts: bool
) -> tuple[str, ...]:
    return (
        f"attention is {FORMS[form]}; iOS 26 devices gave wrong numbers for the fused one and for quantized embeddings "
        "(executorch issue 15833), and no hardware has run this package",
        f"functions: prefill (1 to {longest_call} tokens, logits of the last), decode (one token), score (as prefill, "
        "logits of all); one state serves all three",
        *([EXPERTS_NOTE] if has_experts else []),
        *([f"the residual is held times 2^-{shift}, because fp16 can't hold this family's"] if shift else []),
        *lowering.context_notes,
    )


class _WeightFile:
    """weight.bin, blob by blob."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._file.write(bytes(64))
        self.offsets: dict[str, int] = {}

    def add(self, constant: Constant) -> int:
        """The offset of the record of ``constant``, written at the first call with its name."""
        if constant.name not in self.offsets:
            record = self._align()
            unused_bits = constant.size * 8 - constant.bits
            header = (0xDEADBEEF, BLOB_CODES[constant.element], constant.size, record + 64, unused_bits)
            self._file.write(struct.pack("<IIQQQ32x", *header))
            for block in constant.blocks():
                self._file.write(block.data)
            assert self._file.tell() == record + 64 + constant.size, constant.name
            self.offsets[constant.name] = record
        return self.offsets[constant.name]

    def _align(self) -> int:
        position = self._file.tell()
        self._file.write(bytes(-position % 64))
        return position + -position % 64

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.seek(0)
        self._file.write(struct.pack("<II", len(self.offsets), 2))
        self._file.close()


def _specification(program: Any, layout: Layout, weights: _WeightFile) -> Any:
    """The ``CoreML.Specification.Model`` of ``program``; its constants go to ``weights`` on the way.

    This is the one place that hooks into coremltools: its exporter asks :meth:`get_milproto_value` for the message of
    every constant.
    """

    class Exporter(mil_exporter.MILProtoExporter):  # type: ignore[misc]  # untyped library
        def get_milproto_value(self, var: Any) -> Any:
            constant = layout.constants.get(var.op.weight_id or "")
            if constant is None:
                return mil_exporter.create_immediate_value(var)
            data_type = mil_exporter.types_to_proto_primitive(var.sym_type.get_primitive())
            return mil_exporter.create_file_value_tensor(
                "@model_path/weights/weight.bin", weights.add(constant), constant.shape, data_type
            )

    message = Exporter(program, "", IOS18).export()
    if weights.offsets.keys() != layout.constants.keys():
        raise PocketLMError(
            f"coremltools {coremltools.__version__} did not ask for every constant; install the pinned version"
        )
    exporter = mil_exporter.CoreMLProtoExporter(program, message, None, None, None, "mlprogram", "milinternal", IOS18)
    return exporter.export(IOS18)


def _write_manifest(package: Path) -> None:
    items = {
        "com.apple.CoreML/model.mlmodel": ("model.mlmodel", "CoreML Model Specification"),
        "com.apple.CoreML/weights": ("weights", "CoreML Model Weights"),
    }
    identifiers = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper() for path in items}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[path]: {"author": "com.apple.CoreML", "description": description, "name": name, "path": path}
            for path, (name, description) in items.items()
        },
        "rootModelIdentifier": identifiers["com.apple.CoreML/model.mlmodel"],
    }
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
