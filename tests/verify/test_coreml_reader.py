"""The reader of a Core ML package: it states and computes what the reference means, and bad packages are refused.

Every fault that a package can hold must show: in what it states or stores, or in what it computes.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketlm.errors import BundleError, CheckError, InputError, PocketLMError, UnsupportedError
from pocketlm.runtimes.coreml import CoreMLSession, function_of
from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm.runtimes.coreml_interpreter.protobuf import parse_model
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.base import Lowering
from pocketlm_export.backends.coreml.read import open_reader
from pocketlm_export.backends.coreml.writer import write_package
from pocketlm_export.backends.reading import Call, NotRun, Past, Run, Trace
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import Attention
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.comparison import cache_deviations, logit_deviations
from pocketlm_export.verify.lockstep import Lane, run_lanes
from pocketlm_export.verify.structure import check_structure, expected
from tests.verify.coreml_editing import FUNCTIONS, change, edited, model_file
from tests.verify.coreml_faults import FAULTS, Place, places
from tests.verify.coreml_operators import Block, Layer

VARIANTS = [
    ("llama-9-heads", "int4", "int8"),
    ("qwen2-window", "int4", "int8"),
    ("qwen3-biases", "int4", "int4"),
    ("llama-odd-head-dim", "int4", "int4"),
    ("llama-odd-widths", "int4", "int8"),
    ("llama-outliers", "int4", "int4"),
    ("qwen3-biases", "fp32", "int8"),
    ("smollm3-window", "fp32", "int8"),
    ("phi-2", "int4", "int8"),  # parallel blocks, layer norms, partial rotation, biases everywhere
    ("gemma2", "int4", "int8"),  # soft caps, windows, scales, and the residual held times a power of two
    ("gemma3-outliers", "fp32", "int8"),  # norms of heads from zero
    ("phi3small", "int4", "int8"),  # sparse blocks, clamps
]
IDS = ["-".join(variant) for variant in VARIANTS]
TOKENS = tuple(np.random.default_rng(3).integers(5, 320, 48).tolist())
RUNS = (
    Run("a prompt in two calls", (Call(TOKENS[:17], 1), Call(TOKENS[17:32], 8), *(Call((t,), 1) for t in TOKENS[32:]))),
    Run("two tokens", (Call(TOKENS[:2], 2), Call(TOKENS[2:3], 1))),
    # qwen2-window's window is 11
    *(Run(f"cache of {past}", (Call(TOKENS[:3], 3), Call(TOKENS[3:4], 1)), Past(past)) for past in (10, 11, 12, 152)),
)
EXACT = 1e-11  # of the deviation: float64 differs from itself by 1e-15, through a few layers with outliers by 1e-13


def package_of(bundle) -> Path:
    return bundle.folder / bundle.manifest.targets["coreml"].path


@pytest.fixture(scope="session")
def verified(tiny_checkpoint, tiny_bundle, tmp_path_factory):
    """``verified(row, scheme, head)`` -> bundle, graph, weights, and the traces of the float64 reference."""
    store = WeightStore(tmp_path_factory.mktemp("store"))

    def make(row: str, scheme: str, head: str) -> tuple:
        bundle = tiny_bundle(row, scheme, "coreml", head)
        checkpoint = open_checkpoint(tiny_checkpoint(row)[0])
        graph = build_graph(checkpoint.config, checkpoint.config.context_length)
        weights = quantize(checkpoint.tensors, assign_rows(graph, scheme, head), store)
        stored = open_reader(package_of(bundle), bundle.manifest).stored
        lane = Lane(name="reference", runs=RUNS, weights=weights, stored=stored)
        return bundle, graph, weights, run_lanes(graph, [lane])["reference"]

    return make


def largest(reference, traces) -> float:
    """Of the logits, and of cached keys and values of every layer, in units of their deviation; infinite for NaN."""
    found = [*logit_deviations(RUNS, reference, traces).values(), *cache_deviations(RUNS, reference, traces).values()]
    assert len(found) >= 2
    return max(math.inf if math.isnan(deviation.largest) else deviation.largest for deviation in found)


def one_after_another(interpreter: Interpreter, runs) -> list[Trace]:
    """The same runs by ``predict``, call after call."""
    traces = []
    for run in runs:
        state, position, logits = interpreter.make_state(), run.start, []
        if run.past is not None:
            _, kv_heads, _, head_dim = state["k_cache"].shape
            for layer in range(len(state["k_cache"])):
                past = run.past.layer(layer, kv_heads, head_dim)
                for name, values in zip(("k_cache", "v_cache"), past, strict=True):
                    state[name][layer, :, : run.start] = values
        for call in run.calls:
            inputs = {"input_ids": np.array([call.tokens]), "position": np.array([position])}
            found = interpreter.predict(inputs, state, function_of(len(call.tokens), call.rows))
            logits.append(found["logits"][0][-call.rows :])
            position += len(call.tokens)
        caches = ([layer[:, run.start : position] for layer in state[name]] for name in ("k_cache", "v_cache"))
        traces.append(Trace(logits, *caches))
    return traces


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_the_package_states_and_computes_what_the_graph_means(row, scheme, head, verified):
    bundle, graph, weights, reference = verified(row, scheme, head)
    reader = open_reader(package_of(bundle), bundle.manifest)
    checks, counts = check_structure("coreml", reader, graph, bundle.manifest, weights)
    assert [check.figure for check in checks] == [0, 0], checks
    assert counts["weights"] == len(graph.weights())
    assert counts["tables and attributes"] == len(expected(graph, reader.stored))
    assert largest(reference, reader.execute(RUNS)) < EXACT


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_calls_together_are_calls_one_after_another(row, scheme, head, tiny_bundle):
    bundle = tiny_bundle(row, scheme, "coreml", head)
    reader = open_reader(package_of(bundle), bundle.manifest)
    alone = one_after_another(Interpreter(package_of(bundle), "float64"), RUNS)
    assert largest(alone, reader.execute(RUNS)) < EXACT
    rounded = one_after_another(Interpreter(package_of(bundle), "float16"), RUNS)
    assert largest(rounded, reader.emulate(RUNS)) == 0


def test_what_is_emulated_is_what_a_session_answers(tiny_bundle):
    bundle = tiny_bundle("qwen2-window", "int4", "coreml")
    (emulated, *_) = open_reader(package_of(bundle), bundle.manifest).emulate(RUNS[:1])
    with CoreMLSession(bundle.artifact("coreml")) as session:
        for call, logits in zip(RUNS[0].calls, emulated.logits, strict=True):
            np.testing.assert_array_equal(session.extend(call.tokens, logits=call.rows), logits)


def test_rows_are_those_of_the_store_whatever_the_cut(verified):
    bundle, _, weights, _ = verified("qwen2-window", "int4", "int8")
    reader = open_reader(package_of(bundle), bundle.manifest)
    for name in ("model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.embed_tokens.weight"):
        place, tensor = bundle.manifest.weights[name].places["coreml"], weights.quantized(name)
        for start, stop in ((0, 1), (5, 17), (31, 32)):
            found = reader.rows(place.entry, place.first_row + start, place.first_row + stop)
            assert found.bits == tensor.row.bits
            np.testing.assert_array_equal(found.codes, tensor.codes(start, stop))
            np.testing.assert_array_equal(found.scales, tensor.scales(start, stop))
    place = bundle.manifest.weights["model.layers.1.self_attn.v_proj.bias"].places["coreml"]
    bias = weights.values("model.layers.1.self_attn.v_proj.bias")
    found = reader.rows(place.entry, place.first_row + 3, place.first_row + 9)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, bias[3:9])
    for entry, start, stop in (("nothing", 0, 1), (place.entry, 0, 129), (place.entry, 5, 4)):
        with pytest.raises(BundleError, match=rf"model\.mlmodel: {entry}: "):
            reader.rows(entry, start, stop)


def test_what_needs_core_ml_is_not_run(tiny_bundle):
    bundle = tiny_bundle("qwen2-window", "int4", "coreml")
    reader = open_reader(package_of(bundle), bundle.manifest)
    for found in (reader.meaning(RUNS), reader.kernels(RUNS)):
        assert isinstance(found, NotRun) and "Core ML" in found.reason


def test_runs_whose_states_are_large_go_apart_and_none_passes_the_context(tiny_bundle, monkeypatch):
    bundle = tiny_bundle("qwen2-window", "int4", "coreml")
    reader = open_reader(package_of(bundle), bundle.manifest)
    with pytest.raises(InputError, match="run 'long': 158 \\+ 3 positions of 160"):
        reader.execute([Run("long", (Call((1, 2, 3), 1),), Past(158))])
    # 3 layers, keys and values of 2 heads of 16, float64
    assert reader.state_bytes(RUNS[0]) == 3 * 2 * 2 * 16 * 48 * 8
    together = reader.execute(RUNS)
    monkeypatch.setattr("pocketlm_export.backends.coreml.reading.running.LARGEST_STATE", reader.state_bytes(RUNS[-1]))
    assert largest(together, reader.execute(RUNS)) < EXACT  # in several batches
    monkeypatch.setattr("pocketlm_export.backends.coreml.reading.running.LARGEST_STATE", 1 << 10)
    assert largest(together, reader.execute(RUNS)) < EXACT  # each alone, which is larger


def test_what_overflows_fp16_is_named_by_operator(tiny_bundle, tmp_path):
    bundle = tiny_bundle("qwen2-window", "fp32", "coreml")
    package = shutil.copytree(package_of(bundle), tmp_path / "model.mlpackage")

    def enlarge(arrays: dict[str, np.ndarray]) -> None:
        arrays["val"][:] *= 30000

    change(package, "model_layers_1_mlp_down_proj_weight", FUNCTIONS, enlarge)
    reader = open_reader(package, bundle.manifest)
    with pytest.raises(CheckError, match=r"linear 'linear_\d+': output .* holds infinity \(float16\)"):
        reader.emulate(RUNS)
    assert all(np.isfinite(logits).all() for trace in reader.execute(RUNS) for logits in trace.logits)


@pytest.mark.parametrize("row", ["mixtral", "qwen3-moe-plain-shares", "qwen3-moe-mixed"])
def test_chosen_experts_are_stated_and_computed(row, verified):
    """Token by token, which is as far as their calls go."""
    bundle, graph, weights, _ = verified(row, "int4", "int8")
    assert bundle.manifest.targets["coreml"].longest_call == 1
    reader = open_reader(package_of(bundle), bundle.manifest)
    assert not states_otherwise(reader, graph, bundle, weights)
    assert ("experts 0", "renormalize") in {(fact.node, fact.name) for fact in reader.facts()}
    runs = [Run("steps", tuple(Call((token,), 1) for token in TOKENS[:24]))]
    reference = run_lanes(graph, [Lane(name="reference", runs=runs, weights=weights, stored=reader.stored)])
    (wanted,), (found,) = reference["reference"], reader.execute(runs)
    for name in ("logits", "keys", "values"):
        one, other = np.concatenate(getattr(wanted, name)), np.concatenate(getattr(found, name))
        assert np.abs(one - other).max() < EXACT * one.std()


@pytest.fixture
def with_stated_shift(verified, tmp_path):
    """``with_stated_shift(text)`` -> gemma2's package that states another shift, bundle, graph, weights."""

    def make(shift: str) -> tuple:
        bundle, graph, weights, _ = verified("gemma2", "int4", "int8")
        package = shutil.copytree(package_of(bundle), tmp_path / "model.mlpackage")
        model = parse_model(model_file(package).read_bytes())
        model.description.metadata.userDefined["pocketlm.residual_shift"] = shift
        model_file(package).write_bytes(model.SerializeToString(deterministic=True))
        return package, bundle, graph, weights

    return make


