"""The reader of ONNX artifacts: float64 execution against the reference, the real runtime, refusals and faults."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings, strategies

from pocketlm.errors import BundleError, CheckError, PocketLMError, UnsupportedError
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.onnx.file import OnnxFile
from pocketlm_export.backends.reading import Call, NotRun, Past, Run, open_reader
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.lockstep import Lane, run_lanes
from pocketlm_export.verify.structure import check_structure
from tests.verify.onnx_faults import FAULTS, Place, places

# Heads rotated outside the kernel, windows, query and key norms with biases, filled heads and columns, large residuals.
NAMES = ("llama-9-heads", "qwen2-window", "qwen3-biases", "llama-odd-head-dim", "llama-odd-widths", "llama-outliers")
CASES = [(name, scheme) for name in NAMES for scheme in ("int4", "fp32")]
# Layer norms, parallel blocks, rows of fused tensors, norms with an offset, scales, soft caps; experts in every scheme.
OPERATORS = [
    *((name, scheme) for name in ("phi", "phi3", "gemma2", "gemma3") for scheme in ("int4", "fp32")),
    *((name, scheme) for name in ("mixtral", "qwen3-moe-plain-shares") for scheme in ("int8", "fp32")),
    ("mixtral", "int4"),
]
CONTEXT = 160
WINDOW = 11  # of qwen2-window
FLOOR = 1e-9  # of float64 against float64; measured 2e-14 at most


def tokens_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(5, 300, length).tolist())


def decode(count: int) -> tuple[Call, ...]:
    return tuple(Call((token,), 1) for token in tokens_of(count, 1))


RUNS = [
    Run("text", (Call((7, *tokens_of(29)), 7), *decode(5), Call(tokens_of(3, 2), 1), Call(tokens_of(4, 3), 2))),
    *(
        Run(f"cache of {past}", (Call(tokens_of(3), 3), *decode(1)), Past(past))
        for past in range(WINDOW - 2, WINDOW + 2)
    ),
    Run("the end", (Call(tokens_of(3), 1),), Past(CONTEXT - 3, seed=1)),
]
# The end of the context is left out where a fault would write behind it, which is refused.
SHORT_RUNS = RUNS[:-1]


def opened(bundle, folder=None):
    path = bundle.manifest.targets["onnx"].path.removeprefix("onnx/")
    return open_reader("onnx", (folder or bundle.folder / "onnx") / path, bundle.manifest)


def reference_of(bundle, source, tmp_path, reader, runs=RUNS):
    """The graph, the weights as the exporter saw them, and the float64 reference with the constants of the file."""
    checkpoint = open_checkpoint(source)
    graph = build_graph(checkpoint.config, bundle.manifest.model.context_length)
    rows = assign_rows(graph, bundle.manifest.scheme.name, bundle.manifest.scheme.head)
    weights = quantize(checkpoint.tensors, rows, WeightStore(tmp_path))
    lane = Lane(name="exact", runs=runs, weights=weights, stored=reader.stored)
    return graph, weights, run_lanes(graph, [lane])["exact"]


def deviation(found, expected) -> float:
    """The largest of logits, keys and values, in their standard deviations."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        for part in ("logits", "keys", "values"):
            for x, y in zip(getattr(one, part), getattr(other, part), strict=True):
                assert x.shape == y.shape
                worst = max(worst, float(np.abs(x - y).max() / y.std()))
    return worst


def copied(bundle, tmp_path):
    return shutil.copytree(bundle.folder / "onnx", tmp_path / "onnx", dirs_exist_ok=True)


def edit(folder, change, file="model.onnx"):
    model = onnx.load(str(folder / file), load_external_data=False)
    change(model.graph)
    (folder / file).write_bytes(model.SerializeToString())


def first(graph, operator):
    return next(node for node in graph.node if node.op_type == operator)


@pytest.mark.parametrize(("name", "scheme"), [*CASES, *OPERATORS])
def test_execution_in_float64_is_the_reference(name, scheme, tiny_bundle, tiny_checkpoint, tmp_path):
    bundle = tiny_bundle(name, scheme, "onnx")
    reader = opened(bundle)
    graph, weights, reference = reference_of(bundle, tiny_checkpoint(name)[0], tmp_path, reader)
    assert deviation(reader.execute(RUNS), reference) <= FLOOR
    checks, counts = check_structure("onnx", reader, graph, bundle.manifest, weights)
    assert all(check.passed for check in checks), checks
    assert counts["weights"] == len(bundle.manifest.weights)


