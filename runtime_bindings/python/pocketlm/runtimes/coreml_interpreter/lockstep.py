"""Several calls together, so that each stored weight is decoded once for all of them.

Each call runs up to its next product with a stored weight and waits. The weight that the first unfinished call waits
for is multiplied with the rows of the calls that wait for it, block by block, and these calls go on, in their order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .execution import Call, Product, answers

__all__ = ["run_together"]

Array = NDArray[Any]


def run_together(calls: Sequence[Call], release: Callable[[], None]) -> list[dict[str, Array]]:
    """The results of each call. Those that share a state have turns (:class:`Turns`), which refuse a wrong order.
    ``release`` is called behind each weight.

    In float64 the rows of all calls are one product; in the rounding precisions each call's product is its own, so
    that the results are bit by bit those of the calls one after another.
    """
    steps = [call.steps() for call in calls]
    results: list[dict[str, Array]] = [{} for _ in calls]
    waiting: dict[int, Product] = {}

    def proceed(number: int, product: Array | None) -> None:
        try:
            waiting[number] = next(steps[number]) if product is None else steps[number].send(product)
        except StopIteration as finished:
            results[number] = finished.value

    with np.errstate(all="ignore"):
        for number in range(len(calls)):
            proceed(number, None)
        while waiting:
            together = _next_group(calls, waiting)
            products = [waiting.pop(number) for number in together]
            found = answers(products, stacked=calls[together[0]].settings.precision.name == "float64")
            del products
            release()
            for number in together:
                proceed(number, found.pop(0))
    return results


def _next_group(calls: Sequence[Call], waiting: Mapping[int, Product]) -> list[int]:
    """Those that wait for the weight of the first, but none that would go ahead of a call before it on its state."""
    identity = waiting[min(waiting)].identity
    together: list[int] = []
    held_up: set[int] = set()
    for number in sorted(waiting):
        state = id(calls[number].state)
        if waiting[number].identity == identity and state not in held_up:
            together.append(number)
        else:
            held_up.add(state)
    return together
