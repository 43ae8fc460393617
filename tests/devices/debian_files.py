"""Programs of Debian that the tests run, unpacked in ``build/``: nothing is installed."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pocketlm.devices.arm64_system.deb_archive import unpack_deb
from pocketlm.devices.arm64_system.debian import DebianRelease, debian_mirror

BUILD = Path(__file__).parents[2] / "build" / "debian"


def unpacked_packages(name: str, packages: Mapping[str, Sequence[str]]) -> Path:
    """The files of ``packages``, suite -> names, for amd64, in a folder of that ``name``: fetched if it isn't there.

    Debian's keyring vouches for them.
    """
    folder = BUILD / name
    if not folder.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=BUILD, prefix="partial-"))
        for suite, names in packages.items():
            release = DebianRelease(debian_mirror(), suite, partial / "downloads" / suite)
            for deb in release.fetch(release.packages("amd64", names), lambda _bytes: None):
                unpack_deb(deb, partial)
        shutil.rmtree(partial / "downloads")
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder
