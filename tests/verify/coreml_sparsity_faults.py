"""Faults of block-sparse attention in a written Core ML package: the numbers that its mask is computed with."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pocketlm.manifest import Manifest
from tests.verify.coreml_editing import FUNCTIONS, blocks, edited
from tests.verify.coreml_faults import functions_of, scoped
from tests.verify.coreml_operators import Block
from tests.verify.fault_places import Place
from tests.verify.sparse_blocks import RIGHT, WRONG

__all__ = ["FAULTS", "places"]


def places(_fault: str, package: Path, _manifest: Manifest) -> list[Place]:
    """Every mask of the package: all layers that see the same blocks share one."""
    return scoped([Place(index=index) for index in range(len(blocks(package)[FUNCTIONS[0]].of_kind("mod")))])


def change_numbers(fault: str, package: Path, place: Place) -> None:
    """Of the mask's divisions into blocks, its comparison with the local ones, or its stride."""
    wrong = WRONG[fault]
    with edited(package) as found:
        for name in functions_of(place):
            block = found[name]
            phase = block.of_kind("mod")[place.index]
            of_key = block.maker(block.input(block.maker(block.input(phase, "x")), "x"))
            both = block.readers(block.readers(phase.outputs[0].name)[0].outputs[0].name)[0]
            far = block.maker(block.input(both, "x"))
            of_query = block.maker(block.input(block.maker(block.input(far, "x")), "x"))
            if wrong.size != RIGHT.size:
                state(block, of_key, wrong.size)
                state(block, of_query, wrong.size)
            state(block, far, wrong.local)
            state(block, phase, wrong.stride)


def state(block: Block, operator: Any, number: int) -> None:
    """``operator`` computes with ``number`` in its constant's place."""
    constant = block.clone(block.input(operator, "y"), operator)
    constant.attributes["val"].immediateValue.tensor.ints.values[:] = [number]
    block.bind(operator, "y", constant.outputs[0].name)


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {fault: partial(change_numbers, fault) for fault in WRONG}
