"""Phi-3 small's tokenizer, which is released as a tiktoken vocabulary and code: what the code says, and both made into
the files that other models are released with."""

import json
import shutil
from pathlib import Path

from pocketlm.errors import CheckpointError
from pocketlm.tokenizer import read_tokenizer_config
from pocketlm_export.checkpoint.tiktoken import make_tokenizer, read_ranks

__all__ = ["VOCABULARY", "write_tokenizer"]

VOCABULARY = "cl100k_base.tiktoken"
# cl100k_base's, without the possessive quantifiers of tiktoken's own spelling, which not every runtime's engine knows:
# what they save is time.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANKS = 100256
NAMED = {
    "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
    "<|system|>": 100261, "<|user|>": 100262, "<|assistant|>": 100263, "<|end|>": 100266, "<|endofprompt|>": 100276,
}  # fmt: skip
# The ids between them, in the order in which the released code counts them.
UNNAMED = (100264, 100265, 100256, *range(100267, 100276), *range(100277, 100352))
SPECIAL_TOKENS = NAMED | {f"<|dummy_id_{count}|>": token_id for count, token_id in enumerate(UNNAMED)}
# A dialogue without the prompt for an answer ends with the end of the text.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SETTINGS = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "pad")}


def write_tokenizer(source: Path, folder: Path, rows: int) -> None:
    """Write into ``folder`` tokenizer.json and tokenizer_config.json from the vocabulary of the checkpoint ``source``.

    ``rows`` is how many its embedding has. What the checkpoint's own tokenizer_config.json and templates say wins.
    Raises :class:`pocketlm.InputError` naming the file, and the line of the vocabulary.
    """
    path = source / VOCABULARY
    ranks = read_ranks(path)
    if len(ranks) != RANKS:
        raise CheckpointError(f"{path}: {len(ranks)} tokens, but Phi-3 small's special tokens follow {RANKS}")
    ids = len(ranks) + len(SPECIAL_TOKENS)
    if rows < ids:
        raise CheckpointError(f"{path}: {ids} ids, but the embedding has {rows} rows (vocab_size)")
    make_tokenizer(ranks, PATTERN, SPECIAL_TOKENS).save(str(folder / "tokenizer.json"), pretty=False)
    settings = SETTINGS | read_tokenizer_config(source)
    settings.pop("auto_map", None)  # the code that these files replace
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if not (source / "chat_template.jinja").exists():
        settings.setdefault("chat_template", TEMPLATE)
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")
