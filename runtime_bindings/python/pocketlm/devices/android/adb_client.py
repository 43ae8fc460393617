"""The real ``adb`` as an external command, each call under a time limit: attached devices, files, the device's shell.

Files go by adb's own sync protocol. Of a shell's stream nothing is read and nothing believed, not even the exit code,
which is 0 when the connection breaks: :meth:`AdbConnection.execute` has the device write it to a file, and pulls that.
"""

import os
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from pocketlm.errors import InputError, UnavailableError

__all__ = ["AdbConnection", "Attached", "Executed", "attached_devices", "quote"]

PUSHED_PER_SECOND = 1 << 20  # bytes, at least, by any cable or radio
LONGEST_REASON = 300
# host:devices-l of adb's transport.cpp: "%-22s %s", then words of the form KEY:VALUE. A serial may hold spaces.
ATTACHED = re.compile(
    r"(?P<serial>.+?) +(?P<state>device|unauthorized|authorizing|connecting|offline|bootloader|host|recovery|rescue"
    r"|sideload|detached|unknown|no permissions[^\[]*(\[[^\]]*\])?)(?P<details>( \S+:\S*)*)"
)


@dataclass(frozen=True, slots=True)
class Attached:
    """A device that adb sees. ``state``: ``device`` for one that takes commands, else adb's own words."""

    serial: str
    state: str
    model: str | None


@dataclass(frozen=True, slots=True)
class Executed:
    """A script's exit code, and what it said."""

    exit_code: int
    said: str


def quote(path: PurePosixPath) -> str:
    """``path`` as one word of a POSIX shell, whatever is in it: the one way into a command for the device."""
    return shlex.quote(str(path))


def attached_devices(limit: float) -> list[Attached]:
    """What adb's server sees; it is started if it doesn't run yet.

    Raises :class:`UnavailableError` if there is no adb, or if it doesn't answer within ``limit`` seconds.
    """
    lines = _run("adb", [_executable(), "devices", "-l"], limit).splitlines()
    found = [match for line in lines if (match := ATTACHED.fullmatch(line.rstrip()))]
    return [Attached(match["serial"], match["state"].strip(), _model(match["details"])) for match in found]


class AdbConnection:
    """One device, by its serial. ``exchange``: a folder there that scripts leave their outcome in.

    Everything raises :class:`UnavailableError` with one line that names the device when the device is gone, refuses, or
    doesn't answer within ``patience`` seconds beyond what the work itself may take.
    """

    def __init__(self, address: str, serial: str, exchange: PurePosixPath, *, patience: float) -> None:
        if not serial or "\0" in serial:
            raise InputError(f"{address!r}: an Android device's address is adb:SERIAL")
        self._address, self._serial, self._exchange, self._patience = address, serial, exchange, patience

    def push(self, source: Path, target: PurePosixPath) -> None:
        """Send a file; its folders are made. What is at ``target`` after an error is any part of it."""
        limit = self._patience + source.stat().st_size / PUSHED_PER_SECOND
        self._adb("push", "--", str(source.absolute()), str(target), limit=limit)

    def pull(self, source: PurePosixPath, target: Path) -> None:
        """Fetch a file or a folder to ``target``, which doesn't exist yet; after an error nothing is there."""
        with _complete(target) as partial:
            self._adb("pull", "--", str(source), str(partial), limit=self._patience)

    def start(self, script: str, limit: float) -> None:
        """Run ``script`` in the device's sh, and return when the stream ends: whether the script did, no one knows."""
        with suppress(_AdbError):
            self._adb("shell", "-T", "-n", script, limit=limit + self._patience)

    def execute(self, script: str, limit: float = 0.0) -> Executed:
        """Run ``script``, one POSIX list or more, in the device's sh; its files ``code`` and ``said`` are pulled."""
        outcome = self._exchange / secrets.token_hex(8)
        place = quote(outcome)
        self.start(
            f"mkdir -p {place} && {{ ( {script}\n) </dev/null >{place}/said 2>&1; echo $? >{place}/code; }}", limit
        )
        with tempfile.TemporaryDirectory() as scratch:
            files = Path(scratch) / "outcome"
            try:
                self.pull(outcome, files)
            except _AdbError as error:
                if not error.nothing_there:
                    raise
                raise UnavailableError(f"{self._address}: {self._exchange} can't be written") from error
            return Executed(self.exit_code(files / "code"), (files / "said").read_text("utf-8", "replace"))

    def do(self, script: str, limit: float = 0.0) -> str:
        """What ``script`` said, as of :meth:`execute`, for one that has to end with 0."""
        executed = self.execute(script, limit)
        if executed.exit_code:
            reason = executed.said.strip().rpartition("\n")[2][-LONGEST_REASON:]
            raise UnavailableError(f"{self._address}: {reason or f'exit code {executed.exit_code}'}")
        return executed.said

    def exit_code(self, file: Path) -> int:
        """What the device's ``echo $?`` wrote into a pulled file."""
        try:
            return int(file.read_bytes())
        except FileNotFoundError:
            raise UnavailableError(
                f"{self._address}: the command did not end: its connection broke, or it ran out of time"
            ) from None
        except ValueError:
            raise UnavailableError(
                f"{self._address}: the exit code did not arrive: the device is full, or answers garbage"
            ) from None

    def _adb(self, *words: str, limit: float) -> None:
        _run(self._address, [_executable(), "-s", self._serial, *words], limit)


class _AdbError(UnavailableError):
    """What adb itself said; ``nothing_there``: the device answers, and has no such file."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.nothing_there = "failed to stat remote object" in message or "does not exist" in message


def _run(address: str, command: Sequence[str], limit: float) -> str:
    """The stdout of an adb that ended well."""
    # Its libusb takes three seconds to start where there is no udev; the kernel's own interface takes none.
    environment = {"ADB_LIBUSB": "0", **os.environ}
    try:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{address}: no answer within {limit:.0f} s") from error
    except ValueError as error:
        raise InputError(f"{address}: a name can't hold a zero byte") from error
    except OSError as error:
        raise UnavailableError(f"{address}: {command[0]} can't be run: {error.strerror}") from error
    if process.returncode:
        said = (process.stderr + process.stdout).decode(errors="replace")
        raise _AdbError(f"{address}: {_reason(said) or f'adb ended with exit code {process.returncode}'}")
    return process.stdout.decode(errors="replace")


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines()]
    marked = [line for line in lines if line.startswith(("adb: ", "error: "))]
    words = next(iter(marked or lines), "")
    return re.sub("^(adb: )?(error: )?", "", words)[:LONGEST_REASON]


@contextmanager
def _complete(target: Path) -> Iterator[Path]:
    """A place beside ``target``, which it becomes if all goes well."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        partial = Path(folder) / "pulled"
        yield partial
        partial.rename(target)


@cache
def _executable() -> str:
    """The ``adb`` of the PATH, which is what a running server of it matches; else the one that adbutils brings."""
    if found := shutil.which("adb"):
        return found
    try:
        from adbutils import adb_path
    except ImportError:
        raise UnavailableError(
            "adb is not installed: pip install 'pocketlm[devices]', or Android's platform-tools"
        ) from None
    return str(adb_path())


def _model(details: str) -> str | None:
    found = re.search(r" model:(\S+)", details)
    return found[1] if found else None
