"""LoRA adapters, made by PEFT as users make them."""

from pathlib import Path
from typing import Any

import torch

__all__ = ["write_adapter"]


def write_adapter(base: Path, folder: Path, dtype: str = "float32", **options: Any) -> torch.nn.Module:
    """Write an adapter of ``base`` with PEFT, every factor random; returns the merged model in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options}))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_((0.1 * torch.randn_like(parameter)).to(getattr(torch, dtype)))
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval()
