"""The tokenizer.json of a vendor's folder says what the model's says, in words that the vendor's code reads right."""

import json
import shutil
import tempfile
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pocketlm_export.golden_texts import TEXTS
from pocketlm_export.vendor_tokenizers import write_tokenizer_files
from pocketlm_export.verify.golden_questions import Question
from pocketlm_export.verify.vendor_text import VENDORS, ask_vendor

GENAI, EXECUTORCH = VENDORS
LEAST_GENAI_CONFIG = {"model": {"type": "decoder", "context_length": 16, "vocab_size": 10, "decoder": {}}, "search": {}}

Write = Callable[[str, Tokenizer], tuple[Path, tuple[str, ...]]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(target, tokenizer)`` -> the vendor's folder, and the notes; the model's own is in ``source/``."""

    def make(target: str, tokenizer: Tokenizer) -> tuple[Path, tuple[str, ...]]:
        source, folder = tmp_path / "source", tmp_path / target
        source.mkdir()
        folder.mkdir()
        tokenizer.save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (folder / "genai_config.json").write_text(json.dumps(LEAST_GENAI_CONFIG))
        return folder, write_tokenizer_files(target, {path.name: path for path in source.iterdir()}, folder)

    return make


def trained(texts: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Byte-level BPE that merges what it can of ``texts``; ``pre_tokenizer`` replaces the one of the training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>"], initial_alphabet=alphabet, vocab_size=700, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(texts * 4, trainer)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@cache
def composing() -> Tokenizer:
    """A tokenizer with an NFC normalizer, as Qwen's."""
    tokenizer = trained(list(TEXTS))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def differing(vendor, folder: Path, tokenizer: Tokenizer) -> set[str]:
    """The golden texts that the vendor's code encodes otherwise than ``tokenizer``."""
    wanted = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS}
    told = ask_vendor(vendor, folder, [Question("encode", text, ids) for text, ids in wanted.items()])
    assert told.trouble is None
    return {text for (text, ids), answer in zip(wanted.items(), told.answers, strict=True) if answer != ids}


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_what_the_vendor_reads_right_is_copied_byte_by_byte(target, write):
    folder, notes = write(target, trained(["the quick brown fox"]))
    assert notes == ()
    assert (folder / "tokenizer.json").read_bytes() == (folder.parent / "source" / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer_config.json").exists() is (target == "onnx")


def test_executorch_keeps_accents(write):
    folder, notes = write("executorch", composing())
    assert len(notes) == 1
    wrong_before = differing(EXECUTORCH, folder.parent / "source", composing())
    wrong_after = differing(EXECUTORCH, folder, composing())
    assert len(wrong_before) >= 20
    assert "Zażółć gęślą jaźń." in wrong_before
    # What replacements can't do: Hangul in parts, marks in an unusual order.
    assert wrong_after == {"\u1112\u1161\u11ab \ud55c", "Z\u0351\u036b\u0343a\u0357\u0348l\u0359g\u0320o\u0321"}


def test_nfc_within_a_sequence_is_replaced_too(write):
    tokenizer = trained(["a b"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("~", "-")])
    folder, notes = write("executorch", tokenizer)
    assert len(notes) == 1
    rewritten = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert rewritten.normalizer.normalize_str("e\u0301~") == "\u00e9-"


@cache
def replacements() -> normalizers.Normalizer:
    """What stands in the place of NFC."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tokenizer.json")
        composing().save(str(source))
        rewritten = Path(folder, "executorch")
        rewritten.mkdir()
        write_tokenizer_files("executorch", {"tokenizer.json": source}, rewritten)
        return Tokenizer.from_file(str(rewritten / "tokenizer.json")).normalizer


LETTERS_WITH_MARKS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aeouAEOUşậǖ\u0958\u212b\u09c7\u1025\uf900"),
        st.characters(min_codepoint=0x300, max_codepoint=0x345),
        st.sampled_from("\u093c\u09be\u102e\u3099\u1161\u11a8"),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(LETTERS_WITH_MARKS)
def test_replacements_keep_composed_text_and_stay_canonically_equivalent(text):
    replaced = replacements().normalize_str(text)
    assert unicodedata.normalize("NFD", replaced) == unicodedata.normalize("NFD", text)
    composed = unicodedata.normalize("NFC", text)
    assert replacements().normalize_str(composed) == composed


def test_replacements_compose_every_letter_of_the_basic_plane():
    letters = [chr(code) for code in range(0x10000) if unicodedata.decomposition(chr(code))[:1] not in ("", "<")]
    decomposed = unicodedata.normalize("NFD", " ".join(letters))
    assert len(letters) > 1000
    assert replacements().normalize_str(decomposed) == unicodedata.normalize("NFC", decomposed)


@pytest.mark.parametrize("spelling", ["a\u0323\u0302", "a\u0302\u0323", "\u1ea1\u0302", "\u00e2\u0323"])
def test_two_marks_compose_in_either_order(spelling):
    assert replacements().normalize_str(spelling) == "\u1ead"


def with_carriage_return() -> Tokenizer:
    """BPE over characters whose merges hold a carriage return, as Phi-3's."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\r", ";", "▁\r", ";\r"]
    model = models.BPE(
        vocab={piece: place for place, piece in enumerate(pieces)},
        merges=[("▁", "\r"), (";", "\r")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_genai_merges_carriage_returns(write, tmp_path):
    folder, notes = write("onnx", with_carriage_return())
    assert notes == ()  # its merges are pairs
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as older files have them
    (folder / "tokenizer.json").write_text(json.dumps(content))
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (note,) = write_tokenizer_files("onnx", {"tokenizer.json": folder / "tokenizer.json"}, again)
    assert "carriage returns" in note
    corrected = differing(GENAI, folder, with_carriage_return()) - differing(GENAI, again, with_carriage_return())
    assert "\r\n" in corrected


def test_genai_splits_digits(write):
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = trained(["1234567890 ½ ½ 365 1024", *TEXTS], digits)
    folder, notes = write("onnx", tokenizer)
    assert len(notes) == 1
    rewritten = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert rewritten.encode(text).ids == tokenizer.encode(text).ids
    source = folder.parent / "source"
    shutil.copy(folder / "genai_config.json", source)
    assert len(differing(GENAI, source, tokenizer)) >= 10
    assert differing(GENAI, folder, tokenizer) == {"\0", "nul\0inside"}  # its interface ends a text there
