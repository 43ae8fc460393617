"""A comparison in Markdown: what was measured, and beside it what was asked."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pocketlm_bench.peer import exporting, running
from pocketlm_bench.peer.goals import GB, Verdict
from pocketlm_bench.peer.record import Comparison

__all__ = ["export_table", "goal_table", "lines", "rate_table"]


def lines(comparison: Comparison) -> Iterator[str]:
    """The whole section of a comparison."""
    yield from _circumstances(comparison)
    yield ""
    exports = comparison.kind == "exports"
    yield from export_table(comparison) if exports else rate_table(comparison)
    yield ""
    yield from goal_table(comparison.verdicts(), exporting.TITLES if exports else running.TITLES)


def export_table(comparison: Comparison) -> Iterator[str]:
    """Medians over the rounds, wall time with its lowest and highest."""
    yield "| | wall, s | CPU, s | peak memory, GB | anonymous | file-backed | artifacts, MB |"
    yield "|---|---|---|---|---|---|---|"
    for way, runs in comparison.rounds.items():
        memory = [_median(runs, name) / GB for name in ("peak_resident", "peak_anonymous", "peak_file_backed")]
        yield (
            f"| {exporting.TITLES[way]} | {_spread([run['wall_seconds'] for run in runs], 1)} "
            f"| {_median(runs, 'cpu_seconds'):.1f} | {' | '.join(f'{value:.2f}' for value in memory)} "
            f"| {_median(runs, 'size') / 1e6:.0f} |"
        )


def rate_table(comparison: Comparison) -> Iterator[str]:
    """Medians over the rounds with their lowest and highest."""
    prompt = comparison.settings["prompt"]
    yield f"| | prefill of {prompt}, tok/s | decode, tok/s | import and load, s | first prefill, s |"
    yield "|---|---|---|---|---|"
    for way, runs in comparison.rounds.items():
        load, first = (statistics.median(run["samples"][name] for run in runs) for name in ("load", "first_prefill"))
        yield (
            f"| {running.TITLES[way]} | {_spread([run['prefill'] for run in runs], 1)} "
            f"| {_spread([run['decode'] for run in runs], 1)} | {load:.2f} | {first:.2f} |"
        )


def goal_table(verdicts: Sequence[Verdict], titles: Mapping[str, str]) -> Iterator[str]:
    """Each goal with the median of its rounds; ``titles`` name the ways."""
    yield "| | must | reach for | measured | |"
    yield "|---|---|---|---|---|"
    for verdict in verdicts:
        goal = verdict.goal
        sign = ">=" if goal.at_least else "<="
        unit, scale = ("x", 1.0) if goal.against else (" GB", GB)  # what is absolute is memory
        reach = "" if goal.reach is None else f"{goal.reach / scale:g}{unit}"
        against = f", against {titles[goal.against]}" if goal.against else ""
        status = verdict.status
        if status == "not asked":
            status = f"not asked: this CPU has no {goal.needs}"
        measured = _spread([value / scale for value in verdict.values], 2)
        yield f"| {goal.title}{against} | {sign} {goal.must / scale:g}{unit} | {reach} | {measured}{unit} | {status} |"


def _circumstances(comparison: Comparison) -> Iterator[str]:
    machine = comparison.machine
    rounds = max(len(runs) for runs in comparison.rounds.values())
    yield f"`{comparison.command}`, {comparison.date}, PocketLM {comparison.pocketlm}."
    yield f"Rounds: {rounds}; figures are their medians."
    yield f"{machine['cpu']}, {machine['cores']} cores, {machine.get('features') or 'features unknown'}."
    loads = [run.load_average for run in comparison.runs]
    yield f"Load of the machine before each run: {min(loads):.1f} to {max(loads):.1f}."
    for title, shared in comparison.peers.items():
        yield f"{title}, with {', '.join(shared)} shared with PocketLM." if shared else f"{title}."


def _median(runs: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def _spread(values: Sequence[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"
