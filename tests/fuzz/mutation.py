"""Mutations that keep the outer form of a file, so that what lies behind its parser is reached."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from google.protobuf.message import DecodeError, Message

from pocketlm.runtimes.coreml_interpreter.protobuf import parse_model

__all__ = ["MUTATIONS"]

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 63, 10**12, 10**30, 0.0, -0.5, 1e-300, 1e308, float("nan"),
    float("inf"), "", "\0", "\n", "..", "../a", "/dev/zero", "\ud800", "é", "linear", "llama3", "int4", "x" * 300, [],
    {}, [[]], {"": 0},
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 63, 64, 127, (1 << 31) - 1, (1 << 62) + 1)
DEEP = 200


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every ``(container, key)`` of a JSON value."""
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        container = pending.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        places += [(container, key) for key in keys]
        pending += [container[key] for key in keys if isinstance(container[key], dict | list)]
    return places


def _change_json(value: Any, source: random.Random) -> Any:
    places = _places(value) if isinstance(value, dict | list) else []
    if not places or source.random() < 0.02:
        return deepcopy(source.choice(STRANGE))
    container, key = source.choice(places)
    match source.randrange(6):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[source.choice([str(key) + "x", str(source.choice(places)[1])])] = container.pop(key)
        case 2:
            other, other_key = source.choice(places)
            container[key] = deepcopy(other[other_key]) if other_key in _keys(other) else None
        case 3 if source.random() < 0.1:
            deep: Any = container[key]
            for _ in range(DEEP):
                deep = [deep]
            container[key] = deep
        case _:
            container[key] = deepcopy(source.choice(STRANGE))
    return value


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def mutate_json(data: bytes, source: random.Random) -> bytes | None:
    """Another JSON text; None where ``data`` is none."""
    try:
        value = json.loads(data)
        for _ in range(source.randint(1, 3)):
            value = _change_json(value, source)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def mutate_lines(data: bytes, source: random.Random) -> bytes | None:
    """One line altered as JSON; dropped, repeated or moved now and then."""
    lines = data.split(b"\n")
    place = source.randrange(len(lines))
    match source.randrange(8):
        case 0:
            del lines[place]
        case 1:
            lines.insert(source.randrange(len(lines)), lines[place])
        case _:
            changed = mutate_json(lines[place], source)
            if changed is None:
                return None
            lines[place] = changed
    return b"\n".join(lines)


def mutate_safetensors(data: bytes, source: random.Random) -> bytes | None:
    """Another header before the same data, its length adapted."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], source)
    return None if header is None else len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_coreml(data: bytes, source: random.Random) -> bytes | None:
    """Another model message behind the same weights."""
    start = 4 + int.from_bytes(data[:4], "little") % (len(data) + 1)
    try:
        model = parse_model(data[start:])
    except (ValueError, DecodeError):
        return None
    for _ in range(source.randint(1, 3)):
        _change_message(model, source)
    return data[:start] + model.SerializeToString()


def mutate_words(data: bytes, source: random.Random) -> bytes | None:
    """Other offsets, counts and ids of a flatbuffer, which are aligned words: nothing moves."""
    changed = bytearray(data)
    if len(changed) < 8:
        return None
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(changed) // 4) * 4
        near = int.from_bytes(changed[place : place + 4], "little") + source.choice((-8, -4, -1, 1, 4, 8))
        number = source.choice((near, near, source.choice(NUMBERS), source.randrange(1 << 16)))
        changed[place : place + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(changed)


def _change_message(root: Message, source: random.Random) -> None:
    fields = _fields(root)
    if not fields:
        return
    message, field = source.choice(fields)
    value = getattr(message, field.name)
    if field.is_repeated:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _change_map(value, source)
        elif len(value) and source.random() < 0.3:
            del value[source.randrange(len(value))]
        elif field.message_type is not None and len(value):
            value.add().CopyFrom(source.choice(list(value)))
        elif len(value) and not isinstance(value[0], str | bytes):
            value[source.randrange(len(value))] = source.choice(NUMBERS) & 0x7F
    elif field.message_type is not None:
        message.ClearField(field.name)
    elif isinstance(value, str):
        others = [getattr(m, f.name) for m, f in fields if f.type == f.TYPE_STRING and not f.is_repeated]
        setattr(message, field.name, source.choice(others or [""]))
    elif isinstance(value, bytes):
        setattr(message, field.name, value[: source.randrange(len(value) + 1)])
    elif not isinstance(value, float):
        setattr(message, field.name, source.choice(NUMBERS) if field.type in (3, 4) else source.randrange(0, 12))


def _change_map(value: Any, source: random.Random) -> None:
    keys = list(value)
    if not keys:
        return
    key, other = source.choice(keys), source.choice(keys)
    if isinstance(value[key], Message) and source.random() < 0.7:
        value[key].CopyFrom(value[other])
    else:
        del value[key]


def _fields(root: Message) -> list[tuple[Message, Any]]:
    """Every ``(message, field that is set)`` below ``root``."""
    found: list[tuple[Message, Any]] = []
    pending = [root]
    while pending:
        message = pending.pop()
        for field, value in message.ListFields():
            found.append((message, field))
            if field.message_type is None:
                continue
            if not field.is_repeated:
                pending.append(value)
            elif field.message_type.GetOptions().map_entry:
                pending += [item for item in value.values() if isinstance(item, Message)]
            else:
                pending += list(value)
    return found


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "config": mutate_json,
    "index": mutate_json,
    "manifest": mutate_json,
    "safetensors": mutate_safetensors,
    "coreml": mutate_coreml,
    "pte": mutate_words,
    "session": mutate_lines,
    "tokenizer": mutate_json,
}
