"""What is done to a sound checkpoint, and what every refusal has in common."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pocketlm
from pocketlm.errors import InputError
from tests.small_checkpoint import CONFIG, write_small_checkpoint

LONGEST_MESSAGE = 500
DAMAGED_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a "),
    "broken": (b'{"a": ', "not a "),
    "not-utf8": (b"\xff\xfe{}", "not a |can't be read"),
    "mark": (b"\xef\xbb\xbf{}", "not a "),
    "a-list": (b"[1, 2]", "holds a list|not a tokenizer"),
    "a-text": (b'"text"', "holds a str|not a tokenizer"),
    "deep": (b"[" * 200_000, "nested too deeply|not a tokenizer"),
    "deep-object": (b'{"a":' * 200_000, "nested too deeply|not a tokenizer"),
    "deep-value": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply|not a tokenizer"),
    "quite-deep": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply|not a tokenizer"),
    "twice": (b'{"a": 1, "a": 2}', "'a' stands twice|not a tokenizer"),
    "long-number": (b'{"a": ' + b"9" * 10_000 + b"}", "not a "),
}
"""What can be wrong with any JSON file, and what is said of it; ``tokenizer.json`` is read by its own library."""


@dataclass(frozen=True)
class Bad:
    """What is done to a sound checkpoint, and what the message must say."""

    name: str
    damage: Callable[[Path], object]
    says: str
    file: str = "config.json"


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def without(key: str) -> Callable[[Path], object]:
    left = {name: value for name, value in CONFIG.items() if name != key}
    return lambda folder: (folder / "config.json").write_text(json.dumps(left))


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors")

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Rewrite the header of the safetensors file and keep its data."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        written = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])

    return damage


def index(weight_map: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def emptied(*names: str, add: tuple[str, ...] = ()) -> Callable[[Path], object]:
    """Without its weights and ``names``, with empty files ``add``."""

    def damage(folder: Path) -> None:
        for name in ("model.safetensors", *names):
            (folder / name).unlink()
        for name in add:
            (folder / name).touch()

    return damage


def vocabulary(**ids: int) -> Callable[[Path], object]:
    """With more tokens in the vocabulary."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["vocab"] |= ids
        path.write_text(json.dumps(content))

    return damage


def post_processor(value: Any) -> Callable[[Path], object]:
    """With another post-processor of the tokenizer."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": value}))

    return damage


def poke(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(values: dict[str, np.ndarray]) -> None:
        values[name][place] = value

    return change


def tokenizer_config(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    extra = {"id": 300, "content": "<|late|>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**extra, "normalized": False, "special": True})
    content["model"]["vocab"] |= {f"filler{i}": i for i in range(261, 300)}
    path.write_text(json.dumps(content))


def check_refused(bad: Bad, root: Path, targets: tuple[str, ...] = ("onnx",)) -> None:
    source = write_small_checkpoint(root / "checkpoint")
    bad.damage(source)
    place = root / "place"
    with pytest.raises(InputError, match=bad.says) as caught:
        pocketlm.export(source, place / "bundle", targets=targets, store=root / "store", verify=False)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE + len(str(source))
    assert bad.file in message
    assert str(source) in message
    assert not place.exists()
    assert not list((root / "store").rglob(".*")), "no half-written entry"
    assert caught.value.exit_code == 2
