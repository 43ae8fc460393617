"""The folders in which a fuzzed file lies: everything else in them is sound, so that the reader gets to its end."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.small_checkpoint import write_small_checkpoint

__all__ = [
    "COREML_MANIFEST",
    "FILES",
    "MODEL",
    "WEIGHTS",
    "sound_manifest",
    "write_bundle",
    "write_checkpoint",
    "write_shards",
]

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
COREML_MANIFEST = {
    "fileFormatVersion": "1.0.0",
    "itemInfoEntries": {"model": {"path": "com.apple.CoreML/model.mlmodel"}},
    "rootModelIdentifier": "model",
}
FILES = {"LICENSE": b"terms", "onnx/model.onnx": b"model", "tokenizer/tokenizer.json": b"{}"}


def write_checkpoint(folder: Path) -> None:
    """A small sound checkpoint."""
    write_small_checkpoint(folder)


def write_shards(folder: Path) -> None:
    """Two safetensors files with a tensor each, and what must never be opened beside them."""
    folder.mkdir()
    for name in ("a", "b"):
        save_file({name: np.ones((2, 3), np.float32)}, folder / f"{name}.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    shutil.copy(folder / "a.safetensors", folder.with_name("outside.safetensors"))


def write_bundle(folder: Path) -> None:
    """The files of :func:`sound_manifest`."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def sound_manifest() -> dict[str, Any]:
    """A manifest with every kind of key over the files of :func:`write_bundle`."""
    weight = {"scheme": "int4", "group": 32, "sha256": "0" * 64, "shape": [300, 32]}
    place = {"entry": "embed", "first_row": 0}
    return json.loads(
        json.dumps(
            {
                "format_version": "1.0",
                "model": {
                    "model_type": "llama", "vocabulary_size": 300, "hidden_size": 32, "intermediate_size": 64,
                    "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "context_length": 64,
                    "trained_context_length": 64, "tied": True, "stop_ids": [1], "bos_id": 0, "pad_id": None,
                    "sampling": {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9},
                },
                "scheme": {
                    "name": "int4", "linears": "int4", "embedding": "int8", "head": "int8", "vectors": "fp32",
                    "group": 32, "bits_per_weight": 4.6,
                },
                "targets": {
                    "onnx": {
                        "path": "onnx/model.onnx", "runtime": {"onnxruntime": ">=1.23"}, "longest_call": 64,
                        "rows": 64, "notes": ["one"],
                    }
                },
                "files": {
                    name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                    for name, content in FILES.items()
                },
                "provenance": {
                    "checkpoint_sha256": "0" * 64, "accepted": [], "pocketlm": "0.1.0", "libraries": {"numpy": "2.3"},
                },
                "weights": {"model.embed_tokens.weight": {**weight, "places": {"onnx": place}}},
            }
        )
    )  # fmt: skip
