"""Train PocketLM's demo model: a small Llama-architecture model of Python code, on Python's own standard library.

    python mobile_demo/model/train.py --output mobile_demo/model/checkpoint
    python mobile_demo/model/train.py --evaluate mobile_demo/model/checkpoint

The text is the standard library of the Python that runs this script, less the modules in HELD_OUT. Every file is read
as it is, and every function with a docstring is read once more as a turn of a chat: signature and docstring from the
user, body from the assistant.
"""

import ast
import copy
import lzma
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

STANDARD_LIBRARY = Path(os.__file__).parent

HELD_OUT = (
    "bisect.py",
    "calendar.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "json/__init__.py",
    "json/decoder.py",
    "json/encoder.py",
    "json/scanner.py",
    "json/tool.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)
"""Files of the standard library that neither the tokenizer nor the model is trained on."""

SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"})
"""Third-party code, tests (they repeat the modules that they test, held-out ones too), and folders of tables."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM_TURN = "You write the body of a Python function."

# Qwen2's split: single digits, runs of indentation kept together; a pattern that every runtime's tokenizer knows.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)

VOCABULARY = 4096
CONTEXT = 1024
ROWS_PER_STEP = 8
WARM_UP_STEPS = 50
SAVE_EVERY_STEPS = 200
LONGEST_TURNS = 1500
EVALUATION_STRIDE = 512


@dataclass(frozen=True)
class Document:
    """One training text; a chat's special tokens are written out in it."""

    text: str
    is_chat: bool


def training_files() -> list[Path]:
    """The standard library's sources, sorted, without HELD_OUT and SKIPPED_FOLDERS."""
    return [
        path
        for path in sorted(STANDARD_LIBRARY.rglob("*.py"))
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(STANDARD_LIBRARY).parts[:-1])
        and path.relative_to(STANDARD_LIBRARY).as_posix() not in HELD_OUT
        and not path.name.startswith("_sysconfigdata")
    ]


def held_out_files() -> list[Path]:
    """The files of HELD_OUT that this Python has."""
    return [path for name in HELD_OUT if (path := STANDARD_LIBRARY / name).is_file()]


def documents() -> list[Document]:
    """Every training file, and the chats made from its functions."""
    found = []
    for path in training_files():
        source = path.read_text(encoding="utf-8", errors="strict")
        found.append(Document(source, is_chat=False))
        turns = list(function_turns(source))
        for start in range(0, len(turns), 2):
            found.append(Document(chat(turns[start : start + 2], len(found)), is_chat=True))
    return found


