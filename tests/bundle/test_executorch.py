"""The .pte: what was written reads back, the official runner and XNNPACK's weight cache run it as it is."""

import ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import BundleError, PocketLMError, UnsupportedError
from pocketlm.runtimes import executorch_torch
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends import executorch as backend
from pocketlm_export.backends.executorch.memory import ALIGNMENT, Lifetime, plan_arena
from pocketlm_export.backends.executorch.read import open_reader
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import Activation, Linear, RmsNorm
from pocketlm_export.graph.rotary import rotary_tables
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.quantization.schemes import SchemeRow, assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import Weights, quantize
from tests.tiny_models import BASE, Row, write_checkpoint

TOKENS = np.random.default_rng(7).integers(5, 320, 140).tolist()
QUANTIZED = [
    ("llama", "int4", "int4"),
    ("llama", "int4", "int8"),
    ("qwen3-biases", "int4", "int4"),
    ("qwen2", "int8", "int8"),
    ("phi", "int4", "int8"),
    ("gemma2", "int4", "int8"),
    ("qwen3-moe-mixed", "int4", "int8"),
]
VARIANTS = [*QUANTIZED, ("llama-untied-biases", "fp32", "int8"), ("qwen3", "fp32", "int8")]
IDS = ["-".join(variant) for variant in VARIANTS]


def pte(bundle) -> Path:
    return bundle.folder / bundle.manifest.targets["executorch"].path


def read(bundle) -> PteFile:
    return PteFile(pte(bundle))


def graph_and_weights(folder, scheme: str, head: str, store: Path) -> tuple:
    checkpoint = open_checkpoint(folder)
    graph = build_graph(checkpoint.config, checkpoint.config.context_length)
    return graph, quantize(checkpoint.tensors, assign_rows(graph, scheme, head), WeightStore(store))


def whole(weights: Weights, name: str) -> np.ndarray:
    return np.concatenate([block for _, block in weights.blocks(name)])


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_every_weight_reads_back_as_the_store_holds_it(row, scheme, head, tiny_checkpoint, tiny_bundle, tmp_path):
    folder, _ = tiny_checkpoint(row)
    graph, weights = graph_and_weights(folder, scheme, head, tmp_path)
    bundle = tiny_bundle(row, scheme, "executorch", head)
    reader = open_reader(pte(bundle), bundle.manifest)
    places = {name: weight.places["executorch"] for name, weight in bundle.manifest.weights.items()}
    assert places.keys() == graph.weights().keys()
    for name, weight in graph.weights().items():
        first = places[name].first_row
        rows = reader.rows(places[name].entry, first, first + weight.shape[0])
        if weights.row(name) is None:
            expected = weights.values(name) if len(weight.shape) == 1 else whole(weights, name)
            np.testing.assert_array_equal(rows, expected, err_msg=name)
        else:
            tensor = weights.quantized(name)
            np.testing.assert_array_equal(rows.codes, tensor.codes(), err_msg=name)
            np.testing.assert_array_equal(rows.scales, tensor.scales(), err_msg=name)


@pytest.mark.parametrize(("scheme", "head"), [("fp32", "int8"), ("int4", "int8"), ("int4", "int4")])
def test_a_tied_head_reads_the_bytes_of_the_embedding(scheme, head, tiny_bundle):
    bundle = tiny_bundle("llama", scheme, "executorch", head)
    reader = open_reader(pte(bundle), bundle.manifest)
    payload = reader.file.delegates[-1]
    key = payload.values[payload.nodes[-1].inputs[1]].constant.key
    assert reader.file.position(reader.file.named[key]) == reader.file.constant_position(1)
    if (scheme, head) == ("int4", "int4"):  # the nibbles of each pair in the embedding's order
        as_head, as_embedding = (reader.rows(entry, 0, 320).codes for entry in (key, "constant/1"))
        np.testing.assert_array_equal(as_head[:, 0::2], as_embedding[:, 1::2])
        np.testing.assert_array_equal(as_head[:, 1::2], as_embedding[:, 0::2])


