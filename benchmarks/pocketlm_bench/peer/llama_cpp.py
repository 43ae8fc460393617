"""llama.cpp on a GGUF file, through the C interface that llama-cpp-python binds; runs in its environment."""

import ctypes
from typing import Any

import numpy as np

from pocketlm_bench.peer.rates import Settings, main


class LlamaDecoder:
    """A context of llama.cpp with one thread and its defaults otherwise; the highest of the last token's logits."""

    def __init__(self, settings: Settings) -> None:
        import llama_cpp

        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            settings.artifact.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"{settings.artifact}: llama.cpp can't load it")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = settings.context
        parameters.n_threads = parameters.n_threads_batch = 1
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def begin(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def prefill(self, tokens: list[int]) -> int:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(ids, len(tokens))
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode failed with {status}")
        logits: Any = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocabulary,))))

    def step(self, token: int) -> int:
        return self.prefill([token])


def _load(settings: Settings) -> tuple[LlamaDecoder, str]:
    import llama_cpp

    decoder = LlamaDecoder(settings)
    kernels = llama_cpp.llama_print_system_info().decode()
    return decoder, f"llama-cpp-python {llama_cpp.__version__}: {kernels}"


if __name__ == "__main__":
    main(_load)
