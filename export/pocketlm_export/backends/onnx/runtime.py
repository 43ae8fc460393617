"""The real ONNX Runtime on the written bytes, with caches as deployed: one buffer a layer and side, past and present.

The data file stays where it is; only the operators are given to the runtime from memory, so that they can be changed:
other accuracy levels, more outputs.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime  # type: ignore[import-untyped]

from pocketlm.errors import CheckError
from pocketlm.manifest import Model
from pocketlm.runtimes.onnx_loading import RUNTIME_ERRORS
from pocketlm_export.backends.onnx.execute import own_positions
from pocketlm_export.backends.onnx.file import OnnxFile
from pocketlm_export.backends.onnx.matrices import QMOE
from pocketlm_export.backends.onnx.pieces import Piece, cut_pieces, submodel
from pocketlm_export.backends.reading import Run, Trace

__all__ = [
    "Relay",
    "chosen_experts",
    "exposing",
    "meaning",
    "run_decoder",
    "run_head",
    "shipped",
    "start_session",
    "unmet_floor",
]

Array = npt.NDArray[Any]
Collect = Callable[[int, Mapping[str, Array]], None]
THREADS = 2
FATAL_ONLY = 4  # ONNX Runtime's log severity: its errors are raised
HIDDEN_STATES = "hidden_states"
MIXTURES = (QMOE, "com.microsoft.MoE")
FLOAT_ACTIVATIONS = 0  # MatMulNBits' accuracy_level


def unmet_floor(floor: str) -> str | None:
    """Why the installed runtime can't run an artifact that needs ``floor`` (``>=1.2.3``); None if it can."""
    needed, installed = floor.removeprefix(">="), onnxruntime.__version__
    if _release(installed) < _release(needed):
        return f"needs onnxruntime {needed} or newer, but {installed} is installed"
    return None


def meaning(decoder: OnnxFile, head: OnnxFile, runs: Sequence[Run], model: Model) -> list[Trace]:
    """Logits, keys and values with activations in float32. Sessions follow one another: one model in memory.

    The decoder is cut at its hidden states: what follows them gets the last positions of all calls at once, as a
    batch, because a product at this accuracy unpacks its whole matrix each time that it is called.
    """
    body, tail = _cut(decoder)
    states: list[Array] = []
    traces = run_decoder(decoder, body, runs, model, (HIDDEN_STATES,), lambda _, made: states.extend(made.values()))
    calls = [call for run in runs for call in run.calls]
    single, many = ([index for index, call in enumerate(calls) if (call.rows > 1) == more] for more in (False, True))
    logits: dict[int, Array] = {}
    if single:
        session = start_session(decoder, tail)
        batch = np.concatenate([states[index][:, -1:] for index in single])
        logits |= zip(single, run_head(session, decoder, batch, ("logits",))[0], strict=True)
    if many:
        session = start_session(head, _with_float_activations(head.model))
        rows = np.concatenate([states[index][:, -calls[index].rows :] for index in many], 1)
        (made,) = run_head(session, head, rows, ("logits",))
        ends = np.cumsum([calls[index].rows for index in many])
        logits |= zip(many, np.split(made[0], ends[:-1].tolist()), strict=True)
    return _with_logits(traces, runs, [logits[index] for index in sorted(logits)])


def shipped(decoder: OnnxFile, head: OnnxFile, runs: Sequence[Run], model: Model) -> list[Trace]:
    """What a session over the artifact computes, a piece at a time."""
    calls = [call for run in runs for call in run.calls]
    logits: dict[int, Array] = {}
    states: dict[int, Array] = {}

    def collect(call: int, made: Mapping[str, Array]) -> None:
        rows = calls[call].rows
        if rows == 1:
            logits[call] = made["logits"][0]
        else:
            states[call] = made[HIDDEN_STATES][:, -rows:]

    traces = run_decoder(decoder, decoder.model, runs, model, ("logits", HIDDEN_STATES), collect)
    if states:
        session = start_session(head, head.model)
        for call, rows in states.items():
            logits[call] = run_head(session, head, rows, ("logits",))[0][0]
    return _with_logits(traces, runs, [logits[index] for index in range(len(calls))])


