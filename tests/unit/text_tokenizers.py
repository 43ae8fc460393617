"""Two small tokenizers of the kinds that models have, made with the tokenizers library."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from pocketlm.tokenizer import Tokenizer

TEXT = ["def add(a, b):\n    return a + b\n", "the quick brown fox", "größer 日本語 한국어 🙂 नमस्ते", "  two  spaces "]
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]


@cache
def byte_level() -> Backend:
    """Byte-level BPE, as Llama 3's and Qwen's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


@cache
def byte_fallback() -> Backend:
    """BPE over characters with byte fallback and a leading space, as Llama 2's, Gemma's and Phi-3's."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    characters = [*sorted(set("".join(TEXT)) - set("🙂한日 ")), "▁"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("a", "d"), ("ad", "d"), ("▁", "add")]
    pieces += characters + [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ["<unk>", *SPECIAL]])
    return backend


def open_tokenizer(folder: Path, backend: Backend, **configuration: object) -> Tokenizer:
    """Write a bundle's tokenizer folder and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration), encoding="utf-8")
    return Tokenizer.open(folder)
