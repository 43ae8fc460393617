"""A Q4_0 GGUF file of a checkpoint, embedding and head Q4_0 too: ``python -m pocketlm_bench.peer.gguf_file IN OUT``.

Runs in llama.cpp's environment. llama.cpp's own converter refuses a tokenizer that it does not know, and those of
random checkpoints are such; here is no tokenizer at all, and quantization is that of the gguf package. Names of tensors
and keys are gguf's; the order of rows that llama.cpp wants is that of convert_hf_to_gguf.py's ``LlamaModel.permute``.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["write_gguf"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
BLOCK_ROWS = 4096
# numpy has no bfloat16: its bits are the upper half of a float32.
STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def write_gguf(checkpoint: Path, output: Path) -> None:
    """Raises ``SystemExit`` with one sentence for a checkpoint whose mathematics this does not convert."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture = _architecture(config)
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), layers)
    writer = gguf.GGUFWriter(output, architecture)
    _add_configuration(writer, config)

    tensors = {}
    for source, tensor in _stored_tensors(checkpoint):
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise SystemExit(f"{checkpoint}: llama.cpp has no place for {source}")
        matrix = len(tensor.shape) == 2
        kind = gguf.GGMLQuantizationType.Q4_0 if matrix else gguf.GGMLQuantizationType.F32
        size = int(np.prod(tensor.shape)) * 18 // 32 if matrix else 4 * tensor.shape[0]  # 32 weights in 18 bytes
        dtype = np.dtype(np.uint8 if matrix else np.float32)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if matrix else tensor.shape
        writer.add_tensor_info(name, shape, dtype, size, raw_dtype=kind)
        tensors[source] = tensor

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source, tensor in tensors.items():
        blocks = _permuted(source, tensor, config) if architecture == "llama" else _blocks(tensor)
        if len(tensor.shape) == 2:
            blocks = (gguf.quants.quantize(block, gguf.GGMLQuantizationType.Q4_0) for block in blocks)
        writer.write_tensor_data(np.concatenate(list(blocks)))
    writer.close()


def _architecture(config: Mapping[str, Any]) -> str:
    model_type = config["model_type"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if model_type not in ARCHITECTURES:
        raise SystemExit(f"no conversion to GGUF for model_type {model_type!r}: {', '.join(ARCHITECTURES)}")
    if scaling != "default":
        raise SystemExit(f"no conversion to GGUF for rope_type {scaling!r}: default only")
    return ARCHITECTURES[model_type]


def _add_configuration(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _stored_tensors(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    from gguf.utility import SafetensorsLocal

    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{checkpoint}: no .safetensors file")
    for file in files:
        yield from SafetensorsLocal(file).tensors.items()


def _blocks(tensor: Any) -> Iterator[npt.NDArray[np.float32]]:
    """Float32, by blocks of rows; a vector is one block."""
    if tensor.dtype not in STORED:
        raise SystemExit(f"no conversion to GGUF for tensors stored as {tensor.dtype}: {', '.join(STORED)}")
    stored = tensor.mmap_bytes().view(STORED[tensor.dtype]).reshape(tensor.shape)
    rows = BLOCK_ROWS if stored.ndim == 2 else len(stored)
    for start in range(0, len(stored), rows):
        block = np.asarray(stored[start : start + rows])
        if tensor.dtype == "BF16":
            yield (block.astype(np.uint32) << 16).view(np.float32)
        else:
            yield block.astype(np.float32)


def _permuted(source: str, tensor: Any, config: Mapping[str, Any]) -> Iterator[npt.NDArray[np.float32]]:
    """llama.cpp's ``llama`` rotates neighbours, Hugging Face's halves: rows of queries and keys change places."""
    heads = config["num_attention_heads"]
    counts = {"q_proj": heads, "k_proj": config.get("num_key_value_heads", heads)}
    count = next((count for name, count in counts.items() if f".{name}." in source), None)
    if count is None:
        yield from _blocks(tensor)
        return
    whole = np.concatenate(list(_blocks(tensor)))
    halves = whole.reshape(count, 2, len(whole) // count // 2, *whole.shape[1:])
    yield halves.swapaxes(1, 2).reshape(whole.shape)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
