"""The reader of a .pte: it means what the reference means, the real runtime agrees with it, and bad files are refused.

Every fault that a .pte can hold must show: in what the file states or stores, or in what it computes.
"""

import copy
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketlm.errors import BundleError, PocketLMError, UnsupportedError
from pocketlm.runtimes import executorch_torch
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.executorch.importing import ScalarType, schema
from pocketlm_export.backends.executorch.read import ExecuTorchReader, open_reader
from pocketlm_export.backends.executorch.reading.execution import execute
from pocketlm_export.backends.executorch.reading.int8 import round_rows
from pocketlm_export.backends.executorch.reading.kernels import ATTENTION, UPDATE_CACHE
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, JumpStep, KernelStep
from pocketlm_export.backends.reading import Call, NotRun, Past, RowErrors, Run
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.graph import Linear
from pocketlm_export.graph.rewrites import merge_linears
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.comparison import cache_deviations, logit_deviations
from pocketlm_export.verify.lockstep import Lane, run_lanes
from pocketlm_export.verify.structure import check_structure, expected
from tests.verify.executorch_expert_faults import FAULTS as EXPERT_FAULTS
from tests.verify.executorch_faults import FAULTS, places
from tests.verify.executorch_rewriting import Rewriting

VARIANTS = [
    ("llama-9-heads", "int4", "int8"),
    ("qwen2-window", "int4", "int8"),
    ("qwen2-window", "int8", "int8"),
    ("qwen3-biases", "int4", "int4"),
    ("llama-odd-head-dim", "int4", "int4"),
    ("llama-odd-widths", "int4", "int8"),
    ("llama-outliers", "int4", "int4"),
    ("smollm3-window", "fp32", "int8"),
    ("phi", "int4", "int8"),
    ("gemma2", "int4", "int8"),
    ("mixtral-window", "int4", "int8"),
    ("qwen3-moe-plain-shares", "int4", "int4"),
    ("qwen3-moe-mixed", "fp32", "int8"),
]
EXPERTS = ("mixtral-window", "qwen3-moe-plain-shares", "qwen3-moe-mixed")
IDS = ["-".join(variant) for variant in VARIANTS]
TOKENS = tuple(np.random.default_rng(3).integers(5, 320, 48).tolist())
RUNS = (
    Run("a prompt in two calls", (Call(TOKENS[:17], 1), Call(TOKENS[17:32], 8), *(Call((t,), 1) for t in TOKENS[32:]))),
    Run("two tokens", (Call(TOKENS[:2], 2), Call(TOKENS[2:3], 1))),
    # qwen2-window's window is 11
    *(Run(f"cache of {past}", (Call(TOKENS[:3], 3), Call(TOKENS[3:4], 1)), Past(past)) for past in (10, 11, 12, 152)),
)
EXACT = 1e-11  # of the deviation: float64 differs from itself by 1e-15, through a few layers with outliers by 1e-13
FLOAT32 = 3e-5
SEEN = 1e-6  # of the deviation: the smallest fault changes logits or caches by 1e-5


def pte(bundle) -> Path:
    return bundle.folder / bundle.manifest.targets["executorch"].path


@pytest.fixture(scope="session")
def verified(tiny_checkpoint, tiny_bundle, tmp_path_factory):
    """``verified(row, scheme, head)`` -> bundle, graph, and the traces of the float64 reference."""
    store = WeightStore(tmp_path_factory.mktemp("store"))

    @cache
    def make(row: str, scheme: str, head: str) -> tuple:
        folder, _ = tiny_checkpoint(row)
        bundle = tiny_bundle(row, scheme, "executorch", head)
        checkpoint = open_checkpoint(folder)
        graph = build_graph(checkpoint.config, checkpoint.config.context_length)
        weights = quantize(checkpoint.tensors, assign_rows(graph, scheme, head), store)
        lane = Lane(name="reference", runs=RUNS, weights=weights, stored=ExecuTorchReader.stored)
        return bundle, graph, run_lanes(graph, [lane])["reference"]

    return make


