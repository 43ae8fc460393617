"""One function of the program while it is built: its values, its constants and its caches."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import numpy as np

from pocketlm_export.backends.coreml.importing import mil
from pocketlm_export.backends.coreml.layout import Constant, Layout
from pocketlm_export.graph.graph import Graph, Value, WeightInfo

__all__ = ["AttentionForm", "Emission", "Var"]

AttentionForm = Literal["explicit", "fused"]
"""Matrix products and softmax, or ``scaled_dot_product_attention``; a soft cap is always explicit."""

Var = Any  # of the MIL builder, which has no types
mb = mil.Builder


class Emission:
    """What emitters share. ``values`` holds the program's variable of each of the graph's values."""

    def __init__(
        self, graph: Graph, layout: Layout, form: AttentionForm, length: int | None, inputs: Mapping[str, Var]
    ) -> None:
        self.graph, self.layout, self.form, self.length = graph, layout, form, length
        self.context_length = graph.context_length
        self.values: dict[Value, Var] = {graph.ids: inputs["input_ids"]}
        self._made: dict[Hashable, Any] = {}
        # Read once, then chained through the updates: Core ML merges several reads of one state, whatever lies between.
        self.states = (inputs["k_cache"], inputs["v_cache"])
        self.caches = [mb.read_state(input=state) for state in self.states]
        every = self.constant(layout.table("positions", np.arange(graph.context_length, dtype=np.int32)))
        self.every_position = mb.expand_dims(x=every, axes=[0])
        self.begin = inputs["position"]
        if length == 1:
            self.end = mb.add(x=self.begin, y=np.ones(1, np.int32))
            self.positions = self.begin
        else:
            count = mb.slice_by_size(x=mb.shape(x=inputs["input_ids"]), begin=[1], size=[1])
            self.end = mb.add(x=self.begin, y=count)
            self.positions = mb.slice_by_index(x=every, begin=self.begin, end=self.end)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, called at the first use of ``key`` in this function."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def name_of(self, *values: Value) -> dict[str, str]:
        """The argument that names the operator which makes ``values``; only the function's output needs one."""
        return {"name": "logits"} if self.graph.logits in values else {}

    def constant(self, constant: Constant) -> Var:
        """A placeholder without memory; the writer finds the bytes by its ``weight_id``, which all functions share."""
        return self.once(constant.name, lambda: _placeholder(constant))

    def matrix(self, weights: tuple[WeightInfo, ...]) -> Var:
        """fp16 ``[N, K]``, dequantized by the program where it is stored as codes."""
        matrix = self.layout.matrix(weights)
        data = self.constant(matrix.data)
        if matrix.scales is None:
            return data
        scales = self.constant(matrix.scales)
        return self.once(
            matrix.name, lambda: mb.constexpr_blockwise_shift_scale(data=data, scale=scales, name=matrix.name)
        )


def _placeholder(constant: Constant) -> Var:
    dtypes = {
        "int4": mil.types.nptype_from_builtin(mil.types.int4),
        "int8": np.dtype(np.int8),
        "float16": np.dtype(np.float16),
        "int32": np.dtype(np.int32),
    }
    zero = np.zeros((), dtypes[constant.element])
    var = mb.const(val=np.broadcast_to(zero, constant.shape), name=constant.name)
    var.op.weight_id = constant.name
    return var
