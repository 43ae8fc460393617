"""``pocketlm run``: one completion."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketlm.cli.console import Debug, Json, Packed, Runtime, Threads, note, print_json, reported
from pocketlm.cli.recording import Record, recorded, recorded_seed
from pocketlm.cli.sampling_options import MaxNewTokens, MinP, RepetitionPenalty, Seed, Stop, Temperature, TopK, TopP
from pocketlm.errors import InputError

if TYPE_CHECKING:
    from pocketlm.generate import Piece
    from pocketlm.session import Session

__all__ = ["EXAMPLE", "describe_session", "run"]

EXAMPLE = "Example: pocketlm run smollm2.pocketlm --prompt 'What is the capital of France?' --temperature 0"


def run(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE")],
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT|@FILE", help="The prompt, or the file that holds it.")
    ],
    runtime: Runtime = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message before it.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    threads: Threads = None,
    packed: Packed = False,
    record: Record = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt, streamed to stdout."""
    with reported(debug):
        import pocketlm

        text = _read_prompt(prompt)
        opened = pocketlm.open(bundle)
        templated = not raw and opened.chat_template is not None
        if system is not None and not templated:
            raise InputError("--system needs the chat template: " + ("drop --raw" if raw else "this model has none"))
        if not raw and not templated:
            note("this model has no chat template: the prompt is continued as it is")
        with (
            opened.session(runtime, threads=threads, packed=packed) as session,
            recorded(record, opened, session) as observer,
        ):
            note(f"runtime: {describe_session(session)}")
            options: dict[str, Any] = {
                "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": recorded_seed(seed, record),
                "stop": stop or (), "observer": observer,
            }  # fmt: skip
            if templated:
                messages = [{"role": "user", "content": text}]
                if system is not None:
                    messages.insert(0, {"role": "system", "content": system})
                pieces = pocketlm.chat(session, messages, **options)
            else:
                pieces = pocketlm.generate(session, text, **options)
            if json:
                _print_document(session, pieces)
            else:
                _stream(pieces)


def describe_session(session: "Session") -> str:
    """The runtime in words. What computes off a Mac in Core ML's place says so itself."""
    return getattr(session, "description", session.runtime)


def _read_prompt(prompt: str) -> str:
    if not prompt.startswith("@"):
        return prompt
    path = Path(prompt[1:])
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error


def _stream(pieces: "Iterator[Piece]") -> None:
    text = ""
    for piece in pieces:
        text = piece.text or text
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    if not text.endswith("\n"):
        print()


def _print_document(session: "Session", pieces: "Iterator[Piece]") -> None:
    started = time.perf_counter()
    prompt_tokens, texts, tokens, reason = 0, [], [], None
    for piece in pieces:
        prompt_tokens = prompt_tokens or session.position
        texts.append(piece.text)
        tokens.append(piece.token)
        reason = piece.finish_reason
    print_json(
        {
            "runtime": session.runtime,
            "description": describe_session(session),
            "text": "".join(texts),
            "tokens": tokens,
            "finish_reason": reason,
            "prompt_tokens": prompt_tokens,
            "seconds": round(time.perf_counter() - started, 3),
        }
    )
