"""The measurement of a runtime's speed, the same in every environment: this file needs the standard library alone.

A child process loads one artifact, is pinned to one core, and prints one JSON document of raw samples.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Decoder", "Samples", "Settings", "main"]


@dataclass(frozen=True, slots=True)
class Settings:
    """One child's task. Every runtime gets the same ids, the same cache of ``context`` positions, one thread."""

    artifact: str
    core: int
    context: int = 1024
    prompt: int = 128
    """Tokens of the prefill that is timed."""
    depth: int = 16
    """Tokens before those whose decoding is timed."""
    tokens: int = 33
    """n tokens, which are n - 1 intervals: the first of them ends a prefill."""
    repetitions: int = 3
    vocabulary: int = 1000

    def ids(self, count: int) -> list[int]:
        """``count`` ids that spread over the vocabulary and don't repeat."""
        return [(10 + 7919 * index) % self.vocabulary for index in range(count)]


class Decoder(Protocol):
    """A loaded model with a cache. Choosing a token is greedy, and part of what is timed."""

    def begin(self) -> None:
        """Empty the cache; not timed."""

    def prefill(self, tokens: list[int]) -> int:
        """Run the prompt, return the id of the first new token."""

    def step(self, token: int) -> int:
        """Run one token, return the id of the next."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds. ``load`` includes the import of the runtime, and the check of the files where there is one. ``decode``
    has, for each repetition, the interval between every two tokens."""

    load: float
    first_prefill: float
    """The first of the process: some runtimes pack weights in it. No part of ``prefill``."""
    prefill: list[float]
    decode: list[list[float]]
    greedy: list[int]
    """The ids of the last repetition."""
    memory: dict[str, int]
    """Bytes at the end, as the kernel says: ``VmHWM``, ``RssAnon``, ``RssFile``."""
    runtime: str
    """Name, version, and the kernels it says it has."""


def main(load: Callable[[Settings], tuple[Decoder, str]]) -> None:
    """Measure what ``load`` returns under the settings in the first argument, and print the samples as JSON."""
    settings = Settings(**json.loads(sys.argv[1]))
    os.sched_setaffinity(0, {settings.core})
    print(json.dumps(asdict(_measure(load, settings))))


def _measure(load: Callable[[Settings], tuple[Decoder, str]], settings: Settings) -> Samples:
    begin = time.perf_counter()
    decoder, runtime = load(settings)
    loaded = time.perf_counter() - begin

    first = _prefill(decoder, settings.ids(settings.prompt))
    _decode(decoder, settings, tokens=3)  # a runtime's first steps are not its later ones
    prefills, intervals = [], []
    greedy: list[int] = []
    for _ in range(settings.repetitions):
        prefills.append(_prefill(decoder, settings.ids(settings.prompt)))
        greedy, seconds = _decode(decoder, settings, settings.tokens)
        intervals.append(seconds)
    return Samples(loaded, first, prefills, intervals, greedy, _memory(), runtime)


def _prefill(decoder: Decoder, tokens: list[int]) -> float:
    decoder.begin()
    begin = time.perf_counter()
    decoder.prefill(tokens)
    return time.perf_counter() - begin


def _decode(decoder: Decoder, settings: Settings, tokens: int) -> tuple[list[int], list[float]]:
    decoder.begin()
    greedy = [decoder.prefill(settings.ids(settings.depth))]
    times = [time.perf_counter()]
    while len(greedy) < tokens:
        greedy.append(decoder.step(greedy[-1]))
        times.append(time.perf_counter())
    return greedy, [after - before for before, after in itertools.pairwise(times)]


def _memory() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "RssAnon:", "RssFile:")}
