"""Unpacking a ``.deb`` without dpkg, and without running anything that is in it.

The format is deb(5): an ar(5) archive whose member ``data.tar.xz`` holds the files. What an archive says
is not trusted: every name has to lie inside the folder, nothing is written through a link, and links stay inside too.
"""

import lzma
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pocketlm.errors import UnavailableError

__all__ = ["unpack_deb"]

AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60
DATA = "data.tar.xz"


def unpack_deb(deb: Path, folder: Path, wanted: Callable[[str], bool] = lambda _name: True) -> None:
    """Unpack the files of ``deb`` whose names (``usr/bin/qemu-aarch64``) are ``wanted`` into ``folder``.

    Absolute links become relative ones, so that they mean the same from outside. Owners, times and special bits are
    dropped. Raises :class:`UnavailableError` that names the package and the member for a damaged or hostile archive.
    """
    try:
        with _data(deb) as data, tarfile.open(fileobj=data, mode="r|") as archive:
            for member in archive:
                name = _name(deb, member.name)
                if name and wanted(name):
                    _unpack_member(deb, archive, member, folder, name)
    except (EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise UnavailableError(f"{deb}: damaged package: {error or 'truncated'}") from error


@contextmanager
def _data(deb: Path) -> Iterator[IO[bytes]]:
    """The stream of the package's files, decompressed."""
    with deb.open("rb") as file:
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise UnavailableError(f"{deb}: not a Debian package")
        while len(header := file.read(AR_HEADER)) == AR_HEADER:
            name = header[:16].decode("ascii", "replace").rstrip().rstrip("/")
            if name == DATA:
                with lzma.open(file) as data:
                    yield data
                return
            try:
                size = int(header[48:58])
            except ValueError:
                raise UnavailableError(f"{deb}: damaged package: member {name!r} has no size") from None
            file.seek(size + size % 2, os.SEEK_CUR)
    raise UnavailableError(f"{deb}: holds no {DATA}: damaged, or of another format")


def _name(deb: Path, name: str) -> str:
    """``./usr/bin/x`` as ``usr/bin/x``; the root itself is empty."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UnavailableError(f"{deb}: member {name!r} leaves the folder")
    normal = posixpath.normpath(name)
    return "" if normal == "." else normal


def _unpack_member(deb: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, name: str) -> None:
    path = folder / name
    for parent in path.relative_to(folder).parents:
        if (folder / parent).is_symlink():
            raise UnavailableError(f"{deb}: member {name!r} would be written through the link {str(parent)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        if path.is_symlink():
            raise UnavailableError(f"{deb}: folder {name!r} is already a link")
        path.mkdir(exist_ok=True)
        return
    path.unlink(missing_ok=True)
    if member.issym():
        path.symlink_to(_link_target(deb, name, member.linkname))
    elif member.islnk():
        source = folder / _name(deb, member.linkname)
        if source.is_symlink() or not source.is_file():
            raise UnavailableError(f"{deb}: {name!r} is a hard link to {member.linkname!r}, which is no file before it")
        path.hardlink_to(source)
    elif member.isreg():
        _write(deb, archive, member, path)
    else:
        raise UnavailableError(f"{deb}: member {name!r} is neither file, folder nor link")


def _link_target(deb: Path, name: str, target: str) -> str:
    """The target relative to the link's own folder."""
    start = posixpath.dirname(name)
    inside = posixpath.normpath(target.lstrip("/") if target.startswith("/") else posixpath.join(start, target))
    if inside == ".." or inside.startswith("../"):
        raise UnavailableError(f"{deb}: link {name!r} points to {target!r}, outside the folder")
    return posixpath.relpath(inside, start or ".")


def _write(deb: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = archive.extractfile(member)
    assert content is not None  # of a regular file
    written = 0
    with path.open("xb") as file:
        while block := content.read(1 << 20):
            written += file.write(block)
    if written != member.size:
        raise UnavailableError(f"{deb}: damaged package: {member.name!r} has {written} of {member.size} bytes")
    path.chmod(0o755 if member.mode & 0o100 else 0o644)
