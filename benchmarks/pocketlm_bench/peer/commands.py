"""The commands that make an artifact of a checkpoint: ours, and each peer's in its own environment."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import PocketLMError
from pocketlm_bench.peer.environments import Environment
from pocketlm_bench.peer.export_llm import export_arguments
from pocketlm_bench.peer.genai import builder_arguments
from pocketlm_bench.watched_process import WatchedRun, run_watched

__all__ = ["Command", "export_llm_commands", "genai_command", "gguf_command", "pocketlm_command", "run"]

PROGRAM = "from pocketlm.cli.main import main; main()"


@dataclass(frozen=True, slots=True)
class Command:
    """``environment`` None is the one that runs this."""

    arguments: tuple[str, ...]
    environment: Environment | None = None


def pocketlm_command(
    checkpoint: Path, output: Path, store: Path, *, targets: Sequence[str], head: str, context: int
) -> Command:
    """``pocketlm export`` without verification."""
    options = ("--targets", ",".join(targets), "--head", head, "--context", str(context), "--no-verify", "--force")
    return Command(("-c", PROGRAM, "export", str(checkpoint), "-o", str(output), "--store", str(store), *options))


def genai_command(environment: Environment, checkpoint: Path, output: Path) -> Command:
    """onnxruntime-genai's builder."""
    return Command(tuple(builder_arguments(str(checkpoint), str(output), str(output / "cache"))), environment)


def gguf_command(environment: Environment, checkpoint: Path, output: Path) -> Command:
    """Our writer of GGUF."""
    return Command(("-m", "pocketlm_bench.peer.gguf_file", str(checkpoint), str(output)), environment)


def export_llm_commands(
    environment: Environment, checkpoint: Path, output: Path, context: int
) -> tuple[Command, Command]:
    """The conversion of the checkpoint, and the export, which alone is export_llm's own work."""
    folder = output.with_suffix("")
    convert = ("-m", "pocketlm_bench.peer.export_llm", "convert", str(checkpoint), str(folder))
    return Command(convert, environment), Command(tuple(export_arguments(folder, output, context)), environment)


def run(command: Command) -> WatchedRun:
    """Raises :class:`PocketLMError` with the last line that a failing command wrote."""
    with _place(command) as (python, variables):
        watched = run_watched([str(python), *command.arguments], variables)
    if watched.exit_code:
        last = (watched.errors.strip() or watched.output.strip()).rpartition("\n")[2]
        raise PocketLMError(f"{Path(python).name} {' '.join(command.arguments)} ended with {watched.exit_code}: {last}")
    return watched


@contextmanager
def _place(command: Command) -> Iterator[tuple[Path, Mapping[str, str] | None]]:
    if command.environment is None:
        yield Path(sys.executable), None
        return
    with command.environment.variables() as variables:
        yield command.environment.python, variables