@pytest.mark.parametrize(("name", "scheme"), [*CASES, *OPERATORS])
def test_the_runtime_in_float32_means_the_same(name, scheme, tiny_bundle):
    reader = opened(tiny_bundle(name, scheme, "onnx"))
    # float32 against float64; measured 1.2e-5 at most, with residuals of 1000.
    assert deviation(reader.meaning(RUNS), reader.execute(RUNS)) <= 5e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_product_is_what_its_inputs_make(name, tiny_bundle):
    measured = opened(tiny_bundle(name, "int4", "onnx")).kernels(RUNS)
    assert measured.pieces == 3 * 4 + 2  # of three layers, and the logits of both models
    positions = sum(len(call.tokens) for run in RUNS for call in run.calls[:4])
    assert len(measured.errors) > 12 * positions
    assert np.quantile(measured.errors, 0.99) <= 1e-5 and measured.errors.max() <= 2e-2
    assert opened(tiny_bundle(name, "fp32", "onnx")).kernels(RUNS) == NotRun("nothing is quantized")


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-plain-shares"])
def test_every_mixture_of_experts_is_what_its_inputs_make(name, scheme, tiny_bundle):
    measured = opened(tiny_bundle(name, scheme, "onnx")).kernels(RUNS)
    assert measured.pieces == 3 * (2 + 1) + 2  # of a layer: merged queries, keys and values, results, the experts
    assert measured.errors.max() <= 1e-5


def test_exposing_the_products_changes_no_bit(tiny_bundle):
    bundle = tiny_bundle("qwen2-window", "int4", "onnx")
    path = bundle.folder / "onnx/model.onnx"
    exposed = onnx.load(str(path), load_external_data=False)
    present = {value.name for value in exposed.graph.output}
    names = dict.fromkeys(
        name for node in exposed.graph.node if node.op_type == "MatMulNBits" for name in (node.input[0], node.output[0])
    )
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    feeds = {"input_ids": np.array([tokens_of(20)]), "attention_mask": np.ones((1, 20), np.int64)}
    for value in exposed.graph.input:
        if value.name.startswith("past"):
            sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            feeds[value.name] = np.zeros((1, sizes[1], 0, sizes[3]), np.float32)
    plain = onnxruntime.InferenceSession(str(path)).run(["logits", "hidden_states"], feeds)
    again = onnxruntime.InferenceSession(exposed.SerializeToString(), options).run(["logits", "hidden_states"], feeds)
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama-9-heads", "int4"), ("qwen2-window", "int4"), ("qwen3-biases", "fp32")]
)
def test_pieces_of_the_decoder_compute_the_bits_of_the_whole(name, scheme, tiny_bundle, monkeypatch):
    bundle = tiny_bundle(name, scheme, "onnx")
    reader = opened(bundle)
    assert reader.in_parts(RUNS) is None
    means, products = reader.meaning(RUNS), reader.kernels(RUNS)
    with bundle.session("onnx") as session:
        calls = [session.extend(call.tokens, logits=call.rows) for call in RUNS[0].calls]
    monkeypatch.setattr("pocketlm_export.backends.onnx.read.LARGEST_SESSION", 0)
    monkeypatch.setattr("pocketlm_export.backends.onnx.pieces.LARGEST_PIECE", 0)
    shipped = reader.in_parts(RUNS)
    assert len(shipped) == len(RUNS)
    for one, other in zip(calls, shipped[0].logits, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(means, reader.meaning(RUNS), strict=True):
        for side in ("logits", "keys", "values"):
            for left, right in zip(getattr(one, side), getattr(other, side), strict=True):
                np.testing.assert_array_equal(left, right)
    apart = reader.kernels(RUNS)
    if scheme == "fp32":
        assert apart == products == NotRun("nothing is quantized")
        return
    assert (apart.pieces, apart.worst) == (products.pieces, products.worst)
    np.testing.assert_array_equal(apart.errors, products.errors)


def test_activations_are_rounded_block_by_block_half_to_even(tiny_bundle):
    reader = opened(tiny_bundle("llama-odd-widths", "int4", "onnx"))
    x = np.zeros((1, 40), np.float32)
    x[0, :3] = 127, 0.5, 1.5
    x[0, 32:34] = 1, 0.002
    expected = np.zeros((1, 40), np.float32)
    expected[0, [0, 2, 32]] = 127, 2, 1
    rounded = reader.round_activations("model.layers.0.self_attn.q_proj.weight", x)
    np.testing.assert_allclose(rounded, expected, rtol=1e-6)
    assert opened(tiny_bundle("llama-odd-widths", "fp32", "onnx")).round_activations is None


def set_attribute(name, value):
    def change(graph):
        node = first(graph, "GroupQueryAttention")
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def rename_operator(graph):
    first(graph, "Sigmoid").op_type = "HardSigmoid"


def add_input(graph):
    first(graph, "GroupQueryAttention").input.extend(["", "", "input_ids"])


def change_level(graph):
    next(a for a in first(graph, "MatMulNBits").attribute if a.name == "accuracy_level").i = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_operator, "silu.*'HardSigmoid' is not known"),
        (set_attribute("smooth_softmax", 1), "attention.*'smooth_softmax'"),
        (add_input, "attention: .* inputs of com.microsoft.GroupQueryAttention"),
        (change_level, "accuracy_level 2"),
    ],
)
def test_what_execution_does_not_know_is_refused_by_name(change, message, tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama-9-heads", "int4", "onnx")
    folder = copied(bundle, tmp_path)
    edit(folder, change)
    with pytest.raises(UnsupportedError, match=message):
        opened(bundle, folder).execute(RUNS)


def test_padding_that_is_not_zero_is_seen(tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama-odd-head-dim", "int4", "onnx")
    folder = copied(bundle, tmp_path)

    def fill_with_ones(graph):
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1), "one"))
        node = next(node for node in graph.node if node.op_type == "Pad" and "key" in node.name)
        node.input[2] = "one"

    edit(folder, fill_with_ones)
    with pytest.raises(CheckError, match=r"attention.*present\.0\.key: not zero past the head size of 20"):
        opened(bundle, folder).execute(RUNS)


