"""PocketLM's operators for torch, namespace ``pocketlm``: eager they are the reference, traced they stay whole.

Every operator computes in the dtype of its activations, so that the same code is the float32 and the float64
reference. Shapes are those of CONTRACT's operator set: ``B`` batch, ``S`` sequence, ``T`` context length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["attend"]


@torch.library.custom_op("pocketlm::embedding", mutates_args=())
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """int64 ``[B, S]``, ``[V, D]`` -> ``[B, S, D]``."""
    return weight[ids]


@embedding.register_fake
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.custom_op("pocketlm::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[B, S, K]``, ``[N, K]``, ``[N]`` or None -> ``[B, S, N]``."""
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (weight + offset)


@torch.library.custom_op("pocketlm::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    """``[..., D]``, ``[D]`` -> ``[..., D]``: x / rms(x) * (weight + offset)."""
    return _rms_norm(x, weight, epsilon, offset)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    return torch.empty_like(x)


def _tables(
    positions: Tensor, frequencies: Sequence[float], scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine of the float32 angle of each position, as transformers has them; None without a rotation."""
    if not frequencies:
        return None
    angles = positions.float()[:, None] * torch.tensor(frequencies, dtype=torch.float32)[None, :]
    wide = angles.double()
    return (wide.cos() * scale).float().to(dtype), (wide.sin() * scale).float().to(dtype)


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
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ values).transpose(1, 2).reshape(batch, sequence, heads * head_dim)


@torch.library.custom_op("pocketlm::attention", mutates_args=("k_cache", "v_cache"))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    frequencies: Sequence[float],
    rotary_scale: float,
    window: int,
    softcap: float,
    norm_epsilon: float,
) -> Tensor:
    """``[B, S, heads*Dh]`` and twice ``[B, S, kv_heads*Dh]`` -> ``[B, S, heads*Dh]``; see ``graph.Attention``.

    The caches ``[B, kv_heads, T, Dh]`` receive the new keys (normalized, rotated) and values at ``position`` (int64
    ``[1]``). ``window`` and ``softcap`` 0 mean none, an empty ``frequencies`` no rotation.
    """
    batch, sequence, _ = q.shape
    split = [t.view(batch, sequence, -1, head_dim).transpose(1, 2) for t in (q, k, v)]
    query, key, value = split
    if q_norm is not None:
        query = _rms_norm(query, q_norm, norm_epsilon, 0.0)
    if k_norm is not None:
        key = _rms_norm(key, k_norm, norm_epsilon, 0.0)
    start = int(position)
    tables = _tables(torch.arange(start, start + sequence), frequencies, rotary_scale, q.dtype)
    return attend(
        query, key, value, k_cache, v_cache, start, tables, scale=scale, window=window or None, softcap=softcap or None
    )


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    frequencies: Sequence[float],
    rotary_scale: float,
    window: int,
    softcap: float,
    norm_epsilon: float,
) -> Tensor:
    return torch.empty_like(q)
