"""A bundle made worse on purpose: it answers well, takes many more instructions, and no hash gives it away."""

import hashlib
import json
import shutil
from pathlib import Path

import onnx

import pocketlm

__all__ = ["with_float_products"]

MODEL = "onnx/model.onnx"


def with_float_products(bundle: pocketlm.Bundle, folder: Path) -> pocketlm.Bundle:
    """A copy in ``folder`` whose quantized matrices are multiplied in float32: accuracy_level 0."""
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(folder / MODEL, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    content = model.SerializeToString()
    (folder / MODEL).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][MODEL] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "certificate.json").unlink(missing_ok=True)  # of the other manifest
    return pocketlm.open(folder)
