"""Processes watched from outside: what they hold is told apart, what they spend is counted, none is left behind."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pocketlm.memory import resident_memory
from pocketlm_bench.watched_process import run_watched

MEGABYTE = 1 << 20


def program(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_anonymous_and_file_backed_memory_are_told_apart(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(bytes(64 * MEGABYTE))
    code = """
import mmap, sys, time
start = time.monotonic()
time.sleep(0.1)
held = bytearray(b"1") * (96 << 20)
allocated = time.monotonic()
time.sleep(0.1)
file = open(sys.argv[1], "rb")
pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(pages[::4096])
mapped = time.monotonic()
time.sleep(0.1)
print(start, allocated, mapped)
"""
    run = run_watched(program(code, path))
    assert run.exit_code == 0, run.errors
    start, allocated, mapped = map(float, run.output.split())
    assert run.started < start < mapped < run.ended
    # Libraries that were being mapped and pages of the interpreter are within 30 MB.
    before, between, after = (
        run.peak(start, start + 0.09), run.peak(allocated, allocated + 0.09), run.peak(mapped, run.ended)
    )  # fmt: skip
    assert before is not None
    assert between is not None
    assert after is not None
    assert between.anonymous - before.anonymous == pytest.approx(96 * MEGABYTE, abs=5 * MEGABYTE)
    assert between.file_backed - before.file_backed < 5 * MEGABYTE
    assert after.file_backed - between.file_backed == pytest.approx(64 * MEGABYTE, abs=5 * MEGABYTE)
    assert after.anonymous - between.anonymous < 5 * MEGABYTE
    whole = run.peak()
    assert whole is not None
    assert whole.resident >= after.resident >= 160 * MEGABYTE
    assert run.peak(run.ended + 1, run.ended + 2) is None


def test_time_output_and_the_exit_code():
    code = """
import os, sys, time
begin = time.process_time()
while time.process_time() - begin < 0.3: pass
if os.fork() == 0:
    begin = time.process_time()
    while time.process_time() - begin < 0.2: pass
    os._exit(0)
os.wait()
print("out" * 100_000)
print("last", file=sys.stderr)
sys.exit(3)
"""
    run = run_watched(program(code))
    assert run.exit_code == 3
    assert len(run.output) == 300_001
    assert run.errors == "last\n"
    assert run.user_seconds + run.system_seconds >= 0.5, "a child's time counts"
    assert run.wall_seconds >= 0.3


def test_a_signal_is_a_negative_exit_code_and_the_environment_is_the_given_one():
    code = "import os, signal; print(os.environ['MARK']); os.kill(os.getpid(), signal.SIGTERM)"
    run = run_watched(program(code), {"MARK": "here", "PYTHONUNBUFFERED": "1"})
    assert (run.exit_code, run.output) == (-15, "here\n")


def test_an_exception_while_waiting_ends_the_process(tmp_path):
    path = tmp_path / "process"

    def interrupt() -> None:
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), 2)

    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    interrupter = threading.Thread(target=interrupt)
    # A shell that started us in the background has left the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            run_watched(program(code, path))
        interrupter.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Path(f"/proc/{path.read_text()}").exists()


def test_memory_of_a_process_that_is_gone_is_none():
    own = resident_memory()
    assert own is not None
    assert own.highest >= own.resident > 10 * MEGABYTE
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(process, 0)
    assert resident_memory(process) is None
