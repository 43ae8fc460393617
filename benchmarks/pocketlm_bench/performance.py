"""Measurements as tables in a page: ``python -m pocketlm_bench.performance PAGE RESULTS.json...``.

RESULTS are what ``pocketlm_bench.export``, ``groups``, ``memory_curve`` and ``models`` write with --json. A table
stands between the page's markers of its file's name: ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketlm.cli.console import reported
from pocketlm.errors import InputError
from pocketlm_bench.page import insert

__all__ = ["lines"]

Document = Mapping[str, Any]
MB, GB = 1e6, 1e9


def lines(document: Document) -> Iterator[str]:
    """How it was measured, then the tables. Raises :class:`InputError` for a document of another kind."""
    if document.get("kind") not in TABLES:
        raise InputError(f"kind {document.get('kind')!r} has no table; valid: {', '.join(TABLES)}")
    machine = document["machine"]
    yield f"`{document['command']}`"
    yield ""
    yield (
        f"{document['date']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine.get('features') or 'no known features'}; load average {document['load_average']:.1f} at the end."
    )
    yield ""
    yield from TABLES[document["kind"]](document)


def _export(document: Document) -> Iterator[str]:
    exports = document["exports"]
    states: dict[str, list[Document]] = {}
    for run in exports:
        states.setdefault(run["store"], []).append(run)
    targets = list(exports[0]["artifacts"])
    yield (
        "| store | wall, s | CPU, s | s per 1e9 parameters | peak memory, GB | anonymous | file-backed "
        f"| {' | '.join(f'{target}, MB' for target in targets)} |"
    )
    yield "|---" * (7 + len(targets)) + "|"
    for state, runs in states.items():
        wall = [run["wall_seconds"] for run in runs]
        sizes = (f"{sum(runs[0]['artifacts'][target].values()) / MB:.1f}" for target in targets)
        yield (
            f"| {state} | {statistics.median(wall):.1f} ({min(wall):.1f} to {max(wall):.1f}) "
            f"| {statistics.median(run['user_seconds'] + run['system_seconds'] for run in runs):.1f} "
            f"| {_median(runs, 'seconds_per_billion'):.1f} | {_median(runs, 'highest_resident') / GB:.2f} "
            f"| {_peak(runs, 'anonymous', GB, 2)} | {_peak(runs, 'file_backed', GB, 2)} | {' | '.join(sizes)} |"
        )
    for state, runs in states.items():
        yield ""
        yield f"| store {state} | wall, s | of it imports, s | CPU, s | anonymous, MB | file-backed, MB |"
        yield "|---|---|---|---|---|---|"
        for stages in zip(*(run["stages"] for run in runs), strict=True):
            seconds = (_cell(stages, name) for name in ("wall_seconds", "import_seconds", "cpu_seconds"))
            yield (
                f"| {stages[0]['name']} | {' | '.join(seconds)} "
                f"| {_peak(stages, 'anonymous', MB, 0)} | {_peak(stages, 'file_backed', MB, 0)} |"
            )


def _curve(document: Document) -> Iterator[str]:
    yield f"| layers of {document['shape']} | 1e9 parameters | wall, s | peak memory, GB | anonymous | file-backed |"
    yield "|---|---|---|---|---|---|"
    for run in document["exports"]:
        yield (
            f"| {run['layers']} | {run['parameters'] / 1e9:.2f} | {run['wall_seconds']:.0f} "
            f"| {run['highest_resident'] / GB:.2f} | {_peak([run], 'anonymous', GB, 2)} "
            f"| {_peak([run], 'file_backed', GB, 2)} |"
        )


def _groups(document: Document) -> Iterator[str]:
    yield f"{document['windows']} windows of {document['tokens']} tokens."
    yield ""
    yield "| embedding and head | group | ONNX, MB | bits per byte | mean KL from the original weights |"
    yield "|---|---|---|---|---|"
    for row in document["rows"]:
        size = f"{row['bytes'] / MB:.2f}" if row["bytes"] else "original weights"
        yield f"| {row['head']} | {row['group'] or '-'} | {size} | {row['bits_per_byte']:.4f} | {row['kl']:.4f} |"


def _models(document: Document) -> Iterator[str]:
    targets = document["targets"]
    sizes = " | ".join(f"{target}, MB" for target in targets)
    yield f"| shape | layers | 1e9 parameters | wall, s | s per 1e9 | peak memory, GB | anonymous | {sizes} |"
    yield "|---" * (7 + len(targets)) + "|"
    for run in document["exports"]:
        whole = run["layers"] == run["all_layers"]
        layers = f"{run['layers']}" if whole else f"{run['layers']} of {run['all_layers']}"
        billions = run["parameters"] / 1e9
        artifacts = " | ".join(
            f"{sum(run['artifacts'][target].values()) / MB:,.0f}" if target in run["artifacts"] else "refused"
            for target in targets
        )
        yield (
            f"| {run['shape']} | {layers} | {billions:.2f} | {run['wall_seconds']:.0f} "
            f"| {run['wall_seconds'] / billions:.1f} | {run['highest_resident'] / GB:.2f} "
            f"| {_peak([run], 'anonymous', GB, 2)} | {artifacts} |"
        )


TABLES: Mapping[str, Callable[[Document], Iterator[str]]] = {
    "export": _export,
    "memory curve": _curve,
    "groups": _groups,
    "models": _models,
}


def _median(runs: Sequence[Document], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def _cell(stages: Sequence[Document], name: str) -> str:
    """The median of what was measured."""
    known = [stage[name] for stage in stages if stage[name] is not None]
    return f"{statistics.median(known):.2f}" if known else "-"


def _peak(measured: Sequence[Document], name: str, divisor: float, digits: int) -> str:
    known = [item["peak"][name] / divisor for item in measured if item["peak"] is not None]
    return f"{statistics.median(known):.{digits}f}" if known else "-"


def main(
    page: Path, results: Annotated[list[Path], typer.Argument(metavar="RESULTS", help="JSON files of measurements.")]
) -> None:
    """Write the tables of RESULTS into PAGE."""
    with reported(debug=False):
        text = page.read_text(encoding="utf-8")
        for path in results:
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path}: not valid JSON: {error}") from error
            text = insert(text, path.stem, list(lines(document)))
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
