"""Verification, the main path: from a written bundle to its certificate."""

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pocketlm.bundle import RUNTIMES, Bundle
from pocketlm.certificate import Certificate, Evidence, Loss, Oracle, TargetCertificate
from pocketlm.errors import BundleError, InputError, PocketLMError
from pocketlm.machine import machine_facts
from pocketlm_export.verify.artifact import (
    EXACT_LANE,
    judge_artifact,
    open_artifact,
    reference_lanes,
    refused_artifact,
)
from pocketlm_export.verify.evidence import Runs, choose_runs
from pocketlm_export.verify.lockstep import Lane, run_lanes
from pocketlm_export.verify.loss import measure_loss
from pocketlm_export.verify.oracle import check_oracle, judge_oracle, oracle_traces
from pocketlm_export.verify.structure import Structure, check_structure
from pocketlm_export.verify.subject import ArtifactWeights, Subject
from pocketlm_export.verify.text import check_text

__all__ = ["Measured", "issue_certificate", "measure"]

Stage = Callable[[str, int], None]
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
        if subject.checkpoint is None:
            raise InputError("an oracle computes with the checkpoint: give it with --reference")
        check_oracle(oracle, subject.checkpoint)
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
    described = bundle.manifest.targets
    runs_of = {target: choose_runs(graph, described[target], bundle.tokenizer, elements) for target in targets}
    evidence = max((runs.evidence() for runs in runs_of.values()), key=lambda found: found.prefill_tokens)
    source, checked = None, None
    if subject.weights is not None:
        weights = subject.weights
    else:
        source, weights, checked = _weights_of_an_artifact(subject, targets)
    values = None if isinstance(weights, ArtifactWeights) and not weights.exact else weights
    certificates: dict[str, TargetCertificate] = {}
    loss, judged_oracle = None, None
    for target in targets:
        artifact = open_artifact(bundle, target)  # here, so that only one is mapped at a time
        if isinstance(artifact, PocketLMError):
            certificates[target] = refused_artifact(artifact)
            continue
        runs = runs_of[target]
        stage(f"run the reference for {target}", 0)
        originals = _original_lanes(subject, runs, oracle) if loss is None else []
        traces = run_lanes(graph, [*reference_lanes(artifact, runs, weights), *originals])
        if originals:
            original, eager = traces.pop(ORIGINAL, None), traces.pop(ORIGINAL_EAGER)
            loss = measure_loss(runs.texts, eager, traces[EXACT_LANE][: len(runs.texts)])
            if oracle is not None and original is not None and subject.checkpoint is not None:
                stage(f"run {oracle}", 0)
                traced = oracle_traces(subject.checkpoint, runs.texts)
                judged_oracle = judge_oracle(subject.checkpoint, original, eager, traced)
                del traced
            del original, eager
        known = checked if target == source else None
        judged = judge_artifact(artifact, graph, runs, traces, weights, values, stage, known)
        certificates[target] = _noting_other_calls(judged, runs.evidence(), evidence)
        weights.release()
        del artifact, traces  # before the next target's are made
    return Measured(evidence, certificates, loss, judged_oracle)


def _noting_other_calls(judged: TargetCertificate, own: Evidence, evidence: Evidence) -> TargetCertificate:
    """The certificate's evidence is that of the target with the most prefill; others take the tokens in more calls."""
    if own == evidence:
        return judged
    note = (
        f"the same tokens in shorter calls: {own.prefill_tokens} tokens of prefill, {own.decode_steps} decode steps, "
        f"{own.judged_positions} positions judged"
    )
    return judged.model_copy(update={"notes": [*judged.notes, note]})


def _chosen(bundle: Bundle, targets: Sequence[str] | None) -> list[str]:
    present = list(bundle.manifest.targets)
    missing = [target for target in targets or () if target not in present]
    if missing:
        raise InputError(f"{bundle.folder}: no {missing[0]} artifact; this bundle has {', '.join(present)}")
    return present if targets is None else list(dict.fromkeys(targets))


def _weights_of_an_artifact(subject: Subject, targets: Sequence[str]) -> tuple[str, ArtifactWeights, Structure]:
    """The weights as one of the artifacts holds them: of those with exact values the first that the manifest knows.
    With its name and what level 1 found of it: what is held against itself would be no other."""
    bundle = subject.bundle
    opened = {target: open_artifact(bundle, target) for target in targets}
    readers = {target: found.reader for target, found in opened.items() if not isinstance(found, PocketLMError)}
    if not readers:
        refusals = "; ".join(str(found) for found in opened.values())
        raise BundleError(f"{bundle.folder}: no artifact can be read: {refusals}")
    order = sorted(readers, key=lambda target: readers[target].stored.value is not np.float32)

    found: dict[str, Structure] = {}

    def is_sound(target: str) -> bool:
        found[target] = check_structure(target, readers[target], subject.graph, bundle.manifest, None)
        return all(check.passed for check in found[target][0])

    chosen = next(filter(is_sound, order), order[0])
    return chosen, ArtifactWeights(bundle, chosen, readers[chosen]), found[chosen]


def _original_lanes(subject: Subject, runs: Runs, oracle: str | None) -> list[Lane]:
    if subject.originals is None:
        return []
    eager = Lane(name=ORIGINAL_EAGER, runs=runs.texts, weights=subject.originals, dtype=torch.float32)
    if oracle is None:
        return [eager]
    return [eager, Lane(name=ORIGINAL, runs=runs.texts, weights=subject.originals)]


def _libraries(targets: Sequence[str]) -> dict[str, str]:
    packages = ["numpy", "torch", *(RUNTIMES[target] for target in targets)]
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return dict(sorted(found.items()))
