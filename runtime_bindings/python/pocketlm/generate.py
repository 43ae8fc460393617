"""A prompt continued, one token at a time, over any session."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pocketlm.detokenize import Detokenizer
from pocketlm.errors import ContextLengthError, InputError, PocketLMError
from pocketlm.sampling import Sampler, Sampling
from pocketlm.session import Session, TextBundle
from pocketlm.stop import StopStrings
from pocketlm.tokenizer import Tokenizer

__all__ = ["FinishReason", "Observer", "Piece", "generate"]

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """One token of an answer."""

    text: str
    """What is certain of the text now; empty while a character or a possible stop string is incomplete."""
    token: int
    finish_reason: FinishReason | None
    """Of the last piece: ``stop`` (a stop id or stop string), ``length`` (``max_new_tokens``) or ``context`` (full)."""


class Observer:
    """Sees a generation while it runs. This one looks away; a subclass overrides what it wants to see."""

    def begin(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Before the first token: the whole prompt, and how tokens are chosen."""

    def step(self, logits: npt.NDArray[np.float32], token: int) -> None:
        """After each token: float32 ``[vocabulary]`` logits as the model gave them, and what was chosen."""

    def end(self, reason: FinishReason) -> None:
        """After the last token; not if the generation was broken off."""


@dataclass(frozen=True)
class Request:
    """A validated generation."""

    prompt: Sequence[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    max_new_tokens: int | None
    continues_prompt: bool
    """Whether the text continues the prompt's (a completion), or stands alone (an answer in a chat)."""
    observer: Observer


def generate(
    session_or_bundle: Session | TextBundle,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    observer: Observer | None = None,
) -> Iterator[Piece]:
    """Continue ``prompt``, a text or token ids, without a template; a piece per token.

    A session keeps what it has in common with the prompt from its start on and runs only the rest; a bundle gets a
    session of its own that is closed in the end. Sampling that is None comes from the model's generation_config.json
    (:meth:`Sampling.resolve`); without ``max_new_tokens`` it goes on to a stop or the end of the context. A stop id or
    stop string is not part of the text. Closing the iterator, or Ctrl-C, leaves the session usable at its ``position``.
    ``observer`` sees every step's logits, as :class:`pocketlm.replaying.recorder.Recorder` does.

    Raises :class:`InputError` for bad options, :class:`ContextLengthError` if the prompt doesn't fit.
    """
    bundle = bundle_of(session_or_bundle)
    if isinstance(prompt, str):
        tokens = bundle.tokenizer.encode(prompt, add_special_tokens=True)
    else:
        tokens = [int(token) for token in prompt]
    sampling = Sampling.resolve(
        bundle.default_sampling,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return stream(
        session_or_bundle,
        tokens,
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        continues_prompt=True,
        observer=observer,
    )


def bundle_of(session_or_bundle: Session | TextBundle) -> TextBundle:
    """The bundle itself, or the session's; :class:`InputError` if there is none."""
    if not isinstance(session_or_bundle, Session):
        if not callable(getattr(session_or_bundle, "session", None)):
            raise InputError(f"expected a session or a bundle, not {type(session_or_bundle).__name__}")
        return session_or_bundle
    if session_or_bundle.bundle is None:
        raise InputError("this session has no bundle, so no tokenizer: make it by bundle.session()")
    return session_or_bundle.bundle


def stream(
    session_or_bundle: Session | TextBundle,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int | None,
    stop: str | Sequence[str],
    continues_prompt: bool,
    observer: Observer | None,
) -> Iterator[Piece]:
    """The pieces that follow the prompt's tokens; what is wrong with the request is raised here, before the first."""
    if not prompt:
        raise InputError("the prompt has no tokens")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    StopStrings(strings)
    bundle = bundle_of(session_or_bundle)
    request = Request(
        prompt, sampling, bundle.stop_ids, strings, max_new_tokens, continues_prompt, observer or Observer()
    )
    if isinstance(session_or_bundle, Session):
        _refuse_long(session_or_bundle, prompt)
    return _stream(session_or_bundle, bundle.tokenizer, request)


def _stream(session_or_bundle: Session | TextBundle, tokenizer: Tokenizer, request: Request) -> Iterator[Piece]:
    with _session_of(session_or_bundle) as session:
        _refuse_long(session, request.prompt)
        yield from _pieces(session, tokenizer, request)


def _pieces(session: Session, tokenizer: Tokenizer, request: Request) -> Iterator[Piece]:
    sampler = Sampler(request.sampling)
    detokenizer = Detokenizer(tokenizer, context=request.prompt if request.continues_prompt else ())
    strings = StopStrings(request.stop)
    history = list(request.prompt)
    request.observer.begin(request.prompt, request.sampling)
    logits = _prefill(session, request.prompt)
    while True:
        token = sampler.sample(logits, history)
        history.append(token)
        request.observer.step(logits, token)
        text = "" if token in request.stop_ids else strings.feed(detokenizer.push(token))
        reason: FinishReason | None = None
        if token in request.stop_ids or strings.matched is not None:
            reason = "stop"
        elif len(history) - len(request.prompt) == request.max_new_tokens:
            reason = "length"
        elif session.position == session.context_length:
            reason = "context"
        if reason is not None:
            request.observer.end(reason)
            text += strings.feed(detokenizer.finish()) + strings.finish()
            yield Piece(text, token, reason)
            return
        yield Piece(text, token, None)
        if session.position != len(history) - 1:
            raise PocketLMError("the session was used by another call while this generation ran")
        logits = session.extend([token])[0]


def _prefill(session: Session, prompt: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Logits after the prompt; what the session already holds of it is not run again, but for its last token."""
    shared = 0
    for held, token in zip(session.tokens, prompt[:-1], strict=False):
        if held != token:
            break
        shared += 1
    if shared < session.position:
        session.rewind(shared)
    return session.extend(prompt[session.position :])[0]


@contextmanager
def _session_of(session_or_bundle: Session | TextBundle) -> Iterator[Session]:
    if isinstance(session_or_bundle, Session):
        yield session_or_bundle
    else:
        with session_or_bundle.session() as session:
            yield session


def _refuse_long(session: Session, prompt: Sequence[int]) -> None:
    if len(prompt) > session.context_length:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens, the context holds {session.context_length}; "
            "shorten it, or export with a larger --context"
        )
