"""A written package opened for verification: what it holds, what it states, and what it computes.

The reading is in :mod:`pocketlm_export.backends.coreml.reading`, the executing in the reference interpreter; neither
knows the writer.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnavailableError, UnsupportedError
from pocketlm.manifest import Manifest
from pocketlm.runtimes.coreml_interpreter import Interpreter
from pocketlm_export.backends.coreml.reading.attention import MIXING, WrittenAttention
from pocketlm_export.backends.coreml.reading.running import Runner
from pocketlm_export.backends.coreml.reading.structure import Structure, read_structure
from pocketlm_export.backends.coreml.reading.written import WrittenPackage
from pocketlm_export.backends.reading import (
    Fact,
    Floats,
    NotRun,
    Run,
    StoredConstants,
    Trace,
    WrittenMatrix,
    described_blocks,
)

__all__ = ["CoreMLReader", "open_reader"]

FUNCTIONS = {"prefill", "decode", "score"}
TARGET = "coreml"
RESIDUAL_SHIFT, LARGEST_SHIFT = "pocketlm.residual_shift", 15


def open_reader(path: Path, manifest: Manifest) -> "CoreMLReader":
    """The reader of the package at ``path``. Raises :class:`BundleError` for a malformed one or one that has other
    functions, inputs or states, :class:`UnsupportedError` for an operator that the interpreter doesn't know."""
    return CoreMLReader(path, manifest)


class CoreMLReader:
    """See :class:`pocketlm_export.backends.reading.Reader`."""

    unstated: frozenset[str] = frozenset()
    round_activations: Callable[[str, Floats], Floats] | None = None
    notes: tuple[str, ...] = (
        "executed by PocketLM's reference interpreter; no Core ML runtime has run this package",
        "the mask's -30000 and the norms' smallest divisor 2^-10 are checked as stated values",
    )

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._exact = Interpreter(path, "float64", cache_bytes=0)
        self._package = WrittenPackage(path)
        self._check_interface()
        self.stored = self._stored()
        self._runner = Runner(self._exact)
        self._structures: dict[str, Structure] = {}

    def rows(self, entry: str, start: int, stop: int) -> WrittenMatrix | Floats:
        """Rows ``start..stop``. Raises :class:`BundleError` for an entry that isn't there or is shorter."""
        count = self._package.row_count(entry)
        if not 0 <= start <= stop <= count:
            raise BundleError(f"{self._package.file}: {entry}: rows {start} to {stop} of {count}")
        found: WrittenMatrix | Floats
        if entry in self._package.quantized:
            found = self._package.matrix(entry, start, stop)
        else:
            found = self._package.constant(entry, start, stop).astype(np.float32)
        self._package.release()
        return found

    def facts(self) -> Iterator[Fact]:
        """What all functions state. Raises :class:`BundleError` naming the function that states something else, has
        another form, or holds a constant that no weight and no statement accounts for."""
        structures = self._read_structures()
        first, *others = structures
        facts = list(_facts(structures[first]))
        for function in others:
            self._compare(function, list(_facts(structures[function])), first, facts)
        self._check_constants(structures)
        yield from facts

    def execute(self, runs: Sequence[Run]) -> list[Trace]:
        """In float64."""
        return self._runner.run(runs)

    def in_parts(self, runs: Sequence[Run]) -> None:  # noqa: ARG002  the contract's
        """None: there is no runtime here."""
        return

    def chosen_experts(self, runs: Sequence[Run]) -> list[Trace]:  # noqa: ARG002
        """Only Core ML could tell."""
        raise UnavailableError(_not_run().reason)

    def emulate(self, runs: Sequence[Run]) -> list[Trace]:
        """As shipped, in fp16. Raises :class:`pocketlm.CheckError` naming the operator that made infinity or NaN."""
        experts = {name: [e.indices for e in found.experts] for name, found in self._read_structures().items()}
        return Runner(Interpreter(self._path, "float16", cache_bytes=0), experts).run(runs)

    def meaning(self, runs: Sequence[Run]) -> NotRun:  # noqa: ARG002
        """Only Core ML could tell."""
        return _not_run()

    def kernels(self, runs: Sequence[Run]) -> NotRun:  # noqa: ARG002
        """Only Core ML could tell."""
        return _not_run()

    def state_bytes(self, run: Run) -> int:
        """What the state of ``run`` takes in :meth:`execute`; :meth:`emulate` takes half."""
        return self._runner.state_bytes(run)

    def _stored(self) -> StoredConstants:
        """fp16 tables, vectors, scales and constants, and roots of epsilons in fp16's digits."""
        kinds = {operator.kind for name in self._package.functions for operator in self._package.operators(name)}
        if kinds >= set(MIXING):
            raise UnsupportedError(f"{self._package.file}: attentions in both forms; supported: one of {MIXING}")
        # The fused operator divides by the root of the width, so what is stored is the scale beside that.
        own = (self._exact.states["k_cache"].shape[3] or 1) ** 0.5 if MIXING[1] in kinds else 1.0
        return StoredConstants(
            table=np.float16,
            value=np.float16,
            epsilon=lambda epsilon: _eleven_bits(math.sqrt(epsilon)) ** 2,
            scale=lambda scale: float(np.float16(scale * own)) / own,
            constant=lambda value: float(np.float16(value)),
            residual_shift=self._residual_shift(),
        )

    def _residual_shift(self) -> int:
        stated = self._exact.metadata.get(RESIDUAL_SHIFT, "0")
        if not stated.isascii() or not stated.isdigit() or int(stated[:3]) > LARGEST_SHIFT:
            raise BundleError(f"{self._package.file}: {RESIDUAL_SHIFT} is {stated[:20]!r}, not 0 to {LARGEST_SHIFT}")
        return int(stated)

    def _read_structures(self) -> dict[str, Structure]:
        if not self._structures:
            found = {name: read_structure(self._package, name) for name in self._package.functions}
            for name, structure in found.items():
                shape = self._exact.inputs(name)["input_ids"].type.shape
                if structure.positions.steps != (shape == (1, 1)):
                    raise BundleError(f"{self._package.file}: {name}: takes {list(shape)} tokens, but counts otherwise")
            self._structures = found
        return self._structures

    def _check_interface(self) -> None:
        file = self._package.file
        if set(self._exact.functions) != FUNCTIONS:
            raise BundleError(f"{file}: functions {list(self._exact.functions)}; expected: {sorted(FUNCTIONS)}")
        states = self._exact.states
        shapes = {state.shape for state in states.values()}
        if set(states) != {"k_cache", "v_cache"} or len(shapes) != 1 or any(len(shape) != 4 for shape in shapes):
            raise BundleError(f"{file}: states {sorted(states)}; expected: k_cache and v_cache of one shape")
        for function in self._exact.functions:
            inputs, outputs = self._exact.inputs(function), self._exact.outputs(function)
            if set(inputs) != {"input_ids", "position"} or outputs != ("logits",):
                raise BundleError(f"{file}: {function}: takes {sorted(inputs)} and gives {list(outputs)}")

    def _compare(self, function: str, found: list[Fact], first: str, expected: list[Fact]) -> None:
        stated, wanted = ({(fact.node, fact.name): fact.value for fact in facts} for facts in (found, expected))
        for node, name in [key for key in wanted if key in stated]:
            if not np.array_equal(np.asarray(stated[node, name]), np.asarray(wanted[node, name])):
                raise BundleError(f"{self._package.file}: {function}: {node}: {name} is not that of {first}")
        for node, name in sorted(stated.keys() ^ wanted.keys()):
            raise BundleError(f"{self._package.file}: {function}: {node}: {name} is stated here or in {first} alone")

    def _check_constants(self, structures: dict[str, Structure]) -> None:
        """Whatever no weight and no table accounts for is a bias of zeros."""
        covered: dict[str, npt.NDArray[np.bool_]] = {}
        for weight in self._manifest.weights.values():
            place = weight.places[TARGET]
            rows = covered.setdefault(place.entry, np.zeros(self._package.row_count(place.entry), np.bool_))
            rows[place.first_row : place.first_row + weight.shape[0]] = True
        tables = {name for s in structures.values() for a in s.attentions for name in a.tables}
        tables |= {name for s in structures.values() for e in s.experts for name in e.tables}
        tables |= {structure.positions.every for structure in structures.values()}
        for name in (*self._package.names, *self._package.quantized):
            if name in tables:
                continue
            rows = covered.get(name, np.zeros(self._package.row_count(name), np.bool_))
            if name in self._package.quantized:
                surplus = not rows.all()
            else:
                surplus = bool(np.any(self._package.constant(name)[~rows])) if not rows.all() else False
            self._package.release()
            if surplus:
                raise BundleError(f"{self._package.file}: {name}: holds values of no weight")


