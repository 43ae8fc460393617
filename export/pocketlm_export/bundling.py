"""Writes a bundle beside its place and moves it there when it is whole."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from pocketlm.errors import InputError
from pocketlm.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    Model,
    Place,
    Provenance,
    Sampling,
    Scheme,
    SchemeName,
    Target,
    Weight,
)
from pocketlm_export.backends.base import Artifact
from pocketlm_export.checkpoint.checkpoint import Checkpoint
from pocketlm_export.graph.graph import Graph
from pocketlm_export.options import ExportOptions
from pocketlm_export.ownership import abandoned, hold
from pocketlm_export.quantization.schemes import SchemeRow, stored_bits
from pocketlm_export.quantization.weights import Weights

__all__ = ["BundleWriter"]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
ARTIFACT_PATHS = {"onnx": "onnx/model.onnx", "executorch": "executorch/model.pte", "coreml": "coreml/model.mlpackage"}


class BundleWriter:
    """A folder that becomes ``output`` at :meth:`commit`, or vanishes.

    Until then it lies beside ``output`` in ``.NAME.XXXXXXXX.partial``, which the process holds
    (:mod:`pocketlm_export.ownership`). One that a killed export left is removed by the next export to this place, and
    what it had moved away to replace is put back.

    Raises :class:`InputError` if ``output`` exists and ``force`` is false, or can't be written, or its disk gets full:
    an :class:`OSError` within the context becomes one.
    """

    def __init__(self, output: Path, *, force: bool) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100  resolve() would follow a link at output
        self._force = force
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        if self.output.is_symlink() or (self.output.exists() and not self._force):
            raise InputError(f"{self.output}: exists already; choose another place, or --force to replace it")
        if self.output.exists() and not (self.output / "manifest.json").is_file():
            raise InputError(f"{self.output}: exists and is not a bundle; --force replaces bundles only")

    def __enter__(self) -> Self:
        parent = self.output.parent
        self._made_parents = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            self._refuse_existing()
            self._scratch, self._hold = self._make_scratch()
        except OSError as error:
            self._remove_made_parents()
            raise InputError(f"{parent}: can't be written: {error.strerror}") from error
        self._folder = self._scratch / "new"
        self._folder.mkdir()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        os.close(self._hold)
        self._remove_made_parents()
        if isinstance(error, OSError):
            raise InputError(f"{self._place(error)}: {error.strerror or error}") from error

    def _make_scratch(self) -> tuple[Path, int]:
        while True:
            scratch = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.", suffix=".partial", dir=self.output.parent))
            descriptor = hold(scratch)
            if descriptor is not None:
                return scratch, descriptor

    def _remove_abandoned(self) -> None:
        name = re.compile(rf"\.{re.escape(self.output.name)}\.[a-z0-9_]{{8}}\.partial")  # as mkdtemp makes them
        for scratch in abandoned(path for path in self.output.parent.iterdir() if name.fullmatch(path.name)):
            with self._parent_locked():
                if (scratch / "replaced").exists() and not self.output.exists():
                    (scratch / "replaced").rename(self.output)
            shutil.rmtree(scratch, ignore_errors=True)

    @contextlib.contextmanager
    def _parent_locked(self) -> Iterator[None]:
        """One export at a time moves bundles in this folder."""
        lock = os.open(self.output.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _place(self, error: OSError) -> str:
        """The file that the user knows: a full disk is the output's, whatever file was being copied to it."""
        name = str(error.filename or self.output)
        if error.errno in FULL or Path(name).is_relative_to(self._scratch):
            return f"{self.output}: can't be written"
        return name

    def _remove_made_parents(self) -> None:
        for folder in self._made_parents:
            with contextlib.suppress(OSError):  # not empty: it holds the bundle, or someone else's files
                folder.rmdir()

    @property
    def written(self) -> Path:
        """Where the bundle lies until :meth:`commit`; whole once there is a manifest."""
        return self._folder

    def scratch(self, name: str) -> Path:
        """A new empty folder that is no part of the bundle, and goes with the export."""
        path = self._scratch / name
        path.mkdir()
        return path

    def folder(self, name: str) -> Path:
        """A new empty folder of the bundle."""
        path = self._folder / name
        path.mkdir()
        return path

    def add_tokenizer(self, checkpoint: Checkpoint) -> None:
        """The tokenizer's files, in a folder of their own."""
        folder = self.folder("tokenizer")
        for name, path in checkpoint.tokenizer_files.items():
            shutil.copyfile(path, folder / name)
        for path in sorted((checkpoint.tokenizer_folder / "additional_chat_templates").glob("*.jinja")):
            (folder / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.parent.name / path.name)

    def add_configuration(self, checkpoint: Checkpoint) -> None:
        """The model's config.json: what the graph can be made from again, to verify without the checkpoint."""
        shutil.copyfile(checkpoint.folder / "config.json", self._folder / "config.json")

    def add_licenses(self, checkpoint: Checkpoint) -> None:
        """The model's own licence files."""
        for name, path in checkpoint.license_files.items():
            shutil.copyfile(path, self._folder / name)

    def add_manifest(
        self,
        checkpoint: Checkpoint,
        graph: Graph,
        options: ExportOptions,
        weights: Weights,
        artifacts: Mapping[str, Artifact],
        libraries: Mapping[str, str],
    ) -> None:
        """manifest.json over everything written so far."""
        needed = graph.weights()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            model=_model(checkpoint, graph.context_length),
            scheme=_scheme(graph, options, weights),
            targets={
                name: Target(
                    path=ARTIFACT_PATHS[name],
                    runtime=dict(artifact.runtime),
                    longest_call=artifact.longest_call,
                    rows=artifact.rows,
                    notes=list(artifact.notes),
                )
                for name, artifact in artifacts.items()
            },
            files=self._records(),
            provenance=Provenance(
                checkpoint_sha256=checkpoint.digest(needed),
                adapter_sha256=checkpoint.tensors.changes_digest(),
                accepted=sorted(options.accept),
                pocketlm=importlib.metadata.version("pocketlm"),
                libraries=dict(sorted(libraries.items())),
            ),
            weights={
                name: Weight(
                    scheme=_scheme_name(weights.row(name)),
                    group=_group(weights.row(name)),
                    sha256=weights.sha256(name),
                    shape=list(weight.shape),
                    places={
                        target: Place(entry=artifact.entries[name].name, first_row=artifact.entries[name].first_row)
                        for target, artifact in artifacts.items()
                    },
                )
                for name, weight in needed.items()
            },
        )
        text = json.dumps(manifest.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False)
        (self._folder / "manifest.json").write_text(text + "\n", encoding="utf-8")

    def commit(self) -> None:
        """Move the bundle to its place in one step. Raises :class:`InputError` if another export was there first."""
        with self._parent_locked():
            self._refuse_existing()
            if not self.output.exists():
                self._folder.rename(self.output)
                return
            replaced = self._scratch / "replaced"
            self.output.rename(replaced)
            try:
                self._folder.rename(self.output)
            except BaseException:
                replaced.rename(self.output)
                raise

    def _records(self) -> dict[str, FileRecord]:
        records = {}
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                path.chmod(0o644)
                records[path.relative_to(self._folder).as_posix()] = FileRecord(sha256=digest, size=path.stat().st_size)
        return records


