"""The program ``pocketlm``."""

import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

import pocketlm
from pocketlm.cli import bench, chat, compare, devices, export, inspect, replay, run, store, verify
from pocketlm.cli.console import Interrupted, note

__all__ = ["app", "main"]

INTERRUPTED = 130

app = typer.Typer(
    name="pocketlm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One bundle of ONNX, ExecuTorch and Core ML artifacts from the checkpoint of a small language model.",
    epilog="Exit codes: 0 done; 1 a check failed; 2 bad usage or bad input; 3 not available here; 130 interrupted.",
)
app.command("export", epilog=export.EXAMPLE)(export.export)
app.command("verify", epilog=verify.EXAMPLE)(verify.verify)
app.command("inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
app.command("run", epilog=run.EXAMPLE)(run.run)
app.command("chat", epilog=chat.EXAMPLE)(chat.chat)
app.command("replay", epilog=replay.EXAMPLE)(replay.replay)
app.command("bench", epilog=bench.EXAMPLE)(bench.bench)
app.command("compare", epilog=compare.EXAMPLE)(compare.compare)
app.add_typer(devices.app, name="devices", epilog=devices.EXAMPLE)
app.command("store", epilog=store.EXAMPLE)(store.store)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pocketlm {pocketlm.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted


def main() -> None:
    """Run the command line; ends the process with the exit code of CONTRACT."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        app()
    except Interrupted:
        note("interrupted")
        sys.exit(INTERRUPTED)
