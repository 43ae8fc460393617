"""The public surface: what `pocketlm` exports, and what importing it costs."""

import subprocess
import sys

import pytest

import pocketlm

HEAVY = {
    "numpy",
    "pydantic",
    "tokenizers",
    "jinja2",
    "typer",
    "rich",
    "torch",
    "onnxruntime",
    "pocketlm_export",
    "executorch",
    "coremltools",
}

PUBLIC = {
    "open", "export", "verify", "generate", "chat", "replay", "Bundle", "Certificate", "Session", "Piece",
    "PocketLMError", "InputError", "CheckpointError", "BundleError", "UnsupportedError", "TemplateError",
    "ContextLengthError", "CheckError", "UnavailableError",
}  # fmt: skip


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_pocketlm_imports_nothing_heavy():
    assert not modules_after("import pocketlm") & HEAVY


def test_importing_the_exporter_does_not_import_torch():
    assert "torch" not in modules_after("import pocketlm_export, pocketlm_export.pipeline, pocketlm_export.inspection")


def test_the_command_line_starts_without_the_heavy_parts():
    assert not modules_after("import pocketlm.cli.main") & (HEAVY - {"typer", "rich"})


def test_opening_a_bundle_imports_no_runtime_and_no_exporter():
    assert not modules_after("import pocketlm; pocketlm.open, pocketlm.Bundle, pocketlm.Session") & {
        "torch", "transformers", "onnxruntime", "executorch", "coremltools", "pocketlm_export"
    }  # fmt: skip


def test_every_public_name_resolves():
    assert set(pocketlm.__all__) == PUBLIC
    assert pocketlm.__version__.count(".") == 2
    for name in pocketlm.__all__:
        assert getattr(pocketlm, name).__doc__


@pytest.mark.parametrize(
    "first", ["import pocketlm.generate", "import pocketlm.chat", "import pocketlm; pocketlm.Piece"]
)
def test_the_functions_are_not_hidden_by_their_modules(first):
    modules_after(
        f"{first}\nimport pocketlm\nassert all(map(callable, (pocketlm.generate, pocketlm.chat, pocketlm.open)))"
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'quantise'"):
        _ = pocketlm.quantise


def test_errors_descend_from_one_and_carry_the_exit_code():
    codes = {"InputError": 2, "CheckError": 1, "UnavailableError": 3}
    for name in PUBLIC:
        value = getattr(pocketlm, name)
        if name.endswith("Error"):
            assert issubclass(value, pocketlm.PocketLMError)
    assert {name: getattr(pocketlm, name).exit_code for name in codes} == codes


def test_onnx_runtime_keeps_no_telemetry():
    program = "import os, pocketlm; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