def function_turns(source: str) -> Iterator[tuple[str, str]]:
    """(signature and docstring, body) of each function that has both, dedented to the function's own column.

    Pairs of more than LONGEST_TURNS characters are left out: chats of two pairs fit in the context, and are about a
    fifth of the data.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        docstring, *body = node.body
        if not body or docstring.end_lineno is None or body[-1].end_lineno is None:
            continue
        first, split, last = node.lineno - 1, docstring.end_lineno, body[-1].end_lineno
        question, answer = dedent(lines[first:split], node.col_offset), dedent(lines[split:last], node.col_offset)
        if len(question) + len(answer) <= LONGEST_TURNS:
            yield question, answer


def dedent(lines: list[str], columns: int) -> str:
    """The lines moved left by `columns` where they have that many blanks, without blank lines at either end."""
    moved = [line[columns:] if not line[:columns].strip() else line for line in lines]
    return "".join(line if line.strip() else "\n" for line in moved).strip("\n")


def chat(turns: list[tuple[str, str]], number: int) -> str:
    """The turns as CHAT_TEMPLATE renders them; every fourth chat opens with SYSTEM_TURN."""
    messages = [("system", SYSTEM_TURN)] if number % 4 == 0 else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in messages)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY ids, the special tokens first."""
    special = [END_OF_TEXT, TURN_START, TURN_END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, its stop ids and sampling defaults set."""
    end_of_text, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=turn_end,
        pad_token_id=end_of_text,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        # The projections that write to the residual start at zero, so that each layer starts as the identity.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[end_of_text, turn_end],
        pad_token_id=end_of_text,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    return model


def batches(documents_as_ids: list[list[int]], generator: random.Random) -> Iterator[torch.Tensor]:
    """Endless int64 [ROWS_PER_STEP, CONTEXT + 1]: the documents, shuffled anew for each pass, packed end to end."""
    rows_size = ROWS_PER_STEP * CONTEXT
    stream: list[int] = []
    while True:
        for document in generator.sample(documents_as_ids, len(documents_as_ids)):
            stream += document
            while len(stream) > rows_size:
                flat, stream = torch.tensor(stream[: rows_size + 1]), stream[rows_size:]
                yield torch.cat([flat[:-1].view(-1, CONTEXT), flat[CONTEXT::CONTEXT, None]], dim=1)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    embedding = [p for name, p in model.named_parameters() if "embed_tokens" in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(
            [{"params": embedding, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
            lr=3e-3,
            betas=(0.9, 0.95),
        ),
    ]


def learning_rate_factor(step: int, progress: float) -> float:
    """Linear warm-up over WARM_UP_STEPS, then a cosine over `progress` (0 to 1) down to 2%."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def train(output: Path, steps: int, minutes: float, seed: int) -> None:
    """Train for `steps`, or until `minutes` have passed: a run that the clock cut short is not reproducible."""
    torch.manual_seed(seed)
    texts = documents()
    chat_bytes = sum(len(document.text.encode()) for document in texts if document.is_chat)
    total_bytes = sum(len(document.text.encode()) for document in texts)
    print(f"{len(texts)} documents, {total_bytes:,} bytes, {chat_bytes / total_bytes:.1%} of them chats")

    tokenizer = train_tokenizer([document.text for document in texts if not document.is_chat])
    model = new_model(tokenizer)
    save(model, tokenizer, output)
    ids = tokenizer([END_OF_TEXT + document.text for document in texts], verbose=False)["input_ids"]
    tokens = sum(map(len, ids))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{tokens:,} tokens, {total_bytes / tokens:.2f} bytes each; {parameters:,} parameters", flush=True)

    data = batches(ids, random.Random(seed))
    running = optimizers(model)
    peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in running]
    model.train()
    start, done = time.monotonic(), 0
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            print(f"{minutes} minutes are over")
            break
        rows = next(data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peaks in zip(running, peak_rates, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor(step, progress)
            optimizer.step()
            optimizer.zero_grad()
        done += 1
        if step % 10 == 0:
            seconds = time.monotonic() - start
            print(f"step {step}/{steps} {seconds:.0f} s loss {loss.item():.3f} ({progress:.1%})", flush=True)
        if step and step % SAVE_EVERY_STEPS == 0:
            save(model, tokenizer, output)
    save(model, tokenizer, output)
    print(f"{done} steps, {done * ROWS_PER_STEP * CONTEXT:,} tokens, {time.monotonic() - start:.0f} s")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the checkpoint in bf16; `model` keeps its fp32 weights."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.inference_mode()
def model_bits(checkpoint: Path, texts: list[str]) -> list[float]:
    """Bits that the checkpoint, computed in fp32, spends on each text.

    A text starts after an end-of-text token, and every token is predicted from at least CONTEXT - EVALUATION_STRIDE
    tokens before it, or from the text's beginning.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    bits = []
    for text in texts:
        ids = torch.tensor(tokenizer(END_OF_TEXT + text, verbose=False)["input_ids"])
        nats, scored = 0.0, 1
        while scored < len(ids):
            end = min(len(ids), CONTEXT if scored == 1 else scored + EVALUATION_STRIDE)
            window = ids[max(0, end - CONTEXT) : end]
            logits = model(window[None, :-1], use_cache=False).logits[0]
            targets = window[1:]
            new = end - scored
            nats += torch.nn.functional.cross_entropy(logits[-new:], targets[-new:], reduction="sum").item()
            scored = end
        bits.append(nats / math.log(2))
    return bits


def xz_bits(content: bytes) -> int:
    """Bits of the content's `xz -9 --extreme` file."""
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def evaluate(checkpoint: Path) -> None:
    """Print bits per byte of every held-out file and of all together, by the model and by xz."""
    contents = [path.read_bytes() for path in held_out_files()]
    by_model = model_bits(checkpoint, [content.decode() for content in contents])
    by_xz = [xz_bits(content) for content in contents]
    print(f"{'held-out file':<20} {'bytes':>8} {'model':>7} {'xz -9e':>7}")
    for path, content, model, xz in zip(held_out_files(), contents, by_model, by_xz, strict=True):
        name, size = path.relative_to(STANDARD_LIBRARY).as_posix(), len(content)
        print(f"{name:<20} {size:>8} {model / size:>7.3f} {xz / size:>7.3f}")
    size, together = sum(map(len, contents)), xz_bits(b"".join(contents))
    print(f"{'all, one by one':<20} {size:>8} {sum(by_model) / size:>7.3f} {sum(by_xz) / size:>7.3f}")
    print(f"{'all, concatenated':<20} {size:>8} {sum(by_model) / size:>7.3f} {together / size:>7.3f}")


def main(
    output: Annotated[Path, typer.Option(help="Folder that the checkpoint is written to.")] = Path("checkpoint"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of 8,192 tokens.")] = 1500,
    minutes: Annotated[float, typer.Option(help="Wall-clock limit; the schedule ends in time for it.")] = math.inf,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the documents' order.")] = 0,
    evaluate_checkpoint: Annotated[
        Path | None, typer.Option("--evaluate", help="Train nothing; measure this checkpoint on the held-out files.")
    ] = None,
    held_out_text: Annotated[
        Path | None, typer.Option(help="Train nothing; write the held-out files, one behind the other, to this file.")
    ] = None,
) -> None:
    """Train the demo model, or with --evaluate measure a checkpoint."""
    if held_out_text is not None:
        held_out_text.parent.mkdir(parents=True, exist_ok=True)
        held_out_text.write_bytes(b"".join(path.read_bytes() for path in held_out_files()))
    elif evaluate_checkpoint is not None:
        evaluate(evaluate_checkpoint)
    else:
        train(output, steps, minutes, seed)


if __name__ == "__main__":
    typer.run(main)
