"""The Core ML package: what coremltools reads in it, what its constants hold, what its functions and the session do."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pocketlm.errors import InputError, UnsupportedError
from pocketlm.runtimes.coreml import CoreMLSession
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends import coreml
from pocketlm_export.backends.base import Lowering
from pocketlm_export.backends.coreml.importing import coremltools
from pocketlm_export.backends.coreml.reading.written import WrittenPackage
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.rotary import rotary_tables
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.reference import ReferenceSession
from tests.architectures.parity import difference

TOKENS = [7, 300, 12, 45, 99, 7, 8, 250, 31, 6, 19, 77]


@pytest.fixture(scope="module")
def lower(tiny_checkpoint, tmp_path_factory):
    """``lower(name, scheme)`` -> the input of a backend for that row of the table."""
    store = WeightStore(tmp_path_factory.mktemp("store"))

    def make(name: str, scheme: str, head: str = "int8") -> Lowering:
        checkpoint = open_checkpoint(tiny_checkpoint(name)[0])
        graph = build_graph(checkpoint.config, checkpoint.config.context_length)
        weights = quantize(checkpoint.tensors, assign_rows(graph, scheme, head), store)
        return Lowering(graph, weights, checkpoint.config, checkpoint.generation, checkpoint.tokenizer_files)

    return make


def changed_checkpoint(source: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of ``source`` at ``folder`` after ``change`` of its tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def package_of(bundle) -> Path:
    return bundle.folder / bundle.manifest.targets["coreml"].path


@pytest.fixture
def vendor_program():
    """A package as coremltools' own loader reads it back, weights included."""
    from coremltools.converters.mil.frontend.milproto import load

    def read(package: Path):
        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        specification = model.get_spec()
        return load.load(specification, specification.specificationVersion, model.weights_dir)

    return read


def same_values(found, lowering, places, name) -> None:
    """``found`` (codes and scales of an entry) holds ``name``'s integers and scales where the manifest says."""
    codes, scales = found[places[name].name]
    tensor = lowering.weights.quantized(name)
    rows = slice(places[name].first_row, places[name].first_row + tensor.shape[0])
    np.testing.assert_array_equal(codes[rows], tensor.codes())
    np.testing.assert_array_equal(np.asarray(scales[rows], np.float32), tensor.scales())


@pytest.mark.parametrize(
    ("name", "scheme", "head"),
    [("llama", "int4", "int8"), ("qwen2", "int4", "int4"), ("llama-odd-widths", "int4", "int8")],
)
def test_integers_and_scales_equal_the_store_through_coremltools_and_our_reader(
    name, scheme, head, lower, vendor_program, tmp_path
):
    lowering = lower(name, scheme, head)
    artifact = coreml.write(lowering, tmp_path)
    program = vendor_program(tmp_path / "model.mlpackage")
    assert set(program.functions) == {"prefill", "decode", "score"}
    ours = WrittenPackage(tmp_path / "model.mlpackage")
    readings = [{entry: (m.codes, m.scales) for entry in ours.quantized for m in [ours.matrix(entry)]}]
    for function in program.functions.values():
        expressions = [op for op in function.operations if op.op_type == "constexpr_blockwise_shift_scale"]
        readings.append({op.name: (op.data.val.astype(np.int8), op.scale.val) for op in expressions})
    quantized = [weight for weight in lowering.graph.weights() if lowering.weights.row(weight) is not None]
    assert len(quantized) == len(lowering.graph.weights()) - sum(
        len(w.shape) == 1 for w in lowering.graph.weights().values()
    )
    for reading in readings:
        assert set(reading) == {artifact.entries[weight].name for weight in quantized}
        for weight in quantized:
            same_values(reading, lowering, artifact.entries, weight)


def test_vectors_and_tables_are_the_checkpoints_rounded_to_fp16(lower, tmp_path):
    lowering = lower("qwen3-biases", "fp32")
    artifact = coreml.write(lowering, tmp_path)
    written = WrittenPackage(tmp_path / "model.mlpackage")
    assert written.quantized == ()
    for name, weight in lowering.graph.weights().items():
        place = artifact.entries[name]
        rows = written.constant(place.name)[place.first_row : place.first_row + weight.shape[0]]
        np.testing.assert_array_equal(rows, lowering.weights.values(name).astype(np.float16))
    cosine, sine = rotary_tables(lowering.graph.attentions[0].rotary, lowering.graph.context_length)
    np.testing.assert_array_equal(written.constant("rotary_0_cosine"), np.tile(cosine, 2).astype(np.float16))
    np.testing.assert_array_equal(
        written.constant("rotary_0_sine"), np.concatenate((-sine, sine), 1).astype(np.float16)
    )


