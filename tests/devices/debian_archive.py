"""Debian packages and archives as the tests need them, sound or not."""

import hashlib
import io
import lzma
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["entry", "link", "write_archive", "write_deb"]

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", *, mode: int = 0o644, kind: bytes = tarfile.REGTYPE) -> Entry:
    """A file, or what else ``kind`` says."""
    information = tarfile.TarInfo(name)
    information.size, information.mode, information.type = len(data), mode, kind
    return information, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Entry:
    """A symbolic link, or a hard one."""
    information, _ = entry(name, kind=kind)
    information.linkname = target
    return information, b""


def write_deb(path: Path, entries: Iterable[Entry], *, member: str = "data.tar.xz") -> Path:
    """A ``.deb`` of these files."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for information, data in entries:
            archive.addfile(information, io.BytesIO(data))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", member: lzma.compress(plain.getvalue())}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, data in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))
    return path


def write_archive(folder: Path, packages: Mapping[str, Path], *, codename: str = "bookworm", **fields: str) -> str:
    """An archive of one release with these ``.deb`` files, unsigned: its address. ``fields`` replace those of each
    package in the index."""
    stanzas = []
    for name, deb in packages.items():
        data = deb.read_bytes()
        place = f"pool/{name}.deb"
        (folder / "pool").mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
        known = {
            "Package": name, "Version": "1.0-1", "Filename": place, "Size": str(len(data)),
            "SHA256": hashlib.sha256(data).hexdigest(), **fields,
        }  # fmt: skip
        stanzas.append("".join(f"{field}: {value}\n" for field, value in known.items()))
    index = lzma.compress("\n".join(stanzas).encode())
    sha256 = hashlib.sha256(index).hexdigest()
    release = folder / "dists" / "bookworm"
    hashes = release / "main/binary-arm64/by-hash/SHA256"
    hashes.mkdir(parents=True, exist_ok=True)
    (hashes / sha256).write_bytes(index)
    listed = f" {sha256} {len(index)} main/binary-arm64/Packages.xz"
    (release / "InRelease").write_text(f"Origin: Debian\nCodename: {codename}\nSHA256:\n{listed}\n")
    return folder.as_uri()
