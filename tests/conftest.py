"""Checkpoints and bundles that many tests share, made once a run."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest

# Tests run in several processes: one thread each, or they wait for each other's spinning threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# A change is judged on the same examples every time; elsewhere each run looks for new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """``tiny_checkpoint(name)`` -> the folder of that row of the table, and transformers' model of it in float32."""
    from tests.tiny_models import ROWS, write_checkpoint

    rows = {row.name: row for row in ROWS}

    @cache
    def make(name: str) -> tuple:
        folder = tmp_path_factory.mktemp(name)
        return folder, write_checkpoint(rows[name], folder)

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``tiny_bundle(name, scheme, target, head="int8")`` -> the bundle with that one artifact."""
    from pocketlm_export.options import ExportOptions
    from pocketlm_export.pipeline import export_bundle
    from tests.tiny_models import ROWS

    store = tmp_path_factory.mktemp("store")
    contexts = {row.name: row.context for row in ROWS}

    @cache
    def make(name: str, scheme: str, target: str, head: str = "int8"):
        folder, _ = tiny_checkpoint(name)
        output = tmp_path_factory.mktemp("bundles") / "bundle"
        options = ExportOptions(
            targets=(target,), scheme=scheme, head=head, context=contexts[name], store=store, verify=False
        )
        return export_bundle(str(folder), output, options)

    return make


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``demo_bundle(scheme, head="int8")`` -> the committed demo model with all three artifacts."""
    from pocketlm_export.options import ExportOptions
    from pocketlm_export.pipeline import export_bundle

    checkpoint = Path(__file__).parents[1] / "mobile_demo" / "model" / "checkpoint"
    store = tmp_path_factory.mktemp("store")

    @cache
    def make(scheme: str, head: str = "int8"):
        output = tmp_path_factory.mktemp("demo") / "bundle"
        options = ExportOptions(scheme=scheme, head=head, context=512, store=store, verify=False)
        return export_bundle(str(checkpoint), output, options)

    return make


@pytest.fixture(scope="session")
def data() -> Iterator[Path]:
    """Data made by others, read where it lies."""
    folder = Path(os.environ.get("POCKETLM_DATA", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("not run: no data")
    yield folder
