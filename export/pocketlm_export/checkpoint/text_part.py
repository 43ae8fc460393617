"""The text part of a multimodal checkpoint, read as a checkpoint of the text model alone.

In its config.json ``text_config`` holds what differs from the text class's defaults, and prefixes say which part a
tensor is of. Parts that see or hear are left out; a multimodal model that isn't in :data:`PARTS` is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketlm.errors import CheckpointError, UnsupportedError
from pocketlm_export.checkpoint.renamed import RenamedFile
from pocketlm_export.checkpoint.tensors import TensorFile
from pocketlm_export.fields import Fields

__all__ = ["TextPart", "find_text_part"]

TEXT = "text_config"
MULTIMODAL_KEYS = ("vision_config", "audio_config", "img_processor", TEXT, "thinker_config")
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class TextPart:
    """How a multimodal class of transformers holds its text model.

    ``defaults``: what ``text_config`` means by an absent key that the text model's own files state. ``other_keys``: of
    the outer object, for the other parts. ``unapplied``: keys of the text model that the whole ignores.
    ``names``: prefixes of the text model's tensors, and those that it has alone; ``others``: prefixes of other parts.
    """

    class_name: str
    model_type: str
    defaults: Mapping[str, Any]
    other_keys: tuple[str, ...]
    unapplied: tuple[str, ...]
    names: Mapping[str, str]
    others: tuple[str, ...]

    def configuration(self, fields: Fields) -> Fields:
        """The text model's configuration; what ``fields``, the outer one, says of tokens and tying counts.

        Raises :class:`CheckpointError` or :class:`UnsupportedError` naming the key.
        """
        names = fields.value("architectures") or [self.class_name]
        if names != [self.class_name]:
            raise UnsupportedError(
                f"{fields.source}: 'architectures' is {str(names)[:60]}; supported: {self.class_name}"
            )
        for key in self.other_keys:
            fields.value(key)
        inner = fields.value(TEXT)
        if not isinstance(inner, dict):
            raise fields.refuse(TEXT, "is missing" if inner is None else "must be an object")
        text = Fields(inner, f"{fields.source}: {TEXT}")
        text.choice("model_type", self.model_type, (self.model_type,))
        for key in self.unapplied:
            if text.value(key) is not None:
                raise text.refuse(key, f"is set, but {self.class_name} does not apply it")
        tied = not fields.is_null("tie_word_embeddings") and fields.flag("tie_word_embeddings", True)
        if text.flag("tie_word_embeddings", tied) != tied:
            raise text.refuse("tie_word_embeddings", f"is not what the outer one says ({str(tied).lower()})")
        tokens = {key: value for key in TOKEN_KEYS if (value := fields.value(key)) is not None}
        stated = {key: value for key, value in inner.items() if value is not None or key not in self.defaults}
        model = {"model_type": self.model_type, "tie_word_embeddings": tied}
        return Fields({**self.defaults, **stated, **tokens, **model}, text.source)

    def tensors(self, files: Mapping[str, TensorFile]) -> dict[str, RenamedFile]:
        """The text model's tensors under its own names, and those of no known part under theirs.

        Raises :class:`CheckpointError` for two tensors that would have one name.
        """
        stored: dict[TensorFile, dict[str, str]] = {}
        holders: dict[str, str] = {}
        for old, file in files.items():
            if old.startswith(self.others):
                continue
            name = self._renamed(old)
            if holders.setdefault(name, old) != old:
                raise CheckpointError(f"{file.path}: {old} and {holders[name]} are both the text model's {name}")
            stored.setdefault(file, {})[name] = old
        views = [RenamedFile(file, names) for file, names in stored.items()]
        return {name: view for view in views for name in view.tensors}

    def left_out(self, files: Mapping[str, TensorFile]) -> str:
        """In words, what of the checkpoint is not exported."""
        counts = {part: sum(name.startswith(part) for name in files) for part in self.others}
        parts = [f"{part.rstrip('.')} ({count} tensors)" for part, count in counts.items() if count]
        return f"of {self.class_name} the text part alone, without {', '.join(parts) or 'any tensors of others'}"

    def _renamed(self, name: str) -> str:
        prefix = next((prefix for prefix in self.names if name.startswith(prefix)), "")
        return self.names.get(prefix, "") + name.removeprefix(prefix)


# Both ways in which transformers has saved it.
GEMMA3 = TextPart(
    class_name="Gemma3ForConditionalGeneration",
    model_type="gemma3_text",
    defaults={
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "max_position_embeddings": 131072,
    },
    other_keys=(
        "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "image_token_id", "image_token_index",
        "mm_tokens_per_image", "vision_config",
    ),
    unapplied=("final_logit_softcapping",),
    names={
        "language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model.",
    },
    others=(
        "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
    ),
)  # fmt: skip
PARTS: Mapping[str, TextPart] = {"gemma3": GEMMA3}


def find_text_part(fields: Fields, model_type: str) -> TextPart | None:
    """Where the text model lies in a multimodal checkpoint; None for one of text alone.

    Raises :class:`UnsupportedError` for a multimodal model that isn't known.
    """
    if model_type in PARTS:
        return PARTS[model_type]
    key = next((key for key in MULTIMODAL_KEYS if key in fields), None)
    if key is None:
        return None
    text = fields.value(TEXT)
    inner = text.get("model_type") if isinstance(text, dict) else None
    hint = f", whose model_type is {inner[:40]!r}" if isinstance(inner, str) else ""
    raise UnsupportedError(
        f"{fields.source}: model_type {model_type[:60]!r} is not supported: {key!r} says that it is multimodal. "
        f"Taken as such: {', '.join(PARTS)}. Save its text model{hint} as a checkpoint of its own, with names that "
        "begin with 'model.'"
    )