def chosen_experts(decoder: OnnxFile, runs: Sequence[Run], model: Model) -> list[Trace]:
    """Which experts every mixture's scores choose in the artifact as shipped."""
    mixtures = [node for node in decoder.nodes if node.operator in MIXTURES]
    names = [node.inputs[1] for node in mixtures]
    chosen: dict[str, list[Array]] = {name: [] for name in names}  # of every call

    def collect(_call: int, made: Mapping[str, Array]) -> None:
        for node in mixtures:
            if node.inputs[1] in made:
                best = np.argsort(-made[node.inputs[1]], axis=-1, kind="stable")
                chosen[node.inputs[1]].append(best[:, : node.attributes["k"]])

    run_decoder(decoder, exposing(decoder.model, names), runs, model, names, collect)
    ends = np.cumsum([len(run.calls) for run in runs])
    return [
        Trace(experts=[np.concatenate(chosen[name][end - len(run.calls) : end]) for name in names])
        for run, end in zip(runs, ends, strict=True)
    ]


def _with_logits(traces: list[Trace], runs: Sequence[Run], logits: Sequence[Array]) -> list[Trace]:
    remaining = iter(logits)
    for run, trace in zip(runs, traces, strict=True):
        trace.logits = [next(remaining) for _ in run.calls]
    return traces


def exposing(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """``model`` with ``names`` among its outputs."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return exposed


def start_session(file: OnnxFile, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session of ``model``, whose constants lie in the data file beside ``file``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = min(THREADS, os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.path.parent))
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise CheckError(f"{file.path}: ONNX Runtime can't load it: {error}") from error


def run_decoder(
    file: OnnxFile,
    model: onnx.ModelProto,
    runs: Sequence[Run],
    facts: Model,
    outputs: Sequence[str],
    collect: Collect,
) -> list[Trace]:
    """Run ``model``, which is ``file``'s or made from it, a piece at a time, and give ``collect`` each call's index
    among those of all runs and its ``outputs``, which one piece makes. The traces have keys and values alone."""
    relay = Relay(file, runs, facts)
    for piece in cut_pieces(file, model):
        relay.run(piece, piece.model, [name for name in outputs if name in piece.made], collect)
    return relay.traces


class Relay:
    """Runs pieces one after another: what one makes for later ones, and the keys and values that were added."""

    def __init__(self, file: OnnxFile, runs: Sequence[Run], facts: Model) -> None:
        self._file, self._runs, self._facts = file, runs, facts
        self._carried: list[dict[str, Array]] = [{} for run in runs for _ in run.calls]
        self._added: list[dict[int, list[Array]]] = [{} for _ in runs]

    @property
    def traces(self) -> list[Trace]:
        """For each run the keys and values of its own tokens, for each layer float32
        ``[kv_heads, positions, head_dim]``."""
        sides = [[[added[layer][side] for layer in sorted(added)] for side in (0, 1)] for added in self._added]
        return [Trace(keys=keys, values=values) for keys, values in sides]

    def run(self, piece: Piece, model: onnx.ModelProto, outputs: Sequence[str], collect: Collect) -> None:
        """Every call of every run through ``model``, which is ``piece``'s, or that with more outputs."""
        session = start_session(self._file, model)
        first = 0
        for run, added in zip(self._runs, self._added, strict=True):
            binding = onnxruntime.IOBinding(session)
            caches = _bind_caches(binding, self._file, run, self._facts, piece.layers)
            position = run.start
            for index, call in enumerate(run.calls, first):
                position += len(call.tokens)
                given = {name: self._carried[index][name] for name in piece.reads}
                given["input_ids"] = np.array([call.tokens], np.int64)
                given["attention_mask"] = np.ones((1, position), np.int64)
                for value in session.get_inputs():
                    if value.name in given:
                        binding.bind_cpu_input(value.name, given[value.name])
                names = list(dict.fromkeys([*outputs, *piece.carries]))
                made = self._made(session, binding, run, names, len(caches))
                self._carried[index] |= {name: made[name] for name in piece.carries}
                if outputs:
                    collect(index, {name: made[name] for name in outputs})
            first += len(run.calls)
            added.update({layer: self._own_positions(caches, layer, run) for layer in piece.layers})

    def _made(
        self, session: onnxruntime.InferenceSession, binding: Any, run: Run, names: Sequence[str], caches: int
    ) -> dict[str, Array]:
        for name in names:
            binding.bind_output(name, "cpu")  # anew for each call, whose sizes differ
        try:
            session.run_with_iobinding(binding)
        except RUNTIME_ERRORS as error:
            raise CheckError(f"{self._file.path}: {run.name}: ONNX Runtime failed: {error}") from error
        made = binding.get_outputs()[caches:]  # in the order in which they were bound
        return {name: np.array(value.numpy()) for name, value in zip(names, made, strict=True)}

    def _own_positions(self, caches: Mapping[str, Array], layer: int, run: Run) -> list[Array]:
        names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        width = self._facts.head_dim
        return [own_positions(caches[name][0], run, width, f"{self._file.path}: {name}") for name in names]


def run_head(
    session: onnxruntime.InferenceSession, file: OnnxFile, states: Array, outputs: Sequence[str]
) -> list[Array]:
    """``outputs`` of head.onnx, or of what follows the decoder's hidden states, for ``[batch, rows, width]``."""
    try:
        results: list[Array] = session.run(list(outputs), {HIDDEN_STATES: np.ascontiguousarray(states)})
    except RUNTIME_ERRORS as error:
        raise CheckError(f"{file.path}: ONNX Runtime failed: {error}") from error
    return results


def _bind_caches(
    binding: onnxruntime.IOBinding, file: OnnxFile, run: Run, model: Model, layers: Sequence[int]
) -> dict[str, Array]:
    caches: dict[str, Array] = {}
    for layer in layers:
        past = None if run.past is None else run.past.layer(layer, model.kv_heads, model.head_dim)
        for index, part in enumerate(("key", "value")):
            name = f"past_key_values.{layer}.{part}"
            width = file.last_size(name)
            if width is None or width < model.head_dim:
                raise CheckError(f"{file.path}: has no cache {name}")
            # Zeros that were never touched take no memory.
            cache = np.zeros((1, model.kv_heads, model.context_length, width), np.float32)
            if past is not None:
                cache[0, :, : run.start, : model.head_dim] = past[index]
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), shared)
            caches[name] = cache
    return caches


