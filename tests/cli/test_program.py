"""The program as a whole: help, versions, and the commands on a bundle."""

import json
import subprocess
import time

import pytest

import pocketlm as package
from tests.cli.test_export import refused
from tests.small_checkpoint import write_small_checkpoint

COMMANDS = ("export", "verify", "inspect", "run", "chat", "bench", "store", "devices")


def test_help_lists_the_commands_that_work_and_no_others(pocketlm):
    process = pocketlm("--help")
    assert process.returncode == 0
    listed = [line.split()[1] for line in process.stdout.splitlines() if line.startswith("│ ") and line[2] != "-"]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)
    for later in ("serve", "sdk"):
        assert later not in process.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, pocketlm):
    process = pocketlm(command, "--help")
    assert process.returncode == 0
    assert f"Example: pocketlm {command} " in process.stdout


def test_version(pocketlm):
    assert pocketlm("--version").stdout == f"pocketlm {package.__version__}\n"


def test_inspect_of_a_bundle(pocketlm, bundle):
    document = json.loads(pocketlm("inspect", bundle, "--json", "--context", 10).stdout)
    assert document["kind"] == "bundle"
    assert document["model"]["model_type"] == "llama"
    # 2 x 2 layers x 2 key/value heads x 8 x 10 positions
    assert document["targets"]["onnx"]["kv_cache_bytes"] == 2 * 2 * 2 * 8 * 10 * 4
    assert document["targets"]["coreml"]["kv_cache_bytes"] == 2 * 2 * 2 * 8 * 10 * 2
    assert document["bytes"] == sum(
        p.stat().st_size
        for p in bundle.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", "certificate.json")
    )
    text = pocketlm("inspect", bundle).stdout
    assert "certificate    verified: 13 passed, 0 failed, 2 not run of 15 levels" in text
    assert "executorch/model.pte" in text
    refused(pocketlm("inspect", bundle, "--context", 65), "--context", "64")


def test_inspect_of_a_checkpoint_agrees_with_its_export(pocketlm, checkpoint, bundle):
    started = time.perf_counter()
    before = json.loads(pocketlm("inspect", checkpoint, "--json").stdout)
    assert time.perf_counter() - started < 20
    after = json.loads(pocketlm("inspect", bundle, "--json").stdout)
    assert before["supported"] is True
    assert before["parameters"] == after["parameters"]
    assert before["weight_bytes"]["int4"] * 8 / before["parameters"] == pytest.approx(
        after["scheme"]["bits_per_weight"], abs=1e-3
    )
    assert before["targets"]["onnx"] == {"supported": True, "reason": None, "kv_cache_bytes": 2 * 2 * 2 * 8 * 64 * 4}


def test_inspect_of_an_unsupported_checkpoint_says_why_and_exits_with_1(pocketlm, tmp_path):
    folder = write_small_checkpoint(tmp_path / "checkpoint", model_type="gemma9")
    process = pocketlm("inspect", folder, "--json")
    assert process.returncode == 1
    document = json.loads(process.stdout)
    assert document["supported"] is False
    assert "'gemma9' is not supported" in document["reason"]
    refused(pocketlm("inspect", tmp_path / "nowhere"), "no such folder")


def test_run_streams_the_answer_and_names_the_runtime(pocketlm, bundle):
    process = pocketlm(
        "run", bundle, "--runtime", "onnx", "--prompt", "abc", "--raw", "--max-new-tokens", 5, "--temperature", 0
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[0] == "runtime: onnx"
    assert process.stdout.endswith("\n")


def test_run_says_that_core_ml_is_the_reference_interpreter(pocketlm, bundle):
    process = pocketlm(
        "run", bundle, "--runtime", "coreml", "--prompt", "a", "--raw", "--max-new-tokens", 2, "--temperature", 0
    )
    assert process.returncode == 0, process.stderr
    assert "reference interpreter" in process.stderr
    assert "float16" in process.stderr


def test_run_as_json_counts_tokens(pocketlm, bundle):
    arguments = ("run", bundle, "--runtime", "onnx", "--max-new-tokens", 4, "--temperature", 0, "--json")
    raw = json.loads(pocketlm(*arguments, "--prompt", "abc", "--raw").stdout)
    assert raw["prompt_tokens"] == 3  # a letter each, the tokenizer adds nothing
    assert len(raw["tokens"]) == 4 or raw["finish_reason"] == "stop"
    templated = json.loads(pocketlm(*arguments, "--prompt", "abc", "--system", "d").stdout)
    assert templated["prompt_tokens"] == len(
        ["<|system|>", "d", "<|end|>", "<|user|>", *"abc", "<|end|>", "<|assistant|>"]
    )
    assert pocketlm(*arguments, "--prompt", "abc", "--raw").returncode == 0


def test_greedy_is_the_same_twice_and_a_seed_repeats(pocketlm, bundle):
    arguments = ("run", bundle, "--runtime", "onnx", "--prompt", "x", "--raw", "--max-new-tokens", 8, "--json")
    answers = [
        json.loads(pocketlm(*arguments, *more).stdout)["tokens"]
        for more in (
            ["--temperature", 0],
            ["--temperature", 0],
            ["--temperature", 1, "--seed", 3],
            ["--temperature", 1, "--seed", 3],
        )
    ]
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]


