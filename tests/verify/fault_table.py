"""Fault x target x place: which levels see a fault, and how far it stands out of the fault-free figures.

``python -m tests.verify.fault_table`` prints the table of all places; it takes some minutes.
"""

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pocketlm.bundle import Bundle
from pocketlm.certificate import TargetCertificate
from pocketlm_export.architectures import build_graph
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.builder import GraphBuilder
from pocketlm_export.graph.graph import Attention, Graph
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.subject import Subject, exported_subject, scheme_rows
from pocketlm_export.verify.verification import measure
from tests.tiny_models import ROWS, write_checkpoint
from tests.verify import sparse_blocks
from tests.verify.injection import copied_with_fault, faults, places_of

__all__ = ["CASES", "TARGETS", "Case", "FaultTable", "Row"]

TARGETS = ("onnx", "executorch", "coreml")
SOFT_CAP = 5.0
# Query, key and value biases and windows on two of three layers; a tied head; soft caps, which no row of the table has.
MODEL = "qwen2-window"
MODELS = {
    "lm head untied": "qwen2",
    "soft cap ignored": "qwen2 with soft caps",
    **dict.fromkeys((fault for target in TARGETS for fault in faults(target, "expert_faults")), "mixtral"),
    **dict.fromkeys(sparse_blocks.WRONG, sparse_blocks.MODEL),
}

# Again where the operators are others: layer norms, biases everywhere, parallel attention and MLP; four norms with an
# offset, soft caps of the architecture's own, windows in every other layer.
ELSEWHERE = {
    "phi": (
        "a bias missing",
        "a norm's epsilon x1000",
        "key/value heads paired wrongly",
        "position off by one",
        "rotary halves swapped",
        "rotary table one row off",
    ),
    "gemma2": (
        "a norm's epsilon x1000",
        "rotary halves swapped",
        "soft cap ignored",
        "window ignored",
        "window one too wide",
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault of one target, and the tiny model that can hold it."""

    target: str
    fault: str
    model: str

    def __str__(self) -> str:
        return f"{self.target}-{self.fault}-{self.model}".replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class Row:
    """``caught_by``: the levels that failed, in order, and what they said. ``separation``: the largest figure of level
    2 over the same figure without the fault; infinite where the file can't be executed."""

    place: str
    caught_by: tuple[int, ...]
    words: tuple[str, ...]
    separation: float


CASES = [
    *(Case(target, fault, MODELS.get(fault, MODEL)) for target in TARGETS for fault in faults(target)),
    *(Case(target, fault, model) for model, names in ELSEWHERE.items() for fault in names for target in TARGETS),
]


class FaultTable:
    """Bundles and measurements in ``folder``, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = WeightStore(folder / "store")
        self.bundle = cache(self._bundle)
        self.fault_free = cache(self._fault_free)
        self._subject = cache(self._make_subject)
        self._base = cache(self._measure_base)

    def places(self, case: Case) -> list[Any]:
        """Every place of the model's artifact that differs for the fault."""
        return places_of(case.target, case.fault, self.bundle(case.model))

    def row(self, case: Case, place: Any) -> Row:
        """The measurement of one fault at one place."""
        altered = Path(tempfile.mkdtemp(dir=self._folder)) / "bundle"
        try:
            bundle = copied_with_fault(self.bundle(case.model), case.target, case.fault, place, altered)
            subject = dataclasses.replace(self._subject(case.model), bundle=bundle)
            measured = measure(subject, [case.target]).targets[case.target]
        finally:
            shutil.rmtree(altered.parent)
        return _row(case.target, str(place), measured, self._base(case.model, case.target))

    def _fault_free(self, model: str, target: str) -> Row:
        base = self._base(model, target)
        return _row(target, "none", base, base)

    def _measure_base(self, model: str, target: str) -> TargetCertificate:
        return measure(self._subject(model), [target]).targets[target]

    def _make_subject(self, model: str) -> Subject:
        bundle = self.bundle(model)
        checkpoint = open_checkpoint(self._folder / model)
        with _soft_caps(model):
            graph = build_graph(checkpoint.config, bundle.manifest.model.context_length)
        weights = quantize(checkpoint.tensors, scheme_rows(bundle), self._store)
        return exported_subject(bundle, graph, weights, checkpoint)

    def _bundle(self, model: str) -> Bundle:
        folder = self._folder / model
        row = next(row for row in ROWS if row.name == model.split()[0])
        write_checkpoint(row, folder)
        # A store of its own: a graph is found by the configuration, which says nothing of the soft caps put in here.
        options = ExportOptions(targets=TARGETS, store=self._folder / f"store of {model}", verify=False)
        with _soft_caps(model):
            return export_bundle(str(folder), self._folder / f"{model}.pocketlm", options)


@contextmanager
def _soft_caps(model: str) -> Iterator[None]:
    """Where the model's name says so, every attention of what is traced has a soft cap."""
    original = GraphBuilder.graph
    if model.split()[0] == model:
        yield
        return

    def with_caps(*arguments: Any) -> Graph:
        graph = original(*arguments)
        capped = (
            dataclasses.replace(node, softcap=SOFT_CAP) if isinstance(node, Attention) else node for node in graph
        )
        return dataclasses.replace(graph, nodes=tuple(capped))

    GraphBuilder.graph = with_caps
    try:
        yield
    finally:
        GraphBuilder.graph = original


def _row(target: str, place: str, measured: TargetCertificate, base: TargetCertificate) -> Row:
    failed = measured.failed
    floors = _figures(base)
    ratios = [figure / floors[name] for name, figure in _figures(measured).items()]
    words = tuple(f"{target}: level {level.level} ({level.name}) failed: {level.reason}" for level in failed)
    return Row(place, tuple(level.level for level in failed), words, max(ratios, default=float("inf")))


def _figures(certificate: TargetCertificate) -> dict[str, float]:
    """Level 2's."""
    (graph,) = (level for level in certificate.levels if level.level == 2)
    return {check.name: float("inf") if check.figure is None else check.figure for check in graph.checks}


def main() -> None:
    """Print the table: for each fault and target how many places were caught, by which levels, and how far the least
    conspicuous of them stands out at level 2."""
    with tempfile.TemporaryDirectory() as name:
        table = FaultTable(Path(name))
        print("| fault | model | target | caught | by level 1 | by level 2 | smallest separation at level 2 |")
        print("|---|---|---|---|---|---|---|")
        caught = injected = 0
        for case in sorted(CASES, key=lambda case: case.fault):
            rows = [table.row(case, place) for place in table.places(case)]
            seen = [row for row in rows if row.caught_by]
            caught, injected = caught + len(seen), injected + len(rows)
            by = [sum(level in row.caught_by for row in rows) for level in (1, 2)]
            smallest = min(row.separation for row in rows)
            cells = case.fault, case.model, case.target, f"{len(seen)} of {len(rows)}", *by, f"{smallest:.2g}"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            for row in rows:
                if not row.caught_by:
                    print(f"missed: {case} at {row.place}", file=sys.stderr)
        print(f"\n{caught} of {injected} caught.")


if __name__ == "__main__":
    main()
