"""Read every input of a target's corpus: ``python -m tests.fuzz.replay TARGET``; prints how many there were.

Ends with a traceback where anything but a :class:`pocketlm.PocketLMError` comes out, or an input takes too long or too
much memory.
"""

import resource
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.fuzz.limits import LONGEST_SECONDS, MOST_MEGABYTES
from tests.fuzz.readers import read

CORPUS = Path(__file__).parent / "corpus"


def _too_long(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"more than {LONGEST_SECONDS} seconds")


def main() -> None:
    target = sys.argv[1]
    limit = MOST_MEGABYTES << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    signal.signal(signal.SIGALRM, _too_long)
    count = 0
    with tempfile.TemporaryDirectory() as root:
        for path in sorted((CORPUS / target).iterdir()):
            data = path.read_bytes()
            if count:  # the first input also pays for the imports
                signal.alarm(LONGEST_SECONDS)
            read(target, data, Path(root) / "place")
            signal.alarm(0)
            count += 1
    print(count)


if __name__ == "__main__":
    main()
