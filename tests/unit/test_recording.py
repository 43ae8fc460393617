"""Recorded sessions: what a generation leaves, and which bundles it belongs to."""

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import pocketlm
from pocketlm.errors import InputError, PocketLMError
from pocketlm.generate import Observer
from pocketlm.logit_summary import summarize
from pocketlm.replaying.recorder import TOP, Recorder
from pocketlm.replaying.recording import read_session
from pocketlm.sampling import Sampling
from tests.small_checkpoint import write_small_checkpoint

SCHEMA = Path(__file__).parents[2] / "runtime_bindings" / "schema" / "session.schema.json"
PROMPT = "def f(a):"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    write_small_checkpoint(folder / "source")
    return folder


@pytest.fixture(scope="module")
def bundle(root) -> pocketlm.Bundle:
    return pocketlm.export(
        root / "source", root / "bundle", targets=("onnx",), store=root / "store", verify=False, context_length=48
    )


def generate(bundle, observer: Observer | None = None, **options) -> list[pocketlm.Piece]:
    with bundle.session("onnx", threads=1) as session:
        return list(pocketlm.generate(session, PROMPT, observer=observer, **options))


def test_every_step_is_what_the_model_gave(bundle, tmp_path):
    recorder = Recorder(bundle, "onnx")
    options = {"max_new_tokens": 20, "temperature": 1.5, "top_p": 0.9, "seed": 7}
    pieces = generate(bundle, recorder, **options)
    recorder.save(tmp_path / "session.jsonl")
    session = read_session(tmp_path / "session.jsonl", bundle)
    assert session.head.manifest_sha256 == bundle.manifest_sha256
    assert session.head.runtime.name == "onnx"
    (sequence,) = session.sequences
    line = sequence.line
    assert line.prompt == PROMPT
    assert line.prompt_ids == bundle.tokenizer.encode(PROMPT, add_special_tokens=True)
    assert line.tokens == [piece.token for piece in pieces]
    assert line.finish_reason == pieces[-1].finish_reason
    sampling = Sampling.resolve(bundle.default_sampling, temperature=1.5, top_p=0.9, seed=7)
    assert Sampling(**line.sampling.model_dump()) == sampling
    with bundle.session("onnx", threads=1) as runtime:
        fed = line.prompt_ids
        for token, step in zip(line.tokens, sequence.steps, strict=True):
            seen = summarize(runtime.extend(fed)[0], TOP)
            assert (tuple(zip(step.ids, step.logits, strict=True)), step.log_sum, step.deviation) == (
                seen.top, seen.log_sum, seen.deviation,
            )  # fmt: skip
            fed = [token]
    assert generate(bundle, **options) == pieces, "who looks changes nothing"


def test_every_line_is_valid_by_the_committed_schema(bundle, tmp_path):
    recorder = Recorder(bundle, "onnx")
    generate(bundle, recorder, max_new_tokens=3)
    recorder.save(tmp_path / "session.jsonl")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (tmp_path / "session.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        jsonschema.validate(line, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**line, "more": 1}, schema)


def test_a_generation_that_is_broken_off_is_kept_as_far_as_it_came(bundle, tmp_path):
    recorder = Recorder(bundle, "onnx")
    with bundle.session("onnx", threads=1) as session:
        list(pocketlm.generate(session, "ab", max_new_tokens=2, observer=recorder))
        pieces = pocketlm.generate(session, PROMPT, max_new_tokens=9, observer=recorder)
        kept = [next(pieces).token for _ in range(3)]
        pieces.close()
    recorder.save(tmp_path / "session.jsonl")
    whole, broken = (sequence.line for sequence in read_session(tmp_path / "session.jsonl", bundle).sequences)
    assert whole.finish_reason == "length"
    assert broken.finish_reason is None
    assert broken.tokens == kept


def test_a_context_can_be_filled_to_the_last_position(bundle, tmp_path):
    recorder = Recorder(bundle, "onnx")
    pieces = generate(bundle, recorder, temperature=1.0, seed=0)
    recorder.save(tmp_path / "session.jsonl")
    (sequence,) = read_session(tmp_path / "session.jsonl", bundle).sequences
    assert sequence.line.finish_reason == pieces[-1].finish_reason == "context"
    assert len(sequence.line.prompt_ids) + len(sequence.line.tokens) - 1 == 48


def test_a_session_belongs_to_the_model_whatever_its_artifacts(bundle, root, tmp_path):
    recorder = Recorder(bundle, "onnx")
    generate(bundle, recorder, max_new_tokens=3)
    path = tmp_path / "session.jsonl"
    recorder.save(path)
    again = {"store": root / "store", "verify": False}
    same = pocketlm.export(root / "source", tmp_path / "same", targets=("executorch",), context_length=32, **again)
    assert same.manifest_sha256 != bundle.manifest_sha256
    assert len(read_session(path, same).sequences) == 1
    other = pocketlm.export(root / "source", tmp_path / "other", targets=("onnx",), scheme="int8", **again)
    with pytest.raises(InputError, match=r"line 1: recorded with another model than that of .*other"):
        read_session(path, other)


def test_nothing_is_written_of_nothing(bundle, tmp_path):
    with pytest.raises(InputError, match="nothing was generated"):
        Recorder(bundle, "onnx").save(tmp_path / "session.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_file_leaves_nothing(bundle, tmp_path):
    recorder = Recorder(bundle, "onnx")
    generate(bundle, recorder, max_new_tokens=1)
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "nowhere" / "session.jsonl", tmp_path / "folder"):
        with pytest.raises(InputError, match=f"{place}: can't be written"):
            recorder.save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_logits_that_are_not_finite_are_not_recorded(bundle):
    recorder = Recorder(bundle, "onnx")
    recorder.begin([1], Sampling())
    with pytest.raises(PocketLMError, match="NaN or infinity"):
        recorder.step(np.array([1.0, math.nan], np.float32), 0)
    assert recorder.steps == 0


def test_a_file_is_replaced_whole(bundle, tmp_path):
    path = tmp_path / "session.jsonl"
    path.write_text("before")
    recorder = Recorder(bundle, "onnx")
    generate(bundle, recorder, max_new_tokens=2)
    recorder.save(path)
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["session", "sequence", "step", "step"]
    assert list(tmp_path.iterdir()) == [path]
