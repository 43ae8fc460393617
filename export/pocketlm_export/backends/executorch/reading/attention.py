"""Which steps of a program are the attention of each layer, and what they read: the kernel, or explicit operations.

Explicit attention is one delegate: ``softmax(cap(query * scale @ keys) + mask) @ values`` over rows that slices take
out of the caches.
"""

import math
from dataclasses import dataclass

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.executorch.importing import schema
from pocketlm_export.backends.executorch.reading.kernels import ATTENTION, SLICE, UPDATE_CACHE
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadNode
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, KernelStep, Step

__all__ = ["LayerAttention", "layer_attentions", "number"]

LARGEST_CACHE = 1 << 30  # elements


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The step and the values of the method that it works on; ``keys`` and ``values`` are whole caches.

    ``mask`` is the addend of the scores for all heads, None: keys up to the query's own position. ``blocks``: two more
    addends of which the larger counts. ``softcap`` are the numbers that scores are divided by and multiplied with.
    """

    step: KernelStep | DelegateStep
    query: int
    keys: int
    values: int
    mask: int | None
    blocks: tuple[int, ...]
    scale: float | None
    softcap: tuple[float, float] | None
    result: int


def layer_attentions(file: PteFile) -> list[LayerAttention]:
    """The attention of each layer. Raises :class:`BundleError` unless every cache is written once, then read by one
    attention and by nothing else: only then can calls go in lockstep."""
    written: set[int] = set()
    attentions = []
    for place, step in enumerate(file.steps):
        if place in file.passed_over and _is_of_caches(file, step):
            raise BundleError(f"{file.path}: instruction {place} writes or reads a cache, and a jump may pass over it")
        if isinstance(step, KernelStep) and step.operator == UPDATE_CACHE:
            value, cache, _ = step.arguments
            if cache in written or file.tensor(cache).allocation_info is None or len(file.shape(cache)) != 4:
                raise BundleError(f"{file.path}: value {cache} is written twice, or is no cache")
            if file.shape(value)[2:] != file.shape(cache)[2:]:
                raise BundleError(f"{file.path}: rows {file.shape(value)} into a cache {file.shape(cache)}")
            written.add(cache)
            continue
        attention = _attention(file, step)
        if attention is not None:
            if not {attention.keys, attention.values} <= written:
                caches = f"{attention.keys} and {attention.values}"
                raise BundleError(f"{file.path}: attention over caches {caches} that nothing has written")
            _check_shapes(file, attention)
            attentions.append(attention)
    read = [cache for attention in attentions for cache in (attention.keys, attention.values)]
    if len(read) != len(set(read)) or set(read) != written:
        raise BundleError(f"{file.path}: a cache that two layers read, or none")
    _check_readers(file, written, attentions)
    return attentions


def number(file: PteFile, step: DelegateStep, value: int) -> float | None:
    """The number that input ``value`` of a delegate's graph is: a constant of one element. None for anything else."""
    inputs = file.delegates[step.index].inputs
    if value not in inputs:
        return None
    content = file.constant_tensor(step.inputs[inputs.index(value)])
    return float(content.ravel()[0]) if content is not None and content.size == 1 else None


def _is_of_caches(file: PteFile, step: Step) -> bool:
    if isinstance(step, DelegateStep):
        return any(node.kind == "BatchMatrixMultiply" for node in file.delegates[step.index].nodes)
    return isinstance(step, KernelStep) and step.operator in (UPDATE_CACHE, ATTENTION)


def _attention(file: PteFile, step: Step) -> LayerAttention | None:
    if isinstance(step, DelegateStep):
        return _Explicit(file, step).read() if _is_of_caches(file, step) else None
    if not isinstance(step, KernelStep) or step.operator != ATTENTION:
        return None
    query, keys, values, _, mask, _, _, scale = step.arguments
    stated = file.scalar(scale)
    if isinstance(stated, list):
        raise BundleError(f"{file.path}: {step.operator} with a list for a scale")
    masked = None if isinstance(file.forward.values[mask].val, schema.Null) else mask
    return LayerAttention(
        step, query, keys, values, masked, (), None if stated is None else float(stated), None, step.result
    )


