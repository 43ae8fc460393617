"""The ONNX artifact through ONNX's checker, its own schema, ONNX Runtime and onnxruntime-genai."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest

from pocketlm.errors import BundleError, PocketLMError, UnavailableError, UnsupportedError
from pocketlm.runtimes.onnx import open_session
from pocketlm_export.architectures import build_graph
from pocketlm_export.architectures._configuration import LayerConfig
from pocketlm_export.backends.base import Lowering, load_backend
from pocketlm_export.backends.onnx.file import OnnxFile
from pocketlm_export.backends.reading import open_reader
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import Activation
from pocketlm_export.graph.rotary import Rotary, default_frequencies, rotary_tables
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.quantization.schemes import SchemeRow, assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.reference import ReferenceSession

MODELS = ("model.onnx", "head.onnx")
PAGE = 4096
# Name, scheme, head: tied and untied, fused and rotated outside the kernel, heads and columns that must be filled up.
CASES = [
    ("llama", "fp32", "int8"),
    ("llama", "int4", "int8"),
    ("llama", "int4", "int4"),
    ("llama-untied-biases", "int4", "int8"),
    ("llama-odd-head-dim", "int4", "int8"),
    ("llama-odd-widths", "int8", "int8"),
    ("llama-9-heads", "int4", "int8"),
    ("mistral-window", "int4", "int8"),
    ("qwen3", "int8", "int8"),
    ("qwen3-biases", "int4", "int8"),
]


def tokens_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(5, 300, length).tolist()


def store_of(bundle, folder, tmp_path):
    """The graph, and the weights as the exporter saw them."""
    checkpoint = open_checkpoint(folder)
    graph = build_graph(checkpoint.config, bundle.manifest.model.context_length)
    rows = assign_rows(graph, bundle.manifest.scheme.name, bundle.manifest.scheme.head)
    return graph, quantize(checkpoint.tensors, rows, WeightStore(tmp_path))


@pytest.mark.parametrize(("name", "scheme", "head"), CASES)
def test_onnx_checks_the_models_and_the_runtime_loads_them_without_a_warning(name, scheme, head, tiny_bundle, capfd):
    folder = tiny_bundle(name, scheme, "onnx", head).folder / "onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    capfd.readouterr()
    for model in MODELS:
        onnx.checker.check_model(str(folder / model))
        onnxruntime.InferenceSession(str(folder / model), options)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("name", "scheme", "head"), CASES)
def test_the_integers_read_back_are_the_stores(name, scheme, head, tiny_bundle, tiny_checkpoint, tmp_path):
    bundle = tiny_bundle(name, scheme, "onnx", head)
    _, weights = store_of(bundle, tiny_checkpoint(name)[0], tmp_path)
    reader = open_reader("onnx", bundle.folder / "onnx/model.onnx", bundle.manifest)
    compared = 0
    for weight, record in bundle.manifest.weights.items():
        if record.scheme == "fp32":
            continue
        place, tensor = record.places["onnx"], weights.quantized(weight)
        written = reader.rows(place.entry, place.first_row, place.first_row + record.shape[0])
        np.testing.assert_array_equal(written.codes, tensor.codes())
        np.testing.assert_array_equal(written.scales, tensor.scales())
        assert written.bits == tensor.row.bits
        compared += 1
    assert compared == (0 if scheme == "fp32" else 3 * 7 + (1 if bundle.manifest.model.tied else 2))


@pytest.mark.parametrize(("name", "scheme", "head"), CASES)
def test_the_values_read_back_are_the_checkpoints(name, scheme, head, tiny_bundle, tiny_checkpoint, tmp_path):
    bundle = tiny_bundle(name, scheme, "onnx", head)
    graph, weights = store_of(bundle, tiny_checkpoint(name)[0], tmp_path)
    file = OnnxFile(bundle.folder / "onnx/model.onnx")
    for weight, record in bundle.manifest.weights.items():
        if record.scheme == "fp32":
            place = record.places["onnx"]
            stored = file.constant(place.entry)[place.first_row : place.first_row + record.shape[0]]
            np.testing.assert_array_equal(stored, weights.values(weight))
    tables = rotary_tables(graph.attentions[0].rotary, graph.context_length)
    for part, table in zip(("cos", "sin"), tables, strict=True):
        np.testing.assert_array_equal(file.constant(f"rotary.0.{part}"), table)


@pytest.mark.parametrize(("name", "scheme", "head"), CASES)
def test_the_attributes_read_back_are_the_graphs(name, scheme, head, tiny_bundle, tiny_checkpoint, tmp_path):
    bundle = tiny_bundle(name, scheme, "onnx", head)
    graph, _ = store_of(bundle, tiny_checkpoint(name)[0], tmp_path)
    nodes = OnnxFile(bundle.folder / "onnx/model.onnx").nodes
    layers = [node.attributes for node in nodes if node.operator == "com.microsoft.GroupQueryAttention"]
    assert len(layers) == len(graph.attentions)
    for found, expected in zip(layers, graph.attentions, strict=True):
        assert (found["num_heads"], found["kv_num_heads"]) == (expected.heads, expected.kv_heads)
        assert found["scale"] == np.float32(expected.scale)
        assert found["local_window_size"] == (expected.window or -1)
    assert {node.attributes["accuracy_level"] for node in nodes if node.operator == "com.microsoft.MatMulNBits"} <= {4}
    epsilons = {node.attributes["epsilon"] for node in nodes if "epsilon" in node.attributes}
    assert epsilons == {np.float32(graph.attentions[0].norm_epsilon)}


@pytest.mark.parametrize(("name", "scheme", "head"), CASES)
def test_constants_begin_at_pages_do_not_overlap_and_are_all_used(name, scheme, head, tiny_bundle):
    folder = tiny_bundle(name, scheme, "onnx", head).folder / "onnx"
    regions = set()
    for model in MODELS:
        file = OnnxFile(folder / model)
        assert set(file.constants) <= {value for node in file.nodes for value in node.inputs}
        regions |= {
            (offset, size) for name in file.constants if (place := file.place(name)) for _, offset, size in [place]
        }
    assert all(offset % PAGE == 0 for offset, _ in regions)
    ordered = sorted(regions)
    assert all(offset + size <= after for (offset, size), (after, _) in pairwise(ordered))
    assert sum(ordered[-1]) == (folder / "model.onnx.data").stat().st_size


@pytest.mark.parametrize(
    ("name", "scheme", "head"), [("llama", "int4", "int8"), ("llama", "int4", "int4"), ("llama", "fp32", "int8")]
)
def test_a_tied_embedding_and_head_share_their_bytes(name, scheme, head, tiny_bundle):
    folder = tiny_bundle(name, scheme, "onnx", head).folder / "onnx"
    file, embedding = OnnxFile(folder / "model.onnx"), "model.embed_tokens.weight"
    gather = next(node for node in file.nodes if node.operator in ("Gather", "com.microsoft.GatherBlockQuantized"))
    product = next(node for node in file.nodes if node.outputs[0] == "logits")
    assert embedding in gather.inputs[0]
    assert (
        file.place(gather.inputs[0]) == file.place(product.inputs[1]) == OnnxFile(folder / "head.onnx").place(embedding)
    )


def test_two_exports_are_byte_identical(tiny_checkpoint, tmp_path):
    source, _ = tiny_checkpoint("qwen2")
    folders = []
    for place in ("a", "b/c"):
        options = ExportOptions(targets=("onnx",), store=tmp_path / place / "store", verify=False)
        folders.append(export_bundle(str(source), tmp_path / place / "bundle", options).folder)
    names = sorted(path.name for path in (folders[0] / "onnx").iterdir())
    assert names == sorted(path.name for path in (folders[1] / "onnx").iterdir())
    for name in names:
        assert (folders[0] / "onnx" / name).read_bytes() == (folders[1] / "onnx" / name).read_bytes()


def test_genai_config_has_every_stop_id_and_the_stated_sampling(tiny_checkpoint, tmp_path):
    source, _ = tiny_checkpoint("qwen2")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in source.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    stated = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
    generation = {"eos_token_id": [7, 2], "pad_token_id": 999_999, "bos_token_id": 1, **stated}
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    bundle = export_bundle(
        str(checkpoint), tmp_path / "bundle", ExportOptions(targets=("onnx",), store=tmp_path, verify=False)
    )
    config = json.loads((bundle.folder / "onnx/genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 7]
    assert config["model"]["pad_token_id"] == 2
    assert {key: config["search"].get(key) for key in stated} == {**stated, "min_p": None}
    assert any("min_p" in note for note in bundle.manifest.targets["onnx"].notes)


@pytest.mark.parametrize("scheme", ("fp32", "int4"))
def test_a_rewound_session_gives_the_same_bits_again(scheme, tiny_bundle):
    tokens = tokens_of(60)
    with tiny_bundle("llama-9-heads", scheme, "onnx").session("onnx", threads=1) as session:
        session.extend(tokens[:30])
        first = session.extend(tokens[30:60], logits=30)
        session.extend(tokens_of(50))
        session.rewind(30)
        np.testing.assert_array_equal(session.extend(tokens[30:60], logits=30), first)


def test_many_rows_are_the_rows_one_by_one(tiny_bundle):
    tokens = tokens_of(40)
    with tiny_bundle("qwen3", "fp32", "onnx").session("onnx", threads=1) as session:
        together = session.extend(tokens, logits=40)
        session.rewind(0)
        single = np.concatenate([session.extend([token]) for token in tokens])
    assert np.abs(together - single).max() <= 1e-5 * single.std()


def test_a_prompt_longer_than_a_call_is_the_same(tiny_bundle):
    bundle, tokens = tiny_bundle("mistral-window", "fp32", "onnx"), tokens_of(50)
    with bundle.session("onnx", threads=1) as session:
        whole = session.extend(tokens, logits=20)
    with open_session(replace(bundle.artifact("onnx"), longest_call=8, rows=3), 1) as session:
        assert np.abs(session.extend(tokens, logits=20) - whole).max() <= 1e-5 * whole.std()


@pytest.mark.parametrize("scheme", ("fp32", "int8", "int4"))
def test_the_head_model_gives_the_decoders_last_row(scheme, tiny_bundle):
    tokens = tokens_of(40)
    with tiny_bundle("llama", scheme, "onnx").session("onnx", threads=1) as session:
        last = session.extend(tokens)
        session.rewind(0)
        rows = session.extend(tokens, logits=2)
    assert np.abs(rows[1] - last[0]).max() <= 1e-5 * last.std()


def test_the_floor_is_stated_and_kept(tiny_bundle):
    bundle = tiny_bundle("llama", "int4", "onnx")
    assert bundle.manifest.targets["onnx"].runtime == {"onnxruntime": ">=1.23.2"}
    assert tiny_bundle("mistral-window", "int4", "onnx").manifest.targets["onnx"].runtime == {"onnxruntime": ">=1.24.1"}
    newer = replace(bundle.artifact("onnx"), requirements={"onnxruntime": ">=99.0.0"})
    with pytest.raises(UnavailableError, match=r"needs onnxruntime 99\.0\.0"):
        open_session(newer, 1)


def test_a_file_that_onnx_runtime_refuses_is_named(tiny_bundle, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a nothing")
    with pytest.raises(PocketLMError, match=r"model\.onnx: ONNX Runtime can't load it"):
        open_session(replace(tiny_bundle("llama", "int4", "onnx").artifact("onnx"), path=tmp_path / "model.onnx"), 1)


def test_a_constant_outside_the_data_file_is_refused(tiny_bundle, tmp_path):
    source = tiny_bundle("llama", "int4", "onnx").folder / "onnx"
    model = onnx.load(str(source / "model.onnx"), load_external_data=False)
    constant = next(constant for constant in model.graph.initializer if constant.external_data)
    next(entry for entry in constant.external_data if entry.key == "offset").value = str(1 << 40)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(BundleError, match=constant.name):
        OnnxFile(tmp_path / "model.onnx").constant(constant.name)


def test_what_the_kernels_lack_is_refused_by_name(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("llama")[0])
    graph, backend = build_graph(checkpoint.config, 64), load_backend("onnx")
    rows = dict.fromkeys(graph.weights())
    backend.check(graph, rows)
    query = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UnsupportedError, match=f"{query}.*groups of 48"):
        backend.check(graph, {**rows, query: SchemeRow("odd", 4, 48, "fit")})
    with pytest.raises(UnsupportedError, match=f"{query}.*same scheme"):
        backend.check(graph, {**rows, query: SchemeRow("int4", 4, 32, "fit")})
    relu = [replace(node, kind="relu") if isinstance(node, Activation) else node for node in graph]
    with pytest.raises(UnsupportedError, match="'relu'"):
        backend.check(replace(graph, nodes=tuple(relu)), rows)


def run_unshared(folder, tokens: list[int], prompt: int) -> np.ndarray:
    """The last position's logits of the prompt and of every token after it, with caches that grow."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_key_values")}
    caches = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    names, rows, position = [value.name for value in session.get_outputs()], [], 0
    for call in [tokens[:prompt], *([token] for token in tokens[prompt:])]:
        position += len(call)
        inputs = {"input_ids": np.array([call]), "attention_mask": np.ones((1, position), np.int64), **caches}
        outputs = dict(zip(names, session.run(None, inputs), strict=True))
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        rows.append(outputs["logits"][0, -1])
    return np.stack(rows)


@pytest.mark.parametrize("name", ("llama", "llama-odd-head-dim", "llama-9-heads", "qwen3-biases"))
def test_layers_may_rotate_a_part_of_their_heads_or_nothing(name, tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint(name)[0])
    half = checkpoint.config.head_dim // 4 * 2
    layers = (
        LayerConfig(None, None),
        LayerConfig(Rotary(default_frequencies(1e4, half), 1.25), 7),
        LayerConfig(Rotary(default_frequencies(5e3, checkpoint.config.head_dim)), None),
    )
    config = replace(checkpoint.config, layers=layers)
    graph = build_graph(config, config.context_length)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "fp32", "int8"), WeightStore(tmp_path))
    folder = tmp_path / "onnx"
    folder.mkdir()
    lowering = Lowering(
        graph=graph, weights=weights, config=config, generation=checkpoint.generation, tokenizer_files={}
    )
    load_backend("onnx").write(lowering, folder)
    tokens = tokens_of(50)
    expected = ReferenceSession(graph, weights).all_logits(tokens)[29:]
    assert np.abs(run_unshared(folder, tokens, 30) - expected).max() <= 1e-4 * expected.std()
