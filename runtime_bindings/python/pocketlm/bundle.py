"""A bundle opened: its manifest checked, its files checked before they are loaded, its sessions."""

import hashlib
import importlib
import importlib.util
import os
import stat
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pydantic import ValidationError

from pocketlm.artifact import Artifact, ArtifactFile
from pocketlm.certificate import Certificate, read_certificate
from pocketlm.errors import BundleError, InputError, UnavailableError, UnsupportedError
from pocketlm.manifest import FORMAT_MAJOR, Manifest, first_fault, sampling_defaults
from pocketlm.session import Session
from pocketlm.strict_json import is_version_of, parse_object
from pocketlm.template import ChatTemplate
from pocketlm.tokenizer import Tokenizer

__all__ = ["RUNTIMES", "Bundle", "open_bundle"]

RUNTIMES: Mapping[str, str] = {"executorch": "executorch", "onnx": "onnxruntime", "coreml": "coremltools"}
PACKING = ("executorch", "onnx")  # the runtimes that can keep packed weights in a file
LARGEST_MANIFEST = 64 << 20
LONGEST_PATH = 1024


class Runtime(Protocol):
    """What a module of ``pocketlm.runtimes`` defines."""

    def open_session(self, artifact: Artifact, threads: int | None, **wishes: bool) -> Session:
        """A fresh session over ``artifact``. One of :data:`PACKING` takes ``packed``."""

    def runtime_build(self) -> tuple[str, str]:
        """The version of the vendor's libraries, which it loads, and what is known of their build."""


