"""PocketLM: one bundle of ONNX, ExecuTorch and Core ML artifacts from the checkpoint of a small language model.

``import pocketlm`` imports nothing heavy: a name brings its module when it is first used.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pocketlm.errors import (
    BundleError,
    CheckError,
    CheckpointError,
    ContextLengthError,
    InputError,
    PocketLMError,
    TemplateError,
    UnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from pocketlm.bundle import Bundle
    from pocketlm.bundle import open_bundle as open
    from pocketlm.certificate import Certificate
    from pocketlm.chat import chat
    from pocketlm.generate import Piece, generate
    from pocketlm.replaying.replay import replay
    from pocketlm.session import Session
    from pocketlm_export import export
    from pocketlm_export.verify import verify_bundle as verify

__all__ = [
    "Bundle",
    "BundleError",
    "Certificate",
    "CheckError",
    "CheckpointError",
    "ContextLengthError",
    "InputError",
    "Piece",
    "PocketLMError",
    "Session",
    "TemplateError",
    "UnavailableError",
    "UnsupportedError",
    "chat",
    "export",
    "generate",
    "open",
    "replay",
    "verify",
]

# ONNX Runtime's Linux wheels keep a telemetry database in the user's cache unless this is set before their import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LAZY = {
    "Bundle": ("pocketlm.bundle", "Bundle"),
    "Certificate": ("pocketlm.certificate", "Certificate"),
    "Piece": ("pocketlm.generate", "Piece"),
    "Session": ("pocketlm.session", "Session"),
    "chat": ("pocketlm.chat", "chat"),
    "export": ("pocketlm_export", "export"),
    "generate": ("pocketlm.generate", "generate"),
    "open": ("pocketlm.bundle", "open_bundle"),
    "replay": ("pocketlm.replaying.replay", "replay"),
    "verify": ("pocketlm_export.verify", "verify_bundle"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # costs more than all the rest of this file

        return version("pocketlm")
    if name not in _LAZY:
        raise AttributeError(f"module 'pocketlm' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(module), attribute)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """Keeps ``generate`` and ``chat`` the functions: importing a submodule sets it on its package."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
