"""Figures in a page of the documentation: they stand between markers, and a command writes them anew."""

import re
from collections.abc import Sequence

from pocketlm.errors import InputError

__all__ = ["insert"]


def insert(page: str, name: str, lines: Sequence[str]) -> str:
    """``page`` with ``lines`` between the markers of ``name``. Raises :class:`InputError` if it has none."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(page):
        raise InputError(f"no markers of {name!r} in the page")
    return pattern.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], page)
