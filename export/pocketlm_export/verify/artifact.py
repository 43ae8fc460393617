"""One artifact against the reference: its five levels.

What the file says is judged first. A file that says something wrong is not given to a runtime: it is refuted already,
and a vendor's kernel may end the process on what no exporter would write.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from pocketlm.bundle import Bundle
from pocketlm.certificate import LEVELS, Level, TargetCertificate
from pocketlm.errors import PocketLMError
from pocketlm.session import Session
from pocketlm_export.backends.reading import NotRun, Reader, Run, Trace, open_reader
from pocketlm_export.graph.graph import Graph
from pocketlm_export.verify.comparison import router_noise
from pocketlm_export.verify.evidence import Runs, greedy_run
from pocketlm_export.verify.levels import (
    Greedy,
    attempted,
    emulated_level,
    graph_level,
    kernels_level,
    level,
    meaning_level,
    not_run,
    whole_level,
)
from pocketlm_export.verify.lockstep import Lane, WeightSource, run_lanes
from pocketlm_export.verify.structure import Structure, Values, check_structure
from pocketlm_export.verify.thresholds import NOISE_TIE, ROUTER_TIE

__all__ = [
    "EAGER_LANE",
    "EXACT_LANE",
    "Artifact",
    "judge_artifact",
    "judge_emulation",
    "judge_whole",
    "open_artifact",
    "reference_lanes",
    "refused_artifact",
]

EXACT_LANE, EAGER_LANE, SIMULATED = "float64", "float32", "float32 with int8 activations"
Stage = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A target of a bundle, opened by its reader."""

    bundle: Bundle
    target: str
    reader: Reader

    @property
    def quantized(self) -> bool:
        """Whether any linear is."""
        scheme = self.bundle.manifest.scheme
        return scheme.linears != "fp32" or scheme.head != "fp32"


def open_artifact(bundle: Bundle, target: str) -> Artifact | PocketLMError:
    """The artifact, or why its reader refuses it."""
    path = bundle.folder / bundle.manifest.targets[target].path
    try:
        return Artifact(bundle, target, open_reader(target, path, bundle.manifest))
    except PocketLMError as error:
        return error


def refused_artifact(refusal: PocketLMError) -> TargetCertificate:
    """Of an artifact that can't be read."""
    broken = Level(level=1, name=LEVELS[1], status="failed", reason=str(refusal))
    return TargetCertificate(levels=[broken, *_unasked(range(2, 6), broken)])


def reference_lanes(artifact: Artifact, runs: Runs, weights: WeightSource) -> list[Lane]:
    """The float64 reference with the artifact's constants, the float32 one that is the floor of real runtimes, and the
    one whose noise predicts the artifact's."""
    stored, rounding = artifact.reader.stored, artifact.reader.round_activations
    both = (*runs.texts, *runs.probes)
    lanes = [
        _exact_lane(artifact, both, weights),
        Lane(name=EAGER_LANE, runs=both, weights=weights, dtype=torch.float32),
    ]
    if rounding is not None and artifact.quantized:
        lanes.append(
            Lane(
                name=SIMULATED, runs=runs.texts, weights=weights, dtype=torch.float32, stored=stored,
                round_activations=rounding,
            )
        )  # fmt: skip
    return lanes


def judge_artifact(
    artifact: Artifact,
    graph: Graph,
    runs: Runs,
    traces: dict[str, list[Trace]],
    weights: WeightSource,
    values: Values | None,
    stage: Stage,
    checked: Structure | None = None,
) -> TargetCertificate:
    """``traces``: of :func:`reference_lanes`; they are taken out as they are used. ``values``: see level 1, of which
    ``checked`` is the result where it is known."""
    reader, target = artifact.reader, artifact.target
    both = (*runs.texts, *runs.probes)
    exact, eager = traces.pop(EXACT_LANE), traces.pop(EAGER_LANE)

    def bytes_level() -> Level:
        return level(1, *(checked or check_structure(target, reader, graph, artifact.bundle.manifest, values)))

    stage(f"read {target}", 0)
    said = [
        attempted(1, bytes_level),
        attempted(2, lambda: graph_level(both, exact, reader.execute(both))),
    ]
    failed = next((found for found in said if found.status == "failed"), None)
    if failed is not None:
        return TargetCertificate(levels=[*said, *_unasked(range(3, 6), failed)], notes=list(reader.notes))

    stage(f"run {target}", 0)
    whole = attempted(5, lambda: judge_whole(artifact, graph, runs, exact, eager, traces, weights))
    traces.clear()  # logits of a large vocabulary go before the real runtime unpacks weights
    levels = [
        *said,
        attempted(3, lambda: meaning_level(both, exact, eager, reader.meaning(both))),
        attempted(4, lambda: kernels_level(reader.kernels(runs.texts))),
        whole,
    ]
    return TargetCertificate(levels=levels, notes=list(reader.notes))


