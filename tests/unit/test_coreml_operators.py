"""Each operator of the Core ML interpreter against coremltools' own value inference, or numpy where that has none."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm.runtimes.coreml_interpreter.operators import OPERATORS
from tests.unit.coreml_packages import coremltools, save_package, tensor

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(normal(*shape)) + np.float32(0.1)


def integers(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Case:
    """``expected``: results where coremltools infers none, or a wrong one."""

    operator: str
    parameters: dict[str, Any]
    expected: tuple[np.ndarray, ...] | None = None


def case(operator: str, *expected: np.ndarray, **parameters: Any) -> Case:
    return Case(operator, parameters, expected or None)


INPUT = "the function's input, which holds X"
X, Y, Z = normal(3, 4), normal(3, 4), normal(2, 3, 4)
TRUTH, OTHER = X > 0, Y > 0
EINSUM_LEFT, EINSUM_RIGHT = normal(2, 3, 4, 5), normal(2, 5, 4, 6)
QUERY, KEY, VALUE = normal(1, 2, 3, 8), normal(1, 2, 5, 8), normal(1, 2, 5, 4)


def attention(mask: np.ndarray | float) -> np.ndarray:
    scores = QUERY @ KEY.swapaxes(-1, -2) / np.sqrt(8) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ VALUE


def with_rows(rows: np.ndarray) -> np.ndarray:
    result = X.copy()
    result[[2, 0]] = rows
    return result


CASES = [
    *(case(name, x=X) for name in ("abs", "ceil", "floor", "round", "sign", "exp", "exp2", "square", "erf")),
    *(case(name, x=X) for name in ("sin", "cos", "tanh", "sigmoid", "relu", "softplus", "identity")),
    case("silu", X / (1 + np.exp(-X)), x=X),
    case("silu", np.array([-0.0, 1000.0], np.float32), x=np.array([-1000.0, 1000.0], np.float32)),
    *(case("gelu", x=X, mode=mode) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    case("sqrt", x=positive(4)),
    case("rsqrt", x=positive(4), epsilon=np.float32(1e-3)),
    case("rsqrt", x=positive(4)),
    case("inverse", x=positive(4), epsilon=np.float32(1e-3)),
    case("log", x=positive(4), epsilon=np.float32(1e-3)),
    case("clip", x=X, alpha=np.float32(-0.5), beta=np.float32(0.7)),
    case("leaky_relu", x=X, alpha=np.float32(0.1)),
    case("cast", x=3 * X, dtype="int32"),
    case("cast", x=integers(0, 2, -1), dtype="bool"),
    case("cast", x=TRUTH, dtype="fp32"),
    *(case(name, x=X, y=Y[:1]) for name in ("add", "sub", "mul", "real_div", "maximum", "minimum")),
    *(case(name, x=X, y=Y[:1]) for name in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")),
    *(case(name, x=TRUTH, y=OTHER) for name in ("logical_and", "logical_or", "logical_xor")),
    case("logical_not", x=TRUTH),
    case("pow", x=positive(4), y=np.float32(2.5)),
    case("real_div", integers(3, -3), x=integers(6, -6), y=integers(2, 2)),
    *(case(name, x=integers(7, -7, 6), y=integers(2, 2, -4)) for name in ("floor_div", "mod", "maximum")),
    *(case(name, x=5 * X, y=Y) for name in ("floor_div", "mod")),
    case("select", cond=TRUTH[:, :1], a=X, b=Y),
    *(
        case(f"reduce_{name}", x=Z, axes=[-1, 0], keep_dims=keep)
        for name in ("sum", "mean", "max", "min", "prod", "sum_square", "l2_norm")
        for keep in (True, False)
    ),
    case("reduce_mean", np.float32(Z.mean()), x=Z),
    case("reduce_argmax", X.argmax(-1), x=X, axis=-1),
    case("reduce_argmin", X.argmin(0)[None], x=X, axis=0, keep_dims=True),
    case("cumsum", x=X, axis=1),
    case("cumsum", np.cumsum(X, 0) - X, x=INPUT, axis=0, exclusive=True),
    case("cumsum", np.cumsum(X[::-1], 0)[::-1], x=X, axis=0, reverse=True),
    case("topk", -np.sort(-X, 1)[:, :2], np.argsort(-X, 1)[:, :2], x=X, k=2, axis=1),
    case("topk", np.sort(X, 0)[:1], np.argsort(X, 0)[:1], x=X, k=1, axis=0, ascending=True),
    case("softmax", x=Z, axis=1),
    case("layer_norm", x=Z, axes=[-1], gamma=normal(4), beta=normal(4), epsilon=np.float32(1e-3)),
    case("layer_norm", x=Z, axes=[1, 2], gamma=normal(3, 4), beta=normal(3, 4), epsilon=np.float32(1e-3)),
    case("matmul", x=Z, y=normal(2, 4, 5)),
    case("matmul", x=Z, y=normal(2, 3, 5), transpose_x=True),
    case("matmul", x=Z, y=normal(5, 4), transpose_y=True),
    case("linear", x=Z, weight=normal(5, 4), bias=normal(5)),
    case("linear", x=X, weight=normal(5, 4)),
    case(
        "einsum",
        np.einsum("nchw,nwhu->nchu", EINSUM_LEFT, EINSUM_RIGHT),
        values=(EINSUM_LEFT, EINSUM_RIGHT),
        equation="nchw,nwhu->nchu",
    ),
    case("scaled_dot_product_attention", attention(0.0), query=QUERY, key=KEY, value=VALUE),
    case(
        "scaled_dot_product_attention",
        attention(np.linspace(-3, 3, 15, dtype=np.float32).reshape(3, 5)),
        query=QUERY,
        key=KEY,
        value=VALUE,
        attn_mask=np.linspace(-3, 3, 15, dtype=np.float32).reshape(3, 5),
    ),
    case(
        "scaled_dot_product_attention",
        attention(np.where(np.tri(3, 5, dtype=bool), 0.0, -np.inf)),
        query=QUERY,
        key=KEY,
        value=VALUE,
        attn_mask=np.tri(3, 5, dtype=bool),
    ),
    case("shape", integers(2, 3, 4), x=Z),
    case("reshape", x=Z, shape=[0, -1, 2]),
    case("reshape", x=Z, shape=[4, -1]),
    case("transpose", x=Z, perm=[2, 0, 1]),
    case("expand_dims", x=X, axes=[0, -1]),
    case("squeeze", x=normal(1, 3, 1), axes=[0]),
    case("squeeze", x=normal(1, 3, 1)),
    case("concat", values=(X, Y[:1]), axis=0),
    case("stack", values=(X, Y), axis=-1),
    case("split", x=normal(4, 6), num_splits=3, axis=1),
    case("split", x=normal(4, 6), split_sizes=[2, 1, 3], axis=-1),
    case("tile", x=normal(1, 2, 3), reps=[2, 1, 1]),
    case("tile", x=normal(1, 2, 3), reps=[1, 3, 2]),
    case("reverse", x=Z, axes=[1]),
    case(
        "slice_by_index",
        x=Z,
        begin=[1, 0, -3],
        end=[2, 2, 0],
        end_mask=[False, False, True],
        squeeze_mask=[True] + [False] * 2,
    ),
    case(
        "slice_by_index",
        x=X,
        begin=[0, 1],
        end=[0, -1],
        stride=[1, 2],
        begin_mask=[True, False],
        end_mask=[True, False],
    ),
    case(
        "slice_by_index",
        X[::-1, 3:0:-2],
        x=X,
        begin=[0, 3],
        end=[0, 0],
        stride=[-1, -2],
        begin_mask=[True, False],
        end_mask=[True, False],
    ),
    case("slice_by_size", x=Z, begin=[1, 0, 2], size=[1, -1, 2]),
    case("slice_update", x=X, update=normal(2, 4), begin=[1, 0], end=[3, 0], end_mask=[False, True]),
    case("slice_update", x=Z, update=normal(3, 2), begin=[-1, 0, 1], end=[0, 3, 3], squeeze_mask=[True, False, False]),
    case("gather", x=X, indices=integers([0, 2], [1, 1]), axis=0),
    case("gather", x=Z, indices=integers(3, 0), axis=-1),
    case("gather", np.stack([Z[0][[2, 0]], Z[1][[1, 1]]]), x=Z, indices=integers([2, 0], [1, 1]), axis=1, batch_dims=1),
    case("gather_along_axis", x=X, indices=integers([0, 1, 2, 0]), axis=0),
    case("gather_nd", Z[[1, 0], [2, 1]], x=Z, indices=integers([1, 2], [0, 1])),
    case("scatter_nd", with_rows(Y[:2]), data=X, indices=integers([2], [0]), updates=Y[:2], mode="update"),
    case("scatter_nd", with_rows(X[[2, 0]] + Y[:2]), data=X, indices=integers([2], [0]), updates=Y[:2], mode="add"),
    case("range_1d", start=np.int32(1), end=np.int32(10), step=np.int32(4)),
    case("range_1d", start=np.float32(2), end=np.float32(-1), step=np.float32(-0.5)),
    case("fill", shape=[2, 3], value=np.float32(1.5)),
    case("fill_like", np.full((3, 4), 2, np.int32), ref_tensor=X, value=np.int32(2)),
    case("band_part", x=normal(4, 5), lower=0, upper=-1),
    case("band_part", x=Z, lower=1, upper=1),
]
IDS = [f"{row.operator}-{number}" for number, row in enumerate(CASES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """For each case what the interpreter gives for the written package, and what is expected."""
    coremltools()
    from coremltools.converters.mil.mil import Builder

    expected: list[list[np.ndarray]] = []
    names: list[list[str]] = []

    def body(x: Any) -> list[Any]:
        outputs = []
        for number, row in enumerate(CASES):
            parameters = {name: x if value is INPUT else value for name, value in row.parameters.items()}
            made = getattr(Builder, row.operator)(**parameters, name=f"case{number}")
            variables = list(made) if isinstance(made, tuple | list) else [made]
            inferred = row.expected if row.expected is not None else [variable.val for variable in variables]
            assert all(value is not None for value in inferred), f"{row.operator}: coremltools infers nothing"
            expected.append([np.asarray(value) for value in inferred])
            names.append([variable.name for variable in variables])
            outputs += variables
        return outputs

    path = save_package(
        tmp_path_factory.mktemp("operators") / "all.mlpackage", {"main": ({"x": tensor(X.shape, "fp32", "x")}, body)}
    )
    given = Interpreter(path, "float32").predict({"x": X})
    return [([given[name] for name in group], want) for group, want in zip(names, expected, strict=True)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_operator_agrees(results: list, number: int) -> None:
    given, expected = results[number]
    for got, want in zip(given, expected, strict=True):
        assert got.shape == want.shape
        if want.dtype != np.bool_:  # a function's truth values leave it as numbers
            assert (got.dtype.kind == "f") == (want.dtype.kind == "f")
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_every_operator_of_the_table_has_a_case() -> None:
    assert set(OPERATORS) == {row.operator for row in CASES}
