"""Stored weights of Core ML packages: every layout against the formula and coremltools' own decompression."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.runtimes.coreml_interpreter import Interpreter
from tests.unit.coreml_packages import coremltools, save_package, tensor

RNG = np.random.default_rng(0)


def codes(element: str, *shape: int) -> np.ndarray:
    """Random codes of a MIL element type, all of its range."""
    coremltools()
    from coremltools.converters.mil.mil import types

    bits = int(element.lstrip("uint"))
    low = 0 if element.startswith("u") else -(1 << bits - 1)
    values = RNG.integers(low, low + (1 << bits), shape).astype(np.uint8 if low == 0 else np.int8)
    return values.astype(types.nptype_from_builtin(getattr(types, element)))


def halves(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 8).astype(np.float16)


@dataclass(frozen=True)
class Layout:
    operator: str
    parameters: Callable[[], dict[str, Any]]


def blockwise(element: str, shape: tuple[int, ...], scale: tuple[int, ...], offset: str | None = None) -> Layout:
    def parameters() -> dict[str, Any]:
        given = {"data": codes(element, *shape), "scale": halves(*scale)}
        if offset is not None:
            given["offset"] = halves(*scale) if offset == "fp16" else codes(offset, *scale)
        return given

    return Layout("constexpr_blockwise_shift_scale", parameters)


def table(element: str, shape: tuple[int, ...], groups: tuple[int, ...], width: int = 1, axis: int = 0) -> Layout:
    def parameters() -> dict[str, Any]:
        entries = 1 << int(element.lstrip("uint"))
        given = {"indices": codes(element, *shape), "lut": halves(*groups, entries, width)}
        return given if width == 1 else {**given, "vector_axis": np.int32(axis)}

    return Layout("constexpr_lut_to_dense", parameters)


LAYOUTS = {
    "int4 groups of 32": blockwise("int4", (6, 64), (6, 2)),
    "int4 rows that end inside a byte": blockwise("int4", (6, 5), (2, 1)),
    "int4 three axes": blockwise("int4", (4, 6, 8), (2, 3, 1)),
    "uint4 with offset": blockwise("uint4", (6, 64), (6, 4), "uint4"),
    "int8 per channel": blockwise("int8", (6, 64), (6, 1)),
    "int8 with offset": blockwise("int8", (6, 64), (1, 4), "int8"),
    "uint8 vector": blockwise("uint8", (12,), (3,), "uint8"),
    **{f"table of {element}": table(element, (4, 24), (2, 1)) for element in ("uint1", "uint2", "uint3", "uint4")},
    **{f"table of {element}": table(element, (4, 24), (2, 3)) for element in ("uint6", "uint8")},
    "table of uint3, rows that end inside a byte": table("uint3", (4, 5), (1, 1)),
    "vectors along rows": table("uint2", (4, 6), (2, 1), 3, 0),
    "vectors along columns": table("uint4", (4, 6), (1, 2), 2, 1),
    "cast": Layout("constexpr_cast", lambda: {"source_val": halves(4, 6), "output_dtype": "fp32"}),
    "affine per channel": Layout(
        "constexpr_affine_dequantize",
        lambda: {
            "quantized_data": codes("uint8", 4, 6),
            "zero_point": codes("uint8", 6),
            "scale": halves(6),
            "axis": np.int32(-1),
        },
    ),
    "affine of one scale": Layout(
        "constexpr_affine_dequantize",
        lambda: {
            "quantized_data": codes("int8", 4, 6),
            "zero_point": np.int8(3),
            "scale": np.float16(0.25),
            "axis": np.int32(0),
        },
    ),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """One package with every layout, and what coremltools decompresses each to."""
    coremltools()
    from coremltools.converters.mil.mil import Builder

    dense: dict[str, np.ndarray] = {}

    def body(x: Any) -> list[Any]:
        results = [Builder.identity(x=x, name="unused")]
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            weight = getattr(Builder, layout.operator)(**layout.parameters())
            dense[name] = weight.op.materialized_val_inference()
            results.append(Builder.identity(x=weight, name=f"weight{number}"))
        return results

    path = tmp_path_factory.mktemp("weights") / "all.mlpackage"
    return save_package(path, {"main": ({"x": tensor((1,), "fp16", "x")}, body)}), dense


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
def test_layouts_equal_coremltools_decompression(package: tuple, cache_bytes: int) -> None:
    path, dense = package
    interpreter = Interpreter(path, "float16", cache_bytes=cache_bytes)
    results = interpreter.predict({"x": np.zeros(1, np.float32)})
    for number, (name, want) in enumerate(dense.items()):
        assert np.array_equal(results[f"weight{number}"], want.astype(np.float32)), name


def test_float64_does_not_round(package: tuple) -> None:
    path, dense = package
    results = Interpreter(path, "float64").predict({"x": np.zeros(1)})
    number = list(LAYOUTS).index("int8 per channel")
    exact, rounded = results[f"weight{number}"], dense["int8 per channel"].astype(np.float64)
    assert exact.dtype == np.float64
    assert 0 < np.abs(exact - rounded).max() <= np.abs(exact).max() * 2**-11


def test_linear_and_gather_decode_blocks_and_rows(tmp_path: Path) -> None:
    """A weight of several blocks: the same results whether it is kept whole, or decoded in parts."""
    coremltools()
    from coremltools.converters.mil.mil import Builder

    rows, columns = 70_000, 64
    data, scale, bias = codes("int4", rows, columns), halves(rows, 2), halves(rows)

    def body(x: Any, ids: Any) -> list[Any]:
        weight = Builder.constexpr_blockwise_shift_scale(data=data, scale=scale)
        return [
            Builder.linear(x=x, weight=weight, bias=bias, name="logits"),
            Builder.gather(x=weight, indices=ids, axis=0, validate_indices=False, name="embedded"),
        ]

    inputs = {"x": tensor((1, columns), "fp16", "x"), "ids": tensor((1, 3), "int32", "ids")}
    path = save_package(tmp_path / "large.mlpackage", {"main": (inputs, body)})
    call = {"x": halves(1, columns).astype(np.float32), "ids": np.array([[rows - 1, 0, 40_000]], np.int32)}
    dense = (data.astype(np.float32).reshape(rows, 2, 32) * scale.astype(np.float32)[..., None]).reshape(rows, columns)
    for cache_bytes in (0, 1 << 30):
        results = Interpreter(path, "float32", cache_bytes=cache_bytes).predict(call)
        assert np.array_equal(results["embedded"], dense[call["ids"]])
        np.testing.assert_allclose(results["logits"], call["x"] @ dense.T + bias, rtol=1e-5, atol=1e-5)


def test_any_block_shape_follows_the_formula(tmp_path: Path) -> None:
    coremltools()
    from coremltools.converters.mil.mil import Builder

    sizes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3)

    @settings(max_examples=15, deadline=None)
    @given(sizes, st.sampled_from(["int4", "int8", "uint4", "uint8"]))
    def check(axes: list[tuple[int, int]], element: str) -> None:
        groups = tuple(count for count, _ in axes)
        data, scale = codes(element, *(count * size for count, size in axes)), halves(*groups)

        def body(x: Any) -> list[Any]:
            weight = Builder.constexpr_blockwise_shift_scale(data=data, scale=scale)
            return [Builder.identity(x=x, name="unused"), Builder.identity(x=weight, name="weight")]

        path = save_package(tmp_path / "any.mlpackage", {"main": ({"x": tensor((1,), "fp16", "x")}, body)})
        got = Interpreter(path, "float32").predict({"x": np.zeros(1, np.float32)})["weight"]
        want = data.astype(np.float32)
        for position in np.ndindex(*want.shape):
            group = tuple(place // size for place, (_, size) in zip(position, axes, strict=True))
            want[position] *= np.float32(scale[group])
        assert np.array_equal(got, want)

    check()
