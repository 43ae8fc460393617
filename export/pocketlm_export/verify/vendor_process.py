"""The process that a vendor's tokenizer runs in: MODULE FOLDER QUESTIONS ANSWERS, the files of one JSON object a line.

A question is ``{"encode": text}``, ``{"decode": ids}`` or ``{"messages", "tools", "add_generation_prompt"}``; its
answer ``{"answer": ids or text}`` or ``{"refused": words}``. ``{"failed": words}`` alone: the tokenizer didn't open.
"""

import json
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MOST_MEMORY = 4 << 30  # bytes of address space: a tokenizer.json can make a vendor's code fill any memory

Ask = Callable[[Mapping[str, Any]], Any]


def _onnxruntime_genai(folder: Path) -> Ask:
    import numpy as np
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(str(folder))  # of a folder, not of a model: no weights are loaded

    def ask(question: Mapping[str, Any]) -> Any:
        if "encode" in question:
            return tokenizer.encode(question["encode"]).tolist()
        if "decode" in question:
            return tokenizer.decode(np.array(question["decode"], np.int32))
        tools = question["tools"]
        return tokenizer.apply_chat_template(
            json.dumps(question["messages"]),
            tools=None if tools is None else json.dumps(tools),
            add_generation_prompt=question["add_generation_prompt"],
        )

    return ask


def _pytorch_tokenizers(folder: Path) -> Ask:
    from pytorch_tokenizers import CppHFTokenizer

    tokenizer = CppHFTokenizer()
    tokenizer.load(str(folder / "tokenizer.json"))

    def ask(question: Mapping[str, Any]) -> Any:
        if "encode" in question:
            return tokenizer.encode(question["encode"], bos=0, eos=0)
        return tokenizer.decode_batch(question["decode"], skip_special_tokens=True)

    return ask


OPEN: Mapping[str, Callable[[Path], Ask]] = {
    "onnxruntime_genai": _onnxruntime_genai,
    "pytorch_tokenizers": _pytorch_tokenizers,
}


def main(module: str, folder: str, questions: str, answers: str) -> None:
    """Answer every question, each before the next is read: whatever ends the process, the answers so far are there."""
    with Path(questions).open(encoding="utf-8") as asked, Path(answers).open("w", encoding="utf-8") as told:

        def tell(**answer: object) -> None:
            told.write(json.dumps(answer) + "\n")
            told.flush()

        try:
            ask = OPEN[module](Path(folder))
        except Exception as error:  # noqa: BLE001  whatever a vendor's binding raises
            tell(failed=str(error))
            return
        for line in asked:
            try:
                answer = ask(json.loads(line))
            except Exception as error:  # noqa: BLE001
                tell(refused=str(error))
            else:
                tell(answer=answer)


if __name__ == "__main__":
    if sys.platform == "linux":  # elsewhere there may be no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    main(*sys.argv[1:])
