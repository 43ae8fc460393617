"""``pocketlm store``: the quantized weights kept on disk."""

from pathlib import Path
from typing import Annotated

import typer

from pocketlm.cli.console import Debug, Json, print_json, reported

__all__ = ["EXAMPLE", "store"]

EXAMPLE = "Example: pocketlm store --prune"


def store(
    prune: Annotated[bool, typer.Option("--prune", help="Delete every entry; exports make them again.")] = False,
    place: Annotated[
        Path | None, typer.Option("--store", metavar="DIR", help="Default: $XDG_CACHE_HOME/pocketlm.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the weight store, or empty it."""
    with reported(debug):
        from pocketlm.cli.description import print_table, readable
        from pocketlm_export.quantization.store import LIMIT, WeightStore, default_store

        folder = place or default_store()
        weights = WeightStore(folder)
        freed = weights.prune() if prune else 0
        entries, size = len(list(weights.entries())), weights.size()
        if json:
            print_json({"path": str(folder), "entries": entries, "bytes": size, "limit": LIMIT, "freed": freed})
            return
        print_table(
            (
                ("store", str(folder)),
                ("entries", f"{entries:,}"),
                ("size", f"{readable(size)} of at most {readable(LIMIT)}"),
            )
        )
        if prune:
            print_table((("freed", readable(freed)),))
