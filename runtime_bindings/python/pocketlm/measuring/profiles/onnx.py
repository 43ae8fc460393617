"""ONNX Runtime's profile: trace events in JSON, one for each call of a kernel.

The artifact's integers are meant for ``com.microsoft``'s operators: matrices for MatMulNBits, which rounds activations
to int8 at accuracy_level 4, attention for GroupQueryAttention. A fallback is a matrix at another level, one whose level
the CPU has no kernel for, and a product or an attention that runs as an operator which the artifact doesn't hold.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketlm.artifact import Artifact
from pocketlm.errors import InputError
from pocketlm.measuring.profiles.onnx_nodes import Node, read_nodes
from pocketlm.results import OperatorTime

__all__ = ["read_operators"]

MICROSECOND = 1e-6
SUFFIX = "_kernel_time"
ROUNDED = 4  # MatMulNBits' accuracy_level of int8 activations
# Of MatMulNBits at accuracy_level 4: MLAS has such kernels for these.
INT8_FEATURES = frozenset({"avx2", "avx512f", "asimddp"})
WRITTEN_FOR = frozenset(
    {
        "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QMoE",
        "RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization", "LayerNormalization", "SparseAttention",
    }
)  # fmt: skip
HEAVY = frozenset({"Attention", "Conv", "DequantizeLinear", "Einsum", "Gemm", "MatMul"})


def read_operators(profile: Path, artifact: Artifact, features: str) -> list[OperatorTime]:
    """Its operators by type, and by reason where one fell back. Raises :class:`InputError` for a file that is none."""
    nodes = read_nodes(artifact.path)
    calls: dict[tuple[str, str | None], int] = defaultdict(int)
    seconds: dict[tuple[str, str | None], float] = defaultdict(float)
    for name, kind, duration in _kernel_calls(profile):
        key = (kind, _fallback(name, kind, nodes, features.split()))
        calls[key] += 1
        seconds[key] += duration
    held = {node.kind for node in nodes.values()}
    return [
        OperatorTime(
            name=kind,
            calls=calls[kind, fallback],
            seconds=seconds[kind, fallback],
            delegated=fallback is None and (kind in WRITTEN_FOR or (kind in HEAVY and kind in held)),
            fallback=fallback,
        )
        for kind, fallback in calls
    ]


def _kernel_calls(profile: Path) -> list[tuple[str, str, float]]:
    """Node's name, operator's type and seconds of each call."""
    try:
        events: Any = json.loads(profile.read_bytes())
        if not isinstance(events, list):
            raise TypeError("no list of events")
        return [
            (event["name"].removesuffix(SUFFIX), str(event["args"]["op_name"]), int(event["dur"]) * MICROSECOND)
            for event in events
            if event["cat"] == "Node" and event["name"].endswith(SUFFIX)
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{profile}: not a profile of ONNX Runtime: {type(error).__name__}: {error}") from error


def _fallback(name: str, kind: str, nodes: Mapping[str, Node], features: Sequence[str]) -> str | None:
    if kind == "MatMulNBits":
        node = nodes.get(name)
        if node is not None and node.accuracy_level != ROUNDED:
            return f"accuracy_level {node.accuracy_level}: its products are of floats, not of the artifact's integers"
        if not INT8_FEATURES.intersection(features):
            return f"no kernel for accuracy_level {ROUNDED} without one of {', '.join(sorted(INT8_FEATURES))}"
    if kind in HEAVY and not any(node.kind == kind for node in nodes.values()):
        return f"the artifact holds no {kind}: ONNX Runtime took another operator apart"
    return None
