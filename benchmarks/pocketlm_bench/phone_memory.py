"""What a phone feels of a bundle: ``python -m pocketlm_bench.phone_memory BUNDLE [--json FILE] [--page PAGE]``.

Anonymous and file-backed memory, load and first token of each artifact, each in a fresh process: as it is, and with
packed weights (the run that makes the copy, and those that find it). The copies lie in an empty cache beside the
user's, which is removed at the end. The variants follow one another in every round, so that a machine that
slows down slows all of them.

With ``--cold`` the system is told to forget the artifact's files and the copies before each process. Each session
begins with the hash of the artifact's files, which reads them: that time stands in a column of its own.
"""

import datetime
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pocketlm.bundle import RUNTIMES, Bundle, open_bundle
from pocketlm.cache import cache_folder
from pocketlm.cli.console import note, reported
from pocketlm.devices import open_device
from pocketlm.errors import InputError
from pocketlm.machine import machine_facts
from pocketlm.measuring.benchmark import BenchOptions, settings_for
from pocketlm.measuring.bootstrap import median_figure
from pocketlm.measuring.figures import figures_of
from pocketlm.measuring.measured_runtime import Conditions, MeasuredRuntime
from pocketlm.replaying.replay import LIMIT
from pocketlm.results import BenchSettings, Sample
from pocketlm.runtimes import executorch_library
from pocketlm_bench.page import insert

__all__ = ["Settings", "Variant", "VariantRuns", "measure_variants", "table", "variants_of"]

MARKER = "phone memory"
PROMPT_TOKENS = 16
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a bundle. ``makes_copy``: packed, with a cache that is emptied before each run."""

    name: str
    runtime: str
    packed: bool = False
    makes_copy: bool = False


VARIANTS = (
    Variant("onnx", "onnx"),
    Variant("onnx packed, first run", "onnx", packed=True, makes_copy=True),
    Variant("onnx packed, later runs", "onnx", packed=True),
    Variant("executorch", "executorch"),
    Variant("executorch packed, first run", "executorch", packed=True, makes_copy=True),
    Variant("executorch packed, later runs", "executorch", packed=True),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """``rounds``: how often each variant is measured; ``cold``: from the disk instead of the page cache."""

    rounds: int
    threads: int
    prompt_tokens: int
    new_tokens: int
    cold: bool


@dataclass(frozen=True, slots=True)
class VariantRuns:
    """``disk_bytes``: the artifact's files, and the copy's where there is one, after the last process."""

    variant: Variant
    measured: MeasuredRuntime
    settings: BenchSettings
    samples: list[Sample] = field(default_factory=list)
    disk_bytes: list[int] = field(default_factory=list)


def variants_of(bundle: Bundle) -> list[Variant]:
    """Those whose artifact the bundle has and whose runtime is installed. Raises :class:`InputError` if there is none.

    Core ML is none of them: what computes in its place here is the reference interpreter. ExecuTorch has packed weights
    where pocketlm-native is installed.
    """
    found = [variant for variant in VARIANTS if variant.runtime in bundle.runtimes()]
    if executorch_library.obstacle():
        found = [variant for variant in found if not (variant.packed and variant.runtime == "executorch")]
    if not found:
        raise InputError(f"{bundle.folder}: no artifact for onnx or executorch whose runtime is installed")
    return found


def measure_variants(bundle: Bundle, settings: Settings) -> list[VariantRuns]:
    """Each variant once in every round, one after the other."""
    device = open_device("host")
    options = BenchOptions(
        prompt_tokens=settings.prompt_tokens, new_tokens=settings.new_tokens, depths=(0,), threads=settings.threads
    )
    (work,) = settings_for(bundle, options)
    runs = []
    for variant in variants_of(bundle):
        conditions = Conditions(settings.threads, None, variant.packed, limit=LIMIT, cool_down=0)
        measured = MeasuredRuntime(device, variant.runtime, bundle.artifact(variant.runtime), conditions)
        runs.append(VariantRuns(variant, measured, work))
    with device, _empty_cache() as cache:
        for number in range(1, settings.rounds + 1):
            for one in runs:
                note(f"round {number} of {settings.rounds}: {one.variant.name}")
                if one.variant.makes_copy:
                    _remove_files(cache)
                files = _files(bundle.folder / one.variant.runtime)
                if settings.cold:
                    _forget([*files, *_files(cache)])
                one.samples.append(one.measured.measure(work))
                copies = _files(cache) if one.variant.packed else []
                one.disk_bytes.append(sum(path.stat().st_size for path in (*files, *copies)))
    return runs


@contextmanager
def _empty_cache() -> Iterator[Path]:
    """On the disk of the user's cache; processes that are started meanwhile use it."""
    usual = cache_folder()
    usual.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("XDG_CACHE_HOME")
    with TemporaryDirectory(prefix="phone-memory-", dir=usual) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield cache_folder()
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _remove_files(folder: Path) -> None:
    for path in _files(folder):
        path.unlink()