def test_attributes_are_read_back_from_the_message(lower, tmp_path):
    lowering = lower("qwen2-window", "int8")
    coreml.write(lowering, tmp_path)
    operators = list(WrittenPackage(tmp_path / "model.mlpackage").operators("decode"))
    windows = [op.attributes["y"] for op in operators if op.kind == "sub"]
    assert windows == [11]
    roots = {float(op.attributes["x"]) for op in operators if op.kind == "real_div" and "x" in op.attributes}
    assert roots == {float(np.float16(1e-5**0.5))}
    scales = {float(op.attributes["y"]) for op in operators if op.kind == "mul" and "y" in op.attributes}
    assert scales == {0.25, -30000.0}
    assert sum(op.kind == "linear" for op in operators) == 4 * 3 + 1


def test_functions_share_their_constants_and_the_file_is_what_coremltools_would_write(lower, tmp_path):
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    lowering = lower("llama-9-heads", "int4")
    coreml.write(lowering, tmp_path)
    package = tmp_path / "model.mlpackage"
    model = coremltools.models.MLModel(str(package), skip_model_load=True).get_spec()
    blobs: dict[str, dict[int, tuple]] = {}
    for name, function in model.mlProgram.functions.items():
        values = [
            op.attributes["val"] for op in function.block_specializations["CoreML8"].operations if op.type == "const"
        ]
        for op in function.block_specializations["CoreML8"].operations:
            values += [
                binding.value for a in op.inputs.values() for binding in a.arguments if binding.HasField("value")
            ]
        found = {v.blobFileValue.offset: v.type.tensorType for v in values if v.HasField("blobFileValue")}
        blobs[name] = {
            offset: (kind.dataType, [d.constant.size for d in kind.dimensions]) for offset, kind in found.items()
        }
    assert blobs["prefill"] == blobs["decode"] == blobs["score"]

    file = package / "Data/com.apple.CoreML/weights/weight.bin"
    reader, again = _BlobStorageReader(str(file)), tmp_path / "again.bin"
    writer = _BlobStorageWriter(str(again))
    kinds = {10: "fp16", 21: "int8", 25: "int4", 23: "int32"}  # MILSpec.DataType
    for offset, (kind, shape) in sorted(blobs["prefill"].items()):
        values = getattr(reader, f"read_{kinds[kind]}_data")(offset)
        assert len(values) == np.prod(shape)
        assert getattr(writer, f"write_{kinds[kind]}_data")(values) == offset
    del writer
    assert file.read_bytes() == again.read_bytes()


def test_two_exports_are_byte_identical_whatever_was_built_before(lower, tmp_path):
    files = []
    for index, name in enumerate(("qwen3", "mistral-window", "qwen3")):
        folder = tmp_path / str(index)
        folder.mkdir()
        coreml.write(lower(name, "int4"), folder)
        files.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert files[0] == files[2]
    assert files[0].keys() == files[1].keys() and files[0] != files[1]


@pytest.mark.parametrize(
    ("scheme", "tensor", "index", "value"),
    [
        ("fp32", "model.layers.1.mlp.up_proj.weight", (3, 5), -7e4),
        ("fp32", "model.norm.weight", (2,), 65505.0),
        ("int8", "model.layers.2.self_attn.k_proj.weight", (4, 1), 1e5),
        ("int4", "model.layers.0.mlp.down_proj.weight", (1, 33), 3e5),
    ],
)
def test_a_weight_beyond_fp16_is_refused_by_name_and_nothing_is_left(
    scheme, tensor, index, value, tiny_checkpoint, tmp_path
):
    def change(tensors: dict) -> None:
        tensors[tensor][index] = value

    changed = changed_checkpoint(tiny_checkpoint("llama-odd-vocabulary")[0], tmp_path / "checkpoint", change)
    (tmp_path / "out").mkdir()
    options = ExportOptions(targets=("coreml",), scheme=scheme, store=tmp_path / "store", verify=False)
    with pytest.raises(UnsupportedError) as caught:
        export_bundle(str(changed), tmp_path / "out" / "bundle", options)
    assert f"{tensor}{list(index)} is " in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_largest_fp16_passes(tiny_checkpoint, tmp_path):
    def change(tensors: dict) -> None:
        tensors["model.norm.weight"][:] = 65504

    folder = changed_checkpoint(tiny_checkpoint("llama-odd-vocabulary")[0], tmp_path / "checkpoint", change)
    options = ExportOptions(targets=("coreml",), scheme="fp32", store=tmp_path / "store", verify=False)
    written = WrittenPackage(package_of(export_bundle(str(folder), tmp_path / "bundle", options)))
    assert (written.constant("model_norm_weight") == 65504).all()