def _cut(file: OnnxFile) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The decoder up to its hidden states and caches, and from the hidden states on, with activations in float32.

    Raises :class:`CheckError` if logits come from anything else.
    """
    behind: set[str] = set()
    wanted = ["logits"]
    while wanted:
        node = file.maker(value := wanted.pop())
        if node is None:
            raise CheckError(f"{file.path}: logits come from {value!r}, not from {HIDDEN_STATES} alone")
        behind.update(node.outputs)
        given = {"", HIDDEN_STATES, *file.constants, *behind}
        wanted += [name for name in node.inputs if name not in given]
    model = _with_float_activations(file.model)
    parts = []
    for is_tail in (False, True):
        nodes = [node for node in model.graph.node if (node.output[0] in behind) == is_tail]
        read = {name for node in nodes for name in node.input}
        outputs = [value for value in model.graph.output if (value.name == "logits") == is_tail]
        inputs = [value for value in model.graph.input if value.name in read]
        if is_tail:
            outputs = [onnx.ValueInfoProto(name="logits")]  # of a batch, which the file does not have
            float_type = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
            inputs = [onnx.ValueInfoProto(name=HIDDEN_STATES, type=float_type)]
        parts.append(submodel(model, nodes, inputs, outputs))
    body, tail = parts
    return body, tail


def _with_float_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = FLOAT_ACTIVATIONS
    return changed


def _release(version: str) -> tuple[int, ...]:
    """``1.23.2`` and ``1.23.2.dev1`` alike."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
