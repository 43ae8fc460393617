"""Measuring on a device that pretends to be a phone: the same samples as anywhere, and what heat does to them."""

import pytest

from pocketlm.errors import UnavailableError
from pocketlm.measuring.measured_runtime import Conditions, MeasuredRuntime
from pocketlm.results import BenchSettings

SETTINGS = BenchSettings(prompt_tokens=6, new_tokens=5, depth=4)
CONDITIONS = Conditions(threads=1, cores=(0,), packed=False, limit=120.0, cool_down=0.0)
HOT = 'test "$1" = thermalservice && echo "Thermal Status: $(cat {folder}/status 2>/dev/null || echo 0)"'


@pytest.fixture(scope="module")
def artifact(tiny_bundle):
    return tiny_bundle("llama", "int4", "onnx").artifact("onnx")


def test_a_phone_that_heats_up_makes_a_run_noisy_and_is_not_measured_hot(phone, artifact):
    attached = phone()
    attached.answers("dumpsys", HOT.format(folder=attached.root))
    with attached.open(before=f"echo 2 >{attached.root}/status") as device:
        measured = MeasuredRuntime(device, "onnx", artifact, CONDITIONS)
        sample = measured.measure(SETTINGS)
        assert len(sample.decode_seconds) == 4
        run = measured.as_run(SETTINGS)
        assert run.device.address == f"adb:{attached.serial}"
        assert run.device.facts["thermal_status"] == 0, "as it was before"
        assert "the device became hot: thermal status up to 2" in run.noisy
        assert (run.cores, run.threads) == ([0], 1)
        assert run.figures.decode_tokens_per_second is not None
        with pytest.raises(UnavailableError, match="throttled"):
            measured.measure(SETTINGS)
        (attached.root / "status").write_text("0")
        assert measured.measure(SETTINGS).tokens_sha256 == sample.tokens_sha256
