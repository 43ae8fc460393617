"""Exports a checkpoint in a fresh process and measures it from outside: time, CPU, memory and sizes, by stage."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pocketlm.errors import InputError, PocketLMError, UnavailableError
from pocketlm_bench.watched_process import MemoryPeak, WatchedRun, run_watched
from pocketlm_export.options import ExportOptions

__all__ = ["MeasuredExport", "Stage", "export_measured"]

ERRORS: Mapping[int, type[PocketLMError]] = {2: InputError, 3: UnavailableError}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of an export; ``start`` is the interpreter and the first imports, the others are the pipeline's own.

    ``import_seconds`` are part of ``wall_seconds``; ``cpu_seconds`` are of all threads, None for what the process can't
    say of itself. ``peak`` is None where no sample lies in the stage, or the system doesn't split memory.
    """

    name: str
    wall_seconds: float
    import_seconds: float | None
    cpu_seconds: float | None
    peak: MemoryPeak | None


@dataclass(frozen=True, slots=True)
class MeasuredExport:
    """One process. CPU seconds are with its descendants, memory without; ``highest_resident``, ``peak`` and sizes in
    bytes; ``artifacts`` has the size of each file; ``load_average`` is the machine's before, other work included."""

    load_average: float
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    highest_resident: int
    peak: MemoryPeak | None
    stages: tuple[Stage, ...]
    parameters: int
    bundle_bytes: int
    artifacts: Mapping[str, Mapping[str, int]]

    @property
    def seconds_per_billion(self) -> float:
        """Wall seconds for each 1e9 parameters; a tied embedding counts once."""
        return self.wall_seconds / (self.parameters / 1e9)


def export_measured(checkpoint: Path, output: Path, store: Path, options: ExportOptions) -> MeasuredExport:
    """Export to ``output``, which is replaced, through the weight store at ``store``.

    Raises the error that the export reported, or :class:`PocketLMError` if its process died.
    """
    placed = {**asdict(options), "store": str(store), "force": True}
    job = {"checkpoint": str(checkpoint), "output": str(output), "options": placed}
    load_average = os.getloadavg()[0]
    run = run_watched([sys.executable, "-m", "pocketlm_bench.export_process", json.dumps(job)])
    line = run.output.strip().rpartition("\n")[2]
    try:
        result: dict[str, Any] = json.loads(line)
    except ValueError as error:
        ending = run.errors.strip().rpartition("\n")[2]
        raise PocketLMError(f"{checkpoint}: the exporting process ended with {run.exit_code}: {ending}") from error
    if "error" in result:
        raise ERRORS.get(result["exit_code"], PocketLMError)(result["error"])
    return MeasuredExport(
        load_average=load_average,
        wall_seconds=run.wall_seconds,
        user_seconds=run.user_seconds,
        system_seconds=run.system_seconds,
        highest_resident=run.highest_resident,
        peak=run.peak(),
        stages=tuple(_stages(run, result["stages"])),
        parameters=result["parameters"],
        bundle_bytes=result["bundle_bytes"],
        artifacts=result["artifacts"],
    )


def _stages(run: WatchedRun, told: list[dict[str, Any]]) -> Iterator[Stage]:
    """``told`` are the beginnings of the stages, with what the process had spent until then."""
    first, last = told[0], told[-1]
    yield Stage(
        name="start",
        wall_seconds=first["begun"] - run.started,
        import_seconds=first["import_seconds"],
        cpu_seconds=first["cpu_seconds"],
        peak=run.peak(run.started, first["begun"]),
    )
    for begin, end in pairwise(told):
        yield Stage(
            name=begin["name"],
            wall_seconds=end["begun"] - begin["begun"],
            import_seconds=end["import_seconds"] - begin["import_seconds"],
            cpu_seconds=end["cpu_seconds"] - begin["cpu_seconds"],
            peak=run.peak(begin["begun"], end["begun"]),
        )
    yield Stage(
        name=last["name"],
        wall_seconds=run.ended - last["begun"],
        import_seconds=None,
        cpu_seconds=None,
        peak=run.peak(last["begun"], run.ended),
    )
