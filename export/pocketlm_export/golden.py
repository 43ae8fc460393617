"""Golden vectors: what every reader of a bundle must reproduce. The three files are described in FORMAT.md."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import TemplateError
from pocketlm.session import Session
from pocketlm.template import ChatTemplate
from pocketlm.tokenizer import Tokenizer
from pocketlm_export.checkpoint.text import TextFiles
from pocketlm_export.golden_texts import CONVERSATIONS, PROMPTS, TEXTS
from pocketlm_export.graph.graph import Graph
from pocketlm_export.quantization.weights import Weights

__all__ = ["write_golden"]

NOW = datetime(2025, 1, 31, 12, 0, 0)  # for templates that write the date
STEPS = 24
LARGEST_REPLAYED = 32_000_000  # weights; the reference holds them all, 8 bytes each

Record = Mapping[str, Any]


def write_golden(folder: Path, text: TextFiles, graph: Graph, weights: Weights) -> None:
    """Write tokenizer.jsonl, chat.jsonl where there is a template, and replay.jsonl into ``folder``."""
    _write(folder / "tokenizer.jsonl", [_tokenized(text.tokenizer, string) for string in TEXTS])
    if text.template is not None:
        _write(folder / "chat.jsonl", [_rendered(text.template, *conversation) for conversation in CONVERSATIONS])
    prompts = _prompts(text, graph.context_length)
    elements = sum(math.prod(weight.shape) for weight in graph.weights().values())
    if elements <= LARGEST_REPLAYED:
        prompts = _replayed(prompts, graph, weights)
    _write(folder / "replay.jsonl", prompts)


def _write(path: Path, records: Iterable[Record]) -> None:
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _tokenized(tokenizer: Tokenizer, text: str) -> Record:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return {
        "text": text,
        "ids": ids,
        "ids_with_special": tokenizer.encode(text, add_special_tokens=True),
        "decoded": tokenizer.decode(ids, skip_special_tokens=True),
    }


def _rendered(template: ChatTemplate, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]) -> Record:
    record = {"messages": list(messages), "arguments": dict(arguments), "now": NOW.isoformat()}
    given = {key: value for key, value in arguments.items() if key != "add_generation_prompt"}
    prompted = bool(arguments.get("add_generation_prompt", True))
    try:
        text = template.render(messages, arguments=given, add_generation_prompt=prompted, now=NOW)
    except TemplateError:
        return {**record, "error": True}
    return {**record, "text": text}


def _prompts(text: TextFiles, context_length: int) -> list[dict[str, Any]]:
    """The prompts that fit with the steps that follow them, as text and as tokens."""
    encoded = [(prompt, text.tokenizer.encode(prompt, add_special_tokens=True)) for prompt in PROMPTS]
    if text.template is not None:
        chat = text.template.render([{"role": "user", "content": "What is the capital of France?"}], now=NOW)
        encoded.append((chat, text.tokenizer.encode(chat, add_special_tokens=False)))
    return [{"prompt": prompt, "prompt_ids": ids} for prompt, ids in encoded if 0 < len(ids) <= context_length - STEPS]


def _replayed(prompts: list[dict[str, Any]], graph: Graph, weights: Weights) -> list[dict[str, Any]]:
    """The greedy continuation of each prompt by the float64 reference over the bundle's weights."""
    if not prompts:
        return []
    import torch

    from pocketlm_export.verify.reference import ReferenceSession

    # Shorter caches than the artifacts': a position never reads what lies behind it.
    longest = min(graph.context_length, STEPS + max(len(prompt["prompt_ids"]) for prompt in prompts))
    with ReferenceSession(replace(graph, context_length=longest), weights, torch.float64) as session:
        return [{**prompt, **_greedy(session, prompt["prompt_ids"])} for prompt in prompts]


def _greedy(session: Session, prompt: Sequence[int]) -> Record:
    session.rewind(0)
    tokens: list[int] = []
    margins, deviations = [], []
    logits = session.extend(prompt)[0].astype(np.float64)
    while True:
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(np.argmax(logits)))
        margins.append(float(first - second))
        deviations.append(float(logits.std()))
        if len(tokens) == STEPS:
            break
        logits = session.extend(tokens[-1:])[0].astype(np.float64)
    # Two decimals are the same on every machine; the bits of a sum are not.
    return {
        "tokens": tokens,
        "margins": [round(margin, 2) for margin in margins],
        "deviation": round(float(np.mean(deviations)), 2),
    }
