"""Translates a mixture of experts: kernels choose, and each expert is a delegate that a jump passes over if no position
chose it, so that only the chosen experts are computed, each for the positions that chose it.

ExecuTorch's own ``llama::quantized_moe_ffn`` reads weights packed by TorchAO alone, has no float32 and always divides
the shares by their sum.
"""

from collections.abc import Callable

from pocketlm_export.backends.executorch.emission import Emitter, Shape
from pocketlm_export.backends.executorch.importing import ScalarType
from pocketlm_export.backends.executorch.partition import ChosenExperts, Delegate

__all__ = ["emit_experts"]


def emit_experts(emitter: Emitter, node: ChosenExperts, emit_delegate: Callable[[Emitter, Delegate], None]) -> None:
    """The choice, then one expert after another adds to the rows of ``node.output`` that are its own."""
    method, scalar = emitter.method, emitter.method.scalar
    shares = _chosen_shares(emitter, node)
    # An expert is needed if it has a share anywhere; a share that is zero in float32 adds nothing.
    any_position = [shares, scalar(1), scalar(False)]
    needed = method.kernel("aten::any.out", any_position, method.activation((1, len(node.experts)), ScalarType.BOOL))
    zeros = [emitter.tensors[node.x], scalar(0.0), scalar(None)]
    sums = method.kernel("aten::full_like.out", zeros, emitter.make(node.output))
    for index, expert in enumerate(node.experts):
        flag = _scratch(emitter, "flag", (1,), ScalarType.BOOL)
        method.kernel("aten::select_copy.int_out", [needed, scalar(1), scalar(index)], flag)
        with method.only_if(flag):
            positions = _gather(emitter, node, shares, sums, index)
            emit_delegate(emitter, expert)
            made = emitter.tensors[node.new_sums]
            method.kernel("aten::index_put_", [sums, _places(emitter, positions), made, scalar(False)], sums)


def _chosen_shares(emitter: Emitter, node: ChosenExperts) -> int:
    """``[1, S, E]``: the share of each expert, zero where it isn't chosen."""
    method, scalar = emitter.method, emitter.method.scalar
    shares, shape = emitter.tensors[node.shares], (1, emitter.longest_call, node.chosen)
    values, experts = method.activation(shape), method.activation(shape, ScalarType.LONG)
    last, yes = scalar(2), scalar(True)
    method.kernel("aten::topk.values", [shares, scalar(node.chosen), last, yes, yes], values, experts)
    if node.renormalize:
        axes = emitter.once("last axis", lambda: method.integers(2))
        total = method.activation((1, emitter.longest_call, 1))
        method.kernel("aten::sum.IntList_out", [values, axes, yes, scalar(None)], total)
        values = method.kernel("aten::div.out", [values, total], method.activation(shape))
    zeros = method.kernel(
        "aten::full_like.out", [shares, scalar(0.0), scalar(None)], method.activation(emitter.shape(node.shares))
    )
    chosen = method.activation(emitter.shape(node.shares))
    return method.kernel("aten::scatter.src_out", [zeros, last, experts, values], chosen)


def _gather(emitter: Emitter, node: ChosenExperts, shares: int, sums: int, expert: int) -> int:
    """The expert's inputs: rows of ``x``, shares and sums at the positions ``[n]`` that chose it, which it returns."""
    method, scalar, longest = emitter.method, emitter.method.scalar, emitter.longest_call
    column = _scratch(emitter, "column", (1, longest, 1))
    bounds = [scalar(2), scalar(expert), scalar(expert + 1), scalar(1)]
    method.kernel("aten::slice_copy.Tensor_out", [shares, *bounds], column)
    indices = _scratch(emitter, "indices", (longest, 3), ScalarType.LONG)
    method.kernel("aten::nonzero.out", [column], indices)
    positions = _scratch(emitter, "positions", (longest,), ScalarType.LONG)
    method.kernel("aten::select_copy.int_out", [indices, scalar(1), scalar(1)], positions)
    for source, value in ((column, node.share), (emitter.tensors[node.x], node.rows), (sums, node.sums)):
        method.kernel("aten::index_select.out", [source, scalar(1), positions], emitter.make(value))
    return positions


def _places(emitter: Emitter, positions: int) -> int:
    """Rows ``positions`` of a ``[1, S, ...]``."""
    return emitter.once(("places", positions), lambda: emitter.method.optional_tensors(None, positions))


def _scratch(emitter: Emitter, name: str, shape: Shape, dtype: ScalarType = ScalarType.FLOAT) -> int:
    """A tensor that every expert of every layer writes anew: thousands of experts would make a long table of values."""
    return emitter.once(("expert", name, shape), lambda: emitter.method.activation(shape, dtype))
