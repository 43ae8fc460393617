"""Verification, the main path: from a written bundle to its certificate."""

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pocketlm.bundle import RUNTIMES, Bundle
from pocketlm.certificate import Certificate, Evidence, Level, Loss, Oracle, TargetCertificate
from pocketlm.errors import BundleError, InputError, PocketLMError
from pocketlm.machine import machine_facts
from pocketlm.session import Session
from pocketlm_export.backends.reading import Reader, Run, Trace, open_reader
from pocketlm_export.verify.evidence import Runs, choose_runs, greedy_run
from pocketlm_export.verify.levels import (
    Greedy,
    attempted,
    emulated_level,
    graph_level,
    kernels_level,
    level,
    meaning_level,
    whole_level,
)
from pocketlm_export.verify.lockstep import Lane, WeightSource, run_lanes
from pocketlm_export.verify.loss import measure_loss
from pocketlm_export.verify.oracle import check_oracle, judge_oracle, oracle_traces
from pocketlm_export.verify.structure import check_structure
from pocketlm_export.verify.subject import ArtifactWeights, Subject
from pocketlm_export.verify.text import check_text

__all__ = ["Measured", "issue_certificate", "measure"]

Stage = Callable[[str, int], None]
EXACT_LANE, EAGER, SIMULATED = "float64", "float32", "float32 with int8 activations"
ORIGINAL, ORIGINAL_EAGER = "original in float64", "original in float32"


@dataclass(frozen=True, slots=True)
class Measured:
    """What running the artifacts gave, as the certificate states it."""

    evidence: Evidence
    targets: dict[str, TargetCertificate]
    loss: Loss | None
    oracle: Oracle | None


def issue_certificate(
    subject: Subject,
    *,
    targets: Sequence[str] | None = None,
    oracle: str | None = None,
    stage: Stage = lambda _name, _elements: None,
) -> Certificate:
    """Open the written files of ``targets`` (default: all) and measure the five levels on each.

    A level that fails is in the certificate; what is raised is what keeps it from being issued: an oracle that isn't
    there or has no checkpoint, a target that the bundle doesn't have, a bundle that holds no readable weights.
    """
    bundle = subject.bundle
    chosen = _chosen(bundle, targets)
    if oracle is not None:
        check_oracle(oracle)
        if subject.checkpoint is None:
            raise InputError("an oracle computes with the checkpoint: give it with --reference")
    bundle.check_files()
    stage("verify the text", 0)
    text = check_text(bundle)
    measured = measure(subject, chosen, oracle, stage)
    return Certificate(
        format_version="1.0",
        manifest_sha256=hashlib.sha256((bundle.folder / "manifest.json").read_bytes()).hexdigest(),
        pocketlm=importlib.metadata.version("pocketlm"),
        libraries=_libraries(chosen),
        machine=machine_facts(),
        evidence=measured.evidence,
        targets=measured.targets,
        loss=measured.loss,
        oracle=measured.oracle,
        text=text,
    ).sealed()


def measure(
    subject: Subject,
    targets: Sequence[str],
    oracle: str | None = None,
    stage: Stage = lambda _name, _elements: None,
) -> Measured:
    """The five levels of each of ``targets``, and loss and oracle where the checkpoint is at hand.

    One target after the other: a pass of the reference costs seconds, the logits of all targets at once gigabytes.
    """
    bundle, graph = subject.bundle, subject.graph
    elements = sum(math.prod(weight.shape) for weight in graph.weights().values())
    runs = choose_runs(graph, bundle.manifest, bundle.tokenizer, elements)
    weights = subject.weights or _weights_of_an_artifact(subject, targets)
    values = None if isinstance(weights, ArtifactWeights) and not weights.exact else weights
    certificates, loss, judged_oracle = {}, None, None
    for target in targets:
        artifact = _Artifact(bundle, target)  # opened here, so that only one is mapped at a time
        stage(f"run {target}", 0)
        artifact.run_shipped(runs)
        stage(f"run the reference for {target}", 0)
        first = loss is None and artifact.reader is not None
        originals = _original_lanes(subject, runs, oracle) if first else []
        traces = run_lanes(graph, [*artifact.lanes(runs, weights), *originals])
        if first and subject.originals is not None and subject.checkpoint is not None:
            loss = measure_loss(runs.texts, traces[ORIGINAL_EAGER], traces[EXACT_LANE][: len(runs.texts)])
            if oracle is not None:
                stage(f"run {oracle}", 0)
                told = oracle_traces(subject.checkpoint, runs.texts)
                judged_oracle = judge_oracle(traces[ORIGINAL], traces[ORIGINAL_EAGER], told)
            for name in (ORIGINAL, ORIGINAL_EAGER):
                traces.pop(name, None)
        stage(f"verify {target}", 0)
        certificates[target] = artifact.judge(subject, runs, values, traces)
        weights.release()
        del artifact, traces  # before the next target's are made
    return Measured(runs.evidence(), certificates, loss, judged_oracle)


