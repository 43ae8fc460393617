"""Files from a Debian mirror into a folder, each known by its sha256.

Where apt is installed its own downloader fetches them: it knows the machine's proxies, certificates and credentials,
and takes an interrupted file up where it stopped. Elsewhere Python's does, and an interrupted file begins anew. A file
that is whole is never fetched again.
"""

import hashlib
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import UnavailableError

__all__ = ["APT_DOWNLOADER", "Advance", "File", "fetch", "fetch_unverified"]

APT_DOWNLOADER = Path("/usr/lib/apt/apt-helper")
TIMEOUT = 60  # seconds without a byte
INTERVAL = 0.2  # seconds between two looks at apt's progress

Advance = Callable[[int], None]
"""Told how many more bytes have arrived."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a mirror: its address, and what has to arrive. ``sha256`` is hexadecimal, ``size`` in bytes."""

    url: str
    sha256: str
    size: int


def fetch(files: Sequence[File], folder: Path, advance: Advance = lambda _bytes: None) -> list[Path]:
    """The files, each in ``folder`` under its sha256; what is there already and whole is not fetched.

    Raises :class:`UnavailableError` that names the address and what is wrong: unreachable, another size, another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not _is_whole(folder / file.sha256, file)]
    advance(sum(file.size for file in files) - sum(file.size for file in missing))
    partial = {file: folder / f"{file.sha256}.partial" for file in missing}
    _download({file.url: path for file, path in partial.items()}, advance)
    for file, path in partial.items():
        if not _is_whole(path, file):
            size = path.stat().st_size
            path.unlink()  # a resumed download would keep what is wrong with it
            raise UnavailableError(
                f"{file.url}: {size} bytes arrived that aren't the {file.size} of sha256 {file.sha256}: "
                "altered or cut off on the way; run it again"
            )
        if path.is_symlink():  # apt's way with a mirror that is a folder of this machine
            content = path.resolve()
            path.unlink()
            shutil.copyfile(content, path)
        path.rename(folder / file.sha256)
    return [folder / file.sha256 for file in files]


def fetch_unverified(url: str, path: Path) -> None:
    """A file whose content the caller judges: fetched anew. Raises :class:`UnavailableError` if it can't be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    _download({url: path}, lambda _bytes: None)


def _is_whole(path: Path, file: File) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256


def _download(places: dict[str, Path], advance: Advance) -> None:
    if not places:
        return
    if APT_DOWNLOADER.is_file():
        _download_with_apt(places, advance)
        return
    for url, path in places.items():
        _download_with_python(url, path, advance)


def _download_with_apt(places: dict[str, Path], advance: Advance) -> None:
    words = [word for url, path in places.items() for word in (url, str(path))]
    # As the user who asks: apt's own user can't write here.
    command = [str(APT_DOWNLOADER), "-o", "APT::Sandbox::User=root", "-o", f"Acquire::http::Timeout={TIMEOUT}"]
    with tempfile.TemporaryFile() as log, _ended([*command, "download-file", *words], log.fileno()) as process:
        arrived = 0
        while True:
            try:
                code = process.wait(INTERVAL)
            except subprocess.TimeoutExpired:
                code = None
            now = sum(path.stat().st_size for path in places.values() if path.exists())
            advance(max(0, now - arrived))
            arrived = max(arrived, now)
            if code is not None:
                break
        if code:
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("E: Failed to fetch")] or lines[-1:] or [f"exit {code}"]
            raise UnavailableError(f"download failed: {errors[0].removeprefix('E: ')}")


@contextmanager
def _ended(command: Sequence[str], log: int) -> Iterator["subprocess.Popen[bytes]"]:
    """The process; it doesn't outlive the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _download_with_python(url: str, path: Path, advance: Advance) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
            while block := response.read(1 << 18):
                file.write(block)
                advance(len(block))
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnavailableError(f"download failed: {url}: {reason}") from error
