"""Faults of block-sparse attention in a written .pte: its two tables of blocks."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pocketlm.manifest import Manifest
from pocketlm_export.backends.executorch.reading.attention import layer_attentions
from pocketlm_export.backends.executorch.reading.pte import PteFile
from tests.verify.executorch_faults import replace_arguments
from tests.verify.executorch_rewriting import Rewriting
from tests.verify.fault_places import Place, chosen_layers
from tests.verify.sparse_blocks import WRONG

__all__ = ["FAULTS", "places"]


def places(_fault: str, path: Path, _manifest: Manifest) -> list[Place]:
    """The sparse layers."""
    attentions = layer_attentions(PteFile(path))
    return [Place(layer) for layer in chosen_layers(x for x, found in enumerate(attentions) if found.blocks)]


def see_other_blocks(fault: str, path: Path, place: Place) -> None:
    """The layer gets tables of its own. The program still cuts rows out of them by the right size of blocks."""
    wrong = WRONG[fault]

    def other(values: np.ndarray) -> np.ndarray:
        context = values.shape[-1]
        if values.ndim == 4:
            seen = wrong.is_strided(np.arange(context)).reshape(values.shape)
        else:
            seen = wrong.is_local(np.arange(len(values))[:, None], np.arange(context) - context // 2)
        return np.where(seen, 0, -np.inf).astype(values.dtype)

    rewriting = Rewriting(path)
    attention = layer_attentions(rewriting.file)[place.layer]
    changed = {mask: rewriting.with_other_content(mask, other) for mask in attention.blocks}
    replace_arguments(rewriting, attention.step, changed)
    rewriting.save()


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {fault: partial(see_other_blocks, fault) for fault in WRONG}
