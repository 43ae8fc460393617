"""Writes the sound inputs of the corpus: ``python -m tests.fuzz.seeds``. What fuzzing found lies beside them."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pocketlm.manifest import Manifest
from tests.fuzz.places import MODEL, WEIGHTS, sound_manifest
from tests.small_checkpoint import CONFIG, TEMPLATE, write_small_checkpoint
from tests.unit.coreml_packages import coremltools, save_package, state, tensor

CORPUS = Path(__file__).parent / "corpus"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LAYER_TYPES = ["full_attention", "sliding_attention"]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3, "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16, "rope_theta": 1e6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": LAYER_TYPES},
    "qwen3": {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "use_sliding_window": False},
}
TEMPLATES = {
    "loop": TEMPLATE,
    "macro": "{% macro m(a, b=2) %}{{ a * b }}{% endmacro %}{% for x in messages %}{{ m(x.content) }}{% endfor %}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}"
    ),
    "filters": (
        "{{ messages | map(attribute='content') | join(', ') | upper | replace('A', 'BB') | indent(2) }}"
        "{{ tools | tojson(indent=2) }}{{ '%05d' | format(3) }}{{ [1, 2] | sum }}{{ 'x'.center(9) }}"
    ),
    "refuses": "{% if messages[0].role != 'system' %}{{ raise_exception('no ' ~ messages[0]['role']) }}{% endif %}",
    "slices": "{{ messages[::-1][0]['content'][1:].strip().split('b') }}{{ range(3) | list }}{{ 2 ** 10 % 7 }}",
    "generation": "{% generation %}{{ strftime_now('%Y') }}{{ dict(a=1).items() | list }}{% endgeneration %}",
}


def _coreml() -> bytes:
    """A package with the operators of a decoder's skeleton: weights in int4, a state, a loop of shapes."""
    coremltools()
    from coremltools.converters.mil.mil import Builder, types

    codes = np.random.default_rng(0).integers(-8, 8, (8, 16)).astype(np.int8)
    codes = codes.astype(types.nptype_from_builtin(types.int4))

    def body(x: Any, token: Any, cache: Any) -> list[Any]:
        weight = Builder.constexpr_blockwise_shift_scale(data=codes, scale=np.full((8, 2), 0.25, np.float16))
        table = Builder.const(val=np.ones((8, 16), np.float16))
        y = Builder.linear(x=Builder.add(x=x, y=Builder.gather(x=table, indices=token, axis=0)), weight=weight)
        held = Builder.coreml_update_state(state=cache, value=y)
        split = Builder.reshape(x=held, shape=np.array([1, 2, 4], np.int32))
        scores = Builder.softmax(x=Builder.matmul(x=split, y=split, transpose_y=True), axis=-1)
        mixed = Builder.concat(values=[Builder.matmul(x=scores, y=split), split], axis=1)
        return [Builder.reduce_mean(x=mixed, axes=np.array([1], np.int32), keep_dims=True)]

    inputs = {
        "x": tensor((1, 16), "fp16", "x"),
        "token": tensor((1,), "int32", "token"),
        "cache": state((1, 8), "cache"),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = save_package(Path(folder) / "seed.mlpackage", {"main": (inputs, body)})
        weights, model = (path / WEIGHTS).read_bytes(), (path / MODEL).read_bytes()
    return len(weights).to_bytes(4, "little") + weights + model


def _pte() -> bytes:
    """A decoder of one layer."""
    import pocketlm

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_small_checkpoint(root / "source", num_hidden_layers=1)
        bundle = pocketlm.export(
            source, root / "bundle", targets=("executorch",), context_length=4, store=root / "store", verify=False
        )
        return (bundle.folder / "executorch" / "model.pte").read_bytes()


def _session() -> bytes:
    """Two generations of the model of :func:`sound_manifest`."""
    step = {"kind": "step", "ids": [7, 5, 299], "logits": [3.5, 3.25, -1.0], "log_sum": 4.5, "deviation": 0.75}
    sequence = {
        "kind": "sequence", "prompt": "ab", "prompt_ids": [3, 4], "tokens": [7, 5], "finish_reason": "length",
        "sampling": {
            "temperature": 0.5, "top_k": 50, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.1, "seed": 3,
        },
    }  # fmt: skip
    head = {
        "kind": "session", "format_version": "1.0", "manifest_sha256": "0" * 64,
        "model_sha256": Manifest.model_validate(sound_manifest()).model_sha256(),
        "runtime": {"name": "onnx", "version": "1.23", "build": ""}, "pocketlm": "0.1.0",
        "machine": {"system": "Linux"}, "date": "2025-01-31T12:00:00+00:00",
    }  # fmt: skip
    lines = [head, sequence, step, step, {**sequence, "finish_reason": None, "tokens": [5]}, step]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _tokenizer() -> bytes:
    """Byte fallback, a normalizer, and a template around the text."""
    special = {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{**special, "special": True}],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "_"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
                ],
            },
            "pre_tokenizer": {"type": "Digits", "individual_digits": True},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, text],
                "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
            },
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE", "unk_token": "<s>", "byte_fallback": True, "fuse_unk": False,
                "vocab": {"<s>": 0, "<0xC3>": 1, "<0xB6>": 2, "l": 3, "o": 4, "lo": 5, "_": 6, "H": 7},
                "merges": [["l", "o"]],
            },
        }
    ).encode()  # fmt: skip


def sound() -> Iterator[tuple[str, str, bytes]]:
    """``(target, name, content)``."""
    for name, changes in CONFIGURATIONS.items():
        yield "config", name, json.dumps({**CONFIG, "model_type": name, **changes}).encode()
    tensors = {
        "a": np.ones((4, 3), np.float32),
        "b": np.zeros(5, np.float16),
        "c": np.zeros((0, 2), np.float32),
        "d": np.arange(4, dtype=np.int8),
    }
    yield "safetensors", "four", save(tensors, metadata={"format": "pt"})
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
    yield "index", "two", json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}).encode()
    yield "manifest", "onnx", json.dumps(sound_manifest()).encode()
    yield "coreml", "decoder", _coreml()
    yield "pte", "layer", _pte()
    yield "session", "two", _session()
    yield "tokenizer", "fallback", _tokenizer()
    for name, text in TEMPLATES.items():
        yield "template", name, text.encode()


if __name__ == "__main__":
    for target, name, content in sound():
        path = CORPUS / target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
