"""``pocketlm devices``: what a bundle can run on here, and what has to be set up first."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pocketlm.cli.console import Debug, Json, note, print_json, reported

if TYPE_CHECKING:
    from pocketlm.devices.arm64_system.progress import Progress

__all__ = ["EXAMPLE", "app"]

EXAMPLE = "Example: pocketlm devices --json"
CLEAN_EXAMPLE = "Example: pocketlm devices clean adb:R5CT30ABCDE"
SETUP_EXAMPLE = "Example: pocketlm devices setup qemu:arm64"

app = typer.Typer(invoke_without_command=True, epilog=EXAMPLE)


@app.callback()
def devices(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List what a bundle can run on: this host, an emulated CPU, attached phones."""
    if context.invoked_subcommand is not None:
        return
    with reported(debug):
        from pocketlm.cli.description import print_table
        from pocketlm.devices import find_devices

        found = list(find_devices())
        if json:
            print_json({"devices": [asdict(device) for device in found]})
            return
        rows = []
        for device in found:
            rows.append((device.address, f"{device.state}: {device.description}"))
            if device.advice:
                rows.append(("", device.advice))
        print_table(rows)


@app.command("setup", epilog=SETUP_EXAMPLE)
def setup(
    address: Annotated[str, typer.Argument(metavar="DEVICE", help="qemu:arm64: the emulated CPUs, all of them.")],
    anew: Annotated[
        bool, typer.Option("--anew", help="Make everything again, from the packages as they are now.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make an emulated device from Debian's and PyPI's packages in the user's cache; it needs no root."""
    with reported(debug):
        from pocketlm.cli.description import print_table
        from pocketlm.devices import set_up_device

        started = time.monotonic()
        with _set_up_progress() as progress:
            parts = set_up_device(address, progress, anew=anew)
        seconds = time.monotonic() - started
        if json:
            print_json({"device": address, "seconds": seconds, "parts": {n: dict(c) for n, c in parts.items()}})
            return
        print_table(
            (name, ", ".join(f"{what} {version.partition(' sha256:')[0]}" for what, version in contents.items()))
            for name, contents in parts.items()
        )
        note(f"{address} is set up: {seconds:.0f} s; pocketlm devices lists it")


@app.command("clean", epilog=CLEAN_EXAMPLE)
def clean(
    address: Annotated[str, typer.Argument(metavar="DEVICE", help="As pocketlm devices lists it.")],
    debug: Debug = False,
) -> None:
    """Remove from a device what was pushed to it: artifacts, the agent, packed weights."""
    with reported(debug):
        from pocketlm.devices import open_device

        with open_device(address) as device:
            device.clean()
        note(f"{address} holds nothing of PocketLM")


@contextmanager
def _set_up_progress() -> Iterator["Progress"]:
    """A bar for what comes in bytes on a terminal, a line a stage elsewhere."""
    from pocketlm.devices.arm64_system.progress import Progress

    if not sys.stderr.isatty():
        yield Progress(stage=lambda name, _bytes: note(name))
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def end_stage() -> None:
            if bars.task_ids:
                task = bars.tasks[-1]
                bars.update(task.id, total=task.total or 1, completed=task.total or 1)
                bars.stop_task(task.id)

        def stage(name: str, size: int) -> None:
            end_stage()
            bars.add_task(name, total=size or None)

        yield Progress(stage=stage, advance=lambda size: bars.advance(bars.task_ids[-1], size))
        end_stage()
