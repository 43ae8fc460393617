"""The progress of an export on stderr: a bar on a terminal, a line a stage elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pocketlm.cli.console import note

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from pocketlm_export.pipeline import Progress

__all__ = ["export_progress"]

LABELS = {
    "read": "reading the checkpoint",
    "quantize": "quantizing",
    "golden": "golden vectors",
    "finish": "hashing",
}
VERBS = {"write": "writing", "read": "reading", "verify": "verifying", "run": "running"}


@contextmanager
def export_progress() -> Iterator["Progress"]:
    """What to hand to an export."""
    from pocketlm_export.pipeline import Progress

    if not sys.stderr.isatty():
        yield Progress(stage=_print_stage)
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def stage(name: str, elements: int) -> None:
            _complete(bars)
            bars.add_task(_label(name), total=elements or None)

        def advance(_name: str, elements: int) -> None:
            bars.advance(bars.task_ids[-1], elements)

        yield Progress(stage=stage, advance=advance)
        _complete(bars)


def _complete(bars: "Bars") -> None:
    if bars.task_ids:
        task = bars.tasks[-1]
        bars.update(task.id, total=task.total or 1, completed=task.total or 1)
        bars.stop_task(task.id)


def _print_stage(name: str, elements: int) -> None:
    note(_label(name) + (f" ({elements:,} values)" if elements else ""))


def _label(name: str) -> str:
    verb, _, rest = name.partition(" ")
    return LABELS.get(name) or f"{VERBS[verb]} {rest}"
