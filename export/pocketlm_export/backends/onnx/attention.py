"""What GroupQueryAttention's kernel for CPUs takes, and what the graph is merged into before it."""

from pocketlm_export.graph.graph import Attention, Graph
from pocketlm_export.graph.rewrites import keep_last_positions, merge_linears

__all__ = ["cache_head_dim", "lowered", "rotates_inside"]

HEAD_DIM_STEP = 8
ROTATED_HEAD_DIM_STEP = 16
ROTATED_PAIRS_STEP = 8


def rotates_inside(node: Attention) -> bool:
    """Whether the kernel takes the layer's rotation; else an operator of its own rotates."""
    return (
        node.rotary is not None
        and node.head_dim % ROTATED_HEAD_DIM_STEP == 0
        and len(node.rotary.frequencies) % ROTATED_PAIRS_STEP == 0
    )


def cache_head_dim(head_dim: int) -> int:
    """The head size of the caches: filled up with zeros to what the kernel takes, which changes no score."""
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP


def lowered(graph: Graph) -> Graph:
    """The graph as it is emitted: linears of the same input are one, logits are the last position's."""
    return keep_last_positions(merge_linears(graph), 1)
