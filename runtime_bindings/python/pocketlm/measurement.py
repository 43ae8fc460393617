"""One measurement of a bundle in one runtime, in a process of its own: ``python -m pocketlm.measurement JOB``.

JOB is the JSON object of a :class:`MeasurementJob`; the last line on stdout is that of a :class:`Measurement`, or
``{"error": ..., "exit_code": ...}``. It imports the runtime that it measures and nothing else that is large.
"""

import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pocketlm.bundle import open_bundle
from pocketlm.errors import PocketLMError
from pocketlm.memory import ResidentMemory, resident_memory
from pocketlm.session import Session

__all__ = ["Measurement", "MeasurementJob", "measure"]

WARM_UP_STEPS = 2  # of decode, before those that are timed: a runtime's first are slower


@dataclass(frozen=True, slots=True)
class MeasurementJob:
    """``depth`` tokens fill the cache first, then ``prompt_tokens`` are prefilled and ``new_tokens`` generated.

    ``threads`` None is the runtime's default, ``packed`` that of :meth:`pocketlm.Bundle.session`.
    """

    bundle: str
    runtime: str
    prompt_tokens: int
    new_tokens: int
    depth: int
    threads: int | None
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds, and bytes of memory at four moments (None where the system doesn't tell).

    ``import_seconds``: the runtime's libraries. ``check_seconds``: hashing the artifact, after which the page cache
    holds it. ``load_seconds``: until the session is there. ``depth_seconds``: filling the cache, 0 without a depth.
    ``first_token_seconds``: from the prompt to the first token in the session just loaded; without a depth this is its
    first call. ``prefill_seconds``: the same prompt again, after that warm-up. ``decode_seconds``: the intervals
    between the new tokens, one fewer than tokens, each with its choice of the most likely token.
    ``moments`` are ``time.monotonic()`` at the beginning of load and prefill, and at the end.
    """

    import_seconds: float
    check_seconds: float
    load_seconds: float
    depth_seconds: float
    first_token_seconds: float
    prefill_seconds: float
    decode_seconds: list[float]
    before_load: ResidentMemory | None
    loaded: ResidentMemory | None
    first_token: ResidentMemory | None
    decoded: ResidentMemory | None
    moments: dict[str, float]


def measure(job: MeasurementJob) -> Measurement:
    """Load and run as ``job`` says. Tokens of prompt and depth are random, the new ones greedy; nothing stops them."""
    bundle = open_bundle(job.bundle)
    tokens = np.random.default_rng(0).integers(0, bundle.manifest.model.vocabulary_size, job.depth + job.prompt_tokens)
    filling, prompt = tokens[: job.depth].tolist(), tokens[job.depth :].tolist()

    begin = time.monotonic()
    if job.runtime in bundle.runtimes():  # others are refused below
        _import_runtime(job.runtime)
    imported = time.monotonic()
    bundle.check_files(f"{job.runtime}/")
    checked = time.monotonic()
    before_load = resident_memory()

    load = time.monotonic()
    with bundle.session(job.runtime, threads=job.threads, packed=job.packed) as session:
        ready = time.monotonic()
        loaded = resident_memory()

        fill = time.monotonic()
        if filling:
            session.extend(filling, logits=0)
        filled = time.monotonic()
        token = _next_token(session, prompt)
        answered = time.monotonic()
        first_token = resident_memory()
        for _ in range(min(WARM_UP_STEPS, job.new_tokens - 1)):
            token = _next_token(session, [token])

        session.rewind(job.depth)
        prefill = time.monotonic()
        token = _next_token(session, prompt)
        prefilled = time.monotonic()
        intervals, last = [], prefilled
        for _ in range(job.new_tokens - 1):
            token = _next_token(session, [token])
            now = time.monotonic()
            intervals.append(now - last)
            last = now
        decoded = resident_memory()
    return Measurement(
        import_seconds=imported - begin,
        check_seconds=checked - imported,
        load_seconds=ready - load,
        depth_seconds=filled - fill if filling else 0.0,
        first_token_seconds=answered - filled,
        prefill_seconds=prefilled - prefill,
        decode_seconds=intervals,
        before_load=before_load,
        loaded=loaded,
        first_token=first_token,
        decoded=decoded,
        moments={"load": load, "prefill": filled, "end": last},
    )


def _import_runtime(name: str) -> None:
    module: Any = importlib.import_module(f"pocketlm.runtimes.{name}")
    if name == "executorch":  # whose module leaves its libraries to the first session
        module.load_binding()


def _next_token(session: Session, tokens: Sequence[int]) -> int:
    return int(session.extend(tokens)[-1].argmax())


def main() -> None:
    """Measure the job of the command line; exit code 1 with an error that was foreseen."""
    try:
        result: dict[str, Any] = asdict(measure(MeasurementJob(**json.loads(sys.argv[1]))))
    except PocketLMError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    print(json.dumps(result))
    sys.exit(1 if "error" in result else 0)


if __name__ == "__main__":
    main()
