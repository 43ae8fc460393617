"""Damaged and hostile session files: each is refused in one sentence that names the file and the line."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pocketlm
from pocketlm.errors import InputError
from pocketlm.replaying.golden_session import GOLDEN_FILE, read_golden_session
from pocketlm.replaying.recorder import Recorder
from pocketlm.replaying.recording import LARGEST_SESSION, LONGEST_LINE, read_session
from tests.hostile.damage import DAMAGED_JSON, LONGEST_MESSAGE
from tests.small_checkpoint import write_small_checkpoint
from tests.verify.injection import sealed

Lines = list[dict[str, Any]]
HEAD, SEQUENCE, STEP, LAST = 0, 1, 2, 4  # lines of the sound file, which has three steps


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> pocketlm.Bundle:
    root = tmp_path_factory.mktemp("sessions")
    source = write_small_checkpoint(root / "source")
    return pocketlm.export(source, root / "bundle", targets=("onnx",), store=root / "store", verify=False)


@pytest.fixture(scope="module")
def sound(bundle, tmp_path_factory) -> Lines:
    path = tmp_path_factory.mktemp("sound") / "session.jsonl"
    recorder = Recorder(bundle, "onnx")
    with bundle.session("onnx", threads=1) as session:
        list(pocketlm.generate(session, "ab", max_new_tokens=3, temperature=1.0, seed=1, observer=recorder))
    recorder.save(path)
    assert len(read_session(path, bundle).sequences[0].steps) == 3
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(path: Path, bundle: pocketlm.Bundle, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_session(path, bundle)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) < LONGEST_MESSAGE + len(str(path))
    assert caught.value.exit_code == 2


def put(number: int, key: str, value: Any) -> Callable[[Lines], object]:
    return lambda lines: lines[number].update({key: value})


def drop(number: int, key: str | None = None) -> Callable[[Lines], object]:
    return lambda lines: lines.pop(number) if key is None else lines[number].pop(key)


def change(number: int, key: str, alter: Callable[[Any], Any]) -> Callable[[Lines], object]:
    return lambda lines: lines[number].update({key: alter(lines[number][key])})


BAD: dict[str, tuple[Callable[[Lines], object], str]] = {
    "version": (put(HEAD, "format_version", "2.0"), "line 1: 'format_version' is '2.0'; this release reads sessions"),
    "version-number": (put(HEAD, "format_version", 1), "line 1: 'format_version' is 1; this release reads"),
    "no-version": (drop(HEAD, "format_version"), "line 1: 'format_version' is None"),
    "no-head": (drop(HEAD), "line 1: 'kind'"),
    "model": (put(HEAD, "model_sha256", "0" * 64), "line 1: recorded with another model"),
    "model-short": (put(HEAD, "model_sha256", "0"), "line 1: 'model_sha256'"),
    "runtime": (put(HEAD, "runtime", {"name": "tflite", "version": "1", "build": ""}), r"line 1: 'runtime\.name'"),
    "key": (put(HEAD, "more", 1), "line 1: 'more'"),
    "nothing": (lambda lines: lines.__delitem__(slice(1, None)), "nothing was recorded"),
    "no-prompt": (put(SEQUENCE, "prompt_ids", []), "line 2: 'prompt_ids'"),
    "no-tokens": (put(SEQUENCE, "tokens", []), "line 2: 'tokens'"),
    "text-token": (put(SEQUENCE, "tokens", ["1", 2, 3]), r"line 2: 'tokens\.0'"),
    "negative": (put(SEQUENCE, "tokens", [-1, 2, 3]), r"line 2: 'tokens\.0'"),
    "true": (put(SEQUENCE, "tokens", [True, 2, 3]), r"line 2: 'tokens\.0'"),
    "huge-token": (put(SEQUENCE, "tokens", [10**30, 2, 3]), r"line 2: 'tokens\.0'"),
    "outside": (put(SEQUENCE, "tokens", [1, 300, 3]), "line 2: id 300 is outside the model's vocabulary of 300"),
    "prompt-outside": (put(SEQUENCE, "prompt_ids", [5000]), "line 2: id 5000 is outside"),
    "reason": (put(SEQUENCE, "finish_reason", "tired"), "line 2: 'finish_reason'"),
    "sampling": (put(SEQUENCE, "sampling", {}), r"line 2: 'sampling\.temperature'"),
    "long": (put(SEQUENCE, "prompt_ids", [5] * 63), "line 2: 65 positions, but the context of .* holds 64"),
    "fewer-steps": (drop(LAST), "line 2: 3 tokens, but 2 steps: truncated"),
    "more-steps": (lambda lines: lines.append(lines[STEP]), "line 6: 'kind'"),
    "more-tokens": (put(SEQUENCE, "tokens", [1, 2, 3, 4]), "line 2: 4 tokens, but 3 steps"),
    "other-kind": (put(STEP, "kind", "stop"), "line 3: 'kind'"),
    "no-ids": (put(STEP, "ids", []), "line 3: 'ids'"),
    "one-id": (lambda lines: lines[STEP].update(ids=[1], logits=[1.0]), "line 3: 'ids'"),
    "many-ids": (put(STEP, "ids", [1] * 2000), "line 3: 'ids'"),
    "fewer-ids": (change(STEP, "ids", lambda ids: ids[1:]), "line 3: .*31 ids, but 32 logits"),
    "id-twice": (change(STEP, "ids", lambda ids: [ids[1], *ids[1:]]), "line 3: .*an id stands twice"),
    "id-outside": (change(STEP, "ids", lambda ids: [999, *ids[1:]]), "line 3: id 999 is outside"),
    "ascending": (change(STEP, "logits", lambda logits: logits[::-1]), "line 3: .*the logits don't descend"),
    "infinite": (change(STEP, "logits", lambda logits: [float("inf"), *logits[1:]]), r"line 3: 'logits\.0'"),
    "not-a-number": (put(STEP, "log_sum", float("nan")), "line 3: 'log_sum'"),
    "small-sum": (change(STEP, "log_sum", lambda log_sum: log_sum - 9), "line 3: .*'log_sum' is smaller"),
    "huge": (put(STEP, "log_sum", 1e300), "line 3: 'log_sum'"),
    "deviation": (put(STEP, "deviation", -1.0), "line 3: 'deviation'"),
    "null": (put(STEP, "deviation", None), "line 3: 'deviation'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_no_session_says_is_refused_by_its_line(case, sound, bundle, tmp_path):
    damage, says = BAD[case]
    lines = copy.deepcopy(sound)
    damage(lines)
    path = tmp_path / "a 'session'; $HOME.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(path, bundle, says)


@pytest.mark.parametrize("case", DAMAGED_JSON)
@pytest.mark.parametrize("number", [HEAD, SEQUENCE, LAST])
def test_a_line_that_is_no_object_is_refused(case, number, sound, bundle, tmp_path):
    content = [json.dumps(line).encode() for line in sound]
    content[number] = DAMAGED_JSON[case][0]
    path = tmp_path / "session.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in content))
    refused(path, bundle, rf"line {number + 1}: (not a JSON object|'\w+')|nothing was recorded")


@pytest.mark.parametrize("length", [1, 40, 400, 1500])
def test_a_file_that_was_cut_off_is_refused(length, sound, bundle, tmp_path):
    path = tmp_path / "session.jsonl"
    path.write_bytes("".join(json.dumps(line) + "\n" for line in sound).encode()[:length])
    refused(path, bundle, "line [1-3]: ")


def test_what_is_no_file(bundle, tmp_path):
    refused(tmp_path / "nowhere.jsonl", bundle, "no such session file")
    refused(tmp_path, bundle, "not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", bundle, "not a file")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", bundle, "empty: not a recorded session")
    for name, size, says in (("large", LARGEST_SESSION + 1, "too large"), ("long", LONGEST_LINE + 2, "line 1: longer")):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
        refused(tmp_path / name, bundle, says)


GOLDEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no-margins": (lambda line: line.pop("margins"), "tokens, margins and deviation belong together"),
    "fewer-margins": (lambda line: line["margins"].pop(), "24 tokens, but 23 margins"),
    "outside": (lambda line: line["tokens"].__setitem__(3, 300), "outside the model's vocabulary of 300"),
    "long": (lambda line: line.update(prompt_ids=[5] * 64), "longer than the context of 64"),
    "key": (lambda line: line.update(more=1), "'more'"),
    "negative": (lambda line: line["margins"].__setitem__(3, -1), r"'margins\.3'"),
    "text": (lambda line: line.update(tokens="abc"), "'tokens'"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_a_malformed_golden_session_is_refused_by_its_line(case, bundle, tmp_path):
    damage, says = GOLDEN[case]
    lines = [json.loads(line) for line in (bundle.folder / GOLDEN_FILE).read_text().splitlines()]
    damage(lines[1])
    content = "".join(json.dumps(line) + "\n" for line in lines)
    altered = sealed(bundle, tmp_path / "bundle", {GOLDEN_FILE: content.encode()})
    with pytest.raises(pocketlm.BundleError, match=rf"{GOLDEN_FILE}: line 2: .*{says}"):
        read_golden_session(altered)


@pytest.mark.parametrize("case", ["prompts-only", "empty"])
def test_a_bundle_without_a_golden_session_says_what_to_do(case, bundle, tmp_path):
    content = b'{"prompt":"a","prompt_ids":[5]}\n' if case == "prompts-only" else b""
    altered = sealed(bundle, tmp_path / "bundle", {GOLDEN_FILE: content})
    with pytest.raises(InputError, match=r"no golden session to compare with: .* pocketlm run --record FILE"):
        read_golden_session(altered)
