"""The committed demo model in one bundle: one set of integers, three artifacts, and the vendors' own runners."""

import numpy as np
import pytest

from pocketlm_export.backends.coreml.importing import coremltools
from pocketlm_export.backends.reading import open_reader
from tests.bundle.vendors import genai_greedy, greedy, session_of_text_runner, text_runner, text_runner_greedy

PROMPTS = ("def read_json(path):\n", "import os\n\nclass Stack:\n    def push(self", "# Returns the largest ")
STEPS = 40


def written(target):
    """Through our reader of it, which knows the vendor's schema alone."""

    def open_artifact(bundle):
        reader = open_reader(target, bundle.folder / bundle.manifest.targets[target].path, bundle.manifest)

        def read(entry, rows):
            matrix = reader.rows(entry, rows.start, rows.stop)
            return matrix.codes, matrix.scales

        return read

    return open_artifact


def written_coreml(bundle):
    """Through coremltools' own loader."""
    from coremltools.converters.mil.frontend.milproto import load

    model = coremltools.models.MLModel(str(bundle.folder / "coreml/model.mlpackage"), skip_model_load=True)
    specification = model.get_spec()
    program = load.load(specification, specification.specificationVersion, model.weights_dir)
    expressions = {
        operation.name: operation
        for operation in program.functions["decode"].operations
        if operation.op_type == "constexpr_blockwise_shift_scale"
    }

    def read(entry, rows):
        expression = expressions[entry]
        return expression.data.val[rows].astype(np.int8), expression.scale.val[rows].astype(np.float32)

    return read


READERS = {"onnx": written("onnx"), "executorch": written("executorch"), "coreml": written_coreml}


@pytest.mark.parametrize(("scheme", "head"), [("int4", "int8"), ("int4", "int4"), ("int8", "int8")])
def test_the_three_artifacts_hold_the_same_integers_and_scales(scheme, head, demo_bundle):
    bundle = demo_bundle(scheme, head)
    readers = {target: open_artifact(bundle) for target, open_artifact in READERS.items()}
    quantized = {name: weight for name, weight in bundle.manifest.weights.items() if weight.scheme != "fp32"}
    assert len(quantized) == 7 * bundle.manifest.model.layers + (1 if bundle.manifest.model.tied else 2)
    for name, weight in quantized.items():
        found = {}
        for target, read in readers.items():
            place = weight.places[target]
            found[target] = read(place.entry, slice(place.first_row, place.first_row + weight.shape[0]))
        codes, scales = found["onnx"]
        assert codes.any()
        for target in ("executorch", "coreml"):
            np.testing.assert_array_equal(found[target][0], codes, err_msg=f"{target}: {name}")
            np.testing.assert_array_equal(found[target][1], scales, err_msg=f"{target}: {name}")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_onnxruntime_genai_generates_our_greedy_tokens(prompt, demo_bundle):
    bundle = demo_bundle("int4", "int8")
    ids = bundle.tokenizer.encode(prompt, add_special_tokens=False)
    with bundle.session("onnx", threads=1) as session:
        expected = greedy(session, ids, STEPS, bundle.stop_ids)
    assert genai_greedy(bundle, ids, STEPS) == expected


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_official_text_runner_generates_our_greedy_tokens(prompt, demo_bundle):
    bundle = demo_bundle("int4", "int8")
    ids = bundle.tokenizer.encode(prompt, add_special_tokens=False)
    with session_of_text_runner(bundle) as session:
        expected = greedy(session, ids, STEPS, bundle.stop_ids)
    written = text_runner_greedy(text_runner(bundle), prompt, STEPS)
    # The runner also hands over the text of the stop token.
    assert written.startswith(bundle.tokenizer.decode(expected, skip_special_tokens=False))
    assert len(expected) > STEPS // 2


def test_the_three_runtimes_agree_on_most_greedy_tokens(demo_bundle):
    bundle = demo_bundle("int8", "int8")
    ids = bundle.tokenizer.encode(PROMPTS[0], add_special_tokens=False)
    texts = {}
    for runtime in READERS:
        with bundle.session(runtime, threads=1) as session:
            texts[runtime] = greedy(session, ids, 8, bundle.stop_ids)
    assert texts["onnx"] == texts["coreml"] == texts["executorch"]
