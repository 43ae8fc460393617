"""Makes the Core ML packages that PocketLM did not write, for test_coreml_interpreter.py: a program of its own.

    python coreml_torch_packages.py FOLDER

coremltools' torch frontend converts a small stateful decoder, traced and exported; coremltools.optimize compresses it.
Own process: coremltools finds its torch frontend only where torch was importable when coremltools was imported.
"""

import logging
import sys
import warnings
from pathlib import Path

sys.modules["sklearn"] = None  # type: ignore[assignment]  # importing it takes longer than all of this
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import coremltools as ct  # noqa: E402
import coremltools.optimize.coreml as cto  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, CONTEXT = 2, 64, 4, 2, 16, 96, 32
EPSILON = 2.0**-16  # exact in fp16
CALLS = (7, 2, 3)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * self.weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = Norm(), Norm()
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 128, bias=False), nn.Linear(WIDTH, 128, bias=False)
        self.down = nn.Linear(128, WIDTH, bias=False)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = HEAD_DIM // 2
    return x * cosine + torch.cat((-x[..., half:], x[..., :half]), -1) * sine


class Decoder(nn.Module):
    """``mask`` is [1, 1, new tokens, all tokens]: its width says where the new ones begin."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = Norm()
        angles = torch.arange(CONTEXT)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cosine", angles.cos().half().float(), persistent=False)
        self.register_buffer("sine", angles.sin().half().float(), persistent=False)
        self.register_buffer("k_cache", torch.zeros(LAYERS, 1, KV_HEADS, CONTEXT, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(LAYERS, 1, KV_HEADS, CONTEXT, HEAD_DIM))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        count, end = ids.shape[1], mask.shape[-1]
        begin = end - count
        x = self.embedding(ids)
        cosine, sine = self.cosine[begin:end], self.sine[begin:end]
        for i, block in enumerate(self.blocks):
            h = block.attention_norm(x)
            q = rotate(block.query(h).view(1, count, HEADS, HEAD_DIM).transpose(1, 2), cosine, sine)
            k = rotate(block.key(h).view(1, count, KV_HEADS, HEAD_DIM).transpose(1, 2), cosine, sine)
            v = block.value(h).view(1, count, KV_HEADS, HEAD_DIM).transpose(1, 2)
            self.k_cache[i, :, :, begin:end, :] = k
            self.v_cache[i, :, :, begin:end, :] = v
            keys = self.k_cache[i, :, :, :end, :].repeat_interleave(HEADS // KV_HEADS, dim=1)
            values = self.v_cache[i, :, :, :end, :].repeat_interleave(HEADS // KV_HEADS, dim=1)
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + block.output(attended.transpose(1, 2).reshape(1, count, HEADS * HEAD_DIM))
            h = block.mlp_norm(x)
            x = x + block.down(F.silu(block.gate(h)) * block.up(h))
        return F.linear(self.norm(x), self.embedding.weight)


class InfiniteMask(nn.Module):
    def forward(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(hidden > 0, float("-inf")), -1)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    decoder = Decoder().eval()
    for parameter in decoder.parameters():
        parameter.copy_(parameter.half().float())
    ids, mask = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5)
    target = {"minimum_deployment_target": ct.target.iOS18, "skip_model_load": True}
    cache_type = ct.TensorType(shape=decoder.k_cache.shape, dtype=np.float16)
    states = [ct.StateType(wrapped_type=cache_type, name=name) for name in ("k_cache", "v_cache")]
    length = ct.RangeDim(1, CONTEXT, default=1)
    traced = ct.convert(
        torch.jit.trace(decoder, (ids, mask)),
        inputs=[
            ct.TensorType(name="ids", shape=(1, length), dtype=np.int32),
            ct.TensorType(name="mask", shape=(1, 1, length, ct.RangeDim(1, CONTEXT, default=1)), dtype=np.float16),
        ],
        outputs=[ct.TensorType(name="logits")],
        states=states,
        **target,
    )
    traced.save(str(folder / "traced.mlpackage"))
    compress(traced, folder)

    decoder.k_cache.zero_()
    decoder.v_cache.zero_()
    count, end = torch.export.Dim("count", min=2, max=CONTEXT - 1), torch.export.Dim("end", min=2, max=CONTEXT - 1)
    program = torch.export.export(
        decoder, (ids, mask), dynamic_shapes={"ids": {1: count}, "mask": {2: count, 3: end}}, strict=False
    )
    exported = ct.convert(
        program.run_decompositions({}), states=states, outputs=[ct.TensorType(name="logits")], **target
    )
    exported.save(str(folder / "exported.mlpackage"))

    decoder.k_cache.zero_()
    decoder.v_cache.zero_()
    tokens = torch.randint(0, VOCABULARY, (1, sum(CALLS)), generator=torch.Generator().manual_seed(1))
    logits, position = [], 0
    for count in CALLS:
        queries = torch.arange(position, position + count)[:, None]
        mask = torch.where(torch.arange(position + count)[None] <= queries, 0.0, -30000.0)[None, None]
        logits.append(decoder(tokens[:, position : position + count], mask))
        position += count
    np.savez(
        folder / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=torch.cat(logits, 1).numpy(),
        k_cache=decoder.k_cache.numpy(),
        v_cache=decoder.v_cache.numpy(),
    )

    convolution = nn.Conv1d(4, 4, 3).eval()
    ct.convert(
        torch.jit.trace(convolution, torch.zeros(1, 4, 8)), inputs=[ct.TensorType(name="x", shape=(1, 4, 8))], **target
    ).save(str(folder / "convolution.mlpackage"))
    shape = ct.TensorType(name="scores", shape=(2, 8)), ct.TensorType(name="hidden", shape=(2, 8))
    ct.convert(
        torch.jit.trace(InfiniteMask(), (torch.zeros(2, 8), torch.zeros(2, 8))),
        inputs=list(shape),
        outputs=[ct.TensorType(name="weights")],
        **target,
    ).save(str(folder / "infinite_mask.mlpackage"))


def compress(model: ct.models.MLModel, folder: Path) -> None:
    quantizer, palettizer = cto.OpLinearQuantizerConfig, cto.OpPalettizerConfig
    blocks = {"granularity": "per_block", "block_size": 16, "weight_threshold": 64}
    groups = {"granularity": "per_grouped_channel", "group_size": 16, "weight_threshold": 64}
    configurations = {
        "int4_blocks": quantizer(mode="linear_symmetric", dtype="int4", **blocks),
        "uint4_blocks": quantizer(mode="linear", dtype="uint4", **blocks),
        "lut3": palettizer(mode="uniform", nbits=3, **groups),
        "lut6": palettizer(mode="uniform", nbits=6, weight_threshold=64),
    }
    for name, configuration in configurations.items():
        apply = cto.palettize_weights if name.startswith("lut") else cto.linear_quantize_weights
        compressed = apply(model, cto.OptimizationConfig(global_config=configuration))
        compressed.save(str(folder / f"{name}.mlpackage"))
        cto.decompress_weights(compressed).save(str(folder / f"{name}_decompressed.mlpackage"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
