"""The table of MIL operators that the interpreter executes: ``{name in the file: Operator}``.

A name that isn't here is refused when a package is opened. ``const``, the ``constexpr_`` operators, ``read_state`` and
``write_state`` are the program's own (``program.py``).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import contractions, elementwise, movement

__all__ = ["OPERATORS", "Operator"]


@dataclass(frozen=True)
class Operator:
    """``function`` takes MIL's parameters by name.

    ``computes``: makes new numbers, so results are rounded to the declared type and scanned for infinity and NaN.
    ``may_view``: a result may share memory with an input.
    ``takes_stored``: parameters that accept a WeightReader in the place of an array.
    """

    function: Callable[..., Any]
    computes: bool = True
    may_view: bool = False
    takes_stored: frozenset[str] = frozenset()

    @cached_property
    def required(self) -> frozenset[str]:
        return frozenset(
            name for name, parameter in self._parameters.items() if parameter.default is inspect.Parameter.empty
        )

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset(self._parameters)

    @property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)


def _unary(function: Callable[[Any], Any]) -> Operator:
    def apply(x: Any) -> Any:
        return function(x)

    return Operator(apply)


def _binary(function: Callable[[Any, Any], Any]) -> Operator:
    def apply(x: Any, y: Any) -> Any:
        return function(x, y)

    return Operator(apply)


def _moving(function: Callable[..., Any], *, takes_stored: tuple[str, ...] = ()) -> Operator:
    return Operator(function, computes=False, takes_stored=frozenset(takes_stored))


def _viewing(function: Callable[..., Any]) -> Operator:
    return Operator(function, computes=False, may_view=True)


OPERATORS: dict[str, Operator] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "band_part": _moving(movement.band_part),
    "cast": Operator(elementwise.cast, may_view=True),
    "ceil": _unary(np.ceil),
    "clip": Operator(elementwise.clip),
    "concat": _moving(movement.concat),
    "cos": _unary(np.cos),
    "cumsum": Operator(contractions.cumsum),
    "einsum": Operator(contractions.einsum, may_view=True),
    "equal": _binary(np.equal),
    "erf": Operator(elementwise.erf),
    "exp": _unary(np.exp),
    "exp2": _unary(np.exp2),
    "expand_dims": _viewing(movement.expand_dims),
    "fill": Operator(movement.fill),
    "fill_like": Operator(movement.fill_like),
    "floor": _unary(np.floor),
    "floor_div": Operator(elementwise.floor_div),
    "gather": _moving(movement.gather, takes_stored=("x",)),
    "gather_along_axis": _moving(movement.gather_along_axis),
    "gather_nd": _viewing(movement.gather_nd),  # of indices of depth 0
    "gelu": Operator(elementwise.gelu),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "identity": _viewing(elementwise.identity),
    "inverse": Operator(elementwise.inverse),
    "layer_norm": Operator(contractions.layer_norm),
    "leaky_relu": Operator(elementwise.leaky_relu),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "linear": Operator(contractions.linear),
    "log": Operator(elementwise.log),
    "logical_and": _binary(np.logical_and),
    "logical_not": _unary(np.logical_not),
    "logical_or": _binary(np.logical_or),
    "logical_xor": _binary(np.logical_xor),
    "matmul": Operator(contractions.matmul),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mod": Operator(elementwise.mod),
    "mul": _binary(np.multiply),
    "not_equal": _binary(np.not_equal),
    "pow": Operator(elementwise.power),
    "range_1d": Operator(movement.range_1d),
    "real_div": Operator(elementwise.real_div),
    "reduce_argmax": Operator(contractions.reduce_argmax),
    "reduce_argmin": Operator(contractions.reduce_argmin),
    "reduce_l2_norm": Operator(contractions.reduce_l2_norm),
    "reduce_max": Operator(contractions.reduce_max),
    "reduce_mean": Operator(contractions.reduce_mean),
    "reduce_min": Operator(contractions.reduce_min),
    "reduce_prod": Operator(contractions.reduce_prod),
    "reduce_sum": Operator(contractions.reduce_sum),
    "reduce_sum_square": Operator(contractions.reduce_sum_square),
    "relu": Operator(elementwise.relu),
    "reshape": _viewing(movement.reshape),
    "reverse": _viewing(movement.reverse),
    "round": _unary(np.round),
    "rsqrt": Operator(elementwise.rsqrt),
    "scaled_dot_product_attention": Operator(contractions.scaled_dot_product_attention),
    "scatter_nd": Operator(movement.scatter_nd),
    "select": Operator(elementwise.select),
    "shape": _moving(movement.shape, takes_stored=("x",)),
    "sigmoid": Operator(elementwise.sigmoid),
    "sign": _unary(np.sign),
    "silu": Operator(elementwise.silu),
    "sin": _unary(np.sin),
    "slice_by_index": _viewing(movement.slice_by_index),
    "slice_by_size": _viewing(movement.slice_by_size),
    "slice_update": _moving(movement.slice_update),
    "softmax": Operator(contractions.softmax),
    "softplus": Operator(elementwise.softplus),
    "split": _viewing(movement.split),
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "squeeze": _viewing(movement.squeeze),
    "stack": _moving(movement.stack),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
    "tile": _viewing(movement.tile),
    "topk": Operator(contractions.topk),
    "transpose": _viewing(movement.transpose),
}
