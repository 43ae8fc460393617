"""Calls of the Core ML interpreter that run together: the same results as one after another, or a refusal by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import CheckError, InputError, UnsupportedError
from pocketlm.runtimes.coreml_interpreter import Interpreter, PrecisionName, Request
from tests.unit.coreml_packages import coremltools, save_package, state, tensor

WIDTH, ROWS = 4, 6


@pytest.fixture(scope="module")
def builder() -> Any:
    coremltools()
    from coremltools.converters.mil.mil import Builder

    return Builder


def weight(builder: Any, name: str) -> Any:
    values = np.random.default_rng(len(name)).standard_normal((WIDTH, WIDTH)).astype(np.float16)
    return builder.const(val=values, name=name)


def accumulate(builder: Any, x: Any, cache: Any, row: int) -> Any:
    """Add ``x`` to a row of the state; what the row is then."""
    held = builder.read_state(input=cache)
    old = builder.slice_by_index(x=held, begin=[row, 0], end=[row + 1, WIDTH])
    update = builder.add(x=old, y=x)
    held = builder.slice_update(x=held, update=update, begin=[row, 0], end=[row + 1, WIDTH])
    held = builder.coreml_update_state(state=cache, value=held)
    return builder.slice_by_index(x=held, begin=[row, 0], end=[row + 1, WIDTH])


def layers(builder: Any, *steps: tuple[str, int]) -> Callable[..., list[Any]]:
    """For each of ``steps``: a product with the weight of this name, then the row of the state."""

    def body(x: Any, cache: Any) -> list[Any]:
        weights = {name: weight(builder, name) for name in dict.fromkeys(name for name, _ in steps)}
        for name, row in steps:
            mixed = accumulate(builder, builder.linear(x=x, weight=weights[name]), cache, row)
            x = builder.tanh(x=mixed, name=f"tanh_{row}")
        return [builder.mul(x=x, y=np.float16(2), name="y")]

    return body


@pytest.fixture(scope="module")
def package(builder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Functions over the same weights and state: ``three`` and ``same`` alike, ``other`` with a weight of its own,
    ``short`` without the second layer, ``twice`` with one weight in all."""
    bodies = {
        "three": layers(builder, ("a", 0), ("bb", 1), ("ccc", 2)),
        "same": layers(builder, ("a", 0), ("bb", 1), ("ccc", 2)),
        "other": layers(builder, ("dddd", 0), ("bb", 1), ("ccc", 2)),
        "short": layers(builder, ("a", 0), ("ccc", 2)),
        "twice": layers(builder, ("a", 0), ("a", 1), ("a", 2)),
    }
    return save_package(tmp_path_factory.mktemp("package") / "p.mlpackage", with_inputs(bodies))


def with_inputs(bodies: dict[str, Callable[..., list[Any]]]) -> dict[str, tuple[dict[str, Any], Callable[..., Any]]]:
    def placeholders() -> dict[str, Any]:
        return {"x": tensor((1, WIDTH), "fp16", "x"), "cache": state((ROWS, WIDTH), "cache")}

    return {name: (placeholders(), body) for name, body in bodies.items()}


def inputs(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((1, WIDTH)).astype(np.float16)}


@pytest.mark.parametrize("precision", ["float16", "float32", "float64"])
def test_any_calls_together_give_what_they_give_one_after_another(package: Path, precision: PrecisionName) -> None:
    interpreter = Interpreter(package, precision, cache_bytes=0)
    names = st.sampled_from(interpreter.functions)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(names, st.integers(0, 2)), min_size=1, max_size=8))
    def check(calls: list[tuple[str, int]]) -> None:
        alone, together = ([interpreter.make_state() for _ in range(3)] for _ in range(2))
        expected = [interpreter.predict(inputs(i), alone[s], name)["y"] for i, (name, s) in enumerate(calls)]
        requests = [Request(inputs(i), together[s], name) for i, (name, s) in enumerate(calls)]
        found = [results["y"] for results in interpreter.predict_together(requests)]
        exact = precision != "float64"  # which sums the rows of all calls in one product
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(one, other) if exact else np.abs(one - other).max() < 1e-14
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one["cache"] - other["cache"]).max() <= (0 if exact else 1e-14)

    check()


