"""What the graph's operators mean, in torch, in the dtype of the activations: float32 or float64.

Shapes: ``B`` batch, ``S`` sequence, ``T`` positions of the cache.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketlm_export.graph.graph import Activation, Add, BlockSparsity, Clamp, Multiply, Scale, Value

__all__ = ["Pointwise", "attend", "choose_experts", "layer_norm", "normalize", "pointwise", "share_experts"]

Pointwise = Add | Multiply | Scale | Clamp | Activation

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def pointwise(
    node: Pointwise, values: Mapping[Value, Tensor], constant: Callable[[float], float] = lambda value: value
) -> Tensor:
    """The output of a node that works element by element, from the values that it reads; ``constant`` gives its
    constants as they are stored."""
    match node:
        case Add():
            return values[node.left] + values[node.right]
        case Multiply():
            return values[node.left] * values[node.right]
        case Scale():
            return values[node.x] * constant(node.factor)
        case Clamp():
            least, most = (None if bound is None else constant(bound) for bound in (node.least, node.most))
            return torch.clamp(values[node.x], least, most)
        case Activation():
            return ACTIVATIONS[node.kind](values[node.x])


def normalize(x: Tensor, weight: Tensor, epsilon: float, reciprocal: float) -> Tensor:
    """RMS norm over the last axis, times ``weight``; ``reciprocal`` is one over the axis' size, as it is stored."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * reciprocal + epsilon) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, reciprocal: float) -> Tensor:
    """Layer norm over the last axis; ``reciprocal`` as in :func:`normalize`."""
    centered = x - x.sum(-1, keepdim=True) * reciprocal
    normal = normalize(centered, weight, epsilon, reciprocal)
    return normal if bias is None else normal + bias


def choose_experts(scores: Tensor, chosen: int, renormalize: bool) -> Tensor:
    """Router scores ``[S, E]`` -> the weight of each expert ``[S, E]``, zero where it isn't chosen."""
    return share_experts(scores, torch.topk(scores, chosen).indices, renormalize)


def share_experts(scores: Tensor, experts: Tensor, renormalize: bool) -> Tensor:
    """As :func:`choose_experts`, but for the choice: ``experts`` are the numbers of the chosen, ``[S, chosen]``."""
    weights = scores.softmax(-1)
    shares = weights.gather(-1, experts)
    if renormalize:
        shares = shares / shares.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter_(-1, experts, shares)


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    if tables is None:
        return x
    cos, sin = tables
    half = cos.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    tables: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sparsity: BlockSparsity | None = None,
) -> Tensor:
    """The meaning of :class:`pocketlm_export.graph.graph.Attention` behind its norms.

    ``query`` ``[B, heads, S, Dh]``, ``key`` and ``value`` ``[B, kv_heads, S, Dh]``, not rotated yet; the caches
    ``[B, kv_heads, T, Dh]`` receive them at ``start``. ``tables``: cosine and sine of the S positions, ``[S, pairs]``.
    Returns ``[B, S, heads * Dh]``.
    """
    batch, heads, sequence, head_dim = query.shape
    stop = start + sequence
    query = _rotate(query, tables)
    k_cache[:, :, start:stop] = _rotate(key, tables)
    v_cache[:, :, start:stop] = value
    repeats = heads // key.shape[1]
    keys = k_cache[:, :, :stop].repeat_interleave(repeats, 1)
    values = v_cache[:, :, :stop].repeat_interleave(repeats, 1)
    scores = query @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(start, stop)[:, None]
    seen = torch.arange(stop)[None, :] <= positions
    if window:
        seen &= torch.arange(stop)[None, :] > positions - window
    if sparsity is not None:
        seen = seen & _visible(sparsity, heads, start, stop)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ values).transpose(1, 2).reshape(batch, sequence, heads * head_dim)


def _visible(sparsity: BlockSparsity, heads: int, start: int, stop: int) -> Tensor:
    """``[heads, S, stop]``, causality apart."""
    query = torch.arange(start, stop)[None, :, None] // sparsity.block_size
    key = torch.arange(stop)[None, None, :] // sparsity.block_size
    shift = torch.arange(heads)[:, None, None] * sparsity.head_shift
    return (query - key < sparsity.local_blocks) | ((key + shift + 1) % sparsity.stride == 0)
