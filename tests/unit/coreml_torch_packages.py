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
EXAMPLE = (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5))


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


class LayerNormDecoder(nn.Module):
    """The other family of parts: LayerNorm, learned positions, fused projections, gelu, a soft cap on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=EPSILON) for _ in range(2))
        self.fused, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)
        self.register_buffer("causal", torch.tril(torch.ones(CONTEXT, CONTEXT)).bool(), persistent=False)
        self.register_buffer("k_cache", torch.zeros(1, HEADS, CONTEXT, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(1, HEADS, CONTEXT, HEAD_DIM))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, end = ids.shape[1], mask.shape[-1]
        begin = end - count
        positions = torch.arange(CONTEXT)[begin:end]
        x = self.embedding(ids) + self.positions(positions)
        parts = self.fused(self.norms[0](x)).split(WIDTH, 2)
        q, k, v = (part.view(1, count, HEADS, HEAD_DIM).transpose(1, 2) for part in parts)
        self.k_cache[:, :, begin:end] = k
        self.v_cache[:, :, begin:end] = v
        scores = q @ self.k_cache.transpose(-1, -2) / HEAD_DIM**0.5
        weights = torch.softmax(torch.where(self.causal[positions], scores, torch.tensor(-30000.0)), -1)
        x = x + self.output((weights @ self.v_cache).transpose(1, 2).reshape(1, count, WIDTH))
        x = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        logits = 32 * torch.tanh(F.linear(x, self.embedding.weight) / 32)
        return logits, logits.argmax(-1), torch.topk(logits, 3).values


class InfiniteMask(nn.Module):
    def forward(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(hidden > 0, float("-inf")), -1)


TARGET = {"minimum_deployment_target": ct.target.iOS18, "skip_model_load": True}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    decoder, other = halved(Decoder()), halved(LayerNormDecoder())
    traced = convert_traced(decoder, ("logits",))
    traced.save(str(folder / "traced.mlpackage"))
    compress(traced, folder)
    convert_exported(decoder).save(str(folder / "exported.mlpackage"))
    convert_traced(other, ("logits", "best", "top")).save(str(folder / "layer_norm.mlpackage"))
    tokens = torch.randint(0, VOCABULARY, (1, sum(CALLS)), generator=torch.Generator().manual_seed(1))
    for name, module in (("decoder", decoder), ("layer_norm", other)):
        np.savez(folder / f"{name}.npz", **run(module, tokens))

    ct.convert(
        torch.jit.trace(nn.Conv1d(4, 4, 3).eval(), torch.zeros(1, 4, 8)),
        inputs=[ct.TensorType(name="x", shape=(1, 4, 8))],
        **TARGET,
    ).save(str(folder / "convolution.mlpackage"))
    ct.convert(
        torch.jit.trace(InfiniteMask(), (torch.zeros(2, 8), torch.zeros(2, 8))),
        inputs=[ct.TensorType(name=name, shape=(2, 8)) for name in ("scores", "hidden")],
        outputs=[ct.TensorType(name="weights")],
        **TARGET,
    ).save(str(folder / "infinite_mask.mlpackage"))


def halved(module: nn.Module) -> nn.Module:
    """With parameters that fp16 holds exactly, so that the package's weights are the module's."""
    for parameter in module.parameters():
        parameter.copy_(parameter.half().float())
    return module.eval()


def empty_states(module: nn.Module) -> list[ct.StateType]:
    module.k_cache.zero_()
    module.v_cache.zero_()
    cache = ct.TensorType(shape=module.k_cache.shape, dtype=np.float16)
    return [ct.StateType(wrapped_type=cache, name=name) for name in ("k_cache", "v_cache")]


def convert_traced(module: nn.Module, outputs: tuple[str, ...]) -> ct.models.MLModel:
    length, width = ct.RangeDim(1, CONTEXT, default=1), ct.RangeDim(1, CONTEXT, default=1)
    return ct.convert(
        torch.jit.trace(module, EXAMPLE, check_trace=False),
        inputs=[
            ct.TensorType(name="ids", shape=(1, length), dtype=np.int32),
            ct.TensorType(name="mask", shape=(1, 1, length, width), dtype=np.float16),
        ],
        outputs=[ct.TensorType(name=name) for name in outputs],
        states=empty_states(module),
        **TARGET,
    )


def convert_exported(module: nn.Module) -> ct.models.MLModel:
    states = empty_states(module)
    count, end = torch.export.Dim("count", min=2, max=CONTEXT - 1), torch.export.Dim("end", min=2, max=CONTEXT - 1)
    program = torch.export.export(
        module, EXAMPLE, dynamic_shapes={"ids": {1: count}, "mask": {2: count, 3: end}}, strict=False
    )
    outputs = [ct.TensorType(name="logits")]
    return ct.convert(program.run_decompositions({}), states=states, outputs=outputs, **TARGET)


def run(module: nn.Module, tokens: Tensor) -> dict[str, np.ndarray]:
    empty_states(module)
    logits, position = [], 0
    for count in CALLS:
        queries = torch.arange(position, position + count)[:, None]
        mask = torch.where(torch.arange(position + count)[None] <= queries, 0.0, -30000.0)[None, None]
        result = module(tokens[:, position : position + count], mask)
        logits.append(result[0] if isinstance(result, tuple) else result)
        position += count
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": torch.cat(logits, 1).numpy(),
        "k_cache": module.k_cache.numpy(),
        "v_cache": module.v_cache.numpy(),
    }


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
