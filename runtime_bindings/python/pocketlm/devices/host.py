"""This machine: the agent runs in this Python, on the bundle's own files."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pocketlm.agent import PROFILE_FILE
from pocketlm.artifact import Artifact
from pocketlm.bundle import RUNTIMES
from pocketlm.devices.answer import read_answer
from pocketlm.devices.base import Device, Facts, Found, Outcome
from pocketlm.errors import InputError, UnavailableError
from pocketlm.job import Job
from pocketlm.machine import machine_facts

__all__ = ["Host", "find_devices", "open_device"]


class Host(Device):
    """Nothing is pushed, and nothing has to be cleaned."""

    def facts(self) -> Facts:
        return machine_facts()

    def runtimes(self) -> Sequence[str]:
        """Those that are installed; not the reference interpreter, which nobody deploys."""
        return [name for name in super().runtimes() if importlib.util.find_spec(RUNTIMES[name]) is not None]

    def place(self, artifact: Artifact) -> Artifact:
        return artifact

    def run(self, job: Job, folder: Path, *, limit: float) -> Outcome:
        source, result = folder / "job.json", folder / "result.jsonl"
        source.write_text(json.dumps(job.to_json()), encoding="utf-8")
        # -P: no module of the folder that the command was given in.
        command = [sys.executable, "-P", "-m", "pocketlm.agent", str(source), str(result)]
        with (folder / "stderr").open("w+b") as errors:
            try:
                process = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    timeout=limit,
                    env={**os.environ, "PYTHONHASHSEED": "0"},
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise UnavailableError(f"{self.address}: the agent did not end within {limit:g} s") from error
            errors.seek(0)
            said = errors.read().decode(errors="replace")
        lines = read_answer(self.address, result, process.returncode, said)
        profile = folder / PROFILE_FILE
        return Outcome(lines, profile=profile if profile.exists() else None)


def open_device(place: str) -> Host:
    """The host has no other address than ``host``."""
    if place:
        raise InputError(f"host:{place[:40]}: there is one host: --device host")
    return Host("host")


def find_devices() -> Iterator[Found]:
    """It is always there."""
    facts = machine_facts()
    yield Found("host", "ready", f"{facts['cpu']}, {facts['cores']} cores")
