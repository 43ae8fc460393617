"""The Q4_0 file that llama.cpp is measured on, read back by the gguf package, which `make test-all` installs."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pocketlm_bench.peer.gguf_file import write_gguf
from tests.small_checkpoint import write_small_checkpoint

pytestmark = pytest.mark.long

LAYER = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def neighbours_to_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows 0, 2, 4, ... of each head, then 1, 3, 5, ...: from llama.cpp's order of rotated pairs to Hugging Face's."""
    by_head = matrix.reshape(heads, -1, matrix.shape[1])
    return np.concatenate([by_head[:, 0::2], by_head[:, 1::2]], axis=1).reshape(matrix.shape)


@pytest.mark.parametrize(
    ("model_type", "stored"), [("llama", np.float32), ("qwen2", np.float32), ("mistral", np.float16)]
)
def test_every_weight_is_where_llama_cpp_looks_for_it(tmp_path, model_type, stored):
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    checkpoint = write_small_checkpoint(tmp_path / "checkpoint", model_type=model_type)
    weights = {name: value.astype(stored) for name, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_gguf(checkpoint, tmp_path / "model.gguf")

    reader = GGUFReader(tmp_path / "model.gguf")
    architecture = "qwen2" if model_type == "qwen2" else "llama"
    assert reader.fields["general.architecture"].contents() == architecture
    assert reader.fields[f"{architecture}.block_count"].contents() == 2
    assert reader.fields[f"{architecture}.rope.freq_base"].contents() == 10000.0
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(2):
        names |= {f"blk.{layer}.{theirs}": f"model.layers.{layer}.{source}" for theirs, source in LAYER.items()}
    assert {tensor.name for tensor in reader.tensors} == set(names)
    for tensor in reader.tensors:
        expected = weights[names[tensor.name]].astype(np.float32)
        found = dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        if architecture == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            found = neighbours_to_halves(found, 4 if "attn_q" in tensor.name else 2)
        if expected.ndim == 1:
            assert tensor.tensor_type == GGMLQuantizationType.F32
            np.testing.assert_array_equal(found, expected)
        else:
            assert tensor.tensor_type == GGMLQuantizationType.Q4_0
            blocks, errors = expected.reshape(-1, 32), np.abs(found - expected).reshape(-1, 32)
            step = np.abs(blocks).max(1) / 8
            assert (errors.max(1) <= step * 1.01).all(), tensor.name


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3': llama, mistral, qwen2"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3': default only"),
    ],
)
def test_other_mathematics_is_refused(tmp_path, changes, needle):
    with pytest.raises(SystemExit, match=needle):
        write_gguf(write_small_checkpoint(tmp_path / "checkpoint", **changes), tmp_path / "model.gguf")
