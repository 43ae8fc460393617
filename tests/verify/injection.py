"""Puts a fault into one artifact of a copied bundle, and makes the manifest know the altered files.

Files whose hash is wrong are refused before anything is measured. Here the hashes are right and the content is wrong:
what a broken writer would leave.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pocketlm.bundle import Bundle, open_bundle

__all__ = ["copied_with_fault", "faults", "places_of", "sealed"]

Fault = Callable[[Path, Any], None]


# Of every model, of mixtures of experts, and of block-sparse attention.
KINDS = ("faults", "expert_faults", "sparsity_faults")


def faults(target: str, *kinds: str) -> Mapping[str, Fault]:
    """The faults that an artifact of ``target`` can hold, by name; of these ``kinds``, by default of all."""
    return {name: fault for module in _modules(target, kinds or KINDS) for name, fault in module.FAULTS.items()}


def places_of(target: str, fault: str, bundle: Bundle) -> list[Any]:
    """Every place of the bundle's artifact that differs for ``fault``."""
    module = next(module for module in _modules(target) if fault in module.FAULTS)
    return module.places(fault, _edited(target, bundle.folder, bundle), bundle.manifest)


def copied_with_fault(bundle: Bundle, target: str, fault: str, place: Any, folder: Path) -> Bundle:
    """A copy of ``bundle`` in ``folder``, which must not exist, with the fault at ``place``."""
    shutil.copytree(bundle.folder, folder)
    (folder / "certificate.json").unlink(missing_ok=True)
    faults(target)[fault](_edited(target, folder, bundle), place)
    _seal(folder)
    return open_bundle(folder)


def _modules(target: str, kinds: Sequence[str] = KINDS) -> list[ModuleType]:
    names = [f"tests.verify.{target}_{kind}" for kind in kinds]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def sealed(bundle: Bundle, folder: Path, files: Mapping[str, bytes]) -> Bundle:
    """A copy of ``bundle`` in ``folder``, which must not exist, with other content of ``files``."""
    shutil.copytree(bundle.folder, folder)
    (folder / "certificate.json").unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    _seal(folder)
    return open_bundle(folder)


def _edited(target: str, folder: Path, bundle: Bundle) -> Path:
    """What the fault's function edits: ONNX's folder, the .pte, the package."""
    path = folder / bundle.manifest.targets[target].path
    return path.parent if target == "onnx" else path


def _seal(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    path.write_text(json.dumps(manifest), encoding="utf-8")
