"""Checkpoints by name, from a hub on the loopback address."""

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.conftest import PROGRAM
from tests.cli.test_export import refused
from tests.small_checkpoint import write_small_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAP = "pytorch_model.bin"


class Hub:
    """The few addresses of the hub that a download asks, over a folder; ``asked`` holds the files that were fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: set[str] = set()
        self.revisions: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                path = self.path.split("?")[0]
                headers = {"X-Repo-Commit": COMMIT}
                body = None
                if path.startswith("/api/models/org/small"):
                    kind, revision = ([*path.removeprefix("/api/models/org/small").split("/"), "", ""])[1:3]
                    hub.revisions.append(revision)
                    if revision in ("", "main", "v1.0", COMMIT):
                        body = json.dumps(hub.tree() if kind == "tree" else hub.info()).encode()
                elif path.startswith("/org/small/resolve/"):
                    name = path.split("/")[5]
                    hub.asked.add(name)
                    body = (hub.folder / name).read_bytes()
                    headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
                if body is None:
                    headers["X-Error-Code"] = "RepoNotFound"
                self.send_response(404 if body is None else 200)
                body = body or b""
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def info(self) -> dict:
        return {"id": "org/small", "sha": COMMIT, "siblings": [{"rfilename": file["path"]} for file in self.tree()]}

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
            for file in self.folder.iterdir()
        ]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    folder = write_small_checkpoint(tmp_path / "repository")
    (folder / TRAP).write_bytes(b"\x80\x04.")
    (folder / "modeling_custom.py").write_text("raise SystemExit('ran')")
    (folder / "LICENSE").write_text("terms")
    served = Hub(folder)
    yield served
    served.server.shutdown()


def call(hub: Hub, environment: dict, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess:
    environment = {
        **environment, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_an_export_by_name_downloads_what_it_reads_and_no_pickle(hub, environment, tmp_path):
    output = tmp_path / "bundle"
    process = call(hub, environment, tmp_path, "export", "org/small", "-o", output, "--targets", "onnx", "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["model"]["model_type"] == "llama"
    assert (output / "LICENSE").read_text() == "terms"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"} == hub.asked


def test_a_revision_is_asked_for(hub, environment, tmp_path):
    process = call(hub, environment, tmp_path, "inspect", "org/small@v1.0", "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["supported"] is True
    assert "v1.0" in hub.revisions


@pytest.mark.parametrize("name", ("org/nothing", "org/small@v9"))
def test_what_the_hub_does_not_have_is_one_message(name, hub, environment, tmp_path):
    process = call(hub, environment, tmp_path, "export", name, "-o", tmp_path / "place" / "bundle")
    refused(process, name, "the hub did not give it")
    assert not (tmp_path / "place").exists()


def test_a_hub_that_is_not_there_is_one_message(environment, tmp_path, hub):
    hub.server.shutdown()
    hub.server.server_close()
    refused(call(hub, environment, tmp_path, "export", "org/small", "-o", tmp_path / "b"), "org/small")


def test_without_the_extra_the_message_names_it(hub, environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'huggingface_hub' else find(name, *rest)\n"
    )
    hidden = {**environment, "PYTHONPATH": str(tmp_path)}
    process = call(hub, hidden, tmp_path, "export", "org/small", "-o", tmp_path / "b")
    refused(process, "pip install 'pocketlm[hub]'", code=3)
    assert not hub.asked


def test_a_folder_of_that_name_wins(hub, environment, tmp_path):
    write_small_checkpoint(tmp_path / "org" / "small")
    command = [*PROGRAM, "inspect", "org/small", "--json"]
    environment = {**environment, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60, check=False
    )
    assert json.loads(done.stdout)["supported"] is True
    assert not hub.asked
