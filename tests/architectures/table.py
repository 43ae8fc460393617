"""The README's table of models, from what runs: ``python -m tests.architectures.table README.md [ARCHITECTURE...]``.

Every row of tests/tiny_models.py is exported to each target in each scheme and answers a prompt and decode steps in its
runtime, or is refused by name. A cell says in which schemes all rows of an architecture ran; what was refused stands
below with its words. Numeric parity of the same cells is tests/architectures/test_parity.py.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import pocketlm
from pocketlm.errors import UnsupportedError
from tests.tiny_models import ROWS, Row, write_checkpoint

BEGIN, END = "<!-- models: written by tests/architectures/table.py -->\n", "<!-- models: end -->\n"
TARGETS = {"onnx": "ONNX", "executorch": "ExecuTorch", "coreml": "Core ML"}
SCHEMES = ("fp32", "int8", "int4")
PROMPT, DECODE = list(range(5, 45)), [7, 8, 9]
Cell = tuple[str, str]  # architecture and target


def main(path: Path, wanted: list[str]) -> None:
    """Run what is asked for, by default all, and write the table between its markers."""
    refused: dict[Cell, dict[str, list[str]]] = {}
    rows = [row for row in ROWS if not wanted or row.model_type in wanted]
    for row in rows:
        print(row.name, file=sys.stderr, flush=True)
        for target, scheme, words in refusals(row):
            refused.setdefault((row.model_type, target), {}).setdefault(words, []).append(f"{row.name} in {scheme}")
    text = path.read_text(encoding="utf-8")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    path.write_text(text[:start] + "\n".join(table(rows, refused)) + "\n" + text[stop:], encoding="utf-8")


def refusals(row: Row) -> Iterable[tuple[str, str, str]]:
    """Target, scheme and words of each cell of ``row`` that is refused; what isn't has run, or an error ends it all."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "checkpoint").mkdir()
        write_checkpoint(row, scratch / "checkpoint")
        for target in TARGETS:
            for scheme in SCHEMES:
                try:
                    bundle = pocketlm.export(
                        scratch / "checkpoint", scratch / f"{target}-{scheme}", targets=(target,), scheme=scheme,
                        context_length=row.context, store=scratch / "store", verify=False,
                    )  # fmt: skip
                except UnsupportedError as error:
                    yield target, scheme, str(error).split(": ", 1)[-1]
                    continue
                with bundle.session(target, threads=1) as session:
                    logits = [session.extend(PROMPT), *(session.extend([token]) for token in DECODE)]
                assert all(np.isfinite(step).all() for step in logits), f"{row.name}, {target}, {scheme}"


def table(rows: list[Row], refused: dict[Cell, dict[str, list[str]]]) -> Iterable[str]:
    """Lines of Markdown."""
    yield f"| model_type | rows | {' | '.join(TARGETS.values())} |"
    yield "|---|---|" + "---|" * len(TARGETS)
    for architecture in dict.fromkeys(row.model_type for row in rows):
        own = [row.name for row in rows if row.model_type == architecture]
        cells = (cell(own, refused.get((architecture, target), {})) for target in TARGETS)
        yield f"| `{architecture}` | {len(own)} | {' | '.join(cells)} |"
    if refused:
        yield ""
    for (_, target), found in refused.items():
        for words, names in found.items():
            schemes: dict[str, list[str]] = {}
            for row, scheme in (name.split(" in ") for name in names):
                schemes.setdefault(row, []).append(scheme)
            which = "; ".join(f"{row} in {', '.join(of_row)}" for row, of_row in schemes.items())
            yield f"- {TARGETS[target]} refuses {which}: {words}"


def cell(rows: list[str], found: dict[str, list[str]]) -> str:
    """In which schemes all, some or none of an architecture's rows ran."""
    names = [name for several in found.values() for name in several]
    parts = []
    for scheme in SCHEMES:
        count = sum(name.endswith(f" in {scheme}") for name in names)
        parts.append(f"{scheme} {'refused' if count == len(rows) else f'{len(rows) - count} of {len(rows)}'}")
    return "run" if not names else ", ".join(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
