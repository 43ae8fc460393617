"""The main path: from a checkpoint to a bundle."""

import gc
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.errors import CheckError, ContextLengthError, InputError
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.base import Artifact, Lowering, load_backend
from pocketlm_export.bundling import BundleWriter
from pocketlm_export.checkpoint.adapter import with_adapter
from pocketlm_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pocketlm_export.checkpoint.hub import locate
from pocketlm_export.checkpoint.text import open_text, with_tokenizer, with_tokenizer_stop
from pocketlm_export.disk_space import require_space
from pocketlm_export.golden import write_golden
from pocketlm_export.options import DEFAULT_CONTEXT, ExportOptions
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import LIMIT as STORE_LIMIT
from pocketlm_export.quantization.store import WeightStore, default_store
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify import write_certificate

__all__ = ["Progress", "export_bundle", "resolve_context"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How an export tells what it does. ``stage(name, elements)`` begins a stage of about so many elements of work,
    ``advance(name, elements)`` reports a weight done, from any thread."""

    stage: Callable[[str, int], None] = lambda _name, _elements: None
    advance: Callable[[str, int], None] = lambda _name, _elements: None


def export_bundle(source: str, output: Path, options: ExportOptions, progress: Progress = Progress()) -> Bundle:
    """Export ``source``, a folder or ``org/name[@revision]``, to a bundle at ``output``.

    Raises :class:`pocketlm.InputError` for what can't be exported, :class:`pocketlm.CheckError` for a bundle that fails
    its verification; nothing is left at ``output`` then.
    """
    progress.stage("read", 0)
    with BundleWriter(output, force=options.force) as writer:
        checkpoint = open_checkpoint(locate(source), options.accept)
        if options.adapter is not None:
            checkpoint = with_adapter(checkpoint, options.adapter, options.accept)
        context = resolve_context(checkpoint, options.context)
        checkpoint = with_tokenizer(checkpoint, writer.scratch("tokenizer"))
        text = open_text(checkpoint, options.accept)
        checkpoint = replace(checkpoint, generation=with_tokenizer_stop(checkpoint.generation, text.tokenizer))

        graph = build_graph(checkpoint.config, context)
        weights_needed = graph.weights()
        checkpoint.check_tensors(weights_needed, options.accept)
        checkpoint.check_saved_head(options.accept)
        rows = assign_rows(graph, options.scheme, options.head, options.group)
        backends = {name: load_backend(name) for name in options.targets}
        for backend in backends.values():
            backend.check(graph, rows)
        store = WeightStore(options.store or default_store())
        require_space(writer.output, store, checkpoint, graph, rows, options.targets)

        elements = checkpoint.tensors.elements(weights_needed)
        progress.stage("quantize", elements)
        weights = quantize(checkpoint.tensors, rows, store, progress.advance)
        store.prune(STORE_LIMIT)

        lowering = Lowering(
            graph=graph,
            weights=weights,
            config=checkpoint.config,
            generation=checkpoint.generation,
            tokenizer_files=checkpoint.tokenizer_files,
            progress=progress.advance,
            left_out=checkpoint.left_out,
        )
        artifacts: dict[str, Artifact] = {}
        libraries = {name: importlib.metadata.version(name) for name in ("numpy",)}
        with _no_garbage_collection():
            for name, backend in backends.items():
                progress.stage(f"write {name}", elements)
                artifacts[name] = backend.write(lowering, writer.folder(name))
                libraries.update(backend.libraries())
                weights.release()

        progress.stage("golden", 0)
        write_golden(writer.folder("golden"), text, graph, weights)

        progress.stage("finish", 0)
        writer.add_configuration(checkpoint)
        writer.add_tokenizer(checkpoint)
        writer.add_licenses(checkpoint)
        writer.add_manifest(checkpoint, graph, options, weights, artifacts, libraries)
        if options.verify:
            # These import torch, which an export from the store does without.
            from pocketlm_export.verify.subject import exported_subject
            from pocketlm_export.verify.verification import issue_certificate

            subject = exported_subject(open_bundle(writer.written), graph, weights, checkpoint)
            certificate = issue_certificate(subject, oracle=options.oracle, stage=progress.stage)
            if not certificate.passed:
                raise CheckError(
                    f"{output}: verification failed, nothing was exported: {'; '.join(certificate.failures)}. "
                    "--no-verify keeps the bundle, pocketlm verify shows every figure"
                )
            write_certificate(writer.written, certificate)
        writer.commit()
    return open_bundle(output)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A program under construction is a million small objects and no garbage: the collector would walk them again and
    again, a tenth of the time of all three."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def resolve_context(checkpoint: Checkpoint, wanted: int | None) -> int:
    """The context to export: at most the model's own, by default the smaller of it and 4096."""
    longest = checkpoint.config.context_length
    if wanted is None:
        return min(longest, DEFAULT_CONTEXT)
    if wanted > longest:
        raise ContextLengthError(f"context {wanted} is longer than the model's {longest} (max_position_embeddings)")
    if wanted < 2:
        raise InputError(f"context must be at least 2, not {wanted}")
    return wanted
