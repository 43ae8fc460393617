"""Every error that PocketLM raises on purpose.

    PocketLMError
    ├── InputError              what was given can't be used          exit code 2
    │   ├── CheckpointError       a checkpoint's file, key or tensor
    │   ├── BundleError           a bundle's file or manifest
    │   ├── UnsupportedError      valid, but not supported: names what, and what is
    │   ├── TemplateError         a chat template that can't be rendered
    │   └── ContextLengthError    more tokens than the exported context holds
    ├── CheckError              a check ran and failed                exit code 1
    └── UnavailableError        a runtime or a device isn't here      exit code 3

A message says what is wrong, in which file and tensor or key, what is valid, and what to do next.
"""

__all__ = [
    "BundleError",
    "CheckError",
    "CheckpointError",
    "ContextLengthError",
    "InputError",
    "PocketLMError",
    "TemplateError",
    "UnavailableError",
    "UnsupportedError",
    "printable",
]


LONGEST_MESSAGE = 1000


def printable(text: str) -> str:
    """``text`` on one line of bounded length, control characters escaped: names from files can hold anything."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "…"


class PocketLMError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is the command line's. Its message is :func:`printable`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class InputError(PocketLMError):
    """Something that was given can't be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint's file, key or tensor is missing, malformed or inconsistent."""


class BundleError(InputError):
    """A bundle's file is missing, altered or malformed, or its format is unknown."""


class UnsupportedError(InputError):
    """A valid request that isn't supported; the message names what is."""


class TemplateError(InputError):
    """A chat template is malformed, refuses the messages, or does not end."""


class ContextLengthError(InputError):
    """The tokens would pass the exported context length."""


class CheckError(PocketLMError):
    """A check ran and failed; the message names it."""

    exit_code = 1


class UnavailableError(PocketLMError):
    """A runtime or device isn't installed or attached here."""

    exit_code = 3
