"""Phi-3 small against an implementation of others; ``test_parity`` compares it with the one in plain torch."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tests.architectures.parity import difference, run
from tests.architectures.phi3small_model import ROWS
from tests.architectures.test_parity import LARGEST, RMS, reference, tokens_for


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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_eager_reference_equals_an_implementation_of_others(row, tiny_checkpoint, peer, tmp_path):
    folder, model = tiny_checkpoint(row.name)
    tokens = tokens_for(row)
    inner = model.tensors["model.layers.0.mlp.down_proj.weight"].shape[1]
    other = peer.Phi3Small(peer.Config.from_dict({**model.config, "ff_intermediate_size": inner})).eval()
    other.load_state_dict(model.tensors)
    with torch.no_grad():
        expected = other(torch.tensor([tokens]))[0].double().numpy()
    largest, rms = difference(run(reference(row, folder, "fp32", tmp_path), tokens), expected)
    assert largest <= LARGEST["reference"]
    assert rms <= RMS["reference"]
