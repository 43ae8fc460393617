"""``pocketlm bench``: load, first token, prefill, decode and memory of a bundle in a runtime, here."""

import json as json_format
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketlm.cli.console import Debug, Packed, Runtime, Threads, note, print_json, reported
from pocketlm.errors import InputError

if TYPE_CHECKING:
    from pocketlm.benchmark import Repetition
    from pocketlm.measurement import MeasurementJob

__all__ = ["EXAMPLE", "bench"]

EXAMPLE = "Example: pocketlm bench smollm2.pocketlm --runtime onnx --threads 1 --json smollm2-onnx.json"
# Figure of the summary, its label, its unit, and what to divide by.
SECONDS, RATE, SIZE = ("s", 1.0, ".3f"), ("tok/s", 1.0, ".1f"), ("MB", 1e6, ".1f")
TABLE = (
    ("import_seconds", "import", SECONDS),
    ("check_seconds", "check", SECONDS),
    ("load_seconds", "load", SECONDS),
    ("depth_seconds", "fill", SECONDS),
    ("first_token_seconds", "first token", SECONDS),
    ("prefill_tokens_per_second", "prefill", RATE),
    ("decode_tokens_per_second", "decode", RATE),
    ("peak_resident", "peak memory", SIZE),
    ("peak_anonymous", "  anonymous", SIZE),
    ("peak_file_backed", "  file-backed", SIZE),
    ("added_anonymous", "model's own", SIZE),
    ("added_file_backed", "  file-backed", SIZE),
)


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to measure.")],
    runtime: Runtime = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens generated; their rate counts the intervals between them.")
    ] = 64,
    depth: Annotated[int, typer.Option(metavar="N", help="Tokens that fill the cache before the prompt.")] = 0,
    threads: Threads = None,
    packed: Packed = False,
    repetitions: Annotated[int, typer.Option(metavar="N", help="Each in a process of its own.")] = 5,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write facts and raw samples; - is stdout, in place of the table."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure load, first token, prefill, decode and peak memory of a bundle on this machine.

    Load is with the file in the page cache; the first token's time is that of the first prompt in a fresh session, the
    rate of prefill that of the same prompt again. Core ML is not measured (exit code 3): what computes in its place is
    the reference interpreter.
    """
    with reported(debug):
        from pocketlm.benchmark import check_job, choose_runtime, measure_once
        from pocketlm.bundle import open_bundle
        from pocketlm.measurement import MeasurementJob

        if repetitions < 1:
            raise InputError(f"--repetitions must be at least 1, not {repetitions}")
        opened = open_bundle(bundle)
        job = MeasurementJob(
            bundle=str(bundle), runtime=choose_runtime(opened, runtime), prompt_tokens=prompt_tokens,
            new_tokens=new_tokens, depth=depth, threads=threads, packed=packed,
        )  # fmt: skip
        check_job(opened, job)
        if packed:
            note("making the packed weights, unless they are there")
            measure_once(job)
        done = []
        for number in range(1, repetitions + 1):
            done.append(measure_once(job))
            note(f"repetition {number} of {repetitions}: {done[-1].decode_rate:.1f} tok/s of decode")
        document = _document(job, done)
        if json == Path("-"):
            print_json(document)
            return
        for line in _table(document):
            print(line)
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(json_format.dumps(document, indent=1) + "\n", encoding="utf-8")


def _document(job: "MeasurementJob", repetitions: "list[Repetition]") -> dict[str, Any]:
    import importlib.metadata

    from pocketlm.benchmark import summarize
    from pocketlm.bundle import RUNTIMES
    from pocketlm.machine import circumstances

    return {
        "kind": "bench",
        **circumstances(),
        "runtime_version": importlib.metadata.version(RUNTIMES[job.runtime]),
        "job": asdict(job),
        "summary": summarize(job, repetitions),
        "repetitions": [asdict(repetition) for repetition in repetitions],
    }


def _table(document: Mapping[str, Any]) -> Iterator[str]:
    job, machine, summary = document["job"], document["machine"], document["summary"]
    threads = "its default" if job["threads"] is None else job["threads"]
    packed = ", packed weights" if job["packed"] else ""
    yield f"{job['bundle']} in {job['runtime']} {document['runtime_version']}, threads: {threads}{packed}"
    yield (
        f"prompt {job['prompt_tokens']}, new {job['new_tokens']}, depth {job['depth']}; "
        f"{len(document['repetitions'])} processes"
    )
    yield f"{machine['cpu']}, {machine['cores']} cores: {machine.get('features') or 'features unknown'}"
    yield f"{'':<14} {'median':>10} {'lowest':>10} {'highest':>10}"
    for name, label, (unit, divisor, digits) in TABLE:
        if name in summary:
            cells = (f"{summary[name][kind] / divisor:>10{digits}}" for kind in ("median", "lowest", "highest"))
            yield f"{label:<14} {' '.join(cells)} {unit}"
