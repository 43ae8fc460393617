"""What is said of a checkpoint before any work, from headers alone."""

import json
import subprocess
import sys

import pytest

from pocketlm.errors import CheckpointError, ContextLengthError, UnsupportedError
from pocketlm_export.inspection import inspect_checkpoint
from tests.small_checkpoint import write_header_only, write_small_checkpoint


def test_sizes_of_a_small_checkpoint(tmp_path):
    report = inspect_checkpoint(str(write_small_checkpoint(tmp_path / "c")), context_length=10)
    matrices = 300 * 32 + 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 64 * 32)
    vectors = 5 * 32
    assert report.parameters == matrices + vectors
    assert report.dtypes == {"F32": matrices + vectors}
    assert report.weight_bytes["fp32"] == 4 * report.parameters
    linears = matrices - 300 * 32
    assert report.weight_bytes["int4"] == linears // 2 + linears // 32 * 2 + 300 * 32 + 300 * 2 + vectors * 4
    assert report.kv_values == 2 * 2 * 2 * 8 * 10
    assert report.has_chat_template


def test_a_saved_copy_of_a_tied_head_is_not_counted(tmp_path):
    folder = write_small_checkpoint(tmp_path / "c")
    before = inspect_checkpoint(str(folder)).parameters
    untied = write_small_checkpoint(tmp_path / "d", tie_word_embeddings=False)
    assert inspect_checkpoint(str(untied)).parameters == before + 300 * 32
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert inspect_checkpoint(str(untied)).parameters == before


@pytest.mark.parametrize(
    ("name", "parameters"), (("Qwen2.5-0.5B-Instruct", 494_032_768), ("SmolLM2-135M-Instruct", 134_515_008))
)
def test_released_models_have_their_size(name, parameters, data, tmp_path):
    from tests.unit.test_checkpoint import as_checkpoint

    source = data / "reference" / "released" / name
    if not source.is_dir():
        pytest.skip("not run: no released configurations")
    report = inspect_checkpoint(str(as_checkpoint(source, tmp_path / name)))
    assert report.parameters == parameters
    assert report.context_length == 4096
    assert report.dtypes == {"BF16": parameters}


def test_it_needs_no_torch(tmp_path):
    folder = write_small_checkpoint(tmp_path / "c")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pocketlm_export.inspection import inspect_checkpoint\n"
        f"print(inspect_checkpoint({str(folder)!r}).parameters)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0


def test_each_target_is_asked(tmp_path):
    folder = write_small_checkpoint(tmp_path / "c")
    assert inspect_checkpoint(str(folder)).targets == {"onnx": None, "executorch": None, "coreml": None}
    small = write_small_checkpoint(tmp_path / "d", rms_norm_eps=1e5)
    reasons = inspect_checkpoint(str(small)).targets
    assert reasons["onnx"] is None
    assert "epsilon" in reasons["coreml"]


def test_what_can_not_be_exported_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="'gemma9' is not supported"):
        inspect_checkpoint(str(write_small_checkpoint(tmp_path / "a", model_type="gemma9")))
    folder = write_small_checkpoint(tmp_path / "b")
    with pytest.raises(ContextLengthError, match="65 is longer than the model's 64"):
        inspect_checkpoint(str(folder), context_length=65)
    write_header_only(folder / "model.safetensors", {"model.embed_tokens.weight": (300, 32)})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        inspect_checkpoint(str(folder))
