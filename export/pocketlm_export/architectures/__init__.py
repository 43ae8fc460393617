"""One file per Hugging Face ``model_type``: the file's name is the address, and it states only its difference.

A file defines ``configure(fields) -> DecoderConfig``, and ``Decoder`` where the model isn't built as Llama is. Shared
parts have names that start with an underscore.
"""

import importlib
import pkgutil
import re
from difflib import get_close_matches
from typing import Protocol

from pocketlm.errors import UnsupportedError
from pocketlm_export.architectures._configuration import SUPPRESSING_BIAS, DecoderConfig
from pocketlm_export.architectures._decoder import Decoder
from pocketlm_export.fields import Fields
from pocketlm_export.graph.graph import Graph

__all__ = [
    "SUPPRESSING_BIAS",
    "Architecture",
    "DecoderConfig",
    "build_graph",
    "known_architectures",
    "load_architecture",
]


class Architecture(Protocol):
    """What an architecture's file defines."""

    def configure(self, fields: Fields) -> DecoderConfig:
        """Read config.json; every key is honoured, known to be neutral, or left unread and refused later."""


def known_architectures() -> list[str]:
    """Every supported ``model_type``."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load_architecture(model_type: str, source: str) -> Architecture:
    """The architecture named ``model_type``; ``source`` is the file that an :class:`UnsupportedError` names."""
    known = known_architectures()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", model_type) or model_type not in known:
        near = get_close_matches(model_type, known, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UnsupportedError(
            f"{source}: model_type {model_type[:60]!r} is not supported{hint} Known: {', '.join(known)}"
        )
    module: Architecture = importlib.import_module(f"{__name__}.{model_type}")
    return module


def build_graph(config: DecoderConfig, context_length: int) -> Graph:
    """The graph of ``config`` for caches of ``context_length`` positions, by its architecture."""
    module = importlib.import_module(f"{__name__}.{config.model_type}")
    decoder: type[Decoder] = getattr(module, "Decoder", Decoder)
    return decoder(config, context_length).graph()
