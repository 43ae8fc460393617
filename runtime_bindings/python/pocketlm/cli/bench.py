"""``pocketlm bench``: load, first token, prefill, decode and memory of a bundle, on whatever device."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketlm.cli.console import Debug, Packed, Threads, note, reported
from pocketlm.errors import CheckError, InputError

if TYPE_CHECKING:
    from pocketlm.results import BenchResult

__all__ = ["EXAMPLE", "bench"]

EXAMPLE = "Example: pocketlm bench smollm2.pocketlm --runtime onnx --threads 1 --json smollm2-onnx.json"


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to measure.")],
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", metavar="D", help="host (default), qemu:arm64[@CPU], adb:SERIAL, ios:UDID; repeatable."
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime", metavar="R", help="executorch or onnx; repeatable. Default: the first that is there."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens generated; their rate counts the intervals between them.")
    ] = 64,
    depth: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Tokens that fill the cache before. Default: 0, 512 and 2048 that fit."),
    ] = None,
    threads: Threads = None,
    cores: Annotated[
        str | None, typer.Option("--cores", metavar="N,N,...", help="The cores to run on. Default: all.")
    ] = None,
    packed: Packed = False,
    repetitions: Annotated[int, typer.Option(metavar="N", help="Each in a process of its own.")] = 5,
    cold: Annotated[bool, typer.Option("--cold/--no-cold", help="Measure loads from the disk, too.")] = True,
    cool_down: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a hot device may take before each repetition.")
    ] = 0.0,
    limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long one process may take. Default: 600, emulated 3600."),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Tell which operators really ran, and how long.")] = False,
    strict_backend: Annotated[
        bool,
        typer.Option("--strict-backend", help="Profile, and fail if an operator fell back to another kernel."),
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write facts and raw samples; - is stdout, in place of the table."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure load, first token, prefill, decode and peak memory of a bundle on a device.

    The first token's time is that of the first prompt in a fresh session, the rate of prefill that of the same prompt
    again. An emulated CPU counts instructions instead, and no time. Core ML is not measured on a host (exit code 3):
    what computes in its place is the reference interpreter.
    """
    with reported(debug):
        from pocketlm.bundle import open_bundle
        from pocketlm.cli.bench_table import bench_lines
        from pocketlm.measuring.benchmark import BenchOptions, measure_bundle

        options = BenchOptions(
            prompt_tokens=prompt_tokens, new_tokens=new_tokens, depths=_numbers("--depth", depth), threads=threads,
            cores=_numbers("--cores", cores), packed=packed, repetitions=repetitions, cold=cold, cool_down=cool_down,
            limit=limit, profile=profile or strict_backend,
        )  # fmt: skip
        result = measure_bundle(open_bundle(bundle), device or ["host"], runtime or [], options, note)
        if json == Path("-"):
            print(result.to_json(), end="")
        else:
            for line in bench_lines(result):
                print(line)
        if json is not None and json != Path("-"):
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(result.to_json(), encoding="utf-8")
        if strict_backend:
            _refuse_fallbacks(result)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """``0,512`` as numbers."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r:.60}: must be whole numbers with commas between them") from None


def _refuse_fallbacks(result: "BenchResult") -> None:
    found = [
        f"{run.runtime.name} on {run.device.address}: {fallback}"
        for run in result.runs
        if run.profile is not None
        for fallback in run.profile.fallbacks
    ]
    if found:
        raise CheckError(f"--strict-backend: {'; '.join(dict.fromkeys(found))}")