def largest(reference, traces) -> float:
    """Of the logits, and of cached keys and values of every layer, in units of their deviation; infinite for NaN."""
    found = [*logit_deviations(RUNS, reference, traces).values(), *cache_deviations(RUNS, reference, traces).values()]
    assert len(found) >= 2
    return max(math.inf if math.isnan(deviation.largest) else deviation.largest for deviation in found)


def delegates_at_work(file: PteFile) -> set[int]:
    """In the calls that single delegates are checked on: the first four of the first run."""
    observed = [(0, number) for number in range(4)]
    return {call.delegate for call in execute(file, RUNS[:1], observed).delegate_calls}


def expert_delegates(file: PteFile) -> set[int]:
    return {step.index for number, step in enumerate(file.steps)
            if number in file.passed_over and isinstance(step, DelegateStep)}  # fmt: skip


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_the_file_states_and_computes_what_the_graph_means(row, scheme, head, verified):
    bundle, graph, reference = verified(row, scheme, head)
    reader = open_reader(pte(bundle), bundle.manifest)
    checks, counts = check_structure("executorch", reader, graph, bundle.manifest, None)
    assert [check.figure for check in checks] == [0, 0]
    assert counts["weights"] == len(graph.weights())
    assert counts["tables and attributes"] == len(expected(graph, reader.stored))
    assert largest(reference, reader.execute(RUNS)) < EXACT


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_the_real_runtime_agrees_at_float_activations(row, scheme, head, tiny_bundle):
    file = PteFile(pte(tiny_bundle(row, scheme, "executorch", head)))
    reader = ExecuTorchReader(file)
    traces = reader.execute(RUNS)
    meant = reader.meaning(RUNS)
    assert [trace is None for trace in meant] == [run.past is not None for run in RUNS]
    for deviation in logit_deviations(RUNS, traces, meant).values():
        assert deviation.largest < FLOAT32
    alone = ExecuTorchReader(file, whole_limit=0).meaning(RUNS)
    assert isinstance(alone, RowErrors)
    assert alone.pieces == len(delegates_at_work(file))
    if row not in EXPERTS:
        assert alone.pieces == len(file.delegates)
    assert alone.errors.max() < FLOAT32


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_the_shipped_linears_compute_what_int8_means(row, scheme, head, verified):
    bundle, graph, _ = verified(row, scheme, head)
    reader = open_reader(pte(bundle), bundle.manifest)
    found = reader.kernels(RUNS)
    if scheme == "fp32":
        assert found == NotRun("nothing is quantized")
        assert reader.round_activations is None
        return
    linears = sum(isinstance(node, Linear) for node in merge_linears(graph))
    if row in EXPERTS:
        linears += 2 * len(delegates_at_work(reader.file) & expert_delegates(reader.file))
    assert found.pieces == linears
    assert np.quantile(found.errors, 0.99) < 1e-5
    assert found.errors.max() < 2e-2  # a code on the edge of rounding may fall to either side


@pytest.mark.parametrize(("row", "scheme", "head"), VARIANTS, ids=IDS)
def test_parts_of_the_program_compute_the_bits_of_a_session(row, scheme, head, tiny_bundle, monkeypatch):
    bundle = tiny_bundle(row, scheme, "executorch", head)
    reader = open_reader(pte(bundle), bundle.manifest)
    texts = [run for run in RUNS if run.past is None]
    assert reader.in_parts(texts) is None
    monkeypatch.setattr("pocketlm_export.backends.executorch.read.LARGEST_SESSION", 0)
    monkeypatch.setattr("pocketlm_export.backends.executorch.reading.parts.LARGEST_PART", 0)
    with executorch_torch.open_session(bundle.artifact("executorch"), None) as session:  # which runs the parts too
        for run, trace in zip(texts, reader.in_parts(texts), strict=True):
            session.rewind(0)
            for call, logits in zip(run.calls, trace.logits, strict=True):
                np.testing.assert_array_equal(session.extend(call.tokens, logits=call.rows), logits)


