"""Norms that can't leave fp16's range and keep their exact epsilon.

A row is divided by its largest magnitude m first, and epsilon by m^2: the quotient is the same for every m.
"""

import math

import numpy as np

from pocketlm_export.backends.coreml.emission import Emission, Var
from pocketlm_export.backends.coreml.importing import mil
from pocketlm_export.graph.graph import LayerNorm, RmsNorm, Scale, WeightInfo

__all__ = ["emit_layer_norm", "emit_rms_norm", "normalize"]

mb = mil.Builder
# Zeros stay zeros in a norm, and epsilon over its square stays in fp16's range.
SMALLEST_MAXIMUM = np.float16(2.0**-10)
SMALLEST_NORMAL = -14  # of fp16, as a power of two


def emit_rms_norm(emission: Emission, node: RmsNorm) -> None:
    """A scale behind the norm comes before its weight, whose product may be beyond fp16 where the scaled one isn't."""
    x = emission.values[node.x]
    readers = emission.graph.readers(node.output)
    if len(readers) == 1 and isinstance(readers[0], Scale):
        scale = readers[0]
        emission.values[scale.output] = normalize(emission, x, node.weight, node.epsilon, node.offset, scale.factor)
    else:
        emission.values[node.output] = normalize(emission, x, node.weight, node.epsilon, node.offset)


def normalize(
    emission: Emission, x: Var, weight: WeightInfo, epsilon: float, offset: float, factor: float = 1.0
) -> Var:
    """RMS norm over the last axis, times ``factor`` and weight + ``offset``."""
    scaled, largest = _divided_by_largest(x)
    normal = mb.mul(x=scaled, y=_inverse_root(scaled, largest, epsilon))
    if factor != 1:
        normal = mb.mul(x=normal, y=np.float16(factor))
    return mb.mul(x=normal, y=_weight(emission, weight, offset))


def emit_layer_norm(emission: Emission, node: LayerNorm) -> None:
    """The mean is taken of the divided row, so that no sum leaves fp16's range."""
    scaled, largest = _divided_by_largest(emission.values[node.x])
    centered = mb.sub(x=scaled, y=mb.reduce_mean(x=scaled, axes=[-1], keep_dims=True))
    normal = mb.mul(x=centered, y=_inverse_root(centered, largest, node.epsilon))
    normal = mb.mul(x=normal, y=_weight(emission, node.weight, 0.0))
    if node.bias is not None:
        normal = mb.add(x=normal, y=emission.constant(emission.layout.vector(node.bias)))
    emission.values[node.output] = normal


def _divided_by_largest(x: Var) -> tuple[Var, Var]:
    """``x / m`` and ``m``, ``[..., 1]``."""
    largest = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True), y=SMALLEST_MAXIMUM)
    return mb.real_div(x=x, y=largest), largest


def _inverse_root(scaled: Var, largest: Var, epsilon: float) -> Var:
    """``1 / sqrt(mean(scaled^2) + epsilon / largest^2)``."""
    root = math.sqrt(epsilon)
    # A root below fp16's normal numbers would lose digits: it is stored larger, and made smaller in a second step.
    below = max(0, SMALLEST_NORMAL + 1 - math.frexp(root)[1])
    ratio = mb.real_div(x=np.float16(root * 2.0**below), y=largest)
    if below:
        ratio = mb.mul(x=ratio, y=np.float16(2.0**-below))
    mean = mb.reduce_mean(x=mb.mul(x=scaled, y=scaled), axes=[-1], keep_dims=True)
    return mb.rsqrt(x=mb.add(x=mean, y=mb.mul(x=ratio, y=ratio)), epsilon=np.float16(0))


def _weight(emission: Emission, weight: WeightInfo, offset: float) -> Var:
    """The stored values are the checkpoint's; the offset is the program's."""
    stored = emission.constant(emission.layout.vector(weight))
    if not offset:
        return stored
    return emission.once((weight.name, offset), lambda: mb.add(x=stored, y=np.float16(offset)))
