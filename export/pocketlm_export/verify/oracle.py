"""The oracle: transformers on the original checkpoint, an implementation that PocketLM has no part in."""

import importlib.metadata
import importlib.util
from collections.abc import Sequence

import torch

from pocketlm.certificate import Oracle
from pocketlm.errors import InputError, UnavailableError
from pocketlm_export.backends.reading import Run, Trace
from pocketlm_export.checkpoint.checkpoint import Checkpoint
from pocketlm_export.verify.comparison import likeness
from pocketlm_export.verify.thresholds import ORACLE_RMS, check

__all__ = ["ORACLES", "check_oracle", "judge_oracle", "oracle_traces"]

ORACLES = ("transformers",)


def check_oracle(name: str, checkpoint: Checkpoint) -> None:
    """Raises :class:`InputError` for an unknown oracle, :class:`UnavailableError` for one that isn't installed."""
    if name not in ORACLES:
        raise InputError(f"unknown oracle {name!r}; valid: {', '.join(ORACLES)}")
    for package in _packages(checkpoint):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"the oracle {name} needs {package}, which is not installed: pip install {package}")


def _packages(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The oracle merges an adapter with peft."""
    return ("transformers",) if checkpoint.adapter is None else ("transformers", "peft")


def oracle_traces(checkpoint: Checkpoint, runs: Sequence[Run]) -> list[Trace]:
    """The logits of each call's judged rows in float32, each run in one forward pass. The whole model is in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    if checkpoint.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(checkpoint.adapter)).merge_and_unload()
    traces = []
    with torch.no_grad():
        for run in runs:
            logits = model(torch.tensor([run.tokens]), use_cache=False).logits[0].numpy()
            stops = [sum(len(call.tokens) for call in run.calls[: index + 1]) for index in range(len(run.calls))]
            traces.append(Trace([logits[s - c.rows : s].copy() for s, c in zip(stops, run.calls, strict=True)]))
    return traces


def judge_oracle(
    checkpoint: Checkpoint, reference: Sequence[Trace], eager: Sequence[Trace], oracle: Sequence[Trace]
) -> Oracle:
    """``reference`` in float64 and ``eager`` in float32, both on the original weights."""
    found, floor = likeness(reference, oracle), likeness(reference, eager)
    checks = [check(ORACLE_RMS, found.rms, floor=floor.rms)]
    return Oracle(
        name=" with ".join(_packages(checkpoint)),
        version=" and ".join(importlib.metadata.version(package) for package in _packages(checkpoint)),
        status="passed" if all(item.passed for item in checks) else "failed",
        checks=checks,
    )
