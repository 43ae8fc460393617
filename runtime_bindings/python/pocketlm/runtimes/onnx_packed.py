"""Copies of ONNX models whose weights are packed for this machine already, see :mod:`pocketlm.runtimes.packed_copies`.

A copy saved after packing has both forms of the weights in its data file. Loading it packs again, one matrix at a time,
finds the same content in the file, and maps that instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnxruntime  # type: ignore[import-untyped]

from pocketlm.artifact import ArtifactFile
from pocketlm.errors import BundleError
from pocketlm.runtimes.onnx_loading import load_model
from pocketlm.runtimes.packed_copies import Recipe, packed_copy, unwritable

__all__ = ["NEEDED_SPACE", "packed_model"]

NEEDED_SPACE = 3  # both forms, and a tied embedding's bytes twice
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


@contextmanager
def packed_model(model: Path, files: Mapping[str, ArtifactFile]) -> Iterator[Path]:
    """The model file of the packed copy of ``model``, which is made if there is none; no process removes it meanwhile.

    ``files``: the model's own files by name, as the manifest records them; they were checked. Raises
    :class:`InputError` if the cache can't be written or has too little space, :class:`BundleError` if ONNX Runtime
    refuses the model.
    """
    recipe = Recipe(
        model=files,
        runtime={"onnxruntime": onnxruntime.__version__},
        files=(DATA_FILE, MODEL_FILE),
        needed_space=NEEDED_SPACE,
        make=lambda folder: _save(model, folder),
    )
    with packed_copy(recipe) as folder:
        yield folder / MODEL_FILE


def _save(model: Path, folder: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / MODEL_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        load_model(model, options=options)
    except BundleError as error:
        # The model may be refused, or the disk be full: ONNX Runtime says the one like the other.
        load_model(model)
        raise unwritable(folder.parent, error) from error