def _forget(paths: Sequence[Path]) -> None:
    """Let the system drop the files' pages, so that the next read is the disk's."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def table(document: Mapping[str, Any]) -> Iterator[str]:
    """The figures as a table in Markdown: medians, MB of 10^6 bytes."""
    machine, settings = document["machine"], document["settings"]
    yield (
        f"{document['bundle']}, {document['scheme']}; "
        f"{machine['cpu']}, {machine.get('features') or 'features unknown'}; {document['date']}; "
        f"threads: {settings['threads']}; medians of {settings['rounds']} processes each, "
        f"files {'dropped from memory before each process' if settings['cold'] else 'in the page cache'}."
    )
    yield ""
    yield "| | anonymous MB | at most | file-backed MB | hash s | load s | first token s | on disk MB |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for variant in document["variants"]:
        figures = {name: figure["median"] for name, figure in variant["summary"].items() if figure is not None}
        megabytes = [
            f"{figures[name] / 1e6:.0f}" if name in figures else "-"
            for name in ("added_anonymous", "highest_added_anonymous", "added_file_backed")
        ]
        seconds = [f"{figures[name]:.2f}" for name in ("check_seconds", "load_seconds", "first_token_seconds")]
        cells = (variant["name"], *megabytes, *seconds, f"{variant['disk_bytes'] / 1e6:.0f}")
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        f"Anonymous and file-backed: what the process holds after {settings['prompt_tokens']} tokens of prompt and "
        f"{settings['new_tokens']} new ones, beyond what it held before loading, Python and the runtime's libraries; "
        "at most: the highest sample from there on. First token: of that prompt, in the session just loaded."
    )


def _document(bundle: Bundle, runs: Sequence[VariantRuns], settings: Settings) -> dict[str, Any]:
    scheme = bundle.manifest.scheme
    groups = "" if scheme.group is None else f" in groups of {scheme.group}"
    return {
        "kind": "phone memory",
        "bundle": bundle.folder.name,
        "scheme": f"{scheme.name}{groups}, head {scheme.head}, {scheme.bits_per_weight:.2f} bits a weight",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine_facts(),
        "pocketlm": importlib.metadata.version("pocketlm"),
        "runtimes": {
            name: importlib.metadata.version(RUNTIMES[name])
            for name in dict.fromkeys(one.variant.runtime for one in runs)
        },
        "settings": asdict(settings),
        "variants": [
            {
                "name": one.variant.name,
                "disk_bytes": one.disk_bytes[-1],
                "summary": {
                    **figures_of(one.samples, one.settings).model_dump(),
                    "highest_added_anonymous": _highest(one.samples),
                },
                "samples": [sample.model_dump() for sample in one.samples],
            }
            for one in runs
        ],
    }


def _highest(samples: Sequence[Sample]) -> dict[str, float] | None:
    """The most anonymous memory from the beginning of the load on, beyond what there was before, in bytes; None where
    the system doesn't split memory."""
    added = []
    for sample in samples:
        memory = sample.memory
        if memory.before_load is not None:
            seen = (memory.loaded, memory.first_token, memory.decoded, memory.load_peak, memory.generation_peak)
            highest = max(moment.anonymous for moment in seen if moment is not None)
            added.append(highest - memory.before_load.anonymous)
    return median_figure(added).model_dump() if added else None


def main(
    bundle: Path,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is measured.")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = PROMPT_TOKENS,
    new_tokens: Annotated[int, typer.Option(min=2)] = NEW_TOKENS,
    cold: Annotated[bool, typer.Option(help="Read from the disk, not from the page cache.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Facts and every sample.")] = None,
    page: Annotated[Path | None, typer.Option(help=f"Where the table goes, between the markers of {MARKER!r}.")] = None,
) -> None:
    """Print memory, load and first token of each artifact."""
    with reported(debug=False):
        opened = open_bundle(bundle)
        settings = Settings(rounds, threads, prompt_tokens, new_tokens, cold)
        document = _document(opened, measure_variants(opened, settings), settings)
        lines = list(table(document))
        print("\n".join(lines))
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if page is not None:
            page.write_text(insert(page.read_text(encoding="utf-8"), MARKER, lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