def _facts(structure: Structure) -> Iterator[Fact]:
    """In an order of their own, the same for every function."""
    yield Fact("program", "context_length", structure.positions.context_length)
    yield Fact("program", "vocabulary_size", structure.vocabulary_size)
    for index, epsilon in enumerate(structure.epsilons):
        yield Fact(f"norm {index}", "epsilon", epsilon)
    for index, factor in enumerate(structure.scales):
        yield Fact(f"scale {index}", "factor", factor)
    for index, bounds in enumerate(structure.clamps):
        for name, bound in zip(("least", "most"), bounds, strict=True):
            yield Fact(f"clamp {index}", name, bound)
    for index, experts in enumerate(structure.experts):
        yield Fact(f"experts {index}", "chosen", experts.chosen)
        yield Fact(f"experts {index}", "renormalize", experts.renormalize)
    for layer, attention in enumerate(structure.attentions):
        yield Fact(f"attention {layer}", "sparsity", _sparsity(attention, structure.positions.context_length))
        for name in ("heads", "kv_heads", "head_dim", "scale", "window", "softcap", "cosine", "sine"):
            yield Fact(f"attention {layer}", name, getattr(attention, name))


def _sparsity(attention: WrittenAttention, context: int) -> str | None:
    if attention.sparsity is None:
        return None
    size, local, stride, shift = attention.sparsity
    query, key = np.ogrid[: -(-context // size), : -(-context // size)]
    heads = ((query - key < local) | ((key + head * shift + 1) % stride == 0) for head in range(attention.heads))
    return described_blocks(size, heads)


def _eleven_bits(value: float) -> float:
    """``value`` as fp16 has it, but for its range: small numbers keep their digits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(float(np.float16(mantissa)), exponent)


def _not_run() -> NotRun:
    if sys.platform == "darwin":
        return NotRun("not built yet: Core ML itself is not asked")
    return NotRun("needs Core ML, which exists on Apple's systems only")