def test_a_state_that_is_read_after_its_turn_is_refused(builder: Any, tmp_path: Path) -> None:
    """The first call reads its row again behind a second product, when the next one has written there."""

    def body(x: Any, cache: Any) -> list[Any]:
        held = accumulate(builder, builder.linear(x=x, weight=weight(builder, "a")), cache, 3)
        y = builder.linear(x=x, weight=weight(builder, "bb"))
        return [builder.add(x=y, y=held, name="late")]

    interpreter = Interpreter(save_package(tmp_path / "late.mlpackage", with_inputs({"main": body})))
    held = interpreter.make_state()
    for seed in range(2):
        interpreter.predict(inputs(seed), held)
    held = interpreter.make_state()
    with pytest.raises(UnsupportedError, match=r"main: add 'late': touches rows 3 to 3 of state 'cache' after a later"):
        interpreter.predict_together([Request(inputs(seed), held) for seed in range(2)])
    apart = [Request(inputs(seed), interpreter.make_state()) for seed in range(2)]
    assert len(interpreter.predict_together(apart)) == 2


def test_a_state_that_is_replaced_is_refused(builder: Any, tmp_path: Path) -> None:
    def body(x: Any, cache: Any) -> list[Any]:
        rows = builder.tile(x=builder.linear(x=x, weight=weight(builder, "a")), reps=[ROWS, 1])
        return [builder.reduce_sum(x=builder.coreml_update_state(state=cache, value=rows), name="total")]

    interpreter = Interpreter(save_package(tmp_path / "whole.mlpackage", with_inputs({"main": body})))
    with pytest.raises(
        UnsupportedError, match=r"write_state .*: replaces 'cache', which calls that run together can't"
    ):
        interpreter.predict_together([Request(inputs(0), interpreter.make_state())])


def test_errors_are_those_of_predict(package: Path) -> None:
    interpreter = Interpreter(package, "float16")
    held = interpreter.make_state()
    held["cache"][0] = 60000
    large = {"x": np.full((1, WIDTH), 60000, np.float16)}
    with pytest.raises(CheckError, match=r"three: linear '.*': output '.*' holds infinity \(float16\)"):
        interpreter.predict_together(
            [Request(inputs(0), interpreter.make_state(), "same"), Request(large, held, "three")]
        )
    with pytest.raises(InputError, match="function 'main'; valid: "):
        interpreter.predict_together([Request(inputs(0), held, "main")])
    with pytest.raises(InputError, match="state 'cache' is not C-contiguous"):
        turned = {"cache": np.zeros((WIDTH, ROWS), np.float32).T}
        interpreter.predict_together([Request(inputs(0), turned, "three")])
    with pytest.raises(InputError, match="state 'cache' is an array of another state too"):
        interpreter.predict_together([Request(inputs(i), dict(held), "three") for i in range(2)])
    assert interpreter.predict_together([]) == []


def test_values_on_the_way_are_given_where_they_are_asked_for(package: Path) -> None:
    interpreter = Interpreter(package, "float32")
    plain = interpreter.predict(inputs(0), interpreter.make_state(), "three")
    asked = Request(inputs(0), interpreter.make_state(), "three", ("tanh_0",))
    (results,) = interpreter.predict_together([asked])
    assert results.keys() == plain.keys() | {"tanh_0"}
    assert np.abs(results["tanh_0"]).max() <= 1
    with pytest.raises(InputError, match="'x' is not a value that the function computes"):
        interpreter.predict_together([Request(inputs(0), interpreter.make_state(), "three", ("x",))])
