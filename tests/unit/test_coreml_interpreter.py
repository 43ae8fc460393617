"""The Core ML reference interpreter on whole packages: ones that coremltools' own frontends wrote, and small ones."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import BundleError, CheckError, InputError, UnsupportedError
from pocketlm.runtimes.coreml_interpreter import Interpreter
from tests.unit.coreml_packages import coremltools, save_package, state, tensor

CALLS = (7, 2, 3)
COMPRESSED = ("int4_blocks", "uint4_blocks", "lut3", "lut6")


@pytest.fixture(scope="module")
def torch_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch_packages")
    script = Path(__file__).with_name("coreml_torch_packages.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def expected(torch_packages: Path) -> dict[str, np.ndarray]:
    return dict(np.load(torch_packages / "decoder.npz"))


def decode(interpreter: Interpreter, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of a prefill and two more calls, and the state after them."""
    held, position, logits = interpreter.make_state(), 0, []
    for count in CALLS:
        queries = np.arange(position, position + count)[:, None]
        mask = np.where(np.arange(position + count) <= queries, 0, -30000)[None, None].astype(np.float32)
        call = {"ids": tokens[:, position : position + count], "mask": mask}
        logits.append(interpreter.predict(call, held)["logits"])
        position += count
    return np.concatenate(logits, 1), held


@pytest.mark.parametrize("package", ["traced", "exported"])
@pytest.mark.parametrize(
    ("precision", "bound"), [("float32", 1e-5), ("float64", 1e-5), ("float16", 1e-2)]
)  # of the deviation of the logits; the module itself computes in float32
def test_stateful_decoder_of_the_torch_frontend(
    torch_packages: Path, expected: dict, package: str, precision: Any, bound: float
) -> None:
    interpreter = Interpreter(torch_packages / f"{package}.mlpackage", precision)
    logits, held = decode(interpreter, expected["tokens"])
    assert np.abs(logits - expected["logits"]).max() <= bound * expected["logits"].std()
    for name in ("k_cache", "v_cache"):
        assert np.abs(held[name] - expected[name]).max() <= bound * expected[name].std()
    assert interpreter.largest_magnitude >= np.abs(expected["logits"]).max() * (1 - bound)


def test_layer_norm_decoder_of_the_torch_frontend(torch_packages: Path) -> None:
    expected = dict(np.load(torch_packages / "layer_norm.npz"))
    for precision, bound in (("float32", 1e-5), ("float16", 1e-2)):
        interpreter = Interpreter(torch_packages / "layer_norm.mlpackage", precision)  # type: ignore[arg-type]
        logits, held = decode(interpreter, expected["tokens"])
        assert np.abs(logits - expected["logits"]).max() <= bound * expected["logits"].std()
        assert np.abs(held["v_cache"] - expected["v_cache"]).max() <= bound * expected["v_cache"].std()
        first = {"ids": expected["tokens"][:, :5], "mask": np.zeros((1, 1, 5, 5), np.float32)}
        results = interpreter.predict(first, interpreter.make_state())
        assert np.array_equal(results["best"], results["logits"].argmax(-1))
        assert np.array_equal(results["top"], -np.sort(-results["logits"])[..., :3])


@pytest.mark.parametrize("package", COMPRESSED)
def test_compressed_weights_equal_coremltools_decompression(torch_packages: Path, expected: dict, package: str) -> None:
    compressed, _ = decode(Interpreter(torch_packages / f"{package}.mlpackage"), expected["tokens"])
    dense, _ = decode(Interpreter(torch_packages / f"{package}_decompressed.mlpackage"), expected["tokens"])
    in_blocks, _ = decode(Interpreter(torch_packages / f"{package}.mlpackage", cache_bytes=0), expected["tokens"])
    assert np.array_equal(compressed, dense)
    assert np.array_equal(compressed, in_blocks)
    assert not np.allclose(compressed, expected["logits"], atol=1e-2)  # compression that costs nothing was not applied


def test_unknown_operator_is_refused_by_name_before_running(torch_packages: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"convolution\.mlpackage/.*operator conv "):
        Interpreter(torch_packages / "convolution.mlpackage")