def test_rotary_tables_and_masks_read_back(tiny_checkpoint, tiny_bundle):
    folder, _ = tiny_checkpoint("mistral-window")
    graph = build_graph(open_checkpoint(folder).config, 160)
    file = read(tiny_bundle("mistral-window", "fp32", "executorch"))
    constants = [file.constant(index) for index in range(1, len(file.program.constant_segment.offsets))]
    cos, sin = rotary_tables(graph.attentions[0].rotary, 160)
    tables = [table[:, 0] for table in constants if table.shape == (160, 1, 32)]
    np.testing.assert_array_equal(tables[0], np.concatenate((cos, cos), 1))
    np.testing.assert_array_equal(tables[1], np.concatenate((-sin, sin), 1))
    (mask,) = (table for table in constants if table.shape == (128, 320))
    for start in (0, 1, 100):
        query, key = np.arange(start, start + 32)[:, None], np.arange(160)[None, :]
        seen = mask[:32, 160 - start : 320 - start] == 0
        np.testing.assert_array_equal(seen, (key <= query) & (key > query - 9))


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_delegates_hold_nothing_that_xnnpack_does_not_pack(row, scheme, head, tiny_bundle):
    """With a weight cache XNNPACK frees the named data once it is packed: only fully connected nodes pack."""
    for delegate in read(tiny_bundle(row, scheme, "executorch", head)).delegates:
        constants = {value.id for value in delegate.values.values() if value.constant is not None}
        for node in delegate.nodes:
            assert node.kind == "FullyConnected" or not constants & set(node.inputs)


def test_one_delegate_a_layer(tiny_bundle):
    bundle = tiny_bundle("qwen2", "int8", "executorch", "int8")
    assert len(read(bundle).delegates) == bundle.manifest.model.layers + 2


def test_keys_of_the_delegates_constants_stand_for_their_content(tiny_bundle):
    """Phones share packed weights by key: a key that two models share must mean the same bytes and scales."""
    contents: dict[str, bytes] = {}
    for row, scheme, head in VARIANTS:
        file = read(tiny_bundle(row, scheme, "executorch", head))
        for key, segment in file.named.items():
            content = file.segment(segment).tobytes()
            assert contents.setdefault(key, content) == content
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in contents)


@pytest.mark.parametrize(("scheme", "head"), [("fp32", "int8"), ("int4", "int4")])
def test_two_exports_are_the_same_bytes(scheme, head, tiny_checkpoint, tmp_path):
    folder, _ = tiny_checkpoint("qwen3")
    files = []
    for name in ("one", "another"):
        options = ExportOptions(
            targets=("executorch",), scheme=scheme, head=head, store=tmp_path / name / "store", verify=False
        )
        files.append(pte(export_bundle(str(folder), tmp_path / name / "bundle", options)).read_bytes())
    assert files[0] == files[1]


