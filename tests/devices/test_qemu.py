"""The emulated CPUs: both artifacts replay on them, and instructions are counted, the same in every run."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import pocketlm
from pocketlm.agent import DECODE_WINDOW, PREFILL_WINDOW
from pocketlm.devices import find_devices, open_device
from pocketlm.devices.arm64_system.emulation import emulated_python, environment
from pocketlm.devices.arm64_system.profiles import PROFILES
from pocketlm.devices.base import Device, Outcome
from pocketlm.errors import BundleError, InputError, UnavailableError
from pocketlm.job import ForcedTokens, Job, Measure, Replay
from pocketlm.measuring.measurement import read_measurement
from pocketlm.replaying.replay import replay as replay_session

PROMPT, NEW = 32, 9
COUNTED = Measure(PROMPT, NEW, windows=True)
RUNTIMES = ("onnx", "executorch")

pytestmark = pytest.mark.usefixtures("arm64_system")

# What the kernel tells a process of its CPU, in the order of the bits: arch/arm64/include/uapi/asm/hwcap.h.
AUXILIARY_VECTOR = """
import ctypes
getauxval = ctypes.CDLL(None).getauxval
getauxval.restype, getauxval.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
first = '''fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3
sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg'''.split()
second = '''dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm
bf16 dgh rng bti mte ecv afp rpres mte3 sme'''.split()
vectors = ((getauxval(16), first), (getauxval(26), second))
print(" ".join(name for bits, names in vectors for bit, name in enumerate(names) if bits >> bit & 1))
(told,) = (line for line in open("/proc/cpuinfo") if line.startswith("Features"))
print(told.partition(":")[2].strip())
"""


@pytest.fixture(scope="module")
def bundle(demo_bundle: Callable) -> pocketlm.Bundle:
    return demo_bundle("int4")


@pytest.fixture
def device() -> Iterator[Device]:
    with open_device("qemu:arm64@cortex-a76") as device:
        yield device


def run(device: Device, bundle: pocketlm.Bundle, runtime: str, work: Measure | Replay, folder: Path) -> Outcome:
    folder.mkdir()
    job = Job(runtime, device.place(bundle.artifact(runtime)), work, threads=1)
    return device.run(job, folder, limit=300)


@pytest.mark.parametrize("profile", ["cortex-a53", "max"])
def test_both_artifacts_replay_on_a_cpu_without_and_with_matrix_products(profile, bundle):
    result = replay_session(bundle, devices=(f"qemu:arm64@{profile}",))
    assert not result.unavailable
    assert sorted(run.runtime.name for run in result.runs) == sorted(RUNTIMES)
    for found in result.runs:
        assert found.device.emulated
        assert not found.failures


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_counts_repeat_to_the_instruction_whatever_runs_beside(runtime, bundle, device, tmp_path):
    first = run(device, bundle, runtime, COUNTED, tmp_path / "first")
    others: list[Outcome] = []
    with open_device("qemu:arm64@cortex-a53") as older:
        beside = threading.Thread(
            target=lambda: others.append(run(older, bundle, runtime, COUNTED, tmp_path / "on another CPU"))
        )
        beside.start()
        second = run(device, bundle, runtime, COUNTED, tmp_path / "a longer folder, with 'quotes', and commas")
        beside.join()
    assert first.instructions == second.instructions
    tokens = read_measurement("qemu", first, NEW).tokens
    assert read_measurement("qemu", second, NEW).tokens == tokens

    # A dot product is one instruction where the older CPU needs several; a token alone costs more than one of many.
    (other,) = others
    assert set(first.instructions) == set(other.instructions) == {PREFILL_WINDOW, DECODE_WINDOW}
    for window in (PREFILL_WINDOW, DECODE_WINDOW):
        assert other.instructions[window] > 1.5 * first.instructions[window]
    assert first.instructions[DECODE_WINDOW] / (NEW - 1) > first.instructions[PREFILL_WINDOW] / PROMPT


def test_more_work_is_more_instructions(bundle, device, tmp_path):
    counts = [
        run(device, bundle, "executorch", Measure(prompt, new, windows=True), tmp_path / f"{prompt} {new}").instructions
        for prompt, new in ((16, 5), (32, 9))
    ]
    assert 1.8 < counts[1][DECODE_WINDOW] / counts[0][DECODE_WINDOW] < 2.2
    assert counts[1][PREFILL_WINDOW] > 1.5 * counts[0][PREFILL_WINDOW]


@pytest.mark.parametrize("profile", PROFILES)
def test_cpuinfo_tells_the_features_that_the_cpu_has(profile, arm64_system):
    parts = arm64_system.folder
    process = subprocess.run(
        [*emulated_python(parts, profile), "-c", AUXILIARY_VECTOR],
        capture_output=True, text=True, env=environment(parts), check=True,
    )  # fmt: skip
    of_the_cpu, of_the_text = process.stdout.splitlines()
    assert of_the_cpu == of_the_text == PROFILES[profile].features


def test_it_tells_neither_memory_nor_the_host(bundle, device, tmp_path):
    outcome = run(device, bundle, "onnx", Replay((ForcedTokens((1, 2), (3,)),)), tmp_path / "replay")
    assert outcome.instructions is None
    (begin,) = outcome.of_kind("begin")
    assert begin["machine"]["cpu"] == "aarch64"
    assert begin["machine"]["features"] == "asimddp"
    (measured,) = run(device, bundle, "onnx", COUNTED, tmp_path / "measure").of_kind("measurement")
    assert set(measured["memory"].values()) == {None}
    assert device.facts()["cpu"].startswith("cortex-a76, emulated by QEMU")


def test_instructions_are_counted_of_one_thread_alone(bundle, device, tmp_path):
    for threads in (None, 2):
        job = Job("onnx", device.place(bundle.artifact("onnx")), COUNTED, threads=threads)
        with pytest.raises(InputError, match="one thread: --threads 1"):
            device.run(job, tmp_path, limit=60)


def test_a_job_ends_at_its_limit(bundle, device, tmp_path):
    job = Job("onnx", device.place(bundle.artifact("onnx")), COUNTED, threads=1)
    with pytest.raises(UnavailableError, match=r"qemu:arm64@cortex-a76: the agent did not end within 0\.5 s"):
        device.run(job, tmp_path, limit=0.5)
    assert not [process for process in Path("/proc").glob("[0-9]*") if _folder(process) == tmp_path]


def test_the_agents_own_errors_come_through(bundle, device, tmp_path):
    artifact = device.place(bundle.artifact("onnx"))
    work = Replay((ForcedTokens((1, 2), (3,)),))
    changed = {name: type(file)("0" * 64, file.size) for name, file in artifact.files.items()}
    job = Job("onnx", replace(artifact, files=changed), work, threads=1)
    with pytest.raises(BundleError, match="its content is not what the job says"):
        device.run(job, tmp_path, limit=120)


@pytest.mark.parametrize("place", ["", "arm64@", "arm64@cortex-a72", "arm64@a53@max", "x86_64", "arm64 ", "arm64;ls"])
def test_other_addresses_are_refused_with_those_that_are_valid(place):
    with pytest.raises(InputError, match="valid: qemu:arm64@cortex-a53, qemu:arm64@cortex-a76, qemu:arm64@max"):
        open_device(f"qemu:{place}")


def test_the_list_of_devices_has_each_cpu():
    found = {device.address: device for device in find_devices() if device.address.startswith("qemu:")}
    assert list(found) == [f"qemu:arm64@{profile}" for profile in PROFILES]
    assert all(device.state == "ready" and "instructions" in device.description for device in found.values())


def _folder(process: Path) -> Path | None:
    """The one that it runs in."""
    try:
        return (process / "cwd").readlink()
    except OSError:  # it ended meanwhile, or isn't ours
        return None
