"""What ExecuTorch's trace of its calls, an ETDump, says of each operator's time.

The file is a flatbuffer with a size before it. Its schema and the program that decodes it come with the executorch
wheel (``devtools/etdump/etdump_schema_flatcc.fbs``, ``data/bin/flatc``); the vendor's own reader imports torch.
"""

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.errors import InputError, UnavailableError

__all__ = ["OperatorTime", "read_etdump"]

RUN = "Execute"  # the name of the block of events that one call of a method leaves
LONGEST_DECODING = 120  # seconds


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """All calls of one operator: ``delegated`` ran in XNNPACK, the others in ExecuTorch's kernels.

    XNNPACK counts whole microseconds. What its operators leave of the time of a delegate is the operator ``delegate``.
    """

    name: str
    delegated: bool
    calls: int
    seconds: float


def read_etdump(path: Path) -> list[OperatorTime]:
    """The operators of every call in the trace, the slowest first; their seconds add up to all instructions'.

    Raises :class:`InputError` for a file that is no ETDump, :class:`UnavailableError` without executorch.
    """
    totals: dict[tuple[str, bool], list[int]] = {}
    for name, delegated, duration in _calls(path):
        total = totals.setdefault((name, delegated), [0, 0])
        total[0] += 1
        total[1] += duration
    times = [OperatorTime(*key, calls, nanoseconds / 1e9) for key, (calls, nanoseconds) in totals.items()]
    return sorted(times, key=lambda operator: operator.seconds, reverse=True)


def _calls(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Name, whether it was delegated, and nanoseconds of each operator that ran."""
    try:
        for run in _decode(path)["run_data"]:
            if run["name"] != RUN:
                continue
            inner: list[Mapping[str, Any]] = []  # of the instruction whose end comes next
            for event in (entry["profile_event"] for entry in run.get("events", ()) if "profile_event" in entry):
                match event.get("name"):
                    case "OPERATOR_CALL":
                        name = inner[-1]["name"].removeprefix("native_call_") if inner else "primitive"
                        yield name, False, _duration(event)
                        inner = []
                    case "DELEGATE_CALL":
                        yield from _delegated(inner, _duration(event))
                        inner = []
                    case "JF_CALL":  # a jump over experts that nobody chose
                        yield "jump", False, _duration(event)
                    case _:
                        inner.append(event)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a trace of ExecuTorch: {error}") from error


def _delegated(inner: Sequence[Mapping[str, Any]], whole: int) -> Iterator[tuple[str, bool, int]]:
    for event in inner:
        name = event["delegate_debug_id_str"].rpartition(" #")[0]  # the n-th of its kind
        yield name, True, _duration(event)
    yield "delegate", True, max(0, whole - sum(map(_duration, inner)))


def _duration(event: Mapping[str, Any]) -> int:
    return int(event.get("end_time", 0)) - int(event.get("start_time", 0))


def _decode(path: Path) -> dict[str, Any]:
    package = importlib.util.find_spec("executorch")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError("traces of ExecuTorch are read with executorch: pip install 'pocketlm[native]'")
    root = Path(next(iter(package.submodule_search_locations)))
    schema = root / "devtools" / "etdump" / "etdump_schema_flatcc.fbs"
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / "trace.etdp"
        named.symlink_to(path.resolve())
        flatc = str(root / "data" / "bin" / "flatc")
        command = [flatc, "--json", "--strict-json", "--raw-binary", "--size-prefixed", "-o", folder]
        try:
            subprocess.run(
                [*command, str(schema), "--", str(named)], check=True, capture_output=True, timeout=LONGEST_DECODING
            )
            decoded: dict[str, Any] = json.loads((Path(folder) / "trace.json").read_bytes())
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a trace of ExecuTorch") from error
    return decoded
