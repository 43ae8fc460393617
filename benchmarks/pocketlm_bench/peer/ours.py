"""A PocketLM session measured as the peers are: ``rates.Settings.artifact`` is ``RUNTIME:BUNDLE``."""

import importlib.metadata

import numpy as np

from pocketlm.bundle import open_bundle
from pocketlm.session import Session
from pocketlm_bench.peer.rates import Settings, main


class SessionDecoder:
    """A session, and the highest logit."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def begin(self) -> None:
        self._session.rewind(0)

    def prefill(self, tokens: list[int]) -> int:
        return int(np.argmax(self._session.extend(tokens)[-1]))

    def step(self, token: int) -> int:
        return int(np.argmax(self._session.extend([token])[-1]))


def _load(settings: Settings) -> tuple[SessionDecoder, str]:
    runtime, _, bundle = settings.artifact.partition(":")
    package = {"onnx": "onnxruntime", "executorch": "executorch"}[runtime]
    session = open_bundle(bundle).session(runtime, threads=1)
    return SessionDecoder(session), f"PocketLM over {package} {importlib.metadata.version(package)}"


if __name__ == "__main__":
    main(_load)
