"""A mixture of experts in QMoE or MoE of ``com.microsoft``, whose kernels for CPUs compute the chosen experts alone.

Both want gate and up as one matrix whose rows take turns (``swiglu_fusion`` 1), and all experts' matrices behind one
another. QMoE takes int4 in groups and int8 with a scale a row; other forms of int8 round activations.
"""

import onnx_ir as ir

from pocketlm_export.backends.onnx.emission import MICROSOFT, Emission
from pocketlm_export.backends.onnx.layout import Matrix, Scales
from pocketlm_export.graph.graph import MixtureOfExperts, WeightInfo

__all__ = ["emit_experts"]

ROUTER_WEIGHTS = 14  # the input of QMoE


def emit_experts(emission: Emission, node: MixtureOfExperts) -> None:
    """Append what computes ``node``."""
    name, x = node.output.name, emission.values[node.x]
    matrix = emission.stored(Matrix((node.router.name,), node.router.shape))
    scores = emission.call("FusedMatMul", [x, matrix], f"{name}.scores", {"transB": 1}, MICROSOFT)
    scores = emission.call("Reshape", [scores, emission.integers([-1, len(node.gates)])], f"{name}.router")
    pairs = tuple(weight for pair in zip(node.gates, node.ups, strict=True) for weight in pair)
    attributes: dict[str, int | float | str] = {
        "k": node.chosen,
        "normalize_routing_weights": int(node.renormalize),
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    row = emission.layout.row(node.downs[0].name)
    if row is None:
        inputs = [x, scores, *_dense(emission, pairs, 2), None, *_dense(emission, node.downs, 1)]
        emission.values[node.output] = emission.call("MoE", inputs, name, attributes, MICROSOFT)
        return
    attributes["expert_weight_bits"] = row.bits
    if row.group is not None:
        attributes["block_size"] = row.group
    inputs = [x, scores, *_quantized(emission, pairs, 2), None, *_quantized(emission, node.downs, 1)]
    if not node.renormalize:
        # Without it the kernel divides by the sum of the chosen, whatever normalize_routing_weights says.
        shares = emission.call("Softmax", [scores], f"{name}.shares", {"axis": -1})
        inputs += [*[None] * (ROUTER_WEIGHTS - len(inputs)), shares]
    emission.values[node.output] = emission.call("QMoE", inputs, name, attributes, MICROSOFT)


def _dense(emission: Emission, weights: tuple[WeightInfo, ...], alternating: int) -> list[ir.Value]:
    rows, columns = weights[0].shape
    content = Matrix(tuple(weight.name for weight in weights), (rows * len(weights), columns), alternating)
    return [emission.stored(content, (len(weights) // alternating, rows * alternating, columns))]


def _quantized(emission: Emission, weights: tuple[WeightInfo, ...], alternating: int) -> list[ir.Value]:
    """Codes and scales."""
    rows, columns = weights[0].shape
    codes = emission.layout.expert_codes(tuple(weight.name for weight in weights), rows, columns, alternating)
    experts = len(weights) // alternating, rows * alternating
    scales = (*experts, codes.blocks) if codes.blocks > 1 or codes.bits == 4 else experts
    return [
        emission.stored(codes, (*experts, columns * codes.bits // 8)),
        emission.stored(Scales(codes), scales),
    ]
