"""Where faults go, in the terms that all artifacts share: layers, norms, and rows of the manifest's entries."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pocketlm.manifest import Manifest

__all__ = [
    "Place",
    "Rows",
    "all_layers",
    "bias_places",
    "chosen_layers",
    "expert_places",
    "int4_places",
    "kv_head_places",
    "router_places",
    "scale_places",
]


class Rows(NamedTuple):
    """Rows ``start..stop`` of an entry of the manifest."""

    entry: str
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """``rows`` of weights, an operator of ``layer``, or the norm of this ``index``. ``part`` tells kinds of one fault
    apart; ``scope`` is the only file or function that gets it, "" where it goes by itself."""

    layer: int = -1
    part: str = ""
    rows: tuple[Rows, ...] = ()
    index: int = -1
    scope: str = ""

    def __str__(self) -> str:
        layer = f"layer {self.layer}" if self.layer >= 0 else ""
        index = f"norm {self.index}" if self.index >= 0 else ""
        rows = [f"{entry[:40]}[{start}:{stop}]" for entry, start, stop in self.rows]
        scope = f"{self.scope} alone" if self.scope else ""
        return " ".join(part for part in (layer, index, self.part, *rows, scope) if part)


def chosen_layers(layers: Iterable[int]) -> list[int]:
    """The first, the middle and the last."""
    found = list(layers)
    return [found[index] for index in sorted({0, len(found) // 2, len(found) - 1})] if found else []


def all_layers(manifest: Manifest) -> list[Place]:
    """Of all layers, those that differ."""
    return [Place(layer) for layer in chosen_layers(range(manifest.model.layers))]


def bias_places(target: str, manifest: Manifest) -> list[Place]:
    """Every bias of the chosen layers."""
    return _weight_places(target, manifest, ".bias", ("fp32",))


def int4_places(target: str, manifest: Manifest) -> list[Place]:
    """Every int4 matrix of the chosen layers."""
    return _weight_places(target, manifest, ".weight", ("int4",))


def scale_places(target: str, manifest: Manifest) -> list[Place]:
    """Two groups of a row, two columns of groups, or two rows where a row is one group."""
    groups = [
        place for part in ("row", "columns") for place in _weight_places(target, manifest, ".weight", ("int4",), part)
    ]
    return groups + _weight_places(target, manifest, ".weight", ("int8",), "rows")


def kv_head_places(target: str, manifest: Manifest) -> list[Place]:
    """Keys and values of a layer together; ``part`` counts the heads."""
    if manifest.model.kv_heads == 1:
        return []
    found = []
    for layer in chosen_layers(range(manifest.model.layers)):
        names = [name for name in manifest.weights if _layer_of(name) == layer]
        sides = [name for name in names if ".k_proj." in name or ".v_proj." in name]
        rows = tuple(_rows_of(target, manifest, name) for name in sides)
        found.append(Place(layer, f"{manifest.model.kv_heads} heads", rows))
    return found


def expert_places(target: str, manifest: Manifest) -> list[Place]:
    """The first two experts' rows of each matrix of the chosen layers."""
    found = []
    for layer in chosen_layers(_layers_with(manifest, ".experts.0.")):
        for name in manifest.weights:
            if _layer_of(name) == layer and ".experts.0." in name:
                pair = name, name.replace(".experts.0.", ".experts.1.")
                rows = tuple(_rows_of(target, manifest, each) for each in pair)
                found.append(Place(layer, name.split(".")[-2], rows))
    return found


def router_places(target: str, manifest: Manifest) -> list[Place]:
    """The first two rows of the routers of the chosen layers."""
    found = []
    for layer in chosen_layers(_layers_with(manifest, ".gate.weight")):
        (name,) = (name for name in manifest.weights if _layer_of(name) == layer and name.endswith(".gate.weight"))
        entry, start, _ = _rows_of(target, manifest, name)
        found.append(Place(layer, "router", (Rows(entry, start, start + 1), Rows(entry, start + 1, start + 2))))
    return found


def _layers_with(manifest: Manifest, part: str) -> list[int]:
    return sorted({_layer_of(name) for name in manifest.weights if part in name})


def _rows_of(target: str, manifest: Manifest, name: str) -> Rows:
    weight = manifest.weights[name]
    place = weight.places[target]
    return Rows(place.entry, place.first_row, place.first_row + weight.shape[0])


def _layer_of(name: str) -> int:
    """-1 outside layers."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _weight_places(target: str, manifest: Manifest, suffix: str, schemes: Iterable[str], part: str = "") -> list[Place]:
    """Weights of the chosen layers, and those outside layers, by the end of their name."""
    layers = (-1, *chosen_layers(range(manifest.model.layers)))
    return [
        Place(_layer_of(name), part, (_rows_of(target, manifest, name),))
        for name, weight in manifest.weights.items()
        if name.endswith(suffix) and weight.scheme in schemes and _layer_of(name) in layers
    ]
