"""A session over a small recurrent-free model in numpy, with a real key/value cache."""

from typing import Any

import numpy as np

from pocketlm.session import Session

WIDTH = 16


class TinySession(Session):
    """One attention layer with a cache of keys and values; what it answers depends on all tokens and positions."""

    def __init__(self, vocabulary_size: int, *, context_length: int = 64, longest_call: int = 5, rows: int = 3) -> None:
        super().__init__(
            runtime="numpy",
            context_length=context_length,
            vocabulary_size=vocabulary_size,
            longest_call=longest_call,
            rows=rows,
        )
        random = np.random.default_rng(3)
        self._embedding = random.normal(0, 1, (vocabulary_size, WIDTH))
        self._places = random.normal(0, 1, (context_length, WIDTH))
        self._query, self._key, self._value = random.normal(0, 0.4, (3, WIDTH, WIDTH))
        self._keys = np.full((context_length, WIDTH), np.nan)
        self._values = np.full((context_length, WIDTH), np.nan)
        self.calls: list[tuple[int, int, int]] = []
        """(position, tokens, rows) of every call."""

    def _run(self, tokens: np.ndarray, position: int, rows: int) -> np.ndarray:
        self.calls.append((position, len(tokens), rows))
        outputs = []
        for offset, token in enumerate(tokens):
            place = position + offset
            state = self._embedding[token] + self._places[place]
            self._keys[place], self._values[place] = state @ self._key, state @ self._value
            weights = np.exp(self._keys[: place + 1] @ (state @ self._query) / 8)
            mixed = weights @ self._values[: place + 1] / weights.sum()
            outputs.append(self._embedding @ (state + mixed))
        logits: Any = np.array(outputs, np.float32)
        return logits[len(tokens) - rows :]

    def _close(self) -> None:
        del self._keys, self._values