def test_infinite_mask_is_refused_unless_allowed(torch_packages: Path) -> None:
    path = torch_packages / "infinite_mask.mlpackage"
    scores, hidden = np.eye(2, 8, dtype=np.float32), np.eye(2, 8, dtype=np.float32)
    with pytest.raises(CheckError, match=r"select '.*' holds infinity"):
        Interpreter(path).predict({"scores": scores, "hidden": hidden})
    weights = Interpreter(path, "float32", allow_infinite_masks=True).predict({"scores": scores, "hidden": hidden})
    assert np.allclose(weights["weights"], np.where(hidden > 0, 0, 1 / 7), atol=1e-6)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``build(placeholders, body)`` writes a package with the one function ``main``."""
    folder, count = tmp_path_factory.mktemp("built"), iter(range(1000))

    def make(placeholders: dict[str, Any], body: Callable[..., list[Any]]) -> Path:
        return save_package(folder / f"{next(count)}.mlpackage", {"main": (placeholders, body)})

    return make


@pytest.fixture(scope="module")
def builder() -> Any:
    coremltools()
    from coremltools.converters.mil.mil import Builder

    return Builder


def test_every_result_is_rounded_to_fp16(build: Callable, builder: Any) -> None:
    path = build(
        {"x": tensor((8,), "fp16", "x"), "y": tensor((8,), "fp16", "y")},
        lambda x, y: [builder.mul(x=x, y=y, name="product"), builder.add(x=x, y=y, name="sum")],
    )
    interpreter = Interpreter(path)
    halves = st.lists(st.floats(-128, 128, width=16), min_size=8, max_size=8)

    @settings(max_examples=50, deadline=None)
    @given(halves, halves)
    def check(first: list[float], second: list[float]) -> None:
        x, y = np.array(first, np.float16), np.array(second, np.float16)
        results = interpreter.predict({"x": x, "y": y})
        assert np.array_equal(results["product"], (x * y).astype(np.float32))
        assert np.array_equal(results["sum"], (x + y).astype(np.float32))

    check()


def test_overflow_names_operator_and_output(build: Callable, builder: Any) -> None:
    path = build(
        {"x": tensor((2,), "fp16", "x")},
        lambda x: [builder.sqrt(x=builder.mul(x=x, y=x, name="squares"), name="norm")],
    )
    x = np.array([3.0, -300.0], np.float32)
    with pytest.raises(CheckError, match=r"main: mul 'squares': output 'squares' holds infinity \(float16\)"):
        Interpreter(path, "float16").predict({"x": x})
    interpreter = Interpreter(path, "float32")
    assert interpreter.predict({"x": x})["norm"].tolist() == [3.0, 300.0]
    assert interpreter.largest_magnitude == 90000.0
    assert interpreter.magnitudes == {"squares": 90000.0, "norm": 300.0}


def test_an_allowed_mask_does_not_hide_overflow(build: Callable, builder: Any) -> None:
    mask = np.array([0, -np.inf, 0], np.float16)

    def body(x: Any) -> list[Any]:
        scores = builder.mul(x=x, y=x, name="scores")
        return [builder.softmax(x=builder.add(x=scores, y=mask, name="masked"), name="weights")]

    interpreter = Interpreter(build({"x": tensor((3,), "fp16", "x")}, body), allow_infinite_masks=True)
    assert interpreter.predict({"x": np.ones(3, np.float32)})["weights"].tolist() == [0.5, 0.0, 0.5]
    assert interpreter.magnitudes == {"scores": 1.0, "masked": 1.0, "weights": 0.5}
    with pytest.raises(CheckError, match="'scores' holds infinity"):
        interpreter.predict({"x": np.array([1, 300, 1], np.float32)})


def test_float64_is_float64_throughout(build: Callable, builder: Any) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((16, 8)).astype(np.float16), rng.standard_normal((3, 8))
    gamma = rng.standard_normal(8).astype(np.float16)

    def body(x: Any) -> list[Any]:
        normed = builder.layer_norm(x=x, axes=[-1], gamma=gamma, beta=np.zeros(8, np.float16), epsilon=np.float16(0.5))
        return [builder.softmax(x=builder.gelu(x=builder.linear(x=normed, weight=weight), mode="EXACT"), name="y")]

    path = build({"x": tensor((3, 8), "fp16", "x")}, body)
    got = Interpreter(path, "float64").predict({"x": x})["y"]
    centred = x - x.mean(-1, keepdims=True)
    hidden = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.5) * gamma.astype(np.float64)
    hidden = hidden @ weight.astype(np.float64).T
    hidden = hidden * np.vectorize(lambda value: (1 + math.erf(value / math.sqrt(2))) / 2)(hidden)
    want = np.exp(hidden) / np.exp(hidden).sum(-1, keepdims=True)
    assert got.dtype == np.float64
    assert np.abs(got - want).max() <= 1e-14


def test_not_a_number_is_refused(build: Callable, builder: Any) -> None:
    path = build({"x": tensor((2,), "fp32", "x")}, lambda x: [builder.sqrt(x=x, name="root")])
    with pytest.raises(CheckError, match="'root' holds NaN"):
        Interpreter(path).predict({"x": np.array([1, -1], np.float32)})
    with pytest.raises(InputError, match="'x' holds infinity or NaN"):
        Interpreter(path).predict({"x": np.array([1, np.nan], np.float32)})


def write_row(builder: Any, cache: Any, x: Any, row: int) -> Any:
    return builder.slice_update(x=cache, update=x, begin=[row, 0], end=[row + 1, 4])


def test_state_is_updated_in_its_own_array(build: Callable, builder: Any) -> None:
    def body(x: Any, cache: Any) -> list[Any]:
        for row in (0, 2):
            held = builder.read_state(input=cache)
            held = builder.coreml_update_state(state=cache, value=write_row(builder, held, x, row))
        return [builder.reduce_sum(x=held, axes=[0], keep_dims=True, name="total")]

    path = build({"x": tensor((1, 4), "fp16", "x"), "cache": state((3, 4), "cache")}, body)
    interpreter = Interpreter(path)
    held = interpreter.make_state()
    array = held["cache"]
    x = np.array([[1, 2, 3, 4]], np.float32)
    assert np.array_equal(interpreter.predict({"x": x}, held)["total"], 2 * x)
    assert held["cache"] is array
    assert np.array_equal(array, [x[0], np.zeros(4), x[0]])


@pytest.mark.parametrize("keep", ["whole", "row", "transposed", "result"])
def test_old_content_that_is_still_read_survives_an_update(build: Callable, builder: Any, keep: str) -> None:
    def body(x: Any, cache: Any) -> list[Any]:
        old = builder.read_state(input=cache)
        kept = old
        if keep == "row":
            kept = builder.slice_by_index(x=old, begin=[0, 0], end=[1, 4])
        elif keep == "transposed":
            kept = builder.transpose(x=builder.expand_dims(x=old, axes=[0]), perm=[0, 2, 1])
        elif keep == "result":
            kept = builder.identity(x=old)
        new = builder.coreml_update_state(state=cache, value=write_row(builder, old, x, 0))
        after = builder.reduce_sum(x=new, name="after")
        return [after, kept if keep == "result" else builder.reduce_sum(x=kept, name="before")]

    path = build({"x": tensor((1, 4), "fp16", "x"), "cache": state((3, 4), "cache")}, body)
    interpreter = Interpreter(path)
    held = interpreter.make_state()
    after_first, before_first = interpreter.predict({"x": np.full((1, 4), 1, np.float32)}, held).values()
    after_second, before_second = interpreter.predict({"x": np.full((1, 4), 5, np.float32)}, held).values()
    assert (after_first.sum(), before_first.sum()) == (4, 0)
    assert (after_second.sum(), before_second.sum()) == (20, 4)
    assert before_first.sum() == 0  # what was handed out stays as it was


def test_value_written_from_an_input_is_a_copy(build: Callable, builder: Any) -> None:
    path = build(
        {"x": tensor((1, 4), "fp16", "x"), "cache": state((1, 4), "cache")},
        lambda x, cache: [
            builder.identity(x=x, name="same"),
            builder.reduce_sum(x=builder.coreml_update_state(state=cache, value=x), name="total"),
        ],
    )
    interpreter = Interpreter(path)
    held, x = interpreter.make_state(), np.ones((1, 4), np.float32)
    results = interpreter.predict({"x": x}, held)
    x[:] = 9
    assert held["cache"].sum() == results["same"].sum() == results["total"] == 4


def test_functions_share_weights_and_state(tmp_path: Path, builder: Any) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4).astype(np.float16)

    def prefill(x: Any, cache: Any) -> list[Any]:
        value = builder.linear(x=x, weight=builder.const(val=weight, name="weight"))
        return [builder.identity(x=builder.coreml_update_state(state=cache, value=value), name="first")]

    def decode_step(x: Any, cache: Any) -> list[Any]:
        return [builder.add(x=builder.read_state(input=cache), y=x, name="second")]

    path = save_package(
        tmp_path / "two.mlpackage",
        {
            "prefill": ({"x": tensor((2, 4), "fp16", "x"), "cache": state((2, 3), "cache")}, prefill),
            "decode": ({"x": tensor((1, 3), "fp16", "x"), "cache": state((2, 3), "cache")}, decode_step),
        },
    )
    interpreter = Interpreter(path)
    assert interpreter.functions == ("decode", "prefill")
    assert interpreter.default_function == "prefill"
    assert interpreter.outputs("decode") == ("second",)
    assert interpreter.inputs("prefill")["x"].type.shape == (2, 4)
    held, x = interpreter.make_state(), np.ones((2, 4), np.float32)
    interpreter.predict({"x": x}, held)
    second = interpreter.predict({"x": np.ones((1, 3), np.float32)}, held, "decode")["second"]
    assert np.array_equal(second, x @ weight.T.astype(np.float32) + 1)
    with pytest.raises(InputError, match="function 'main'; valid: decode, prefill"):
        interpreter.predict({"x": x}, held, "main")


def test_calls_that_do_not_fit_are_refused(torch_packages: Path) -> None:
    interpreter = Interpreter(torch_packages / "traced.mlpackage")
    described = interpreter.inputs()["ids"]
    assert (described.type.element, described.bounds) == ("INT32", ((1, 1), (1, 32)))
    mask = np.zeros((1, 1, 2, 2), np.float32)
    ids = np.zeros((1, 2), np.int32)
    for inputs, message in (
        ({"ids": ids}, "inputs"),
        ({"ids": ids, "mask": mask, "more": mask}, "inputs"),
        ({"ids": np.zeros((1, 33), np.int32), "mask": mask}, "'ids' is"),
        ({"ids": np.zeros((1, 2), np.float32), "mask": mask}, "'ids' is float32"),
        ({"ids": np.full((1, 2), 2**40), "mask": mask}, "'ids' holds values beyond INT32"),
    ):
        with pytest.raises(InputError, match=message):
            interpreter.predict(inputs, interpreter.make_state())
    with pytest.raises(InputError, match="state 'k_cache' is missing"):
        interpreter.predict({"ids": ids, "mask": mask})
    with pytest.raises(InputError, match="state 'k_cache' is read-only"):
        held = interpreter.make_state()
        held["k_cache"].flags.writeable = False
        interpreter.predict({"ids": ids, "mask": mask}, held)
    with pytest.raises(InputError, match="state 'k_cache' is float64"):
        held = {name: value.astype(np.float64) for name, value in interpreter.make_state().items()}
        interpreter.predict({"ids": ids, "mask": mask}, held)
    with pytest.raises(BundleError, match=r"gather '.*': index 0\.\.96 of an axis with 96"):
        interpreter.predict({"ids": np.array([[0, 96]], np.int32), "mask": mask}, interpreter.make_state())
    with pytest.raises(InputError, match="precision 'float8'; valid: float16"):
        Interpreter(torch_packages / "traced.mlpackage", "float8")  # type: ignore[arg-type]


OPEN = "from pocketlm.runtimes.coreml_interpreter import Interpreter; opened = Interpreter({path!r}); "
HIDE = "import sys; sys.modules['torch'] = sys.modules['sklearn'] = None; "
LOAD = "import coremltools; assert coremltools.models.MLModel({path!r}, skip_model_load=True).get_spec(); "


@pytest.mark.parametrize(
    "program",
    [
        OPEN + "import sys; assert not any(name.split('.')[0] in ('coremltools', 'torch') for name in sys.modules)",
        HIDE + OPEN + LOAD + OPEN,
        HIDE + LOAD + OPEN + LOAD,
    ],
    ids=["alone", "before coremltools", "after coremltools"],
)
def test_messages_load_without_and_beside_coremltools(build: Callable, builder: Any, program: str) -> None:
    path = build({"x": tensor((2,), "fp16", "x")}, lambda x: [builder.abs(x=x)])
    done = subprocess.run(
        [sys.executable, "-c", program.format(path=str(path))], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_coremltools_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['coremltools'] = None\n"
        "from pocketlm.errors import UnavailableError\n"
        "from pocketlm.runtimes.coreml_interpreter.protobuf import parse_model\n"
        "try: parse_model(b'')\n"
        "except UnavailableError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install pocketlm[coreml]" in done.stdout
