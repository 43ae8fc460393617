"""What a program states in one place: attention, whole rotary tables, windows, epsilons and its own limits.

A place that states something else than what a decoder means by it becomes a fact that says so, in words: it can equal
nothing that a graph expects.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.executorch.reading.attention import LayerAttention, layer_attentions
from pocketlm_export.backends.executorch.reading.elementwise import elementwise_facts
from pocketlm_export.backends.executorch.reading.experts import experts_facts
from pocketlm_export.backends.executorch.reading.kernels import SLICE, UPDATE_CACHE
from pocketlm_export.backends.executorch.reading.matrices import filter_matrix
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadNode
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.sparsity import stated_sparsity
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, KernelStep
from pocketlm_export.backends.reading import Fact

__all__ = ["rotary_constants", "stated_facts"]

Table = npt.NDArray[np.float32]


def stated_facts(file: PteFile) -> Iterator[Fact]:
    """Every fact of ``attention L``, ``norm I``, ``scale I``, ``clamp I``, ``experts I`` and ``program``."""
    attentions = layer_attentions(file)
    for layer, attention in enumerate(attentions):
        yield from _attention_facts(file, layer, attention)
    for number, epsilon in enumerate(_epsilons(file)):
        yield Fact(f"norm {number}", "epsilon", epsilon)
    yield from elementwise_facts(file)
    yield from experts_facts(file)
    contexts = {file.shape(attention.keys)[1] for attention in attentions} | {*file.fact("get_max_context_len")}
    yield Fact("program", "context_length", _agreed(contexts))
    sizes = {file.shape(file.forward.outputs[0])[-1], *file.fact("get_vocab_size")}
    yield Fact("program", "vocabulary_size", _agreed(sizes))


def rotary_constants(file: PteFile, value: int) -> tuple[int, int, int] | None:
    """How the delegate that makes ``value`` (queries or keys in heads) rotates it: the constants of the program that
    hold cosines and sines, and the number of pairs; None if it doesn't.

    A rotation is ``x * cosine + turned(x) * sine``, where ``turned`` puts the second half of the pairs first.
    """
    step = next((step for step in file.steps if isinstance(step, DelegateStep) and value in step.outputs), None)
    if step is None:
        return None
    payload = file.delegates[step.index]
    total = payload.producers.get(payload.outputs[step.outputs.index(value)])
    if total is None or total.kind != "Add":
        return None
    products = [payload.producers.get(number) for number in total.inputs]
    factors: dict[bool, int] = {}
    pairs = 0
    for product in products:
        if product is None or product.kind != "Multiply":
            return None
        sources = [payload.producers[number] for number in product.inputs if number in payload.producers]
        turned = [node for node in sources if node.kind.startswith("Concatenate")]
        if turned:
            pairs = payload.values[turned[0].inputs[0]].shape[-1]
        tables = [number for number in product.inputs if number in payload.inputs]
        if len(tables) != 1:
            return None
        factors[bool(turned)] = _sliced_constant(file, step.inputs[payload.inputs.index(tables[0])])
    return (factors[False], factors[True], pairs) if len(factors) == 2 else None


def _attention_facts(file: PteFile, layer: int, attention: LayerAttention) -> Iterator[Fact]:
    _, _, heads, head_dim = file.shape(attention.query)
    _, context, kv_heads, _ = file.shape(attention.keys)
    cosine, sine = _rotation(file, attention.query, attention.keys)
    values = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5 if attention.scale is None else attention.scale,
        "window": None if attention.mask is None else _window(file, attention.mask, context),
        "sparsity": _sparsity(file, attention.blocks, heads, context),
        "softcap": _softcap(attention.softcap),
        "cosine": cosine,
        "sine": sine,
    }
    for name, value in values.items():
        yield Fact(f"attention {layer}", name, value)


def _softcap(numbers: tuple[float, float] | None) -> float | str | None:
    if numbers is None:
        return None
    divisor, factor = numbers
    return factor if divisor == factor else f"scores divided by {divisor} and multiplied with {factor}"


def _rotation(file: PteFile, query: int, keys: int) -> tuple[Table | str | None, Table | str | None]:
    """Cosines and sines ``[context, pairs]`` that turn the queries; the keys must be turned by the very same."""
    updates = [step for step in file.steps if isinstance(step, KernelStep) and step.operator == UPDATE_CACHE]
    rows = next(step.arguments[0] for step in updates if step.arguments[1] == keys)
    found = rotary_constants(file, query)
    if found != rotary_constants(file, rows):
        return ("queries and keys are rotated by different tables",) * 2
    if found is None:
        return None, None
    *indices, pairs = found
    tables = [file.constant(index) if index else np.empty(0) for index in indices]
    if any(table.ndim != 3 or table.shape[1] != 1 for table in tables):
        return ("not rows of a table [context, 1, head_dim]",) * 2
    (first, second, ones), (low, high, zeros) = (np.split(table[:, 0], [pairs, 2 * pairs], axis=-1) for table in tables)
    cosines = first if np.array_equal(first, second) and (ones == 1).all() else "a table whose halves differ"
    sines = high if np.array_equal(-low, high) and (zeros == 0).all() else "a table whose halves are not opposite"
    return cosines, sines


def _window(file: PteFile, mask: int, context: int) -> int | str | None:
    """The window of a table ``[longest call, 2 * context]`` whose entry depends on ``row - column + context`` alone:
    0 for distances from zero to below the window, minus infinity elsewhere. None: all that came before is seen."""
    index = _sliced_constant(file, mask)
    table = file.constant(index) if index else np.empty(0)
    if table.ndim != 2 or table.shape[1] != 2 * context:
        return f"a mask table {list(table.shape)}"
    window = int((table[0] == 0).sum())
    beyond = window > context  # no key is as far as that
    for row, line in enumerate(table):
        distance = row - (np.arange(2 * context) - context)
        seen = (distance >= 0) & (beyond | (distance < window))
        if not np.array_equal(line, np.where(seen, np.float32(0), -np.inf)):
            return f"a mask table whose row {row} is no window"
    return None if beyond else window


def _sparsity(file: PteFile, masks: tuple[int, ...], heads: int, context: int) -> str | None:
    if not masks:
        return None
    indices = [_sliced_constant(file, mask) for mask in masks]
    return stated_sparsity([file.constant(index) if index else np.empty(0) for index in indices], heads, context)


def _sliced_constant(file: PteFile, value: int) -> int:
    """The constant of the program of which ``value`` is a part; 0 if it is none."""
    while not (index := file.tensor(value).data_buffer_idx):
        step = file.producers.get(value)
        if step is None or step.operator != SLICE:
            return 0
        value = step.arguments[0]
    return int(index)


def _epsilons(file: PteFile) -> Iterator[float | str]:
    """Of every normalization, in order of execution: the bias of the mean that goes into a reciprocal square root."""
    for step in file.steps:
        if not isinstance(step, DelegateStep):
            continue
        payload = file.delegates[step.index]
        for node in payload.nodes:
            if node.kind == "ReciprocalSquareRoot":
                yield _epsilon(file, payload, payload.producers.get(node.inputs[0]))


def _epsilon(file: PteFile, payload: Payload, mean: PayloadNode | None) -> float | str:
    if mean is None or mean.kind != "FullyConnected" or len(mean.inputs) != 3 or payload.is_quantized(mean):
        return "no mean with a bias before the reciprocal square root"
    factors, bias = (filter_matrix(file, payload, number) for number in mean.inputs[1:])
    if bias.shape != (1,) or len(factors.shape) != 2 or factors.shape[0] != 1:
        return f"a mean of shape {list(factors.shape)}"
    width = factors.shape[1]
    if not (factors.values(slice(None)) == np.float32(1 / width)).all():
        return f"a mean whose factors are not all 1/{width}"
    return float(np.ravel(bias.values(slice(None)))[0])


def _agreed(values: set[int]) -> int | str:
    return values.pop() if len(values) == 1 else f"places that differ: {sorted(values)}"
