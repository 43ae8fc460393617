"""Bad configurations, tensors and vocabularies of Phi-3 small: one short message that names file and key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pocketlm
from pocketlm.errors import InputError
from pocketlm_export.checkpoint.phi3small_tokenizer import VOCABULARY
from tests.architectures.phi3small_model import BASE, LONGROPE
from tests.hostile.damage import LONGEST_MESSAGE, tensors
from tests.tiny_models import write_checkpoint
from tests.tiny_row import Row

ABSURD = (-1, 10**12, True, "32", "", [1], {}, [], float("nan"), float("inf"), 10**400)
NUMBERS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "num_hidden_layers",
    "vocab_size", "layer_norm_epsilon", "mup_embedding_multiplier", "mup_width_multiplier", "mup_attn_multiplier",
    "gegelu_limit", "ff_intermediate_size", "rope_embedding_base", "rope_position_scale", "blocksparse_block_size",
    "blocksparse_num_local_blocks", "blocksparse_vert_stride", "dense_attention_every_n_layers",
)  # fmt: skip
FLAGS = ("mup_use_scaling", "blocksparse_homo_head_pattern", "gegelu_pad_to_256", "tie_word_embeddings")


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {**LONGROPE, **changes}}


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "heads-of-an-odd-size": ({"hidden_size": 60}, "'hidden_size' is 60: the 4 attention heads"),
    "key-heads-not-divisible": ({"num_key_value_heads": 3}, "'num_key_value_heads' is 3"),
    "another-activation": ({"hidden_act": "gelu"}, "'hidden_act' is \"gelu\"; supported: gegelu"),
    "limit-zero": ({"gegelu_limit": 0}, "'gegelu_limit' must be greater than zero"),
    "no-attention-multiplier": ({"mup_attn_multiplier": None}, "'mup_attn_multiplier' must be greater"),
    "attention-multiplier-zero": ({"mup_attn_multiplier": 0}, "'mup_attn_multiplier' must be greater"),
    "two-widths": ({"ff_dim_multiplier": 2}, "'ff_dim_multiplier' and 'ff_intermediate_size': one must"),
    "no-width": ({"ff_intermediate_size": None}, "'ff_dim_multiplier' and 'ff_intermediate_size': one must"),
    "block-of-nothing": ({"blocksparse_block_size": 0}, "'blocksparse_block_size' must be between 1"),
    "no-local-blocks": ({"blocksparse_num_local_blocks": 0}, "'blocksparse_num_local_blocks' must be between 1"),
    "no-stride": ({"blocksparse_vert_stride": 0}, "'blocksparse_vert_stride' must be between 1"),
    "unknown-key": ({"blocksparse_sliding_window": 4}, "unknown key 'blocksparse_sliding_window'"),
    "windows": ({"layer_types": ["sliding_attention"] * 3}, "unknown key 'layer_types'"),
    "rope-unknown": (rope(type="yarn"), "rope type 'yarn' is not supported; supported: su, longrope"),
    "rope-without-type": (rope(type=None), "rope type 'None' is not supported"),
    "rope-a-list": ({"rope_scaling": [1]}, "'rope_scaling' must be an object"),
    "factors-too-few": (rope(short_factor=[1.0] * 7), "'short_factor' must be a list of 8 numbers"),
    "factors-too-many": (rope(long_factor=[1.0] * 9), "'long_factor' must be a list of 8 numbers"),
    "factor-zero": (rope(long_factor=[0.0] + [1.0] * 7), "'long_factor' holds 0.0"),
    "factor-text": (rope(long_factor=["1"] * 8), "'long_factor' holds \"1\""),
    "no-factors": (rope(short_factor=None), "'short_factor' is missing"),
    "no-original-context": (rope(original_max_position_embeddings=None), "'original_max_position_embeddings' is miss"),
    "original-context-one": (rope(original_max_position_embeddings=1), "'original_max_position_embeddings' must be"),
    "scale-infinite": (rope(long_mscale=float("inf")), "'long_mscale' must be a finite number|not a valid JSON"),
    "rope-stray-key": (rope(beta_fast=1), "'beta_fast' has no meaning for rope type 'su'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_checkpoint(Row("phi3small", "phi3small", BASE, dtype="float32"), folder)
    return folder


@pytest.fixture
def refused(sound: Path, tmp_path: Path) -> Callable[..., str]:
    """``refused(says, damage)`` exports a damaged copy, checks what every refusal has in common, gives its message."""
    source = tmp_path / "checkpoint"
    source.mkdir()
    for path in sound.iterdir():
        (source / path.name).write_bytes(path.read_bytes())

    def check(says: str, damage: Callable[[Path], object], file: str = "config.json") -> str:
        damage(source)
        with pytest.raises(InputError, match=says) as caught:
            pocketlm.export(source, tmp_path / "bundle", targets=("onnx",), store=tmp_path / "store", verify=False)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < LONGEST_MESSAGE + len(str(source))
        assert str(source / file) in message
        assert not (tmp_path / "bundle").exists()
        assert not list(tmp_path.glob(".*")), "nothing half-made is left"
        return message

    return check


def with_keys(changes: dict[str, Any]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_bad_configuration_is_refused(name, refused):
    changes, says = CONFIGURATIONS[name]
    refused(says, with_keys(changes))


@pytest.mark.parametrize("key", NUMBERS)
def test_no_absurd_number_passes(key, refused):
    for value in ABSURD:
        refused(rf"config\.json.*'{key}' ", with_keys({key: value}))


@pytest.mark.parametrize("key", FLAGS)
def test_what_is_no_flag_is_refused(key, refused):
    for value in (1, "true", [True], {}):
        refused(f"'{key}' must be true or false", with_keys({key: value}))


FIRST = "model.layers.0."
TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str, str]] = {
    "no-bias-of-query-key-value": (
        lambda v: v.pop(f"{FIRST}self_attn.query_key_value.bias"),
        r"tensor model\.layers\.0\.self_attn\.query_key_value\.bias\[0:32 of 64\] \[64\] is missing",
        "",
    ),
    "no-bias-of-a-norm": (lambda v: v.pop("model.final_layernorm.bias"), r"final_layernorm\.bias .* is missing", ""),
    "no-bias-of-the-mlp": (lambda v: v.pop(f"{FIRST}mlp.up_proj.bias"), r"mlp\.up_proj\.bias.* is missing", ""),
    "fused-rows-not-whole": (
        lambda v: v.update({f"{FIRST}self_attn.query_key_value.weight": np.zeros((127, 64), np.float32)}),
        r"query_key_value\.weight has shape \[127, 64\]",
        "model.safetensors",
    ),
    "an-odd-number-of-rows": (
        lambda v: v.update({f"{FIRST}mlp.up_proj.weight": np.zeros((191, 64), np.float32)}),
        r"mlp\.up_proj\.weight has shape \[191, 64\]",
        "model.safetensors",
    ),
    "a-bias-of-the-head": (
        lambda v: v.update({"lm_head.bias": np.zeros(320, np.float32)}),
        r"tensors that the model does not use: lm_head\.bias",
        "",
    ),
    "nan-in-the-interleaved-half": (
        lambda v: v[f"{FIRST}mlp.up_proj.weight"].__setitem__((3, 5), np.nan),
        r"mlp\.up_proj\.weight\[1:2 of 2\]\[1, 5\] is not finite",
        "model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_a_bad_tensor_is_refused(name, refused):
    change, says, file = TENSORS[name]
    refused(says, tensors(change), file)


def vocabulary(content: bytes | None) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        if content is not None:
            (folder / VOCABULARY).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("content", "says", "file"),
    (
        (None, f"no tokenizer.json and no {VOCABULARY}", ""),
        (b"", "no token for byte 0", VOCABULARY),
        (b"IQ== 0\nIg== 2\n", ":2: not a token in base64 and its rank 1: 'Ig== 2'", VOCABULARY),
        (b"IQ== 0\n????\n", ":2: not a token", VOCABULARY),
        (b"IQ== 0\nIQ== 1\n", ":2: the token of rank 0 again", VOCABULARY),
    ),
    ids=("none", "empty", "rank", "base64", "twice"),
)
def test_a_bad_vocabulary_is_refused(content, says, file, refused):
    refused(says, vocabulary(content), file)


def test_a_vocabulary_beyond_the_embedding_is_refused(refused, data):
    content = (data / "data" / "tokenizers" / "phi-3-small" / VOCABULARY).read_bytes()
    refused("100352 ids, but the embedding has 320 rows", vocabulary(content), VOCABULARY)


def test_a_vocabulary_of_another_model_is_not_taken_for_its_tokenizer(refused):
    def damage(folder: Path) -> None:
        vocabulary(b"IQ== 0\n")(folder)
        with_keys({"model_type": "llama", "hidden_act": "silu", "intermediate_size": 96})(folder)

    refused("unknown key", damage, "")
