"""``--record``: what ``run`` and ``chat`` generate, kept in a session file."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketlm.cli.console import note
from pocketlm.errors import InputError

if TYPE_CHECKING:
    from pocketlm.bundle import Bundle
    from pocketlm.generate import Observer
    from pocketlm.session import Session

__all__ = ["Record", "recorded", "recorded_seed"]

Record = Annotated[
    Path | None,
    typer.Option("--record", metavar="FILE", help="Keep prompt, tokens and top logits, for pocketlm replay."),
]


@contextmanager
def recorded(path: Path | None, bundle: "Bundle", session: "Session") -> Iterator["Observer | None"]:
    """What to hand to a generation. The file is written in the end, however that comes, if there was a token."""
    if path is None:
        yield None
        return
    from pocketlm.replaying.recorder import Recorder

    if path.is_dir():
        raise InputError(f"{path}: is a folder: --record takes the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(bundle, session.runtime)
    try:
        yield recorder
    finally:
        if recorder.steps:
            recorder.save(path)
            note(f"recorded {recorder.steps} steps: {path}")


def recorded_seed(seed: int | None, path: Path | None) -> int | None:
    """A recorded session names its seed, so that the same can be generated again."""
    return secrets.randbits(32) if path is not None and seed is None else seed
