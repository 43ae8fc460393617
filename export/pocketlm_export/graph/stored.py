"""Traced graphs on disk: a second export of a model needs neither torch nor a trace.

A graph is found by what it was made from: the configuration, the context, torch's version and the sources that trace.
The file is JSON with the hash of its content; anything unexpected in it means that the model is traced again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pocketlm_export.architectures import DecoderConfig
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Attention,
    Embedding,
    Graph,
    LastPositions,
    Linear,
    Multiply,
    Node,
    RmsNorm,
    Value,
    WeightInfo,
)
from pocketlm_export.graph.rotary import Rotary

__all__ = ["GraphStore", "decode_graph", "encode_graph"]

KEPT = 64  # graphs, the newest; a graph of 30 layers is 100 kB
SOURCES = ("architectures", "graph")
NODES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Activation, Add, Attention, Embedding, LastPositions, Linear, Multiply, RmsNorm)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GraphStore:
    """Graphs in the folder ``root``; safe for several processes at once."""

    root: Path

    def graph(self, config: DecoderConfig, context_length: int, trace: Callable[[DecoderConfig, int], Graph]) -> Graph:
        """The stored graph of ``config``, or what ``trace`` makes of it, which is stored then."""
        path = self.root / f"{_key(config, context_length)}.json"
        found = _read(path)
        if found is not None:
            with contextlib.suppress(OSError):  # a store that can only be read is one
                os.utime(path)
            return found
        graph = trace(config, context_length)
        with contextlib.suppress(OSError):  # a full disk costs the next trace, not this export
            self._write(path, graph)
        return graph

    def _write(self, path: Path, graph: Graph) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        content = json.dumps(encode_graph(graph), separators=(",", ":"))
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_text(f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        newest = sorted(self.root.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest[KEPT:]:
            old.unlink(missing_ok=True)


def encode_graph(graph: Graph) -> dict[str, Any]:
    """JSON's types; floats survive exactly."""
    return {
        "nodes": [
            {"node": type(node).__name__, **{field.name: _encode(getattr(node, field.name)) for field in fields(node)}}
            for node in graph
        ],
        "ids": _encode(graph.ids),
        "logits": _encode(graph.logits),
        "context_length": graph.context_length,
    }


def decode_graph(content: dict[str, Any]) -> Graph:
    """The inverse of :func:`encode_graph`. Raises :class:`KeyError`, :class:`TypeError` or :class:`ValueError`."""
    nodes: list[Node] = []
    for stated in content["nodes"]:
        kind = NODES[stated["node"]]
        nodes.append(kind(**{name: _decode(value) for name, value in stated.items() if name != "node"}))
    return Graph(tuple(nodes), _decode(content["ids"]), _decode(content["logits"]), content["context_length"])


def _encode(value: Any) -> Any:
    match value:
        case Value():
            return {"value": value.name, "shape": list(value.shape)}
        case WeightInfo():
            return {"weight": value.name, "shape": list(value.shape)}
        case Rotary():
            return {"rotary": list(value.frequencies), "scale": value.scale}
        case tuple():
            return [_encode(item) for item in value]
        case _:
            return value


def _decode(value: Any) -> Any:
    match value:
        case {"value": name, "shape": shape}:
            return Value(name, tuple(shape))
        case {"weight": name, "shape": shape}:
            return WeightInfo(name, tuple(shape))
        case {"rotary": frequencies, "scale": scale}:
            return Rotary(tuple(frequencies), scale)
        case list():
            return tuple(_decode(item) for item in value)
        case _:
            return value


def _read(path: Path) -> Graph | None:
    try:
        digest, _, content = path.read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(content.encode()).hexdigest() != digest:
            return None
        return decode_graph(json.loads(content))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(config: DecoderConfig, context_length: int) -> str:
    digest = hashlib.sha256(f"{config!r} {context_length} {importlib.metadata.version('torch')}".encode())
    package = Path(__file__).parents[1]
    for folder in SOURCES:
        for source in sorted((package / folder).glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()
