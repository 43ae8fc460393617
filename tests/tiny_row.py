"""A row of the table of tiny models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CONTEXT", "Row"]

CONTEXT = 160


@dataclass(frozen=True)
class Row:
    """One tiny model. ``outlier`` scales norms and projections so that residual channels reach about that value;
    ``residual`` (of a Gemma) is about what each of its halves of a layer adds to one; ``context`` is what is exported,
    None the model's own."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    dtype: str = "bfloat16"
    outlier: float | None = None
    residual: float | None = None
    context: int | None = None
