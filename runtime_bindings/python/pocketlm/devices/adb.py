"""An Android phone, or another arm64 Linux, over adb: ``adb:SERIAL``. Without root, without an app, without an NDK.

All that is pushed lies in one folder of the device:

    files/SHA256              content-addressed; pushed to another name first, so that what is there is whole
    archives/NAME/            the agent with Python and the runtimes, see :mod:`pocketlm.devices.android.agent_archive`
    artifacts/SHA256/         links into files/, under the names that a runtime looks for
    sessions/ID/              of one :class:`AdbDevice`: its jobs and the outcome of its commands; gone when it closes

A job's process ends after its limit whatever becomes of the connection: the device's own ``timeout`` sees to it.
"""

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pocketlm.agent import PROFILE_FILE
from pocketlm.artifact import Artifact, ArtifactFile
from pocketlm.devices.android.adb_client import AdbConnection, attached_devices, quote
from pocketlm.devices.android.agent_archive import SCRIPT, AgentArchive, agent_archive
from pocketlm.devices.android.facts import ARM64, COMMANDS, THERMAL_STATUS, Told, read_told
from pocketlm.devices.answer import read_answer
from pocketlm.devices.base import Device, Facts, Found, Outcome
from pocketlm.errors import BundleError, InputError, UnavailableError
from pocketlm.job import Job

__all__ = ["FOLDER", "FOLDER_VARIABLE", "AdbDevice", "find_devices", "open_device"]

FOLDER = "/data/local/tmp/pocketlm"
FOLDER_VARIABLE = "POCKETLM_ADB_FOLDER"  # for a Linux that has no /data/local/tmp
PATIENCE = 30.0  # seconds that the device may take to answer what is no work
LISTED_WITHIN = 1.5  # seconds
FACTS_LIMIT = 20.0  # for both services that may hang
UNPACKED_PER_SECOND = 1 << 20  # bytes, at least
COOLING_INTERVAL = 5.0
INCOMPLETE = "the agent did not arrive whole"
KILLED = (124, 137)  # what a timeout(1) ends with, by its maker
ADVICE = {
    "unauthorized": "allow this computer in the dialog on the device's screen",
    "authorizing": "allow this computer in the dialog on the device's screen",
    "offline": "attach it anew, or: adb reconnect offline",
}