def _scheme_name(row: SchemeRow | None) -> SchemeName:
    return "fp32" if row is None else row.name


def _group(row: SchemeRow | None) -> int | None:
    return None if row is None else row.group


def _model(checkpoint: Checkpoint, context_length: int) -> Model:
    config, generation = checkpoint.config, checkpoint.generation
    return Model(
        model_type=config.model_type,
        vocabulary_size=config.vocabulary_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=len(config.layers),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        context_length=context_length,
        trained_context_length=config.context_length,
        tied=config.tied,
        stop_ids=list(generation.stop_ids),
        bos_id=generation.bos_id,
        pad_id=generation.pad_id,
        sampling=Sampling(**generation.sampling),
    )


def _scheme(graph: Graph, options: ExportOptions, weights: Weights) -> Scheme:
    needed = graph.weights()
    bits = sum(stored_bits(weights.row(name), weight.shape) for name, weight in needed.items())
    elements = sum(math.prod(weight.shape) for weight in needed.values())
    return Scheme(
        name=options.scheme,
        linears=options.scheme,
        embedding=_scheme_name(weights.row(graph.embedding.weight.name)),
        head=_scheme_name(weights.row(graph.head.weights[0].name)),
        group=options.group if any(_group(weights.row(name)) for name in needed) else None,
        bits_per_weight=round(bits / elements, 4),
    )
