"""A checkpoint with the shape of a real model: ``python -m pocketlm_bench.synthetic NAME FOLDER [--layers N]``.

Weights are random bfloat16 of sane scale, with a few outlier channels in the residual stream as trained models have
them; the same name, layers and seed give the same bytes. Every tensor is written in blocks, so that memory does not
grow with the model. The tokenizer has the right number of tokens: bytes, then fillers that no text reaches.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from pocketlm.cli.console import reported
from pocketlm.errors import InputError

__all__ = ["SHAPES", "shape_named", "write_checkpoint"]

# config.json of Qwen/Qwen2.5-0.5B-Instruct, meta-llama/Llama-3.2-1B-Instruct and mistralai/Mistral-7B-v0.1, as far as
# it says something about the model.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21, "tie_word_embeddings": True,
        "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16",
    },
    "Mistral-7B": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip

SHARD_BYTES = 5_000_000_000
BLOCK_VALUES = 1 << 22
BYTES_PER_VALUE = 2

OUTLIER_CHANNELS = 4  # of the residual stream; together they are about as large as all others
LOGITS_DEVIATION = 2.0

ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Values of a standard normal distribution, one for each 16-bit number: a table costs a tenth of drawing them.
STANDARD_NORMAL = np.array([NormalDist().inv_cdf((index + 0.5) / 65536) for index in range(65536)], np.float32)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Values are ``mean + deviation * normal``; ``outlier_gain`` multiplies them at the outlier channels, which are
    rows of a matrix and elements of a vector."""

    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0
    outlier_gain: float = 1.0

    @property
    def size(self) -> int:
        """Bytes in bfloat16."""
        return math.prod(self.shape) * BYTES_PER_VALUE


def shape_named(name: str, layers: int | None = None) -> dict[str, Any]:
    """The configuration of ``name``, with another number of layers if one is given."""
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}; valid: {', '.join(SHAPES)}")
    if layers is not None and layers < 1:
        raise InputError(f"--layers must be at least 1, not {layers}")
    return {**SHAPES[name], **({} if layers is None else {"num_hidden_layers": layers})}


def write_checkpoint(config: Mapping[str, Any], folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a checkpoint of ``config`` (llama, mistral or qwen2) into ``folder``, which may not exist yet.

    Raises :class:`InputError` for a folder that holds something, and for one whose disk is too small.
    """
    tensors = _tensors(config)
    needed = sum(tensor.size for tensor in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; choose another folder")
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: the weights take {needed:,} bytes, and the disk has {free:,} left")
    outliers = np.linspace(0, config["hidden_size"] - 1, OUTLIER_CHANNELS + 2).astype(int)[1:-1]
    shards = _shards(tensors, shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, outliers, seed)
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": needed}, "weight_map": places})
    _write_tokenizer(folder, config)
    _write_json(folder / "config.json", config)
    return folder


def _tensors(config: Mapping[str, Any]) -> dict[str, _Tensor]:
    """Every tensor of the model, in the order of the file. Norms keep activations near 1, and what a layer adds to the
    residual is small enough that all of them together add about 1."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]
    vocabulary = config["vocab_size"], hidden
    tied, biases = config["tie_word_embeddings"], config["model_type"] == "qwen2"
    added, outlier = (2 * layers) ** -0.5, (hidden / OUTLIER_CHANNELS) ** 0.5

    def matrix(rows: int, columns: int, gain: float = 1.0, outlier_gain: float = 1.0) -> _Tensor:
        return _Tensor((rows, columns), gain * columns**-0.5, outlier_gain=outlier_gain)

    norm = _Tensor((hidden,), 0.1, mean=1.0, outlier_gain=1 / outlier)
    head = _Tensor(vocabulary, LOGITS_DEVIATION * hidden**-0.5)
    tensors = {"model.embed_tokens.weight": head if tied else _Tensor(vocabulary, 1.0)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}input_layernorm.weight"] = norm
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if biases:
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = _Tensor((rows,), 0.1)
        tensors[f"{prefix}self_attn.o_proj.weight"] = matrix(hidden, queries, added)
        tensors[f"{prefix}post_attention_layernorm.weight"] = norm
        tensors[f"{prefix}mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = matrix(inner, hidden)
        # The outliers appear in the first layer and stay, as those of trained models do.
        tensors[f"{prefix}mlp.down_proj.weight"] = matrix(hidden, inner, added, outlier / added if layer == 0 else 1.0)
    tensors["model.norm.weight"] = norm
    if not tied:
        tensors["lm_head.weight"] = head
    return tensors


def _shards(tensors: Mapping[str, _Tensor], limit: int) -> list[dict[str, _Tensor]]:
    """The tensors in files of at most ``limit`` bytes, or of one tensor that is larger."""
    shards: list[dict[str, _Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if shards[-1] and tensor.size > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.size
    return shards


def _write_shard(path: Path, tensors: Mapping[str, _Tensor], outliers: npt.NDArray[np.int64], seed: int) -> None:
    """https://github.com/huggingface/safetensors#format"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for block in _blocks(name, tensor, outliers, seed):
                file.write(block.data)


def _blocks(name: str, tensor: _Tensor, outliers: npt.NDArray[np.int64], seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """The tensor's values as bfloat16 bit patterns, a block of rows at a time; they depend on seed and name alone."""
    source = np.random.PCG64(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()))
    ordinary = _to_bfloat16(tensor.mean + tensor.deviation * STANDARD_NORMAL)
    outlying = _to_bfloat16(tensor.outlier_gain * (tensor.mean + tensor.deviation * STANDARD_NORMAL))
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, BLOCK_VALUES // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = source.random_raw(-(-count * columns // 4))  # 64 bits, four values
        index = raw.view(np.uint16)[: count * columns].reshape(count, columns)
        values = ordinary[index]
        if tensor.outlier_gain != 1.0:
            inside = outliers[(outliers >= start) & (outliers < start + count)] - start
            values[inside] = outlying[index[inside]]
        yield values


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bit patterns, rounded to the nearest; ties away from zero."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 16).astype(np.uint16)


def _write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json: special tokens at the ids that ``config``
    names, the bytes, and fillers for the rest of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    size, begin = config["vocab_size"], config["bos_token_id"]
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    special = {begin: "<|begin|>", ends[0]: "<|end|>"}
    special |= {token: f"<|end {token}|>" for token in ends[1:]}
    free = iter(sorted(set(range(size)) - set(special), reverse=True))
    special |= {next(free): role for role in ROLES}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordinary = iter([*letters, *(f"filler{number}" for number in range(size))])
    vocabulary = {special.get(token) or next(ordinary): token for token in range(size)}

    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(special[token], special=True, normalized=False) for token in sorted(special)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[begin],
            "eos_token": special[ends[0]],
            "chat_template": TEMPLATE,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": begin, "eos_token_id": config["eos_token_id"], "do_sample": False},
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(SHAPES)}.")],
    folder: Annotated[Path, typer.Argument(help="Empty, or not there yet.")],
    layers: Annotated[int | None, typer.Option(help="Default: the model's own.")] = None,
    seed: int = 0,
) -> None:
    """Write the checkpoint."""
    with reported(debug=False):
        write_checkpoint(shape_named(name, layers), folder, seed=seed)
    print(f"{folder}: {name}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
