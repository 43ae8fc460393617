"""XNNPACK's packed weights in a file of the user's cache, see :mod:`pocketlm.runtimes.packed_copies`.

XNNPACK writes the file while a program is loaded with it, and maps it at every later load. It finds weights in it by
their name alone, and does not look at their bytes. It locks the file: a second session that is open at the same time
packs into memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketlm.artifact import Artifact
from pocketlm.errors import InputError
from pocketlm.runtimes.packed_copies import Recipe, packed_copy, packed_folder, unwritable

__all__ = ["NEEDED_SPACE", "packed_weights"]

NEEDED_SPACE = 1.5  # XNNPACK grows the file by mapping it: a disk that gets full then ends the process
PACKED_FILE = "weights.xnnpack"
LONGEST_PATH = 255  # bytes that a load option of ExecuTorch holds


@contextmanager
def packed_weights(artifact: Artifact, executorch: str, pack: Callable[[Path], str]) -> Iterator[Path]:
    """The file of the artifact's packed weights, which is made if there is none; no process removes it meanwhile.

    ``executorch``: its version. ``pack`` loads the program with that file, frees it, and returns what ExecuTorch
    complained of. Raises :class:`InputError` if the cache can't be written or has too little space, and what ``pack``
    raises.
    """
    name = artifact.path.name
    recipe = Recipe(
        model={name: artifact.files[name]},
        runtime={"executorch": executorch},
        files=(PACKED_FILE,),
        needed_space=NEEDED_SPACE,
        make=lambda folder: _make(folder / PACKED_FILE, pack),
    )
    with packed_copy(recipe) as folder:
        file = folder / PACKED_FILE
        _check_length(file)
        yield file


def _make(file: Path, pack: Callable[[Path], str]) -> None:
    _check_length(file)
    complaints = pack(file)
    if complaints or not file.exists():  # what has no place in the file is packed into memory
        raise unwritable(packed_folder(), complaints.partition("; ")[0] or "XNNPACK wrote nothing")


def _check_length(file: Path) -> None:
    length = len(str(file).encode())
    if length > LONGEST_PATH:
        raise InputError(
            f"{file}: ExecuTorch takes a path of at most {LONGEST_PATH} bytes for packed weights, not {length}: "
            "set XDG_CACHE_HOME to a shorter one"
        )
