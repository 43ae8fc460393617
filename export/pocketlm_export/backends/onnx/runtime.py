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
from pocketlm_export.backends.reading import Run, Trace

__all__ = ["decode", "meaning", "run_head", "start_session", "unmet_floor"]

Array = npt.NDArray[Any]
THREADS = 2
FATAL_ONLY = 4  # ONNX Runtime's log severity: its errors are raised
HIDDEN_STATES = "hidden_states"
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
    session = start_session(decoder, body)
    traces: list[Trace] = []
    states: list[Array] = []
    for run in runs:
        keys, values = decode(
            session, decoder, run, model, (HIDDEN_STATES,), lambda _, made: states.extend(made.values())
        )
        traces.append(Trace(keys=keys, values=values))
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
    remaining = iter(sorted(logits))
    for run, trace in zip(runs, traces, strict=True):
        trace.logits = [logits[next(remaining)] for _ in run.calls]
    return traces


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


def decode(
    session: onnxruntime.InferenceSession,
    file: OnnxFile,
    run: Run,
    model: Model,
    outputs: Sequence[str],
    collect: Callable[[int, Mapping[str, Array]], None],
) -> tuple[list[Array], list[Array]]:
    """Run every call of ``run``, and give ``collect`` its index and ``outputs``; returns the keys and values that the
    run's own tokens added, for each layer float32 ``[kv_heads, positions, head_dim]``."""
    binding = onnxruntime.IOBinding(session)
    caches = _bind_caches(binding, file, run, model)
    position = run.start
    for index, call in enumerate(run.calls):
        position += len(call.tokens)
        binding.bind_cpu_input("input_ids", np.array([call.tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, position), np.int64))
        for name in outputs:
            binding.bind_output(name, "cpu")  # anew for each call, whose sizes differ
        try:
            session.run_with_iobinding(binding)
        except RUNTIME_ERRORS as error:
            raise CheckError(f"{file.path}: {run.name}: ONNX Runtime failed: {error}") from error
        made = binding.get_outputs()[len(caches) :]  # in the order in which they were bound
        collect(index, {name: np.array(value.numpy()) for name, value in zip(outputs, made, strict=True)})
    keys, values = (
        [
            own_positions(caches[name][0], run, model.head_dim, f"{file.path}: {name}")
            for name in (f"past_key_values.{layer}.{part}" for layer in range(model.layers))
        ]
        for part in ("key", "value")
    )
    return keys, values


def run_head(
    session: onnxruntime.InferenceSession, file: OnnxFile, states: Array, outputs: Sequence[str]
) -> list[Array]:
    """``outputs`` of head.onnx, or of what follows the decoder's hidden states, for ``[batch, rows, width]``."""
    try:
        results: list[Array] = session.run(list(outputs), {HIDDEN_STATES: np.ascontiguousarray(states)})
    except RUNTIME_ERRORS as error:
        raise CheckError(f"{file.path}: ONNX Runtime failed: {error}") from error
    return results


def _bind_caches(binding: onnxruntime.IOBinding, file: OnnxFile, run: Run, model: Model) -> dict[str, Array]:
    caches: dict[str, Array] = {}
    for layer in range(model.layers):
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
    body, tail = _with_float_activations(file.model), _with_float_activations(file.model)
    for model, is_tail in ((body, False), (tail, True)):
        graph = model.graph
        nodes = [node for node in graph.node if (node.output[0] in behind) == is_tail]
        read = {name for node in nodes for name in node.input}
        outputs = [value for value in graph.output if (value.name == "logits") == is_tail]
        inputs = [value for value in graph.input if value.name in read]
        constants = [constant for constant in graph.initializer if constant.name in read]
        if is_tail:
            outputs = [onnx.ValueInfoProto(name="logits")]  # of a batch, which the file does not have
            float_type = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
            inputs = [onnx.ValueInfoProto(name=HIDDEN_STATES, type=float_type)]
        for field, kept in (("node", nodes), ("output", outputs), ("input", inputs), ("initializer", constants)):
            copies = [type(item).FromString(item.SerializeToString()) for item in kept]
            graph.ClearField(field)
            getattr(graph, field).extend(copies)
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