@pytest.mark.parametrize("shift", ["5", "0"])
def test_another_shift_of_the_residual_than_the_program_has_shows(shift, with_stated_shift):
    package, bundle, graph, weights = with_stated_shift(shift)
    stated = states_otherwise(open_reader(package, bundle.manifest), graph, bundle, weights)
    assert stated.startswith("epsilon of norm 0: ")


@pytest.mark.parametrize("shift", ["-1", "16", "six", ""])
def test_a_shift_that_is_no_small_number_is_refused(shift, with_stated_shift):
    package, bundle, _, _ = with_stated_shift(shift)
    with pytest.raises(BundleError, match=r"model\.mlmodel: pocketlm\.residual_shift is .*, not 0 to 15"):
        open_reader(package, bundle.manifest)


# Forms of attention


@pytest.fixture
def written(verified, tiny_checkpoint, tmp_path):
    """``written(form, softcaps)`` -> package, bundle, graph and weights of qwen3-biases with a soft cap in layers."""

    def make(form: str, softcaps: dict[int, float]) -> tuple:
        bundle, graph, weights, _ = verified("qwen3-biases", "int4", "int4")
        checkpoint = open_checkpoint(tiny_checkpoint("qwen3-biases")[0])
        nodes = [replace(n, softcap=softcaps.get(n.layer)) if isinstance(n, Attention) else n for n in graph.nodes]
        changed = replace(graph, nodes=tuple(nodes))
        lowering = Lowering(changed, weights, checkpoint.config, checkpoint.generation, checkpoint.tokenizer_files)
        write_package(lowering, tmp_path / "model.mlpackage", form)
        return tmp_path / "model.mlpackage", bundle, changed, weights

    return make


