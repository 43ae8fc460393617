"""Regular expressions of a stranger: only those whose search can't take long."""

import re
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import CheckpointError

__all__ = ["Pattern"]

LONGEST = 200
# Two open-ended parts at most, and no repeated group: the time is polynomial in a name's length, of low degree.
MOST_REPETITIONS = 2
REPEATED = re.compile(r"[*+?{]")
REPEATED_GROUP = re.compile(r"\)[*+?{]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """An expression under ``key`` of ``path`` that is searched in the names of modules.

    Raises :class:`CheckpointError` for one that is malformed, or could take long.
    """

    text: str
    path: Path
    key: str

    def __post_init__(self) -> None:
        repetitions = len(REPEATED.findall(self.text.replace("(?:", "(")))
        if len(self.text) > LONGEST or repetitions > MOST_REPETITIONS or REPEATED_GROUP.search(self.text):
            raise CheckpointError(f"{self.path}: {self.key!r}: the expression {self.text[:60]!r} is too complex")
        try:
            re.compile(self._whole)
        except (re.error, OverflowError) as error:
            raise CheckpointError(
                f"{self.path}: {self.key!r}: {self.text[:60]!r} is not a regular expression: {error}"
            ) from error

    @property
    def _whole(self) -> str:
        return rf"(.*\.)?({self.text})$"

    def matches_end(self, module: str) -> bool:
        """Whether the expression matches from a dot, or from the beginning, to the end of ``module``."""
        return re.match(self._whole, module) is not None
