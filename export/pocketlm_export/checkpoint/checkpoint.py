"""A checkpoint folder, opened: configuration, tensors by the names that the graph uses, tokenizer and licence files."""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm.errors import CheckpointError, UnsupportedError
from pocketlm_export.architectures import SUPPRESSING_BIAS, DecoderConfig, load_architecture
from pocketlm_export.checkpoint.constant import ConstantVector, suppressing_bias
from pocketlm_export.checkpoint.generation import Generation, read_generation
from pocketlm_export.checkpoint.low_rank import LowRankChange
from pocketlm_export.checkpoint.neutral import NEUTRAL_KEYS, NEUTRAL_TENSORS
from pocketlm_export.checkpoint.phi3small_tokenizer import VOCABULARY
from pocketlm_export.checkpoint.renamed import RenamedFile
from pocketlm_export.checkpoint.tensors import FLOAT_TYPES, TensorFile, foreign_format, open_shards
from pocketlm_export.checkpoint.text_part import TextPart, find_text_part
from pocketlm_export.fields import Fields, read_json
from pocketlm_export.graph.graph import WeightInfo
from pocketlm_export.selection import selected, tensor_of

__all__ = ["Checkpoint", "Tensors", "open_checkpoint", "read_configuration"]

Floats = npt.NDArray[np.float32]
TensorSource = TensorFile | RenamedFile | ConstantVector
QUANTIZED_KEYS = ("quantization_config", "compression_config", "quantization")
OLD_PHI_KEYS = ("n_embd", "n_head", "n_layer", "n_inner", "n_positions")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT_LIKE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class Tensors:
    """The checkpoint's weights by name: tensors, and rows of them (:mod:`pocketlm_export.selection`).

    Values are read in blocks; nothing is held. ``changes`` of an adapter, by the tensor that they change, are in every
    value and every digest.
    """

    def __init__(self, files: Mapping[str, TensorSource], changes: Mapping[str, LowRankChange] | None = None) -> None:
        self._files = files
        self._changes = changes or {}
        self._digests: dict[str, str] = {}

    def changed(self, changes: Mapping[str, LowRankChange]) -> "Tensors":
        """The same tensors with ``changes``."""
        return Tensors(self._files, changes)

    def __contains__(self, name: str) -> bool:
        tensor, selection = selected(name)
        if tensor not in self._files:
            return False
        shape = self._files[tensor].tensors[tensor].shape
        return selection is None or (len(shape) > 0 and selection.fits(shape[0]))

    def source(self, name: str) -> TensorSource:
        """The file that holds ``name``."""
        return self._files[tensor_of(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        tensor, selection = selected(name)
        shape = self._files[tensor].tensors[tensor].shape
        return shape if selection is None else (selection.count(shape[0]), *shape[1:])

    def dtype(self, name: str) -> str:
        """As safetensors names it."""
        tensor = tensor_of(name)
        return self._files[tensor].tensors[tensor].dtype

    def values(self, name: str) -> Floats:
        """The whole weight in float32."""
        blocks = [values for _, values in self.blocks(name, 1 << 22)]
        return np.concatenate(blocks) if blocks else np.empty(self.shape(name), np.float32)

    def blocks(self, name: str, elements: int = 1 << 20) -> Iterator[tuple[int, Floats]]:
        """``(first row, float32 values)`` of blocks of about ``elements`` values, in order."""
        tensor, selection = selected(name)
        blocks = self._files[tensor].float_blocks(tensor, elements, selection)
        if tensor not in self._changes:
            return blocks
        step = max(1, elements // max(1, self.shape(tensor)[1]))
        return self._with_change(name, blocks, self._changes[tensor].blocks(step, selection))

    def _with_change(
        self, name: str, blocks: Iterator[tuple[int, Floats]], changes: Iterator[Floats]
    ) -> Iterator[tuple[int, Floats]]:
        for (start, values), change in zip(blocks, changes, strict=True):
            change += values
            if not np.isfinite(change).all():
                raise CheckpointError(f"{self.source(name).path}: {name} with the adapter's change is not finite")
            yield start, change

    def elements(self, names: Collection[str]) -> int:
        """How many values ``names`` hold together."""
        return sum(math.prod(self.shape(name)) for name in names)

    def names(self) -> Collection[str]:
        """Every tensor's name."""
        return self._files.keys()

    def digest(self, name: str) -> str:
        """sha256 of the tensor's dtype, shape and bytes, and of its change if it has one, computed once; of rows, of
        that and which they are."""
        tensor, selection = selected(name)
        if selection is not None:
            return hashlib.sha256(selection.of(self.digest(tensor)).encode()).hexdigest()
        if name not in self._digests:
            digest, change = self._files[name].digest(name), self._changes.get(name)
            if change is not None:
                digest = hashlib.sha256(f"{digest} {change.digest}".encode()).hexdigest()
            self._digests[name] = digest
        return self._digests[name]

    def changes_digest(self) -> str | None:
        """sha256 over all changes and what they change; None without any."""
        if not self._changes:
            return None
        parts = (f"{name} {self._changes[name].digest}\n" for name in sorted(self._changes))
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def release(self) -> None:
        """Let the kernel drop every mapped page."""
        for file in set(self._files.values()):
            file.release()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What an export needs to know of a checkpoint. ``adapter``: the folder whose changes ``tensors`` hold, or None.
    ``left_out``: in words, which parts of a multimodal one are not exported; None if it is text alone."""

    folder: Path
    config: DecoderConfig
    generation: Generation
    tensors: Tensors
    tokenizer_files: Mapping[str, Path]
    license_files: Mapping[str, Path]
    adapter: Path | None = None
    left_out: str | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files lie: ``folder``, unless they had to be made."""
        return next(iter(self.tokenizer_files.values())).parent

    def digest(self, weights: Collection[str]) -> str:
        """sha256 over config.json and the content of ``weights``."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in sorted(weights):
            digest.update(f"{name} {self.tensors.digest(name)}\n".encode())
        return digest.hexdigest()

    def check_tensors(self, weights: Mapping[str, WeightInfo], accept: Collection[str] = ()) -> None:
        """Compare the files with the weights that the graph reads.

        A missing tensor, another shape or dtype, and a tensor that no one knows raise :class:`CheckpointError`. Only
        headers are read.
        """
        for weight in weights.values():
            self._check_weight(weight)
        read = {tensor_of(name) for name in weights}
        unknown = [name for name in self.tensors.names() if name not in read and name not in accept]
        unknown = [name for name in unknown if not NEUTRAL_TENSORS.fullmatch(name)]
        if self.config.tied and HEAD in unknown:
            unknown.remove(HEAD)
        if unknown:
            raise CheckpointError(
                f"{self.folder}: tensors that the model does not use: {', '.join(sorted(unknown)[:3])}"
                f"{' and others' if len(unknown) > 3 else ''} ({len(unknown)}). If they may be dropped: --accept NAME"
            )

    def _check_weight(self, weight: WeightInfo) -> None:
        tensors, tensor = self.tensors, tensor_of(weight.name)
        if tensor not in tensors:
            raise CheckpointError(f"{self.folder}: tensor {weight.name} {list(weight.shape)} is missing")
        path = tensors.source(tensor).path
        if weight.name not in tensors or tensors.shape(weight.name) != weight.shape:
            found, part = list(tensors.shape(tensor)), "" if tensor == weight.name else f" for {weight.name}"
            raise CheckpointError(
                f"{path}: {tensor} has shape {found}, but config.json asks for {list(weight.shape)}{part}"
            )
        if tensors.dtype(tensor) not in FLOAT_TYPES:
            raise CheckpointError(
                f"{path}: {tensor} has dtype {tensors.dtype(tensor)}; supported: {', '.join(sorted(FLOAT_TYPES))}. "
                "A quantized checkpoint can't be exported: take the original one"
            )

    def check_saved_head(self, accept: Collection[str] = ()) -> None:
        """Raises :class:`CheckpointError` for a tied head that was saved with other values than the embedding's."""
        if not self.config.tied or HEAD not in self.tensors.names() or HEAD in accept:
            return
        if self.tensors.digest(HEAD) != self.tensors.digest(EMBEDDING):
            raise CheckpointError(
                f"{self.tensors.source(HEAD).path}: {HEAD} differs from {EMBEDDING}, "
                f"but config.json ties them. transformers uses the embedding: --accept {HEAD}; for the head set "
                "tie_word_embeddings to false"
            )


def open_checkpoint(folder: Path, accept: Collection[str] = ()) -> Checkpoint:
    """Open a folder; ``accept`` names unknown configuration keys and tensors to ignore.

    Raises :class:`CheckpointError` or :class:`UnsupportedError` naming the file and the key or tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder" if folder.exists() else f"{folder}: no such folder")
    _refuse_adapter(folder)
    fields, config, part = _read_whole_configuration(folder, accept)
    generation_path = folder / "generation_config.json"
    generation = Fields(read_json(generation_path), str(generation_path)) if generation_path.exists() else None
    shards = open_shards(folder)
    files: dict[str, TensorSource] = {**(shards if part is None else part.tensors(shards))}
    if config.suppressed_ids:
        files[SUPPRESSING_BIAS] = suppressing_bias(folder / "config.json", SUPPRESSING_BIAS, config)
    tensors = Tensors(files)
    return Checkpoint(
        folder=folder,
        config=config,
        generation=read_generation(fields, generation, config.vocabulary_size),
        tensors=tensors,
        tokenizer_files=_tokenizer_files(folder, config.model_type),
        license_files={path.name: path for path in sorted(folder.iterdir()) if _is_license(path)},
        left_out=None if part is None else part.left_out(shards),
    )


def read_configuration(folder: Path, accept: Collection[str] = ()) -> DecoderConfig:
    """config.json of ``folder`` as what the model is made from; ``accept`` names keys to ignore.

    Raises :class:`CheckpointError` or :class:`UnsupportedError` naming the file and the key.
    """
    _, config, _ = _read_whole_configuration(folder, accept)
    return config


def _read_whole_configuration(folder: Path, accept: Collection[str]) -> tuple[Fields, DecoderConfig, TextPart | None]:
    """The text model's fields, what they mean, and, of a multimodal checkpoint, where they lay."""
    fields = _read_config(folder)
    _refuse_quantized(folder, fields)
    part = find_text_part(fields, _model_type(fields))
    if part is not None:
        outer, fields = fields, part.configuration(fields)
        _refuse_unread(outer, accept)
        _refuse_quantized(folder, fields)
    architecture = load_architecture(_model_type(fields), fields.source)
    _check_head(fields)
    config = architecture.configure(fields)
    _refuse_unread(fields, accept)
    return fields, config, part


def _model_type(fields: Fields) -> str:
    model_type = fields.value("model_type")
    if not isinstance(model_type, str):
        raise fields.refuse("model_type", "is missing" if model_type is None else "must be a string")
    return model_type


def _refuse_unread(fields: Fields, accept: Collection[str]) -> None:
    unknown = [key for key in fields.unread() if key not in NEUTRAL_KEYS and key not in accept]
    if unknown:
        raise CheckpointError(
            f"{fields.source}: unknown key {', '.join(map(repr, unknown[:3]))}: it may change the model. "
            f"If it doesn't: --accept {unknown[0]}"
        )


def _refuse_adapter(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if path.exists():
        raise CheckpointError(
            f"{path}: a PEFT adapter, which changes the model: export its base model, and --adapter {folder} will "
            "merge it, or remove the file"
        )


def _read_config(folder: Path) -> Fields:
    path = folder / "config.json"
    if path.exists():
        return Fields(read_json(path), str(path))
    raise CheckpointError(foreign_format(folder) or f"{folder}: no config.json: not a Hugging Face checkpoint")


def _refuse_quantized(folder: Path, fields: Fields) -> None:
    for key in QUANTIZED_KEYS:
        value = fields.value(key)
        if value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise CheckpointError(
                f"{fields.source}: '{key}' says that the weights are already quantized ({method or 'unnamed method'}): "
                "take the original checkpoint"
            )
    if (folder / "hf_quant_config.json").exists():
        raise CheckpointError(
            f"{folder}/hf_quant_config.json: the weights are already quantized: take the original checkpoint"
        )


def _check_head(fields: Fields) -> None:
    names = fields.value("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.refuse("architectures", "must be a list of class names")
    if names and not any(name.endswith("ForCausalLM") for name in names):
        raise UnsupportedError(
            f"{fields.source}: 'architectures' is {names[0][:60]}; supported: a class that ends in ForCausalLM"
        )
    if fields.value("model_type") == "phi" and any(key in fields for key in OLD_PHI_KEYS):
        raise UnsupportedError(f"{fields.source}: an old Phi configuration: save it again with transformers >= 4.37")


def _tokenizer_files(folder: Path, model_type: str) -> dict[str, Path]:
    files = {name: folder / name for name in TEXT_LIKE_FILES if (folder / name).exists()}
    if "tokenizer.json" not in files and model_type == "phi3small" and (folder / VOCABULARY).exists():
        files[VOCABULARY] = folder / VOCABULARY
    for path in (*files.values(), *(folder / "additional_chat_templates").glob("*.jinja")):
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
    if not files.keys() & {"tokenizer.json", VOCABULARY}:
        missing = f"tokenizer.json and no {VOCABULARY}" if model_type == "phi3small" else "tokenizer.json"
        raise CheckpointError(
            f"{folder}: no {missing}. Save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return files


def _is_license(path: Path) -> bool:
    return path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
