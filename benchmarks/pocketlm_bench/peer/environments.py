"""A virtual environment for each peer, made once: ``python -m pocketlm_bench.peers setup``."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from pocketlm.cache import cache_folder
from pocketlm.errors import InputError, PocketLMError, UnavailableError

__all__ = ["PEERS", "Environment", "Peer", "environments_folder", "open_environment", "set_up"]

RECORD = "environment.json"  # written last: without it an environment is unfinished
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's own torch brings 5 GB of CUDA libraries
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Peer:
    """``packages`` are pip's requirements, ``torch`` the one that comes from another index or is shared."""

    title: str
    packages: tuple[str, ...]
    torch: str | None = None
    from_source: tuple[str, ...] = ()
    """Packages that are compiled here, so that they use what this CPU has."""
    build: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the compilation."""
    needs: str = ""
    """What the setup takes, for whoever decides on it."""


# The one table of versions.
PEERS: Mapping[str, Peer] = {
    "genai": Peer(
        title="onnxruntime-genai 0.18.0",
        packages=(
            "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0",
            "transformers==5.23.0", "safetensors==0.8.0", "numpy==2.3.5",
        ),
        torch="torch==2.14.1",
        needs="2 minutes, 1.5 GB",
    ),
    "llama_cpp": Peer(
        title="llama.cpp of llama-cpp-python 0.3.36 without AMX",
        packages=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.3.5"),
        from_source=("llama-cpp-python",),
        # GCC drops the stores to the tile configuration, and the first prompt ends in a general protection fault:
        # issue 20824 and pull request 26954 of llama.cpp. Phones have no AMX. Its C files still report AMX_INT8 = 1.
        build={
            "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' -DLLAVA_BUILD=OFF "
            "-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF"
        },
        needs="a C++ compiler, 11 minutes of CPU time, 0.3 GB",
    ),
    "export_llm": Peer(
        title="export_llm of executorch 1.5.1",
        packages=("executorch==1.5.1", "torchao==0.18.0", "safetensors==0.8.0", "numpy==2.3.5"),
        torch="torch==2.14.1",
        needs="2 minutes, 1.5 GB; an export then takes 20 minutes and 5 GB of memory",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment that is complete."""

    name: str
    folder: Path
    packages: tuple[str, ...]
    shared: tuple[str, ...]
    """Those of them that it takes, with what they need, from the environment that made it."""

    @property
    def python(self) -> Path:
        return _python(self.folder)

    @contextmanager
    def variables(self) -> Iterator[dict[str, str]]:
        """Environment variables under which ``python -m pocketlm_bench.peer.NAME`` works in this environment, and
        nothing else of ours is in reach. No peer calls home or asks a hub."""
        with TemporaryDirectory(prefix="pocketlm-peer-") as folder:
            (Path(folder) / PACKAGE.name).symlink_to(PACKAGE, target_is_directory=True)
            yield {
                **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
                "PYTHONPATH": folder,
                "HF_HUB_OFFLINE": "1",
                "ORT_DISABLE_TELEMETRY": "1",
            }


def environments_folder() -> Path:
    """Where the environments lie."""
    return cache_folder() / "peers"


def open_environment(name: str) -> Environment:
    """Raises :class:`UnavailableError` with the command that makes it, if it is missing or of other versions."""
    peer, folder = _peer(name), environments_folder() / name
    path = folder / RECORD
    if not path.exists():
        raise UnavailableError(f"the environment of {peer.title} is not set up: {_setup(name)}")
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or set(record) != {"packages", "shared"}:
        raise InputError(f"{path}: not a record of an environment; remove {folder} and set it up again")
    if record["packages"] != _wanted(peer):
        raise UnavailableError(f"the environment of {peer.title} has other versions: {_setup(name)}")
    return Environment(name, folder, tuple(record["packages"]), tuple(record["shared"]))


def set_up(name: str, *, share_torch: bool = False) -> Environment:
    """Make the environment unless it is there; what was interrupted goes on, one of other versions is made anew.

    ``share_torch`` takes torch and what it needs from the environment that runs this, and records so; without it,
    torch's CPU wheel comes from PyTorch's index. Raises :class:`PocketLMError` with pip's error if it fails.
    """
    peer, folder = _peer(name), environments_folder() / name
    try:
        return open_environment(name)
    except UnavailableError:
        if (folder / RECORD).exists():
            shutil.rmtree(folder)
    if not _python(folder).exists():
        venv.create(folder, with_pip=True)
    # pip's cache may hold what was compiled in another way.
    sources = [option for package in peer.from_source for option in ("--no-cache-dir", "--no-binary", package)]
    _pip(folder, *sources, *peer.packages, variables=peer.build)
    if peer.torch and share_torch:
        # After the installation: pip would take what is in reach for installed.
        ours = sysconfig.get_paths()["purelib"]
        (_site_packages(folder) / "shared_torch.pth").write_text(f"{ours}\n", encoding="utf-8")
    elif peer.torch:
        try:
            _pip(folder, "--index-url", TORCH_INDEX, "--extra-index-url", "https://pypi.org/simple", peer.torch)
        except PocketLMError as error:
            raise PocketLMError(f"{error}; --share-torch takes torch from the environment that runs this") from error
    record = {"packages": _wanted(peer), "shared": [peer.torch] if peer.torch and share_torch else []}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return open_environment(name)


def _peer(name: str) -> Peer:
    if name not in PEERS:
        raise InputError(f"unknown peer {name!r}: {', '.join(PEERS)}")
    return PEERS[name]


def _setup(name: str) -> str:
    return f"python -m pocketlm_bench.peers setup {name} ({PEERS[name].needs})"


def _wanted(peer: Peer) -> list[str]:
    """What an environment has to be made of: packages, and how they were compiled."""
    compiled = [f"{name}={value}" for name, value in peer.build.items()]
    return [*peer.packages, *([peer.torch] if peer.torch else []), *compiled]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _site_packages(folder: Path) -> Path:
    question = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    answer = subprocess.run([_python(folder), "-c", question], check=True, text=True, capture_output=True).stdout
    return Path(answer.strip())


def _pip(folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
    command = [str(_python(folder)), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, **(variables or {})}
    process = subprocess.run(command, text=True, stdout=sys.stderr, stderr=subprocess.PIPE, env=environment)
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
        raise PocketLMError(f"pip install in {folder} failed: {reason}")
