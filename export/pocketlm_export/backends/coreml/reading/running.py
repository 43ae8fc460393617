"""Runs of a package in the reference interpreter: the calls of several runs together, each weight decoded once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import InputError
from pocketlm.memory import untouched_zeros
from pocketlm.runtimes.coreml import function_of
from pocketlm.runtimes.coreml_interpreter import Interpreter, Request
from pocketlm_export.backends.reading import Run, Trace

__all__ = ["LARGEST_STATE", "Runner"]

LARGEST_STATE = 1 << 30
"""Bytes of the states of runs that go together. One that is larger goes alone: how large is for whoever chooses runs,
and verification fills no cache that takes more than this in float64."""

KEYS, VALUES = "k_cache", "v_cache"
Array = npt.NDArray[Any]


class Runner:
    """Over a package with the states ``k_cache`` and ``v_cache`` ``[layers, kv_heads, context, head_dim]``.

    ``experts``: of each function, the values ``[1, S, chosen]`` that say which experts each mixture chose.
    """

    def __init__(self, interpreter: Interpreter, experts: Mapping[str, Sequence[str]] | None = None) -> None:
        self._interpreter = interpreter
        self._experts = experts or {}

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(size or 0 for size in self._interpreter.states[KEYS].shape)

    def state_bytes(self, run: Run) -> int:
        """What the keys and values of ``run`` take; the part of the context that it doesn't reach takes nothing."""
        layers, kv_heads, _, head_dim = self._shape
        positions = run.start + len(run.tokens)
        return 2 * layers * kv_heads * positions * head_dim * self._interpreter.held_dtype(KEYS).itemsize

    def run(self, runs: Sequence[Run]) -> list[Trace]:
        """Runs whose states fit into LARGEST_STATE go together. Raises :class:`InputError` naming one that passes the
        context."""
        return [trace for batch in self._batches(runs) for trace in self._run(batch)]

    def _batches(self, runs: Sequence[Run]) -> Iterator[list[Run]]:
        batch: list[Run] = []
        held = 0
        for run in runs:
            size = self.state_bytes(run)
            if run.start + len(run.tokens) > self._shape[2]:
                raise InputError(f"run {run.name!r}: {run.start} + {len(run.tokens)} positions of {self._shape[2]}")
            if batch and held + size > LARGEST_STATE:
                yield batch
                batch, held = [], 0
            batch.append(run)
            held += size
        if batch:
            yield batch

    def _run(self, runs: Sequence[Run]) -> Iterator[Trace]:
        states = [self._state(run) for run in runs]
        requests = [request for run, state in zip(runs, states, strict=True) for request in self._requests(run, state)]
        results = iter(zip(requests, self._interpreter.predict_together(requests), strict=True))
        for run, state in zip(runs, states, strict=True):
            logits: list[Array] = []
            experts: list[list[Array]] = []
            for call, (request, result) in zip(run.calls, results, strict=False):
                logits.append(_last(result["logits"][0], call.rows))
                experts.append([result[name][0] for name in request.also])
            rows = slice(run.start, run.start + len(run.tokens))
            keys, values = ([layer[:, rows].copy() for layer in state[name]] for name in (KEYS, VALUES))
            yield Trace(logits, keys, values, [np.concatenate(calls) for calls in zip(*experts, strict=True)])

    def _state(self, run: Run) -> dict[str, Array]:
        state = {name: untouched_zeros(self._shape, self._interpreter.held_dtype(name)) for name in (KEYS, VALUES)}
        if run.past is not None:
            _, kv_heads, _, head_dim = self._shape
            for layer, places in enumerate(zip(state[KEYS], state[VALUES], strict=True)):
                for place, past in zip(places, run.past.layer(layer, kv_heads, head_dim), strict=True):
                    place[:, : run.past.positions] = past
        return state

    def _requests(self, run: Run, state: dict[str, Array]) -> Iterator[Request]:
        position = run.start
        for call in run.calls:
            inputs = {"input_ids": np.array([call.tokens], np.int32), "position": np.array([position], np.int32)}
            function = function_of(len(call.tokens), call.rows)
            yield Request(inputs, state, function, tuple(self._experts.get(function, ())))
            position += len(call.tokens)


def _last(logits: Array, rows: int) -> Array:
    return logits if len(logits) == rows else logits[len(logits) - rows :].copy()
