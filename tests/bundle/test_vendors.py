"""onnxruntime-genai and ExecuTorch's TextLLMRunner, unmodified, on a tiny bundle of every model: our greedy tokens.

Both take all of them: the runner knows no kinds of models, and genai takes each by its generic one, ``decoder``, which
``genai_config.json`` states. What genai would know by its own name is a table here, for that it changes with its
versions.
"""

import json
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pocketlm_export.architectures import known_architectures
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from tests.bundle.vendors import genai_greedy, greedy, session_of_text_runner, text_runner, text_runner_greedy
from tests.refusals import refusal_of
from tests.tiny_models import ROWS, write_checkpoint

# A row of every model_type.
NAMES = (
    "gemma", "gemma2", "gemma3", "granite", "llama", "mistral-window", "mixtral", "olmo2", "phi", "phi3", "phi3small",
    "qwen2-window", "qwen3", "qwen3-moe", "smollm3-window", "stablelm",
)  # fmt: skip
CHOSEN = [row for name in NAMES for row in ROWS if row.name == name]
# Untied, filled up, rotated outside of the kernel; masked, sparse, shares as they are.
OTHERS = (
    "llama-untied-biases", "llama-odd-head-dim", "llama-odd-widths", "llama-9-heads", "qwen3-biases", "phi3-window",
    "phi3small-12-heads", "qwen3-moe-plain-shares", "olmo2-odd", "granite-biases", "stablelm-parallel",
)  # fmt: skip
# The message of the installed version; whatever is not here has a name of its own, which adds nothing to a text model.
UNKNOWN_TO_GENAI = "Unsupported model_type in config.json"
GENERIC_ONLY = ("mixtral", "olmo2", "qwen3_moe", "stablelm")
STEPS = 70


def test_every_model_has_a_row():
    assert sorted(row.model_type for row in CHOSEN) == known_architectures()


@pytest.mark.parametrize(
    ("name", "scheme", "head"),
    [
        *((row.name, scheme, "int8") for row in CHOSEN for scheme in ("fp32", "int4")),
        *((name, "int8", "int8") for name in OTHERS),
        ("llama", "int4", "int4"),
    ],
)
def test_onnxruntime_genai_generates_the_sessions_greedy_tokens(name, scheme, head, tiny_bundle):
    import onnxruntime_genai

    bundle = tiny_bundle(name, scheme, "onnx", head)
    assert json.loads((bundle.folder / "onnx/genai_config.json").read_text())["model"]["type"] == "decoder"
    prompt = np.random.default_rng(20).integers(5, 300, 20).tolist()
    with bundle.session("onnx", threads=1) as session:
        expected = greedy(session, prompt, STEPS, bundle.stop_ids)
    assert genai_greedy(bundle, prompt, STEPS) == expected
    text = "def add(a, b):\n    return a + b"
    encoded = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(bundle.folder / "onnx"))).encode(text)
    assert encoded.tolist() == bundle.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("row", CHOSEN, ids=lambda row: row.name)
def test_which_models_onnxruntime_genai_knows_by_their_own_name(row, tiny_bundle, tmp_path):
    import onnxruntime_genai

    folder = shutil.copytree(tiny_bundle(row.name, "fp32", "onnx").folder / "onnx", tmp_path / "onnx")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["type"] = row.model_type
    (folder / "genai_config.json").write_text(json.dumps(config))
    if row.model_type in GENERIC_ONLY:
        with pytest.raises(RuntimeError, match=f"{UNKNOWN_TO_GENAI}: {row.model_type}"):
            onnxruntime_genai.Model(str(folder))
    else:
        onnxruntime_genai.Model(str(folder))


@pytest.fixture(scope="module")
def ascii_bundle(tmp_path_factory):
    """``ascii_bundle(name)``: a model whose every token is ASCII text, for the runner's Python binding can't hand over
    parts of a character."""
    folder = tmp_path_factory.mktemp("ascii")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = [chr(code) for code in range(33, 127)] + ["\u0120"]
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, vocab_size=140, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)

    @cache
    def make(name: str):
        row = next(row for row in CHOSEN if row.name == name)
        config = {**row.config, "vocab_size": tokenizer.get_vocab_size()}
        checkpoint = folder / name
        write_checkpoint(replace(row, name=f"{name} in ascii", config=config), checkpoint)
        tokenizer.save(str(checkpoint / "tokenizer.json"))
        options = ExportOptions(targets=("executorch",), store=folder / "store", verify=False)
        return export_bundle(str(checkpoint), folder / f"{name}.pocketlm", options)

    return make


@pytest.mark.parametrize(
    "row", [row for row in CHOSEN if refusal_of(row, "executorch", "int4") is None], ids=lambda row: row.name
)
@pytest.mark.parametrize(("prompt", "calls"), [("the quick brown", 1), ("zyx wvu tsr qpo " * 9, 2)])
def test_the_official_runner_generates_the_tokens_of_our_session(prompt, calls, row, ascii_bundle):
    bundle = ascii_bundle(row.name)
    with session_of_text_runner(bundle) as session:
        ids = bundle.tokenizer.encode(prompt, add_special_tokens=False)
        assert calls == -(-len(ids) // bundle.manifest.targets["executorch"].longest_call)
        expected, logits = [], session.extend(ids)
        for _ in range(16):
            expected.append(int(logits[-1].argmax()))
            if expected[-1] in bundle.stop_ids and len(expected) > 1:  # the runner never stops at the first
                break
            logits = session.extend([expected[-1]])
    runner = text_runner(bundle)
    for _ in range(2):  # the second time after a reset
        written = text_runner_greedy(runner, prompt, 16)
        assert written == bundle.tokenizer.decode(expected, skip_special_tokens=False)
        runner.reset()
