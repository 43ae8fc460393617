"""Phi-3 small against an implementation of others; ``test_parity`` compares it with the one in plain torch."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import pocketlm
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.checkpoint.phi3small_tokenizer import VOCABULARY
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from tests.architectures import phi3small_model
from tests.architectures.parity import difference, run
from tests.architectures.phi3small_model import ROWS
from tests.architectures.test_parity import LARGEST, RMS, RUNTIMES, reference, tokens_for
from tests.tiny_row import CONTEXT, Row


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


# As released, its vocabulary and the multipliers included, but for layers and widths.
RELEASED = Row(
    "phi3small-released-vocabulary",
    "phi3small",
    {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "ff_intermediate_size": 96}
    | {"vocab_size": 100352, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT},
)


@pytest.fixture(scope="module")
def released(tmp_path_factory, data: Path):
    """A folder that holds what the released one does: a vocabulary in the place of tokenizer.json."""
    folder = tmp_path_factory.mktemp("released")
    model = phi3small_model.write_checkpoint(RELEASED, folder)
    (folder / VOCABULARY).symlink_to(data / "data" / "tokenizers" / "phi-3-small" / VOCABULARY)
    (folder / "generation_config.json").write_text('{"eos_token_id": [100257, 100266]}')
    return folder, model


@pytest.fixture(scope="module")
def exported(released, tmp_path_factory):
    """``exported(target)`` -> the bundle of it in int4, verified."""

    @cache
    def make(target: str):
        options = ExportOptions(targets=(target,), store=tmp_path_factory.mktemp("store"), verify=True)
        return export_bundle(str(released[0]), tmp_path_factory.mktemp("bundle") / "bundle", options)

    return make


def test_only_ids_that_were_never_trained_are_suppressed(released, peer, tmp_path):
    folder, model = released
    tokens = tokens_for(RELEASED)
    logits = run(reference(RELEASED, folder, "fp32", tmp_path), tokens)
    other = peer.Phi3Small(peer.Config.from_dict(model.config)).eval()
    other.load_state_dict(model.tensors)
    with torch.no_grad():
        expected = other(torch.tensor([tokens]))[0].double().numpy()
    kept = expected[0] > -1e30  # there the other one has the least number of float32
    assert (~kept).sum() == 91
    assert tuple(np.flatnonzero(~kept)) == open_checkpoint(folder).config.suppressed_ids
    largest, rms = difference(logits[:, kept], expected[:, kept])
    assert largest <= LARGEST["reference"]
    assert rms <= RMS["reference"]
    # A softmax leaves nothing of them.
    assert logits[:, ~kept].max() < logits[:, kept].min() - 50


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_released_folder_becomes_a_bundle_that_writes_text(runtime, exported, released):
    bundle = exported(runtime)
    assert bundle.certificate.passed
    assert bundle.manifest.model.stop_ids == [100257, 100266]
    assert bundle.tokenizer.encode("This is a test.", add_special_tokens=True) == [2028, 374, 264, 1296, 13]
    suppressed = list(open_checkpoint(released[0]).config.suppressed_ids)
    with bundle.session(runtime, threads=1) as session:
        logits = session.extend(bundle.tokenizer.encode("Once upon", add_special_tokens=True))[0]
        assert logits[suppressed].max() < np.delete(logits, suppressed).min() - 50
        session.rewind(0)
        pieces = list(pocketlm.chat(session, [{"role": "user", "content": "Hello"}], max_new_tokens=8))
    assert not {piece.token for piece in pieces} & set(suppressed)
    assert len(pieces) > 1
