"""A session: tokens in, logits out, over one runtime. The one contract that runtimes implement."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt

from pocketlm.errors import ContextLengthError, InputError, PocketLMError

if TYPE_CHECKING:
    from pocketlm.template import ChatTemplate
    from pocketlm.tokenizer import Tokenizer

__all__ = ["Session", "TextBundle"]


class TextBundle(Protocol):
    """What generating text needs of a bundle."""

    @property
    def tokenizer(self) -> "Tokenizer": ...

    @property
    def chat_template(self) -> "ChatTemplate | None": ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation."""

    @property
    def default_sampling(self) -> Mapping[str, object]:
        """The stated keys of generation_config.json, ``do_sample`` among them."""

    def session(self) -> "Session":
        """A fresh session over the runtime of first choice, whose ``bundle`` is this one."""


class Session(ABC):
    """A growing sequence of tokens with its key/value cache.

    A runtime subclasses this and implements :meth:`_run`, and :meth:`_close` where it holds something.
    One thread owns a session: a call from a second thread while one runs raises :class:`PocketLMError`.
    """

    def __init__(
        self, *, runtime: str, context_length: int, vocabulary_size: int, longest_call: int, rows: int
    ) -> None:
        """``longest_call`` is the most tokens that one :meth:`_run` takes, ``rows`` the most logits it returns."""
        self.runtime = runtime
        self.context_length = context_length
        self.vocabulary_size = vocabulary_size
        self._longest_call = longest_call
        self._rows = rows
        self.tokens: list[int] = []
        """What the cache holds; only the session changes it."""
        self.bundle: TextBundle | None = None
        """Where the session comes from: tokenizer, template, stop ids; None for a session made by hand."""
        self._closed = False
        self._busy = threading.Lock()

    @property
    def position(self) -> int:
        """How many tokens the cache holds."""
        return len(self.tokens)

    def extend(self, token_ids: Sequence[int], *, logits: int = 1) -> npt.NDArray[np.float32]:
        """Append tokens; return float32 ``[logits, vocabulary_size]`` for the last ``logits`` of them.

        Raises :class:`ContextLengthError` if they don't fit, :class:`InputError` for an empty list, an id outside
        the vocabulary, or ``logits`` outside ``0..len(token_ids)``. The cache is unchanged then.
        """
        tokens = np.asarray(token_ids, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise InputError("extend needs a non-empty list of token ids")
        if not 0 <= logits <= tokens.size:
            raise InputError(f"logits must be between 0 and the {tokens.size} tokens given, not {logits}")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary_size:
            bad = int(tokens[(tokens < 0) | (tokens >= self.vocabulary_size)][0])
            raise InputError(f"token id {bad} is outside the model's vocabulary of {self.vocabulary_size}")
        if self.position + tokens.size > self.context_length:
            raise ContextLengthError(
                f"{self.position} + {tokens.size} tokens exceed the context of {self.context_length}; "
                "shorten the prompt, or export with a larger --context"
            )
        with self._owned():
            self._refuse_closed()
            return self._extend(tokens, logits)

    def _extend(self, tokens: npt.NDArray[np.int64], logits: int) -> npt.NDArray[np.float32]:
        silent = tokens.size - logits
        kept: list[npt.NDArray[np.float32]] = []
        start = 0
        while start < tokens.size:
            first = max(silent, start)
            stop = min(start + self._longest_call, tokens.size, first + self._rows)
            rows = max(0, stop - first)
            result = self._run(tokens[start:stop], self.position, rows)
            self.tokens += tokens[start:stop].tolist()
            if rows:
                kept.append(result)
            start = stop
        return np.concatenate(kept) if kept else np.empty((0, self.vocabulary_size), np.float32)

    def rewind(self, position: int) -> None:
        """Keep the first ``position`` tokens and forget the rest. Raises :class:`InputError` if it is ahead."""
        with self._owned():
            self._refuse_closed()
            if not 0 <= position <= self.position:
                raise InputError(f"can't rewind to {position}: the session holds {self.position} tokens")
            del self.tokens[position:]

    def close(self) -> None:
        """Free the runtime's memory; a closed session refuses every call."""
        with self._owned():
            if not self._closed:
                self._closed = True
                self._close()

    @contextmanager
    def _owned(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise PocketLMError("this session is busy in another thread; a session belongs to one thread")
        try:
            yield
        finally:
            self._busy.release()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise PocketLMError("this session is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _run(self, tokens: npt.NDArray[np.int64], position: int, rows: int) -> npt.NDArray[np.float32]:
        """Run int64 ``[n]`` tokens from ``position`` on; return the logits of the last ``rows`` of them.

        ``1 <= n <= longest_call`` and ``0 <= rows <= self._rows``. Returns float32 ``[rows, vocabulary_size]``, a copy
        that stays valid after the next call; what it returns for no rows is not looked at.
        """

    @abstractmethod
    def _close(self) -> None:
        """Release what the runtime holds."""
