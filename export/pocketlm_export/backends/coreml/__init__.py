"""Core ML: an ML Program package for iOS 18 and macOS 15, for the GPU: stateful cache, per-block int4 constants.

``emit`` builds the program, ``layout`` says what its constants hold, ``writer`` streams them into the package, ``read``
reads and executes a written package without either.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from pocketlm.errors import UnsupportedError
from pocketlm_export.backends.base import Artifact, Lowering
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Attention,
    Clamp,
    Embedding,
    Graph,
    LastPositions,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Multiply,
    RmsNorm,
    Scale,
)
from pocketlm_export.quantization.schemes import SchemeRow

__all__ = ["check", "libraries", "write"]

NODES = (
    Activation, Add, Attention, Clamp, Embedding, LastPositions, LayerNorm, Linear, MixtureOfExperts, Multiply, RmsNorm,
    Scale,
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid")
# sqrt(epsilon) / 2^-10 squared, which the norm computes, must stay below 65504, and above fp16's least number even
# where a residual is shifted.
SMALLEST_EPSILON, LARGEST_EPSILON = 2.0**-32, 2.0**-5
SMALLEST_NORMAL, LARGEST = 2.0**-14, 65504.0


def check(graph: Graph, rows: Mapping[str, SchemeRow | None]) -> None:
    """Raises :class:`UnsupportedError` for caches of several shapes, a node that isn't translated, a constant that fp16
    can't hold, an unknown activation, cuts of several rows and scheme rows other than int4 and int8."""
    shapes = {(node.kv_heads, node.head_dim) for node in graph.attentions}
    if len(shapes) != 1:
        raise UnsupportedError(
            f"coreml: layers with different (kv_heads, head_dim): {sorted(shapes)}; one is supported"
        )
    for node in graph:
        if not isinstance(node, NODES):
            raise UnsupportedError(f"coreml: {node.output.name}: {type(node).__name__} is not supported")
        match node:
            case RmsNorm(epsilon=epsilon, offset=offset):
                _check_epsilon(node.output.name, epsilon)
                _check_offset(node.output.name, offset)
            case LayerNorm(epsilon=epsilon):
                _check_epsilon(node.output.name, epsilon)
            case Attention():
                _check_constant(node.output.name, "softcap", node.softcap)
                if node.query_norm is not None or node.key_norm is not None:
                    _check_epsilon(node.output.name, node.norm_epsilon)
                    _check_offset(node.output.name, node.norm_offset)
            case Scale(factor=factor):
                _check_constant(node.output.name, "factor", factor)
            case Clamp():
                _check_constant(node.output.name, "least", node.least)
                _check_constant(node.output.name, "most", node.most)
            case Activation(kind=kind) if kind not in ACTIVATIONS:
                raise UnsupportedError(f"coreml: activation {kind!r}; supported: {', '.join(ACTIVATIONS)}")
            case LastPositions(rows=count) if count != 1:
                raise UnsupportedError(f"coreml: {node.output.name} keeps the last {count} positions; 1 is supported")
            case _:
                pass
    for name, row in rows.items():
        if row is not None and row.bits not in (4, 8):
            raise UnsupportedError(f"coreml: {name}: {row.bits}-bit scheme row {row.name!r}; supported: int4, int8")


def write(lowering: Lowering, folder: Path) -> Artifact:
    """Write ``model.mlpackage`` into ``folder``.

    Raises :class:`UnsupportedError` naming tensor and index of a weight beyond fp16's range.
    """
    from pocketlm_export.backends.coreml.writer import write_package

    return write_package(lowering, folder / "model.mlpackage")


def libraries() -> Mapping[str, str]:
    """coremltools, whose builder made the program."""
    return {"coremltools": importlib.metadata.version("coremltools")}


def _check_epsilon(name: str, epsilon: float) -> None:
    if not SMALLEST_EPSILON <= epsilon <= LARGEST_EPSILON:
        raise UnsupportedError(
            f"coreml: {name}: a norm's epsilon of {epsilon}; supported: {SMALLEST_EPSILON:.0e} to {LARGEST_EPSILON}"
        )


def _check_offset(name: str, offset: float) -> None:
    if offset not in (0, 1):
        raise UnsupportedError(f"coreml: {name}: a norm's offset of {offset}; supported: 0 and 1")


def _check_constant(name: str, field: str, value: float | None) -> None:
    if value and not SMALLEST_NORMAL <= abs(value) <= LARGEST:
        raise UnsupportedError(f"coreml: {name}: {field} {value:g} is beyond fp16's normal numbers")
