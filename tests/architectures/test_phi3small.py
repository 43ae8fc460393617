"""Phi-3 small against two other implementations: one in plain torch here, and one that others wrote."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.architectures.parity import difference, run
from tests.architectures.phi3small_model import ROWS, write_checkpoint
from tests.architectures.test_parity import LARGEST, RMS, reference, tokens_for


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(row)`` -> its folder, and the model in plain torch."""

    @cache
    def make(name: str):
        folder = tmp_path_factory.mktemp(name)
        return folder, write_checkpoint(next(row for row in ROWS if row.name == name), folder)

    return lambda row: make(row.name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_eager_reference_equals_plain_torch(row, checkpoint, tmp_path):
    folder, model = checkpoint(row)
    tokens = tokens_for(row)
    expected = model(torch.tensor([tokens]), row.context).logits[0].double().numpy()
    largest, rms = difference(run(reference(row, folder, "fp32", tmp_path), tokens), expected)
    assert largest <= LARGEST["reference"]
    assert rms <= RMS["reference"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_eager_reference_equals_an_implementation_of_others(row, checkpoint, peer, tmp_path):
    folder, model = checkpoint(row)
    tokens = tokens_for(row)
    inner = model.tensors["model.layers.0.mlp.down_proj.weight"].shape[1]
    other = peer.Phi3Small(peer.Config.from_dict({**model.config, "ff_intermediate_size": inner})).eval()
    missing = other.load_state_dict(model.tensors)
    assert not missing.missing_keys and not missing.unexpected_keys
    with torch.no_grad():
        expected = other(torch.tensor([tokens]))[0].double().numpy()
    largest, rms = difference(run(reference(row, folder, "fp32", tmp_path), tokens), expected)
    assert largest <= LARGEST["reference"]
    assert rms <= RMS["reference"]


@pytest.fixture(scope="module")
def peer(data: Path):
    """A model in plain torch that was written apart from all of this."""
    path = data / "prototypes" / "architectures" / "phi3small.py"
    if not path.exists():
        pytest.skip("not run: no data")
    spec = importlib.util.spec_from_file_location("phi3small_of_others", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module
