"""What is fuzzed: for each kind of file the reader that meets it first, given any bytes in the file's place."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import pocketlm
from pocketlm.errors import PocketLMError
from pocketlm.manifest import Manifest
from pocketlm.replaying.recording import read_session
from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm.runtimes.coreml_interpreter.package import ELEMENT_TYPES
from pocketlm.template import ChatTemplate
from pocketlm.tokenizer import Tokenizer
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.checkpoint.tensors import FLOAT_TYPES, TensorFile, open_shards
from tests.fuzz.places import (
    COREML_MANIFEST,
    MODEL,
    WEIGHTS,
    sound_manifest,
    write_bundle,
    write_checkpoint,
    write_shards,
)

__all__ = ["READERS", "read"]

LARGEST_INPUT = 1 << 16  # elements of an input that a fuzzed package may ask for


def _config(data: bytes, place: Path) -> None:
    if not place.exists():
        write_checkpoint(place)
    (place / "config.json").write_bytes(data)
    open_checkpoint(place)


def _safetensors(data: bytes, place: Path) -> None:
    place.mkdir(exist_ok=True)
    path = place / "model.safetensors"
    path.unlink(missing_ok=True)  # the one before is still mapped
    path.write_bytes(data)
    file = TensorFile(path)
    for name in file:
        assert file.buffer(name).nbytes <= len(data)
        if file.tensors[name].dtype in FLOAT_TYPES:
            assert np.isfinite(file.values(name)).all()
        file.release(name)


def _index(data: bytes, place: Path) -> None:
    if not place.exists():
        write_shards(place)
    (place / "model.safetensors.index.json").write_bytes(data)
    for name, file in open_shards(place).items():
        assert file.path.parent == place
        assert name in file.tensors


def _manifest(data: bytes, place: Path) -> None:
    if not place.exists():
        write_bundle(place)
    (place / "manifest.json").write_bytes(data)
    pocketlm.open(place).check_files()


def _coreml(data: bytes, place: Path) -> None:
    """``data``: the length of the weights in four bytes, the weights, the model message."""
    length = int.from_bytes(data[:4], "little") % (len(data) + 1)
    (place / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    (place / "Manifest.json").write_text(json.dumps(COREML_MANIFEST))
    (place / WEIGHTS).unlink(missing_ok=True)  # the ones before are still mapped
    (place / WEIGHTS).write_bytes(data[4 : 4 + length])
    (place / MODEL).write_bytes(data[4 + length :])
    interpreter = Interpreter(place)
    for function in interpreter.functions:
        inputs = {}
        for name, description in interpreter.inputs(function).items():
            shape = [low for low, _ in description.bounds]
            if np.prod(shape, dtype=np.float64) > LARGEST_INPUT:
                return
            inputs[name] = np.zeros(shape, np.float32 if ELEMENT_TYPES[description.type.element].is_float else np.int32)
        interpreter.predict(inputs, interpreter.make_state(), function)


def _pte(data: bytes, place: Path) -> None:
    # Here, because it imports torch, which the other targets need not wait for.
    from pocketlm_export.backends.executorch.read import open_reader

    place.mkdir(exist_ok=True)
    path = place / "model.pte"
    path.unlink(missing_ok=True)  # the one before is still mapped
    path.write_bytes(data)
    list(open_reader(path, Manifest.model_validate(sound_manifest())).facts())


def _tokenizer(data: bytes, place: Path) -> None:
    place.mkdir(exist_ok=True)
    (place / "tokenizer.json").write_bytes(data)
    tokenizer = Tokenizer.open(place)
    tokenizer.decode(tokenizer.encode("Hello w\u00f6rld <s>", add_special_tokens=True))
    assert len(tokenizer.tokens_from(0)) <= len(data)


def _session(data: bytes, place: Path) -> None:
    if not place.exists():
        write_bundle(place)
        (place / "manifest.json").write_text(json.dumps(sound_manifest()))
    path = place / "session.jsonl"
    path.write_bytes(data)
    expected = read_session(path, pocketlm.open(place)).expected("session")
    assert expected.steps >= 1
    assert np.isfinite(expected.deviation)
    for sequence in expected.sequences:
        for step in sequence.steps:
            assert step.regret(step.choice) == 0
            assert step.kl(step.logits, step.log_sum) == 0
            assert np.isfinite([step.regret(-1), step.drift(0.0)]).all()


def _template(data: bytes, place: Path) -> None:
    template = ChatTemplate({"default": data.decode("utf-8", "replace")}, {"bos_token": "<s>"}, source=str(place))
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    template.render(messages, arguments={"tools": tools})


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "config": _config,
    "safetensors": _safetensors,
    "index": _index,
    "manifest": _manifest,
    "coreml": _coreml,
    "pte": _pte,
    "session": _session,
    "template": _template,
    "tokenizer": _tokenizer,
}


def read(target: str, data: bytes, place: Path) -> None:
    """Give ``data`` to a reader that works in the folder ``place``.

    Returns if it was read, or refused by one short line that names the file; everything else comes out.
    """
    try:
        READERS[target](data, place)
    except PocketLMError as error:
        message = str(error)
        assert "\n" not in message
        assert str(place) in message, f"the message names no file: {message}"
