"""Peak memory of an export as a function of layers: ``python -m pocketlm_bench.memory_curve [--layers 8,16,32]``.

Each row writes a synthetic checkpoint of so many layers, exports it in a fresh process into an empty store, and deletes
both: the disk has to hold the largest checkpoint, its store and its bundle. Where the curve is flat, memory doesn't
depend on the model's size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pocketlm.cli.console import note, reported
from pocketlm.errors import InputError
from pocketlm.machine import circumstances, machine_facts
from pocketlm.manifest import SchemeName
from pocketlm_bench.measured_export import MeasuredExport, export_measured
from pocketlm_bench.shapes import shape_named
from pocketlm_bench.synthetic import write_checkpoint
from pocketlm_export.backends.base import TARGETS
from pocketlm_export.options import ExportOptions

__all__ = ["HEADING", "curve", "document", "row"]

HEADING = (
    f"{'layers':>6} {'1e9 par.':>9} {'wall s':>8} {'peak MB':>9} {'anon. MB':>9} {'file MB':>9}  most anonymous in"
)


def curve(
    shape: str, layers: Sequence[int], scratch: Path | None, options: ExportOptions
) -> Iterator[tuple[int, MeasuredExport]]:
    """``(layers, what the export cost)``."""
    configurations = [(count, shape_named(shape, count)) for count in layers]
    for count, config in configurations:
        with TemporaryDirectory(prefix="pocketlm-curve-", dir=scratch) as name:
            folder = Path(name)
            note(f"{shape}, {count} layers: writing the checkpoint")
            checkpoint = write_checkpoint(config, folder / "checkpoint")
            note(f"{shape}, {count} layers: exporting")
            yield count, export_measured(checkpoint, folder / "bundle", folder / "store", options)


def row(layers: int, measured: MeasuredExport) -> str:
    """A line below :data:`HEADING`, memory in MB; its last word is the stage with the most anonymous memory."""
    peak = measured.peak
    parts = "        -         -" if peak is None else f"{peak.anonymous / 1e6:9.0f} {peak.file_backed / 1e6:9.0f}"
    stages = [(stage.peak.anonymous, stage.name) for stage in measured.stages if stage.peak is not None]
    stage = max(stages, default=(0, "-"))[1]
    return (
        f"{layers:>6} {measured.parameters / 1e9:>9.2f} {measured.wall_seconds:>8.1f} "
        f"{measured.highest_resident / 1e6:>9.0f} {parts}  {stage}"
    )


def document(shape: str, options: ExportOptions, measured: Sequence[tuple[int, MeasuredExport]]) -> dict[str, Any]:
    """Facts and samples."""
    asked = asdict(options)
    return {
        "kind": "memory curve",
        **circumstances(),
        "shape": shape,
        "options": {name: asked[name] for name in ("targets", "scheme", "head", "context", "verify")},
        "exports": [{"layers": layers, **asdict(run)} for layers, run in measured],
    }


def main(
    shape: str = "Mistral-7B",
    layers: Annotated[str, typer.Option(help="Numbers of layers, separated by commas.")] = "8,16,32",
    targets: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(TARGETS),
    scheme: SchemeName = "int4",
    head: SchemeName = "int4",
    context: Annotated[int | None, typer.Option(help="Default: the smaller of the model's and 4096.")] = None,
    verify: Annotated[bool, typer.Option(help="End each export with its certificate.")] = True,
    scratch: Annotated[
        Path | None, typer.Option(help="Where checkpoint, store and bundle lie meanwhile; default: the system's.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Facts and samples.")] = None,
) -> None:
    """Print peak memory for each number of layers."""
    with reported(debug=False):
        options = ExportOptions(
            targets=tuple(targets.split(",")), scheme=scheme, head=head, context=context, verify=verify
        )
        facts, measured = machine_facts(), []
        print(f"{shape}: {targets}, {scheme}, head {head}, {'with' if verify else 'without'} verification")
        print(f"{facts['cpu']}, {facts['cores']} cores: {facts.get('features') or 'features unknown'}")
        print(HEADING)
        for count, run in curve(shape, _numbers(layers), scratch, options):
            print(row(count, run), flush=True)
            measured.append((count, run))
            if json_file is not None:  # each time: the next one may take an hour, or all memory
                json_file.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(document(shape, options, measured), indent=1)
                json_file.write_text(text + "\n", encoding="utf-8")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--layers must be integers separated by commas, not {text!r}") from error


if __name__ == "__main__":
    typer.run(main)
