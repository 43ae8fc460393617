"""Stop strings in a stream of text pieces."""

from collections.abc import Sequence

from pocketlm.errors import InputError

__all__ = ["StopStrings"]


class StopStrings:
    """Passes text on until one of the strings is complete, wherever the pieces are cut.

    The string that completes first ends the text, before its own first character; of two that complete together the
    longer one. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, strings: str | Sequence[str] = ()) -> None:
        self._strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not all(isinstance(string, str) and string for string in self._strings):
            raise InputError("a stop string must be a non-empty string")
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take the next piece; return what is safe to show. Nothing follows once ``matched`` is set."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(string), start, string) for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text held back, once no piece follows."""
        rest, self._held = self._held, ""
        return rest

    def _possible_beginning(self, text: str) -> int:
        longest = max((len(string) for string in self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
