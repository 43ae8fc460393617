"""``pocketlm compare``: two results of ``bench`` as ratios with intervals, and limits that they have to keep."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketlm.cli.console import Debug, Json, note, print_json, reported
from pocketlm.errors import CheckError, InputError, printable

if TYPE_CHECKING:
    from pocketlm.measuring.comparison import Comparison
    from pocketlm.measuring.gate import GateVerdict
    from pocketlm.results import BenchResult

__all__ = ["EXAMPLE", "compare"]

EXAMPLE = "Example: pocketlm compare before.json after.json --gate 'decode>=0.95,anonymous<=1.05,top1>=0.99'"
SIZES = ("resident", "anonymous", "file_backed", "added_anonymous")
COUNTS = ("prefill_instructions", "decode_instructions")
MEGA = 1e6


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="What it is compared with: bench --json wrote it.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="What is compared.")],
    gate: Annotated[
        str | None,
        typer.Option("--gate", metavar="G,...", help="Limits of B over A: FIGURE>=N or FIGURE<=N. One that fails: 1."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the runs of two results that share device, runtime and depth.

    Figures are what the table names; arm64_instructions stands for those of prefill and decode. A ratio's interval is
    the 95 % of a bootstrap over the repetitions of both.
    """
    with reported(debug):
        from pocketlm.measuring.comparison import compare as compare_results
        from pocketlm.measuring.gate import judge, parse_gates

        gates = parse_gates(gate) if gate is not None else ()
        comparison = compare_results(_read(a), _read(b), (str(a), str(b)))
        verdicts = judge(comparison, gates)
        if json:
            print_json({**comparison.model_dump(), "gates": [verdict.model_dump() for verdict in verdicts]})
        else:
            for line in (*_comparison_lines(comparison), *_verdict_lines(verdicts)):
                print(line)
        for verdict in verdicts:
            if verdict.uncertain:
                note(f"warning: {verdict.words}: the interval includes the limit; more repetitions would tell")
        failed = [verdict.words for verdict in verdicts if not verdict.passed]
        if failed:
            raise CheckError("; ".join(failed))


def _read(path: Path) -> "BenchResult":
    from pocketlm.results import BenchResult, read_result

    result = read_result(path)
    if not isinstance(result, BenchResult):
        raise InputError(f"{path}: 'kind' is {result.kind!r}; compare takes what pocketlm bench --json wrote")
    return result


def _comparison_lines(comparison: "Comparison") -> Iterator[str]:
    yield printable(f"A: {comparison.a}")
    yield printable(f"B: {comparison.b}")
    for pair in comparison.pairs:
        yield ""
        yield printable(f"{pair.name}{' (noisy)' if pair.noisy else ''}")
        yield f"{'':<20} {'A':>12} {'B':>12} {'B/A':>8}  95 % interval"
        for ratio in pair.ratios:
            divisor = MEGA if ratio.figure in (*SIZES, *COUNTS) else 1.0
            value = ratio.ratio
            yield (
                f"{ratio.figure:<20} {ratio.a / divisor:>12.4g} {ratio.b / divisor:>12.4g} {value.median:>8.4f}  "
                f"{value.low:.4f} to {value.high:.4f}"
            )
        if pair.same_tokens is not None:
            yield "the same tokens" if pair.same_tokens else "other tokens: the greedy answers differ"
        for figure in pair.lost:
            yield f"only in one of the results: {figure}"
        for words in (*pair.differences, *pair.noisy):
            yield printable(words)
    for words in comparison.unpaired:
        yield printable(words)


def _verdict_lines(verdicts: "Sequence[GateVerdict]") -> Iterator[str]:
    if verdicts:
        yield ""
    for verdict in verdicts:
        yield printable(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.words}")
