"""Runtimes side by side: each round measures every artifact once, each in a fresh process on the same core."""

import json
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pocketlm.errors import InputError, PocketLMError
from pocketlm_bench.peer.commands import (
    Command,
    export_llm_commands,
    genai_command,
    gguf_command,
    pocketlm_command,
    run,
)
from pocketlm_bench.peer.environments import Environment
from pocketlm_bench.peer.rates import Samples, Settings

__all__ = ["TITLES", "Run", "compare_rates", "make_artifacts", "settings_for"]

TITLES = {
    "genai": "onnxruntime-genai on its own artifact",
    "onnx": "PocketLM, ONNX, head int4",
    "executorch": "PocketLM, .pte, head int4",
    "llama_cpp": "llama.cpp, Q4_0",
    "onnx_default": "PocketLM, ONNX, default head",
    "executorch_default": "PocketLM, .pte, default head",
    "export_llm": "export_llm's .pte, without a runner",
}
OURS = {
    "onnx": ("onnx", "int4"),
    "executorch": ("executorch", "int4"),
    "onnx_default": ("onnx", "int8"),
    "executorch_default": ("executorch", "int8"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """``prefill`` and ``decode`` in tokens a second, medians over the process's repetitions; ``peak_resident`` in bytes
    and with everything that the process imported; ``samples`` are the process's own."""

    way: str
    round: int
    prefill: float
    decode: float
    peak_resident: int
    load_average: float
    samples: Samples


def settings_for(checkpoint: Path, context: int, repetitions: int, core: int | None) -> Settings:
    """Settings without an artifact; ``core`` None is the last that this process may use."""
    usable = sorted(os.sched_getaffinity(0))
    if core is not None and core not in usable:
        raise InputError(f"core {core} can't be used by this process: {', '.join(map(str, usable))}")
    try:
        vocabulary = int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint / 'config.json'}: no vocab_size") from error
    settings = Settings("", usable[-1] if core is None else core, context, repetitions=repetitions)
    needed = max(settings.prompt, settings.depth + settings.tokens)
    if context <= needed:
        raise InputError(f"a context of {context} is too short: a measurement needs more than {needed} positions")
    return replace(settings, vocabulary=vocabulary)


def make_artifacts(
    checkpoint: Path, work: Path, environments: Mapping[str, Environment], context: int
) -> dict[str, str]:
    """What each way opens. Ours are made anew, a peer's is kept for as long as checkpoint and versions are the same."""
    work.mkdir(parents=True, exist_ok=True)
    made = {}
    for head in ("int4", "int8"):
        bundle = work / f"head-{head}.pocketlm"
        run(
            pocketlm_command(
                checkpoint, bundle, work / "store", targets=("onnx", "executorch"), head=head, context=context
            )
        )
        made.update({way: f"{runtime}:{bundle}" for way, (runtime, its_head) in OURS.items() if its_head == head})
    for name, environment in environments.items():
        output = work / {"genai": "genai", "llama_cpp": "model-q4_0.gguf", "export_llm": "export_llm.pte"}[name]
        stamp = _stamp(checkpoint, environment, context)
        kept = output.with_name(f"{output.name}.json")
        if not (output.exists() and kept.exists() and json.loads(kept.read_text(encoding="utf-8")) == stamp):
            kept.unlink(missing_ok=True)
            _make(name, environment, checkpoint, output, context)
            kept.write_text(json.dumps(stamp), encoding="utf-8")
        made[name] = str(output)
    return {way: made[way] for way in TITLES if way in made}


def _stamp(checkpoint: Path, environment: Environment, context: int) -> dict[str, object]:
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file()]
    contents = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"checkpoint": contents, "packages": list(environment.packages), "context": context}


def _make(name: str, environment: Environment, checkpoint: Path, output: Path, context: int) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    if name == "genai":
        run(genai_command(environment, checkpoint, output))
    elif name == "llama_cpp":
        run(gguf_command(environment, checkpoint, output))
    else:
        for command in export_llm_commands(environment, checkpoint, output, context):
            run(command)


def compare_rates(
    artifacts: Mapping[str, str], environments: Mapping[str, Environment], settings: Settings, rounds: int
) -> Iterator[Run]:
    """``rounds`` of every artifact, A B C, A B C. Raises :class:`PocketLMError` if a process fails."""
    for number in range(rounds):
        for way, artifact in artifacts.items():
            yield _measure(way, number, environments.get(way), replace(settings, artifact=artifact))


def _measure(way: str, number: int, environment: Environment | None, settings: Settings) -> Run:
    load = os.getloadavg()[0]
    module = "ours" if environment is None else way
    watched = run(Command(("-m", f"pocketlm_bench.peer.{module}", json.dumps(asdict(settings))), environment))
    samples = _samples(watched.output)
    return Run(
        way=way,
        round=number,
        prefill=settings.prompt / statistics.median(samples.prefill),
        decode=statistics.median(decode_rate(intervals) for intervals in samples.decode),
        peak_resident=watched.highest_resident,
        load_average=load,
        samples=samples,
    )


def decode_rate(intervals: list[float]) -> float:
    """Tokens a second: n - 1 tokens over n - 1 intervals."""
    return len(intervals) / sum(intervals)


def _samples(output: str) -> Samples:
    """The last line of a child: runtimes print what they like before it."""
    line = output.strip().rpartition("\n")[2]
    try:
        return TypeAdapter(Samples).validate_json(line)
    except ValidationError as error:
        raise PocketLMError(f"a measuring process ended with {line[:200]!r} instead of its samples") from error
