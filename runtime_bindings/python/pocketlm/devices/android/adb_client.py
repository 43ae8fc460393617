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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from pocketlm.errors import InputError, UnavailableError

__all__ = ["AdbConnection", "Attached", "Executed", "attached_devices", "quote"]

PUSHED_PER_SECOND = 1 << 20  # bytes, at least, by any cable or radio
LONGEST_REASON = 200
NOTHING_THERE = ("failed to stat remote object", "does not exist")  # what adb says of a file that isn't there
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
    """What adb's server sees; one that doesn't run yet is started, and goes on only if there is a device for it.

    Raises :class:`UnavailableError` if there is no adb, or if it doesn't answer within ``limit`` seconds.
    """
    listed = _run("adb", [_executable(), "devices", "-l"], limit)
    lines = _succeed("adb", listed).splitlines()
    found = [match for line in lines if (match := ATTACHED.fullmatch(line.rstrip()))]
    if not found and "daemon started" in listed.errors:
        _run("adb", [_executable(), "kill-server"], limit)
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
        try:
            limit = self._patience + source.stat().st_size / PUSHED_PER_SECOND
        except OSError as error:
            raise InputError(f"{source}: can't be read: {error.strerror}") from error
        _succeed(self._address, self._adb("push", "--", str(source.absolute()), str(target), limit=limit))

    def pull(self, source: PurePosixPath, target: Path) -> None:
        """Fetch a file or a folder to ``target``, which doesn't exist yet; after an error nothing is there."""
        _succeed(self._address, self._pull(source, target))

    def start(self, script: str, limit: float) -> None:
        """Run ``script`` in the device's sh, and return when the stream ends: whether the script did, no one knows."""
        self._adb("shell", "-T", "-n", script, limit=limit + self._patience)

    def execute(self, script: str, limit: float = 0.0) -> Executed:
        """Run ``script``, one POSIX list or more, in the device's sh. What it says and its exit code go to a file."""
        mark = secrets.token_hex(16)
        outcome = self._exchange / mark
        place = quote(outcome)
        self.start(
            f"mkdir -p {quote(self._exchange)} && "
            f"{{ ( {script}\n) </dev/null >{place} 2>&1; echo {mark} $? >>{place}; }}",
            limit,
        )
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "outcome"
            ended = self._pull(outcome, file)
            if any(words in ended.errors for words in NOTHING_THERE):
                raise UnavailableError(f"{self._address}: {self._exchange} can't be written")
            _succeed(self._address, ended)
            said, _, code = file.read_text("utf-8", "replace").rpartition(mark)
        return Executed(self.read_code(code), said)

    def do(self, script: str, limit: float = 0.0) -> str:
        """What ``script`` said, as of :meth:`execute`, for one that has to end with 0."""
        executed = self.execute(script, limit)
        if executed.exit_code:
            reason = executed.said.strip().rpartition("\n")[2][-LONGEST_REASON:]
            raise UnavailableError(f"{self._address}: {reason or f'exit code {executed.exit_code}'}")
        return executed.said

    def read_code(self, text: str) -> int:
        """What the device's ``$?`` was. It is missing if the command was cut off, or if the device is full."""
        try:
            return int(text)
        except ValueError:
            raise UnavailableError(
                f"{self._address}: no exit code arrived: the connection broke, or the device is full"
            ) from None

    def _pull(self, source: PurePosixPath, target: Path) -> "_Ended":
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
            partial = Path(folder) / "pulled"
            ended = self._adb("pull", "--", str(source), str(partial), limit=self._patience)
            if ended.exit_code == 0:
                partial.rename(target)
        return ended

    def _adb(self, *words: str, limit: float) -> "_Ended":
        return _run(self._address, [_executable(), "-s", self._serial, *words], limit)


@dataclass(frozen=True, slots=True)
class _Ended:
    """What an ``adb`` that ended left."""

    exit_code: int
    output: str
    errors: str


def _run(address: str, command: Sequence[str], limit: float) -> _Ended:
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
    return _Ended(process.returncode, *(said.decode(errors="replace") for said in (process.stdout, process.stderr)))


def _succeed(address: str, ended: _Ended) -> str:
    """The output of an adb that ended with 0; else its first complaint is the error."""
    if ended.exit_code == 0:
        return ended.output
    lines = [line.strip() for line in (ended.errors + ended.output).splitlines()]
    marked = [line for line in lines if line.startswith(("adb: ", "error: "))]
    reason = re.sub("^(adb: )?(error: )?", "", next(iter(marked or lines), ""))
    reason = re.sub("^failed to copy '.*/(.*)' to '.*': (remote )?", r"\1: ", reason)[:LONGEST_REASON]
    raise UnavailableError(f"{address}: {reason or f'adb ended with exit code {ended.exit_code}'}")


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
