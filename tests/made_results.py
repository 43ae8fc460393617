"""Results of ``pocketlm bench`` with given samples: what a comparison says of them can be worked out by hand."""

from collections.abc import Sequence
from typing import Any

from pocketlm.measuring.figures import figures_of, no_figures
from pocketlm.results import (
    BenchResult,
    BenchRun,
    BenchSettings,
    DeviceRecord,
    Energy,
    Instructions,
    Memory,
    Peak,
    RuntimeRecord,
    Sample,
    SubjectBundle,
    Top1,
)

SETTINGS = BenchSettings(prompt_tokens=8, new_tokens=3, depth=0)
TOKENS = "a" * 64
NO_ENERGY = Energy(method=None, prefill_joules=None, decode_joules=None)


def sample(rate: float = 10.0, **changes: Any) -> Sample:
    """A repetition that decodes ``rate`` tokens a second."""
    memory = Memory(
        before_load=None, loaded=None, first_token=None, decoded=None, load_peak=None, generation_peak=None,
        peak=Peak(resident=3_000_000, anonymous=1_000_000, file_backed=2_000_000),
    )  # fmt: skip
    values: dict[str, Any] = {
        "cold": False, "import_seconds": 0.1, "check_seconds": 0.1, "load_seconds": 0.1, "depth_seconds": 0.0,
        "first_token_seconds": 0.1, "prefill_seconds": 0.1, "decode_seconds": [1 / rate, 1 / rate],
        "tokens_sha256": TOKENS, "memory": memory, "energy": NO_ENERGY, "load_average": 0.0, "others_cores": 0.0,
    }  # fmt: skip
    return Sample(**{**values, **changes})


def run(samples: Sequence[Sample] = (), **changes: Any) -> BenchRun:
    """A run on the host by default."""
    settings = changes.get("settings", SETTINGS)
    values: dict[str, Any] = {
        "device": DeviceRecord(address="host", emulated=False, facts={"cpu": "a CPU", "battery": None}),
        "runtime": RuntimeRecord(name="onnx", version="1.32.0", build="a build"),
        "files": {"model.onnx": "b" * 64},
        "threads": 1, "cores": None, "packed": False, "settings": settings, "features": "avx2", "governor": None,
        "noisy": [], "samples": list(samples), "figures": figures_of(samples, settings) if samples else no_figures(),
        "tokens_sha256": TOKENS, "top1": Top1(agreement=0.5, positions=10, reason=None), "instructions": None,
        "profile": None,
    }  # fmt: skip
    return BenchRun(**{**values, **changes})


def emulated_run(prefill: int = 800, decode: int = 200, profile: str = "cortex-a76", **changes: Any) -> BenchRun:
    """A run whose instructions were counted."""
    device = DeviceRecord(address=f"qemu:arm64@{profile}", emulated=True, facts={"cpu": profile})
    counted = Instructions(
        prefill=prefill, decode=decode, per_prompt_token=prefill / SETTINGS.prompt_tokens,
        per_decode_token=decode / (SETTINGS.new_tokens - 1),
    )  # fmt: skip
    return run(device=device, features="asimddp", instructions=counted, **changes)


def result(*runs: BenchRun) -> BenchResult:
    """The document."""
    return BenchResult(
        format_version="1.0", kind="bench", date="2026-01-01T00:00:00+00:00", command="pocketlm bench",
        pocketlm="0.1.0", bundle=SubjectBundle(name="demo.pocketlm", manifest_sha256="c" * 64), runs=list(runs),
    )  # fmt: skip
