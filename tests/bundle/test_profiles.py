"""What really ran, by each runtime's own profile: operators, what is delegated, and what fell back."""

from pathlib import Path

import numpy as np
import pytest

from pocketlm.errors import UnavailableError, UnsupportedError
from pocketlm.measuring.profiles import read_profile
from pocketlm.results import Profile
from pocketlm.runtimes import executorch, onnx
from pocketlm.runtimes.executorch_library import Program
from tests.bundle.small_programs import product_program
from tests.worse_bundle import with_float_products

OPEN = {"onnx": onnx.open_session, "executorch": executorch.open_session}


def profile_of(bundle, runtime: str, path: Path, features: str = "avx2") -> Profile:
    """Of two calls."""
    artifact = bundle.artifact(runtime)
    with OPEN[runtime](artifact, 1, profile=path) as session:
        session.extend(list(range(5, 15)))
        session.extend([3])
    return read_profile(runtime, path, artifact, features)


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp32"])
@pytest.mark.parametrize(("runtime", "product"), [("onnx", "MatMul"), ("executorch", "XNNPACK Fully Connected (NC, ")])
def test_products_are_delegated_and_nothing_fell_back(runtime, product, scheme, tiny_bundle, tmp_path):
    bundle = tiny_bundle("llama", scheme, runtime)
    profile = profile_of(bundle, runtime, tmp_path / "profile of two calls")
    products = [operator for operator in profile.operators if product in operator.name]
    assert sum(operator.calls for operator in products) >= 2 * bundle.manifest.model.layers
    assert all(operator.delegated for operator in products)
    assert profile.fallbacks == []
    assert 0 < profile.delegated_share <= 1
    beside = [operator for operator in profile.operators if not operator.delegated]
    assert beside, "shapes and splits are nobody's product"


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "phi3small"])
@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_experts_soft_caps_and_block_masks_are_no_fallback(runtime, name, tiny_bundle, tmp_path):
    assert profile_of(tiny_bundle(name, "int4", runtime), runtime, tmp_path / "profile").fallbacks == []


def test_products_in_floats_are_a_fallback_of_onnx_runtime(tiny_bundle, tmp_path):
    worse = with_float_products(tiny_bundle("llama", "int4", "onnx"), tmp_path / "worse")
    profile = profile_of(worse, "onnx", tmp_path / "profile")
    (fallback,) = profile.fallbacks
    assert fallback.startswith("MatMulNBits: accuracy_level 0: its products are of floats")
    assert not next(operator for operator in profile.operators if operator.fallback).delegated


def test_a_cpu_without_the_kernels_is_a_fallback(tiny_bundle, tmp_path):
    profile = profile_of(tiny_bundle("llama", "int4", "onnx"), "onnx", tmp_path / "profile", features="sve")
    (fallback,) = profile.fallbacks
    assert fallback == "MatMulNBits: no kernel for accuracy_level 4 without one of asimddp, avx2, avx512f"


def test_a_product_outside_the_delegate_is_a_fallback_of_executorch(tiny_bundle, tmp_path):
    left, right = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    program = Program(product_program(tmp_path / "product.pte", left, right), profile=True)
    program.load("forward")
    assert program.run("forward", left, right)[0].tolist() == [[3.0] * 4] * 2
    program.write_trace(tmp_path / "profile")
    program.close()
    artifact = tiny_bundle("llama", "int4", "executorch").artifact("executorch")
    profile = read_profile("executorch", tmp_path / "profile", artifact, "avx2")
    assert profile.fallbacks == ["mm.out: in a portable kernel, outside the delegate"]
    assert profile.delegated_share == 0


@pytest.mark.parametrize("content", [b"", b"[]x", b"{}", b'[{"cat": "Node"}]', b'[{"cat": "Node", "name": 1}]', b"[1]"])
@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_what_is_no_profile_is_the_devices_fault(runtime, content, tiny_bundle, tmp_path):
    (tmp_path / "profile").write_bytes(content)
    with pytest.raises(UnavailableError, match=f"{runtime} wrote no profile that can be read"):
        read_profile(runtime, tmp_path / "profile", tiny_bundle("llama", "int4", runtime).artifact(runtime), "avx2")


def test_the_interpreter_has_none(tiny_bundle, tmp_path):
    with pytest.raises(UnsupportedError, match="a profile: not supported by coreml"):
        read_profile("coreml", tmp_path / "profile", tiny_bundle("llama", "int4", "coreml").artifact("coreml"), "")
