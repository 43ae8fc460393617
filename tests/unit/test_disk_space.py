"""The disk that an export needs, as estimated before it and as found after it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.base import TARGETS
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.disk_space import bundle_bytes, store_bytes
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.quantization.schemes import assign_rows
from tests.refusals import refusal_of
from tests.tiny_models import CONTEXT, ROWS

DEMO = Path(__file__).parents[2] / "mobile_demo" / "model" / "checkpoint"
BLOCK = 4096
MOST = 1.15


def on_disk(folder: Path) -> int:
    """Bytes of the blocks of all files."""
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in folder.rglob("*") if path.is_file())


def within(
    source: Path,
    bundle: Path,
    scheme: str,
    head: str,
    context: int,
    store: Path | None = None,
    targets: Sequence[str] = TARGETS,
) -> None:
    checkpoint = open_checkpoint(source, ())
    graph = build_graph(checkpoint.config, context)
    rows = assign_rows(graph, scheme, head)
    written = on_disk(bundle)
    assert written <= bundle_bytes(checkpoint, graph, rows, targets) <= MOST * written
    if store is not None:
        matrices = [weight for weight in graph.weights().values() if rows[weight.name] is not None]
        written = on_disk(store / "weights")
        assert written <= store_bytes(matrices, rows) <= MOST * written


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_of_every_tiny_model(row, tiny_checkpoint, tmp_path):
    source, _ = tiny_checkpoint(row.name)
    store = tmp_path / "store"
    targets = tuple(target for target in TARGETS if refusal_of(row, target, "int4") is None)
    options = ExportOptions(targets=targets, context=row.context, store=store, verify=False)
    export_bundle(str(source), tmp_path / "bundle", options)
    within(source, tmp_path / "bundle", "int4", "int8", row.context or CONTEXT, store, targets)


@pytest.mark.parametrize(("scheme", "head"), (("int4", "int4"), ("int8", "int8"), ("fp32", "int8")))
@pytest.mark.parametrize("name", ("qwen2-window", "llama-odd-widths"))
def test_of_every_scheme(scheme, head, name, tiny_checkpoint, tmp_path):
    source, _ = tiny_checkpoint(name)
    options = ExportOptions(scheme=scheme, head=head, store=tmp_path / "store", verify=False)
    export_bundle(str(source), tmp_path / "bundle", options)
    within(source, tmp_path / "bundle", scheme, head, CONTEXT)


@pytest.mark.parametrize(("scheme", "head"), (("int4", "int8"), ("int4", "int4"), ("fp32", "int8")))
def test_of_the_demo_model(scheme, head, demo_bundle):
    bundle = demo_bundle(scheme, head)
    within(DEMO, bundle.folder, scheme, head, bundle.manifest.model.context_length)
