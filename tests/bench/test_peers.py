"""The comparison with peers: what it refuses, what a measuring process returns, what lands in a page."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pocketlm.errors import InputError
from pocketlm_bench.page import insert
from pocketlm_bench.peer.environments import PEERS
from pocketlm_bench.peer.record import new_comparison, read_comparison
from pocketlm_bench.peer.running import compare_rates, settings_for
from pocketlm_bench.peer.tables import lines
from tests.small_checkpoint import write_small_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture
def peers(tmp_path):
    """``peers(*arguments)`` -> the finished process, with no environment set up."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pocketlm_bench.peers", *map(str, arguments)]
        variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, cwd=tmp_path)

    return run


@pytest.fixture(scope="module")
def measured(demo_bundle):
    """Two rounds of the demo model in both runtimes, and their settings."""
    bundle = demo_bundle("int4", "int4")
    settings = replace(settings_for(bundle.folder, 512, 2, None), tokens=5)
    artifacts = {name: f"{name}:{bundle.folder}" for name in ("onnx", "executorch")}
    return bundle, settings, list(compare_rates(artifacts, {}, settings, rounds=2))


@pytest.mark.parametrize(("command", "peer"), [("export", "genai"), ("run", "genai"), ("run", "llama_cpp")])
def test_a_peer_that_is_not_set_up_is_refused_with_the_command_that_does_it(peers, checkpoint, command, peer):
    process = peers(command, checkpoint, "--peer", peer)
    assert process.returncode == 3
    assert process.stdout == ""
    assert process.stderr.startswith(f"error: the environment of {PEERS[peer].title} is not set up: ")
    assert f"python -m pocketlm_bench.peers setup {peer} " in process.stderr


def test_an_environment_of_other_versions_is_refused(peers, checkpoint, tmp_path):
    folder = tmp_path / "cache" / "pocketlm" / "peers" / "genai"
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps({"packages": ["onnxruntime-genai==0.1"], "shared": []}))
    process = peers("export", checkpoint)
    assert process.returncode == 3
    assert "has other versions" in process.stderr
    (folder / "environment.json").write_text("[]")
    process = peers("export", checkpoint)
    assert process.returncode == 2
    assert "environment.json: not a record of an environment" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("setup", "olive"), "unknown peer 'olive': genai, llama_cpp, export_llm"),
        (("export", ".", "--peer", "llama_cpp"), "--peer llama_cpp: genai, export_llm"),
    ],
)
def test_unknown_peers_are_refused(peers, arguments, needle):
    process = peers(*arguments)
    assert process.returncode == 2
    assert needle in process.stderr


@pytest.mark.parametrize(
    ("context", "core", "needle"), [(128, None, "needs more than 128"), (512, 4096, "core 4096 can't be used")]
)
def test_settings_that_cannot_be_measured_are_refused(checkpoint, context, core, needle):
    with pytest.raises(InputError, match=needle):
        settings_for(checkpoint, context, 1, core)


def test_rounds_alternate_and_keep_every_sample(measured):
    bundle, settings, runs = measured
    assert [(run.round, run.way) for run in runs] == [
        (0, "onnx"), (0, "executorch"), (1, "onnx"), (1, "executorch"),
    ]  # fmt: skip
    for run in runs:
        assert len(run.samples.prefill) == 2
        assert [len(intervals) for intervals in run.samples.decode] == [4, 4], "n tokens, n - 1 intervals"
        assert run.peak_resident >= run.samples.memory["RssAnon"] > 0
        with bundle.session(run.way, threads=1) as session:
            greedy = [int(session.extend(settings.ids(settings.depth))[-1].argmax())]
            while len(greedy) < settings.tokens:
                greedy.append(int(session.extend(greedy[-1:])[-1].argmax()))
        assert run.samples.greedy == greedy, "what was timed is the model's own continuation"


def test_a_comparison_survives_its_file_and_lands_in_a_page(measured, peers, tmp_path):
    bundle, settings, runs = measured
    comparison = new_comparison("rates", bundle.folder, {}, {"prompt": settings.prompt}, runs)
    file = tmp_path / "rates.json"
    file.write_text(comparison.model_dump_json())
    assert read_comparison(file) == comparison
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peer rates -->\nold\n<!-- end of peer rates -->\nafter\n")
    process = peers("page", page, file)
    assert process.returncode == 0, process.stderr
    expected = "\n".join(lines(comparison))
    assert page.read_text() == f"before\n<!-- peer rates -->\n{expected}\n<!-- end of peer rates -->\nafter\n"
    assert "| .pte, decode, against PocketLM, ONNX, head int4 | >= 1.25x | 1.5x |" in expected
    assert "onnxruntime-genai" not in expected, "a peer that was not measured"


def test_a_damaged_comparison_and_a_page_without_markers_are_refused(peers, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text('{"kind": "rates"}')
    with pytest.raises(InputError, match=r"rates\.json: not a comparison of peers: command: Field required"):
        read_comparison(file)
    with pytest.raises(InputError, match="no markers of 'peer rates'"):
        insert("a page", "peer rates", [])
    assert peers("page", Path("missing.md"), file).returncode == 2
