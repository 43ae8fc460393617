"""This machine: the agent runs in this Python, on the bundle's own files."""

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pocketlm.agent import PROFILE_FILE
from pocketlm.artifact import Artifact
from pocketlm.bundle import RUNTIMES
from pocketlm.devices.base import Device, Facts, Found, Outcome
from pocketlm.devices.local_agent import run_agent
from pocketlm.errors import InputError
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
        return replace(artifact, path=artifact.path.absolute())

    def run(self, job: Job, folder: Path, *, limit: float) -> Outcome:
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        if "PYTHONPATH" in environment:  # the agent runs in another folder
            places = environment["PYTHONPATH"].split(os.pathsep)
            environment["PYTHONPATH"] = os.pathsep.join(str(Path(place).absolute()) for place in places if place)
        lines = run_agent(self.address, [sys.executable], environment, job, folder, limit)
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
