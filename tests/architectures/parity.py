"""How two runs over the same tokens are compared."""

import numpy as np

PROMPT, DECODE = 60, 64


def run(session, tokens: list[int]) -> np.ndarray:
    """Logits of every token: the prompt in one call, then one token a call."""
    session.rewind(0)
    parts = [session.extend(tokens[:PROMPT], logits=PROMPT)]
    parts += [session.extend([token]) for token in tokens[PROMPT : PROMPT + DECODE]]
    return np.concatenate(parts).astype(np.float64)


def difference(logits: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Largest and root-mean-square difference over the deviation of the expected logits."""
    error = logits - expected
    return float(np.abs(error).max() / expected.std()), float(np.sqrt((error**2).mean()) / expected.std())


def position_kl(logits: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """KL(expected || logits) of each position, nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(-1)


def mean_kl(logits: np.ndarray, expected: np.ndarray) -> float:
    """Mean over positions of :func:`position_kl`."""
    return float(position_kl(logits, expected).mean())
