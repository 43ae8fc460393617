"""What larger groups of int4 save and cost: ``python -m pocketlm_bench.groups CHECKPOINT --text FILE [--json FILE]``.

Each row exports the checkpoint to ONNX and measures bits per byte on the text; the first row is the reference on the
original weights.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pocketlm.bundle import open_bundle
from pocketlm.cli.console import note, reported
from pocketlm.machine import circumstances
from pocketlm.manifest import SchemeName
from pocketlm_bench.quality import Quality, run
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.quantization.schemes import GROUPS

__all__ = ["document", "measured_groups"]

RUNTIME = "onnx"
HEADS: tuple[SchemeName, ...] = ("int8", "int4")


def measured_groups(
    checkpoint: Path, text: str, windows: int, tokens: int
) -> Iterator[tuple[str, int | None, int, Quality]]:
    """``(head, group, bytes of the artifact, quality)``; group and size are None and 0 for the reference."""
    with TemporaryDirectory(prefix="pocketlm-groups-") as name:
        folder = Path(name)
        for head in HEADS:
            for group in GROUPS:
                note(f"head {head}, groups of {group}")
                options = ExportOptions(
                    targets=(RUNTIME,), head=head, group=group, store=folder / "store", verify=False, force=True
                )
                bundle = open_bundle(export_bundle(str(checkpoint), folder / "bundle", options).folder)
                size = sum(path.stat().st_size for path in (bundle.folder / RUNTIME).glob("model.onnx*"))
                reference, artifact = run(bundle, text, checkpoint, [RUNTIME], windows, tokens)
                if (head, group) == (HEADS[0], GROUPS[0]):
                    yield "-", None, 0, reference
                yield head, group, size, artifact


def document(checkpoint: Path, windows: int, tokens: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts and figures."""
    return {
        "kind": "groups",
        **circumstances(),
        "checkpoint": str(checkpoint),
        "windows": windows,
        "tokens": tokens,
        "rows": rows,
    }


def main(
    checkpoint: Path,
    text: Annotated[Path, typer.Option(help="UTF-8 text that the model was not trained on.")],
    windows: int = 64,
    tokens: int = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="Facts and figures.")] = None,
) -> None:
    """Print size, bits per byte and mean KL divergence for each size of group."""
    with reported(debug=False):
        rows = []
        for head, group, size, quality in measured_groups(
            checkpoint, text.read_text(encoding="utf-8"), windows, tokens
        ):
            rows.append({"head": head, "group": group, "bytes": size, **asdict(quality)})
            print(
                f"head {head:5} group {group or '-':>4} {size / 1e6:9.2f} MB {quality.bits_per_byte:9.4f} bits/byte "
                f"{quality.kl or 0:9.4f} KL",
                flush=True,
            )
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(document(checkpoint, windows, tokens, rows), indent=1)
            json_file.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
