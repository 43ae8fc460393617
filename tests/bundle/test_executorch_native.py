"""The native ExecuTorch session: its kernels against float64 and the vendor's, whole models against the binding that is
linked to torch, its packed weights, and what it refuses."""

import dataclasses
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketlm.errors import BundleError, InputError, PocketLMError, UnavailableError, UnsupportedError
from pocketlm.measuring.etdump import read_etdump
from pocketlm.memory import resident_memory
from pocketlm.runtimes import executorch, executorch_native, executorch_torch
from pocketlm.runtimes.executorch_library import Program, obstacle, thread_count, use_instructions
from pocketlm_export.backends.executorch.reading.runtime import LoadedProgram
from tests.bundle.small_programs import attention_program, cache_program

TOKENS = np.random.default_rng(7).integers(5, 320, 140).tolist()
INSTRUCTIONS = ("baseline", "avx2", "avx512")


def test_the_library_is_here():
    """Or all of this file would say nothing."""
    assert obstacle() == ""
    assert executorch.binding() == "native"


# Kernels


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call of attention. ``window`` makes it a mask of so many positions, 0 one without order."""

    batches: int = 1
    queries: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    keys: int = 64
    start: int = 0
    window: int | None = None
    scale: float | None = None

    def arrays(self) -> list[np.ndarray]:
        draw = np.random.default_rng(zlib.crc32(repr(self).encode())).standard_normal
        query = draw((self.batches, self.queries, self.heads, self.head_dim)).astype(np.float32)
        key, value = (
            draw((self.batches, self.keys, self.kv_heads, self.head_dim)).astype(np.float32) for _ in range(2)
        )
        if self.window is None:
            return [query, key, value]
        position, column = self.start + np.arange(self.queries)[:, None], np.arange(self.keys)[None]
        seen = (column <= position) & (column > position - self.window)
        mask = np.where(seen, 0, -np.inf) if self.window else draw((self.queries, self.keys))
        return [query, key, value, mask.astype(np.float32)]

    def run(self, path: Path) -> np.ndarray:
        """In the native library."""
        arrays = self.arrays()
        return run(
            attention_program(path, arrays, start=self.start, causal=self.window is None, scale=self.scale), *arrays
        )

    def exact(self) -> np.ndarray:
        """In float64."""
        query, key, value, *mask = (array.astype(np.float64) for array in self.arrays())
        sharing = self.heads // self.kv_heads
        key, value = (np.repeat(array, sharing, axis=2) for array in (key, value))
        scores = np.einsum("bqhd,bkhd->bhqk", query, key) * (self.scale or 1 / math.sqrt(self.head_dim))
        position, column = self.start + np.arange(self.queries)[:, None], np.arange(self.keys)[None]
        scores += mask[0] if mask else np.where(column <= position, 0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhqk,bkhd->bqhd", weights, value)


def run(path: Path, *inputs: np.ndarray) -> np.ndarray:
    program = Program(path)
    program.load("forward")
    (output,) = program.run("forward", *inputs)
    return output.copy()


def relative_error(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


CASES = {
    "prefill": Case(queries=128, heads=14, kv_heads=2, keys=512),
    "prefill of a chunk": Case(queries=37, heads=14, kv_heads=2, keys=512, start=200),
    "decode": Case(heads=14, kv_heads=2, keys=1024, start=900),
    "decode, one head a key": Case(heads=4, kv_heads=4, keys=300, start=299, head_dim=80),
    "decode, all heads on one": Case(heads=8, kv_heads=1, keys=300, start=299, head_dim=256),
    "a size that no vector divides": Case(queries=70, heads=6, kv_heads=3, keys=256, start=11, head_dim=20),
    "a scale": Case(queries=5, heads=4, kv_heads=4, keys=256, start=100, head_dim=80, scale=0.3),
    "two batches": Case(batches=2, queries=33, heads=8, kv_heads=1, keys=192, start=64, head_dim=128),
    "a mask without order": Case(queries=9, heads=8, kv_heads=2, keys=160, start=40, window=0),
    "a window": Case(queries=40, heads=8, kv_heads=2, keys=640, start=600, head_dim=96, window=24, scale=0.05),
    "the first position": Case(keys=16),
}


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    try:
        use_instructions(request.param)
    except UnavailableError as error:
        pytest.skip(f"not run: {error}")
    yield
    use_instructions()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_is_within_a_millionth_of_float64(case, tmp_path):
    assert relative_error(case.run(tmp_path / "program.pte"), case.exact()) < 1e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_agrees_with_the_vendors(case, tmp_path):
    ours, arrays = case.run(tmp_path / "program.pte"), case.arrays()
    (theirs,) = LoadedProgram((tmp_path / "program.pte").read_bytes(), "program").call(*arrays)
    assert relative_error(ours, theirs) < 3e-6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_attention_of_any_sizes(data, tmp_path):
    kv_heads, keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))
    queries = data.draw(st.integers(1, keys))
    case = Case(
        batches=data.draw(st.integers(1, 2)),
        queries=queries,
        heads=kv_heads * data.draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=data.draw(st.integers(1, 70)),
        keys=keys,
        start=data.draw(st.integers(0, keys - queries)),
        window=data.draw(st.none() | st.integers(0, 20)),
    )
    assert relative_error(case.run(tmp_path / "program.pte"), case.exact()) < 1e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_and_change_no_bits_of_a_decode_step(threads, tmp_path):
    before = thread_count()
    try:
        assert thread_count(threads) == threads
        for name in ("prefill", "decode", "decode, all heads on one"):
            assert relative_error(CASES[name].run(tmp_path / "program.pte"), CASES[name].exact()) < 1e-6
    finally:
        thread_count(before)


def test_a_query_that_sees_no_key_gets_zeros(tmp_path):
    query, key, value, _ = Case(queries=3, keys=70, window=4).arrays()
    mask = np.full((3, 70), -np.inf, np.float32)
    mask[1:, 5] = 0
    arrays = (query, key, value, mask)
    output = run(attention_program(tmp_path / "program.pte", arrays, start=0, causal=False, scale=None), *arrays)
    assert not output[:, 0].any()
    np.testing.assert_allclose(output[0, 1:], np.broadcast_to(value[0, 5], (2, 2, 64)), rtol=1e-6)


@pytest.mark.parametrize("indices", [None, np.array([[4, 0, 5], [1, 7, 2]])], ids=["plain", "indices"])
def test_caches_are_the_vendors(indices, tmp_path):
    value = np.random.default_rng(0).standard_normal((2, 3, 2, 8)).astype(np.float32)
    path = cache_program(tmp_path / "program.pte", value, 8, start=4, indices=indices)
    inputs = [value] if indices is None else [value, indices]
    ours = run(path, *inputs)
    rows = np.array([[4, 5, 6]] * 2) if indices is None else indices
    expected = np.zeros((2, 8, 2, 8), np.float32)
    for batch in range(2):
        expected[batch, rows[batch]] = value[batch]
    np.testing.assert_array_equal(ours, expected)
    (theirs,) = LoadedProgram(path.read_bytes(), "program").call(*inputs)
    np.testing.assert_array_equal(ours, theirs)


REFUSED = {
    "positions behind the last": (dataclasses.replace(Case(), queries=5, keys=8, start=4), "5 positions from 4 on"),
    "a position before the first": (dataclasses.replace(Case(), start=-1), "from -1 on"),
    "heads that don't divide": (Case(heads=3, kv_heads=2), "3 heads on 2"),
}


@pytest.mark.parametrize(("case", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_kernel_refuses_what_does_not_fit_and_the_program_goes_on(case, reason, tmp_path):
    arrays = case.arrays()
    program = Program(attention_program(tmp_path / "p.pte", arrays, start=case.start, causal=True, scale=None))
    program.load("forward")
    for _ in range(2):
        with pytest.raises(PocketLMError, match=reason):
            program.run("forward", *arrays)
    fitting = Case()
    assert fitting.run(tmp_path / "fitting.pte").shape == (1, 1, 2, 64)


@pytest.mark.parametrize(("start", "indices"), [(6, None), (-1, None), (0, [[0, 1, 8]]), (0, [[0, -1, 1]])])
def test_nothing_is_written_outside_of_a_cache(start, indices, tmp_path):
    value = np.ones((1, 3, 2, 8), np.float32)
    rows = None if indices is None else np.array(indices)
    program = Program(cache_program(tmp_path / "p.pte", value, 8, start=start, indices=rows))
    program.load("forward")
    with pytest.raises(PocketLMError, match="but the cache has 8"):
        program.run("forward", *([value] if rows is None else [value, rows]))


# Whole models


MODELS = [
    ("llama", "int4", "int4"),
    ("llama-9-heads", "int4", "int8"),
    ("mistral-window", "int8", "int8"),
    ("qwen3-biases", "int4", "int4"),
    ("gemma2", "int4", "int8"),
    ("phi", "fp32", "int8"),
]


@pytest.mark.parametrize(("row", "scheme", "head"), MODELS)
def test_a_model_answers_as_through_torch(row, scheme, head, tiny_bundle):
    bundle = tiny_bundle(row, scheme, "executorch", head)
    artifact = bundle.artifact("executorch")
    answers = []
    for binding in (executorch_native, executorch_torch):
        with binding.open_session(artifact, 1) as session:
            logits = [session.extend(TOKENS[:130], logits=130)]
            logits += [session.extend([token]) for token in TOKENS[130:140]]
            session.rewind(50)
            logits.append(session.extend(TOKENS[50:60], logits=8))
            answers.append(np.concatenate(logits))
    ours, theirs = answers
    # int8 activations turn a rounding into a step; float32 has none.
    assert relative_error(ours, theirs) < (1e-5 if scheme == "fp32" else 5e-2)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > (0.99 if scheme == "fp32" else 0.9)


def test_a_session_needs_no_torch_and_no_exporter(tiny_bundle):
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    code = (
        "import sys, pocketlm\n"
        f"with pocketlm.open({str(bundle.folder)!r}).session('executorch') as session:\n"
        "    assert session.extend([5, 6, 7]).shape == (1, 320), session\n"
        "    assert session.description.endswith('native session'), session.description\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    assert not {"torch", "executorch", "pocketlm_export"} & set(done.stdout.split())


@pytest.mark.parametrize("order", [("native", "torch"), ("torch", "native")])
def test_both_bindings_in_one_process_in_either_order(order, tiny_bundle):
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    code = (
        "import importlib, sys, pocketlm\n"
        f"artifact = pocketlm.open({str(bundle.folder)!r}).artifact('executorch')\n"
        "modules = [importlib.import_module(f'pocketlm.runtimes.executorch_{name}') for name in sys.argv[1:]]\n"
        "sessions = [module.open_session(artifact, 1) for module in modules]\n"
        "one, other = [session.extend([5, 6, 7]) for session in sessions]\n"
        "assert abs(one - other).max() < 0.1 * one.std()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *order], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_is_taken_as_positions_are_written(tmp_path):
    """Of a cache of a million positions, 256 MB, four are written."""
    value = np.random.default_rng(0).standard_normal((1, 4, 1, 64)).astype(np.float32)
    path = cache_program(tmp_path / "program.pte", value, 1 << 20, start=0, returned=4)
    before = resident_memory().anonymous
    program = Program(path)
    program.load("forward")
    (output,) = program.run("forward", value)
    np.testing.assert_array_equal(output, value)
    assert resident_memory().anonymous - before < 32e6


def test_a_profile_names_every_operator(tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    trace = tmp_path / "trace of two calls.etdp"
    with executorch.open_session(bundle.artifact("executorch"), 1, profile=trace) as session:
        for _ in range(2):
            session.extend(TOKENS[:20])
        assert not trace.exists()
    times = {operator.name: operator for operator in read_etdump(trace)}
    layers = bundle.manifest.model.layers
    assert times["llama::custom_sdpa.out"].calls == 2 * layers
    assert times["llama::update_cache.out"].calls == 4 * layers
    assert times["delegate"].calls == 2 * (layers + 2)
    assert {name for name, operator in times.items() if operator.delegated and "QB4W" in name}
    assert not times["llama::custom_sdpa.out"].delegated
    assert 0 < sum(operator.seconds for operator in times.values()) < 60


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"ED00" * 99], ids=["empty", "zeros", "no flatbuffer"])
def test_what_is_no_trace_is_refused(content, tmp_path):
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/trace: not a trace of ExecuTorch"):
        read_etdump(tmp_path / "trace")


def test_a_profile_that_cannot_be_written_is_an_error_and_the_session_is_closed(tiny_bundle, tmp_path):
    artifact = tiny_bundle("llama", "int4", "executorch", "int8").artifact("executorch")
    session = executorch.open_session(artifact, 1, profile=tmp_path / "missing" / "trace")
    session.extend([5])
    with pytest.raises(PocketLMError, match="the trace can't be written"):
        session.close()
    with pytest.raises(PocketLMError, match="closed"):
        session.extend([5])


# Damaged programs


def test_a_damaged_program_ends_the_process_less_often_than_with_torch(tiny_bundle, tmp_path):
    """Bytes of the program changed at random. Nearly all are refused: the native library has the program verified."""
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    content = (bundle.folder / "executorch" / "model.pte").read_bytes()
    program_size = int.from_bytes(content[16:24], "little")  # of the extended header
    draw = np.random.default_rng(0)
    for number in range(20):
        damaged = bytearray(content)
        for place in draw.integers(36, program_size, 3):
            damaged[place] = draw.integers(256)
        (tmp_path / f"{number:02}.pte").write_bytes(damaged)
    ended = {}
    for binding in ("native", "torch"):
        command = [sys.executable, "-m", "tests.bundle.damaged_programs", binding, str(bundle.folder), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        outcomes = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        assert len(outcomes) == 20
        assert "broke" not in outcomes.values()
        ended[binding] = sum(outcome.startswith("ended") for outcome in outcomes.values())
    assert ended["native"] <= ended["torch"]


@pytest.mark.parametrize("binding", [executorch_native, executorch_torch], ids=["native", "torch"])
def test_what_is_no_program_or_another_models_is_refused(binding, tiny_bundle, tmp_path):
    artifact = tiny_bundle("llama", "int4", "executorch", "int8").artifact("executorch")
    content = artifact.path.read_bytes()
    for name, part, reason in (
        ("empty.pte", b"", "not a program"),
        ("cut in the header.pte", content[:20], "not a program"),
        ("cut in the program.pte", content[:3000], "truncated"),
        ("another file.pte", b"PK\3\4" * 100, "not a program"),
    ):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(BundleError, match=f"^{tmp_path}/{name}: {reason}|{name}.*{reason}"):
            binding.open_session(dataclasses.replace(artifact, path=tmp_path / name), 1)
    with pytest.raises(BundleError, match="another model's program"):
        binding.open_session(dataclasses.replace(artifact, vocabulary_size=321), 1)


# The choice of a binding


def test_the_environment_forces_a_binding(tiny_bundle, monkeypatch):
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    for wish, kind in (("torch", executorch_torch.TorchLinkedSession), ("native", executorch_native.NativeSession)):
        monkeypatch.setenv(executorch.CHOICE, wish)
        with bundle.session("executorch", threads=1) as session:
            assert isinstance(session, kind)
        assert executorch.runtime_build()[0] == "1.5.1"
    monkeypatch.setenv(executorch.CHOICE, "cuda")
    with pytest.raises(InputError, match=r"POCKETLM_EXECUTORCH='cuda': unknown; valid: native, torch"):
        bundle.session("executorch")


def test_the_binding_to_torch_refuses_what_it_cannot_do(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv(executorch.CHOICE, "torch")
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    with pytest.raises(UnsupportedError, match="packed weights"):
        bundle.session("executorch", packed=True)
    with pytest.raises(UnsupportedError, match="a profile"):
        executorch.open_session(bundle.artifact("executorch"), 1, profile=tmp_path / "profile")


def environment_with_another_executorch(folder: Path) -> dict[str, str]:
    """Its metadata say 1.5.0: found before the installed one."""
    metadata = folder / "executorch-1.5.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: executorch\nVersion: 1.5.0\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_another_executorch_is_refused(tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama", "int4", "executorch", "int8")
    code = (
        "import pocketlm\n"
        f"with pocketlm.open({str(bundle.folder)!r}).session('executorch') as session: print(session.description)"
    )
    environment = environment_with_another_executorch(tmp_path)
    refused, fallen_back = (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, env=variables
        )
        for variables in ({**environment, executorch.CHOICE: "native"}, environment)
    )
    assert "pocketlm-native is built for executorch 1.5.1, but 1.5.0 is installed" in refused.stderr
    assert fallen_back.stdout == "ExecuTorch 1.5.0, binding linked to torch\n", fallen_back.stderr


def test_threads_belong_to_the_process_whichever_binding_has_them(tiny_bundle):
    artifact = tiny_bundle("llama", "int4", "executorch", "int8").artifact("executorch")
    for one, other in ((executorch_native, executorch_torch), (executorch_torch, executorch_native)):
        with one.open_session(artifact, 1), pytest.raises(PocketLMError, match="process-wide now 1"):
            other.open_session(artifact, 2)
