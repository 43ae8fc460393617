"""The corpus once more: sound files and whatever fuzzing found, each within the limits of a fuzzed input."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.limits import LARGEST_FILE
from tests.fuzz.readers import READERS

CORPUS = Path(__file__).parent / "corpus"
REPOSITORY = Path(__file__).parents[2]
LARGEST_CORPUS = 300_000


@pytest.mark.parametrize("target", READERS)
def test_every_input_is_read_or_refused(target):
    """In a process of its own, whose memory is limited; see :mod:`tests.fuzz.replay`."""
    command = [sys.executable, "-m", "tests.fuzz.replay", target]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(list((CORPUS / target).iterdir()))


def test_the_corpus_is_small():
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST_CORPUS
    assert all(path.stat().st_size <= LARGEST_FILE for path in files)
