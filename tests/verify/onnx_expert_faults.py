"""Faults of mixtures of experts in a written ONNX artifact: what is chosen, its weights, its shares."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto, NodeProto, helper

from pocketlm.manifest import Manifest
from tests.verify.fault_places import Place, chosen_layers, expert_places, router_places
from tests.verify.onnx_faults import attribute, edited, insert_before, load, mapped

__all__ = ["FAULTS", "places"]

ROUTER_WEIGHTS = 14  # the input of QMoE
ALTERNATING = re.compile(r"\[(\d+):\d+ of (\d+)\]$")


def places(fault: str, folder: Path, manifest: Manifest) -> list[Place]:
    """Every place of the artifact in ``folder`` that differs for ``fault``; none if it can't hold the fault."""
    return PLACES[fault](folder, manifest)


def exchange_rows(folder: Path, place: Place) -> None:
    """Of two experts, in one of the layer's matrices or in the router's; those of gate and up take turns."""
    first, second = place.rows
    model = load(folder)
    found = ALTERNATING.search(first.entry)
    offset, period = (int(found[1]), int(found[2])) if found else (0, 1)
    name = ALTERNATING.sub("", first.entry)
    for constant in model.graph.initializer:
        if constant.name in (name, f"{name}.scales"):
            array = mapped(folder, constant)
            rows = array if array.ndim == 2 else array.reshape(-1, array.shape[-1])
            rows = rows[offset::period]
            one, other = slice(first.start, first.stop), slice(second.start, second.stop)
            rows[one], rows[other] = rows[other].copy(), rows[one].copy()


def keep_shares(folder: Path, place: Place) -> None:
    """The chosen experts' shares are given to the operator as they are, which divides them by nothing."""
    with edited(folder / "model.onnx") as model:
        node = mixtures(model)[place.index]
        name = f"{node.name}.shares"
        insert_before(model, node, helper.make_node("Softmax", [node.input[1]], [name], axis=-1))
        node.input.extend([""] * (ROUTER_WEIGHTS - len(node.input)) + [name])
        attribute(node, "normalize_routing_weights").i = 0


def choose_one_less(folder: Path, place: Place) -> None:
    """Than the model's."""
    with edited(folder / "model.onnx") as model:
        attribute(mixtures(model)[place.index], "k").i -= 1


def mixtures(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "QMoE"]


def mixture_places(folder: Path, _manifest: Manifest) -> list[Place]:
    return [Place(index=index) for index in chosen_layers(range(len(mixtures(load(folder)))))]


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {
    "two experts exchanged": exchange_rows,
    "router rows exchanged": exchange_rows,
    "shares not divided by their sum": keep_shares,
    "one expert less": choose_one_less,
}

PLACES: Mapping[str, Callable[[Path, Manifest], list[Place]]] = {
    "two experts exchanged": lambda _, manifest: expert_places("onnx", manifest),
    "router rows exchanged": lambda _, manifest: router_places("onnx", manifest),
    "shares not divided by their sum": mixture_places,
    "one expert less": mixture_places,
}
