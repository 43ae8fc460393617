"""The eager reference: PocketLM's operators in torch, on the very weights that the artifacts hold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pocketlm.session import Session
from pocketlm_export.architectures import DecoderConfig
from pocketlm_export.architectures._decoder import Decoder
from pocketlm_export.quantization.weights import Weights

__all__ = ["ReferenceSession", "load_decoder"]


def load_decoder(config: DecoderConfig, context_length: int, weights: Weights, dtype: torch.dtype) -> Decoder:
    """The decoder with every weight dequantized, in ``dtype``."""
    with torch.device("meta"):
        model = Decoder(config, context_length).to(dtype)
    model = model.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        for start, values in weights.blocks(name):
            parameter[start : start + len(values)] = torch.tensor(values, dtype=dtype)
    return model


class ReferenceSession(Session):
    """A session over the eager reference; float64 computes in float64 and returns float32."""

    def __init__(
        self, config: DecoderConfig, context_length: int, weights: Weights, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(
            runtime="reference",
            context_length=context_length,
            vocabulary_size=config.vocabulary_size,
            longest_call=context_length,
            rows=context_length,
        )
        with torch.no_grad():
            self._model = load_decoder(config, context_length, weights, dtype)
        self._caches = [cache.to(dtype) for cache in self._model.make_caches()]

    def _run(self, tokens: npt.NDArray[np.int64], position: int, rows: int) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            logits = self._model(torch.from_numpy(tokens)[None], torch.tensor([position]), self._caches)
        result: npt.NDArray[np.float32] = logits[0, logits.shape[1] - rows :].float().numpy()
        return result

    def _close(self) -> None:
        self._caches = []

    def all_logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 ``[len(tokens), vocabulary]`` of one prefill from position 0."""
        self.rewind(0)
        return self.extend(tokens, logits=len(tokens))
