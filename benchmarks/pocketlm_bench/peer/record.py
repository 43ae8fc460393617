"""A comparison as a JSON document: everything that was measured, where, and with what."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import pocketlm
from pocketlm.errors import InputError
from pocketlm.machine import machine_facts
from pocketlm_bench.peer.environments import PEERS, Environment
from pocketlm_bench.peer.exporting import Export
from pocketlm_bench.peer.goals import EXPORT_GOALS, RATE_GOALS, Verdict, judge
from pocketlm_bench.peer.running import Run

__all__ = ["Comparison", "new_comparison", "read_comparison"]

Kind = Literal["exports", "rates"]


class Comparison(BaseModel):
    """``runs`` are :class:`Export` or :class:`Run`, by ``kind``; ``peers`` names what each environment takes from the
    one that made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    command: str
    date: str
    machine: dict[str, str]
    pocketlm: str
    peers: dict[str, list[str]]
    checkpoint: str
    settings: dict[str, Any]
    runs: list[dict[str, Any]]

    @property
    def rounds(self) -> dict[str, list[dict[str, Any]]]:
        """The runs by way, in the order of their rounds."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.runs:
            found.setdefault(run["way"], []).append(run)
        return found

    def verdicts(self) -> list[Verdict]:
        """The goals of this kind that the runs can show."""
        goals = EXPORT_GOALS if self.kind == "exports" else RATE_GOALS
        return judge(goals, self.rounds, self.machine.get("features", "").split())


def new_comparison(
    kind: Kind,
    command: str,
    checkpoint: Path,
    environments: Mapping[str, Environment],
    settings: Mapping[str, Any],
    runs: Sequence[Export] | Sequence[Run],
) -> Comparison:
    """Of what was measured just now, on this machine."""
    return Comparison(
        kind=kind,
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        machine=machine_facts(),
        pocketlm=pocketlm.__version__,
        peers={PEERS[name].title: list(environment.shared) for name, environment in environments.items()},
        checkpoint=str(checkpoint),
        settings=dict(settings),
        runs=[asdict(run) for run in runs],
    )


def read_comparison(path: Path) -> Comparison:
    """Raises :class:`InputError` for a file that is none."""
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: not a comparison of peers: {place}: {first['msg']}") from error
