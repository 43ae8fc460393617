"""A tiktoken vocabulary as a tokenizer.json: tiktoken itself says what the ids are."""

import base64
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import InputError
from pocketlm.template import ChatTemplate
from pocketlm.tokenizer import Tokenizer
from pocketlm_export.checkpoint.phi3small_tokenizer import PATTERN, SPECIAL_TOKENS, VOCABULARY, write_tokenizer
from pocketlm_export.checkpoint.tiktoken import make_tokenizer, read_ranks

ROWS = 100352
BYTES = [bytes([byte]) for byte in range(256)]
ORIGIN = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
HARD = [
    "the", "I'm", "WE'LL", "'S", "don't", "naïve", "façade", "日本語", "한국어", "привет", "مرحبا", "ไทย", "🙂",
    "👩‍👩‍👧", "\u0301", "\u200d", "\u00a0", "\u3000", "1234567", "3.14159", "==", "->", "//", "<|", "|>", "```", "\t",
    "\r\n", "\n\n\n", "   ", "\u2028", "\u0085", "\x00", "\x1c", "ſ", "K", "'ſ", "İ", "ß", *SPECIAL_TOKENS,
]  # fmt: skip


def vocabulary_file(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def source(data: Path) -> Path:
    return data / "data" / "tokenizers" / "phi-3-small"


@pytest.fixture(scope="module")
def phi3small(source: Path, tmp_path_factory) -> Tokenizer:
    """What an export makes of the vocabulary alone."""
    checkpoint, folder = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("tokenizer")
    (checkpoint / VOCABULARY).symlink_to(source / VOCABULARY)
    write_tokenizer(checkpoint, folder, ROWS)
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def oracle(source: Path, tmp_path_factory) -> tiktoken.Encoding:
    """tiktoken's own cl100k_base, which it holds to its hash, with the special tokens of the released code."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / hashlib.sha1(ORIGIN.encode()).hexdigest()).symlink_to(source / VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        base = tiktoken.get_encoding("cl100k_base")
    return tiktoken.Encoding(
        "phi3small", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens=SPECIAL_TOKENS
    )


def powers(ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Each text of which several repetitions are tokens, with the longest: there two neighbours can be joined to the
    same token as the next two, and tiktoken takes the first."""
    longest: dict[str, int] = {}
    for token in ranks:
        for width in range(1, len(token) // 2 + 1):
            root, count = token[:width], len(token) // width
            if root * count == token:
                text = root.decode("utf-8", "replace")
                longest[text] = max(longest.get(text, 0), count)
                break
    return longest


def texts(ranks: Mapping[bytes, int], data: Path) -> Iterator[str]:
    """Every code point below U+3000 and every 23rd above, in several surroundings; repetitions; mixtures; languages."""
    for code in (*range(0x3000), *range(0x3000, 0x110000, 23)):
        if not 0xD800 <= code < 0xE000:
            letter = chr(code)
            yield f"a{letter}b {letter}{letter} 1{letter}2\n{letter} '{letter}{letter.upper()}"
    for root, longest in powers(ranks).items():
        for count in range(1, 2 * longest + 3):
            yield f"{root * count}|x{root * count} y {root * count}"
    generator = random.Random(0)
    for _ in range(2000):
        words = generator.choices(HARD, k=generator.randint(1, 24))
        yield "".join(word + generator.choice(("", "", " ", "  ")) for word in words)
        yield bytes(generator.randrange(256) for _ in range(40)).decode("utf-8", "replace")
    yield from map(chr, range(0x80))
    for name in ("tokenizers/golden_encodings.jsonl", "text/udhr.jsonl"):
        for line in (data / "data" / name).read_text(encoding="utf-8").splitlines():
            yield from (value for value in json.loads(line).values() if isinstance(value, str))


def test_every_text_has_the_ids_that_tiktoken_gives(phi3small, oracle, source, data):
    compared, differing = 0, []
    for text in texts(read_ranks(source / VOCABULARY), data):
        ids = phi3small.encode(text, add_special_tokens=True)
        compared += 1
        if (
            ids != oracle.encode(text, allowed_special="all")
            or phi3small.decode(ids, skip_special_tokens=False) != text
        ):
            differing.append(text)
    assert differing == []
    assert compared > 65_000


def test_the_special_tokens_fill_the_vocabulary(phi3small):
    assert phi3small.vocabulary_size == 100352
    assert phi3small.special_ids == frozenset(range(100256, 100352))
    named = {"<|endoftext|>": 100257, "<|user|>": 100262, "<|assistant|>": 100263, "<|end|>": 100266}
    assert {token: phi3small.token_id(token) for token in named} == named
    assert phi3small.special_tokens == dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")


def test_the_special_tokens_are_those_of_a_converted_file(phi3small, source):
    settings = json.loads((source / "tokenizer_config.json").read_bytes())
    stated = {int(token_id): token["content"] for token_id, token in settings["added_tokens_decoder"].items()}
    # The one that ends a turn is missing there.
    assert {token_id: phi3small.token(token_id) for token_id in stated} == stated
    assert phi3small.special_ids - stated.keys() <= {100266, 100276}


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / VOCABULARY).symlink_to(source / VOCABULARY)
    return folder


def written(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(checkpoint, folder, ROWS)
    return folder


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_the_released_template_serves_where_there_is_none(checkpoint, tmp_path):
    template = ChatTemplate.open(written(checkpoint, tmp_path))
    turns = "<|endoftext|><|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n"
    assert template.render(MESSAGES) == turns + "<|assistant|>\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == turns + "<|endoftext|>"


def test_what_the_checkpoint_says_wins(checkpoint, tmp_path):
    own = {"eos_token": "<|end|>", "chat_template": "{{ eos_token }}", "auto_map": {"AutoTokenizer": ["x.X", None]}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(own | {"tokenizer_class": "Phi3SmallTokenizer"}))
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    folder = written(checkpoint, tmp_path)
    assert ChatTemplate.open(folder).templates == {"tool_use": "tools"}
    (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
    assert ChatTemplate.open(folder).render(MESSAGES) == "<|end|>"
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert "auto_map" not in settings
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_template_file_wins(checkpoint, tmp_path):
    (checkpoint / "chat_template.jinja").write_text("mine")
    assert ChatTemplate.open(written(checkpoint, tmp_path)).render(MESSAGES) == "mine"


def test_a_vocabulary_that_ends_early_is_refused(checkpoint, tmp_path):
    tokens = list(read_ranks(checkpoint / VOCABULARY))
    (checkpoint / VOCABULARY).unlink()
    vocabulary_file(checkpoint / VOCABULARY, tokens[:-1])
    with pytest.raises(InputError, match=r"cl100k_base\.tiktoken: 100255 tokens, but .* 100256"):
        written(checkpoint, tmp_path)


@st.composite
def vocabularies(draw) -> list[bytes]:
    """Bytes, then joins of two tokens each, over an alphabet so small that many ways lead to the same token."""
    parts = [b"a", b"b", b" "]
    joined: list[bytes] = []
    for _ in range(draw(st.integers(0, 24))):
        token = draw(st.sampled_from(parts)) + draw(st.sampled_from(parts))
        if token not in parts and len(token) <= 40:
            parts.append(token)
            joined.append(token)
    return BYTES + joined


@settings(max_examples=400, deadline=None)
@given(tokens=vocabularies(), text=st.text("ab \n'sé1", max_size=60))
def test_any_vocabulary_of_joined_tokens_gives_the_ids_that_tiktoken_gives(tokens, text):
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {"<|end|>": len(ranks)}
    expected = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = make_tokenizer(ranks, PATTERN, special)
    ids = tokenizer.encode(text + "<|end|>" + text, add_special_tokens=False).ids
    assert ids == expected.encode(text + "<|end|>" + text, allowed_special="all")
    assert tokenizer.decode(ids, skip_special_tokens=False) == text + "<|end|>" + text


GOOD = b"".join(b"%s %d\n" % (base64.b64encode(byte), rank) for rank, byte in enumerate(BYTES))
BAD = {
    "not-base64": (b"!!! 256\n", r":257: not a token in base64 and its rank 256: '!!! 256'"),
    "letters-beyond-ascii": ("é 256\n".encode(), ":257: not a token"),
    "padding": (b"YWI 256\n", ":257: not a token"),
    "no-rank": (b"YWI=\n", ":257: not a token"),
    "rank-is-a-word": (b"YWI= x\n", ":257: not a token"),
    "rank-with-a-sign": (b"YWI= +256\n", ":257: not a token"),
    "rank-skipped": (b"YWI= 257\n", ":257: not a token .* rank 256"),
    "rank-again": (b"YWI= 255\n", ":257: not a token .* rank 256"),
    "three-parts": (b"YWI= 256 1\n", ":257: not a token"),
    "empty-line": (b"\nYWI= 256\n", ":257: not a token"),
    "empty-token": (b" 256\n", ":257: not a token"),
    "token-again": (b"YWI= 256\nYWI= 257\n", ":258: the token of rank 256 again"),
    "byte-again": (b"YQ== 256\n", ":257: the token of rank 97 again"),
    "long-token": (base64.b64encode(b"a" * 1025) + b" 256\n", ":257: not a token"),
    "zeros": (b"\0" * 5000, ":257: not a token"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_with_its_number(name, tmp_path):
    content, says = BAD[name]
    path = tmp_path / VOCABULARY
    path.write_bytes(GOOD + content)
    with pytest.raises(InputError, match=says) as caught:
        read_ranks(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200 + len(str(path))


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    path = tmp_path / VOCABULARY
    for make, says in (
        (lambda: None, "can't be read"),
        (path.touch, r"no token for byte 0 \(256 such bytes\)"),
        (lambda: path.write_bytes(GOOD[:-20]), "no token for byte 25[0-9]|not a token"),
        (lambda: os.truncate(path, 65 << 20), "too many for a vocabulary"),
        (lambda: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda: (path.unlink(), path.mkdir()), "not a regular file"),
    ):
        make()
        with pytest.raises(InputError, match=says):
            read_ranks(path)