def test_run_reads_the_prompt_from_a_file(pocketlm, bundle, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("abcd", encoding="utf-8")
    arguments = ("run", bundle, "--runtime", "onnx", "--raw", "--max-new-tokens", 2, "--temperature", 0, "--json")
    assert json.loads(pocketlm(*arguments, "--prompt", f"@{path}").stdout)["prompt_tokens"] == 4
    path.write_bytes(b"ab\xff")
    refused(pocketlm(*arguments, "--prompt", f"@{path}"), "prompt.txt", "not UTF-8 at byte 2")
    refused(pocketlm(*arguments, "--prompt", f"@{tmp_path / 'missing'}"), "missing")


@pytest.mark.parametrize(
    ("arguments", "needles", "code"),
    (
        (["--runtime", "tflite"], ["'tflite'", "executorch, onnx, coreml"], 2),
        (["--temperature", "-1"], ["temperature"], 2),
        (["--top-p", "1.5"], ["top_p"], 2),
        (["--max-new-tokens", "0"], ["max_new_tokens"], 2),
        (["--threads", "0"], ["threads"], 2),
        (["--stop", ""], ["stop"], 2),
        (["--raw", "--system", "s"], ["--system", "--raw"], 2),
    ),
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else None,
)
def test_run_refuses_bad_options(arguments, needles, code, pocketlm, bundle):
    base = (
        ("run", bundle, "--prompt", "x")
        if "--runtime" in arguments
        else ("run", bundle, "--prompt", "x", "--runtime", "onnx")
    )
    refused(pocketlm(*base, *arguments), *needles, code=code)


def test_a_prompt_that_does_not_fit_is_refused(pocketlm, bundle):
    refused(pocketlm("run", bundle, "--runtime", "onnx", "--raw", "--prompt", "x" * 65), "65", "64", "--context")


def test_a_runtime_that_is_not_installed_exits_with_3(bundle, environment, tmp_path):
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'onnxruntime' else find(name, *rest)\n"
    )
    from tests.cli.conftest import PROGRAM

    command = [*PROGRAM, "run", str(bundle), "--runtime", "onnx", "--prompt", "x"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(tmp_path)},
        timeout=60,
        check=False,
    )
    refused(done, "pip install 'pocketlm[onnx]'", code=3)


def test_chat_keeps_the_conversation(pocketlm, bundle):
    arguments = ("chat", bundle, "--runtime", "onnx", "--max-new-tokens", 3, "--temperature", 0)
    process = pocketlm(*arguments, stdin="ab\n\ncd\n/reset\nab\n/exit\nnever\n")
    assert process.returncode == 0, process.stderr
    answers = process.stdout.split("\n")
    assert len(answers) >= 3
    assert process.stdout.startswith(pocketlm(*arguments, stdin="ab\n").stdout), "Ctrl-D ends it"


def test_chat_that_outgrows_the_context_says_so_and_goes_on(pocketlm, bundle):
    process = pocketlm("chat", bundle, "--runtime", "onnx", "--max-new-tokens", 2, stdin="x" * 80 + "\n/exit\n")
    assert process.returncode == 0
    assert "context" in process.stderr
    assert "/reset" in process.stderr


def test_a_bundle_without_a_template(pocketlm, tmp_path):
    source = write_small_checkpoint(tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    bundle = tmp_path / "bundle"
    assert pocketlm("export", source, "-o", bundle, "--targets", "onnx").returncode == 0
    assert not (bundle / "golden" / "chat.jsonl").exists()
    process = pocketlm("run", bundle, "--prompt", "ab", "--max-new-tokens", 2)
    assert process.returncode == 0
    assert "no chat template" in process.stderr
    refused(pocketlm("run", bundle, "--prompt", "ab", "--system", "s"), "--system")
    refused(pocketlm("chat", bundle), "no chat template")


def test_a_damaged_bundle_is_refused_by_every_command(pocketlm, bundle, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    path = copy / "onnx" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    refused(pocketlm("inspect", copy), "onnx/model.onnx", "altered")
    refused(pocketlm("run", copy, "--runtime", "onnx", "--prompt", "x"), "onnx/model.onnx", "altered")
    refused(pocketlm("chat", copy, "--runtime", "onnx"), "onnx/model.onnx", "altered")
    for command in (["run", "--prompt", "x"], ["chat"]):
        refused(pocketlm(command[0], tmp_path / "nowhere", *command[1:]), "no such bundle")


@pytest.mark.usefixtures("bundle")
def test_store_shows_and_prunes(pocketlm, store, tmp_path):
    document = json.loads(pocketlm("store", "--json").stdout)
    assert document["path"] == str(store / "pocketlm")
    assert document["entries"] > 0
    assert 0 < document["bytes"] <= document["limit"]
    other = tmp_path / "other"
    assert json.loads(pocketlm("store", "--store", other, "--json").stdout)["entries"] == 0
    pruned = json.loads(pocketlm("store", "--prune", "--json").stdout)
    assert (pruned["entries"], pruned["bytes"], pruned["freed"]) == (0, 0, document["bytes"])
    assert "entries        0" in pocketlm("store").stdout


def test_a_reader_that_leaves_early_is_no_error(environment, bundle):
    import shlex

    from tests.cli.conftest import PROGRAM

    command = f"{shlex.join([*PROGRAM, 'inspect', str(bundle), '--json'])} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.stderr == ""


def test_packed_weights_answer_alike_and_core_ml_has_none(pocketlm, bundle, store):
    run = ("run", bundle, "--raw", "--prompt", "abc", "--max-new-tokens", "8", "--temperature", "0", "--json")
    plain, packed = (
        json.loads(pocketlm(*run, "--runtime", "onnx", *more).stdout)["tokens"] for more in ((), ("--packed",))
    )
    assert plain == packed
    assert list((store / "pocketlm" / "packed").iterdir())
    refused(pocketlm(*run, "--runtime", "coreml", "--packed"), "coreml", "valid: executorch, onnx")
