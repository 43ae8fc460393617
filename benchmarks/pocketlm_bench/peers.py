"""PocketLM beside its peers, measured in one run: ``python -m pocketlm_bench.peers COMMAND``.

    setup [PEER...]                  an environment for each peer, once: onnxruntime-genai, llama.cpp, export_llm
    export CHECKPOINT                the exporters: wall, CPU, peak memory, size
    run CHECKPOINT                   the runtimes on one core: prefill and decode
    page PAGE FILE...                the tables between a page's markers, from what the others wrote

Every round runs all of them one after the other, each in a fresh process, and a ratio is taken within a round, so that
a machine that slows down slows both. ``export`` and ``run`` print tables and write a JSON document with every sample.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pocketlm.cli.console import note, reported
from pocketlm.errors import InputError
from pocketlm_bench.page import insert
from pocketlm_bench.peer import exporting, running
from pocketlm_bench.peer.environments import PEERS, Environment, open_environment, set_up
from pocketlm_bench.peer.exporting import compare_exports
from pocketlm_bench.peer.record import Comparison, new_comparison, read_comparison
from pocketlm_bench.peer.running import compare_rates, make_artifacts, settings_for
from pocketlm_bench.peer.tables import lines

__all__ = ["app"]

WORK = Path("build/peers")
USUAL = ("genai", "llama_cpp")
EXPORTERS = ("genai", "export_llm")  # llama.cpp's file is written here, and its time is nobody's

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Checkpoint = Annotated[Path, typer.Argument(help="A folder.", exists=True, file_okay=False)]
Work = Annotated[Path, typer.Option(help="For artifacts; needs four times the checkpoint's size.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each is measured.")]
Output = Annotated[Path | None, typer.Option(help="The JSON document; default: in the work folder.")]


@app.command()
def setup(
    peers: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(PEERS)}; default: the first two.")] = None,
    share_torch: Annotated[
        bool, typer.Option(help="Take torch from this environment instead of installing its CPU wheel.")
    ] = False,
) -> None:
    """Make the environments of the peers, each once, in $XDG_CACHE_HOME/pocketlm/peers."""
    with reported(debug=False):
        for name in peers or USUAL:
            note(f"{name}: {PEERS[name].needs if name in PEERS else ''}")
            print(set_up(name, share_torch=share_torch).folder)


@app.command()
def export(
    checkpoint: Checkpoint,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Repeatable: genai, which is the default, and export_llm: 20 minutes, 5 GB."),
    ] = None,
    rounds: Rounds = 3,
    context: int = 4096,
    work: Work = WORK,
    output: Output = None,
) -> None:
    """Compare exporters."""
    with reported(debug=False):
        environments = _environments(peers or ["genai"], EXPORTERS)
        runs = []
        for run in compare_exports(checkpoint, work, environments, rounds, context):
            memory = f"{run.peak_resident / 1e9:6.2f} GB"
            note(f"{exporting.TITLES[run.way]:36}{run.wall_seconds:8.1f} s{run.cpu_seconds:8.1f} s CPU{memory}")
            runs.append(run)
        settings = {"rounds": rounds, "context": context}
        _finish(new_comparison("exports", checkpoint, environments, settings, runs), output or work)


@app.command()
def run(
    checkpoint: Checkpoint,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Repeatable: genai and llama_cpp, which are the default, and export_llm."),
    ] = None,
    rounds: Rounds = 5,
    repetitions: Annotated[int, typer.Option(min=1, help="Of prefill and decode in each process.")] = 3,
    context: int = 1024,
    core: Annotated[int | None, typer.Option(help="What all are pinned to; default: the last.")] = None,
    work: Work = WORK,
    output: Output = None,
) -> None:
    """Compare runtimes with one thread on one core."""
    with reported(debug=False):
        environments = _environments(peers or USUAL, tuple(PEERS))
        settings = settings_for(checkpoint, context, repetitions, core)
        artifacts = make_artifacts(checkpoint, work, environments, context)
        runs = []
        for run in compare_rates(artifacts, environments, settings, rounds):
            note(f"{running.TITLES[run.way]:40}prefill{run.prefill:8.1f} tok/s   decode{run.decode:7.1f} tok/s")
            runs.append(run)
        _finish(new_comparison("rates", checkpoint, environments, asdict(settings), runs), output or work)


@app.command()
def page(page: Path, comparisons: list[Path]) -> None:
    """Write the tables of COMPARISONS between the markers ``peer exports`` and ``peer rates`` of PAGE."""
    with reported(debug=False):
        text = page.read_text(encoding="utf-8")
        for comparison in map(read_comparison, comparisons):
            text = insert(text, f"peer {comparison.kind}", list(lines(comparison)))
        page.write_text(text, encoding="utf-8")


def _environments(names: Sequence[str], allowed: Sequence[str]) -> dict[str, Environment]:
    for name in names:
        if name not in allowed:
            raise InputError(f"--peer {name}: {', '.join(allowed)}")
    return {name: open_environment(name) for name in names}


def _finish(comparison: Comparison, output: Path) -> None:
    path = output / f"{comparison.kind}.json" if output.is_dir() else output
    path.write_text(comparison.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(comparison)))
    note(str(path))


if __name__ == "__main__":
    app()
