"""A comparison as a JSON document: everything that was measured, where, and with what."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pocketlm.errors import InputError
from pocketlm.machine import circumstances
from pocketlm_bench.peer.environments import PEERS, Environment
from pocketlm_bench.peer.exporting import Export
from pocketlm_bench.peer.goals import EXPORT_GOALS, RATE_GOALS, Verdict, judge
from pocketlm_bench.peer.running import Run

__all__ = ["Comparison", "new_comparison", "read_comparison"]

Kind = Literal["exports", "rates"]


class Comparison(BaseModel):
    """``runs`` are exports or runs, by ``kind``; ``peers`` names what each environment takes from the one that made it.
    The other fields are those of :func:`pocketlm.machine.circumstances`, at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    command: str
    date: str
    machine: dict[str, str]
    load_average: float
    pocketlm: str
    peers: dict[str, list[str]]
    checkpoint: str
    settings: dict[str, Any]
    runs: list[Export | Run]

    @model_validator(mode="after")
    def _runs_are_of_the_kind(self) -> Self:
        wanted = Export if self.kind == "exports" else Run
        if not self.runs or not all(isinstance(run, wanted) for run in self.runs):
            raise ValueError(f"runs are not {self.kind}")
        return self

    @property
    def rounds(self) -> dict[str, list[dict[str, Any]]]:
        """The runs by way, in the order of their rounds."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.runs:
            found.setdefault(run.way, []).append(asdict(run))
        return found

    def verdicts(self) -> list[Verdict]:
        """The goals of this kind that the runs can show."""
        goals = EXPORT_GOALS if self.kind == "exports" else RATE_GOALS
        return judge(goals, self.rounds, self.machine.get("features", "").split())


def new_comparison(
    kind: Kind,
    checkpoint: Path,
    environments: Mapping[str, Environment],
    settings: Mapping[str, Any],
    runs: Sequence[Export] | Sequence[Run],
) -> Comparison:
    """Of what was measured just now, by this process."""
    return Comparison(
        kind=kind,
        **circumstances(),
        peers={PEERS[name].title: list(environment.shared) for name, environment in environments.items()},
        checkpoint=str(checkpoint),
        settings=dict(settings),
        runs=list(runs),
    )


def read_comparison(path: Path) -> Comparison:
    """Raises :class:`InputError` for a file that is none."""
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: not a comparison of peers: {place}: {first['msg']}") from error
