"""The operators of one function, followed from what reads a value back to what makes it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError
from pocketlm_export.backends.coreml.reading.written import WrittenOperator, WrittenPackage

__all__ = ["Walk"]


class Walk:
    """Every step says what it expects; :class:`BundleError` names file, function and value where that isn't so."""

    def __init__(self, package: WrittenPackage, function: str) -> None:
        self.package, self.function = package, function
        self.operators = tuple(package.operators(function))
        self._read: set[str] = set()
        self._makers = {name: operator for operator in self.operators for name in operator.outputs}

    def refused(self, name: str, reason: str) -> BundleError:
        """The error to raise about the value ``name``."""
        return BundleError(f"{self.package.file}: {self.function}: {name}: {reason}")

    def of_kind(self, kind: str) -> Iterator[WrittenOperator]:
        """Every operator of ``kind``, in the order of execution."""
        return (operator for operator in self.operators if operator.kind == kind)

    def kind_of(self, name: str) -> str:
        """The kind of what makes ``name``; "" for inputs and constants."""
        return self._makers[name].kind if name in self._makers else ""

    def maker(self, name: str, kind: str) -> WrittenOperator:
        """What makes ``name``, which must be of ``kind``."""
        if self.kind_of(name) != kind:
            raise self.refused(name, f"made by {self.kind_of(name) or 'nothing'}, where {kind} is expected")
        return self._makers[name]

    def chain(self, name: str, *steps: tuple[str, str]) -> str:
        """Follow ``steps`` of (kind, parameter) from ``name``: what the last operator takes as that parameter."""
        for kind, parameter in steps:
            name = self.maker(name, kind).inputs[parameter][0]
        return name

    def reader(self, name: str, kind: str) -> WrittenOperator:
        """The one operator that reads ``name``, which must be of ``kind``."""
        found = [o for o in self.operators if any(name in names for names in o.inputs.values())]
        if [o.kind for o in found] != [kind]:
            raise self.refused(name, f"read by {[o.kind for o in found]}, where one {kind} is expected")
        return found[0]

    def number(self, operator: WrittenOperator, parameter: str) -> float:
        """The scalar that the file states for ``parameter``."""
        value = operator.attributes.get(parameter)
        if not isinstance(value, np.ndarray) or value.size != 1 or value.dtype.kind not in "fi":
            raise self.refused(operator.outputs[0], f"{operator.kind}: {parameter} is not a number of the file")
        self._read.add(operator.outputs[0])
        return float(value.item())

    def numbers(self, operator: WrittenOperator, parameter: str) -> list[Any]:
        """The vector that the file states for ``parameter``."""
        value = operator.attributes.get(parameter)
        if not isinstance(value, np.ndarray) or value.ndim > 1:
            raise self.refused(operator.outputs[0], f"{operator.kind}: {parameter} is not in the file")
        return list(value.reshape(-1).tolist())

    def expect(self, operator: WrittenOperator, **attributes: Any) -> None:
        """Each attribute has this value; a missing flag is False."""
        for parameter, expected in attributes.items():
            found: Any = operator.attributes.get(parameter, np.array(False))
            found = found if isinstance(found, str) else found.tolist()
            if found != expected:
                raise self.refused(operator.outputs[0], f"{operator.kind}: {parameter} {found}, not {expected}")
        self._read.add(operator.outputs[0])

    def is_unread(self, operator: WrittenOperator, parameter: str) -> bool:
        """Whether ``parameter`` is a number of the file, and no attribute of ``operator`` was asked for yet."""
        value = operator.attributes.get(parameter)
        return isinstance(value, np.ndarray) and value.size == 1 and operator.outputs[0] not in self._read

    def table(self, name: str) -> npt.NDArray[Any]:
        """The whole constant ``name`` of weight.bin."""
        if name not in self.package.names:
            raise self.refused(name, "not a constant of weight.bin")
        return self.package.constant(name)

    def same(self, names: Sequence[str], reason: str) -> str:
        """The one name that all of ``names`` are."""
        if len(set(names)) != 1:
            raise self.refused(names[0], f"{reason}: {', '.join(sorted(set(names)))}")
        return names[0]
