"""The golden vectors of a written bundle, replayed on what the bundle holds."""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

import pocketlm
from tests.small_checkpoint import write_small_checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> pocketlm.Bundle:
    root = tmp_path_factory.mktemp("golden")
    return pocketlm.export(
        write_small_checkpoint(root / "source"), root / "bundle", targets=("onnx",), store=root / "store", verify=False
    )


def records(bundle: pocketlm.Bundle, name: str) -> list[dict]:
    return [
        json.loads(line) for line in Path(bundle.folder, "golden", name).read_text(encoding="utf-8").split("\n")[:-1]
    ]


def test_at_least_200_different_texts(bundle):
    texts = [record["text"] for record in records(bundle, "tokenizer.jsonl")]
    assert len(set(texts)) == len(texts) >= 200


def test_the_tokenizer_replays(bundle):
    for record in records(bundle, "tokenizer.jsonl"):
        assert bundle.tokenizer.encode(record["text"], add_special_tokens=False) == record["ids"]
        assert bundle.tokenizer.encode(record["text"], add_special_tokens=True) == record["ids_with_special"]
        assert bundle.tokenizer.decode(record["ids"]) == record["decoded"]


def test_the_texts_equal_transformers(bundle):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(Path(bundle.folder) / "tokenizer")
    for record in records(bundle, "tokenizer.jsonl"):
        assert theirs.encode(record["text"], add_special_tokens=False) == record["ids"], record["text"]


def test_the_template_replays_and_content_stays_content(bundle):
    replayed = records(bundle, "chat.jsonl")
    assert len(replayed) >= 20
    for record in replayed:
        arguments = dict(record["arguments"])
        prompted = arguments.pop("add_generation_prompt", True)
        text = bundle.chat_template.render(
            record["messages"],
            arguments=arguments,
            add_generation_prompt=prompted,
            now=datetime.fromisoformat(record["now"]),
        )
        assert text == record["text"]
        for message in record["messages"]:
            assert message["content"] in record["text"]


def test_what_the_template_refuses_is_recorded(tmp_path):
    source = write_small_checkpoint(tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.role }}:{{ m.content }}\n{% endfor %}"
    )
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    bundle = pocketlm.export(source, tmp_path / "bundle", targets=("onnx",), store=tmp_path / "store", verify=False)
    for record in records(bundle, "chat.jsonl"):
        refused = any(message["role"] == "system" for message in record["messages"])
        assert record.get("error", False) is refused
        assert ("text" in record) is not refused


def test_the_replay_is_what_a_real_runtime_says_where_the_margin_is_wide(bundle):
    replayed = records(bundle, "replay.jsonl")
    assert len(replayed) >= 2
    checked = 0
    with bundle.session("onnx", threads=1) as session:
        for record in replayed:
            session.rewind(0)
            logits = session.extend(record["prompt_ids"])[0]
            for token, margin in zip(record["tokens"], record["margins"], strict=True):
                if margin > 0.25 * record["deviation"]:
                    assert int(np.argmax(logits)) == token
                    checked += 1
                logits = session.extend([token])[0]
    assert checked >= 20


def test_a_prompt_that_does_not_fit_is_left_out(tmp_path):
    source = write_small_checkpoint(tmp_path / "source", max_position_embeddings=40)
    bundle = pocketlm.export(source, tmp_path / "bundle", targets=("onnx",), store=tmp_path / "store", verify=False)
    kept = records(bundle, "replay.jsonl")
    assert len(kept) > 0
    assert all(len(record["prompt_ids"]) + len(record["tokens"]) <= 40 for record in kept)