def test_the_schemas_come_without_the_vendors_exporter():
    """Its import takes seconds and prints warnings, and must still be possible afterwards."""
    code = (
        "import sys, pocketlm_export.backends.executorch.importing as importing;"
        "assert not any(name.startswith('executorch.exir.capture') or name == 'torch' for name in sys.modules);"
        "import executorch.exir, executorch.exir.schema as schema;"
        "assert schema is importing.schema and executorch.exir.to_edge"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_facts_of_the_official_runner(tiny_bundle):
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    file = read(bundle)
    assert file.fact("get_max_seq_len") == [bundle.manifest.targets["executorch"].longest_call] == [128]
    assert file.fact("get_max_context_len") == [160]
    assert file.fact("enable_dynamic_shape") == file.fact("use_kv_cache") == [True]
    assert file.fact("get_eos_ids") == bundle.manifest.model.stop_ids


def test_a_longest_call_of_the_whole_context(tiny_checkpoint, tmp_path):
    folder, _ = tiny_checkpoint("llama")
    options = ExportOptions(targets=("executorch",), scheme="fp32", context=16, store=tmp_path / "store", verify=False)
    bundle = export_bundle(str(folder), tmp_path / "bundle", options)
    assert bundle.manifest.targets["executorch"].longest_call == 16
    with bundle.session("executorch", threads=1) as session:
        at_once = session.extend(TOKENS[:16], logits=8)
        session.rewind(0)
        session.extend(TOKENS[:15], logits=0)
        np.testing.assert_allclose(session.extend(TOKENS[15:16])[0], at_once[-1], atol=1e-4)


def test_a_window_that_the_context_fits_into_is_noted(tiny_checkpoint, tmp_path):
    folder, _ = tiny_checkpoint("mistral-window")
    options = ExportOptions(targets=("executorch",), context=9, store=tmp_path / "store", verify=False)
    bundle = export_bundle(str(folder), tmp_path / "bundle", options)
    assert any("window 9 dropped" in note for note in bundle.manifest.targets["executorch"].notes)
    assert not any(table.shape == (9, 18) for table in map(read(bundle).constant, range(1, 4)))


def test_rows_of_a_long_call_equal_one_token_a_call(tiny_bundle):
    with tiny_bundle("llama", "fp32", "executorch").session("executorch", threads=1) as session:
        many = session.extend(TOKENS, logits=len(TOKENS))
        session.rewind(0)
        single = np.concatenate([session.extend([token]) for token in TOKENS])
    np.testing.assert_allclose(many, single, atol=1e-4 * single.std())


@pytest.mark.parametrize("row", ["llama", "mistral-window"])
def test_a_rewound_session_repeats_its_bits(row, tiny_bundle):
    with tiny_bundle(row, "int4", "executorch", "int8").session("executorch", threads=1) as session:
        session.extend(TOKENS[:20], logits=0)
        first = session.extend(TOKENS[20:40], logits=8)
        session.extend(TOKENS[40:130], logits=0)
        session.rewind(20)
        np.testing.assert_array_equal(session.extend(TOKENS[20:40], logits=8), first)


def test_threads_belong_to_the_process(tiny_bundle):
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    with bundle.session("executorch", threads=1), pytest.raises(PocketLMError, match="process-wide"):
        bundle.session("executorch", threads=2)
    with bundle.session("executorch", threads=2) as session:
        assert session.extend(TOKENS[:3]).shape == (1, 320)


def test_a_file_that_is_no_program_is_refused(tiny_bundle, tmp_path):
    from pocketlm.runtimes.executorch import open_session

    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    broken = tmp_path / "broken.pte"
    broken.write_bytes(pte(bundle).read_bytes()[:3000])
    with pytest.raises(BundleError, match=r"broken\.pte"):
        open_session(replace(bundle.artifact("executorch"), path=broken), 1)


def test_what_the_kernels_cannot_express_is_refused_by_name(tiny_checkpoint):
    folder, _ = tiny_checkpoint("llama")
    graph = build_graph(open_checkpoint(folder).config, 160)
    rows = assign_rows(graph, "int4", "int8")
    backend.check(graph, rows)
    unknown = [replace(node, kind="mish") if isinstance(node, Activation) else node for node in graph]
    with pytest.raises(UnsupportedError, match="activation 'mish'"):
        backend.check(replace(graph, nodes=tuple(unknown)), rows)
    grouped = SchemeRow("int8", 8, 32, "absmax")
    with pytest.raises(UnsupportedError, match=r"o_proj.*groups of 32"):
        backend.check(graph, rows | {"model.layers.0.self_attn.o_proj.weight": grouped})


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 30), st.integers(0, 10)), max_size=40))
def test_values_alive_together_never_share_bytes(drawn):
    lifetimes = [Lifetime(size, first, first + length) for size, first, length in drawn]
    offsets, total = plan_arena(lifetimes)
    placed = list(zip(lifetimes, offsets, strict=True))
    assert total == 0 or total <= sum(size + ALIGNMENT for size, *_ in drawn)
    for index, (a, start_a) in enumerate(placed):
        assert start_a % ALIGNMENT == 0
        assert start_a + a.size <= total
        for b, start_b in placed[:index]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or start_a + a.size <= start_b or start_b + b.size <= start_a


