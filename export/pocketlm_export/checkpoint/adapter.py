"""A PEFT adapter (LoRA), merged into its base model: adapter_config.json and adapter_model.safetensors of a folder.

Format and meaning: https://huggingface.co/docs/peft/developer_guides/lora. What an adapter may say beyond a low-rank
change of matrices (DoRA, trained biases, whole modules, repeated layers) is refused by name, and so is one whose
tensors don't fit the base model one by one. Text is the base's: a tokenizer beside the adapter is not looked at.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import CheckpointError, UnsupportedError
from pocketlm_export.checkpoint.checkpoint import EMBEDDING, HEAD, Checkpoint, Tensors
from pocketlm_export.checkpoint.low_rank import LowRankChange
from pocketlm_export.checkpoint.patterns import Pattern
from pocketlm_export.checkpoint.tensors import FLOAT_TYPES, TensorFile
from pocketlm_export.fields import Fields, read_json

__all__ = ["with_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_A\.weight|lora_B\.weight|lora_embedding_[AB])")
KEPT_BASE = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
LARGEST_RANK = 1 << 14

# What changes the model in other ways than a low-rank product: these must be absent, null, false or empty.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
)  # fmt: skip
# Of training and of how a file was written.
NEUTRAL = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode lora_dropout
    lora_ga_config megatron_config megatron_core peft_version qalora_group_size revision runtime_config
    """.split()
)
# Beginnings that leave the base as it was; others (pissa, olora, corda, loftq) train beside a changed base.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def with_adapter(checkpoint: Checkpoint, folder: Path, accept: Collection[str] = ()) -> Checkpoint:
    """``checkpoint`` with the adapter in ``folder`` merged into its tensors; ``accept`` names keys to ignore.

    Only headers are read, and an embedding that the adapter repeats. Raises :class:`CheckpointError` for an adapter
    that is damaged or was made for another base, :class:`UnsupportedError` for what can't be merged, naming the file
    and the key or tensor.
    """
    recipe = _read_recipe(folder, accept)
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(f"{folder / 'adapter_model.bin'}: a pickle, never loaded: save it as {WEIGHTS}")
    file = TensorFile(path)
    factors = _factors(file, checkpoint.tensors)
    changes = {
        f"{module}.weight": _change(file, module, sorted(names), recipe, checkpoint)
        for module, names in factors.items()
    }
    missing = [module for module in _modules(checkpoint.tensors) if recipe.targets(module) and module not in factors]
    if missing:
        raise CheckpointError(
            f"{path}: no tensors for {missing[0]}, which {CONFIG} targets and the base has: is it an adapter for "
            "another base?"
        )
    return replace(checkpoint, tensors=checkpoint.tensors.changed(changes), adapter=folder)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """adapter_config.json. ``modules`` None: targets are given as an expression, and the tensors alone say which."""

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[Pattern, int]
    alpha_pattern: Mapping[Pattern, float]
    root_scale: bool
    modules: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None

    def rank_of(self, module: str) -> int:
        return _matched(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        alpha, rank = _matched(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (rank**0.5 if self.root_scale else rank)

    def targets(self, module: str) -> bool:
        """Whether ``modules`` names ``module``, by its whole name or by the end of it."""
        if self.modules is None or not _ends(module, self.modules) or _ends(module, self.excluded):
            return False
        layer = LAYER.match(module)
        return self.layers is None or (layer is not None and int(layer[1]) in self.layers)


def _matched(patterns: Mapping[Pattern, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the name, as in PEFT."""
    return next((value for pattern, value in patterns.items() if pattern.matches_end(module)), default)


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _read_recipe(folder: Path, accept: Collection[str]) -> _Recipe:
    path = folder / CONFIG
    if not folder.is_dir() or not path.exists():
        raise CheckpointError(f"{path}: no such file: an adapter is a folder with {CONFIG} and {WEIGHTS}")
    fields = Fields(read_json(path), str(path))
    if fields.value("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: 'peft_type' is {str(fields.value('peft_type'))[:40]!r}; supported: LORA")
    if fields.value("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedError(f"{path}: 'task_type' is {str(fields.value('task_type'))[:40]!r}; supported: CAUSAL_LM")
    for key in UNSUPPORTED:
        if fields.value(key):
            raise UnsupportedError(f"{path}: {key!r} is set: such an adapter can't be merged; merge it with PEFT")
    fields.choice("bias", "none", ("none",))
    if fields.value("init_lora_weights") not in PLAIN_BEGINNINGS:
        raise UnsupportedError(
            f"{path}: 'init_lora_weights' is {str(fields.value('init_lora_weights'))[:40]!r}: it may have changed the "
            "base: convert the adapter to plain LoRA with PEFT"
        )
    if fields.value("loftq_config"):
        raise UnsupportedError(f"{path}: 'loftq_config' is set: the base was changed: merge the adapter with PEFT")
    recipe = _Recipe(
        path=path,
        rank=fields.integer("r", most=LARGEST_RANK),
        alpha=fields.number("lora_alpha", least=-1e6, most=1e6),
        rank_pattern={
            Pattern(key, path, "rank_pattern"): values.integer(key, most=LARGEST_RANK)
            for values, key in _entries(fields, "rank_pattern")
        },
        alpha_pattern={
            Pattern(key, path, "alpha_pattern"): values.number(key, least=-1e6, most=1e6)
            for values, key in _entries(fields, "alpha_pattern")
        },
        root_scale=fields.flag("use_rslora", False),
        modules=_target_modules(fields),
        excluded=_names(fields, "exclude_modules"),
        layers=_layers(fields),
    )
    unknown = [key for key in fields.unread() if key not in NEUTRAL and key not in accept]
    if unknown:
        raise CheckpointError(
            f"{path}: unknown key {', '.join(map(repr, unknown[:3]))}: it may change the model. "
            f"If it doesn't: --accept {unknown[0]}"
        )
    return recipe


def _entries(fields: Fields, key: str) -> list[tuple[Fields, str]]:
    values = fields.nested(key)
    return [(values, name) for name in values.unread()] if values is not None else []


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.value(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise fields.refuse(key, "must be a list of names")
    return tuple(value or ())


def _target_modules(fields: Fields) -> tuple[str, ...] | None:
    """A list of names; None for ``all-linear`` or an expression."""
    if isinstance(fields.value("target_modules"), str):
        return None
    names = _names(fields, "target_modules")
    if not names:
        raise fields.refuse("target_modules", "names no module")
    return names


def _layers(fields: Fields) -> tuple[int, ...] | None:
    value = fields.value("layers_to_transform")
    if fields.value("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        raise fields.refuse("layers_pattern", "is not 'layers', which is where the layers of every supported model are")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
        raise fields.refuse("layers_to_transform", "must be a layer's number, or a list of them")
    return tuple(layers)


def _modules(tensors: Tensors) -> list[str]:
    """The modules whose weight is a matrix."""
    names = [name for name in tensors.names() if name.endswith(".weight") and _is_matrix(tensors, name)]
    return [name.removesuffix(".weight") for name in names]


def _is_matrix(tensors: Tensors, name: str) -> bool:
    return len(tensors.shape(name)) == 2


def _factors(file: TensorFile, tensors: Tensors) -> dict[str, list[str]]:
    """The tensors of the adapter by the module that they change."""
    factors: dict[str, list[str]] = {}
    for name, info in file.tensors.items():
        kept = KEPT_BASE.fullmatch(name)
        if kept is not None:
            _require_same(file, name, tensors, f"{kept['module']}.weight")
            continue
        match = FACTOR.fullmatch(name)
        if match is None:
            raise UnsupportedError(f"{file.path}: {name} is no factor of a low-rank change, so it can't be merged")
        weight = f"{match['module']}.weight"
        if weight not in tensors.names() or not _is_matrix(tensors, weight):
            raise CheckpointError(
                f"{file.path}: {name}: the base model has no matrix {weight}: is it an adapter for another base?"
            )
        if info.dtype not in FLOAT_TYPES or len(info.shape) != 2:
            raise CheckpointError(f"{file.path}: {name}: {info.dtype} {list(info.shape)} is no matrix of numbers")
        factors.setdefault(match["module"], []).append(name)
    if not factors:
        raise CheckpointError(f"{file.path}: holds no tensors of an adapter")
    return factors


def _require_same(file: TensorFile, name: str, tensors: Tensors, weight: str) -> None:
    """PEFT saves the embedding beside the factors that change it; one that isn't the base's own would replace it."""
    if weight in tensors.names() and file.tensors[name].shape == tensors.shape(weight):
        pairs = zip(file.float_blocks(name, 1 << 20), tensors.blocks(weight, 1 << 20), strict=True)
        if all(np.array_equal(own, base) for (_, own), (_, base) in pairs):
            return
    raise CheckpointError(
        f"{file.path}: {name} is not the base's {weight}: the adapter is for another base, or its vocabulary grew"
    )


def _change(file: TensorFile, module: str, names: list[str], recipe: _Recipe, checkpoint: Checkpoint) -> LowRankChange:
    """The change of one module, once its two factors are known to fit."""
    weight = f"{module}.weight"
    if recipe.modules is not None and not recipe.targets(module):
        raise CheckpointError(f"{file.path}: {names[0]}: adapter_config.json does not target {module}")
    if len(names) != 2:
        raise CheckpointError(f"{file.path}: {names[0]}: its other factor is missing")
    if checkpoint.config.tied and weight in (EMBEDDING, HEAD):
        raise UnsupportedError(
            f"{file.path}: {names[0]} changes the embedding or the head, which are one matrix in this model: merged it "
            "would mean something else than beside it"
        )
    first, second = names
    embedding = "lora_embedding" in first
    left, right = (first, second) if embedding else (second, first)
    rows, columns = checkpoint.tensors.shape(weight)
    rank = recipe.rank_of(module)
    expected = {left: [rows, rank], right: [rank, columns]}
    if embedding:
        expected = {name: shape[::-1] for name, shape in expected.items()}
    for name, shape in expected.items():
        found = list(file.tensors[name].shape)
        if found != shape:
            raise CheckpointError(
                f"{file.path}: {name} has shape {found}, but rank {rank} and the base's {weight} [{rows}, {columns}] "
                f"ask for {shape}"
            )
    return LowRankChange(file, left, right, embedding, recipe.scale_of(module))