def judge_emulation(
    artifact: Artifact, graph: Graph, runs: Sequence[Run], exact: Sequence[Trace], weights: WeightSource
) -> Level | None:
    """Level 5 by the reader's emulation of ``runs``; None where a session runs the artifact.

    ``exact``: the float64 reference's traces. One that follows choices of experts takes a second pass.
    """
    emulated = artifact.reader.emulate(runs)
    if emulated is None:
        return None
    followed = exact
    if emulated[0].experts:
        lane = _exact_lane(artifact, runs, weights)
        followed = run_lanes(graph, [replace(lane, followed=emulated, tie=ROUTER_TIE.limit)])[EXACT_LANE]
    return emulated_level(exact, emulated, followed)


def judge_whole(
    artifact: Artifact,
    graph: Graph,
    runs: Runs,
    exact: Sequence[Trace],
    eager: Sequence[Trace],
    traces: Mapping[str, list[Trace]],
    weights: WeightSource,
) -> Level:
    """The artifact chooses; one pass of the reference scores its choices. What is too large for a session runs in
    parts, for which all tokens must be known: it chooses at every judged position of the texts."""
    texts = exact[: len(runs.texts)]
    emulated = judge_emulation(artifact, graph, runs.texts, texts, weights)
    if emulated is not None:
        return emulated
    simulated = traces.get(SIMULATED)
    floor = eager[: len(runs.texts)] if simulated is None else simulated
    parts = artifact.reader.in_parts(runs.texts)
    tie = None if simulated is None else _router_tie(artifact, graph, runs.texts, simulated, weights)
    if parts is not None:
        scored = texts if tie is None else _scored(artifact, graph, runs.texts, weights, tie)
        greedy = Greedy(_choices(parts), scored, tie, runtime="in parts, along the texts")
        return whole_level(texts, floor, parts, greedy, quantized=simulated is not None)
    with artifact.bundle.session(artifact.target) as session:
        shipped = [_session_trace(session, run) for run in runs.texts]
        chosen = _greedy(session, runs.greedy_prompt, runs.steps)
    own = greedy_run("the greedy continuation", runs.greedy_prompt, chosen)
    greedy = Greedy(chosen, _scored(artifact, graph, [own], weights, tie), tie)
    return whole_level(texts, floor, shipped, greedy, quantized=simulated is not None)


def _router_tie(
    artifact: Artifact, graph: Graph, runs: Sequence[Run], simulated: Sequence[Trace], weights: WeightSource
) -> float | None:
    """How far apart rounded activations move two experts' scores, as simulated; None where no expert is chosen.

    The reference takes all choices of the simulation, so that only noise is between their scores.
    """
    if not simulated[0].experts:
        return None
    lane = replace(_exact_lane(artifact, runs, weights), followed=simulated, tie=inf)
    return NOISE_TIE.limit * router_noise(run_lanes(graph, [lane])[EXACT_LANE], simulated)


def _scored(
    artifact: Artifact, graph: Graph, runs: Sequence[Run], weights: WeightSource, tie: float | None
) -> list[Trace]:
    """The reference over what the artifact chose; within ``tie`` it follows the artifact's choices of experts."""
    lane = _exact_lane(artifact, runs, weights)
    if tie is not None:
        lane = replace(lane, followed=artifact.reader.chosen_experts(runs), tie=tie)
    return run_lanes(graph, [lane])[EXACT_LANE]


def _exact_lane(artifact: Artifact, runs: Sequence[Run], weights: WeightSource) -> Lane:
    return Lane(name=EXACT_LANE, runs=runs, weights=weights, stored=artifact.reader.stored)


def _choices(traces: Sequence[Trace]) -> list[int]:
    return [int(row.argmax()) for trace in traces for logits in trace.logits for row in logits]


def _unasked(levels: Sequence[int], failed: Level) -> list[Level]:
    reason = f"level {failed.level} failed: what the file says is wrong, so no runtime is asked"
    return [not_run(number, NotRun(reason)) for number in levels]


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
