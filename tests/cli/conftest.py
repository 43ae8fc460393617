"""The program as a user starts it: another process, its exit code, stdout and stderr."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_checkpoint import write_small_checkpoint

PROGRAM = (sys.executable, "-c", "from pocketlm.cli.main import main; main()")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def environment(store: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(store), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def pocketlm(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """``pocketlm(*arguments, stdin="")`` -> the finished process."""

    def run(*arguments: object, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess:
        command = [*PROGRAM, *map(str, arguments)]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=environment, timeout=300, cwd=cwd, check=False
        )

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def exported(pocketlm: Callable, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The process of one export to all targets, and the bundle that it wrote."""
    bundle = tmp_path_factory.mktemp("bundles") / "small.pocketlm"
    return pocketlm("export", checkpoint, "-o", bundle, "--json"), bundle


@pytest.fixture(scope="session")
def bundle(exported: tuple) -> Path:
    process, path = exported
    assert process.returncode == 0, process.stderr
    return path
