"""Faults of block-sparse attention in a written ONNX artifact: the size of blocks, and the mask of blocks."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from pocketlm.manifest import Manifest
from tests.verify.fault_places import Place, chosen_layers
from tests.verify.onnx_faults import attribute, edited, load, tensor
from tests.verify.sparse_blocks import WRONG

__all__ = ["FAULTS", "places"]


def places(_fault: str, folder: Path, _manifest: Manifest) -> list[Place]:
    """Every sparse layer of the artifact in ``folder``, the dense ones not counted."""
    return [Place(index=index) for index in chosen_layers(range(len(sparse(load(folder)))))]


def sparse(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "SparseAttention"]


def enlarge_blocks(folder: Path, place: Place) -> None:
    """The mask of blocks stays."""
    with edited(folder / "model.onnx") as model:
        attribute(sparse(model)[place.index], "sparse_block_size").i += 1


def see_other_blocks(fault: str, folder: Path, place: Place) -> None:
    """The layer gets a mask of its own, one layout for each head."""
    with edited(folder / "model.onnx") as model:
        node = sparse(model)[place.index]
        blocks = numpy_helper.to_array(tensor(model, node.input[5])).shape[1] - 1
        seen = WRONG[fault].seen(blocks)
        rows = np.pad(np.cumsum(seen.sum(2), axis=1), ((0, 0), (1, 0))).astype(np.int32)
        columns = np.full((len(seen), rows[:, -1].max()), -1, np.int32)
        for line, of_head in zip(columns, seen, strict=True):
            listed = np.nonzero(of_head)[1]
            line[: len(listed)] = listed
        for index, values in ((5, rows), (6, columns)):
            name = f"{node.name}.faulty.{index}"
            model.graph.initializer.append(numpy_helper.from_array(values, name))
            node.input[index] = name


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {
    fault: enlarge_blocks if fault == "sparse blocks one position larger" else partial(see_other_blocks, fault)
    for fault in WRONG
}