@pytest.mark.parametrize(("form", "softcaps"), [("fused", {}), ("explicit", {0: 1.5, 2: 0.75})])
def test_the_fused_form_and_soft_caps_are_stated_and_computed(form, softcaps, written):
    package, bundle, graph, weights = written(form, softcaps)
    reader = open_reader(package, bundle.manifest)
    assert not states_otherwise(reader, graph, bundle, weights)
    lane = Lane(name="reference", runs=RUNS, weights=weights, stored=reader.stored)
    assert largest(run_lanes(graph, [lane])["reference"], reader.execute(RUNS)) < EXACT


def test_an_ignored_soft_cap_shows(written, tmp_path):
    package, bundle, graph, weights = written("explicit", {0: 1.5, 2: 0.75})
    reader = open_reader(package, bundle.manifest)
    lane = Lane(name="reference", runs=RUNS, weights=weights, stored=reader.stored)
    reference = run_lanes(graph, [lane])["reference"]
    found = places("soft cap ignored", package, bundle.manifest)
    assert [place.layer for place in found if not place.scope] == [0, 2]
    for number, place in enumerate(found):
        faulty = shutil.copytree(package, tmp_path / f"{number}.mlpackage")
        FAULTS["soft cap ignored"](faulty, place)
        reader = open_reader(faulty, bundle.manifest)
        assert "softcap" in states_otherwise(reader, graph, bundle, weights)
        assert largest(reference, reader.execute(RUNS)) > 1e-6