@pytest.mark.parametrize(("row", "scheme", "head"), [VARIANTS[0], VARIANTS[7]], ids=str)
def test_a_head_in_ranges_of_its_rows_errs_as_the_whole(row, scheme, head, tiny_bundle, monkeypatch):
    reader = ExecuTorchReader(PteFile(pte(tiny_bundle(row, scheme, "executorch", head))), whole_limit=0)
    whole = reader.meaning(RUNS)
    monkeypatch.setattr("pocketlm_export.backends.executorch.reading.pieces.LARGEST_FLOAT32", 1 << 13)
    ranges = reader.meaning(RUNS)
    assert (ranges.pieces, ranges.worst) == (whole.pieces, whole.worst)
    np.testing.assert_array_equal(ranges.errors, whole.errors)


# Of still smaller rows XNNPACK's own scale is infinite.
ACTIVATIONS = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)


@given(st.lists(st.lists(ACTIVATIONS, min_size=4, max_size=4), min_size=1, max_size=5))
def test_rounded_activations_stay_within_half_a_step_and_keep_zero(rows):
    x = np.array(rows, np.float32)
    step = (np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)) / 255
    rounded = round_rows(x)
    # zero is itself a code, so an end of the range may move by another half
    assert (np.abs(rounded - x) <= 1.01 * step[:, None] + 1e-30).all()
    np.testing.assert_array_equal(rounded[x == 0], 0)


# Faults


FAULTY = [
    *((fault, *VARIANTS[index]) for index in (1, 3, 6, 9) for fault in FAULTS if fault not in EXPERT_FAULTS),
    *((fault, *VARIANTS[index]) for index in (10, 11, 12) for fault in EXPERT_FAULTS),
]


@pytest.mark.parametrize(("fault", "row", "scheme", "head"), FAULTY, ids=map(str, FAULTY))
def test_every_fault_shows(fault, row, scheme, head, verified, tmp_path):
    bundle, graph, reference = verified(row, scheme, head)
    found = places(fault, pte(bundle), bundle.manifest)
    assert found or not is_held(fault, row)
    computed = []
    for number, place in enumerate(found):
        path = shutil.copy(pte(bundle), tmp_path / "model.pte")
        FAULTS[fault](path, place)
        reader = open_reader(path, bundle.manifest)
        checks, _ = check_structure("executorch", reader, graph, bundle.manifest, None)
        stated = not all(check.passed for check in checks)
        # What isn't stated anywhere must show in what is computed; so must the last place of everything else.
        if not stated or number == len(found) - 1:
            computed.append(largest(reference, reader.execute(RUNS)))
            assert computed[-1] > SEEN, place
    assert computed or not found


def is_held(fault: str, row: str) -> bool:
    held = {"a bias missing": "biases" in row or "qwen2" in row, "soft cap ignored": "gemma2" in row}
    held["shares not divided by their sum"] = "plain-shares" not in row
    return held.get(fault, "window" in row or "window" not in fault)


def test_a_faulty_file_still_runs(tiny_bundle, tmp_path):
    """Faults are wrong programs, not broken ones: the real runtime computes what the reader says of them."""
    for fault, put in FAULTS.items():
        row = "mixtral-window" if fault in EXPERT_FAULTS else "qwen2-window"
        bundle = tiny_bundle(row, "int4", "executorch", "int8")
        for place in places(fault, pte(bundle), bundle.manifest)[:1]:
            path = shutil.copy(pte(bundle), tmp_path / "model.pte")
            put(path, place)
            reader = open_reader(path, bundle.manifest)
            deviations = logit_deviations(RUNS, reader.execute(RUNS), reader.meaning(RUNS))
            assert all(deviation.largest < FLOAT32 for deviation in deviations.values()), fault


# Refusals


