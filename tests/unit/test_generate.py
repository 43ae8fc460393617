import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

import pocketlm
from pocketlm.errors import ContextLengthError, InputError, PocketLMError, TemplateError, UnsupportedError
from pocketlm.session import Session
from pocketlm.template import ChatTemplate
from pocketlm.tokenizer import Tokenizer
from tests.unit.text_tokenizers import byte_fallback, byte_level
from tests.unit.tiny_session import TinySession

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not thinking %}-{% endif %}{% endif %}"
)


class ScriptedSession(TinySession):
    """Says the given tokens, whatever the prompt was, then starts again."""

    def __init__(self, vocabulary_size: int, script: list[int], prompt: int, **sizes: int) -> None:
        super().__init__(vocabulary_size, **sizes)
        self._script, self._prompt = script, prompt

    def _run(self, tokens: np.ndarray, position: int, rows: int) -> np.ndarray:
        super()._run(tokens, position, rows)
        logits = np.zeros((rows, self.vocabulary_size), np.float32)
        for row in range(rows):
            spoken = position + len(tokens) - rows + row + 1 - self._prompt
            logits[row, self._script[spoken % len(self._script)]] = 9
        return logits


@dataclass
class TinyBundle:
    """What generation needs of a bundle, over a session in numpy."""

    tokenizer: Tokenizer = field(default_factory=lambda: Tokenizer(byte_level(), {"bos_token": "<s>"}))
    chat_template: ChatTemplate | None = field(
        default_factory=lambda: ChatTemplate({"default": TEMPLATE}, {"bos_token": "<s>"}, source="chat_template.jinja")
    )
    stop_ids: frozenset[int] = frozenset()
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    context_length: int = 64
    opened: list[Session] = field(default_factory=list)

    def session(self) -> Session:
        return self.own(TinySession(self.tokenizer.vocabulary_size, context_length=self.context_length))

    def own(self, session: Session) -> Session:
        session.bundle = self
        self.opened.append(session)
        return session

    def saying(self, text: str, prompt: str, **sizes: int) -> Session:
        """A session that answers ``prompt`` with ``text``."""
        script = self.tokenizer.encode(text, add_special_tokens=False)
        length = len(self.tokenizer.encode(prompt, add_special_tokens=True))
        return self.own(ScriptedSession(self.tokenizer.vocabulary_size, script, length, **sizes))


