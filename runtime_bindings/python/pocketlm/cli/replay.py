"""``pocketlm replay``: recorded tokens on other runtimes and devices."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketlm.cli.console import Debug, Threads, note, reported
from pocketlm.errors import CheckError, UnavailableError

if TYPE_CHECKING:
    from pocketlm.results import Divergence, ReplayResult, ReplayRun, Unavailable

__all__ = ["EXAMPLE", "replay"]

EXAMPLE = "Example: pocketlm replay smollm2.pocketlm --session session.jsonl --device host --device qemu:arm64"

COLUMNS = ("device", "runtime", "steps", "top-1", "first divergence", "margin drift", "mean KL", "verdict")


def replay(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to replay on.")],
    session: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What run --record wrote; default: the bundle's golden session."),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(metavar="D", help="Where to replay; repeatable. Default: host.")
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(metavar="R", help="executorch, onnx or coreml; repeatable. Default: what the device runs."),
    ] = None,
    threads: Threads = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="For one runtime on one device; default: 600, emulated 3600."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the result; - is stdout, in place of the table."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Feed recorded tokens to each runtime on each device, and compare what it makes of them with the record.

    A choice that differs at a near tie passes, one at a wide margin fails; so do a margin that drifts, and a mean KL,
    beyond what the noise of the targets explains. The limits are those of the bundle's certificate.
    """
    with reported(debug):
        from pocketlm.replaying.replay import replay as replay_session

        result = replay_session(
            bundle,
            session,
            devices=device or ("host",),
            runtimes=runtime or None,
            threads=threads,
            limit=limit,
            progress=note,
        )
        if json == Path("-"):
            print(result.to_json(), end="")
        else:
            for line in _table(result):
                print(line)
            if json is not None:
                json.parent.mkdir(parents=True, exist_ok=True)
                json.write_text(result.to_json(), encoding="utf-8")
        _raise_for(result)


def _raise_for(result: "ReplayResult") -> None:
    failures = [
        f"{run.device.address}, {run.runtime.name}: {failure}" for run in result.runs for failure in run.failures
    ]
    if failures:
        raise CheckError("; ".join(failures))
    if result.unavailable:
        raise UnavailableError("; ".join(map(_reason, result.unavailable)))


def _reason(missing: "Unavailable") -> str:
    named = missing.reason.startswith(missing.address)
    return missing.reason if named else f"{missing.address}: {missing.reason}"


def _table(result: "ReplayResult") -> Iterator[str]:
    recorded, bundle = result.session, result.bundle.name
    by = "the float64 reference"
    if recorded.recorded_by is not None:
        by = f"{recorded.recorded_by.name} {recorded.recorded_by.version}"
    yield f"{recorded.name} of {bundle}, recorded by {by}; sequences {recorded.sequences}, steps {recorded.steps}"
    rows = [COLUMNS, *map(_row, result.runs)]
    for missing in result.unavailable:
        rows.append((missing.address, missing.runtime or "", "", "", "", "", "", "not available"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from dict.fromkeys(note for run in result.runs for note in run.notes)


def _row(run: "ReplayRun") -> tuple[str, ...]:
    return (
        run.device.address,
        f"{run.runtime.name} {run.runtime.version}",
        str(run.top1.positions),
        f"{run.top1.agreement:.3f}",
        _divergence(run.first_divergence),
        _figure(run.largest_drift, run.limits.drift),
        _figure(run.mean_kl, run.limits.mean_kl),
        "passed" if run.passed else "FAILED",
    )


def _divergence(divergence: "Divergence | None") -> str:
    if divergence is None:
        return "none"
    kind = "wide" if divergence.wide else "near tie"
    return f"sequence {divergence.sequence}, step {divergence.step}: {divergence.margin:.3g}, {kind}"


def _figure(figure: float | None, limit: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:.3g}" if limit is None else f"{figure:.3g} of {limit:.3g}"
