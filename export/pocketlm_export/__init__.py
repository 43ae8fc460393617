"""From a Hugging Face checkpoint to a bundle. Importing this package does not import torch."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.manifest import SchemeName
from pocketlm_export.options import ExportOptions

if TYPE_CHECKING:
    from pocketlm.bundle import Bundle
    from pocketlm_export.pipeline import Progress, export_bundle

__all__ = ["ExportOptions", "Progress", "export", "export_bundle"]

_DEFAULTS = ExportOptions()


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    targets: Iterable[str] = _DEFAULTS.targets,
    scheme: SchemeName = _DEFAULTS.scheme,
    head: SchemeName = _DEFAULTS.head,
    group: int = _DEFAULTS.group,
    context_length: int | None = None,
    accept: Iterable[str] = (),
    adapter: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    force: bool = False,
    verify: bool = True,
    oracle: str | None = None,
    progress: "Progress | None" = None,
) -> "Bundle":
    """Export ``checkpoint``, a folder or ``org/name[@revision]``, to a bundle at ``output``; returns it opened.

    ``context_length`` None: the smaller of the model's and 4096. The other options are :class:`ExportOptions`'.
    Raises :class:`pocketlm.InputError` for what can't be exported, :class:`pocketlm.CheckError` for a bundle that fails
    its verification; nothing is left at ``output`` then.
    """
    from pocketlm_export.pipeline import Progress, export_bundle

    options = ExportOptions(
        targets=tuple(targets),
        scheme=scheme,
        head=head,
        group=group,
        context=context_length,
        accept=tuple(accept),
        adapter=None if adapter is None else Path(adapter),
        store=None if store is None else Path(store),
        force=force,
        verify=verify,
        oracle=oracle,
    )
    return export_bundle(os.fspath(checkpoint), Path(output), options, progress or Progress())


def __getattr__(name: str) -> Any:
    if name not in ("Progress", "export_bundle"):
        raise AttributeError(f"module 'pocketlm_export' has no attribute {name!r}")
    from pocketlm_export import pipeline

    return getattr(pipeline, name)
