"""The agent as one file for a device: an arm64 folder that needs of it a kernel, a shell and nothing else.

It holds glibc and its loader, Python, numpy, onnxruntime, the native ExecuTorch session and the modules of this package
that the agent imports. The script ``agent`` starts it wherever the folder lies, through the loader: neither root nor a
library of the device takes part. Its parts are those of the emulated arm64 system, without what the agent never loads.
"""

import gzip
import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketlm.artifact import ArtifactFile
from pocketlm.cache import cache_folder
from pocketlm.devices.arm64_system.set_up import Arm64System, find_system

__all__ = ["SCRIPT", "AgentArchive", "agent_archive", "agent_modules", "pack"]

SCRIPT = "agent"
LOADER = "ld-linux-aarch64.so.1"
LIBRARIES = (
    *("libc", "libm", "libdl", "libpthread", "librt", "libutil", "libgcc_s", "libstdc++", "libz", "libexpat"),
    *("libffi", "libcrypto"),
)
# Those whose libraries are here; the others are other people's formats, terminals and Python's own tests.
EXTENSIONS = (
    *("_asyncio", "_contextvars", "_ctypes", "_decimal", "_hashlib", "_json", "_multiprocessing", "_posixshmem"),
    *("_queue", "_typing", "_zoneinfo", "mmap", "resource", "termios"),
)
UNUSED_OF_PYTHON = "__pycache__ config-* ensurepip lib-dynload lib2to3 pydoc_data test turtledemo venv wsgiref xmlrpc"
UNUSED_OF_NUMPY = "__pycache__ f2py include tests _simd* *_tests.* *.pyi *.a *.pxd"
# libonnxruntime is for C programs: Python's extension has the same again.
UNUSED_OF_ONNXRUNTIME = "__pycache__ backend datasets quantization tools transformers libonnxruntime.* *.txt"
EXECUTORCH = ("", "_threadpool", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack", "_etdump")
PACKAGE = Path(__file__).parents[2]
# The agent and what it imports; of ExecuTorch's bindings not the one to torch.
MODULES = (
    *("__init__", "agent", "artifact", "cache", "energy", "errors", "job", "logit_summary", "machine", "memory"),
    *("memory_watch", "session", "strict_json", "runtimes/__init__", "runtimes/packed_copies"),
    *("runtimes/onnx*", "runtimes/executorch", "runtimes/executorch_[!t]*", "runtimes/executorch_threads"),
)
START = """here=${0%/*}
export PYTHONHOME="$here" PYTHONPATH="$here/packages" POCKETLM_EXECUTORCH=native
exec "$here/lib/LOADER" --library-path "$here/lib" "$here/bin/python3.11" -s -S -P -X utf8 -m pocketlm.agent "$@"
"""


@dataclass(frozen=True, slots=True)
class AgentArchive:
    """A ``.tar.gz`` at ``path``, ``file`` of which is what has to arrive. ``name``: of what is in it, by its hash."""

    name: str
    path: Path
    file: ArtifactFile


def agent_archive() -> AgentArchive:
    """The archive of this version of the agent, made when something in it has changed.

    Raises :class:`UnavailableError` if the arm64 system that it is made of isn't set up.
    """
    return pack(_contents(find_system()), cache_folder() / "devices" / "agent-arm64")


def agent_modules() -> dict[str, Path]:
    """The modules of this package that an agent imports: their places in ``packages/``, and the files."""
    files = (path for name in MODULES for path in PACKAGE.glob(f"{name}.py"))
    return {f"pocketlm/{path.relative_to(PACKAGE).as_posix()}": path for path in files}


def pack(contents: Mapping[str, Path | bytes], folder: Path) -> AgentArchive:
    """The archive of ``contents``, names to files, in ``folder``, which keeps the last one alone."""
    listed = hashlib.sha256()
    for name in sorted(contents):
        listed.update(f"{hashlib.sha256(_bytes(contents[name])).hexdigest()} {name}\n".encode())
    name = listed.hexdigest()[:32]
    path = folder / f"{name}.tar.gz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(dir=folder, delete=False) as file,
            gzip.GzipFile(fileobj=file, mode="wb", filename="", compresslevel=6, mtime=0) as packed,
        ):
            _write_tar(contents, packed)
        Path(file.name).rename(path)
        for other in set(folder.glob("*.tar.gz")) - {path}:
            other.unlink(missing_ok=True)
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return AgentArchive(name, path, ArtifactFile(sha256, path.stat().st_size))


def _write_tar(contents: Mapping[str, Path | bytes], packed: gzip.GzipFile) -> None:
    """In the format that every tar reads; the same contents are the same bytes."""
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in sorted(contents):
            data = _bytes(contents[name])
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _contents(system: Arm64System) -> dict[str, Path | bytes]:
    root, (wheels, native) = system.root, system.packages
    standard = root / "usr/lib/python3.11"
    extensions = [next((standard / "lib-dynload").glob(f"{name}.*.so")) for name in EXTENSIONS]
    libraries = [wheels / f"executorch/lib/libexecutorch{name}.so" for name in EXECUTORCH]
    return {
        SCRIPT: START.replace("LOADER", LOADER).encode(),
        "bin/python3.11": system.python,
        f"lib/{LOADER}": root / "lib" / LOADER,
        **{f"lib/{path.name}": path for path in _libraries(root)},
        **{f"lib/python3.11/lib-dynload/{path.name}": path for path in extensions},
        **_tree("lib/python3.11", standard, UNUSED_OF_PYTHON),
        **_tree("packages/numpy", wheels / "numpy", UNUSED_OF_NUMPY),
        **_tree("packages/numpy.libs", wheels / "numpy.libs"),
        **_tree("packages/onnxruntime", wheels / "onnxruntime", UNUSED_OF_ONNXRUNTIME),
        **_tree("packages/pocketlm_native", native / "pocketlm_native"),
        **{f"packages/executorch/lib/{path.name}": path for path in libraries},
        **{f"packages/{name}": path for name, path in agent_modules().items()},
    }


def _libraries(root: Path) -> Iterator[Path]:
    """Each by the name that others look for: ``libz.so.1``."""
    for name in LIBRARIES:
        places = (root / "lib/aarch64-linux-gnu", root / "usr/lib/aarch64-linux-gnu")
        yield min((path for place in places for path in place.glob(f"{name}.so.*")), key=lambda path: len(path.name))


def _tree(name: str, folder: Path, unused: str = "__pycache__") -> dict[str, Path | bytes]:
    """The files below ``folder``; ``unused``: patterns of the files and folders that are left out."""
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in _files(folder, unused.split())}


def _files(folder: Path, unused: Iterable[str]) -> Iterator[Path]:
    for path in folder.iterdir():
        if any(path.match(pattern) for pattern in unused):
            continue
        if path.is_dir():
            yield from _files(path, unused)
        else:
            yield path
