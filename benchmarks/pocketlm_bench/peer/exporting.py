"""Exports side by side: each round runs every way once, one after the other, on a checkpoint in the page cache."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketlm_bench.peer.commands import Command, export_llm_commands, genai_command, pocketlm_command, run
from pocketlm_bench.peer.environments import Environment
from pocketlm_bench.watched_process import WatchedRun

__all__ = ["TITLES", "Export", "compare_exports"]

TARGETS = ("onnx", "executorch", "coreml")
TITLES = {
    "genai": "onnxruntime-genai's builder",
    "onnx": "PocketLM, ONNX, head int4",
    "all": "PocketLM, all three, head int4",
    "warm": "the same, store warm",
    "default": "PocketLM, all three, default head",
    "export_llm": "export_llm",
}
READ = 1 << 24
SUFFIXES = (".onnx", ".data", ".pte", ".bin", ".mlmodel")  # of what holds a graph or weights


@dataclass(frozen=True, slots=True)
class Export:
    """Seconds and bytes. ``peak_anonymous`` and ``peak_file_backed`` need not be of one moment; ``load_average`` is the
    machine's before it began, other work included."""

    way: str
    round: int
    wall_seconds: float
    cpu_seconds: float
    peak_resident: int
    peak_anonymous: int
    peak_file_backed: int
    size: int
    load_average: float


def compare_exports(
    checkpoint: Path, work: Path, environments: Mapping[str, Environment], rounds: int, context: int
) -> Iterator[Export]:
    """``rounds`` of every way, in the order of :data:`TITLES`; artifacts are removed once they are measured.

    export_llm, if its environment is given, runs in the last round only.
    """
    _read(checkpoint)
    for number in range(rounds):
        folder = work / "exports"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for way, command in _commands(checkpoint, folder, environments, context).items():
            yield _measure(way, number, command, folder / way)
        if "export_llm" in environments and number == rounds - 1:
            output = folder / "export_llm" / "model.pte"
            convert, command = export_llm_commands(environments["export_llm"], checkpoint, output, context)
            run(convert)
            yield _measure("export_llm", number, command, output)
        shutil.rmtree(folder)


def _commands(
    checkpoint: Path, folder: Path, environments: Mapping[str, Environment], context: int
) -> dict[str, Command]:
    def ours(way: str, store: str, targets: tuple[str, ...] = TARGETS, head: str = "int4") -> Command:
        return pocketlm_command(
            checkpoint, folder / way, folder / store, targets=targets, head=head, context=context
        )  # fmt: skip

    genai = environments.get("genai")
    return {
        **({"genai": genai_command(genai, checkpoint, folder / "genai")} if genai else {}),
        "onnx": ours("onnx", "store-onnx", ("onnx",)),
        "all": ours("all", "store-all"),
        "warm": ours("warm", "store-all"),
        "default": ours("default", "store-default", head="int8"),
    }


def _measure(way: str, number: int, command: Command, output: Path) -> Export:
    load = os.getloadavg()[0]
    watched = run(command)
    resident, anonymous, file_backed = _peak(watched)
    size = _size(output)
    if output.is_dir():
        shutil.rmtree(output)
    return Export(
        way=way,
        round=number,
        wall_seconds=watched.wall_seconds,
        cpu_seconds=watched.user_seconds + watched.system_seconds,
        peak_resident=resident,
        peak_anonymous=anonymous,
        peak_file_backed=file_backed,
        size=size,
        load_average=load,
    )


def _peak(watched: WatchedRun) -> tuple[int, int, int]:
    peak = watched.peak()
    if peak is None:  # a system that doesn't split memory
        return watched.highest_resident, 0, 0
    return peak.resident, peak.anonymous, peak.file_backed


def _size(output: Path) -> int:
    """Bytes of the artifacts, without tokenizers, golden files and whatever else a bundle carries."""
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.suffix in SUFFIXES]
    return sum(path.stat().st_size for path in files if "golden" not in path.parts)


def _read(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(READ):
                pass