def test_values_alive_together_that_share_bytes_are_named(tiny_bundle, tmp_path):
    path = shutil.copy(pte(tiny_bundle("qwen2-window", "int4", "executorch", "int8")), tmp_path / "model.pte")
    rewriting = Rewriting(path)
    step = next(step for step in rewriting.file.steps if isinstance(step, DelegateStep))
    kept, moved = step.outputs[:2]
    tensors = [rewriting.forward.values[index].val for index in (kept, moved)]
    tensors[1].allocation_info = copy.deepcopy(tensors[0].allocation_info)
    rewriting.save()
    with pytest.raises(BundleError, match=rf"model\.pte: memory plan: values ({kept}|{moved}) .* ({kept}|{moved}) "):
        ExecuTorchReader(PteFile(path))


def test_caches_that_share_bytes_are_named(tiny_bundle, tmp_path):
    path = shutil.copy(pte(tiny_bundle("qwen2-window", "int4", "executorch", "int8")), tmp_path / "model.pte")
    rewriting = Rewriting(path)
    first, *_, last = (step.arguments[1] for step in rewriting.file.steps if operator(step) == UPDATE_CACHE)
    tensors = [rewriting.forward.values[index].val for index in (first, last)]
    tensors[1].allocation_info = copy.deepcopy(tensors[0].allocation_info)
    rewriting.save()
    with pytest.raises(BundleError, match=rf"values {first} .* and {last} "):
        ExecuTorchReader(PteFile(path))


def operator(step) -> str:
    return step.operator if isinstance(step, KernelStep) else ""


def changed_graph(rewriting: Rewriting, change: str) -> None:
    """An edit of the second delegate."""
    graph = rewriting.graph(1)
    nodes = graph["xnodes"]
    linear = next(item for item in nodes if item["xnode_union_type"] == "XNNFullyConnected")
    add = next(item for item in nodes if item["xnode_union_type"] == "XNNAdd")
    match change:
        case "a clamp":
            add["output_min_max"] = {"output_min": -1.0, "output_max": 1.0}
        case "flags":
            linear["xnode_union"]["flags"] = 1
        case "a node":
            add["xnode_union_type"] = "XNNPReLU"
        case "a float32 input":
            number = linear["xnode_union"]["input1_id"]
            convert = next(item["xnode_union"] for item in nodes if item["xnode_union"]["output_id"] == number)
            linear["xnode_union"]["input1_id"] = convert["input_id"]
        case "a datatype":
            unions = (item["xvalue_union"] for item in graph["xvalues"])
            tensors = (union.get("tensor_value", union) for union in unions)
            next(t for t in tensors if t["id_out"] == add["xnode_union"]["output_id"])["datatype"] = "xnn_datatype_fp16"
        case "an order":
            nodes.reverse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a clamp", "Add that clamps its output"),
        ("flags", "FullyConnected with flags 1"),
        ("a node", "node PReLU"),
        ("a float32 input", "FullyConnected of fp32, qbint4"),
        ("a datatype", "is fp16"),
        ("an order", "before it is made"),
    ],
)
def test_graphs_that_are_not_ours_are_refused_by_name(change, message, tiny_bundle, tmp_path):
    path = shutil.copy(pte(tiny_bundle("qwen2-window", "int4", "executorch", "int8")), tmp_path / "model.pte")
    rewriting = Rewriting(path)
    changed_graph(rewriting, change)
    rewriting.save()
    with pytest.raises((UnsupportedError, BundleError), match=rf"model\.pte: delegate 1: .*{message}"):
        ExecuTorchReader(PteFile(path))


def test_operators_and_arguments_that_are_not_ours_are_refused_by_name(tiny_bundle, tmp_path):
    path = shutil.copy(pte(tiny_bundle("llama-9-heads", "int4", "executorch", "int8")), tmp_path / "model.pte")
    rewriting = Rewriting(path)
    rewriting.forward.operators[-1].name = "llama::sdpa_with_kv_cache"
    rewriting.save()
    with pytest.raises(UnsupportedError, match=r"operator llama::sdpa_with_kv_cache\.out"):
        ExecuTorchReader(PteFile(path))
    path = shutil.copy(pte(tiny_bundle("llama-9-heads", "int4", "executorch", "int8")), path)
    rewriting = Rewriting(path)
    step = next(step for step in rewriting.file.steps if operator(step) == ATTENTION)
    rewriting.forward.values[step.arguments[6]].val.bool_val = False
    rewriting.save()
    with pytest.raises(UnsupportedError, match="no mask and is_causal False"):
        ExecuTorchReader(PteFile(path))


