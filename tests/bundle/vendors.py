"""The vendors' own runners, unmodified, and what our sessions choose on the same prompt."""

from typing import TYPE_CHECKING

import numpy as np

from pocketlm.bundle import Bundle
from pocketlm.runtimes import executorch_torch
from pocketlm.session import Session

if TYPE_CHECKING:
    from executorch.extension.llm.runner import TextLLMRunner


def greedy(session: Session, prompt: list[int], steps: int, stop_ids: frozenset[int]) -> list[int]:
    """The session's greedy tokens after ``prompt``, the stop id left out."""
    tokens: list[int] = []
    session.rewind(0)
    logits = session.extend(prompt)
    while len(tokens) < steps:
        token = int(logits[-1].argmax())
        if token in stop_ids:
            break
        tokens.append(token)
        logits = session.extend([token])
    return tokens


def genai_greedy(bundle: Bundle, prompt: list[int], steps: int) -> list[int]:
    """What onnxruntime-genai generates from the folder as it is."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(bundle.folder / "onnx"))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = generator.get_sequence(0).tolist()[len(prompt) :]
    return tokens[:-1] if tokens and tokens[-1] in bundle.stop_ids else tokens


def text_runner(bundle: Bundle) -> "TextLLMRunner":
    """ExecuTorch's TextLLMRunner on the folder as it is."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers the kernels
    from executorch.extension.llm.runner import TextLLMRunner
    from executorch.kernels import quantized  # noqa: F401

    path = bundle.folder / bundle.manifest.targets["executorch"].path
    return TextLLMRunner(str(path), str(bundle.folder / "executorch" / "tokenizer.json"))


def session_of_text_runner(bundle: Bundle) -> Session:
    """A session with that runner's own kernels: with int8 activations another rounding turns near ties."""
    return executorch_torch.open_session(bundle.artifact("executorch"), 1)


def text_runner_greedy(runner: "TextLLMRunner", prompt: str, steps: int) -> str:
    """What ``runner`` writes after ``prompt``, special tokens' text included."""
    from executorch.extension.llm.runner import GenerationConfig

    pieces: list[str] = []
    config = GenerationConfig(echo=False, max_new_tokens=steps, temperature=0.0)
    runner.generate(prompt, config, pieces.append, lambda _stats: None)
    return "".join(pieces)