def test_two_forms_in_one_package_are_refused(written):
    package, bundle, _, _ = written("fused", {1: 1.5})
    with pytest.raises(UnsupportedError, match=r"model\.mlmodel: attentions in both forms"):
        open_reader(package, bundle.manifest)


# Faults

UNSTATED = "one layer skipped"  # no attribute says which layers are used
CASES = [
    *((fault, *variant) for variant in VARIANTS[1:3] for fault in FAULTS if fault != "soft cap ignored"),
    *((fault, *VARIANTS[5]) for fault in ("lm head untied", "a norm's epsilon x1000")),  # tied; outliers
]


@pytest.mark.parametrize(("fault", "row", "scheme", "head"), CASES, ids=str)
def test_every_fault_shows(fault, row, scheme, head, verified, tmp_path, record_property):
    bundle, graph, weights, reference = verified(row, scheme, head)
    floor = max(largest(reference, open_reader(package_of(bundle), bundle.manifest).execute(RUNS)), 1e-15)
    found = places(fault, package_of(bundle), bundle.manifest)
    assert found or "window" in fault
    for number, place in enumerate(found):
        package = shutil.copytree(package_of(bundle), tmp_path / f"{number}.mlpackage")
        FAULTS[fault](package, place)
        reader = open_reader(package, bundle.manifest)
        stated = states_otherwise(reader, graph, bundle, weights)
        computed = largest(reference, reader.execute(RUNS)) / floor
        record_property(str(place), f"stated {stated!r}, computed {computed:.1e}")
        assert bool(stated) == (fault != UNSTATED), place
        # What a package computes must stand out from rounding by far, but no run reads all rows of the embedding, and
        # beside outliers of 1e3 the last norm's epsilon moves logits by 1e-12 alone, 160 times what float64 leaves.
        bound = 50 if (fault, row) == ("a norm's epsilon x1000", "llama-outliers") else 1e4
        assert computed > bound or of_some_tokens(place), f"{place}: {computed:.1e}"
        shutil.rmtree(package)


def of_some_tokens(place: Place) -> bool:
    return place.part == "row of the embedding" or any("embed_tokens" in rows.entry for rows in place.rows)


def states_otherwise(reader, graph, bundle, weights) -> str:
    """How level 1 sees a fault; "" if it doesn't."""
    try:
        checks, _ = check_structure("coreml", reader, graph, bundle.manifest, weights)
    except PocketLMError as error:
        return str(error)
    return next((str(check.where) for check in checks if check.figure), "")


# Refusals