class AdbDevice(Device):
    """``archive`` gives what the agent is sent as; ``patience``: seconds that the device may take to answer."""

    def __init__(
        self,
        serial: str,
        *,
        folder: str = FOLDER,
        archive: Callable[[], AgentArchive] = agent_archive,
        patience: float = PATIENCE,
    ) -> None:
        """Raises :class:`UnavailableError` for a device that isn't there, or isn't arm64."""
        super().__init__(f"adb:{serial}")
        self._folder, self._archive = PurePosixPath(folder), archive
        self._session = self._folder / "sessions" / secrets.token_hex(8)
        self._adb = AdbConnection(self.address, serial, self._session, patience=patience)
        self._agent: PurePosixPath | None = None
        self._may_run = False  # a job of which no one has seen the end
        self._refuse_other_processors()

    def facts(self) -> Facts:
        """Beside what Android tells: which build of the runtimes is measured, for it isn't an app's."""
        return {**self._told().facts, "runtimes": "PyPI's wheels for Linux with glibc, not an app's for Android"}

    def check_ready(self, *, cool_down: float = 0.0) -> None:
        """Ready is a thermal status of 0. A device without a thermal service can't be judged, and is ready."""
        deadline = time.monotonic() + cool_down
        while status := self._told().thermal_status:
            left = deadline - time.monotonic()
            if left <= 0:
                raise UnavailableError(
                    f"{self.address}: throttled, its thermal status is {status} ({_thermal_name(status)}): "
                    "let it cool, or give it time with --cool-down"
                )
            time.sleep(min(left, COOLING_INTERVAL))

    def place(self, artifact: Artifact) -> Artifact:
        folder = self._folder / "artifacts" / _identity(artifact)
        links = [
            f"mkdir -p {quote((folder / name).parent)} && ln -sf {quote(self._file(known))} {quote(folder / name)}"
            for name, known in artifact.files.items()
        ]
        root = artifact.path.parent
        self._send({known: root / name for name, known in artifact.files.items()}, links)
        return replace(artifact, path=Path(folder, artifact.path.name))

    def run(self, job: Job, folder: Path, *, limit: float) -> Outcome:
        agent = self._send_agent()
        if self._may_run:
            self._stop_jobs()
        place = self._session / "jobs" / secrets.token_hex(8)
        description = folder / "job.json"
        description.write_text(json.dumps(job.to_json()), encoding="utf-8")
        self._adb.push(description, place / "job.json")
        began, self._may_run = time.monotonic(), True
        self._adb.start(
            f"cd {quote(place)} && {{ HOME={quote(place)} TMPDIR={quote(place)} "
            f"XDG_CACHE_HOME={quote(self._folder / 'cache')} PYTHONHASHSEED=0 "
            f"timeout -s KILL {math.ceil(limit)} sh {quote(agent)} job.json result.jsonl </dev/null >out 2>err; "
            "echo $? >code; }",
            limit,
        )
        took = time.monotonic() - began
        pulled = folder / "job"
        self._adb.pull(place, pulled)
        exit_code = self._adb.read_code(_text(pulled / "code"))
        self._may_run = False
        if exit_code in KILLED and took >= limit:
            raise UnavailableError(f"{self.address}: the agent did not end within {limit:g} s")
        try:
            lines = read_answer(self.address, pulled / "result.jsonl", exit_code, _text(pulled / "err"))
        except BundleError:
            self._forget(job.artifact)
            raise
        profile = pulled / PROFILE_FILE
        return Outcome(lines, profile=profile if profile.exists() else None)

    def clean(self) -> None:
        self._stop_jobs()
        pushed = " ".join(quote(self._folder / name) for name in ("files", "archives", "artifacts", "cache"))
        self._adb.do(f"rm -rf {pushed}")
        self._adb.start(f"rm -rf {quote(self._folder)}", 0)  # where outcomes would lie
        self._agent = None

    def close(self) -> None:
        with suppress(UnavailableError):  # a device that is gone has its timeout
            if self._may_run:
                self._stop_jobs()
            self._adb.start(f"rm -rf {quote(self._session)}", 0)

    def _refuse_other_processors(self) -> None:
        abi = self._told().abi
        if abi not in ARM64:
            raise UnavailableError(f"{self.address}: its ABI is {abi or 'unknown'}; the agent runs on {ARM64[0]}")

    def _told(self) -> Told:
        mark = secrets.token_hex(16)  # no command says it
        commands = "; ".join(f"echo {mark}{name}; {command} 2>/dev/null" for name, command in COMMANDS.items())
        parts = self._adb.execute(commands, FACTS_LIMIT).said.split(mark)[1:]
        return read_told({name: text for name, _, text in (part.partition("\n") for part in parts)})

    def _send(self, files: Mapping[ArtifactFile, Path], links: Sequence[str]) -> None:
        """Push what isn't there yet, then run ``links``; a file becomes visible when it is whole."""
        partial = {known: self._session / known.sha256 for known in self._missing(files)}
        try:
            for known, place in partial.items():
                self._adb.push(files[known], place)
            moves = [
                f"{_has_size(place, known.size)} && mv -f {quote(place)} {quote(self._file(known))}"
                for known, place in partial.items()
            ]
            self._adb.do(" && ".join([f"mkdir -p {quote(self._folder / 'files')}", *moves, *links]))
        except UnavailableError:
            with suppress(UnavailableError):  # why it failed matters more; but a full device has to be emptied
                self._adb.start(f"rm -f {' '.join(map(quote, partial.values()))}", 0)
            raise

    def _missing(self, files: Iterable[ArtifactFile]) -> list[ArtifactFile]:
        """Which of them the device doesn't have in their size; what is in them the agent checks."""
        checks = [f"{{ {_has_size(self._file(known), known.size)} || echo {known.sha256}; }}" for known in files]
        said = self._adb.do(" && ".join(checks)).split()
        return [known for known in files if known.sha256 in said]

    def _send_agent(self) -> PurePosixPath:
        """The script that runs the agent; its archive is unpacked once for all sessions."""
        if self._agent is None:
            archive = self._archive()
            folder = self._folder / "archives" / archive.name
            if self._adb.execute(f"test -f {quote(folder / SCRIPT)}").exit_code:
                self._unpack(archive, folder)
            self._agent = folder / SCRIPT
        return self._agent

    def _unpack(self, archive: AgentArchive, folder: PurePosixPath) -> None:
        packed, partial = self._session / "archive.tar.gz", self._session / "archive"
        self._adb.push(archive.path, packed)
        steps = (
            f"{{ sha256sum <{quote(packed)} | grep {archive.file.sha256} || {{ echo {INCOMPLETE}; false; }}; }}",
            f"mkdir -p {quote(partial)} {quote(folder.parent)}",
            f"tar -xzf {quote(packed)} -C {quote(partial)}",
            f"rm {quote(packed)}",
            f"mv {quote(partial)} {quote(folder)}",
        )
        self._adb.do(" && ".join(steps), limit=archive.file.size / UNPACKED_PER_SECOND)

    def _stop_jobs(self) -> None:
        """Kill what runs in a folder of this session's jobs, and remove the folders."""
        self._adb.do(
            "for process in /proc/[0-9]*; do "
            '[ -O "$process" ] && case "$(readlink "$process/cwd")" in '
            f'*/{self._session.name}/jobs/*) kill -9 "${{process##*/}}";; esac; done; '
            f"rm -rf {quote(self._session / 'jobs')}"
        )

    def _forget(self, artifact: Artifact) -> None:
        """The device's copy of a file isn't what it was: the next :meth:`place` sends it again."""
        files = " ".join(quote(self._file(known)) for known in artifact.files.values())
        self._adb.do(f"rm -f {files}")

    def _file(self, known: ArtifactFile) -> PurePosixPath:
        return self._folder / "files" / known.sha256


