"""Which rows of the table a runtime refuses, and with what words: data that tests check and the README's table shows.

An entry holds for as long as the export raises :class:`pocketlm.UnsupportedError` with these words; a refusal that is
lifted makes a test fail until its entry is gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.tiny_models import Row

__all__ = ["REFUSALS", "Refusal", "refusal_of"]

SCHEMES = ("fp32", "int8", "int4")


@dataclass(frozen=True)
class Refusal:
    """``runtime`` refuses ``rows``, names of rows or of architectures, in ``schemes``; ``words`` are in its message."""

    runtime: str
    rows: Sequence[str]
    words: str
    schemes: Sequence[str] = SCHEMES


REFUSALS = (
    # QMoE has one block size and one width for all matrices of a kind: a width that no block divides is kept in int8.
    Refusal("onnx", ("mixtral-window",), "matrices of its layer's experts must have one scheme", ("int4",)),
    # SparseAttention's kernel has sizes of its own; released models have 64.
    Refusal("onnx", ("phi3small-odd-blocks",), "sparse blocks of 5 positions are not supported"),
)


def refusal_of(row: Row, runtime: str, scheme: str) -> Refusal | None:
    """The entry that says that ``row`` is refused; None if it has to run."""
    found = [
        refusal
        for refusal in REFUSALS
        if refusal.runtime == runtime and scheme in refusal.schemes and {row.name, row.model_type} & set(refusal.rows)
    ]
    assert len(found) <= 1, f"{row.name}, {runtime}, {scheme}: {len(found)} entries"
    return found[0] if found else None
