"""Faults of mixtures of experts in a written Core ML package: what is chosen, its weights, its shares."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pocketlm.manifest import Manifest
from tests.verify.coreml_editing import FUNCTIONS, blocks, change, edited
from tests.verify.coreml_faults import functions_of, scoped
from tests.verify.fault_places import Place, expert_places, router_places

__all__ = ["FAULTS", "places"]


def places(fault: str, package: Path, manifest: Manifest) -> list[Place]:
    """Every place of ``package`` that differs for ``fault``; none if it can't hold the fault."""
    return scoped(PLACES[fault](package, manifest))


def exchange_rows(package: Path, place: Place) -> None:
    """Of two experts, in one of the layer's matrices or in the router's."""
    first, second = place.rows

    def exchange(arrays: dict[str, np.ndarray]) -> None:
        for array in arrays.values():
            one, other = slice(first.start, first.stop), slice(second.start, second.stop)
            array[one], array[other] = array[other].copy(), array[one].copy()

    change(package, first.entry, functions_of(place), exchange)


def keep_shares(package: Path, place: Place) -> None:
    """The chosen experts' shares are not divided by their sum."""
    with edited(package) as found:
        for name in functions_of(place):
            quotient = found[name].readers(found[name].of_kind("topk")[place.index].outputs[0].name)
            divided = next(operator for operator in quotient if operator.type == "real_div")
            found[name].read_instead(divided.outputs[0].name, found[name].input(divided, "x"))


def mixtures(package: Path, _manifest: Manifest) -> list[Place]:
    return [Place(index=index) for index in range(len(blocks(package)[FUNCTIONS[0]].of_kind("topk")))]


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {
    "two experts exchanged": exchange_rows,
    "router rows exchanged": exchange_rows,
    "shares not divided by their sum": keep_shares,
}

PLACES: Mapping[str, Callable[[Path, Manifest], list[Place]]] = {
    "two experts exchanged": lambda _, manifest: expert_places("coreml", manifest),
    "router rows exchanged": lambda _, manifest: router_places("coreml", manifest),
    "shares not divided by their sum": mixtures,
}