def led_back(rewriting: Rewriting, jump: int) -> None:
    rewriting.lead(jump, jump - 1)


def led_beyond_a_cache(rewriting: Rewriting, jump: int) -> None:
    steps = rewriting.file.steps
    rewriting.lead(jump, next(i for i in range(jump, len(steps)) if operator(steps[i]) == UPDATE_CACHE) + 1)


def decided_by_a_number(rewriting: Rewriting, jump: int) -> None:
    call = rewriting.call(rewriting.file.steps[jump])
    call.cond_value_index = rewriting.constant(np.zeros(1, np.float32), ScalarType.FLOAT)


def listed_wrongly(rewriting: Rewriting, _jump: int) -> None:
    lists = [item.val for item in rewriting.forward.values if isinstance(item.val, schema.OptionalTensorList)]
    scalar = next(i for i, item in enumerate(rewriting.forward.values) if isinstance(item.val, schema.Int))
    lists[0].items[-1] = scalar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (led_back, r"instruction \d+: a jump to \d+ of \d+, not forward"),
        (led_beyond_a_cache, "writes or reads a cache, and a jump may pass over it"),
        (decided_by_a_number, "a jump that is decided by no tensor of bools"),
        (listed_wrongly, r"a list of .*, not all of which are Tensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_jumps_and_lists_that_are_not_ours_are_refused(change, message, tiny_bundle, tmp_path):
    path = shutil.copy(pte(tiny_bundle("mixtral-window", "int4", "executorch", "int8")), tmp_path / "model.pte")
    rewriting = Rewriting(path)
    change(rewriting, next(i for i, step in enumerate(rewriting.file.steps) if isinstance(step, JumpStep)))
    rewriting.save()
    with pytest.raises((BundleError, UnsupportedError), match=rf"model\.pte: .*{message}"):
        ExecuTorchReader(PteFile(path))


@pytest.mark.parametrize(
    "name",
    ["add", "linear", "xor", "keyword_spotting", "deprecated_constant_buffer", "deprecated_no_constant_segment"],
)
def test_programs_of_others_are_refused_in_one_line(name, data):
    path = data / "data" / "pte" / f"{name}.pte"
    with pytest.raises((BundleError, UnsupportedError), match=rf"{name}\.pte: ") as refused:
        ExecuTorchReader(PteFile(path))
    assert "\n" not in str(refused.value)


def test_a_file_that_ends_early_is_refused(tiny_bundle, tmp_path):
    content = pte(tiny_bundle("qwen2-window", "int4", "executorch", "int8")).read_bytes()
    path = tmp_path / "model.pte"
    for size in (0, 3, 8, 39, 40, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(BundleError, match=r"model\.pte"):
            ExecuTorchReader(PteFile(path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_byte_of_the_program_may_be_wrong(tiny_bundle, tmp_path, data):
    """Either the file opens, states and computes something, or it is refused with an error of ours."""
    row = data.draw(st.sampled_from(["qwen2-window", "mixtral-window"]))
    content = bytearray(pte(tiny_bundle(row, "int4", "executorch", "int8")).read_bytes())
    program = int.from_bytes(content[16:24], "little")
    payload = next(start for start in range(program, len(content)) if content[start + 4 : start + 8] == b"XH00")
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.sampled_from([0, payload]))
        size = program if start == 0 else 1500
        content[start + data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    try:
        reader = ExecuTorchReader(PteFile(path))
        list(reader.facts())
        with np.errstate(all="ignore"):
            reader.execute(RUNS[1:2])
    except PocketLMError as error:
        assert "model.pte" in str(error)
