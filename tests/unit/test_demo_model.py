"""The committed demo checkpoint: transformers loads it, it has the promised shape, and it beats xz on held-out text."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

DEMO = Path(__file__).parents[2] / "mobile_demo" / "model"
CHECKPOINT = DEMO / "checkpoint"


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model_train", DEMO / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_weights_are_small_and_bf16_and_of_3_to_6_million_parameters() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 14_000_000
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 (not a mapping)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 3_000_000 <= sum(tensor.numel() for tensor in tensors) <= 6_000_000
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_transformers_loads_it_and_generates_with_its_own_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.tie_word_embeddings
    assert len(tokenizer) == model.config.vocab_size

    prompt = tokenizer("def main():\n", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8)
    assert generated.shape[1] > prompt["input_ids"].shape[1]


def test_two_stop_ids_end_of_text_and_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == ["<|endoftext|>", "<|im_end|>"]
    assert 0 < generation["temperature"] <= 1
    assert 0 < generation["top_p"] <= 1


@settings(deadline=None)
@given(st.text())
def test_tokenizer_gives_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_and_indentation_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    assert len(tokenizer.tokenize("\n            return")) == 3


def test_template_renders_turns_and_opens_the_answer(tokenizer: PreTrainedTokenizerFast, train: ModuleType) -> None:
    turns = [("def one():", "    return 1"), ("def two():", "    return 2")]
    messages = [{"role": "system", "content": train.SYSTEM_TURN}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    assert tokenizer.apply_chat_template(messages, tokenize=False) == train.chat(turns, number=0)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("def one():<|im_end|>\n<|im_start|>assistant\n")


def test_held_out_files_are_not_trained_on(train: ModuleType) -> None:
    trained = {path.relative_to(train.STANDARD_LIBRARY).as_posix() for path in train.training_files()}
    assert len(trained) > 300
    assert trained.isdisjoint(train.HELD_OUT)
    assert not any("test" in Path(name).parts or "site-packages" in name for name in trained)
    assert [path.relative_to(train.STANDARD_LIBRARY).as_posix() for path in train.held_out_files()] == [*train.HELD_OUT]


def test_function_turns_cut_after_the_docstring_and_dedent(train: ModuleType) -> None:
    source = 'class Pair:\n    def first(self):\n        """The first."""\n\n        return self[0]\n'
    assert list(train.function_turns(source)) == [('def first(self):\n    """The first."""', "    return self[0]")]


def test_model_beats_xz_on_a_held_out_module(train: ModuleType) -> None:
    content = (train.STANDARD_LIBRARY / "heapq.py").read_bytes()
    assert "heapq.py" in train.HELD_OUT
    [bits] = train.model_bits(CHECKPOINT, [content.decode()])
    assert bits < train.xz_bits(content)
