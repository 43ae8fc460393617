"""A row of the table of tiny models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CONTEXT", "Row"]

CONTEXT = 160


@dataclass(frozen=True)
class Row:
    """One tiny model. ``outlier`` scales norms and projections so that residual channels reach about that value;
    ``context`` is what is exported, None the model's own."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    dtype: str = "bfloat16"
    outlier: float | None = None
    context: int | None = None
