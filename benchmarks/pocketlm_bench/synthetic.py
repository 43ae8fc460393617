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
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from pocketlm.cli.console import reported
from pocketlm.errors import InputError
from pocketlm_bench.shapes import SHAPES, shape_named
from pocketlm_bench.synthetic_tensors import OUTLIER_CHANNELS, SyntheticTensor, synthetic_tensors

__all__ = ["checkpoint_bytes", "write_checkpoint"]

SHARD_BYTES = 5_000_000_000
BLOCK_VALUES = 1 << 22

ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Values of a standard normal distribution, one for each 16-bit number: a table costs a tenth of drawing them.
STANDARD_NORMAL = np.array([NormalDist().inv_cdf((index + 0.5) / 65536) for index in range(65536)], np.float32)


def checkpoint_bytes(name: str, layers: int | None = None) -> int:
    """Bytes of the weights of ``name``."""
    return sum(tensor.size for tensor in synthetic_tensors(shape_named(name, layers)).values())


def write_checkpoint(config: Mapping[str, Any], folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a checkpoint of ``config`` (of any supported ``model_type``) into ``folder``, which may not exist yet.

    Raises :class:`InputError` for a folder that holds something, and for one whose disk is too small.
    """
    tensors = synthetic_tensors(config)
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


def _shards(tensors: Mapping[str, SyntheticTensor], limit: int) -> list[dict[str, SyntheticTensor]]:
    """The tensors in files of at most ``limit`` bytes, or of one tensor that is larger."""
    shards: list[dict[str, SyntheticTensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if shards[-1] and tensor.size > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.size
    return shards


def _write_shard(
    path: Path, tensors: Mapping[str, SyntheticTensor], outliers: npt.NDArray[np.int64], seed: int
) -> None:
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


def _blocks(
    name: str, tensor: SyntheticTensor, outliers: npt.NDArray[np.int64], seed: int
) -> Iterator[npt.NDArray[np.uint16]]:
    """The tensor's values as bfloat16 bit patterns, a block of rows at a time; they depend on seed and name alone."""
    source = np.random.PCG64(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()))
    values = tensor.mean + tensor.deviation * STANDARD_NORMAL
    ordinary = _to_bfloat16(values - tensor.offset)
    outlying = _to_bfloat16(tensor.outlier_gain * values - tensor.offset)
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, BLOCK_VALUES // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = source.random_raw(-(-count * columns // 4))  # 64 bits, four values
        index = raw.view(np.uint16)[: count * columns].reshape(count, columns)
        block = ordinary[index]
        if tensor.outlier_gain != 1.0:
            inside = outliers[(outliers >= start) & (outliers < start + count)] - start
            block[inside] = outlying[index[inside]]
        yield block


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bit patterns, rounded to the nearest; ties away from zero."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 16).astype(np.uint16)


def _write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json: special tokens at the ids that ``config``
    names, the bytes, and fillers for the rest of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    size, begin = config["vocab_size"], config.get("bos_token_id")
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    special = {} if begin is None else {begin: "<|begin|>"}
    special |= {token: f"<|end {token}|>" for token in ends[1:]} | {ends[0]: "<|end|>"}
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
            **({} if begin is None else {"bos_token": special[begin]}),
            "eos_token": special[ends[0]],
            "chat_template": TEMPLATE,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            **({} if begin is None else {"bos_token_id": begin}),
            "eos_token_id": config["eos_token_id"],
            "do_sample": False,
        },
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
