"""What exports of every model's real shape cost: ``python -m pocketlm_bench.models [SHAPE...] [--json FILE]``.

Each writes a synthetic checkpoint, exports it in a fresh process into an empty store, and deletes both. Where the disk
does not hold all layers, as many as it holds are exported, and the table says so; a target that refuses the model is
left out.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pocketlm.cli.console import note, reported
from pocketlm.machine import circumstances
from pocketlm_bench.measured_export import MeasuredExport, export_measured
from pocketlm_bench.shapes import SHAPES, shape_named
from pocketlm_bench.synthetic import checkpoint_bytes, write_checkpoint
from pocketlm_export.backends.base import TARGETS
from pocketlm_export.inspection import inspect_checkpoint
from pocketlm_export.options import ExportOptions

__all__ = ["document", "fitting_layers", "measured_models"]

# Beside 2 bytes a weight: store and three artifacts in int4, with embedding and head in int8, take less than as much
# again.
DISK_PER_CHECKPOINT_BYTE = 2.1


def fitting_layers(shape: str, free: int) -> int:
    """How many of the shape's layers a disk with ``free`` bytes holds, with store and bundle; at least one."""
    layers = int(SHAPES[shape]["num_hidden_layers"])
    while layers > 1 and checkpoint_bytes(shape, layers) * DISK_PER_CHECKPOINT_BYTE > free:
        layers -= 1
    return layers


def measured_models(shapes: Sequence[str], scratch: Path | None) -> Iterator[tuple[str, int, MeasuredExport]]:
    """``(shape, layers, what the export cost)`` to all targets that take the model."""
    for shape in shapes:
        layers = fitting_layers(shape, shutil.disk_usage(scratch or tempfile.gettempdir()).free)
        with TemporaryDirectory(prefix="pocketlm-models-", dir=scratch) as name:
            folder = Path(name)
            note(f"{shape}, {layers} layers: writing the checkpoint")
            checkpoint = write_checkpoint(shape_named(shape, layers), folder / "checkpoint")
            reasons = inspect_checkpoint(str(checkpoint)).targets
            targets = tuple(target for target, reason in reasons.items() if reason is None)
            note(f"{shape}, {layers} layers: exporting to {', '.join(targets)}")
            options = ExportOptions(targets=targets, verify=False)
            yield shape, layers, export_measured(checkpoint, folder / "bundle", folder / "store", options)


def document(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts and samples, shapes in their order."""
    order = list(SHAPES)
    exports = sorted(runs, key=lambda run: order.index(run["shape"]))
    return {"kind": "models", **circumstances(), "targets": list(TARGETS), "exports": exports}


def main(
    shapes: Annotated[list[str] | None, typer.Argument(metavar="SHAPE", help="Default: all.")] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Where checkpoint, store and bundle lie meanwhile; default: the system's.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Facts and samples; those of other shapes in it are kept.")
    ] = None,
) -> None:
    """Print wall, peak memory and seconds per 1e9 parameters of each shape."""
    with reported(debug=False):
        runs = []
        if json_file is not None and json_file.exists():
            runs = json.loads(json_file.read_text(encoding="utf-8"))["exports"]
        for shape, layers, measured in measured_models(shapes or list(SHAPES), scratch):
            print(
                f"{shape}, {layers} layers: {measured.wall_seconds:.1f} s, "
                f"{measured.highest_resident / 1e9:.2f} GB, {measured.seconds_per_billion:.1f} s per 1e9 parameters",
                flush=True,
            )
            all_layers = SHAPES[shape]["num_hidden_layers"]
            runs = [run for run in runs if run["shape"] != shape]
            runs.append({"shape": shape, "layers": layers, "all_layers": all_layers, **asdict(measured)})
            if json_file is not None:  # each time: the next one may take an hour, or all memory
                json_file.parent.mkdir(parents=True, exist_ok=True)
                json_file.write_text(json.dumps(document(runs), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