def test_prefill_equals_decode_step_by_step_across_calls_of_every_length(tiny_bundle):
    bundle = tiny_bundle("mistral-window", "int4", "coreml")
    tokens = np.random.default_rng(0).integers(5, 320, 150).tolist()
    with CoreMLSession(bundle.artifact("coreml"), "float32") as session:
        steps = np.concatenate([session.extend([token]) for token in tokens])
        session.rewind(0)
        whole = session.extend(tokens, logits=150)  # 128 and 22: the longest call is 128
        session.rewind(0)
        uneven = np.concatenate(
            [session.extend(tokens[:7], logits=7), session.extend(tokens[7:100]), session.extend(tokens[100:])]
        )
    assert np.abs(steps - whole).max() < 1e-4 * steps.std()
    assert np.abs(uneven - whole[[*range(7), 99, 149]]).max() < 1e-4 * steps.std()


def test_logits_of_the_last_rows_and_of_none(tiny_bundle):
    bundle = tiny_bundle("qwen3", "int8", "coreml")
    with bundle.session("coreml") as session:
        assert session.runtime == "coreml"
        assert session.description == "Core ML reference interpreter, float16 rounding"
        every = session.extend(TOKENS, logits=len(TOKENS))
        assert every.shape == (len(TOKENS), 320) and every.dtype == np.float32
        for rows in (1, 2, 5):
            session.rewind(0)
            np.testing.assert_allclose(session.extend(TOKENS, logits=rows), every[-rows:], atol=2e-2 * every.std())
        session.rewind(0)
        assert session.extend(TOKENS[:-1], logits=0).shape == (0, 320)
        np.testing.assert_allclose(session.extend(TOKENS[-1:]), every[-1:], atol=2e-2 * every.std())


def test_rewind_forgets_what_the_cache_still_holds(tiny_bundle):
    bundle = tiny_bundle("llama", "int4", "coreml")
    with bundle.session("coreml") as session, bundle.session("coreml") as fresh:
        session.extend([9] * 60)
        session.rewind(2)
        again = session.extend(TOKENS)
        fresh.extend([9] * 2)
        np.testing.assert_array_equal(again, fresh.extend(TOKENS))


def test_a_row_of_zeros_and_rows_beyond_the_square_of_fp16_pass_the_norm(tiny_checkpoint, tmp_path):
    def change(tensors: dict) -> None:
        table = tensors["model.embed_tokens.weight"]
        table[5], table[6], table[7] = 0, table[7] * 2e4 / table[7].abs().max(), table[7] * 1e-4
        for name in [name for name in tensors if name.endswith("bias")]:
            tensors[name] *= 0

    changed = changed_checkpoint(tiny_checkpoint("llama-untied-biases")[0], tmp_path / "checkpoint", change)
    bundle = export_bundle(
        str(changed), tmp_path / "bundle", ExportOptions(targets=("coreml",), scheme="fp32", verify=False)
    )
    checkpoint = open_checkpoint(changed)
    graph = build_graph(checkpoint.config, 160)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "fp32", "int8"), WeightStore(tmp_path))
    tokens = [5, 5, 6, 7]
    expected = ReferenceSession(graph, weights).all_logits(tokens)
    with bundle.session("coreml") as session:
        found = session.extend(tokens, logits=4)
    assert (expected[0] == 0).all() and (found[0] == 0).all()
    largest, rms = difference(found[2:], expected[2:])
    assert largest < 5e-2 and rms < 1e-2


def test_a_window_that_the_context_never_leaves_is_noted(tiny_checkpoint, tmp_path):
    folder, _ = tiny_checkpoint("mistral-window")
    options = ExportOptions(targets=("coreml",), scheme="int8", context=8, store=tmp_path / "store", verify=False)
    bundle = export_bundle(str(folder), tmp_path / "bundle", options)
    target = bundle.manifest.targets["coreml"]
    assert "sliding window 9 dropped: the context of 8 fits into it" in target.notes
    assert (target.longest_call, target.rows, target.runtime) == (8, 8, {"iOS": ">=18.0", "macOS": ">=15.0"})
    with bundle.session("coreml") as session, pytest.raises(InputError):
        session.extend([5] * 9)


@pytest.mark.parametrize(
    "program",
    [
        "from pocketlm_export.backends import coreml; graph = pickle.load(open({graph!r}, 'rb')); "
        "coreml.check(graph, {{}}); coreml.libraries()",
        "import pocketlm.runtimes.coreml",
    ],
)
def test_checks_and_sessions_do_not_import_coremltools(program, lower, tmp_path):
    graph = tmp_path / "graph"
    graph.write_bytes(pickle.dumps(lower("qwen3", "int4").graph))
    program = f"import pickle, sys; {program.format(graph=str(graph))}"
    program += "; assert not {'coremltools', 'torch', 'sklearn'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_coremltools_is_silent_and_leaves_the_hidden_packages_usable():
    program = (
        "import sys, pocketlm_export.backends.coreml.importing as importing; "
        "assert importing.coremltools.__version__; assert not {'torch', 'sklearn', 'transformers'} & set(sys.modules); "
        "import torch; assert torch.ones(1).item() == 1"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
