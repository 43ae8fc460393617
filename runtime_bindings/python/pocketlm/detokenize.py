"""Text of tokens as they come, without broken characters."""

from collections.abc import Sequence

from pocketlm.tokenizer import Tokenizer

__all__ = ["Detokenizer"]

_CONTEXT = 16  # tokens before the first that can decide about a leading space or the rest of a character


class Detokenizer:
    """Turns tokens into text one at a time: all that it gives, joined, is what decoding them at once gives.

    Text is held back only while later tokens can still change it: an unfinished UTF-8 character, or a run of byte
    fallback tokens, which the decoder takes as a whole. The cost of a token doesn't grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        """``context``: tokens before the first one, whose text the result continues (a leading space stays then)."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        # The window begins with settled tokens, so that rules for the start of a text don't hit the middle of it.
        start = max(0, len(context) - _CONTEXT)
        while start > 0 and context[start] in tokenizer.byte_ids:
            start -= 1
        self._window = [token for token in context[start:] if self._has_text(token)]
        self._settled = len(self._window)
        self._given = len(self._decode().rstrip("\ufffd"))

    def push(self, token: int) -> str:
        """Append a token; return the text that is certain now, maybe none."""
        if not self._has_text(token):
            return ""
        self._window.append(token)
        if token in self._tokenizer.byte_ids:
            return ""
        text = self._decode()
        if text.endswith("\ufffd"):
            new = text[self._given : -1]
            self._given = max(self._given, len(text) - 1)
            return new
        new = text[self._given :]
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._given = len(self._decode())
        return new

    def finish(self) -> str:
        """The text that was held back, as it stands."""
        rest = self._decode()[self._given :]
        self._given += len(rest)
        return rest

    def _has_text(self, token: int) -> bool:
        return token not in self._skipped and self._tokenizer.token(token) is not None

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)