class _Explicit:
    """Follows the graph of an explicit attention from its output to its inputs; any other form is refused."""

    def __init__(self, file: PteFile, step: DelegateStep) -> None:
        self._file = file
        self._step = step
        self._payload: Payload = file.delegates[step.index]

    def read(self) -> LayerAttention:
        (output,) = self._only(self._payload.outputs)
        weights, values = self._node(self._unshaped(output), "BatchMatrixMultiply").inputs
        scores, mask = self._node(self._node(weights, "Softmax").inputs[0], "Add").inputs
        multiplied = None
        if self._kind(scores) == "Multiply":
            capped, cap = self._node(scores, "Multiply").inputs
            multiplied = self._number(cap)
            scores = self._node(capped, "Tanh").inputs[0]
        query, keys = self._node(scores, "BatchMatrixMultiply").inputs
        query = self._unshaped(query)
        softcap = None
        if multiplied is not None:
            query, divisor = self._node(query, "Div").inputs
            softcap = self._number(divisor), multiplied
        query, scale = self._node(query, "Multiply").inputs
        blocks: tuple[int, ...] = ()
        if mask not in self._payload.inputs:
            mask, either = self._node(mask, "Add").inputs
            blocks = tuple(self._argument(number) for number in self._node(either, "Maximum").inputs)
        return LayerAttention(
            self._step, self._argument(query), self._cache(keys), self._cache(values), self._argument(mask), blocks,
            self._number(scale), softcap, self._step.outputs[0],
        )  # fmt: skip

    def _refused(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self._file.path}: delegate {self._step.index}: attention with {what}")

    def _only(self, numbers: tuple[int, ...]) -> tuple[int]:
        if len(numbers) != 1:
            raise self._refused(f"{len(numbers)} outputs")
        return (numbers[0],)

    def _kind(self, number: int) -> str:
        node = self._payload.producers.get(number)
        return "an input" if node is None else node.kind

    def _node(self, number: int, kind: str) -> PayloadNode:
        if self._kind(number) != kind:
            raise self._refused(f"{self._kind(number)} in place of {kind}")
        return self._payload.producers[number]

    def _unshaped(self, number: int) -> int:
        """Before what only arranges it anew."""
        while self._kind(number) in ("StaticReshape", "StaticTranspose"):
            (number,) = self._payload.producers[number].inputs
        return number

    def _argument(self, number: int) -> int:
        if number not in self._payload.inputs:
            raise self._refused(f"value {number}, which is computed")
        return self._step.inputs[self._payload.inputs.index(number)]

    def _number(self, value: int) -> float:
        found = number(self._file, self._step, value)
        if found is None:
            raise self._refused(f"value {value}, which is no number")
        return found

    def _cache(self, value: int) -> int:
        """The cache whose first rows ``value`` is."""
        rows = self._file.producers.get(self._argument(self._unshaped(value)))
        if rows is None or rows.operator != SLICE:
            raise self._refused("keys or values that are no rows of a cache")
        cache, dimension, start, _, step = rows.arguments
        if [self._file.scalar(index) for index in (dimension, start, step)] != [1, 0, 1]:
            raise self._refused("other rows of a cache than those from the first on")
        return cache


def _check_shapes(file: PteFile, attention: LayerAttention) -> None:
    query, keys, values = (file.shape(value) for value in (attention.query, attention.keys, attention.values))
    if keys != values or len(query) != 4:
        raise BundleError(f"{file.path}: caches {keys} and {values} of one layer")
    (_, _, heads, head_dim), (_, _, kv_heads, cached_dim) = query, keys
    if kv_heads == 0 or heads % kv_heads or head_dim != cached_dim or math.prod(keys) > LARGEST_CACHE:
        raise BundleError(f"{file.path}: queries {query} over caches {keys}")


def _check_readers(file: PteFile, caches: set[int], attentions: list[LayerAttention]) -> None:
    """Nothing else touches a cache, or the rows that were taken out of one."""
    own = [attention.step for attention in attentions]
    touched = set(caches)
    for step in file.steps:
        if isinstance(step, KernelStep) and step.operator == SLICE and step.arguments[0] in caches:
            touched.add(step.result)
        elif isinstance(step, KernelStep) and step.operator in (UPDATE_CACHE, ATTENTION):
            continue
        elif step not in own and touched & {*step.read, *step.made}:
            raise BundleError(f"{file.path}: a cache is read by another operator than attention")
