"""The figures of docs/verification.md: ``python -m pocketlm_bench.verification PAGE BUNDLE... [--faults TABLE]``.

Reads the certificates of the bundles and writes them as tables between the page's markers, with the thresholds and
their reasons. ``make docs-verification`` makes the bundles first.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.certificate import LEVELS, Certificate, Check
from pocketlm.errors import InputError
from pocketlm_bench.page import insert
from pocketlm_export.verify.thresholds import THRESHOLDS, Threshold

__all__ = ["figures", "thresholds"]


def thresholds() -> Iterator[str]:
    """A table of the thresholds."""
    yield "| level | figure | threshold | reason |"
    yield "|---|---|---|---|"
    for item in THRESHOLDS:
        level = f"{item.level} {LEVELS[item.level]}" if item.level in LEVELS else "oracle"
        yield f"| {level} | {item.figure} | {_limit(item)} | {item.reason} |"


def figures(bundles: Sequence[Bundle]) -> Iterator[str]:
    """For each bundle what it was run on, and a row for each target and level."""
    for bundle in bundles:
        certificate = bundle.certificate
        if certificate is None:
            raise InputError(f"{bundle.folder}: no certificate: pocketlm verify issues one")
        yield from _bundle(bundle, certificate)


def _bundle(bundle: Bundle, certificate: Certificate) -> Iterator[str]:
    model, evidence = bundle.manifest.model, certificate.evidence
    yield f"### {bundle.folder.stem.removesuffix('.pocketlm')}"
    yield ""
    yield (
        f"{model.model_type}, {model.layers} layers, context {model.context_length}, {bundle.manifest.scheme.name}; on "
        f"{evidence.texts} texts: {evidence.prefill_tokens} tokens of prefill, {evidence.decode_steps} decode steps, "
        f"{evidence.judged_positions} positions judged; caches filled beforehand: "
        f"{', '.join(map(str, evidence.probes)) or 'none'}."
    )
    if certificate.loss is not None:
        loss = certificate.loss
        yield (
            f"Loss {loss.nats_per_token} nats a token, {loss.original_nats_per_token} with the original weights; "
            f"mean KL {loss.mean_kl}."
        )
    if certificate.oracle is not None:
        oracle = certificate.oracle
        yield f"Oracle {oracle.name} {oracle.version}: {'; '.join(_figure(check) for check in oracle.checks)}."
    yield ""
    yield "| target | level | | figures, each of its threshold |"
    yield "|---|---|---|---|"
    for target, found in certificate.targets.items():
        for level in found.levels:
            words = level.reason if level.status == "not run" else "; ".join(map(_figure, level.checks))
            facts = "; ".join(f"{name} {value}" for name, value in level.facts.items() if value is not None)
            cells = target, f"{level.level} {level.name}", level.status, f"{words} ({facts})" if facts else words
            yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield "| text | | differing |"
    yield "|---|---|---|"
    for result in certificate.text:
        yield f"| {result.name} {result.version} | {result.status} | {result.differing} of {result.strings} |"
    yield ""


def _figure(check: Check) -> str:
    figure = "not finite" if check.figure is None else f"{check.figure:g}"
    return f"{check.name} {figure} of {check.threshold:g}"


def _limit(threshold: Threshold) -> str:
    return f"{threshold.limit:g}" + (f" x {threshold.of_floor}" if threshold.of_floor else "")


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--faults", type=Path, help="a file with the fault table")
    options = parser.parse_args()
    bundles = [open_bundle(path) for path in options.bundles]
    page = options.page.read_text(encoding="utf-8")
    page = insert(page, "thresholds", list(thresholds()))
    page = insert(page, "figures", list(figures(bundles)))
    if options.faults is not None:
        page = insert(page, "faults", options.faults.read_text(encoding="utf-8").splitlines())
    options.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
