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
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]

from pocketlm.errors import CheckError
from pocketlm.manifest import Model
from pocketlm_export.backends.onnx.execute import own_positions
from pocketlm_export.backends.onnx.file import OnnxFile
from pocketlm_export.backends.reading import Run, Trace

__all__ = ["decode", "meaning", "run_head", "start_session", "unmet_floor"]

Array = npt.NDArray[Any]
THREADS = 2
FATAL_ONLY = 4  # ONNX Runtime's log severity: its errors are raised
RUNTIME_ERRORS = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
FLOAT_ACTIVATIONS = 0  # MatMulNBits' accuracy_level


def unmet_floor(floor: str) -> str | None:
    """Why the installed runtime can't run an artifact that needs ``floor`` (``>=1.2.3``); None if it can."""
    needed, installed = floor.removeprefix(">="), onnxruntime.__version__
    if _release(installed) < _release(needed):
        return f"needs onnxruntime {needed} or newer, but {installed} is installed"
    return None


def meaning(decoder: OnnxFile, head: OnnxFile, runs: Sequence[Run], model: Model) -> list[Trace]:
    """Logits, keys and values with activations in float32. Sessions follow one another: one model in memory."""
    session = start_session(decoder, _with_float_activations(decoder))
    traces: list[Trace] = []
    states: list[Array] = []
    for run in runs:
        trace = Trace()

        def collect(call: int, outputs: Mapping[str, Array], run: Run = run, trace: Trace = trace) -> None:
            rows = run.calls[call].rows
            trace.logits.append(outputs["logits"][0])
            if rows > 1:
                states.append(outputs["hidden_states"][:, -rows:])

        trace.keys, trace.values = decode(session, decoder, run, model, ("logits", "hidden_states"), collect)
        traces.append(trace)
    del session
    if states:
        session = start_session(head, _with_float_activations(head))
        remaining = iter(states)
        for run, trace in zip(runs, traces, strict=True):
            for index, call in enumerate(run.calls):
                if call.rows > 1:
                    (logits,) = run_head(session, head, next(remaining), ("logits",))
                    trace.logits[index] = logits[0]
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
    """``outputs`` of head.onnx for hidden states ``[1, rows, width]``."""
    try:
        results: list[Array] = session.run(list(outputs), {"hidden_states": np.ascontiguousarray(states)})
    except RUNTIME_ERRORS as error:
        raise CheckError(f"{file.path}: ONNX Runtime failed: {error}") from error
    return results


def _bind_caches(binding: onnxruntime.IOBinding, file: OnnxFile, run: Run, model: Model) -> dict[str, Array]:
    caches: dict[str, Array] = {}
    for layer in range(model.layers):
        past = None if run.past is None else run.past.layer(layer, model.kv_heads, model.head_dim)
        for index, part in enumerate(("key", "value")):
            name = f"past_key_values.{layer}.{part}"
            width = file.inputs.get(name, (None,))[-1]
            if not isinstance(width, int):
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


def _with_float_activations(file: OnnxFile) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = FLOAT_ACTIVATIONS
    return model


def _release(version: str) -> tuple[int, ...]:
    """``1.23.2`` and ``1.23.2.dev1`` alike."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
