"""A mixture of experts for one token: the rows of the chosen experts are gathered from the quantized matrices of all,
as those of tokens are from the embedding, and nothing else is multiplied."""

import numpy as np

from pocketlm_export.backends.coreml.emission import Emission, Var
from pocketlm_export.backends.coreml.importing import mil
from pocketlm_export.graph.graph import MixtureOfExperts, WeightInfo

__all__ = ["emit_mixture_of_experts"]

mb = mil.Builder


def emit_mixture_of_experts(emission: Emission, node: MixtureOfExperts) -> None:
    """Of ``x`` ``[1, 1, D]``; a longer sequence would need the experts of every position at once."""
    assert emission.length == 1
    x = emission.values[node.x]
    bias = emission.constant(emission.layout.bias((node.router,), (None,)))
    shares = mb.softmax(x=mb.linear(x=x, weight=emission.matrix((node.router,)), bias=bias), axis=-1)
    shares, experts = mb.topk(x=shares, k=node.chosen, axis=-1)
    if node.renormalize:
        shares = mb.real_div(x=shares, y=mb.reduce_sum(x=shares, axes=[-1], keep_dims=True))
    experts = mb.reshape(x=experts, shape=[node.chosen, 1])

    def product(x: Var, matrices: tuple[WeightInfo, ...]) -> Var:
        """``[1 or chosen, 1, K]`` -> ``[chosen, 1, N]``, each by its expert's matrix."""
        count = matrices[0].shape[0]
        each = emission.constant(emission.layout.table(f"rows_{count}", np.arange(count, dtype=np.int32)))
        rows = mb.add(x=mb.mul(x=experts, y=np.int32(count)), y=each)
        chosen = mb.gather(x=emission.matrix(matrices), indices=rows, axis=0, validate_indices=False)
        return mb.matmul(x=x, y=chosen, transpose_y=True)

    inner = mb.mul(x=mb.silu(x=product(x, node.gates)), y=product(x, node.ups))
    made = mb.mul(x=product(inner, node.downs), y=mb.reshape(x=shares, shape=[node.chosen, 1, 1]))
    emission.values[node.output] = mb.reduce_sum(x=made, axes=[0], keep_dims=True)
