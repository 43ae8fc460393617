"""An adapter at export: merged block by block, it is what PEFT merges; what can't be merged is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import pocketlm
from pocketlm.errors import CheckpointError, InputError, UnsupportedError
from pocketlm_export.architectures import build_graph
from pocketlm_export.checkpoint.adapter import with_adapter
from pocketlm_export.checkpoint.checkpoint import Tensors, open_checkpoint
from pocketlm_export.checkpoint.low_rank import LowRankChange
from pocketlm_export.checkpoint.tensors import TensorFile
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.selection import RowSelection
from pocketlm_export.verify.reference import ReferenceSession
from tests.peft_adapter import write_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS = list(range(5, 45))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def reference_logits(base: Path, adapter: Path, store: Path) -> np.ndarray:
    checkpoint = with_adapter(open_checkpoint(base), adapter)
    graph = build_graph(checkpoint.config, 64)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "fp32", "int8"), WeightStore(store))
    return ReferenceSession(graph, weights).all_logits(TOKENS)


CASES = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "rank-stabilized": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "qwen3",
        {
            "target_modules": [*ATTENTION, "gate_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"model\.layers\.1.*gate_proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32, "down_proj": 1},
        },
    ),
    "some-layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    "one-layer-by-number": ("llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    "excluded": ("llama", {"target_modules": ATTENTION, "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "expression": ("llama", {"target_modules": r".*\.(q_proj|up_proj)"}),
    "all-linear": ("qwen2-window", {"target_modules": "all-linear"}),
    "embedding-and-head": ("llama-untied-biases", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_is_what_peft_merges(case, tiny_checkpoint, tmp_path):
    row, options = CASES[case]
    base, plain = tiny_checkpoint(row)
    merged = write_adapter(base, tmp_path / "adapter", **options)
    with torch.no_grad():
        expected = merged(torch.tensor([TOKENS])).logits[0].double().numpy()
        without = plain(torch.tensor([TOKENS])).logits[0].double().numpy()
    found = reference_logits(base, tmp_path / "adapter", tmp_path / "store")
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()  # as unadapted models agree, tests/architectures
    assert np.abs(without - expected).max() > 0.1 * expected.std()


def test_factors_in_bfloat16(tiny_checkpoint, tmp_path):
    base, _ = tiny_checkpoint("llama")
    merged = write_adapter(base, tmp_path / "adapter", dtype="bfloat16", target_modules=ATTENTION)
    path = tmp_path / "adapter" / WEIGHTS
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    save({name: value.bfloat16() for name, value in load(path).items()}, path)
    with torch.no_grad():
        expected = merged(torch.tensor([TOKENS])).logits[0].double().numpy()
    found = reference_logits(base, tmp_path / "adapter", tmp_path / "store")
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


@pytest.fixture(scope="module")
def adapted(tiny_checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    base, _ = tiny_checkpoint("llama")
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(base, folder, target_modules=[*ATTENTION, "down_proj"])
    return base, folder


def test_a_bundle_is_verified_with_its_adapter_and_only_with_it(adapted, tiny_checkpoint, tmp_path):
    base, adapter = adapted
    options = {"targets": ("onnx",), "context_length": 64, "store": tmp_path / "store"}
    bundle = pocketlm.export(base, tmp_path / "bundle", adapter=adapter, oracle="transformers", **options)
    assert bundle.certificate.passed
    assert bundle.certificate.oracle.status == "passed"
    assert bundle.certificate.oracle.name == "transformers with peft"
    plain = pocketlm.export(base, tmp_path / "plain", verify=False, **options)
    assert plain.manifest.provenance.adapter_sha256 is None
    changed = {n for n, w in bundle.manifest.weights.items() if w.sha256 != plain.manifest.weights[n].sha256}
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    assert changed == {name for name in bundle.manifest.weights if any(f"{part}.weight" in name for part in modules)}

    assert pocketlm.verify(bundle, reference=base, adapter=adapter, store=tmp_path / "store").passed
    with pytest.raises(InputError, match="made with an adapter: give it with --adapter"):
        pocketlm.verify(bundle, reference=base)
    with pytest.raises(InputError, match=f"{adapter}: .* was made without an adapter"):
        pocketlm.verify(plain, reference=base, adapter=adapter)
    with pytest.raises(InputError, match="give that with --reference"):
        pocketlm.verify(bundle, adapter=adapter)
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    edit_config(other, lora_alpha=9)
    with pytest.raises(InputError, match="was made with another adapter"):
        pocketlm.verify(bundle, reference=base, adapter=other)
    other_base, _ = tiny_checkpoint("llama-outliers")
    with pytest.raises(InputError, match="not the checkpoint that"):
        pocketlm.verify(bundle, reference=other_base, adapter=adapter)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), rank=st.integers(1, 9), elements=st.integers(1, 400),
    width=st.integers(1, 6), transposed=st.booleans(), start=st.integers(0, 5),
)  # fmt: skip
def test_blocks_of_any_size_hold_the_same_bits(rows, columns, rank, elements, width, transposed, start, tmp_path):
    """Whatever is read together: an artifact, the store and the certificate read in different blocks."""
    random = np.random.default_rng(rows * columns)
    rows *= width

    def matrix(*shape: int) -> np.ndarray:
        values = random.normal(size=shape[::-1] if transposed else shape).astype(np.float32)
        return np.ascontiguousarray(values)

    base = random.normal(size=(rows, columns)).astype(np.float32)
    save_file({"w.weight": base}, tmp_path / "base.safetensors")
    factors = {"left": matrix(rows, rank), "right": matrix(rank, columns)}
    save_file(factors, tmp_path / "adapter.safetensors")
    file = TensorFile(tmp_path / "base.safetensors")
    change = LowRankChange(TensorFile(tmp_path / "adapter.safetensors"), "left", "right", transposed, 0.75)
    tensors = Tensors({"w.weight": file}, {"w.weight": change})
    whole = tensors.values("w.weight")
    left, right = (value.T if transposed else value for value in factors.values())
    exact = base.astype(np.float64) + 0.75 * left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-5)

    blocks = list(tensors.blocks("w.weight", elements))
    np.testing.assert_array_equal(np.concatenate([values for _, values in blocks]), whole)
    assert [first for first, _ in blocks] == np.cumsum([0, *(len(values) for _, values in blocks)])[:-1].tolist()
    selection = RowSelection(min(start, width - 1), width, width)
    name = selection.of("w.weight")
    found = np.concatenate([values for _, values in tensors.blocks(name, elements)])
    expected = whole.reshape(-1, width, columns)[:, selection.start :].reshape(-1, columns)
    np.testing.assert_array_equal(found, expected)
    assert tensors.digest(name) != Tensors({"w.weight": file}).digest(name)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    values = load_file(folder / WEIGHTS)
    change(values)
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, folder / WEIGHTS)


def factor(layer: int, which: str, module: str = "self_attn.q_proj") -> str:
    return f"base_model.model.model.layers.{layer}.{module}.{which}.weight"


A, B = factor(0, "lora_A"), factor(0, "lora_B")
REFUSED_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "'use_dora' is set"),
    "bias": ({"bias": "all"}, "'bias' is \"all\"; supported: none"),
    "lora-bias": ({"lora_bias": True}, "'lora_bias' is set"),
    "saved-modules": ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is set"),
    "tokens": ({"trainable_token_indices": [1]}, "'trainable_token_indices' is set"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "'target_parameters' is set"),
    "replicated": ({"layer_replication": [[0, 2], [1, 3]]}, "'layer_replication' is set"),
    "fan-in": ({"fan_in_fan_out": True}, "'fan_in_fan_out' is set"),
    "loftq": ({"init_lora_weights": "loftq"}, "'init_lora_weights' is 'loftq'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'init_lora_weights' is 'pissa_niter_4'"),
    "another-method": ({"peft_type": "IA3"}, "'peft_type' is 'IA3'; supported: LORA"),
    "another-task": ({"task_type": "SEQ_CLS"}, "'task_type' is 'SEQ_CLS'"),
    "unknown-key": ({"twisted": True}, "unknown key 'twisted'.*--accept twisted"),
    "rank-zero": ({"r": 0}, "'r' must be between 1"),
    "rank-text": ({"r": "4"}, "'r' must be an integer"),
    "rank-missing": ({"r": None}, "'r' is missing"),
    "alpha-text": ({"lora_alpha": "8"}, "'lora_alpha' must be a finite number"),
    "another-rank": ({"r": 5}, r"lora_B.weight has shape \[64, 4\], but rank 5 .* ask for \[64, 5\]"),
    "pattern-of-another-rank": ({"rank_pattern": {"q_proj": 2}}, "has shape .* but rank 2"),
    "endless-pattern": ({"rank_pattern": {"(a+)+b": 2}}, "'rank_pattern': the expression '\\(a\\+\\)\\+b' is too comp"),
    "malformed-pattern": ({"alpha_pattern": {"q_proj(": 2}}, "'alpha_pattern': 'q_proj\\(' is not a regular"),
    "pattern-is-a-list": ({"rank_pattern": [1]}, "'rank_pattern' must be an object"),
    "no-targets": ({"target_modules": []}, "'target_modules' names no module"),
    "targets-a-number": ({"target_modules": 3}, "'target_modules' must be a list of names"),
    "fewer-targets": ({"target_modules": ["k_proj"]}, "adapter_config.json does not target model.layers"),
    "more-targets": (
        {"target_modules": [*ATTENTION, "down_proj", "up_proj"]},
        "no tensors for model.layers.0.mlp.up_proj, which adapter_config.json targets and the base has",
    ),
    "other-layers": ({"layers_to_transform": [1]}, "does not target model.layers.0"),
    "layers-text": ({"layers_to_transform": ["1"]}, "'layers_to_transform' must be"),
    "layers-pattern": ({"layers_pattern": "h"}, "'layers_pattern' is not 'layers'"),
}


@pytest.mark.parametrize("case", REFUSED_KEYS)
def test_a_key_that_is_not_merged_is_refused(case, adapted, tmp_path):
    changes, says = REFUSED_KEYS[case]
    base, adapter = adapted
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **changes)
    with pytest.raises(InputError, match=says) as caught:
        with_adapter(open_checkpoint(base), tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)


REFUSED_TENSORS = {
    "dora": (lambda t: t.update({factor(0, "lora_magnitude_vector"): np.ones(64, np.float32)}), "is no factor"),
    "whole-module": (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), "lm_head.weight is no factor"),
    "another-architecture": (
        lambda t: t.update({factor(0, "lora_A", "self_attn.qkv_proj"): t[A]}),
        "the base model has no matrix model.layers.0.self_attn.qkv_proj.weight: is it an adapter for another base",
    ),
    "more-layers": (lambda t: t.update({factor(9, "lora_A"): t[A]}), "no matrix model.layers.9"),
    "fewer-layers": (
        lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
        "no tensors for model.layers.2.mlp.down_proj, which",
    ),
    "a-norm": (lambda t: t.update({factor(0, "lora_A", "input_layernorm"): t[A]}), "no matrix .*input_layernorm"),
    "half-a-pair": (lambda t: t.pop(B), "its other factor is missing"),
    "another-width": (lambda t: t.update({A: t[A][:, :48]}), r"has shape \[4, 48\], but rank 4 .* ask for \[4, 64\]"),
    "integers": (lambda t: t.update({A: t[A].astype(np.int8)}), "I8 .* is no matrix of numbers"),
    "a-vector": (lambda t: t.update({A: t[A].ravel()}), "is no matrix of numbers"),
    "empty": (lambda t: t.clear(), "holds no tensors of an adapter"),
    "tied-embedding": (
        lambda t: t.update({
            "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 320), np.float32),
            "base_model.model.model.embed_tokens.lora_embedding_B": np.zeros((64, 4), np.float32),
        }),
        "does not target model.embed_tokens",
    ),
    "another-embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.base_layer.weight": np.zeros((322, 64), np.float32)}),
        "is not the base's model.embed_tokens.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused(case, adapted, tmp_path):
    damage, says = REFUSED_TENSORS[case]
    base, adapter = adapted
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_weights(tmp_path / "adapter", damage)
    with pytest.raises(InputError, match=says) as caught:
        with_adapter(open_checkpoint(base), tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)


def test_a_tied_embedding_is_refused(tiny_checkpoint, tmp_path):
    """Beside the matrix it would change the embedding alone, merged the head too."""
    base, _ = tiny_checkpoint("llama")
    write_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedError, match=r"embed_tokens.* are one matrix in this model"):
        with_adapter(open_checkpoint(base), tmp_path / "adapter")


def test_values_that_are_not_finite(adapted, tmp_path):
    base, adapter = adapted
    for value, says in ((np.nan, f"{A}.* is not finite"), (3e38, "q_proj.weight with the adapter's change is not")):
        folder = tmp_path / f"adapter-{value}"
        shutil.copytree(adapter, folder)
        edit_weights(folder, lambda t, value=value: t[A].fill(value) or t[B].fill(9))
        with pytest.raises(CheckpointError, match=says):
            pocketlm.export(base, tmp_path / "bundle", adapter=folder, targets=("onnx",), store=tmp_path / "store")
        assert not (tmp_path / "bundle").exists()


def test_what_is_no_adapter(adapted, tmp_path):
    base, adapter = adapted
    with pytest.raises(CheckpointError, match=r"nowhere/adapter_config.json: no such file"):
        with_adapter(open_checkpoint(base), tmp_path / "nowhere")
    folder = tmp_path / "pickled"
    shutil.copytree(adapter, folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin: a pickle, never loaded"):
        with_adapter(open_checkpoint(base), folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: can't be read"):
        with_adapter(open_checkpoint(base), folder)
    with pytest.raises(CheckpointError, match=r"a PEFT adapter.*--adapter .* will merge it"):
        open_checkpoint(adapter)


def test_an_accepted_key_is_ignored(adapted, tmp_path):
    base, adapter = adapted
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", twisted=True)
    assert with_adapter(open_checkpoint(base), tmp_path / "adapter", ("twisted",)).adapter == tmp_path / "adapter"
