"""A certificate as a table for people."""

from collections.abc import Iterator

from pocketlm.certificate import Certificate, Check, Level, TextConformance
from pocketlm.errors import printable

__all__ = ["certificate_lines", "verdict"]

MARKS = {"passed": "passed", "failed": "FAILED", "not run": "not run", "differs": "differs"}


def verdict(certificate: Certificate) -> str:
    """One line."""
    statuses = [level.status for target in certificate.targets.values() for level in target.levels]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("passed", "failed", "not run"))
    return f"{'verified' if certificate.passed else 'NOT VERIFIED'}: {counts} of {len(statuses)} levels"


def certificate_lines(certificate: Certificate) -> Iterator[str]:
    """The table: a line for each level of each artifact with its tightest figure, then loss, oracle and text."""
    for target, found in certificate.targets.items():
        for index, level in enumerate(found.levels):
            yield _line(target if index == 0 else "", f"{level.level} {level.name}", level.status, _level_words(level))
    evidence = certificate.evidence
    probes = f", caches of {', '.join(map(str, evidence.probes))} filled beforehand" if evidence.probes else ""
    yield (
        f"{'on':<12}{evidence.texts} texts: {evidence.prefill_tokens} tokens of prefill, {evidence.decode_steps} steps "
        f"of decode, {evidence.judged_positions} positions judged{probes}"
    )
    loss, oracle = certificate.loss, certificate.oracle
    if loss is None:
        yield f"{'loss':<12}not measured: the checkpoint was not given (--reference)"
    else:
        yield (
            f"{'loss':<12}{loss.nats_per_token} nats a token, {loss.original_nats_per_token} with the original "
            f"weights; mean KL {loss.mean_kl}"
        )
    if oracle is None:
        yield f"{'oracle':<12}none"
    else:
        words = "; ".join(_check_words(check) for check in oracle.checks)
        yield _line("oracle", f"{oracle.name} {oracle.version}", oracle.status, words)
    for index, result in enumerate(certificate.text):
        golden = result.golden.removeprefix("golden/")
        yield _line("text" if index == 0 else "", golden, result.status, _text_words(result))


def _line(subject: str, name: str, status: str, words: str) -> str:
    return f"{subject:<12}{name:<21}{MARKS[status]:<9}{printable(words)}".rstrip()


def _level_words(level: Level) -> str:
    if level.status != "passed":
        return level.reason or ""
    tightest = max(level.checks, key=_tightness)
    facts = "; ".join(f"{name} {value}" for name, value in level.facts.items() if value is not None)
    if level.level == 1:  # nothing differs, or it had not passed
        return ", ".join(f"{value} {name}" for name, value in level.facts.items())
    return _check_words(tightest) + (f"; {facts}" if facts else "")


def _check_words(check: Check) -> str:
    figure = "not finite" if check.figure is None else f"{check.figure:g}"
    return f"{check.name} {figure} of {check.threshold:g}"


def _tightness(check: Check) -> float:
    if check.figure is None:
        return float("inf")
    return check.figure / check.threshold if check.threshold else check.figure


def _text_words(result: TextConformance) -> str:
    name = f"{result.name} {result.version}".strip()
    if result.status == "not run":
        return f"{name}: {result.reason}"
    return f"{name}: {result.differing} of {result.strings} differ"
