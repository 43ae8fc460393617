"""ExecuTorch's schemas and serializers, imported without the packages around them.

``executorch.exir`` and ``executorch.backends.xnnpack`` import the vendor's whole exporter: 3 s of CPU and 210 MB for
dataclasses and a flatbuffer builder that need 0.05 s. While these few modules are imported, empty packages stand in;
afterwards the true ones can still be imported.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from pocketlm.errors import UnavailableError

__all__ = [
    "CONSTANT_ALIGNMENT",
    "ScalarType",
    "XNNHeader",
    "flatbuffer_to_program",
    "flatc_path",
    "program_schema_sources",
    "program_to_flatbuffer",
    "schema",
    "serialize_xnnpack_binary",
    "xnnpack_schema",
    "xnnpack_schema_source",
]

CONSTANT_ALIGNMENT = 16  # of tensors inside the flatbuffer; a program that keeps its constants in a segment has none
HEAVY = ("executorch.exir", "executorch.exir._serialize", "executorch.backends.xnnpack")


@contextmanager
def _without_the_exporter() -> Iterator[None]:
    try:
        root = Path(next(iter(importlib.import_module("executorch").__path__)))
        importlib.import_module("executorch.backends")
    except ImportError as error:
        raise UnavailableError(
            f".pte files are built with executorch ({error}): pip install 'pocketlm[export]'"
        ) from error
    missing = [name for name in HEAVY if name not in sys.modules]
    for name in missing:
        folder = root.joinpath(*name.split(".")[1:])
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        if spec is not None:  # the package, found and never run
            sys.modules[name] = module_from_spec(spec)
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)


with _without_the_exporter():
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnnpack_schema
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, serialize_xnnpack_binary
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
        _get_schema_bytes as xnnpack_schema_source,
    )
    from executorch.exir import schema
    from executorch.exir._serialize._flatbuffer import _get_flatc_path as flatc_path
    from executorch.exir._serialize._flatbuffer import _ResourceFiles
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program as flatbuffer_to_program
    from executorch.exir._serialize._flatbuffer_program import _get_schema_info
    from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer as program_to_flatbuffer
    from executorch.exir.scalar_type import ScalarType

    # What lies as files in the packages is looked up through them once, and kept.
    xnnpack_schema_source()
    flatc_path()
    _get_schema_info(CONSTANT_ALIGNMENT, None)
    _program_schemas = _ResourceFiles(["program.fbs", "scalar_type.fbs"])


def program_schema_sources() -> dict[str, bytes]:
    """The schema of a program, and what it includes: file name -> text."""
    return {name: _program_schemas.get(name) for name in ("program.fbs", "scalar_type.fbs")}
