"""Granite 3: Llama with multipliers of the embedding, the residual, the attention scores and the logits."""

from dataclasses import replace

from pocketlm_export.architectures import llama
from pocketlm_export.architectures._configuration import DecoderConfig
from pocketlm_export.architectures._rope import LARGEST_NUMBER
from pocketlm_export.fields import Fields


def configure(fields: Fields) -> DecoderConfig:
    """An absent multiplier is one, also that of the scores, which no head size divides."""
    embedding, residual, attention, logits = (
        fields.number(key, 1.0, most=LARGEST_NUMBER)
        for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    )
    return replace(
        llama.configure(fields),
        embedding_scale=embedding, residual_scale=residual, attention_scale=attention, logit_scale=1 / logits,
    )  # fmt: skip