def test_the_cut_graph_keeps_every_node_and_the_table_knows_its_kind(tiny_checkpoint):
    from pocketlm_export.backends.executorch.emit import EMITTERS
    from pocketlm_export.backends.executorch.partition import Delegate, partition

    folder, _ = tiny_checkpoint("qwen3-biases")
    graph = build_graph(open_checkpoint(folder).config, 160)
    steps = partition(graph)
    nodes = [node for step in steps for node in (step.nodes if isinstance(step, Delegate) else [step])]
    assert {type(node) for node in nodes} <= set(EMITTERS)
    for kind in (Linear, RmsNorm):
        assert sum(isinstance(node, kind) for node in nodes) == sum(isinstance(node, kind) for node in graph)


@pytest.fixture(scope="session")
def weight_cache_shim(tmp_path_factory) -> ctypes.CDLL:
    """tests/bundle/weight_cache.cpp built against the libraries of the installed ExecuTorch."""
    import executorch

    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("not run: no C++ compiler")
    root = Path(next(iter(executorch.__path__)))
    library = tmp_path_factory.mktemp("shim") / "weight_cache.so"
    command = [
        compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS",
        f"-I{root}/include", f"-I{root}/include/executorch/runtime/core/portable_type/c10",
        str(Path(__file__).with_name("weight_cache.cpp")), "-o", str(library),
        f"-L{root}/lib", "-lexecutorch", f"-Wl,-rpath,{root}/lib",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    shim = ctypes.CDLL(str(library))
    shim.program_open.restype = ctypes.c_void_p
    shim.program_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p]
    shim.program_run.restype = ctypes.c_int64
    shim.program_run.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
    ]  # fmt: skip
    shim.program_close.argtypes = [ctypes.c_void_p]
    return shim


def run_with_weight_cache(shim: ctypes.CDLL, path: Path, load_mode: int, cache: Path | None, calls) -> list[np.ndarray]:
    program = shim.program_open(str(path).encode(), load_mode, str(cache or "").encode())
    assert program, "the program could not be loaded"
    logits, results, position = np.empty(8 * 320, np.float32), [], 0
    for call in calls:
        ids = np.array(call, np.int64)
        count = shim.program_run(program, ids.ctypes.data, len(ids), position, logits.ctypes.data, logits.size)
        assert count == min(len(ids), 8) * 320
        results.append(logits[:count].reshape(-1, 320).copy())
        position += len(ids)
    shim.program_close(program)
    return results


@pytest.mark.parametrize("load_mode", [0, 1], ids=["file", "mmap"])
@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_it_is_right_with_the_weight_cache_of_phones(
    row, scheme, head, load_mode, tiny_bundle, weight_cache_shim, tmp_path
):
    """Packed at load, packed into a file, and read from that file: the logits of the default run, bit by bit."""
    bundle = tiny_bundle(row, scheme, "executorch", head)
    calls = [TOKENS[:50], *([token] for token in TOKENS[50:54])]
    with executorch_torch.open_session(bundle.artifact("executorch"), 1) as session:
        expected = [session.extend(call, logits=min(8, len(call))) for call in calls]
        packed = tmp_path / "packed"
        for cache in (None, packed, packed):
            got = run_with_weight_cache(weight_cache_shim, pte(bundle), load_mode, cache, calls)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)
        assert packed.stat().st_size > 0


def test_equal_codes_with_other_scales_are_packed_apart(weight_cache_shim, tmp_path):
    """The cache finds a packed filter, scales included, by its key alone."""
    from safetensors.torch import load_file, save_file

    write_checkpoint(Row("doubled", "llama", BASE), tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    first = tensors["model.layers.0.mlp.down_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = first * 2
    tensors["model.layers.2.mlp.down_proj.weight"] = first.clone()
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    options = ExportOptions(targets=("executorch",), store=tmp_path / "store", verify=False)
    bundle = export_bundle(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    entries = [
        bundle.manifest.weights[f"model.layers.{layer}.mlp.down_proj.weight"].places["executorch"].entry
        for layer in range(3)
    ]
    assert entries[0] == entries[2] != entries[1]
    with executorch_torch.open_session(bundle.artifact("executorch"), 1) as session:
        expected = session.extend(TOKENS[:20], logits=8)
        (got,) = run_with_weight_cache(weight_cache_shim, pte(bundle), 1, tmp_path / "packed", [TOKENS[:20]])
    np.testing.assert_array_equal(got, expected)
