"""How the next token is chosen from the logits; the order and meaning of transformers' logits processors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from pocketlm.errors import InputError, PocketLMError

__all__ = ["Sampler", "Sampling"]

_TRANSFORMERS_TOP_K = 50  # what transformers samples with where generation_config.json has no top_k
_HEAD = 1024


@dataclass(frozen=True)
class Sampling:
    """Options of one generation. The filters leave at least one token; with temperature 0 they change nothing."""

    temperature: float = 0.0
    """0 takes the most likely token, else the logits are divided by it."""
    top_k: int = 0
    """Only tokens at least as likely as the k-th; 0 is off."""
    top_p: float = 1.0
    """Only the most likely tokens that together pass this probability; 1 is off."""
    min_p: float = 0.0
    """Only tokens with at least this share of the best token's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens seen before, the prompt's included, are divided by it, negative ones multiplied."""
    seed: int | None = None
    """The same seed gives the same tokens; None takes a new one every time."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, math.inf)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf)
        if self.repetition_penalty == 0:
            raise InputError("repetition_penalty must be above 0; 1 is off")
        for name, value in (("top_k", self.top_k), ("seed", 0 if self.seed is None else self.seed)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"{name} must be a whole number from 0 on, not {value!r}")

    @classmethod
    def resolve(
        cls,
        defaults: Mapping[str, object],
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Self:
        """Fill what is None from generation_config.json's ``defaults``, as transformers reads them.

        Without ``do_sample`` the default is greedy; a ``temperature`` above 0, or a filter without a temperature, asks
        for sampling. Where sampling has no ``top_k`` in ``defaults``, it is transformers' 50.
        """
        penalty = _default(defaults, "repetition_penalty", 1.0) if repetition_penalty is None else repetition_penalty
        filtered = any(value is not None for value in (top_k, top_p, min_p))
        samples = temperature > 0 if temperature is not None else filtered or defaults.get("do_sample") is True
        if not samples:
            return cls(temperature=temperature or 0.0, repetition_penalty=penalty, seed=seed)
        return cls(
            temperature=_default(defaults, "temperature", 1.0) if temperature is None else temperature,
            top_k=int(_default(defaults, "top_k", _TRANSFORMERS_TOP_K)) if top_k is None else top_k,
            top_p=_default(defaults, "top_p", 1.0) if top_p is None else top_p,
            min_p=_default(defaults, "min_p", 0.0) if min_p is None else min_p,
            repetition_penalty=penalty,
            seed=seed,
        )


class Sampler:
    """Draws tokens with the options of one generation; two samplers with the same seed draw alike."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def sample(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> int:
        """The next token for float32 ``[vocabulary]`` logits; ``history`` holds all tokens before it."""
        scores = self._penalized(logits, history)
        if self.sampling.temperature == 0:
            return int(np.argmax(scores))
        tokens, probabilities = self._distribution(scores)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(drawn), tokens.size - 1)])

    def distribution(
        self, logits: npt.NDArray[np.float32], history: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The tokens that can be drawn, ascending, and their probabilities, float64 and of sum 1."""
        scores = self._penalized(logits, history)
        if self.sampling.temperature == 0:
            return np.array([np.argmax(scores)], np.int64), np.ones(1)
        return self._distribution(scores)

    def _penalized(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> npt.NDArray[np.float64]:
        scores = logits.astype(np.float64)
        if not np.isfinite(scores.max(initial=-np.inf)):
            raise PocketLMError("the model's logits have no finite maximum (NaN or infinity): nothing can be sampled")
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            seen = np.unique(np.asarray(history, np.int64))
            seen = seen[seen < scores.size]
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return scores

    def _distribution(self, scores: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        options = self.sampling
        # The maximum comes off first: a tiny temperature must not turn large logits into infinity.
        scores = (scores - scores.max()) / options.temperature
        tokens = np.arange(scores.size)
        if 0 < options.top_k < scores.size:
            tokens = np.flatnonzero(scores >= np.partition(scores, -options.top_k)[-options.top_k])
        if options.top_p < 1:
            tokens = tokens[_top_p(scores[tokens], options.top_p)]
        if options.min_p > 0:
            probabilities = _softmax(scores[tokens])
            tokens = tokens[probabilities >= options.min_p * probabilities.max()]
        return tokens, _softmax(scores[tokens])


def _softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum(), np.float64)


def _top_p(scores: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.bool_]:
    """Which to keep: all but the least likely whose probabilities' sum is at most ``1 - top_p``."""
    probabilities = _softmax(scores)
    head = np.arange(probabilities.size)
    tail = 0.0
    if probabilities.size > _HEAD:  # sorting a few instead of a whole vocabulary, if the others go anyway
        likely = probabilities >= np.partition(probabilities, -_HEAD)[-_HEAD]
        rest = float(probabilities[~likely].sum())
        if rest <= 1 - top_p:
            head, tail = np.flatnonzero(likely), rest
    # By score: it still tells tokens apart whose probabilities are rounded to the same number.
    order = head[np.argsort(scores[head], kind="stable")]
    kept = tail + np.cumsum(probabilities[order]) > 1 - top_p
    kept[-1] = True
    result = np.zeros(probabilities.size, np.bool_)
    result[order[kept]] = True
    return result


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high):
        limits = f"from {low} to {high}" if math.isfinite(high) else f"from {low} on"
        raise InputError(f"{name} must be a number {limits}, not {value!r}")


def _default(defaults: Mapping[str, object], name: str, fallback: float) -> float:
    value = defaults.get(name)
    if value is None:
        return fallback
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"generation_config.json: {name} must be a number, not {value!r}")
    return value
