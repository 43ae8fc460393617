"""Jobs: what is written reads back, and what is no job is refused by the key."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.artifact import Artifact, ArtifactFile
from pocketlm.errors import InputError
from pocketlm.job import ForcedTokens, Job, Measure, Replay

ARTIFACT = Artifact(
    path=Path("bundle of a 'friend'; $HOME/onnx/model.onnx"),
    requirements={"onnxruntime": ">=1.23.2"},
    context_length=64,
    vocabulary_size=320,
    hidden_size=16,
    longest_call=32,
    rows=8,
    files={"model.onnx": ArtifactFile("0" * 64, 10)},
)
ids = st.lists(st.integers(0, 1 << 31), max_size=5).map(tuple)
sequences = st.builds(ForcedTokens, ids, ids, st.lists(ids, max_size=3).map(tuple))
counts = st.integers(1, 1 << 20)
works = st.one_of(
    st.builds(Replay, st.lists(sequences, max_size=3).map(tuple), st.integers(0, 64)),
    st.builds(Measure, counts, counts, st.integers(0, 4096), st.booleans(), st.booleans(), st.booleans()),
)
jobs = st.builds(
    Job,
    st.sampled_from(("onnx", "executorch")),
    st.just(ARTIFACT),
    works,
    st.none() | counts,
    st.none() | ids,
    st.booleans(),
)


@given(jobs)
def test_a_job_reads_back(job):
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


DOCUMENT = Job("onnx", ARTIFACT, Measure(8, 4), threads=1).to_json()
REPLAY = Job("onnx", ARTIFACT, Replay((ForcedTokens((1,), (2,)),)), threads=1).to_json()
WRONG = [
    (DOCUMENT, ("format_version",), "2.0", "'format_version' is '2.0'; this agent reads 1.x"),
    (DOCUMENT, ("format_version",), 1, "'format_version' is 1; this agent reads 1.x"),
    (DOCUMENT, ("runtime",), "tflite", "job.runtime: 'tflite' is not one of onnx"),
    (DOCUMENT, ("threads",), 0, "job.threads: must be at least 1"),
    (DOCUMENT, ("threads",), True, "job.threads: must be a whole number"),
    (DOCUMENT, ("cores",), "0", "job.cores: must be a list"),
    (DOCUMENT, ("cores",), [-1], r"job.cores\[0\]: must be a whole number"),
    (DOCUMENT, ("packed",), 1, "job.packed: must be true or false"),
    (DOCUMENT, ("artifact",), [], "job.artifact: must be an object"),
    (DOCUMENT, ("artifact", "path"), "a\0b", "job.artifact.path: must be a text"),
    (DOCUMENT, ("artifact", "rows"), 1 << 50, "job.artifact.rows: must be a whole number"),
    (DOCUMENT, ("artifact", "more"), 1, "job.artifact: unknown key 'more'"),
    (DOCUMENT, ("artifact", "files"), {"a": {"sha256": "0"}}, "job.artifact.files.a: 'size' is missing"),
    (DOCUMENT, ("measure", "new_tokens"), 1.5, "job.measure.new_tokens: must be a whole number"),
    (DOCUMENT, ("replay",), {}, "needs one of 'replay' and 'measure'"),
    (DOCUMENT, ("more",), 1, "job: unknown key 'more'"),
    (REPLAY, ("replay", "sequences"), [{"prompt": [1], "tokens": ["x"], "ids": []}], r"sequences\[0\].tokens\[0\]"),
]


@pytest.mark.parametrize(("document", "place", "value", "message"), WRONG)
def test_what_is_no_job_is_refused_by_its_key(document, place, value, message):
    wrong = copy.deepcopy(document)
    *outer, key = place
    inner = wrong
    for name in outer:
        inner = inner[name]
    inner[key] = value
    with pytest.raises(InputError, match=message):
        Job.from_json(wrong)


@pytest.mark.parametrize("key", DOCUMENT)
def test_every_key_is_needed(key):
    with pytest.raises(InputError, match=f"'{key}'|this agent reads"):
        Job.from_json({name: value for name, value in DOCUMENT.items() if name != key})
