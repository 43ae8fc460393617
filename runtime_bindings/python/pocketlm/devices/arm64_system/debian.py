"""Packages of a Debian release: which mirror, what its signed index says, the files themselves.

The chain of trust: Debian's keyring signs ``InRelease``, which holds the sha256 of each ``Packages.xz``, which holds
the sha256 of each ``.deb``. Formats: https://wiki.debian.org/DebianRepository/Format.
"""

import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketlm.devices.arm64_system.downloads import Advance, File, fetch, fetch_unverified
from pocketlm.errors import UnavailableError

__all__ = ["KEYRING", "MIRROR_VARIABLE", "DebianRelease", "Package", "debian_mirror"]

MIRROR_VARIABLE = "POCKETLM_DEBIAN_MIRROR"
PUBLIC_MIRROR = "https://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SAFE_PATH = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9/_.+~%-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Package:
    """One ``.deb`` of a release."""

    name: str
    version: str
    file: File


def debian_mirror(sources: Path = Path("/etc/apt"), os_release: Path = Path("/etc/os-release")) -> str:
    """``$POCKETLM_DEBIAN_MIRROR``; else, on a Debian, the first mirror that its apt uses; else the public one."""
    stated = os.environ.get(MIRROR_VARIABLE)
    if stated:
        return stated.rstrip("/")
    if os_release.is_file() and re.search(r"^ID=\"?debian\"?$", os_release.read_text(), re.MULTILINE):
        files = [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*"))]
        for path in files:
            for url, suite in _sources(path) if path.is_file() else ():
                # Security updates are another archive; so is whatever else is configured.
                if url.startswith(("http://", "https://")) and url.rstrip("/").endswith("/debian") and "/" not in suite:
                    return url.rstrip("/")
    return PUBLIC_MIRROR


def _sources(path: Path) -> Iterator[tuple[str, str]]:
    """Address and suite of each enabled source of a file of sources.list(5), in either format."""
    text = "\n".join(line for line in path.read_text(errors="replace").splitlines() if not line.startswith("#"))
    if path.suffix == ".sources":
        for stanza in re.split(r"\n\s*\n", text):
            fields = _fields(stanza)
            if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes").lower() not in ("no", "false"):
                yield from ((url, suite) for url in fields["URIs"].split() for suite in fields["Suites"].split())
    elif path.suffix == ".list":
        for line in text.splitlines():
            if found := re.match(r"deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)", line):
                yield found[1], found[2]


def _fields(stanza: str) -> dict[str, str]:
    """The fields of one stanza of deb822(5); continued lines are joined."""
    pairs = (line.partition(":") for line in re.sub(r"\n[ \t]+", " ", stanza).splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


class DebianRelease:
    """``suite`` of the archive at ``mirror``; indices are fetched, and files checked, when they are first needed."""

    def __init__(self, mirror: str, suite: str, folder: Path, keyring: Path = KEYRING) -> None:
        """``folder`` takes what is downloaded, and may hold what an interrupted call left there."""
        self.mirror, self.suite, self._folder, self._keyring = mirror, suite, folder, keyring
        self._indices: Mapping[str, File] | None = None

    @property
    def can_be_verified(self) -> bool:
        """Whether ``gpgv`` and Debian's keyring are here."""
        return shutil.which("gpgv") is not None and self._keyring.is_file()

    def packages(self, architecture: str, names: Sequence[str]) -> list[Package]:
        """The packages of these names, in this order. Raises :class:`UnavailableError` naming one that isn't there."""
        index = self._index(f"main/binary-{architecture}/Packages.xz")
        (path,) = fetch([index], self._folder)
        try:
            with lzma.open(path, "rt", encoding="utf-8") as file:
                found = self._find(file.read(), set(names))
        except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise UnavailableError(f"{index.url}: damaged index: {error}") from error
        absent = [name for name in names if name not in found]
        if absent:
            raise UnavailableError(f"{self.mirror}: {self.suite} for {architecture} has no package {absent[0]}")
        return [found[name] for name in names]

    def fetch(self, packages: Iterable[Package], advance: Advance) -> list[Path]:
        """The ``.deb`` files, whole and of the sha256 that the index states."""
        return fetch([package.file for package in packages], self._folder, advance)

    def _index(self, name: str) -> File:
        if self._indices is None:
            self._indices = self._read_release()
        if name not in self._indices:
            raise UnavailableError(f"{self.mirror}: {self.suite} has no {name}")
        return self._indices[name]

    def _read_release(self) -> dict[str, File]:
        url = f"{self.mirror}/dists/{self.suite}"
        path = self._folder / "InRelease"
        fetch_unverified(f"{url}/InRelease", path)
        text = self._signed_text(path)
        codename = re.search(r"^Codename: *(\S+)", text, re.MULTILINE)
        if codename is None or codename[1] != self.suite:
            raise UnavailableError(f"{url}/InRelease: is not of {self.suite}, but of {codename and codename[1]}")
        indices = {}
        for row in re.split(r"^SHA256:", text, flags=re.MULTILINE)[-1].splitlines()[1:]:
            if not row.startswith(" "):
                break
            if found := re.fullmatch(r" *([0-9a-f]{64}) +([0-9]+) +(\S+)", row):
                sha256, size, name = found.groups()
                # By its hash, so that a mirror that changes meanwhile still has it.
                place = f"{url}/{name.rpartition('/')[0]}/by-hash/SHA256/{sha256}"
                indices[name] = File(place, sha256, int(size))
        return indices

    def _signed_text(self, path: Path) -> str:
        if not self.can_be_verified:
            if self.mirror.startswith("http://"):
                raise UnavailableError(
                    f"{self.mirror}: can't be trusted over http without gpgv and {self._keyring}: install gpgv and "
                    f"debian-archive-keyring, or set {MIRROR_VARIABLE} to an https address"
                )
            return path.read_text(encoding="utf-8", errors="replace")
        command = ["gpgv", "--quiet", "--keyring", str(self._keyring), "--output", "-", str(path)]
        process = subprocess.run(command, capture_output=True, check=False)
        if process.returncode:
            raise UnavailableError(
                f"{self.mirror}: the signature of {self.suite}'s InRelease is not Debian's: "
                f"{process.stderr.decode(errors='replace').strip().rpartition(chr(10))[2]}"
            )
        return process.stdout.decode(errors="replace")

    def _find(self, text: str, names: set[str]) -> dict[str, Package]:
        found: dict[str, Package] = {}
        for stanza in text.split("\n\n"):
            name = stanza.partition("\n")[0].removeprefix("Package: ")
            if name not in names or name in found:
                continue
            fields = _fields(stanza)
            place, sha256, size = (fields.get(field, "") for field in ("Filename", "SHA256", "Size"))
            if not (SAFE_PATH.fullmatch(place) and SHA256.fullmatch(sha256) and size.isdecimal()):
                raise UnavailableError(f"{self.mirror}: the index's entry of {name} is malformed: {place!r}, {size!r}")
            found[name] = Package(name, fields["Version"], File(f"{self.mirror}/{place}", sha256, int(size)))
        return found
