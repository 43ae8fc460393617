import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pocketlm.errors import BundleError, InputError
from pocketlm.tokenizer import Tokenizer
from tests.unit.text_tokenizers import byte_fallback, byte_level, open_tokenizer


def test_golden_encodings_of_phi_3(data: Path) -> None:
    tokenizer = Tokenizer.open(data / "data/tokenizers/phi-3-mini")
    rows = (data / "data/tokenizers/golden_encodings.jsonl").read_text(encoding="utf-8").splitlines()
    differing = [
        row["text"]
        for row in map(json.loads, rows)
        if tokenizer.encode(row["text"], add_special_tokens=False) != row["ids"]["phi-3"]
    ]
    assert len(rows) == 47
    assert differing == []


def test_special_tokens_in_both_spellings(tmp_path: Path) -> None:
    end = {"content": "</s>", "lstrip": False, "__type": "AddedToken"}
    tokenizer = open_tokenizer(tmp_path, byte_level(), bos_token="<s>", eos_token=end, pad_token=None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.special_ids == {
        tokenizer.token_id(token) for token in ("<s>", "</s>", "<|user|>", "<|assistant|>")
    }


def test_an_id_and_its_token(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, byte_level())
    assert tokenizer.token(tokenizer.token_id("<|user|>")) == "<|user|>"
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.token(tokenizer.vocabulary_size) is None
    assert tokenizer.token(tokenizer.vocabulary_size - 1) is not None


def test_decode_skips_special_tokens_only_on_request(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, byte_level())
    ids = tokenizer.encode("<|user|>größer 🙂</s>", add_special_tokens=False)
    assert tokenizer.decode(ids) == "größer 🙂"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>größer 🙂</s>"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level().to_str())
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=32)
    tokenizer = open_tokenizer(tmp_path, backend)
    text = "the quick brown fox"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True), skip_special_tokens=False) == text


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_added_special_tokens_are_those_of_transformers(tmp_path: Path, kind, added: bool) -> None:
    backend = Backend.from_str(kind().to_str())
    if added:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = open_tokenizer(
        tmp_path, backend, bos_token="<s>", add_bos_token=not added, tokenizer_class="PreTrainedTokenizerFast"
    )
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for special in (True, False):
        assert tokenizer.encode("the fox", add_special_tokens=special) == oracle.encode(
            "the fox", add_special_tokens=special
        )
    assert len(tokenizer.encode("", add_special_tokens=True)) == added


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for text, named in [("[", "not a valid JSON object"), ("[]", "list"), ('{"bos_token": 5}', "bos_token")]:
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(BundleError, match=rf"tokenizer_config\.json.*{named}"):
            Tokenizer.open(tmp_path)


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="character 2"):
        open_tokenizer(tmp_path, byte_level()).encode("ab\udc80", add_special_tokens=False)
