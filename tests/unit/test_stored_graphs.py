"""Graphs on disk are the graphs that were traced, or are traced again."""

import os
import subprocess
import sys

import pytest

from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.graph.rewrites import keep_last_positions, merge_linears
from pocketlm_export.graph.stored import GraphStore, decode_graph, encode_graph
from pocketlm_export.graph.trace import trace
from tests.tiny_models import ROWS


class Tracer:
    def __init__(self):
        self.calls = 0

    def __call__(self, config, context_length):
        self.calls += 1
        return trace(config, context_length)


@pytest.mark.parametrize("name", [row.name for row in ROWS])
def test_a_graph_survives(name, tiny_checkpoint):
    graph = trace(open_checkpoint(tiny_checkpoint(name)[0]).config, 96)
    for form in (graph, keep_last_positions(merge_linears(graph), 1)):
        assert decode_graph(encode_graph(form)) == form


def test_a_second_export_does_not_trace(tiny_checkpoint, tmp_path):
    config, tracer = open_checkpoint(tiny_checkpoint("qwen2-window")[0]).config, Tracer()
    store = GraphStore(tmp_path / "graphs")
    first, second = (store.graph(config, 96, tracer) for _ in range(2))
    assert first == second
    assert tracer.calls == 1
    store.graph(config, 64, tracer)  # the window is a mask at 96, and another context is another graph
    assert tracer.calls == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"0" * 64 + b"\n{}", None])
def test_a_damaged_file_is_traced_again(damage, tiny_checkpoint, tmp_path):
    config, tracer = open_checkpoint(tiny_checkpoint("llama")[0]).config, Tracer()
    store = GraphStore(tmp_path)
    graph = store.graph(config, 96, tracer)
    (path,) = tmp_path.glob("*.json")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"llama", b"alpaca").replace(b"silu", b"tanh") if damage is None else damage)
    assert store.graph(config, 96, tracer) == graph
    assert tracer.calls == 2
    assert path.read_bytes() == content


def test_old_graphs_go(tiny_checkpoint, tmp_path):
    config = open_checkpoint(tiny_checkpoint("llama")[0]).config
    store = GraphStore(tmp_path)
    for index in range(70):
        (tmp_path / f"{index}.json").write_text("old")
        os.utime(tmp_path / f"{index}.json", (index, index))
    store.graph(config, 96, trace)
    assert len(list(tmp_path.glob("*.json"))) == 64
    assert not (tmp_path / "0.json").exists()


def test_a_warm_export_does_not_import_torch(tiny_checkpoint, tmp_path):
    folder, _ = tiny_checkpoint("llama-untied-biases")
    program = (
        "import sys, pocketlm\n"
        f"pocketlm.export({str(folder)!r}, sys.argv[1], targets=('onnx',), store={str(tmp_path / 'store')!r}, "
        "context_length=20, verify=False)\n"
        "print('torch' in sys.modules)"
    )
    seen = []
    for name in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True, check=True
        )
        seen.append(done.stdout.strip())
    assert seen == ["True", "False"]
