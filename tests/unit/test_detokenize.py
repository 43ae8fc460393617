import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.detokenize import Detokenizer
from pocketlm.tokenizer import Tokenizer
from tests.unit.text_tokenizers import TEXT, byte_fallback, byte_level

KINDS = ("byte_level", "byte_fallback")


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer({"byte_level": byte_level, "byte_fallback": byte_fallback}[kind](), {})


def streamed(tokenizer: Tokenizer, ids: list[int], **options) -> tuple[list[str], str]:
    detokenizer = Detokenizer(tokenizer, **options)
    pieces = [detokenizer.push(token) for token in ids]
    return pieces, "".join(pieces) + detokenizer.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@given(draw=st.data())
@settings(deadline=None)
def test_any_tokens_give_the_text_of_decoding_them_at_once(kind: str, skip: bool, draw: st.DataObject) -> None:
    ids = draw.draw(st.lists(st.integers(0, tokenizer(kind).vocabulary_size + 2), max_size=24))
    pieces, text = streamed(tokenizer(kind), ids, skip_special_tokens=skip)
    assert text == tokenizer(kind).decode(ids, skip_special_tokens=skip)
    assert len(pieces) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from(sorted(set("".join(TEXT)))) | st.characters(codec="utf-8"), max_size=20))
@settings(deadline=None)
def test_no_piece_of_real_text_is_broken(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text, add_special_tokens=False)
    pieces, joined = streamed(tokenizer(kind), ids, skip_special_tokens=False)
    assert joined == tokenizer(kind).decode(ids, skip_special_tokens=False)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("kind", KINDS)
@given(draw=st.data())
@settings(deadline=None)
def test_text_after_a_prompt_continues_its_text(kind: str, draw: st.DataObject) -> None:
    ids = tokenizer(kind).encode(draw.draw(st.text(max_size=12)), add_special_tokens=False)
    following = draw.draw(st.lists(st.integers(0, tokenizer(kind).vocabulary_size - 1), max_size=8))
    if following and following[0] in tokenizer(kind).byte_ids:
        following = []  # may change the prompt's own last characters
    whole = tokenizer(kind).decode(ids + following)
    before = tokenizer(kind).decode(ids)
    if whole.startswith(before):
        assert before + streamed(tokenizer(kind), following, context=ids)[1] == whole


def test_a_leading_space_stays_only_after_a_prompt() -> None:
    the = tokenizer("byte_fallback").token_id("▁the")
    assert streamed(tokenizer("byte_fallback"), [the])[1] == "the"
    assert streamed(tokenizer("byte_fallback"), [the], context=[the])[1] == " the"


def test_a_character_comes_with_its_last_byte() -> None:
    ids = tokenizer("byte_level").encode("é語x", add_special_tokens=False)
    pieces, _ = streamed(tokenizer("byte_level"), ids)
    assert [piece for piece in pieces if piece] == ["é", "語", "x"]
    assert len(pieces) > 3


def test_bytes_that_never_make_a_character_are_not_held_for_ever() -> None:
    lone = tokenizer("byte_level").encode("🦊", add_special_tokens=False)[-1]
    pieces, _ = streamed(tokenizer("byte_level"), [lone] * 50)
    assert "".join(pieces) == "\ufffd" * 49


def test_every_language_streams_whole(data: Path) -> None:
    phi = Tokenizer.open(data / "data/tokenizers/phi-3-mini")
    rows = [json.loads(line) for line in (data / "data/text/udhr.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        text = row["text"][:200]
        pieces, joined = streamed(phi, phi.encode(text, add_special_tokens=False))
        assert joined == text
        assert not any("\ufffd" in piece for piece in pieces)
    assert len(rows) == 86
