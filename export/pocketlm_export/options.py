"""What an export is asked to do."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pocketlm.errors import InputError
from pocketlm.manifest import SchemeName
from pocketlm_export.backends.base import TARGETS
from pocketlm_export.quantization.schemes import GROUPS, HEADS, SCHEMES

__all__ = ["ExportOptions", "read_recipe"]

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of ``pocketlm export``; a recipe file holds the same keys.

    ``group``: how many columns of an int4 matrix share a scale; a matrix that it doesn't divide takes a smaller one.
    ``context`` None: the smaller of the model's and 4096. ``accept`` names configuration keys and tensors of the
    checkpoint to ignore. ``adapter``: the folder of a PEFT adapter to merge. ``store`` None: the default store.
    ``verify``: end with a certificate; ``oracle`` names the independent implementation that takes part in it.
    """

    targets: tuple[str, ...] = TARGETS
    scheme: SchemeName = "int4"
    head: SchemeName = "int8"
    group: int = GROUPS[0]
    context: int | None = None
    accept: tuple[str, ...] = ()
    adapter: Path | None = None
    store: Path | None = None
    force: bool = False
    verify: bool = True
    oracle: str | None = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise InputError(f"unknown target {target!r}; valid: {', '.join(TARGETS)}")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise InputError(f"targets must name each target once, at least one of {', '.join(TARGETS)}")
        if self.scheme not in SCHEMES:
            raise InputError(f"unknown scheme {self.scheme!r}; valid: {', '.join(SCHEMES)}")
        if self.head not in HEADS:
            raise InputError(f"unknown head {self.head!r}; valid: {', '.join(HEADS)}")
        if isinstance(self.group, bool) or self.group not in GROUPS:
            raise InputError(f"group must be one of {', '.join(map(str, GROUPS))}, not {self.group!r}")
        if self.group != GROUPS[0] and (self.scheme == "fp32" or "int4" not in (self.scheme, self.head)):
            raise InputError(
                f"groups of {self.group} are int4's, but scheme {self.scheme} and head {self.head} have none"
            )
        if self.oracle is not None and not self.verify:
            raise InputError("an oracle takes part in verification, which is switched off")
        if self.context is not None and (
            isinstance(self.context, bool) or not isinstance(self.context, int) or self.context < 2
        ):
            raise InputError(f"context must be an integer of at least 2, not {self.context!r}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file, each the name of a field of :class:`ExportOptions`."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    kinds: dict[str, type] = {
        "targets": list, "accept": list, "scheme": str, "head": str, "group": int, "context": int, "adapter": str,
        "store": str, "force": bool, "verify": bool, "oracle": str,
    }  # fmt: skip
    valid = [field.name for field in fields(ExportOptions)]
    for key, value in content.items():
        if key not in valid:
            raise InputError(f"{path}: unknown key {key!r}; valid: {', '.join(valid)}")
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and kinds[key] is not bool):
            raise InputError(f"{path}: {key!r} must be a {kinds[key].__name__}, not {value!r}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise InputError(f"{path}: {key!r} must be a list of strings")
    for key, value in content.items():
        if isinstance(value, list):
            content[key] = tuple(value)
        elif key in ("adapter", "store"):
            content[key] = Path(value)
    return content
