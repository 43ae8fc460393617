"""Bits per byte of a bundle's artifacts, and of the checkpoint they came from, on the same windows of a text.

    python -m pocketlm_bench.quality BUNDLE --text FILE [--checkpoint FOLDER] [--windows 8] [--tokens 256]

The text is tokenized once and cut into windows spread evenly over it; in each, every token but the first is predicted
from those before it. Bits per byte divide the loss by the UTF-8 bytes of the predicted tokens' text, so that models
with other tokenizers compare. With --checkpoint, the eager float32 reference on the original weights runs on the same
windows, and each artifact's mean KL divergence from it is given.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

import pocketlm
from pocketlm.bundle import Bundle, open_bundle
from pocketlm.session import Session

__all__ = ["Quality", "measure", "windows_of"]

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quality:
    """``kl`` is the mean KL(reference || artifact) in nats per token; None without a reference."""

    name: str
    bits_per_byte: float
    nats_per_token: float
    kl: float | None
    tokens: int
    seconds: float


def windows_of(bundle: Bundle, text: str, count: int, length: int) -> list[list[int]]:
    """``count`` windows of ``length`` tokens spread evenly over ``text``; fewer if the text is short."""
    ids = bundle.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= length:
        return [ids]
    count = min(count, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [ids[start : start + length] for start in starts]


def measure(
    name: str, session: Session, bundle: Bundle, windows: Sequence[Sequence[int]], expected: Sequence[Logits] | None
) -> Quality:
    """Run every window through ``session``; ``expected`` are the reference's logits of the same windows."""
    nats, divergence, predicted, size = 0.0, 0.0, 0, 0
    begin = time.perf_counter()
    for index, window in enumerate(windows):
        session.rewind(0)
        log_probabilities = _log_softmax(session.extend(window[:-1], logits=len(window) - 1))
        targets = np.asarray(window[1:])
        nats -= float(log_probabilities[np.arange(len(targets)), targets].sum())
        predicted += len(targets)
        size += len(bundle.tokenizer.decode(list(window[1:]), skip_special_tokens=False).encode())
        if expected is not None:
            truth = _log_softmax(expected[index])
            divergence += float((np.exp(truth) * (truth - log_probabilities)).sum())
    seconds = time.perf_counter() - begin
    kl = divergence / predicted if expected is not None else None
    return Quality(name, nats / math.log(2) / size, nats / predicted, kl, predicted, seconds)


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def reference_logits(
    checkpoint: Path, context_length: int, windows: Sequence[Sequence[int]]
) -> tuple[Session, list[Logits]]:
    """The eager float32 reference on the checkpoint's own weights, and its logits of every window."""
    from pocketlm_export.architectures import build_graph
    from pocketlm_export.checkpoint.checkpoint import open_checkpoint
    from pocketlm_export.quantization.weights import Weights
    from pocketlm_export.verify.reference import ReferenceSession

    opened = open_checkpoint(checkpoint)
    session = ReferenceSession(build_graph(opened.config, context_length), Weights(opened.tensors, {}, 0))
    logits = []
    for window in windows:
        session.rewind(0)
        logits.append(session.extend(window[:-1], logits=len(window) - 1))
    return session, logits


def run(
    bundle: Bundle, text: str, checkpoint: Path | None, runtimes: Sequence[str], count: int, length: int
) -> Iterator[Quality]:
    """The reference first, if there is a checkpoint, then each runtime."""
    windows = windows_of(bundle, text, count, min(length, bundle.manifest.model.context_length))
    expected = None
    if checkpoint is not None:
        session, expected = reference_logits(checkpoint, bundle.manifest.model.context_length, windows)
        yield measure("reference fp32", session, bundle, windows, expected)
    for runtime in runtimes:
        with bundle.session(runtime) as session:
            yield measure(f"{runtime} {bundle.manifest.scheme.name}", session, bundle, windows, expected)


def main(
    bundle: Path,
    text: Annotated[Path, typer.Option(help="UTF-8 text.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The original, for the reference and the KL divergence.")
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: all of the bundle's that are installed.")
    ] = None,
    windows: int = 8,
    tokens: int = 256,
    json_output: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print bits per byte, nats per token and mean KL of each artifact."""
    opened = open_bundle(bundle)
    runtimes = runtime or opened.runtimes()
    rows = []
    for quality in run(opened, text.read_text(encoding="utf-8"), checkpoint, runtimes, windows, tokens):
        rows.append(asdict(quality))
        if not json_output:
            loss = f"{quality.bits_per_byte:9.4f} bits/byte{quality.nats_per_token:9.4f} nats/token"
            kl = "" if quality.kl is None else f"{quality.kl:9.4f} KL"
            print(f"{quality.name:18}{loss}{kl}{quality.seconds:8.1f} s", flush=True)
    if json_output:
        print(json.dumps({"pocketlm": pocketlm.__version__, "results": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