class Bundle:
    """A bundle's folder whose manifest was read and found sound. Files are hashed when they are first needed."""

    def __init__(self, folder: Path, manifest: Manifest, certificate: Certificate | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.certificate = certificate
        """What was verified of these very files; None if nobody has."""
        self._checked: set[tuple[str, int, int, int]] = set()

    @cached_property
    def manifest_sha256(self) -> str:
        """Of manifest.json as it lies there: what certificates, sessions and results are bound to."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, its files checked."""
        self._check_text_files()
        return Tokenizer.open(self.folder / "tokenizer")

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template; None for a base model that has none."""
        self._check_text_files()
        return ChatTemplate.open(self.folder / "tokenizer")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation."""
        return frozenset(self.manifest.model.stop_ids)

    @property
    def default_sampling(self) -> Mapping[str, object]:
        """The stated keys of generation_config.json."""
        return sampling_defaults(self.manifest.model.sampling)

    def runtimes(self) -> list[str]:
        """The runtimes of this bundle that are installed here, in the order of preference."""
        return [name for name, package in RUNTIMES.items() if name in self.manifest.targets and _installed(package)]

    def session(self, runtime: str | None = None, *, threads: int | None = None, packed: bool = False) -> Session:
        """A session over ``runtime``, or over the first that is installed. ``threads`` None: the runtime's default.

        ``packed``: map the weights, packed for this machine, from a file in the user's cache, made at the first call,
        instead of packing them into memory. For onnx, in about 2.5 times the artifact's size, and for executorch where
        pocketlm-native is installed, in its size; there one session at a time has it, and others pack into memory.

        ExecuTorch's thread count is process-wide. Raises :class:`InputError` for a runtime that the bundle has no
        artifact for, :class:`UnavailableError` for one that isn't installed, :class:`BundleError` for altered files,
        :class:`UnsupportedError` for packed weights of another runtime, :class:`InputError` if there's no place for
        them.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        name = runtime or self._first_runtime()
        if name not in RUNTIMES:
            raise InputError(f"unknown runtime {name!r}; valid: {', '.join(RUNTIMES)}")
        artifact = self.artifact(name)
        if not _installed(RUNTIMES[name]):
            raise UnavailableError(f"the {name} runtime is not installed: pip install 'pocketlm[{name}]'")
        if packed and name not in PACKING:
            raise UnsupportedError(f"packed weights: not supported by {name}; valid: {', '.join(PACKING)}")
        self.check_files(f"{name}/")
        module: Runtime = importlib.import_module(f"pocketlm.runtimes.{name}")
        wishes = {"packed": True} if packed else {}
        session = module.open_session(artifact, threads, **wishes)
        session.bundle = self
        return session

    def artifact(self, name: str) -> Artifact:
        """What the runtime ``name`` has to know; its files are not looked at. :class:`InputError` if there is none."""
        target, model = self.manifest.targets.get(name), self.manifest.model
        if target is None:
            raise InputError(f"{self.folder}: no {name} artifact; this bundle has {', '.join(self.manifest.targets)}")
        return Artifact(
            path=self.folder / target.path,
            requirements=target.runtime,
            context_length=model.context_length,
            vocabulary_size=model.vocabulary_size,
            hidden_size=model.hidden_size,
            longest_call=target.longest_call,
            rows=target.rows,
            files={
                file.removeprefix(f"{name}/"): ArtifactFile(record.sha256, record.size)
                for file, record in self.manifest.files.items()
                if file.startswith(f"{name}/")
            },
        )

    def _first_runtime(self) -> str:
        found = self.runtimes()
        if not found:
            extras = ", ".join(f"pocketlm[{name}]" for name in self.manifest.targets)
            raise UnavailableError(f"no runtime for this bundle is installed; install one of {extras}")
        return found[0]

    def _check_text_files(self) -> None:
        """The tokenizer's folder, whose files are found by their names: one that is not hashed may not be found."""
        self.check_files("tokenizer/")
        for path in sorted((self.folder / "tokenizer").rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.suffix in (".json", ".jinja") and name not in self.manifest.files:
                raise BundleError(f"{path}: not in the manifest: added later; remove it")

    def check_files(self, prefix: str = "") -> None:
        """Hash the files under ``prefix`` and compare; a file that was hashed and has not changed is not hashed again.

        Raises :class:`BundleError` naming the file.
        """
        for name, record in self.manifest.files.items():
            if not name.startswith(prefix):
                continue
            path = self.folder / name
            status = _regular(path, self.folder)
            key = (name, status.st_size, status.st_mtime_ns, status.st_ino)
            if key in self._checked:
                continue
            if status.st_size != record.size:
                raise BundleError(
                    f"{path}: {status.st_size} bytes, but the manifest says {record.size}: truncated or altered"
                )
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                    raise BundleError(f"{path}: its content is not what the manifest says: altered")
            self._checked.add(key)


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle's folder and check its manifest.

    Raises :class:`BundleError` for a missing folder or manifest, an unknown major format version, an unknown key, a
    file that is missing, a link, or outside the folder, an altered certificate or another manifest's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder}: {'not a folder' if folder.exists() else 'no such bundle'}")
    source = folder / "manifest.json"
    if not source.exists() and not source.is_symlink():
        raise BundleError(f"{folder}: no manifest.json: not a bundle")
    _regular(source, folder)
    content = _read_json(source)
    version = content.get("format_version")
    if not is_version_of(FORMAT_MAJOR, version):
        raise BundleError(
            f"{source}: 'format_version' is {version!r:.20}; this release reads {FORMAT_MAJOR}.x: use a matching one"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{source}: {first_fault(error)}") from error
    _check_paths(source, [*manifest.files, *(target.path for target in manifest.targets.values())])
    for name, target in manifest.targets.items():
        if not target.path.startswith(f"{name}/"):
            raise BundleError(f"{source}: 'targets.{name}.path': {target.path} is not below {name}/")
        if not any(file == target.path or file.startswith(f"{target.path}/") for file in manifest.files):
            raise BundleError(f"{source}: 'targets.{name}.path': {target.path} is not among the files")
    for name in manifest.files:
        _regular(folder / name, folder)
    return Bundle(folder, manifest, read_certificate(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise BundleError(f"{path}: too large")
        return parse_object(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path}: not a valid JSON object: {str(error)[:100]}") from error


def _check_paths(source: Path, names: Iterable[str]) -> None:
    for name in names:
        parts = PurePosixPath(name).parts if len(name) <= LONGEST_PATH else ()
        if not parts or name.startswith("/") or "\\" in name or ".." in parts or str(PurePosixPath(name)) != name:
            raise BundleError(f"{source}: {name[:200]!r} is not a path inside the bundle")


def _regular(path: Path, folder: Path) -> os.stat_result:
    """The status of a regular file, no part of whose path below ``folder`` is a link."""
    try:
        for part in [path, *path.parents]:
            if part == folder:
                break
            if part.is_symlink():
                raise BundleError(f"{part}: is a link; a bundle holds none")
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BundleError(f"{path}: missing from the bundle") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: not a regular file")
    return status


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