def edit_all(package: Path, edit: Callable[[Block], None]) -> None:
    with edited(package) as found:
        for block in found.values():
            edit(block)


def set_number(block: Block, name: str, value: float) -> None:
    block.maker(name).attributes["val"].immediateValue.tensor.bytes.values = np.float16(value).tobytes()


def norm(block: Block, parameter: str) -> str:
    return block.input(block.of_kind({"y": "maximum", "epsilon": "rsqrt"}[parameter])[0], parameter)


def masked_value(block: Block) -> str:
    return next(block.input(o, "y") for o in block.of_kind("mul") if block.kind_of(block.input(o, "x")) == "cast")


def read_layer(block: Block, layer: int, other: int) -> None:
    """``layer`` attends to the values of ``other``."""
    block.bind(Layer(block, layer).mixing, "y", block.input(Layer(block, other).mixing, "y"))


def normalize_by(block: Block) -> None:
    """A norm divides by its mean's own magnitude."""
    first, second = block.of_kind("real_div")[:2]
    block.bind(second, "y", block.input(first, "x"))


FORMS = {
    "a smaller floor": (lambda b: set_number(b, norm(b, "y"), 2.0**-12), "maximum: y 0.000244140625, not 0.0009765625"),
    "an epsilon of the root": (lambda b: set_number(b, norm(b, "epsilon"), 0.5), "rsqrt: epsilon 0.5, not 0.0"),
    "a mask that hides little": (lambda b: set_number(b, masked_value(b), -3), r"mul: y -3\.0, not -30000\.0"),
    "values of another layer": (lambda b: read_layer(b, 1, 0), r"slice_by_index: begin \[0, 0, 0, 0\]"),
    "another divisor": (normalize_by, "a norm's divisors differ"),
}


@pytest.mark.parametrize("form", FORMS)
def test_statements_in_another_form_are_refused_by_name(form, tiny_bundle, tmp_path):
    bundle = tiny_bundle("qwen2-window", "int4", "coreml")
    package = shutil.copytree(package_of(bundle), tmp_path / "model.mlpackage")
    edit, message = FORMS[form]
    edit_all(package, edit)
    with pytest.raises(BundleError, match=rf"model\.mlmodel: decode: [a-z_0-9]+: .*{message}"):
        list(open_reader(package, bundle.manifest).facts())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("positions", "positions: not the numbers from 0"),
        ("rotary_0_sine", "rotary_0_sine: its halves are not one table twice"),
        ("zeros_64", "zeros_64: holds values of no weight"),
    ],
)
def test_a_changed_constant_that_no_weight_is_shows(entry, message, tiny_bundle, tmp_path):
    bundle = tiny_bundle("qwen2-window", "int4", "coreml")
    package = shutil.copytree(package_of(bundle), tmp_path / "model.mlpackage")

    def alter(arrays: dict[str, np.ndarray]) -> None:
        arrays["val"].reshape(-1)[5] = 7

    change(package, entry, FUNCTIONS, alter)
    with pytest.raises(BundleError, match=message):
        list(open_reader(package, bundle.manifest).facts())


def test_other_functions_and_states_are_refused(tiny_bundle, tmp_path):
    bundle = tiny_bundle("qwen2-window", "int4", "coreml")
    for old, new, message in (
        (b"score", b"sc0re", "functions"),
        (b"k_cache", b"kacache", "states"),
        (b"position", b"positioa", "takes"),
    ):
        package = shutil.copytree(package_of(bundle), tmp_path / new.decode())
        content = model_file(package).read_bytes().replace(b"positions", b"P0SITIONS")
        model_file(package).write_bytes(content.replace(old, new))
        with pytest.raises(BundleError, match=rf"model\.mlmodel: .*{message}"):
            open_reader(package, bundle.manifest)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_byte_of_the_message_may_be_wrong(tiny_bundle, tmp_path, data):
    """Either the package opens, states and computes something, or it is refused with an error of ours."""
    bundle = tiny_bundle("qwen2-window", "int4", "coreml")
    package = tmp_path / "model.mlpackage"
    shutil.copytree(package_of(bundle), package, dirs_exist_ok=True)
    content = bytearray(model_file(package_of(bundle)).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    model_file(package).write_bytes(content)
    try:
        reader = open_reader(package, bundle.manifest)
        list(reader.facts())
        reader.execute(RUNS[1:2])
    except PocketLMError as error:
        assert "model.mlmodel" in str(error) or "k_cache" in str(error)
