"""Core ML packages off a Mac: a session over the reference interpreter.

It rounds to fp16 after every operator, as the package declares, and is neither Core ML nor fast: its answers show what
the package says, its speed means nothing.
"""

import importlib.metadata

import numpy as np
import numpy.typing as npt

from pocketlm.artifact import Artifact
from pocketlm.runtimes.coreml_interpreter import Interpreter, PrecisionName
from pocketlm.session import Session

__all__ = ["CoreMLSession", "function_of", "open_session", "runtime_build"]


def function_of(tokens: int, rows: int) -> str:
    """The function of the package for a call of so many tokens, of whose last ``rows`` the logits are wanted."""
    return "score" if rows > 1 else "decode" if tokens == 1 else "prefill"


class CoreMLSession(Session):
    """A session over ``*.mlpackage`` with the functions prefill, decode and score. ``description`` says what computes.

    ``threads`` has no effect: numpy's own threads do the products.
    """

    def __init__(self, artifact: Artifact, precision: PrecisionName = "float16") -> None:
        super().__init__(
            runtime="coreml",
            context_length=artifact.context_length,
            vocabulary_size=artifact.vocabulary_size,
            longest_call=artifact.longest_call,
            rows=artifact.rows,
        )
        rounding = "float16 rounding" if precision == "float16" else precision
        self.description = f"Core ML reference interpreter, {rounding}"
        self._interpreter = Interpreter(artifact.path, precision)
        self._state = self._interpreter.make_state()

    def _run(self, tokens: npt.NDArray[np.int64], position: int, rows: int) -> npt.NDArray[np.float32]:
        inputs = {"input_ids": tokens[None].astype(np.int32), "position": np.array([position], np.int32)}
        logits = self._interpreter.predict(inputs, self._state, function_of(tokens.size, rows))["logits"][0]
        return logits[len(logits) - rows :].astype(np.float32)

    def _close(self) -> None:
        self._state = {}


def open_session(artifact: Artifact, threads: int | None) -> CoreMLSession:  # noqa: ARG001
    """A fresh session over the package; every process has the reference interpreter, a Mac too."""
    return CoreMLSession(artifact)


def runtime_build() -> tuple[str, str]:
    """The version of coremltools, whose messages it reads, and what computes in Core ML's place."""
    return importlib.metadata.version("coremltools"), "reference interpreter, float16 rounding"