def open_device(place: str) -> AdbDevice:
    """The attached device whose serial is ``place``: two of one model differ in it."""
    if not place:
        raise InputError("adb: which device? adb:SERIAL; pocketlm devices lists them")
    attached = attached_devices(PATIENCE)
    found = next((device for device in attached if device.serial == place), None)
    if found is None:
        others = ", ".join(f"adb:{device.serial}" for device in attached) or "none"
        raise UnavailableError(f"adb:{place}: not attached; attached: {others}")
    if found.state != "device":
        raise UnavailableError(f"adb:{place}: {found.state}: {_advice(found.state)}")
    folder = os.environ.get(FOLDER_VARIABLE, FOLDER)
    if not PurePosixPath(folder).is_absolute():
        raise InputError(f"{FOLDER_VARIABLE}={folder!r}: must be a folder of the device, from its root on")
    return AdbDevice(place, folder=folder)


def find_devices() -> Iterator[Found]:
    """The attached ones; nothing is asked of them."""
    try:
        attached = attached_devices(LISTED_WITHIN)
    except UnavailableError as error:
        yield Found("adb:SERIAL", "not available", str(error))
        return
    if not attached:
        advice = "attach one with USB debugging allowed, or: adb connect HOST:PORT"
        yield Found("adb:SERIAL", "not available", "no Android device is attached", advice)
    for device in attached:
        ready = device.state == "device"
        described = device.model or "an Android device"
        yield Found(
            f"adb:{device.serial}",
            "ready" if ready else "not ready",
            described if ready else f"{described}: {device.state}",
            "" if ready else _advice(device.state),
        )


def _advice(state: str) -> str:
    return ADVICE.get(state, "it has to run Android with USB debugging allowed")


def _thermal_name(status: int) -> str:
    return THERMAL_STATUS[status] if 0 <= status < len(THERMAL_STATUS) else "unknown"


def _has_size(path: PurePosixPath, size: int) -> str:
    """A condition of the device's shell."""
    return f'[ "$(stat -c %s {quote(path)} 2>&1)" = {size} ]'


def _identity(artifact: Artifact) -> str:
    """Of the files and their names: another artifact has another folder."""
    names = sorted((name, known.sha256) for name, known in artifact.files.items())
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
