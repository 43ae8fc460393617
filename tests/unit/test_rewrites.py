"""A graph means the same after each shared rewrite, and its operators mean what their docstrings say."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from pocketlm_export.graph.builder import GraphBuilder
from pocketlm_export.graph.graph import BlockSparsity, Graph, LastPositions, Linear, WeightInfo
from pocketlm_export.graph.rewrites import keep_last_positions, merge_linears
from pocketlm_export.graph.rotary import Rotary, default_frequencies
from pocketlm_export.verify.reference import ReferenceSession

HIDDEN, HEAD_DIM, HEADS, KV_HEADS, INNER, EXPERTS, VOCABULARY, CONTEXT = 16, 8, 4, 2, 24, 5, 40, 32
TOKENS = [3, 11, 7, 39, 0, 25, 25, 8, 14, 30, 2, 19]


class RandomWeights:
    """Values by name alone."""

    def __init__(self, graph: Graph) -> None:
        self._shapes = {name: weight.shape for name, weight in graph.weights().items()}

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        shape = self._shapes[name]
        generator = np.random.default_rng(sum(map(ord, name)))
        yield 0, generator.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5

    def tensor(self, name: str) -> torch.Tensor:
        ((_, values),) = self.blocks(name)
        return torch.from_numpy(values).double()


def every_operator() -> Graph:
    """A layer in which attention and experts read one norm, and logits behind a scale and a soft cap."""
    build = GraphBuilder()
    x = build.scale(build.embedding(build.ids, WeightInfo("embedding", (VOCABULARY, HIDDEN))), 4.0)
    normal = build.layer_norm(x, WeightInfo("norm", (HIDDEN,)), WeightInfo("norm.bias", (HIDDEN,)), 1e-5)
    query = build.linear(normal, WeightInfo("query", (HEADS * HEAD_DIM, HIDDEN)))
    key, value = (build.linear(normal, WeightInfo(name, (KV_HEADS * HEAD_DIM, HIDDEN))) for name in ("key", "value"))
    mixed = build.attention(
        query, key, value, layer=0, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=0.3,
        rotary=Rotary(default_frequencies(100.0, 4), 1.25), softcap=2.0,
        query_norm=WeightInfo("query_norm", (HEAD_DIM,)), key_norm=WeightInfo("key_norm", (HEAD_DIM,)),
        norm_epsilon=1e-6, norm_offset=1.0, sparsity=BlockSparsity(2, 2, 3, 1),
    )  # fmt: skip
    x = build.add(x, build.linear(mixed, WeightInfo("output", (HIDDEN, HEADS * HEAD_DIM))))
    experts = {
        name: [WeightInfo(f"{name}.{index}", shape) for index in range(EXPERTS)]
        for name, shape in (("gates", (INNER, HIDDEN)), ("ups", (INNER, HIDDEN)), ("downs", (HIDDEN, INNER)))
    }
    routed = build.mixture_of_experts(
        normal, WeightInfo("router", (EXPERTS, HIDDEN)), **experts, chosen=2, renormalize=True
    )
    x = build.clamp(build.add(x, routed), -3.0, 4.0)
    logits = build.linear(
        build.rms_norm(x, WeightInfo("final", (HIDDEN,)), 1e-5, 1.0), WeightInfo("head", (VOCABULARY, HIDDEN))
    )
    return build.graph(build.softcap(build.scale(logits, 0.5), 3.0), CONTEXT)


def plainly(weights: RandomWeights) -> torch.Tensor:
    """The logits of TOKENS by the docstrings, position by position and head by head."""
    w = weights.tensor
    x = w("embedding")[TOKENS] * 4.0
    normal = torch.nn.functional.layer_norm(x, (HIDDEN,), w("norm"), w("norm.bias"), 1e-5)

    def heads(name: str, count: int) -> torch.Tensor:
        return (normal @ w(name).T).view(len(TOKENS), count, HEAD_DIM)

    def prepared(name: str, count: int) -> torch.Tensor:
        h = heads(name, count)
        h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (w(f"{name}_norm") + 1.0)
        frequencies = torch.tensor([1.0, 0.1], dtype=torch.float64)
        angles = torch.arange(len(TOKENS))[:, None, None] * frequencies
        first, second, rest = h[..., :2], h[..., 2:4], h[..., 4:]
        cos, sin = 1.25 * angles.cos(), 1.25 * angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    query, key, value = prepared("query", HEADS), prepared("key", KV_HEADS), heads("value", KV_HEADS)
    mixed = torch.zeros(len(TOKENS), HEADS, HEAD_DIM, dtype=torch.float64)
    for i in range(len(TOKENS)):
        for h in range(HEADS):
            seen = [j for j in range(i + 1) if i // 2 - j // 2 < 2 or (j // 2 + h + 1) % 3 == 0]
            scores = torch.stack([query[i, h] @ key[j, h // 2] * 0.3 for j in seen])
            weight = (2.0 * torch.tanh(scores / 2.0)).softmax(-1)
            mixed[i, h] = sum(weight[n] * value[j, h // 2] for n, j in enumerate(seen))
    x = x + mixed.flatten(1) @ w("output").T
    for i in range(len(TOKENS)):
        shares = (w("router") @ normal[i]).softmax(-1)
        top = shares.topk(2).indices.tolist()
        for e in top:
            inner = torch.nn.functional.silu(w(f"gates.{e}") @ normal[i]) * (w(f"ups.{e}") @ normal[i])
            x[i] += shares[e] / shares[top].sum() * (w(f"downs.{e}") @ inner)
    x = x.clamp(-3.0, 4.0)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (w("final") + 1.0)
    return 3.0 * torch.tanh(x @ w("head").T * 0.5 / 3.0)


def logits(graph: Graph, chunks: tuple[int, ...] = (12,)) -> np.ndarray:
    """Of all TOKENS, given in ``chunks``."""
    rows, start = [], 0
    with ReferenceSession(graph, RandomWeights(graph), torch.float64) as session:
        for count in chunks:
            rows.append(session.extend(TOKENS[start : start + count], logits=count))
            start += count
    return np.concatenate(rows)


@pytest.mark.parametrize("chunks", ((12,), (5, 7), (1,) * 12))
def test_the_operators_mean_what_they_say(chunks):
    graph = every_operator()
    np.testing.assert_allclose(logits(graph, chunks), plainly(RandomWeights(graph)).numpy(), rtol=0, atol=1e-6)


def test_merged_linears_compute_the_same():
    graph = every_operator()
    merged = merge_linears(graph)
    assert [len(node.weights) for node in merged if isinstance(node, Linear)] == [3, 1, 1]
    np.testing.assert_array_equal(logits(merged), logits(graph))


def test_kept_positions_go_through_the_scale_and_the_soft_cap():
    graph = keep_last_positions(every_operator(), 1)
    (cut,) = (node for node in graph if isinstance(node, LastPositions))
    assert graph.logits.shape == (1, 1, VOCABULARY)
    after = list(graph)[list(graph).index(cut) :]
    assert all(output.shape[1] == 1 for node in after for output in getattr(node, "outputs", None) or (node.output,))
    assert graph.head.weights[0].name == "head"


def test_a_longer_context_changes_nothing():
    graph = every_operator()
    np.testing.assert_array_equal(logits(replace(graph, context_length=64)), logits(graph))
