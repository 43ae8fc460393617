"""What every command shares: errors, interruption, progress on stderr, one JSON document on stdout."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketlm.errors import PocketLMError, printable

__all__ = [
    "Adapter",
    "Debug",
    "Interrupted",
    "Json",
    "Oracle",
    "Packed",
    "Runtime",
    "Threads",
    "note",
    "print_json",
    "reported",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", metavar="R", help="executorch, onnx or coreml; default: the first that is installed."),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="PEFT_FOLDER", help="A LoRA adapter, merged into the checkpoint."),
]
Oracle = Annotated[
    str | None,
    typer.Option("--oracle", metavar="NAME", help="Compare with transformers on the original checkpoint."),
]
Packed = Annotated[
    bool,
    typer.Option(
        "--packed", help="Map packed weights from a file, made at the first run: less memory. Not for coreml."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads of the runtime.")]


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt: the option parser would swallow that one."""


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Mapping[str, Any]) -> None:
    """The one document of ``--json``."""
    print(json.dumps(document, indent=1, ensure_ascii=False))


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn an error into one line on stderr and its exit code; with ``debug`` the traceback comes first."""
    try:
        yield
    except PocketLMError as error:
        _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:
        # The reader of our output has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", 2, debug)
    except MemoryError:
        _fail("not enough memory", 1, debug)
    except Exception as error:  # noqa: BLE001  the last resort of a program: an unexpected error is a line too
        _fail(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    note(f"error: {printable(message)}")
    raise typer.Exit(code)
