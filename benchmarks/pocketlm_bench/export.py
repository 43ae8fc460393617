"""What an export costs: ``python -m pocketlm_bench.export CHECKPOINT [--targets onnx,coreml] [--head int4] ...``.

Every export is a fresh process. With ``--store both`` each repetition exports into an empty weight store and then again
from the store that this left. The checkpoint's files may lie in the page cache: whatever was read or written last does.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pocketlm.cli.console import note, reported
from pocketlm.cli.description import readable
from pocketlm.errors import InputError
from pocketlm.machine import circumstances, machine_facts
from pocketlm.manifest import SchemeName
from pocketlm_bench.measured_export import MeasuredExport, export_measured
from pocketlm_export.backends.base import TARGETS
from pocketlm_export.options import ExportOptions
from pocketlm_export.quantization.schemes import GROUPS

__all__ = ["exports", "table"]

STORES = {"cold": ("empty",), "warm": ("warm",), "both": ("empty", "warm")}


def exports(
    checkpoint: Path, output: Path, scratch: Path, options: ExportOptions, *, stores: str, repetitions: int
) -> Iterator[tuple[str, MeasuredExport]]:
    """``("empty" or "warm", what it cost)``, in the order in which they ran; each repetition begins with a new store
    below ``scratch``.

    ``stores``: ``cold``, ``warm`` (an export that is not measured fills it) or ``both``.
    """
    if stores not in STORES:
        raise InputError(f"unknown --store {stores!r}; valid: {', '.join(STORES)}")
    for repetition in range(repetitions):
        with TemporaryDirectory(dir=scratch) as store:
            for state in ("empty", "warm") if stores != "cold" else ("empty",):
                note(f"export {repetition + 1} of {repetitions}, store {state}")
                measured = export_measured(checkpoint, output, Path(store), options)
                if state in STORES[stores]:
                    yield state, measured


def table(measured: Sequence[tuple[str, MeasuredExport]]) -> Iterator[str]:
    """Medians of each state of the store: the whole, the sizes, then every stage."""
    for state in dict.fromkeys(state for state, _ in measured):
        runs = [run for of, run in measured if of == state]
        yield f"store {state}, {len(runs)} exports, medians:"
        wall = [run.wall_seconds for run in runs]
        yield (
            f"  wall {statistics.median(wall):.2f} s ({min(wall):.2f} to {max(wall):.2f}), "
            f"CPU {_median(run.user_seconds for run in runs):.2f} s user and "
            f"{_median(run.system_seconds for run in runs):.2f} s system, "
            f"{_median(run.seconds_per_billion for run in runs):.1f} s per billion parameters"
        )
        yield f"  peak memory {readable(int(_median(run.highest_resident for run in runs)))}{_split(runs)}"
        sizes = {name: sum(files.values()) for name, files in runs[0].artifacts.items()}
        parts = ", ".join(f"{name} {readable(size)}" for name, size in sizes.items())
        yield f"  bundle {readable(runs[0].bundle_bytes)}: {parts}"
        yield f"  {'stage':<34} {'wall s':>8} {'imports':>8} {'CPU s':>8} {'anon. MB':>9} {'file MB':>9}"
        for stages in zip(*(run.stages for run in runs), strict=True):
            cells = (
                _cell([stage.wall_seconds for stage in stages], 8, 2),
                _cell([stage.import_seconds for stage in stages], 8, 2),
                _cell([stage.cpu_seconds for stage in stages], 8, 2),
                _cell([stage.peak and stage.peak.anonymous / 1e6 for stage in stages], 9, 0),
                _cell([stage.peak and stage.peak.file_backed / 1e6 for stage in stages], 9, 0),
            )
            yield f"  {stages[0].name:<34} {' '.join(cells)}"


def _split(runs: Sequence[MeasuredExport]) -> str:
    peaks = [run.peak for run in runs if run.peak is not None]
    if not peaks:
        return ""
    anonymous, file = _median(peak.anonymous for peak in peaks), _median(peak.file_backed for peak in peaks)
    return f"; anonymous at most {readable(int(anonymous))}, file-backed at most {readable(int(file))}"


def _median(values: Iterator[float]) -> float:
    return statistics.median(list(values))


def _cell(values: Sequence[float | None], width: int, digits: int) -> str:
    """The median of those that were measured."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):>{width}.{digits}f}" if known else f"{'-':>{width}}"


def document(
    checkpoint: Path, options: ExportOptions, measured: Sequence[tuple[str, MeasuredExport]]
) -> dict[str, Any]:
    """Facts, options and every sample."""
    asked = asdict(options)
    return {
        "kind": "export",
        **circumstances(),
        "checkpoint": str(checkpoint),
        "options": {name: asked[name] for name in ("targets", "scheme", "head", "group", "context", "verify")},
        "exports": [
            {"store": state, "seconds_per_billion": run.seconds_per_billion, **asdict(run)} for state, run in measured
        ],
    }


def main(
    checkpoint: Path,
    targets: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(TARGETS),
    scheme: SchemeName = "int4",
    head: SchemeName = "int8",
    group: Annotated[int, typer.Option(help="Columns of an int4 matrix that share a scale.")] = GROUPS[0],
    context: Annotated[int | None, typer.Option(help="Default: the smaller of the model's and 4096.")] = None,
    store: Annotated[str, typer.Option(help="cold, warm or both.")] = "both",
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    verify: Annotated[bool, typer.Option("--verify", help="End each export with its certificate.")] = False,
    scratch: Annotated[
        Path | None, typer.Option(help="Where bundle and store lie meanwhile; default: the system's.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Where the last bundle stays, replacing one that is there.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Facts and raw samples.")] = None,
) -> None:
    """Measure exports of CHECKPOINT."""
    with reported(debug=False), TemporaryDirectory(prefix="pocketlm-export-", dir=scratch) as folder:
        options = ExportOptions(
            targets=tuple(targets.split(",")), scheme=scheme, head=head, group=group, context=context, verify=verify
        )
        output = keep or Path(folder) / "bundle"
        runs = exports(checkpoint, output, Path(folder), options, stores=store, repetitions=repetitions)
        measured = list(runs)
        facts = machine_facts()
        print(f"{checkpoint}: {targets}, {scheme}, head {head}, {measured[0][1].parameters:,} parameters")
        print(f"{facts['cpu']}, {facts['cores']} cores: {facts.get('features') or 'features unknown'}")
        for line in table(measured):
            print(line)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(document(checkpoint, options, measured), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
