"""The oracle: transformers on the original checkpoint, an implementation that PocketLM has no part in."""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from pocketlm.certificate import Oracle
from pocketlm.errors import InputError, UnavailableError
from pocketlm_export.backends.reading import Run, Trace
from pocketlm_export.verify.comparison import likeness
from pocketlm_export.verify.thresholds import ORACLE_RMS, check

__all__ = ["ORACLES", "check_oracle", "judge_oracle", "oracle_traces"]

ORACLES = ("transformers",)


def check_oracle(name: str) -> None:
    """Raises :class:`InputError` for an unknown oracle, :class:`UnavailableError` for one that isn't installed."""
    if name not in ORACLES:
        raise InputError(f"unknown oracle {name!r}; valid: {', '.join(ORACLES)}")
    if importlib.util.find_spec(name) is None:
        raise UnavailableError(f"the oracle {name} is not installed: pip install {name}")


def oracle_traces(checkpoint: Path, runs: Sequence[Run]) -> list[Trace]:
    """The logits of each call's judged rows in float32, each run in one forward pass. The whole model is in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )
    traces = []
    with torch.no_grad():
        for run in runs:
            logits = model(torch.tensor([run.tokens]), use_cache=False).logits[0].numpy()
            stops = [sum(len(call.tokens) for call in run.calls[: index + 1]) for index in range(len(run.calls))]
            traces.append(Trace([logits[s - c.rows : s].copy() for s, c in zip(stops, run.calls, strict=True)]))
    return traces


def judge_oracle(reference: Sequence[Trace], eager: Sequence[Trace], oracle: Sequence[Trace]) -> Oracle:
    """``reference`` in float64 and ``eager`` in float32, both on the original weights."""
    found, floor = likeness(reference, oracle), likeness(reference, eager)
    checks = [check(ORACLE_RMS, found.rms, floor=floor.rms)]
    return Oracle(
        name="transformers",
        version=importlib.metadata.version("transformers"),
        status="passed" if all(item.passed for item in checks) else "failed",
        checks=checks,
    )
