"""coremltools' generated protobuf modules, without coremltools.

``import coremltools`` costs seconds and brings its converter along; the interpreter needs only the messages of
``coremltools/proto``. They are imported by path under a package name of this module's own. Protobuf registers a
descriptor once per process and accepts the identical one again, so a real ``import coremltools`` before or after works.
"""

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pocketlm.errors import UnavailableError

__all__ = ["element_type_names", "parse_model"]

_PACKAGE = "pocketlm_coreml_messages"


@cache
def _messages(name: str) -> ModuleType:
    if _PACKAGE not in sys.modules:
        specification = importlib.util.find_spec("coremltools")
        if specification is None or specification.origin is None:
            raise UnavailableError("Core ML files need coremltools' messages: pip install pocketlm[coreml]")
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(Path(specification.origin).parent / "proto")]
        sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise UnavailableError(f"Core ML files need protobuf ({error}): pip install pocketlm[coreml]") from error


def parse_model(data: bytes) -> Any:
    """A ``CoreML.Specification.Model`` from its serialized form; ValueError where it isn't one."""
    model = _messages("Model_pb2").Model()
    decode_error = importlib.import_module("google.protobuf.message").DecodeError
    try:
        model.ParseFromString(data)
    except decode_error as error:
        raise ValueError(str(error)) from error
    return model


@cache
def element_type_names() -> dict[int, str]:
    """``MILSpec.DataType``: number -> name (``"FLOAT16"``)."""
    return {number: name for name, number in _messages("MIL_pb2").DataType.items()}
