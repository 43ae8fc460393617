"""``pocketlm chat``: a conversation in the terminal."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketlm.cli.console import Debug, Interrupted, Packed, Runtime, Threads, note, reported
from pocketlm.cli.recording import Record, recorded, recorded_seed
from pocketlm.cli.run import describe_session
from pocketlm.cli.sampling_options import MaxNewTokens, MinP, RepetitionPenalty, Seed, Temperature, TopK, TopP
from pocketlm.errors import ContextLengthError, UnsupportedError

if TYPE_CHECKING:
    from pocketlm.session import Session

__all__ = ["EXAMPLE", "chat"]

EXAMPLE = "Example: pocketlm chat smollm2.pocketlm --system 'You are terse.'"


def chat(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE")],
    runtime: Runtime = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message at the start.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    threads: Threads = None,
    packed: Packed = False,
    record: Record = None,
    debug: Debug = False,
) -> None:
    """Talk to the model. /exit or Ctrl-D ends it, /reset starts anew, Ctrl-C stops an answer."""
    with reported(debug):
        import pocketlm

        opened = pocketlm.open(bundle)
        if opened.chat_template is None:
            raise UnsupportedError(f"{bundle}: this model has no chat template: use pocketlm run")
        with (
            opened.session(runtime, threads=threads, packed=packed) as session,
            recorded(record, opened, session) as observer,
        ):
            options = {
                "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": recorded_seed(seed, record),
                "observer": observer,
            }  # fmt: skip
            note(f"runtime: {describe_session(session)}; /exit or Ctrl-D ends, /reset starts anew")
            _converse(session, [] if system is None else [{"role": "system", "content": system}], options)


def _converse(session: "Session", opening: list[dict[str, str]], options: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    messages = list(opening)
    while True:
        try:
            line = console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                messages = list(opening)
                continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(session, messages, options)
        except ContextLengthError as error:
            note(f"error: {error}; /reset starts anew")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(session: "Session", messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
    import pocketlm

    texts: list[str] = []
    pieces = pocketlm.chat(session, messages, **options)
    try:
        for piece in pieces:
            texts.append(piece.text)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            if piece.finish_reason == "context":
                note("\nthe context is full; /reset starts anew")
    except Interrupted:
        note("")  # the answer so far stays part of the conversation
    print(flush=True)
    return "".join(texts)
