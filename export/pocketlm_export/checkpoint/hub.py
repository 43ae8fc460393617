"""From what a user names to a folder: a path, or ``org/name[@revision]`` through huggingface_hub."""

import importlib.util
import re
from pathlib import Path

from pocketlm.errors import CheckpointError, UnavailableError

__all__ = ["locate"]

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# What an export reads. Pickles are never downloaded.
FILES = ["*.json", "model*.safetensors", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*"]


def locate(source: str) -> Path:
    """The folder of ``source``, downloaded if it names a repository and no such folder exists.

    Raises :class:`CheckpointError` if it can't be had, :class:`UnavailableError` without the extra ``hub``.
    """
    path = Path(source)
    if path.exists() or not REPOSITORY.fullmatch(source):
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UnavailableError(f"{source}: no such folder; to download it from the hub: pip install 'pocketlm[hub]'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: no such folder, and the hub did not give it: {reason[:200]}") from error
