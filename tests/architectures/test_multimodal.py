"""The text part of a multimodal checkpoint: Gemma 3 with eyes, against transformers' class of the whole."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketlm
from pocketlm.errors import CheckpointError, InputError, UnsupportedError
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.checkpoint.text_part import GEMMA3
from pocketlm_export.inspection import inspect_checkpoint
from tests.architectures.parity import DECODE, PROMPT, difference, run
from tests.architectures.test_config_mutation import mutations, our_logits, problem, transformers_logits, write_config
from tests.architectures.test_parity import LARGEST, RMS, RUNTIMES
from tests.tiny_models import GEMMA, initial_values, write_tokenizer

TEXT = {
    **GEMMA,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
VISION = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
IMAGE_TOKENS = {"image_token_index": 300, "boi_token_index": 298, "eoi_token_index": 299, "mm_tokens_per_image": 4}
# As Gemma 3's own: texts as they are, lists part by part.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS = np.random.default_rng(1).integers(5, 290, PROMPT + DECODE).tolist()
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint of text and vision, as the installed transformers saves it."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(5)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, **IMAGE_TOKENS)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_values(name, parameter, center=0.0))
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, TEXT["vocab_size"])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def expected(whole) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, attn_implementation="eager").eval()
    assert type(model).__name__ == GEMMA3.class_name
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def rename(folder: Path, new_name) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({new_name(name): value for name, value in tensors.items()}, folder / "model.safetensors")


def newer(name: str) -> str:
    """The name as releases from 4.52 on have it in memory, and some of them save it."""
    return (
        f"model.{name}"
        if name.startswith(OTHER_PARTS)
        else name.replace("language_model.model.", "model.language_model.")
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_text_part_equals_transformers_class_of_the_whole(runtime, whole, expected, tmp_path):
    bundle = pocketlm.export(
        whole, tmp_path / "bundle", targets=(runtime,), scheme="fp32", store=tmp_path / "store", oracle="transformers"
    )
    assert bundle.certificate.passed
    assert bundle.certificate.oracle.name == "transformers"
    assert bundle.manifest.model.model_type == "gemma3_text"
    with bundle.session(runtime, threads=1) as session:
        largest, rms = difference(run(session, TOKENS), expected)
    assert largest <= LARGEST[runtime]
    assert rms <= RMS[runtime]
    (note,) = (
        note
        for note in bundle.manifest.targets[runtime].notes
        if note.startswith(f"of {GEMMA3.class_name} the text part alone, without ")
    )
    assert "vision_tower (21 tensors), multi_modal_projector (2 tensors)" in note
    assert inspect_checkpoint(str(whole)).left_out == note
    assert pocketlm.verify(bundle, reference=whole).passed


def test_messages_of_text_run_and_an_image_is_refused(whole, tmp_path):
    bundle = pocketlm.export(whole, tmp_path / "bundle", targets=("onnx",), store=tmp_path / "store", verify=False)
    text = {"type": "text", "text": "Hello"}
    for content in ("Hello", [text]):
        assert bundle.chat_template.render([{"role": "user", "content": content}]) == "<|user|>Hello</s><|assistant|>"
    assert list(pocketlm.chat(bundle, [{"role": "user", "content": [text]}], max_new_tokens=4))
    with pytest.raises(InputError, match=r"messages\[0\]: a part of type 'image': bundles take text alone"):
        list(pocketlm.chat(bundle, [{"role": "user", "content": [{"type": "image"}, text]}]))


def test_either_way_of_naming_its_tensors(copy, tmp_path):
    older = open_checkpoint(copy)
    rename(copy, newer)
    checkpoint = open_checkpoint(copy)
    assert set(checkpoint.tensors.names()) == set(older.tensors.names())
    assert all(checkpoint.tensors.digest(name) == older.tensors.digest(name) for name in older.tensors.names())
    assert "model.vision_tower (21 tensors), model.multi_modal_projector (2 tensors)" in checkpoint.left_out
    found = our_logits(copy, tmp_path / "store")
    assert difference(found, transformers_logits(copy))[0] <= LARGEST["reference"]


def test_absent_keys_mean_what_transformers_class_says(copy):
    from transformers import Gemma3TextConfig

    defaults = Gemma3TextConfig().to_dict()
    assert {key: defaults[key] for key in GEMMA3.defaults} == GEMMA3.defaults
    config = json.loads((copy / "config.json").read_text())
    released = {key: config["text_config"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    write_config(copy, {**config, "text_config": {**released, "model_type": "gemma3_text"}})
    read = open_checkpoint(copy).config
    assert (read.vocabulary_size, read.heads, read.kv_heads, read.head_dim) == (262208, 8, 4, 256)
    assert (read.context_length, read.tied, read.attention_scale) == (131072, True, 1 / 16)
    assert {layer.window for layer in read.layers} == {4096}


def test_a_head_of_its_own(copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    head = torch.randn(TEXT["vocab_size"], TEXT["hidden_size"], generator=torch.Generator().manual_seed(1))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"].pop("tie_word_embeddings")
    write_config(copy, {**config, "tie_word_embeddings": False})
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        save_file({**tensors, name: (head / 8).bfloat16()}, copy / "model.safetensors", {"format": "pt"})
        found = our_logits(copy, tmp_path / "store")
        assert difference(found, transformers_logits(copy))[0] <= LARGEST["reference"]


def test_every_field_is_honoured_neutral_or_refused_by_name(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    problems = []
    for mutation in mutations(config, {}):
        if mutation.path[0] == "vision_config":
            continue  # of a part that is left out, which the oracle nevertheless loads
        write_config(copy, mutation.applied(config))
        try:
            ours: np.ndarray | InputError = our_logits(copy, tmp_path / "store")
        except InputError as error:
            ours = error
        found = problem(ours, mutation, config, copy)
        if found is not None:
            problems.append(f"{mutation}: {found}")
    assert not problems, "\n".join(problems)


CONFIGURATIONS = {
    "a cap that the whole does not apply": (("text_config", "final_logit_softcapping"), 30.0, "does not apply it"),
    "another text model": (("text_config", "model_type"), "qwen2", "supported: gemma3_text"),
    "tied and not": (("text_config", "tie_word_embeddings"), False, "is not what the outer one says"),
    "an unknown outer key": (("audio_config",), {"hidden_size": 3}, "unknown key 'audio_config'"),
    "an unknown inner key": (("text_config", "residual_gain"), 2.0, "text_config: unknown key 'residual_gain'"),
    "no text": (("text_config",), None, "'text_config' is missing"),
    "text that is no object": (("text_config",), [1], "'text_config' must be an object"),
    "another class": (("architectures",), ["Gemma3ForSequenceClassification"], "supported: Gemma3ForCond"),
    "quantized": (("quantization_config",), {"quant_method": "gptq"}, "already quantized"),
    "quantized text": (("text_config", "quantization_config"), {"quant_method": "gptq"}, "already quantized"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_bad_configuration_is_refused_by_name(case, copy):
    (*outer, key), value, says = CONFIGURATIONS[case]
    config = json.loads((copy / "config.json").read_text())
    place = config
    for name in outer:
        place = place[name]
    place[key] = value
    write_config(copy, config)
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"config\.json.*{says}"):
        open_checkpoint(copy)


def test_tensors_of_two_names_and_of_no_part_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    norm = "language_model.model.norm.weight"
    save_file({**tensors, newer(norm): tensors[norm].clone()}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"are both the text model's model\.norm\.weight"):
        open_checkpoint(copy)
    save_file({**tensors, "audio_tower.weight": tensors[norm].clone()}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors that the model does not use: audio_tower\.weight"):
        inspect_checkpoint(str(copy))
    del tensors[norm]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight \[64\] is missing"):
        inspect_checkpoint(str(copy))
