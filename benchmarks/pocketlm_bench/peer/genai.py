"""onnxruntime-genai on its own artifact; runs in its environment."""

import json
from collections.abc import Sequence
from typing import Any

from pocketlm_bench.peer.rates import Settings, main

__all__ = ["builder_arguments"]


def builder_arguments(checkpoint: str, output: str, cache: str) -> Sequence[str]:
    """What follows ``python`` to build ``output``: int4 in blocks of 32, int8 activations, embedding and head int4 too
    (the builder shares one matrix between them where the checkpoint ties them)."""
    return (
        *("-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", output, "-p", "int4", "-e", "cpu"),
        *("-c", cache, "--extra_options", "accuracy_level=4", "block_size=32", "algo_config=default"),
    )


class GenaiDecoder:
    """A generator of onnxruntime-genai, greedy."""

    def __init__(self, settings: Settings) -> None:
        import onnxruntime_genai

        self._library = onnxruntime_genai
        config = onnxruntime_genai.Config(settings.artifact)
        threads = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = onnxruntime_genai.Model(config)
        self._context = settings.context
        self._generator: Any = None

    def begin(self) -> None:
        parameters = self._library.GeneratorParams(self._model)
        # A minimal length keeps the end-of-text token from ending a measurement.
        parameters.set_search_options(max_length=self._context, min_length=self._context, do_sample=False)
        self._generator = None  # its cache is freed before there is another
        self._generator = self._library.Generator(self._model, parameters)

    def prefill(self, tokens: list[int]) -> int:
        self._generator.append_tokens(tokens)
        return self._next()

    def step(self, _token: int) -> int:
        """The generator runs the token that it has chosen."""
        return self._next()

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def _load(settings: Settings) -> tuple[GenaiDecoder, str]:
    import onnxruntime_genai

    return GenaiDecoder(settings), f"onnxruntime-genai {onnxruntime_genai.__version__}"


if __name__ == "__main__":
    main(_load)
