"""The committed JSON schema and FORMAT.md against the types and a written bundle."""

import json
import re
import runpy
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

import pocketlm
from pocketlm.manifest import FORMAT_VERSION, Manifest, Model
from pocketlm.replaying.recording import RecordedSampling, SequenceLine, SessionLine, StepLine
from pocketlm.results import Divergence, ReplayLimits, ReplayResult, ReplayRun, SessionRecord, Unavailable
from pocketlm_export.golden import LARGEST_REPLAYED
from tests.small_checkpoint import write_small_checkpoint

FOLDER = Path(__file__).parents[2] / "runtime_bindings" / "schema"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("format")
    pocketlm.export(
        write_small_checkpoint(root / "source"), root / "bundle", targets=("onnx",), store=root / "store", verify=False
    )
    return root / "bundle"


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads((FOLDER / "manifest.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["manifest", "certificate", "result", "session"])
def test_the_committed_schemas_are_the_types(name):
    committed = (FOLDER / f"{name}.schema.json").read_text(encoding="utf-8")
    assert committed == runpy.run_path(str(FOLDER / "generate.py"))["render"](name)
    jsonschema.Draft202012Validator.check_schema(json.loads(committed))


def test_a_written_manifest_is_valid(schema, bundle):
    jsonschema.validate(json.loads((bundle / "manifest.json").read_text()), schema)


@pytest.mark.parametrize(
    "change",
    (
        lambda m: m.update(extra=1),
        lambda m: m["model"].update(extra=1),
        lambda m: m["scheme"].update(linears="int3"),
        lambda m: m["targets"].update(tflite=m["targets"]["onnx"]),
        lambda m: m["files"]["onnx/model.onnx"].update(sha256="x"),
        lambda m: m["model"].update(layers=0),
        lambda m: m["model"].update(layers="2"),
        lambda m: m.pop("files"),
        lambda m: next(w for w in m["weights"].values() if w["scheme"] == "int4").pop("group"),
        lambda m: next(w for w in m["weights"].values() if w["scheme"] == "fp32").update(group=32),
    ),
    ids=("key", "nested-key", "scheme", "target", "hash", "zero", "text", "missing", "no-group", "group"),
)
def test_schema_and_types_refuse_the_same(change, schema, bundle):
    content = json.loads((bundle / "manifest.json").read_text())
    Manifest.model_validate(content)
    change(content)
    with pytest.raises(ValidationError):
        Manifest.model_validate(content)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_the_prose_names_every_key():
    prose = (FOLDER / "FORMAT.md").read_text(encoding="utf-8")
    assert f"format {FORMAT_VERSION}" in prose
    named = set(re.findall(r"`([a-z_0-9]+)`", prose))
    assert set(Manifest.model_fields) <= named
    assert set(Model.model_fields) <= named
    assert f"{LARGEST_REPLAYED // 1_000_000} million weights" in prose


def test_the_prose_names_every_key_of_the_golden_vectors(bundle):
    prose = (FOLDER / "FORMAT.md").read_text(encoding="utf-8")
    golden = prose[prose.index("## Golden vectors") :]
    for path in (bundle / "golden").iterdir():
        assert f"`{path.name}`" in golden
        for key in json.loads(path.read_text(encoding="utf-8").split("\n")[0]):
            assert f"`{key}`" in golden, (path.name, key)


@pytest.mark.parametrize(
    ("heading", "types"),
    [
        ("# Recorded sessions", (SessionLine, SequenceLine, StepLine, RecordedSampling)),
        ("## A run of a replay", (Divergence, ReplayLimits, SessionRecord, Unavailable)),
        ("# Results", (ReplayResult, ReplayRun)),
    ],
)
def test_the_prose_names_every_key_of_sessions_and_replays(heading, types):
    prose = (FOLDER / "FORMAT.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+)`", prose[prose.index(heading) :]))
    assert {key for kind in types for key in kind.model_fields} <= named


def test_the_examples_of_the_contract_run(tmp_path):
    source = write_small_checkpoint(tmp_path / "source")
    bundle = pocketlm.export(
        source,
        tmp_path / "model.pocketlm",
        targets=("onnx",),
        scheme="int4",
        context_length=32,
        store=tmp_path / "store",
        verify=False,
    )
    assert bundle.manifest.model.context_length == 32
    with pocketlm.open(tmp_path / "model.pocketlm").session("onnx", threads=1) as session:
        assert session.extend(list(range(5, 17)), logits=1).shape == (1, 300)
        session.rewind(10)
        assert session.position == 10
        text = "".join(piece.text for piece in pocketlm.generate(session, "def", max_new_tokens=4, temperature=0.0))
        assert isinstance(text, str)
        assert list(pocketlm.chat(session, [{"role": "user", "content": "ab"}], max_new_tokens=2))