def test_a_head_that_means_other_bytes_by_a_name_is_refused(tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama", "int4", "onnx")
    folder = copied(bundle, tmp_path)

    def move(graph):
        norm, head = (
            next(c for c in graph.initializer if c.name.startswith(f"model.{part}")) for part in ("norm", "emb")
        )
        next(e for e in norm.external_data if e.key == "offset").value = next(
            e for e in head.external_data if e.key == "offset"
        ).value

    edit(folder, move, "head.onnx")
    with pytest.raises(CheckError, match=r"head\.onnx: model\.norm\.weight: not the bytes"):
        opened(bundle, folder).rows("model.norm.weight", 0, 64)


@pytest.mark.parametrize("content", (b"", b"\x08\x0a nothing", b"\xff" * 100))
def test_a_broken_model_is_refused_by_its_name(content, tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama", "int4", "onnx")
    folder = copied(bundle, tmp_path)
    (folder / "head.onnx").write_bytes(content)
    with pytest.raises((BundleError, UnsupportedError), match=r"head\.onnx"):
        opened(bundle, folder)


@given(data=strategies.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_model_with_changed_bytes_is_read_or_refused(data, tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama-odd-head-dim", "int4", "onnx")
    folder = copied(bundle, tmp_path)
    path = folder / data.draw(strategies.sampled_from(("model.onnx", "head.onnx")))
    content = bytearray(path.read_bytes())
    for index in data.draw(strategies.lists(strategies.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[index] = data.draw(strategies.integers(0, 255))
    path.write_bytes(content)
    try:
        reader = opened(bundle, folder)
        level_one(reader, bundle)
        reader.execute(RUNS[:1])
    except PocketLMError as error:
        assert ".onnx" in str(error)


def cap_scores(graph):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "softcap":
                attribute.f = 2.0


def level_one(reader, bundle):
    """Facts and rows, or the refusal."""
    try:
        facts = [(fact.node, fact.name, np.asarray(fact.value, object).tolist()) for fact in reader.facts()]
        rows = []
        for weight in bundle.manifest.weights.values():
            place = weight.places["onnx"]
            found = reader.rows(place.entry, place.first_row, place.first_row + weight.shape[0])
            rows += (
                [found.tobytes()] if isinstance(found, np.ndarray) else [found.codes.tobytes(), found.scales.tobytes()]
            )
    except PocketLMError as error:
        return str(error)
    return facts, rows


# What no attribute and no constant tells.
WIRING = ("one layer skipped", "position off by one", "rotary pairs interleaved")
# Exchanged scales may be those of rows of an embedding that no prompt reads.
UNREAD = "scales of two groups exchanged"


@pytest.mark.parametrize("name", ("qwen2-window", "qwen3-biases", "llama"))
def test_every_fault_of_the_list_is_seen_by_level_one_or_two(name, tiny_bundle, tmp_path):
    bundle = tiny_bundle(name, "int4", "onnx")
    sound = copied(bundle, tmp_path / "sound")
    edit(sound, cap_scores)
    reader = opened(bundle, sound)
    stated, executed = level_one(reader, bundle), reader.execute(SHORT_RUNS)
    for fault, inject in FAULTS.items():
        for place in places(fault, sound, bundle.manifest):
            folder = shutil.copytree(sound, tmp_path / "faulty" / "onnx")
            inject(folder, place)
            faulty = opened(bundle, folder)
            assert (level_one(faulty, bundle) == stated) == (fault in WIRING), f"{fault}: {place}"
            # The smallest signal of a fault is 1e-3; that of one that goes unnoticed is the floor, 1e-14.
            seen = deviation(faulty.execute(SHORT_RUNS), executed) > 1e-6
            assert seen or (fault == UNREAD and "embed_tokens" in str(place)), f"{fault}: {place}"
            shutil.rmtree(folder)


def constant_of(graph, value):
    return next(constant for constant in graph.initializer if constant.name == value)


def change_number(graph, node, index, value):
    """The float32 number that an operator reads, and no other."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), "changed"))
    node.input[index] = "changed"


def change_factor(graph):
    node = next(node for node in graph.node if node.op_type == "Mul" and node.input[1].startswith("float32"))
    change_number(graph, node, 1, onnx.numpy_helper.to_array(constant_of(graph, node.input[1])) * 1.01)


def drop_offset(graph):
    node = next(node for node in graph.node if node.name.endswith("with_offset"))
    change_number(graph, node, 1, 0)


def choose_fewer(graph):
    next(a for a in first(graph, "QMoE").attribute if a.name == "k").i -= 1


def renormalize(graph):
    node = first(graph, "QMoE")
    del node.input[7:]
    graph.node.remove(first(graph, "Softmax"))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("gemma2", change_factor, True),
        ("gemma2", drop_offset, False),
        ("mixtral", choose_fewer, True),
        ("qwen3-moe-plain-shares", renormalize, True),
    ],
)
def test_what_only_some_models_have_is_seen(name, change, told, tiny_bundle, tmp_path):
    bundle = tiny_bundle(name, "int8", "onnx")
    reader = opened(bundle)
    stated, executed = level_one(reader, bundle), reader.execute(SHORT_RUNS)
    folder = copied(bundle, tmp_path)
    edit(folder, change)
    faulty = opened(bundle, folder)
    assert (level_one(faulty, bundle) != stated) == told
    assert deviation(faulty.execute(SHORT_RUNS), executed) > 1e-6


def test_exchanged_rows_of_gate_and_up_are_seen(tiny_bundle, tmp_path):
    bundle = tiny_bundle("mixtral", "int8", "onnx")
    reader = opened(bundle)
    executed = reader.execute(SHORT_RUNS)
    gates = [weight.places["onnx"] for name, weight in bundle.manifest.weights.items() if name.endswith("w1.weight")]
    folder = copied(bundle, tmp_path)
    file = OnnxFile(folder / "model.onnx")
    path, offset, size = file.place(file.entry(gates[0].entry)[0])
    codes = np.memmap(path, np.uint8, "r+", offset, size).reshape(-1, 2, bundle.manifest.model.hidden_size)
    codes[:] = codes[:, ::-1].copy()
    codes.base.flush()
    faulty = opened(bundle, folder)
    changed = faulty.rows(gates[0].entry, gates[0].first_row, gates[0].first_row + 2)
    assert (changed.codes != reader.rows(gates[0].entry, gates[0].first_row, gates[0].first_row + 2).codes).any()
    assert deviation(faulty.execute(SHORT_RUNS), executed) > 1e-6


def test_the_faulty_files_mean_to_the_runtime_what_they_mean_to_execution(tiny_bundle, tmp_path):
    """A position off by one is silent with shared buffers: the runtime writes where the last position says."""
    bundle = tiny_bundle("llama-9-heads", "int4", "onnx")
    for fault, place in (
        ("position off by one", Place(1, "cache")),
        ("position off by one", Place(1, "rotation")),
        ("rotary pairs interleaved", Place(1)),
        ("one layer skipped", Place(1)),
    ):
        folder = copied(bundle, tmp_path / fault / place.part)
        FAULTS[fault](folder, place)
        reader = opened(bundle, folder)
        assert deviation(reader.meaning(SHORT_RUNS), reader.execute(SHORT_RUNS)) <= 5e-5
    with pytest.raises(CheckError, match="outside the cache"):
        folder = copied(bundle, tmp_path / "end")
        FAULTS["position off by one"](folder, Place(1, "cache"))
        opened(bundle, folder).execute(RUNS)