def joined(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def greedy_by_hand(bundle: TinyBundle, prompt: list[int], count: int) -> list[int]:
    """The same model run over the whole text for every token, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        logits = TinySession(bundle.tokenizer.vocabulary_size, longest_call=64).extend(tokens)
        tokens.append(int(np.argmax(logits[0])))
    return tokens[len(prompt) :]


def test_greedy_tokens_and_their_text() -> None:
    bundle = TinyBundle()
    prompt = bundle.tokenizer.encode("def add(", add_special_tokens=True)
    pieces = list(pocketlm.generate(bundle, "def add(", max_new_tokens=12))
    tokens = [piece.token for piece in pieces]
    assert tokens == greedy_by_hand(bundle, prompt, 12)
    assert "def add(" + joined(pieces) == bundle.tokenizer.decode(prompt + tokens)
    assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]
    with pytest.raises(PocketLMError, match="closed"):
        bundle.opened[0].extend([1])


@given(
    prompts=st.lists(st.lists(st.integers(5, 11), min_size=1, max_size=20), min_size=1, max_size=5),
    stopped=st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_greedy_tokens_do_not_depend_on_what_the_session_held(prompts: list[list[int]], stopped: int) -> None:
    bundle = TinyBundle()
    session = bundle.session()
    for prompt in prompts:
        before = list(session.tokens)
        session.calls.clear()
        tokens = [piece.token for piece in pocketlm.generate(session, prompt, max_new_tokens=stopped)]
        assert tokens == greedy_by_hand(bundle, prompt, stopped)
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), min(len(before), len(prompt))
        )
        assert session.calls[0][0] == min(shared, len(prompt) - 1)
        assert session.tokens == prompt + tokens[:-1]


def test_a_conversation_runs_only_what_is_new() -> None:
    bundle = TinyBundle(context_length=400)
    session = bundle.session()
    messages = [{"role": "user", "content": "the quick brown fox"}]
    joined(pocketlm.chat(session, messages, max_new_tokens=4))
    held = session.position
    session.calls.clear()
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
    joined(pocketlm.chat(session, messages, max_new_tokens=1))
    assert session.calls[0][0] >= held - 5  # the answer's tokens and the prompt's own end are new
    assert session.calls[0][0] > 0


def test_a_stop_id_ends_without_text() -> None:
    bundle = TinyBundle()
    bundle.stop_ids = frozenset({bundle.tokenizer.token_id("</s>")})
    pieces = list(pocketlm.generate(bundle.saying("größer 🙂</s>more", "a"), "a"))
    assert joined(pieces) == "größer 🙂"
    assert (pieces[-1].token, pieces[-1].text, pieces[-1].finish_reason) == (*bundle.stop_ids, "", "stop")
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_a_stop_id_may_be_an_ordinary_token() -> None:
    bundle = TinyBundle()
    bundle.stop_ids = frozenset(bundle.tokenizer.encode("X", add_special_tokens=False))
    assert joined(pocketlm.generate(bundle.saying("foxX", "a"), "a")) == "fox"


def test_the_beginning_of_the_text_is_written_once() -> None:
    backend = Backend.from_str(byte_level().to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    bundle = TinyBundle(tokenizer=Tokenizer(backend, {"bos_token": "<s>"}))
    session = bundle.session()
    for pieces, expected in (
        (pocketlm.generate(session, "Hi", max_new_tokens=1), "<s>Hi"),
        (
            pocketlm.chat(session, [{"role": "user", "content": "Hi"}], max_new_tokens=1),
            "<s><|user|>user: Hi<|assistant|>-",
        ),
    ):
        joined(pieces)
        assert bundle.tokenizer.decode(session.tokens, skip_special_tokens=False) == expected


def test_special_tokens_that_do_not_stop_have_no_text() -> None:
    pieces = list(pocketlm.generate(TinyBundle().saying("x<|user|>y", "a"), "a", max_new_tokens=3))
    assert [piece.text for piece in pieces] == ["x", "", "y"]


@pytest.mark.parametrize("stop", ["fox\n", ["never", "fox\n"]])
def test_a_stop_string_over_tokens(stop: str | list[str]) -> None:
    pieces = list(pocketlm.generate(TinyBundle().saying("brown fox fox\nmore", "a"), "a", stop=stop))
    assert joined(pieces) == "brown fox "
    assert pieces[-1].finish_reason == "stop"


def test_held_back_text_comes_with_the_last_piece() -> None:
    session = TinyBundle().saying("brown fox", "a")
    length = len(session.bundle.tokenizer.encode("brown fo", add_special_tokens=False))
    pieces = list(pocketlm.generate(session, "a", stop="fox\n", max_new_tokens=length))
    assert joined(pieces).startswith("brown fo")
    assert pieces[-1].finish_reason == "length"


def test_a_half_character_at_the_end_is_shown_as_such() -> None:
    pieces = list(pocketlm.generate(TinyBundle().saying("🦊", "a"), "a", max_new_tokens=2))
    assert [piece.text for piece in pieces] == ["", "\ufffd"]


def test_a_completion_keeps_the_space_that_an_answer_drops() -> None:
    bundle = TinyBundle(tokenizer=Tokenizer(byte_fallback(), {}))
    the = bundle.tokenizer.token_id("▁the")
    completion = bundle.own(ScriptedSession(bundle.tokenizer.vocabulary_size, [the], 0))
    assert joined(pocketlm.generate(completion, "add", max_new_tokens=2)) == " the the"
    answer = bundle.own(ScriptedSession(bundle.tokenizer.vocabulary_size, [the], 0))
    assert joined(pocketlm.chat(answer, [{"role": "user", "content": "a"}], max_new_tokens=2)) == "the the"


def test_a_full_context_ends_the_answer() -> None:
    bundle = TinyBundle(context_length=10)
    pieces = list(pocketlm.generate(bundle, [5] * 7))
    assert len(pieces) == 4
    assert pieces[-1].finish_reason == "context"
    assert [piece.finish_reason for piece in pocketlm.generate(bundle, [5] * 10, max_new_tokens=1)] == ["length"]


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    bundle = TinyBundle(context_length=10)
    session = bundle.session()
    session.extend([1, 2])
    with pytest.raises(ContextLengthError, match="11 tokens, the context holds 10"):
        pocketlm.generate(session, [5] * 11)
    with pytest.raises(ContextLengthError, match="--context"):
        next(pocketlm.generate(bundle, [5] * 11))
    assert session.tokens == [1, 2]


def test_closing_leaves_a_session_that_goes_on() -> None:
    bundle = TinyBundle()
    session = bundle.session()
    pieces = pocketlm.generate(session, [5, 6, 7])
    first = [next(pieces).token, next(pieces).token]
    pieces.close()
    assert session.tokens == [5, 6, 7, first[0]]
    again = [piece.token for piece in pocketlm.generate(session, [5, 6, 7], max_new_tokens=5)]
    assert again == greedy_by_hand(bundle, [5, 6, 7], 5)


def test_closing_closes_the_session_of_a_bundle() -> None:
    bundle = TinyBundle()
    pieces = pocketlm.generate(bundle, [5, 6, 7])
    next(pieces)
    pieces.close()
    with pytest.raises(PocketLMError, match="closed"):
        bundle.opened[0].extend([1])


def test_two_generations_on_one_session_are_told() -> None:
    session = TinyBundle().session()
    first = pocketlm.generate(session, [5, 6, 7])
    next(first)
    next(pocketlm.generate(session, [8, 9]))
    with pytest.raises(PocketLMError, match="another call"):
        next(first)


def test_a_seed_repeats_and_defaults_come_from_the_bundle() -> None:
    bundle = TinyBundle(default_sampling={"do_sample": True, "temperature": 5.0})

    def drawn(**options) -> list[int]:
        return [piece.token for piece in pocketlm.generate(bundle, [5, 6, 7], max_new_tokens=12, **options)]

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(temperature=0.0) == greedy_by_hand(bundle, [5, 6, 7], 12)
    assert drawn(seed=1, top_k=1) == drawn(temperature=0.0)


def test_chat_renders_the_template_once_with_its_arguments() -> None:
    bundle = TinyBundle()
    messages = [{"role": "user", "content": "Hi"}]
    session = bundle.session()
    joined(pocketlm.chat(session, messages, max_new_tokens=1))
    assert bundle.tokenizer.decode(session.tokens, skip_special_tokens=False) == "<s><|user|>user: Hi<|assistant|>-"
    joined(pocketlm.chat(session, messages, max_new_tokens=1, thinking=True))
    assert bundle.tokenizer.decode(session.tokens, skip_special_tokens=False) == "<s><|user|>user: Hi<|assistant|>"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        ({"role": "user", "content": "Hi"}, "non-empty list"),
        (["Hi"], r"messages\[0\]"),
        ([{"content": "Hi"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": "Hi"}, {"role": "user", "content": 3}], r"messages\[1\].*content"),
        ([{"role": "user", "content": ["Hi"]}], "part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must have a text"),
    ],
)
def test_malformed_messages_are_refused(messages: object, named: str) -> None:
    with pytest.raises(InputError, match=named):
        pocketlm.chat(TinyBundle(), messages)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ""}, "stop string"),
        ({"stop": ["a", ""]}, "stop string"),
        ({"prompt": []}, "no tokens"),
        ({"prompt": [10**6]}, "outside the model's vocabulary"),
    ],
)
def test_bad_requests_are_refused(options: dict, named: str) -> None:
    session = TinyBundle().session()
    prompt = options.pop("prompt", [5])
    with pytest.raises(InputError, match=named):
        list(pocketlm.generate(session, prompt, **options))


def test_what_a_model_does_not_have() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UnsupportedError, match="no chat template"):
        pocketlm.chat(TinyBundle(chat_template=None), messages)
    refusing = ChatTemplate({"default": "{{ raise_exception('no') }}"}, {}, source="chat_template.jinja")
    with pytest.raises(TemplateError, match="refuses: no"):
        pocketlm.chat(TinyBundle(chat_template=refusing), messages)
    with pytest.raises(InputError, match="no bundle"):
        pocketlm.generate(TinySession(10), "Hi")
    with pytest.raises(InputError, match="not str"):
        pocketlm.generate("model.pocketlm", "Hi")


def test_every_language_is_generated_whole(data: Path) -> None:
    rows = [json.loads(line) for line in (data / "data/text/udhr.jsonl").read_text(encoding="utf-8").splitlines()]
    bundle = TinyBundle()
    for row in rows[::8]:
        text = row["text"][:40]
        count = len(bundle.tokenizer.encode(text, add_special_tokens=False))
        session = bundle.saying(text, "a", context_length=count + 2)
        pieces = list(pocketlm.generate(session, "a", max_new_tokens=count))
        assert joined(pieces) == text
        assert not any("\ufffd" in piece.text for piece in pieces)


def test_nothing_heavy_is_imported() -> None:
    code = "import pocketlm.chat, sys; print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
