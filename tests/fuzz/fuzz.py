"""Fuzz one reader for a bounded time: ``python -m tests.fuzz.fuzz TARGET SECONDS``.

atheris (libFuzzer) with coverage of PocketLM's own code and of jinja2's. Ends with a code other than 0, the traceback
and the input's file if anything but a :class:`pocketlm.PocketLMError` comes out, if one input takes longer than
``LONGEST_SECONDS``, or if the process holds more than ``MOST_MEGABYTES``.
"""

import random
import sys
import tempfile
from pathlib import Path

import atheris

from tests.fuzz.limits import LARGEST_FILE, LONGEST_SECONDS, MOST_MEGABYTES

INSTRUMENTED = ["pocketlm", "pocketlm_export", "jinja2"]

with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.mutation import MUTATIONS
    from tests.fuzz.readers import READERS, read

CORPUS = Path(__file__).parent / "corpus"
FOUND = Path("build/fuzz")


def _mutator(target: str):
    mutation = MUTATIONS[target]

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        source = random.Random(seed)
        changed = mutation(data, source) if source.random() < 0.8 else None
        return changed if changed is not None and len(changed) <= most else atheris.Mutate(data, most)

    return mutate


def main() -> None:
    target, seconds = sys.argv[1], int(sys.argv[2])
    if target not in READERS:
        sys.exit(f"unknown target {target!r}; valid: {', '.join(READERS)}")
    found = FOUND / target
    found.mkdir(parents=True, exist_ok=True)
    arguments = [
        sys.argv[0], str(found), str(CORPUS / target), f"-max_total_time={seconds}", f"-timeout={LONGEST_SECONDS}",
        f"-rss_limit_mb={MOST_MEGABYTES}", f"-max_len={LARGEST_FILE}", f"-artifact_prefix={FOUND / target}-",
        "-print_final_stats=1", "-verbosity=0",
    ]  # fmt: skip
    words = CORPUS / f"{target}.words"
    if words.exists():
        arguments.append(f"-dict={words}")
    with tempfile.TemporaryDirectory() as root:
        place = Path(root) / "place"
        with atheris.instrument_imports(include=INSTRUMENTED):  # what a reader imports when it is first called
            read(target, next((CORPUS / target).iterdir()).read_bytes(), place)
        options = {"custom_mutator": _mutator(target)} if target in MUTATIONS else {}
        atheris.Setup(arguments, lambda data: read(target, data, place), **options)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
