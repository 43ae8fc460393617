"""int4 in groups of 64 and 128 columns: the same integers in every runtime, stated in the manifest, and verified."""

import hashlib
from collections import Counter
from functools import cache

import numpy as np
import pytest

import pocketlm
from pocketlm.errors import InputError
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.reading import open_reader
from pocketlm_export.checkpoint.checkpoint import open_checkpoint, read_configuration
from pocketlm_export.options import ExportOptions
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.reference import ReferenceSession
from pocketlm_export.verify.structure import check_structure
from tests.architectures.parity import DECODE, PROMPT, mean_kl, run

RUNTIMES = ("onnx", "executorch", "coreml")
MEAN_KL = 1e-3  # of tests/architectures/test_parity.py, for its reasons
# How many matrices have groups of so many columns; None: int8, which has none. Widths are 64, 96 and 128; 64 and 96;
# 100, 76 and 128.
GROUPS = {
    ("mistral-window", 64): {64: 20, 32: 3},
    ("mistral-window", 128): {64: 17, 128: 3, 32: 3},
    ("qwen2", 128): {64: 19, 32: 3},
    ("llama-odd-widths", 128): {128: 3, None: 20},
}


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    """``exported(name, group)`` -> the verified bundle with all three artifacts and an int4 head."""
    root = tmp_path_factory.mktemp("groups")

    @cache
    def make(name: str, group: int):
        folder, _ = tiny_checkpoint(name)
        return pocketlm.export(folder, root / f"{name}-{group}", head="int4", group=group, store=root / "store")

    return make


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_every_runtime_agrees_with_the_reference_on_the_same_integers(name, group, exported, tiny_checkpoint, tmp_path):
    bundle = exported(name, group)
    assert bundle.certificate.passed, bundle.certificate.failures
    checkpoint = open_checkpoint(tiny_checkpoint(name)[0])
    graph = build_graph(checkpoint.config, bundle.manifest.model.context_length)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "int4", "int4", group), WeightStore(tmp_path))
    tokens = np.random.default_rng(group).integers(5, 320, PROMPT + DECODE).tolist()
    expected = run(ReferenceSession(graph, weights), tokens)
    for runtime in RUNTIMES:
        with bundle.session(runtime, threads=1) as session:
            assert mean_kl(run(session, tokens), expected) <= MEAN_KL, runtime


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_the_manifest_states_each_group_and_every_artifact_has_it(name, group, exported):
    bundle = exported(name, group)
    manifest = bundle.manifest
    assert manifest.scheme.group == group
    matrices = [weight for weight in manifest.weights.values() if weight.scheme != "fp32"]
    assert Counter(weight.group for weight in matrices) == GROUPS[name, group]
    for target, artifact in manifest.targets.items():
        reader = open_reader(target, bundle.folder / artifact.path, manifest)
        for weight in matrices:
            place = weight.places[target]
            found = reader.rows(place.entry, place.first_row, place.first_row + 1)
            assert found.scales.shape == (1, weight.shape[1] // (weight.group or weight.shape[1])), target


@pytest.mark.parametrize("target", RUNTIMES)
def test_a_manifest_that_states_another_group_is_a_difference(target, exported):
    bundle = exported("qwen2", 128)
    manifest = bundle.manifest
    graph = build_graph(read_configuration(bundle.folder), manifest.model.context_length)
    name = "model.layers.1.self_attn.q_proj.weight"
    changed = manifest.weights[name].model_copy(update={"group": 32})
    reader = open_reader(target, bundle.folder / manifest.targets[target].path, manifest)
    for weights, differing in ((manifest.weights, 0), ({**manifest.weights, name: changed}, 1)):
        stated = manifest.model_copy(update={"weights": weights})
        checks, _ = check_structure(target, reader, graph, stated, None)
        assert checks[0].figure == differing


def test_activations_are_rounded_in_each_matrix_own_blocks(exported):
    bundle = exported("mistral-window", 128)
    reader = open_reader("onnx", bundle.folder / bundle.manifest.targets["onnx"].path, bundle.manifest)
    x = np.zeros((1, 128), np.float32)
    x[0, [0, 40, 100]] = 127, 0.4, 0.4  # lost beside 127, kept in a block of their own
    for name, kept in (("o_proj", [0]), ("q_proj", [0, 100])):
        rounded = reader.round_activations(f"model.layers.0.self_attn.{name}.weight", x)
        assert np.flatnonzero(rounded[0]).tolist() == kept
    rounded = reader.round_activations("model.layers.0.mlp.down_proj.weight", x)
    assert np.flatnonzero(rounded[0]).tolist() == [0, 40, 100]


def test_two_exports_are_byte_identical_and_another_group_is_not(tiny_checkpoint, tmp_path):
    folder, _ = tiny_checkpoint("mistral-window")

    def hashes(name: str, group: int) -> dict[str, str]:
        pocketlm.export(folder, tmp_path / name, group=group, store=tmp_path / f"store {name}", verify=False)
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {
            path.relative_to(tmp_path / name).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    assert hashes("one", 64) == hashes("two", 64) != hashes("three", 128)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"group": 48}, "group must be one of 32, 64, 128, not 48"),
        ({"group": True}, "group must be one of 32, 64, 128, not True"),
        ({"group": 64, "scheme": "int8"}, "groups of 64 are int4's, but scheme int8 and head int8 have none"),
        (
            {"group": 64, "scheme": "fp32", "head": "int4"},
            "groups of 64 are int4's, but scheme fp32 and head int4 have",
        ),
    ),
)
def test_a_group_that_has_no_effect_or_no_kernel_is_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        ExportOptions(**options)
    ExportOptions(group=64, scheme="int8", head="int4")
