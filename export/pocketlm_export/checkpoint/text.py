"""The checkpoint's tokenizer and chat template, opened and tried before any work is done."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from pocketlm.errors import CheckpointError
from pocketlm.template import ChatTemplate
from pocketlm.tokenizer import Tokenizer
from pocketlm_export.checkpoint.checkpoint import Checkpoint
from pocketlm_export.checkpoint.generation import Generation
from pocketlm_export.checkpoint.phi3small_tokenizer import write_tokenizer

__all__ = ["TextFiles", "open_text", "with_tokenizer", "with_tokenizer_stop"]


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What turns text into token ids; ``template`` is None for a base model."""

    tokenizer: Tokenizer
    template: ChatTemplate | None


def with_tokenizer(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """``checkpoint`` with a tokenizer.json: as it is, or with one made in the empty ``folder`` from its vocabulary."""
    if "tokenizer.json" in checkpoint.tokenizer_files:
        return checkpoint
    write_tokenizer(checkpoint.folder, folder, checkpoint.config.vocabulary_size)
    return replace(checkpoint, tokenizer_files={path.name: path for path in sorted(folder.glob("*")) if path.is_file()})


def open_text(checkpoint: Checkpoint, accept: Collection[str] = ()) -> TextFiles:
    """Open both. ``accept`` names tokens that no text of the user holds.

    Raises :class:`pocketlm.InputError` for a broken tokenizer, a token whose id the embedding has no row for, and a
    template that can't render one message of a user.
    """
    folder = checkpoint.tokenizer_folder
    tokenizer = Tokenizer.open(folder)
    rows = checkpoint.config.vocabulary_size
    refused = [token for token in tokenizer.tokens_from(rows) if token not in accept]
    if refused:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: the id of token {refused[0]!r} is beyond the {rows} rows of the "
            f"embedding ({len(refused)} such tokens). If no text holds it: --accept {refused[0]!r}"
        )
    template = ChatTemplate.open(folder)
    if template is not None:
        template.render([{"role": "user", "content": "Hello"}])
    return TextFiles(tokenizer, template)


def with_tokenizer_stop(generation: Generation, tokenizer: Tokenizer) -> Generation:
    """``generation`` with the tokenizer's end-of-sequence token among the stop ids.

    A fine-tune that adds a turn token often names it there only.
    """
    token = tokenizer.special_tokens.get("eos_token")
    token_id = tokenizer.token_id(token) if token is not None else None
    if token_id is None:
        return generation
    return replace(generation, stop_ids=tuple(sorted({*generation.stop_ids, token_id})))
