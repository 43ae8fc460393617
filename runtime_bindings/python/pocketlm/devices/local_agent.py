"""The agent as a process of this machine, whatever runs it."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketlm.devices.answer import read_answer
from pocketlm.errors import UnavailableError
from pocketlm.job import Job

__all__ = ["run_agent"]


def run_agent(
    device: str, python: Sequence[str], environment: Mapping[str, str], job: Job, folder: Path, limit: float
) -> tuple[Mapping[str, Any], ...]:
    """The lines that the agent answers to ``job``, in a process that ends after ``limit`` seconds at the latest.

    ``python``: a command that takes an interpreter's arguments; ``folder``: an empty one, for the process's files, and
    the one that it runs in: the job's paths are absolute.
    Raises what :func:`pocketlm.devices.answer.read_answer` does, and :class:`UnavailableError` at the limit.
    """
    (folder / "job.json").write_text(json.dumps(job.to_json()), encoding="utf-8")
    # By names that are the same in every folder, so that the process's memory is too. -P: no module of that folder.
    command = [*python, "-P", "-m", "pocketlm.agent", "job.json", "result.jsonl"]
    with (folder / "stderr").open("w+b") as errors:
        try:
            process = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                timeout=limit,
                env=dict(environment),
                cwd=folder,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"{device}: the agent did not end within {limit:g} s") from error
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return read_answer(device, folder / "result.jsonl", process.returncode, said)
