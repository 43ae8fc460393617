"""Bad configurations: each gets one short message that names the file and the key, and leaves nothing behind."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketlm.errors import InputError
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from tests.hostile.damage import DAMAGED_JSON, LONGEST_MESSAGE, Bad, check_refused, config, replaced, text, without
from tests.small_checkpoint import CONFIG, write_small_checkpoint

GENERATION = "generation_config.json"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
ABSURD = (-1, 0, 10**12, True, False, 2.5, "32", "", [1], {}, [], float("nan"), float("inf"), -float("inf"), 10**400)
REAL = frozenset({2.5})  # not absurd where any number will do
FROM_ZERO = frozenset({0})
NUMBERS: list[tuple[str, dict[str, Any], tuple[str, ...], frozenset[Any]]] = [
    (
        "llama",
        {},
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        ),
        frozenset(),
    ),
    ("llama", {}, ("rms_norm_eps", "rope_theta"), REAL),
    ("llama", {"rope_scaling": LLAMA3}, ("factor", "low_freq_factor", "high_freq_factor"), REAL),
    ("llama", {"rope_scaling": LLAMA3}, ("original_max_position_embeddings",), frozenset()),
    ("qwen3", {"rope_parameters": LINEAR}, ("factor", "rope_theta"), REAL),
    ("mistral", {}, ("sliding_window",), frozenset()),
    ("qwen2", SLIDING, ("sliding_window",), frozenset()),
    ("qwen2", SLIDING, ("max_window_layers",), FROM_ZERO),
    ("smollm3", SLIDING, ("sliding_window", "no_rope_layer_interval"), frozenset()),
    (GENERATION, {}, ("top_k",), FROM_ZERO),
    (GENERATION, {}, ("temperature",), FROM_ZERO | REAL),
    (GENERATION, {}, ("top_p", "min_p"), FROM_ZERO),
    (GENERATION, {}, ("repetition_penalty",), REAL),
]  # fmt: skip

CONFIGURATIONS = [
    Bad("no-config", lambda f: (f / "config.json").unlink(), "no config.json", file=""),
    Bad("config-is-a-folder", replaced("config.json", Path.mkdir), "not a regular file"),
    Bad("config-is-a-pipe", replaced("config.json", os.mkfifo), "not a regular file"),
    Bad("config-is-a-device", replaced("config.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    Bad(
        "deep-value",
        text("config.json", '{"rope_scaling":' + "[" * 90_000 + "]" * 90_000 + "}"),
        "not a valid JSON object",
    ),
    Bad(
        "huge-integer",
        text("config.json", '{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}"),
        "not a valid JSON object",
    ),
    Bad("no-model-type", without("model_type"), "'model_type' is missing"),
    Bad(
        "unknown-model-type",
        config(model_type="lama"),
        r"'lama' is not supported; did you mean llama\? .*Known: .*mistral",
    ),
    Bad("model-type-is-a-path", config(model_type="../../etc/passwd"), "is not supported"),
    Bad("model-type-is-a-module", config(model_type="os.path"), "is not supported"),
    Bad("model-type-is-private", config(model_type="_decoder"), "is not supported"),
    Bad("model-type-is-a-number", config(model_type=5), "'model_type' must be a string"),
    *(
        Bad(f"no-{key}", without(key), f"'{key}' is missing")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ),
    *(
        Bad(f"{key}-{value}", config(**{key: value}), f"'{key}' must be")
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for value in (-1, 0, 10**12, True, 2.5, "32", [1], {})
    ),
    Bad(
        "epsilon-nan",
        text("config.json", json.dumps({**CONFIG, "rms_norm_eps": float("nan")})),
        "'rms_norm_eps' must be a finite",
    ),
    Bad("epsilon-zero", config(rms_norm_eps=0), "'rms_norm_eps' must be greater than zero"),
    Bad("epsilon-text", config(rms_norm_eps="1e-5"), "'rms_norm_eps' must be a finite number"),
    Bad("theta-negative", config(rope_theta=-1), "'rope_theta' must be at least 1"),
    Bad(
        "theta-infinite",
        text("config.json", json.dumps({**CONFIG, "rope_theta": float("inf")})),
        "'rope_theta' must be a finite",
    ),
    Bad(
        "heads-not-divisible", config(num_key_value_heads=3), "'num_key_value_heads' is 3, which does not divide the 4"
    ),
    Bad(
        "hidden-not-divisible", config(num_attention_heads=5, num_key_value_heads=1), "'hidden_size' is 32, which the 5"
    ),
    Bad("odd-head", config(head_dim=7), "'head_dim' is 7"),
    Bad("tied-is-text", config(tie_word_embeddings="yes"), "'tie_word_embeddings' must be true or false"),
    Bad("activation", config(hidden_act="relu"), "'hidden_act' is \"relu\"; supported: gelu, gelu_new, .*, silu"),
    Bad("rope-unknown", config(rope_scaling={"rope_type": "spiral"}), "rope type 'spiral' is not supported"),
    Bad(
        "rope-two-types",
        config(rope_scaling={"rope_type": "linear", "type": "llama3", "factor": 2.0}),
        "which one was meant",
    ),
    Bad("rope-no-factor", config(rope_scaling={"rope_type": "linear"}), "'factor' is missing"),
    Bad("rope-is-a-list", config(rope_scaling=[1]), "'rope_scaling' must be an object"),
    Bad(
        "rope-stray-key",
        config(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 1}),
        "'beta_fast' has no meaning",
    ),
    Bad("rope-type-is-a-number", config(rope_scaling={"rope_type": 3}), "rope type '3' is not supported"),
    Bad("architectures", config(architectures=["LlamaForSequenceClassification"]), "'architectures' is LlamaForSeq"),
    Bad("architectures-text", config(architectures="LlamaForCausalLM"), "'architectures' must be a list"),
    Bad("eos-text", config(eos_token_id="2"), "'eos_token_id' must be a token id"),
    Bad("eos-nested", config(eos_token_id=[[2]]), "'eos_token_id' must be a token id"),
    Bad("unknown-key", config(logit_scale=2.0), "unknown key 'logit_scale'.*--accept logit_scale"),
    Bad("quantized", config(quantization_config={"quant_method": "gptq"}), "already quantized \\(gptq\\)"),
    Bad("quantized-not-an-object", config(quantization_config="awq"), "already quantized"),
    *(
        Bad(f"{name.split('_')[0]}-{case}", text(name, content), says, name)
        for name in ("config.json", GENERATION)
        for case, (content, says) in DAMAGED_JSON.items()
    ),
    Bad("huge", lambda f: os.truncate(f / "config.json", 65 << 20), "68157440 bytes are too many"),
    Bad(
        "generation-temperature",
        text(GENERATION, '{"temperature": "hot"}'),
        "'temperature' must be",
        GENERATION,
    ),
    Bad(
        "generation-top-k",
        text(GENERATION, '{"top_k": -1}'),
        "'top_k' must be",
        GENERATION,
    ),
    Bad(
        "generation-penalty",
        text(GENERATION, '{"repetition_penalty": 0}'),
        "'repetition_penalty' must be",
        GENERATION,
    ),
]


@pytest.mark.parametrize("bad", CONFIGURATIONS, ids=lambda bad: bad.name)
def test_a_bad_configuration_is_refused(bad, tmp_path):
    check_refused(bad, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "key", "valid"),
    [(kind, changes, key, valid) for kind, changes, keys, valid in NUMBERS for key in keys],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_no_absurd_number_passes(kind, changes, key, valid, tmp_path):
    source = write_small_checkpoint(tmp_path / "checkpoint")
    file = source / (GENERATION if kind == GENERATION else "config.json")
    rope = next((name for name, value in changes.items() if isinstance(value, dict)), None)
    for value in ABSURD:
        if not isinstance(value, bool | list | dict) and value in valid:
            continue
        changed = {rope: {**changes[rope], key: value}} if rope else {key: value}
        sound = {} if kind == GENERATION else {**CONFIG, "model_type": kind}
        file.write_text(json.dumps({**sound, **changes, **changed}))
        with pytest.raises(InputError, match=rf"{file.name}.*'{key}' ") as caught:
            open_checkpoint(source)
        assert len(str(caught.value)) < LONGEST_MESSAGE + len(str(source)), value


@pytest.mark.parametrize("key", ("eos_token_id", "bos_token_id", "pad_token_id"))
@pytest.mark.parametrize("value", (True, 2.5, "2", {}, [True], [2.5], float("nan")), ids=str)
def test_what_is_no_token_id_is_refused(key, value, tmp_path):
    check_refused(Bad("id", config(**{key: value}), f"'{key}' must be a token id"), tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    key=st.sampled_from(sorted({*CONFIG, "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "layer_types"})),
    value=JSON,
)
def test_any_value_of_a_key_opens_or_is_refused(key, value, tmp_path):
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_small_checkpoint(folder)
    config(**{key: value})(folder)
    try:
        open_checkpoint(folder)
    except InputError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < LONGEST_MESSAGE + len(str(folder))
