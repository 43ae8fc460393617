"""Copies of ONNX models that hold the weights as this machine's kernels want them, to be mapped from a file.

When ONNX Runtime loads a model it packs each matrix for the CPU, into anonymous memory: the weights once more, in a
form that the system can't drop. A copy saved after packing has both forms in its data file; loading it packs again, one
matrix at a time, finds the same content in the file, and maps that instead.

A copy is a folder ``packed/MODEL-MACHINE`` of the user's cache. The first half of its name stands for the content of
the model's files, the second for the runtime's version and the CPU. It serves only its own machine, is made there when
first asked for, and can be deleted at any time.

What was written is known by a record of each file's size, inode and times. Every write moves the time of change, which
no program can set back, so a copy that was cut, edited or brought from elsewhere is made again. Its content is not
hashed at each load, which would read all of it: a disk that returns other bytes than were written goes unnoticed.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]

from pocketlm.artifact import ArtifactFile
from pocketlm.cache import cache_folder
from pocketlm.errors import BundleError, InputError
from pocketlm.machine import machine_facts
from pocketlm.runtimes.onnx_loading import load_model
from pocketlm.strict_json import parse_object

__all__ = ["LIMIT", "NEEDED_SPACE", "packed_copy", "packed_folder"]

LIMIT = 16 << 30  # bytes of all copies; the least recently used go first
NEEDED_SPACE = 3  # times the model's files, to begin: both forms, and a tied embedding's bytes twice
FORMAT = "1"  # of the record
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
RECORD_FILE = "packed.json"
UNFINISHED = ".new."


def packed_folder() -> Path:
    """Where the copies lie: ``packed`` in :func:`pocketlm.cache.cache_folder`."""
    return cache_folder() / "packed"


@contextmanager
def packed_copy(model: Path, files: Mapping[str, ArtifactFile]) -> Iterator[Path]:
    """The model file of the packed copy of ``model``, which is made if there is none; no process removes it meanwhile.

    ``files``: the model's own files by name, as the manifest records them; they were checked. Raises
    :class:`InputError` if the cache can't be written or has too little space, :class:`BundleError` if ONNX Runtime
    refuses the model.
    """
    root = packed_folder()
    identity = _identity(files)
    folder = root / f"{_digest(identity['model'])}-{_digest(identity['machine'])}"
    with _lock(root, fcntl.LOCK_SH):
        if _is_whole(folder, identity):
            with suppress(OSError):  # a cache that is only read
                os.utime(folder)  # when it was last used
            yield folder / MODEL_FILE
            return
    with _lock(root, fcntl.LOCK_EX):
        if not _is_whole(folder, identity):  # another process may have made it meanwhile
            _make(folder, model, sum(record.size for record in files.values()), identity)
            _clean(folder)
        yield folder / MODEL_FILE


def _identity(files: Mapping[str, ArtifactFile]) -> dict[str, dict[str, str]]:
    facts = machine_facts()
    return {
        "model": {name: record.sha256 for name, record in sorted(files.items())},
        "machine": {
            "format": FORMAT,
            "onnxruntime": onnxruntime.__version__,
            "architecture": platform.machine(),
            "cpu": facts["cpu"],
            "features": facts.get("features", ""),
        },
    }


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def _lock(root: Path, kind: int) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        fcntl.flock(file, kind)
        yield
    finally:
        os.close(file)


def _is_whole(folder: Path, identity: Mapping[str, Any]) -> bool:
    try:
        return parse_object((folder / RECORD_FILE).read_bytes()) == _record(folder, identity)
    except (OSError, ValueError):
        return False


def _record(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    states = {}
    for name in (MODEL_FILE, DATA_FILE):
        status = (folder / name).stat()
        states[name] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return {**identity, "files": states}


def _make(folder: Path, model: Path, size: int, identity: Mapping[str, Any]) -> None:
    """Write a copy beside its place, and move it there when all of it is on the disk."""
    root = folder.parent
    scratch: Path | None = None
    try:
        for path in root.glob(f"{UNFINISHED}*"):  # of processes that were killed: who writes has the lock
            shutil.rmtree(path, ignore_errors=True)
        _clean_damaged(folder)
        _check_space(root, NEEDED_SPACE * size)
        scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=root))
        _save(model, scratch)
        for path in (scratch / DATA_FILE, scratch / MODEL_FILE):
            _flush(path)
        record = scratch / RECORD_FILE
        record.write_text(json.dumps(_record(scratch, identity), indent=1), encoding="utf-8")
        _flush(record)
        scratch.rename(folder)
    except OSError as error:
        raise _unwritable(root, error) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _clean_damaged(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"{root}: {free >> 20} MB free, but packed weights may need {needed >> 20} MB: free some, set "
            "XDG_CACHE_HOME to a larger disk, or open the session without packed"
        )


def _save(model: Path, folder: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / MODEL_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        load_model(model, options=options)
    except BundleError as error:
        # The model may be refused, or the disk be full: ONNX Runtime says the one like the other.
        load_model(model)
        raise InputError(f"{folder.parent}: packed weights can't be written: {error}") from error


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _clean(made: Path) -> None:
    """Remove what ``made`` replaces, for another runtime or CPU, and the least recently used beyond :data:`LIMIT`."""
    model = made.name.split("-")[0]
    kept = 0
    copies = [path for path in made.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(copies, key=lambda path: (path == made, path.stat().st_mtime_ns), reverse=True):
        size = sum(file.stat().st_size for file in path.iterdir())
        if path != made and (path.name.split("-")[0] == model or kept + size > LIMIT):
            shutil.rmtree(path, ignore_errors=True)
        else:
            kept += size


def _unwritable(root: Path, error: OSError) -> InputError:
    return InputError(f"{root}: packed weights can't be written: {error.strerror or error}")
