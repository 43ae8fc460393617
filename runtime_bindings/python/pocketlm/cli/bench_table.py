"""A result of ``pocketlm bench`` as a table for people."""

from collections.abc import Iterator

from pocketlm.errors import printable
from pocketlm.results import BenchResult, BenchRun, Profile

__all__ = ["bench_lines"]

# Figure, its label, its unit, what to divide by, and its format.
SECONDS, RATE, SIZE, JOULES = ("s", 1.0, ".3f"), ("tok/s", 1.0, ".1f"), ("MB", 1e6, ".1f"), ("J/tok", 1.0, ".3f")
TABLE = (
    ("import_seconds", "import", SECONDS),
    ("check_seconds", "check", SECONDS),
    ("load_seconds", "load", SECONDS),
    ("cold_load_seconds", "  cold", SECONDS),
    ("depth_seconds", "fill", SECONDS),
    ("first_token_seconds", "first token", SECONDS),
    ("cold_first_token_seconds", "  cold", SECONDS),
    ("prefill_tokens_per_second", "prefill", RATE),
    ("decode_tokens_per_second", "decode", RATE),
    ("peak_resident", "peak memory", SIZE),
    ("peak_anonymous", "  anonymous", SIZE),
    ("peak_file_backed", "  file-backed", SIZE),
    ("added_anonymous", "model's own", SIZE),
    ("added_file_backed", "  file-backed", SIZE),
    ("prefill_joules_per_token", "energy, prefill", JOULES),
    ("decode_joules_per_token", "energy, decode", JOULES),
)
MOST_OPERATORS = 10


def bench_lines(result: BenchResult) -> Iterator[str]:
    """Each run with its circumstances, its figures or counts, and its profile where there is one."""
    for index, run in enumerate(result.runs):
        if index:
            yield ""
        yield from _circumstances(result.bundle.name, run)
        yield from _instructions(run) if run.device.emulated else _figures(run)
        yield run.top1.words
        for noise in run.noisy:
            yield f"noisy: {noise}"
        if run.profile is not None:
            yield from _profile(run.profile)


def _circumstances(bundle: str, run: BenchRun) -> Iterator[str]:
    threads = "its default" if run.threads is None else run.threads
    cores = "" if run.cores is None else f", cores {','.join(map(str, run.cores))}"
    packed = ", packed weights" if run.packed else ""
    settings, facts = run.settings, run.device.facts
    runtime = f"{run.runtime.name} {run.runtime.version}"
    yield printable(f"{bundle} in {runtime} on {run.device.address}, threads: {threads}{cores}{packed}")
    warm = sum(not sample.cold for sample in run.samples)
    processes = f"{warm} processes" + (f", {len(run.samples) - warm} cold" if warm < len(run.samples) else "")
    yield (
        f"prompt {settings.prompt_tokens}, new {settings.new_tokens}, depth {settings.depth}; "
        f"{'counted once' if run.device.emulated else processes}"
    )
    cpu = facts.get("cpu") or facts.get("model") or run.device.address
    features = "features unknown" if run.features is None else run.features or "no known features"
    yield printable(f"{cpu}: {features}")


def _figures(run: BenchRun) -> Iterator[str]:
    yield f"{'':<16} {'median':>10} {'95 % from':>10} {'to':>10}"
    for name, label, (unit, divisor, digits) in TABLE:
        figure = getattr(run.figures, name)
        if figure is not None:
            cells = (f"{value / divisor:>10{digits}}" for value in (figure.median, figure.low, figure.high))
            yield f"{label:<16} {' '.join(cells)} {unit}"


def _instructions(run: BenchRun) -> Iterator[str]:
    counted = run.instructions
    if counted is not None:
        yield f"{'prefill':<16} {counted.per_prompt_token / 1e6:>10.3f} M instructions a prompt token"
        yield f"{'decode':<16} {counted.per_decode_token / 1e6:>10.3f} M instructions a token"


def _profile(profile: Profile) -> Iterator[str]:
    total = sum(operator.seconds for operator in profile.operators)
    share = "unknown" if profile.delegated_share is None else f"{profile.delegated_share:.1%}"
    yield f"profile: {share} of the operators' time in kernels that the artifact was written for"
    for operator in profile.operators[:MOST_OPERATORS]:
        share_of_all = operator.seconds / total if total else 0.0
        mark = "" if operator.delegated else "  (not delegated)"
        yield f"  {share_of_all:>6.1%} {operator.calls:>8} calls  {printable(operator.name)}{mark}"
    for fallback in profile.fallbacks:
        yield printable(f"fallback: {fallback}")
