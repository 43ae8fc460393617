"""The null backend: keeps the contract, writes names and shapes of the weights. For tests and timings of the rest."""

from collections.abc import Mapping
from pathlib import Path

from pocketlm_export.backends.base import Artifact, Entry, Lowering
from pocketlm_export.graph.graph import Graph
from pocketlm_export.quantization.schemes import SchemeRow


def check(graph: Graph, rows: Mapping[str, SchemeRow | None]) -> None:
    """Everything can be expressed by nothing."""


def write(lowering: Lowering, folder: Path) -> Artifact:
    """One line a weight in ``weights.txt``."""
    weights = lowering.graph.weights()
    lines = []
    for name, weight in weights.items():
        row = lowering.weights.row(name)
        lines.append(f"{name} {list(weight.shape)} {row.name if row else 'float32'}\n")
        lowering.progress(name, 0)
    (folder / "weights.txt").write_text("".join(lines))
    return Artifact(
        runtime={},
        longest_call=lowering.graph.context_length,
        rows=lowering.graph.context_length,
        entries={name: Entry(name) for name in weights},
    )


def libraries() -> Mapping[str, str]:
    """No library."""
    return {}
