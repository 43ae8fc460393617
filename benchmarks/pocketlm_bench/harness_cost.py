"""What measuring costs: ``python -m pocketlm_bench.harness_cost BUNDLE [--runtime R] [--page PAGE]``.

The agent adds to each token that a runtime decodes the choice of the next one, a look at the clock and two lists, and
a process beside it looks at its memory. That cost is measured by itself, since a decode step's own noise is larger: the
agent's own loop over a session that answers at once, with logits as wide as the model's and the memory watched, less a
loop that only calls it. It is told as a share of a decode step of BUNDLE. So is what the watch would take from a core
that it had to share with the runtime.
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from pocketlm.agent import decode
from pocketlm.bundle import open_bundle
from pocketlm.cli.console import reported
from pocketlm.machine import circumstances
from pocketlm.measuring.bootstrap import median_figure
from pocketlm.memory import resident_memory
from pocketlm.memory_watch import INTERVAL, MemoryWatch
from pocketlm.results import Figure
from pocketlm_bench.page import insert

__all__ = ["InstantSession", "harness_seconds"]

MARKER = "harness cost"
ROUNDS = 15
TOKENS = 400  # of a round of the instant session
STEPS = 8  # of a round of the real one


class InstantSession:
    """Answers each token at once, with the same logits, float32 ``[1, vocabulary]``."""

    def __init__(self, vocabulary_size: int) -> None:
        self._logits = np.random.default_rng(0).standard_normal((1, vocabulary_size), np.float32)

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:  # noqa: ARG002
        """The logits."""
        return self._logits


def harness_seconds(vocabulary_size: int, rounds: int = ROUNDS, tokens: int = TOKENS) -> list[float]:
    """Seconds that the agent adds to a token, of each round: its loop with its watch, less the bare loop."""
    session = InstantSession(vocabulary_size)
    added = []
    for _ in range(rounds):
        bare = _bare(session, tokens)
        with MemoryWatch():
            begin = time.monotonic()
            decode(session, 0, tokens)
            measured = time.monotonic() - begin
        added.append(max(0.0, measured - bare) / (tokens - 1))
    return added


def _watch_share() -> Figure:
    """Of a core that looks at a process's memory as the watch does."""
    looks = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for _ in range(TOKENS):
            resident_memory(os.getppid())
        looks.append((time.process_time() - begin) / TOKENS / INTERVAL)
    return median_figure(looks)


def _bare(session: Any, tokens: int) -> float:
    """Seconds of calling ``session`` for one token after the other, whatever it answers."""
    begin = time.monotonic()
    for _ in range(tokens - 1):
        session.extend([0])
    return time.monotonic() - begin


def _decode_seconds(bundle: Path, runtime: str) -> list[float]:
    """Seconds of a decode step in a bare loop, of each round."""
    with open_bundle(bundle).session(runtime, threads=1) as session:
        _bare(session, STEPS)
        return [_bare(session, STEPS) / (STEPS - 1) for _ in range(ROUNDS)]


def _lines(added: Figure, step: Figure, watch: Figure, runtime: str, vocabulary_size: int) -> Iterator[str]:
    told = circumstances()
    machine = told["machine"]
    yield f"`{told['command']}`, {told['date']}; {machine['cpu']}, {machine.get('features') or 'features unknown'}."
    yield ""
    yield f"| of a decode step in {runtime}, {vocabulary_size} logits | median | 95 % interval |"
    yield "|---|---|---|"
    yield f"| the step, ms | {step.median * 1e3:.2f} | {step.low * 1e3:.2f} to {step.high * 1e3:.2f} |"
    yield f"| what the agent adds, ms | {added.median * 1e3:.3f} | {added.low * 1e3:.3f} to {added.high * 1e3:.3f} |"
    yield f"| share of the step | {added.median / step.median:.2%} | at most {added.high / step.low:.2%} |"
    yield f"| the watch, of a core | {watch.median:.2%} | {watch.low:.2%} to {watch.high:.2%} |"


def main(
    bundle: Path,
    runtime: Annotated[str, typer.Option(help="What decodes.")] = "executorch",
    page: Annotated[Path | None, typer.Option(help=f"Where the table goes, between the markers of {MARKER!r}.")] = None,
) -> None:
    """Print the agent's own cost as a share of a decode step."""
    with reported(debug=False):
        vocabulary_size = open_bundle(bundle).manifest.model.vocabulary_size
        added = median_figure(harness_seconds(vocabulary_size))
        step = median_figure(_decode_seconds(bundle, runtime))
        lines = list(_lines(added, step, _watch_share(), runtime, vocabulary_size))
        print("\n".join(lines))
        if page is not None:
            page.write_text(insert(page.read_text(encoding="utf-8"), MARKER, lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