@dataclass(slots=True)
class _Artifact:
    """One target under verification: its reader, and what its shipped form gave."""

    bundle: Bundle
    target: str
    reader: Reader | None = field(init=False, default=None)
    refusal: PocketLMError | None = field(init=False, default=None)
    shipped: list[Trace] | PocketLMError | None = field(init=False, default=None)
    greedy: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        path = self.bundle.folder / self.bundle.manifest.targets[self.target].path
        try:
            self.reader = open_reader(self.target, path, self.bundle.manifest)
        except PocketLMError as error:
            self.refusal = error

    @property
    def quantized(self) -> bool:
        """Whether any linear is."""
        return self.bundle.manifest.scheme.linears != "fp32" or self.bundle.manifest.scheme.head != "fp32"

    def run_shipped(self, runs: Runs) -> None:
        """The texts, and a greedy continuation, as users run the artifact; an emulation where its runtime isn't."""
        if self.reader is None:
            return
        try:
            self.shipped = self.reader.emulate(runs.texts)
            if self.shipped is None:
                with self.bundle.session(self.target) as session:
                    self.shipped = [_session_trace(session, run) for run in runs.texts]
                    self.greedy = _greedy(session, runs.greedy_prompt, runs.steps)
        except PocketLMError as error:
            self.shipped = error

    def lanes(self, runs: Runs, weights: WeightSource) -> list[Lane]:
        """The float64 reference with this artifact's constants, the float32 one that is the floor of real runtimes, and
        the one whose noise predicts the artifact's."""
        if self.reader is None:
            return []
        stored, rounding = self.reader.stored, self.reader.round_activations
        both = (*runs.texts, *runs.probes)
        own = [greedy_run("the greedy continuation", runs.greedy_prompt, self.greedy)] if self.greedy else []
        lanes = [
            Lane(name=EXACT_LANE, runs=(*both, *own), weights=weights, stored=stored),
            Lane(name=EAGER, runs=both, weights=weights, dtype=torch.float32),
        ]
        if rounding is not None and self.quantized:
            lanes.append(
                Lane(
                    name=SIMULATED, runs=runs.texts, weights=weights, dtype=torch.float32, stored=stored,
                    round_activations=rounding,
                )
            )  # fmt: skip
        return lanes

    def judge(
        self, subject: Subject, runs: Runs, values: WeightSource | None, traces: dict[str, list[Trace]]
    ) -> TargetCertificate:
        reader, both = self.reader, (*runs.texts, *runs.probes)
        if reader is None:
            reason = str(self.refusal)
            broken = Level(level=1, name="bytes", status="failed", reason=reason)
            return TargetCertificate(levels=[broken])
        reference = traces[EXACT_LANE]
        exact, texts, own = reference[: len(both)], reference[: len(runs.texts)], reference[len(both) :]
        eager = traces[EAGER]

        def bytes_level() -> Level:
            checks, counts = check_structure(self.target, reader, subject.graph, self.bundle.manifest, values)
            return level(1, checks, counts)

        def whole() -> Level:
            if isinstance(self.shipped, PocketLMError):
                raise self.shipped
            assert self.shipped is not None
            if not self.greedy:
                return emulated_level(texts, self.shipped)
            simulated = traces.get(SIMULATED)
            floor = eager[: len(runs.texts)] if simulated is None else simulated
            greedy = Greedy(self.greedy, own)
            return whole_level(texts, floor, self.shipped, greedy, quantized=simulated is not None)

        bytes_and_graph = [
            attempted(1, bytes_level),
            attempted(2, lambda: graph_level(both, exact, reader.execute(both))),
        ]
        as_shipped = attempted(5, whole)
        # Logits of a large vocabulary: what levels 3 and 4 don't need goes before the real runtime unpacks weights.
        traces.pop(SIMULATED, None)
        self.shipped = None
        levels = [
            *bytes_and_graph,
            attempted(3, lambda: meaning_level(both, exact, eager, reader.meaning(both))),
            attempted(4, lambda: kernels_level(reader.kernels(runs.texts))),
            as_shipped,
        ]
        return TargetCertificate(levels=levels, notes=list(reader.notes))


def _chosen(bundle: Bundle, targets: Sequence[str] | None) -> list[str]:
    present = list(bundle.manifest.targets)
    missing = [target for target in targets or () if target not in present]
    if missing:
        raise InputError(f"{bundle.folder}: no {missing[0]} artifact; this bundle has {', '.join(present)}")
    return present if targets is None else list(dict.fromkeys(targets))


def _weights_of_an_artifact(subject: Subject, targets: Sequence[str]) -> WeightSource:
    """The weights as one of the artifacts holds them: of those with exact values the first that the manifest knows."""
    bundle = subject.bundle
    readers: dict[str, Reader] = {}
    refusals = []
    for target in targets:
        artifact = _Artifact(bundle, target)
        if artifact.reader is None:
            refusals.append(str(artifact.refusal))
        else:
            readers[target] = artifact.reader
    if not readers:
        raise BundleError(f"{bundle.folder}: no artifact can be read: {'; '.join(refusals)}")
    order = sorted(readers, key=lambda target: readers[target].stored.value is not np.float32)

    def is_sound(target: str) -> bool:
        checks, _ = check_structure(target, readers[target], subject.graph, bundle.manifest, None)
        return all(check.passed for check in checks)

    chosen = next(filter(is_sound, order), order[0])
    return ArtifactWeights(bundle, chosen, readers[chosen])


def _original_lanes(subject: Subject, runs: Runs, oracle: str | None) -> list[Lane]:
    if subject.originals is None:
        return []
    eager = Lane(name=ORIGINAL_EAGER, runs=runs.texts, weights=subject.originals, dtype=torch.float32)
    if oracle is None:
        return [eager]
    return [eager, Lane(name=ORIGINAL, runs=runs.texts, weights=subject.originals)]


def _session_trace(session: Session, run: Run) -> Trace:
    session.rewind(0)
    return Trace([session.extend(call.tokens, logits=call.rows) for call in run.calls])


def _greedy(session: Session, prompt: Sequence[int], steps: int) -> tuple[int, ...]:
    session.rewind(0)
    logits = session.extend(prompt)
    chosen = [int(logits[-1].argmax())]
    while len(chosen) < steps:
        chosen.append(int(session.extend(chosen[-1:])[-1].argmax()))
    return tuple(chosen)


def _libraries(targets: Sequence[str]) -> dict[str, str]:
    packages = ["numpy", "torch", *(RUNTIMES[target] for target in targets)]
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return dict(sorted(found.items()))
