"""What a person sees and does: bars on a terminal, a prompt to type at, Ctrl-C."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.cli.conftest import PROGRAM


def in_terminal(arguments: list, environment: dict, typed: bytes = b"") -> tuple[int, str]:
    """Exit code, and everything that the program wrote to its terminal."""
    main, worker = pty.openpty()
    command = [*PROGRAM, *map(str, arguments)]
    environment = {**environment, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdin=worker, stdout=worker, stderr=worker, env=environment) as process:
        os.close(worker)
        if typed:
            os.write(main, typed)
        shown = b""
        while True:
            try:
                block = os.read(main, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not block:
                break
            shown += block
    os.close(main)
    return process.returncode, shown.decode(errors="replace")


@pytest.mark.skipif(sys.platform == "win32", reason="not run: no pty")
def test_an_export_shows_what_it_does_and_how_far(checkpoint, environment, tmp_path):
    code, shown = in_terminal(["export", checkpoint, "-o", tmp_path / "b", "--targets", "onnx"], environment)
    assert code == 0, shown
    for stage in (
        "reading the checkpoint",
        "quantizing",
        "writing onnx",
        "golden vectors",
        "hashing",
    ):
        assert stage in shown
    assert "100%" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="not run: no pty")
def test_an_error_is_one_line_on_a_terminal_too(environment, tmp_path):
    code, shown = in_terminal(["export", tmp_path / "nowhere", "-o", tmp_path / "b"], environment)
    assert code == 2
    assert shown.count("error: ") == 1
    assert "no such folder" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="not run: no pty")
def test_a_conversation_in_a_terminal(bundle, environment):
    code, shown = in_terminal(["chat", bundle, "--runtime", "onnx", "--max-new-tokens", 2], environment, b"ab\n/exit\n")
    assert code == 0, shown
    assert "> " in shown
    assert "/exit or Ctrl-D ends" in shown


def test_an_interrupt_at_the_prompt_ends_a_conversation(bundle, environment):
    command = [*PROGRAM, "chat", str(bundle), "--runtime", "onnx"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        assert "runtime: onnx" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted\n"
