"""Damaged and hostile Core ML packages: one short error that names file and entry, before anything runs away."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import BundleError, PocketLMError, UnsupportedError
from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm.runtimes.coreml_interpreter.protobuf import parse_model
from tests.unit.coreml_packages import coremltools, save_package, state, tensor

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
CALL = {"x": np.ones((1, 64), np.float32), "count": np.array([2], np.int32)}
FLOAT16, BFLOAT16, STRING = 10, 13, 2


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    coremltools()
    from coremltools.converters.mil.mil import Builder, types

    codes = np.random.default_rng(0).integers(-8, 8, (8, 64)).astype(np.int8)
    codes = codes.astype(types.nptype_from_builtin(types.int4))

    def body(x: Any, count: Any, cache: Any) -> list[Any]:
        weight = Builder.constexpr_blockwise_shift_scale(data=codes, scale=np.full((8, 2), 0.25, np.float16))
        y = Builder.linear(x=x, weight=weight, bias=np.arange(8).astype(np.float16), name="projected")
        table = Builder.const(val=np.ones((2, 64), np.float16), name="table")
        held = Builder.coreml_update_state(state=cache, value=y)
        filled = Builder.fill(shape=count, value=np.float16(1), name="filled")
        tiled = Builder.tile(x=filled, reps=count, name="tiled")
        return [Builder.add(x=held, y=held, name="sum"), Builder.matmul(x=x, y=table, transpose_y=True), tiled]

    inputs = {
        "x": tensor((1, 64), "fp16", "x"),
        "count": tensor((1,), "int32", "count"),
        "cache": state((1, 8), "cache"),
    }
    path = save_package(tmp_path_factory.mktemp("sound") / "sound.mlpackage", {"main": (inputs, body)})
    predict(path)
    return path


@pytest.fixture
def package(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy.mlpackage"))


def predict(path: Path) -> dict[str, np.ndarray]:
    interpreter = Interpreter(path)
    return interpreter.predict(CALL, interpreter.make_state())


def edit_model(path: Path, edit: Callable[[Any, dict[str, Any]], None]) -> None:
    """``edit(block, operations by type)``; of operators with the same type the last one."""
    model = parse_model((path / MODEL).read_bytes())
    function = model.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    edit(block, {operation.type: operation for operation in block.operations})
    (path / MODEL).write_bytes(model.SerializeToString())


def edit_manifest(path: Path, item_path: Any) -> None:
    manifest = json.loads((path / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = item_path
    (path / "Manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": 1}}', "[" * 5000]
)
def test_manifest_without_a_model(package: Path, text: str) -> None:
    (package / "Manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"Manifest\.json: no path of the root model"):
        Interpreter(package)


@pytest.mark.parametrize(
    "item",
    ["../../outside", "/etc/hostname", "com.apple.CoreML/../../../x", "a\\b", "a\0b", "absent", "", ".", None, 3],
)
def test_manifest_that_points_elsewhere(package: Path, item: Any) -> None:
    edit_manifest(package, item)
    with pytest.raises(BundleError, match=r"Manifest\.json"):
        Interpreter(package)


@pytest.mark.parametrize("entry", ["Manifest.json", str(MODEL), str(WEIGHTS), "Data/com.apple.CoreML/weights"])
def test_links_are_refused(package: Path, tmp_path: Path, entry: str) -> None:
    moved = tmp_path / "outside"
    (package / entry).rename(moved)
    (package / entry).symlink_to(moved)
    with pytest.raises(BundleError, match="is a link or leaves the package"):
        Interpreter(package)


@pytest.mark.parametrize("entry", ["Manifest.json", str(MODEL), str(WEIGHTS)])
def test_missing_files(package: Path, entry: str) -> None:
    (package / entry).unlink()
    with pytest.raises(BundleError, match="is missing"):
        Interpreter(package)


def test_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "absent"):
        with pytest.raises(BundleError, match="not a Core ML package"):
            Interpreter(tmp_path / name)


@pytest.mark.parametrize("data", [b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f"])
def test_model_file_that_is_no_message(package: Path, data: bytes) -> None:
    (package / MODEL).write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.mlmodel: not a Core ML model message"):
        Interpreter(package)


def test_model_of_another_kind(package: Path) -> None:
    (package / MODEL).write_bytes(b"")
    with pytest.raises(UnsupportedError, match="only mlProgram is supported"):
        Interpreter(package)


def blob(operations: dict[str, Any], parameter: str = "data") -> Any:
    return operations["constexpr_blockwise_shift_scale"].inputs[parameter].arguments[0].value.blobFileValue


@pytest.mark.parametrize("offset", [1, 63, 65, 1 << 20, (1 << 64) - 64, (1 << 64) - 1])
def test_blob_offset_out_of_bounds(package: Path, offset: int) -> None:
    edit_model(package, lambda _, operations: setattr(blob(operations), "offset", offset))
    with pytest.raises(BundleError, match=rf"offset {offset}: no blob record there"):
        Interpreter(package)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "weights/weight.bin",
        "@model_path/../../../outside",
        "@model_path//etc/hostname",
        "",
        "@model_path/",
    ],
)
def test_blob_file_elsewhere(package: Path, name: str) -> None:
    edit_model(package, lambda _, operations: setattr(blob(operations), "fileName", name))
    with pytest.raises(BundleError, match="constexpr_blockwise_shift_scale"):
        Interpreter(package)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 0, "sentinel"),
        (4, 4, "blob data type 4"),
        (8, 255, "255 bytes, where INT4"),
        (8, (1 << 64) - 1, "bytes, where INT4"),
        (16, 0, "data at 0"),
        (16, 1 << 40, "data at 1099511627776"),
        (16, (1 << 64) - 1, "data at"),
        (24, 4, "4 unused bits"),
    ],
)
def test_blob_record_that_lies(package: Path, field: int, value: int, message: str) -> None:
    data = bytearray((package / WEIGHTS).read_bytes())
    width = 4 if field < 8 else 8
    data[64 + field : 64 + field + width] = value.to_bytes(width, "little")
    (package / WEIGHTS).write_bytes(data)
    with pytest.raises(BundleError, match=message):
        Interpreter(package)


@pytest.mark.parametrize("size", [0, 63, 64, 100, 300])
def test_truncated_weights(package: Path, size: int) -> None:
    data = (package / WEIGHTS).read_bytes()
    (package / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(BundleError, match=r"weight\.bin"):
        Interpreter(package)


def grow(dimension: Any, size: int) -> None:
    dimension.constant.size = size


def first_dimension(value_type: Any) -> Any:
    return value_type.tensorType.dimensions[0]


def bias(block: Any) -> Any:
    """The type of the constant of eight fp16 values that the model file itself holds."""
    named = {operation.outputs[0].name: operation for operation in block.operations if operation.outputs}
    return named["projected_bias_0"].attributes["val"].type


def sized(*sizes: int) -> Any:
    """An fp16 tensor type of these sizes."""
    tensor_type = parse_model(b"").mlProgram.functions["main"].inputs.add().type.tensorType
    tensor_type.dataType, tensor_type.rank = FLOAT16, len(sizes)
    for size in sizes:
        tensor_type.dimensions.add().constant.size = size
    return tensor_type


def scale_more_rows(operations: dict[str, Any]) -> None:
    """Declares the scales [16, 1], where the data has eight rows."""
    declared = operations["constexpr_blockwise_shift_scale"].inputs["scale"].arguments[0].value.type.tensorType
    grow(declared.dimensions[0], 16)
    grow(declared.dimensions[1], 1)


EDITS: dict[str, tuple[Callable[[Any, dict[str, Any]], Any], str]] = {
    "unknown operator": (lambda _, ops: setattr(ops["linear"], "type", "conv"), "operator conv"),
    "undefined name": (lambda _, ops: setattr(ops["linear"].inputs["x"].arguments[0], "name", "nothing"), "'nothing'"),
    "defined twice": (lambda _, ops: setattr(ops["linear"].outputs[0], "name", "x"), "defined twice"),
    "unknown parameter": (lambda _, ops: ops["linear"].inputs["slope"].CopyFrom(ops["linear"].inputs["x"]), "'slope'"),
    "missing parameter": (lambda _, ops: ops["linear"].inputs.pop("weight"), "'weight' is missing"),
    "no argument": (lambda _, ops: ops["linear"].inputs["x"].ClearField("arguments"), "has 0 arguments"),
    "unknown attribute": (
        lambda _, ops: ops["linear"].attributes["mode"].CopyFrom(ops["linear"].attributes["name"]),
        "attribute 'mode'",
    ),
    "state as a tensor": (
        lambda _, ops: setattr(ops["linear"].inputs["x"].arguments[0], "name", "cache"),
        "is a state",
    ),
    "tensor as a state": (
        lambda _, ops: setattr(ops["write_state"].inputs["input"].arguments[0], "name", "x"),
        "not a state",
    ),
    "output without a definition": (lambda block, _: block.outputs.append("nothing"), "output 'nothing'"),
    "state as an output": (lambda block, _: block.outputs.append("cache"), "output 'cache'"),
    "no outputs": (lambda _, ops: ops["linear"].ClearField("outputs"), "0 outputs"),
    "nested block": (lambda _, ops: ops["linear"].blocks.add(), "blocks of their own"),
    "bfloat16": (
        lambda _, ops: setattr(ops["linear"].outputs[0].type.tensorType, "dataType", BFLOAT16),
        "data type BFLOAT16",
    ),
    "string tensor": (
        lambda _, ops: setattr(ops["linear"].outputs[0].type.tensorType, "dataType", STRING),
        "data type STRING",
    ),
    "number that is no data type": (
        lambda _, ops: setattr(ops["linear"].outputs[0].type.tensorType, "dataType", 999),
        "number 999",
    ),
    "huge declared result": (
        lambda _, ops: grow(first_dimension(ops["linear"].outputs[0].type), 1 << 40),
        "a tensor of shape",
    ),
    "huge constant": (lambda block, _: grow(first_dimension(bias(block)), 1 << 40), "a tensor of shape"),
    "empty constant of a huge size": (
        lambda block, _: bias(block).tensorType.CopyFrom(sized(1 << 62, 0)),
        "a tensor of shape",
    ),
    "constant of a hundred axes": (
        lambda block, _: bias(block).tensorType.CopyFrom(sized(8, *[1] * 99)),
        "a tensor of shape",
    ),
    "constant larger than its bytes": (lambda block, _: grow(first_dimension(bias(block)), 1 << 20), "16 bytes for"),
    "constant without a value": (lambda _, ops: ops["const"].attributes.pop("val"), "const"),
    "constant declared otherwise": (
        lambda _, ops: setattr(ops["const"].outputs[0].type.tensorType, "dataType", FLOAT16 + 1),
        "declared FLOAT32",
    ),
    "scale of another type": (
        lambda _, ops: (
            ops["constexpr_blockwise_shift_scale"]
            .inputs["scale"]
            .CopyFrom(ops["constexpr_blockwise_shift_scale"].inputs["data"])
        ),
        "scale of type INT4, result of FLOAT16",
    ),
    "scale that does not divide": (lambda _, ops: scale_more_rows(ops), "does not divide"),
    "result of another shape": (
        lambda _, ops: grow(first_dimension(ops["add"].outputs[0].type), 7),
        "declared FLOAT16",
    ),
    "result of another type": (
        lambda _, ops: setattr(ops["tile"].outputs[0].type.tensorType, "dataType", 23),
        "declared INT32",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_program_that_cannot_be(package: Path, name: str) -> None:
    edit, message = EDITS[name]
    edit_model(package, edit)
    with pytest.raises((BundleError, UnsupportedError), match=message) as raised:
        predict(package)
    assert str(package / MODEL) in str(raised.value)


def test_results_too_large_to_hold(package: Path) -> None:
    interpreter = Interpreter(package)
    for count, operator in ((1 << 30) + 1, "fill"), (1 << 20, "tile"), (-1, "fill"):
        with pytest.raises(BundleError, match=rf"{operator} '.*': a tensor of shape"):
            interpreter.predict({**CALL, "count": np.array([count], np.int32)}, interpreter.make_state())


def test_damaged_bytes_never_escape_the_errors(sound: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(sound, tmp_path / "fuzzed.mlpackage"))
    original = {entry: (package / entry).read_bytes() for entry in (MODEL, WEIGHTS, Path("Manifest.json"))}

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.sampled_from(sorted(original)), st.data())
    def check(entry: Path, draw: st.DataObject) -> None:
        data = bytearray(original[entry])
        for _ in range(draw.draw(st.integers(1, 3))):
            place = draw.draw(st.integers(0, len(data) - 1))
            data[place] = draw.draw(st.integers(0, 255))
        if draw.draw(st.booleans()):
            del data[draw.draw(st.integers(0, len(data))) :]
        (package / entry).write_bytes(data)
        try:
            predict(package)
        except PocketLMError as error:
            assert "\n" not in str(error)
        finally:
            (package / entry).write_bytes(original[entry])

    check()
