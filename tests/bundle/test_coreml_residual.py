"""Gemma's residual beyond float16: as it is a package overflows, held times a power of two it keeps its limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pocketlm.errors import CheckError
from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.base import Lowering
from pocketlm_export.backends.coreml.writer import write_package
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from tests.architectures.parity import difference
from tests.architectures.test_parity import LARGEST, RMS, transformers_logits
from tests.tiny_models import ROWS

LARGEST_FLOAT16 = 65504
TOKENS = [7, 300, 12, 45, 99, 7, 8, 250, 31, 6, 19, 77]
ROWS_BEYOND = [row for row in ROWS if row.residual is not None]


def package_logits(package) -> np.ndarray:
    inputs = {"input_ids": np.array([TOKENS], np.int32), "position": np.array([0], np.int32)}
    interpreter = Interpreter(package, "float16")
    return interpreter.predict(inputs, interpreter.make_state(), "score")["logits"][0].astype(np.float64)


@pytest.mark.parametrize("row", ROWS_BEYOND, ids=lambda row: row.name)
def test_only_the_shifted_residual_stays_within_float16(row, tiny_checkpoint, tmp_path):
    folder, model = tiny_checkpoint(row.name)
    with torch.no_grad():
        states = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states[:-1]  # the last is normalized
    assert all(state.abs().amax() > LARGEST_FLOAT16 for state in states[1:])

    checkpoint = open_checkpoint(folder)
    graph = build_graph(checkpoint.config, 64)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "fp32", "int8"), WeightStore(tmp_path / "store"))
    lowering = Lowering(graph, weights, checkpoint.config, checkpoint.generation, checkpoint.tokenizer_files)
    assert checkpoint.config.residual_shift > 0
    artifact = write_package(lowering, tmp_path / "shifted.mlpackage")
    assert any(note.startswith("the residual is held times 2^-") for note in artifact.notes)
    largest, rms = difference(package_logits(tmp_path / "shifted.mlpackage"), transformers_logits(model, TOKENS))
    assert largest <= LARGEST["coreml"]
    assert rms <= RMS["coreml"]

    plain = replace(lowering, config=replace(checkpoint.config, residual_shift=0))
    write_package(plain, tmp_path / "plain.mlpackage")
    with pytest.raises(CheckError, match=r"score: .* holds infinity \(float16\)"):
        package_logits(tmp_path / "plain.mlpackage")
