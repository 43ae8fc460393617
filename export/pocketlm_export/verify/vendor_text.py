"""Asks a vendor's tokenizer, in a process of its own: what aborts there must not end the verification."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm_export.verify import vendor_process
from pocketlm_export.verify.golden_questions import Answer, Chat, Kind, Question, Refused

__all__ = ["VENDORS", "Told", "Vendor", "ask_vendor"]

LONGEST_RUN = 60.0  # seconds; all golden vectors of a large tokenizer take two


@dataclass(frozen=True, slots=True)
class Vendor:
    """An implementation that reads the folder of ``target``: its package, the module to import, what it can do.

    None is asked to add special tokens: both vendors' runners leave that to the template.
    """

    package: str
    module: str
    target: str
    kinds: tuple[Kind, ...]


VENDORS = (
    Vendor(
        "onnxruntime-genai",
        "onnxruntime_genai",
        "onnx",
        ("encode", "decode", "render", "encode what was rendered"),
    ),
    Vendor("pytorch_tokenizers", "pytorch_tokenizers", "executorch", ("encode", "decode", "encode what was rendered")),
)


@dataclass(frozen=True, slots=True)
class Told:
    """The answers, in the order of the questions; fewer of them where there was ``trouble``."""

    answers: list[Answer]
    trouble: str | None


def ask_vendor(vendor: Vendor, folder: Path, questions: Sequence[Question], *, seconds: float = LONGEST_RUN) -> Told:
    """Ask ``vendor``'s tokenizer over ``folder``, for so many ``seconds`` at most.

    An error of its code is a :class:`Refused` answer or, where it ends the process or does not end, the trouble.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "questions.jsonl"), Path(scratch, "answers.jsonl")
        asked.write_text("".join(json.dumps(_plain(question)) + "\n" for question in questions), encoding="utf-8")
        answered.touch()
        # -P: the folder that someone verifies in is no place to import from.
        command = [sys.executable, "-P", "-m", vendor_process.__name__]
        command += [vendor.module, str(folder), str(asked), str(answered)]
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            ended = None
        lines = [json.loads(line) for line in answered.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    if lines and "failed" in lines[0]:
        return Told([], f"can't open {folder.name}/: {lines[0]['failed']}")
    answers = [_answer(line) for line in lines]
    if len(answers) == len(questions):
        return Told(answers, None)
    end = "was ended after its time" if ended is None else f"ended its process ({_in_words(ended)})"
    return Told(answers, f"{end}, after {len(answers)} of {len(questions)} questions")


def _plain(question: Question) -> Mapping[str, Any]:
    match question.asked:
        case str(text):
            return {"encode": text}
        case Chat() as chat:
            return {
                "messages": chat.messages,
                "tools": chat.arguments.get("tools"),
                "add_generation_prompt": chat.add_generation_prompt,
            }
        case ids:
            return {"decode": ids}


def _answer(line: Mapping[str, Any]) -> Answer:
    return Refused(line["refused"]) if "refused" in line else line["answer"]


def _in_words(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
