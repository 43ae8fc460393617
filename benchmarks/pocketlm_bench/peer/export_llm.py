"""executorch's export_llm on a checkpoint of the shape of Qwen2, and its ``.pte``; runs in its environment.

``python -m pocketlm_bench.peer.export_llm convert CHECKPOINT FOLDER`` writes what export_llm reads; with a JSON object
of settings as its one argument it measures.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm_bench.peer.rates import Settings, main

__all__ = ["convert", "export_arguments"]

# Meta's names, which export_llm's transformer has.
NAMES = {
    "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip


def convert(checkpoint: Path, folder: Path) -> None:
    """Write ``weights.pth`` and ``params.json``. Raises ``SystemExit`` for another model_type than qwen2."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen2":
        raise SystemExit(f"no conversion for export_llm for model_type {config['model_type']!r}: qwen2 only")
    weights = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for source, tensor in load_file(file).items():
            name = source.removeprefix("model.")
            for theirs, meta in NAMES.items():
                name = name.replace(f"{theirs}.", f"{meta}.")
            weights[name] = tensor
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "weights.pth")
    rope = config.get("rope_parameters") or config
    parameters = {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "vocab_size": config["vocab_size"],
        "use_scaled_rope": False,
        "use_hf_rope": True,
        "attention_qkv_bias": True,
    }
    (folder / "params.json").write_text(json.dumps(parameters), encoding="utf-8")


def export_arguments(folder: Path, output: Path, context: int) -> Sequence[str]:
    """What follows ``python``: 8da4w in groups of 32 for XNNPACK, embedding 4 bits in groups of 32."""
    return (
        *("-m", "executorch.extension.llm.export.export_llm", "base.model_class=qwen2_5_0_5b"),
        *(f"base.checkpoint={folder / 'weights.pth'}", f"base.params={folder / 'params.json'}"),
        *("model.dtype_override=fp32", "model.use_kv_cache=True", "model.use_sdpa_with_kv_cache=True"),
        *("quantization.qmode=8da4w", "quantization.group_size=32", 'quantization.embedding_quantize="4,32"'),
        *("backend.xnnpack.enabled=True", "backend.xnnpack.extended_ops=True"),
        *(f"export.max_seq_length={context}", f"export.max_context_length={context}"),
        *(f"export.output_dir={output.parent}", f"export.output_name={output.stem}"),
        f"hydra.run.dir={folder}",  # its log would lie where we are
    )


class ModuleDecoder:
    """A ``.pte`` through ExecuTorch's Python binding, without a runner."""

    def __init__(self, settings: Settings) -> None:
        # Importing them registers their kernels.
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(1)
        self._module: Any = portable_lib._load_for_executorch(settings.artifact)
        self._position = 0

    def begin(self) -> None:
        self._position = 0

    def prefill(self, tokens: list[int]) -> int:
        import torch

        inputs = (torch.tensor([tokens]), torch.tensor([self._position]))
        (logits,) = self._module.run_method("forward", inputs)
        self._position += len(tokens)
        return int(np.argmax(logits.numpy().reshape(-1, logits.shape[-1])[-1]))

    def step(self, token: int) -> int:
        return self.prefill([token])


def _load(settings: Settings) -> tuple[ModuleDecoder, str]:
    import importlib.metadata

    return ModuleDecoder(settings), f"export_llm over executorch {importlib.metadata.version('executorch')}"


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(_load)
