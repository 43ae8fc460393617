"""The set-up of the emulated system: packages and indices that aren't what they say, what is interrupted, what rots."""

import hashlib
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.devices.debian_archive import entry, link, write_archive, write_deb

from pocketlm.devices.arm64_system import downloads
from pocketlm.devices.arm64_system.deb_archive import unpack_deb
from pocketlm.devices.arm64_system.debian import MIRROR_VARIABLE, DebianRelease, debian_mirror
from pocketlm.devices.arm64_system.downloads import File, fetch
from pocketlm.devices.arm64_system.progress import Progress
from pocketlm.devices.arm64_system.set_up import Arm64System, find_system, set_up
from pocketlm.errors import UnavailableError

SOUND = (
    entry("./", kind=tarfile.DIRTYPE, mode=0o755),
    entry("./usr/bin/tool", b"\x7fELF" + bytes(3000), mode=0o4755),
    entry("./usr/lib/libtool.so.1.2", b"library"),
    link("./usr/lib/libtool.so.1", "libtool.so.1.2"),
    link("./usr/lib/loader", "/lib/loader"),
    link("./usr/bin/same", "./usr/bin/tool", tarfile.LNKTYPE),
)


@pytest.fixture(params=["apt", "Python"])
def downloader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Either way of fetching; apt's only where there is one."""
    if request.param == "Python" or not downloads.APT_DOWNLOADER.exists():
        monkeypatch.setattr(downloads, "APT_DOWNLOADER", tmp_path / "none")
    return request.param


def test_a_package_is_unpacked_without_its_owners_and_special_bits(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    unpack_deb(write_deb(tmp_path / "a.deb", SOUND), root)
    assert (root / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755
    assert (root / "usr/bin/same").read_bytes() == (root / "usr/bin/tool").read_bytes()
    assert (root / "usr/lib/libtool.so.1").read_bytes() == b"library"
    assert (root / "usr/lib/loader").readlink() == Path("../../lib/loader")
    unpack_deb(tmp_path / "a.deb", tmp_path / "chosen", lambda name: name.startswith("usr/lib/"))
    assert sorted(path.name for path in (tmp_path / "chosen").rglob("*") if not path.is_dir()) == [
        "libtool.so.1", "libtool.so.1.2", "loader",
    ]  # fmt: skip


HOSTILE = {
    "a name above the folder": ([entry("../outside", b"x")], "leaves the folder"),
    "a name within that goes above": ([entry("./usr/../../outside", b"x")], "leaves the folder"),
    "an absolute name": ([entry("/outside", b"x")], "leaves the folder"),
    "a link that leaves": ([link("./usr/out", "../../outside")], "outside the folder"),
    "an absolute link that leaves": ([link("./usr/out", "/../outside")], "outside the folder"),
    "a file through a link": ([link("./place", "usr"), entry("./place/file", b"x")], "through the link 'place'"),
    "a folder over a link": ([link("./place", "usr"), entry("./place", kind=tarfile.DIRTYPE)], "already a link"),
    "a hard link that leaves": ([link("./in", "../outside", tarfile.LNKTYPE)], "leaves the folder"),
    "a hard link to a link": ([link("./a", "b"), link("./c", "./a", tarfile.LNKTYPE)], "no file before it"),
    "a device": ([entry("./dev/null", kind=tarfile.CHRTYPE)], "neither file, folder nor link"),
    "a pipe": ([entry("./pipe", kind=tarfile.FIFOTYPE)], "neither file, folder nor link"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_package_writes_nothing_outside(case, tmp_path):
    entries, reason = HOSTILE[case]
    (tmp_path / "outside").write_bytes(b"untouched")
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UnavailableError, match=reason) as raised:
        unpack_deb(write_deb(tmp_path / "bad.deb", entries), root)
    assert "bad.deb" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.deb", "outside", "root"]
    assert (tmp_path / "outside").read_bytes() == b"untouched"


@pytest.mark.parametrize(("member", "start"), [("data.tar.zst", b""), ("data.tar.xz", b"\x7fELF")])
def test_what_is_no_package_of_this_format_is_refused(member, start, tmp_path):
    deb = write_deb(tmp_path / "other.deb", SOUND, member=member)
    deb.write_bytes(start + deb.read_bytes()[len(start) :])
    with pytest.raises(UnavailableError, match=r"other\.deb: (not a Debian package|holds no data\.tar\.xz)"):
        unpack_deb(deb, tmp_path / "root")


@given(cut=st.integers(0, 10_000), change=st.integers(0, 10_000), to=st.integers(0, 255))
def test_a_damaged_package_is_unpacked_or_refused(cut, change, to, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    deb = write_deb(folder / "a.deb", SOUND)
    data = bytearray(deb.read_bytes())
    data[change % len(data)] = to
    deb.write_bytes(data[: max(1, cut % len(data))] if cut % 2 else data)
    try:
        unpack_deb(deb, folder / "root")
    except UnavailableError as error:
        assert "a.deb" in str(error)
    assert {path.name for path in folder.iterdir()} <= {"a.deb", "root"}
    shutil.rmtree(folder)


def release(address: str, folder: Path) -> DebianRelease:
    """Nobody signed the tests' archives."""
    return DebianRelease(address, "bookworm", folder, keyring=folder / "no keyring")


@pytest.mark.usefixtures("downloader")
def test_packages_are_found_fetched_and_not_fetched_twice(tmp_path):
    deb = write_deb(tmp_path / "tool.deb", SOUND)
    archive = release(write_archive(tmp_path / "archive", {"tool": deb, "other": deb}), tmp_path / "downloads")
    (package,) = archive.packages("arm64", ["tool"])
    assert (package.name, package.version) == ("tool", "1.0-1")
    (file,) = archive.fetch([package], lambda _bytes: None)
    assert file.read_bytes() == deb.read_bytes()
    shutil.rmtree(tmp_path / "archive")
    assert archive.fetch([package], lambda _bytes: None) == [file]


FALSE_INDICES = {
    "another hash": ({"SHA256": "0" * 64}, r"tool\.deb: \d+ bytes arrived that aren't the \d+ of sha256 0{64}"),
    "another size": ({"Size": "7"}, r"bytes arrived that aren't the 7 of sha256"),
    "a path above": ({"Filename": "pool/../../../etc/passwd"}, "entry of tool is malformed"),
    "another host": ({"Filename": "http://elsewhere/tool.deb"}, "entry of tool is malformed"),
    "an option as a path": ({"Filename": "-o"}, "entry of tool is malformed"),
    "no hash": ({"SHA256": "abc"}, "entry of tool is malformed"),
    "no size": ({"Size": "-1"}, "entry of tool is malformed"),
}


@pytest.mark.parametrize("case", FALSE_INDICES)
@pytest.mark.usefixtures("downloader")
def test_an_index_that_is_false_is_noticed(case, tmp_path):
    fields, reason = FALSE_INDICES[case]
    deb = write_deb(tmp_path / "tool.deb", SOUND)
    archive = release(write_archive(tmp_path / "archive", {"tool": deb}, **fields), tmp_path / "downloads")
    with pytest.raises(UnavailableError, match=reason):
        archive.fetch(archive.packages("arm64", ["tool"]), lambda _bytes: None)
    assert not [path for path in (tmp_path / "downloads").iterdir() if path.name in (fields.get("SHA256"), "tool.deb")]


def altered(archive: Path, place: str, change: Callable[[bytes], bytes]) -> None:
    (path,) = archive.glob(place)
    path.write_bytes(change(path.read_bytes()))


DAMAGE = {
    "a truncated index": ("dists/*/main/*/by-hash/SHA256/*", lambda data: data[:-9], "bytes arrived that aren't the"),
    "an altered index": ("dists/*/main/*/by-hash/SHA256/*", lambda data: data[:-1] + b"x", "bytes arrived"),
    "a truncated package": ("pool/tool.deb", lambda data: data[:100], "100 bytes arrived that aren't the"),
    "another release": ("dists/*/InRelease", lambda data: data.replace(b"bookworm", b"sid"), "not of bookworm, but of"),
    "no release": ("dists/*/InRelease", lambda _data: b"<html>", "is not of bookworm"),
    "a release without the architecture": ("dists/*/InRelease", lambda data: data.replace(b"arm64", b"i386"), "has no"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.usefixtures("downloader")
def test_a_damaged_archive_is_noticed(case, tmp_path):
    place, change, reason = DAMAGE[case]
    address = write_archive(tmp_path / "archive", {"tool": write_deb(tmp_path / "tool.deb", SOUND)})
    altered(tmp_path / "archive", place, change)
    archive = release(address, tmp_path / "downloads")
    with pytest.raises(UnavailableError, match=reason):
        archive.fetch(archive.packages("arm64", ["tool"]), lambda _bytes: None)


@pytest.mark.usefixtures("downloader")
def test_what_a_mirror_has_not_is_named(tmp_path):
    deb = write_deb(tmp_path / "tool.deb", SOUND)
    archive = release(write_archive(tmp_path / "archive", {"tool": deb}), tmp_path / "downloads")
    with pytest.raises(UnavailableError, match="bookworm for arm64 has no package spoon"):
        archive.packages("arm64", ["tool", "spoon"])
    with pytest.raises(UnavailableError, match=r"download failed: .*nowhere"):
        release((tmp_path / "nowhere").as_uri(), tmp_path / "downloads").packages("arm64", ["tool"])


def test_without_a_signature_http_is_refused_before_anything_is_believed(tmp_path, served):
    address = served(tmp_path / "archive")
    write_archive(tmp_path / "archive", {"tool": write_deb(tmp_path / "tool.deb", SOUND)})
    with pytest.raises(UnavailableError, match="can't be trusted over http without gpgv"):
        release(address, tmp_path / "downloads").packages("arm64", ["tool"])


def test_a_signature_that_is_not_debians_is_refused(tmp_path):
    """Debian's own index, one of whose hashes was replaced."""
    real = DebianRelease(debian_mirror(), "bookworm", tmp_path / "real")
    if not real.can_be_verified:
        pytest.fail("needs gpgv and debian-archive-keyring: apt-get install gpgv debian-archive-keyring")
    real.packages("arm64", ["libc6"])
    signed = (tmp_path / "real" / "InRelease").read_text()
    false = write_archive(tmp_path / "false", {"tool": write_deb(tmp_path / "tool.deb", SOUND)})
    listed = (tmp_path / "false/dists/bookworm/InRelease").read_text().rpartition("SHA256:\n")[2]
    (tmp_path / "false/dists/bookworm/InRelease").write_text(signed.replace("SHA256:\n", f"SHA256:\n{listed}", 1))
    with pytest.raises(UnavailableError, match="the signature of bookworm's InRelease is not Debian's"):
        DebianRelease(false, "bookworm", tmp_path / "downloads").packages("arm64", ["tool"])


@pytest.fixture
def served() -> Callable[[Path], str]:
    """``served(folder)`` -> the address of a server on loopback, which cuts the first answer to each request off."""
    servers = []

    def serve(folder: Path, cut: int | None = None) -> str:
        asked: set[str] = set()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = (folder / self.path.lstrip("/")).read_bytes()
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(data) - first))
                self.send_header("Last-Modified", "Sat, 11 Jul 2026 10:16:37 GMT")
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                stop = len(data) if cut is None or self.path in asked else first + cut
                asked.add(self.path)
                self.wfile.write(data[first:stop])
                self.close_connection = True

            def log_message(self, *_arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("downloader")
def test_a_download_that_was_cut_off_is_completed_by_the_next_call(tmp_path, served):
    data = os.urandom(200_000)
    (tmp_path / "file").write_bytes(data)
    address = served(tmp_path, cut=70_000)
    file = File(f"{address}/file", hashlib.sha256(data).hexdigest(), len(data))
    for _attempt in range(2):
        try:
            (path,) = fetch([file], tmp_path / "downloads")
            break
        except UnavailableError as error:
            assert f"{address}/file" in str(error)
            assert not (tmp_path / "downloads" / file.sha256).exists()
    assert path.read_bytes() == data


SOURCES = {
    "debian.sources": (
        "Types: deb\nURIs: http://a.example/debian-security\nSuites: bookworm-security\n\n"
        "Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: bookworm\n\n"
        "# a comment\nTypes: deb-src\nURIs: http://source.example/debian\nSuites: bookworm\n\n"
        "Types: deb\nURIs: https://mirror.example/debian/\nSuites: bookworm\n bookworm-updates\nComponents: main\n"
    ),
    "sources.list": (
        "# deb http://off.example/debian bookworm main\n"
        "deb-src http://source.example/debian bookworm main\n"
        "deb [signed-by=/a/key arch=amd64] https://mirror.example/debian bookworm main\n"
    ),
}


@pytest.mark.parametrize("file", SOURCES)
def test_the_machines_own_mirror_is_taken_on_a_debian(file, tmp_path, monkeypatch):
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)
    place = tmp_path / file if file == "sources.list" else tmp_path / "sources.list.d" / file
    place.parent.mkdir(exist_ok=True)
    place.write_text(SOURCES[file])
    system = tmp_path / "os-release"
    system.write_text('NAME="Debian GNU/Linux"\nID=debian\n')
    assert debian_mirror(tmp_path, system) == "https://mirror.example/debian"
    system.write_text("ID=ubuntu\nID_LIKE=debian\n")
    assert debian_mirror(tmp_path, system).endswith("/debian") and "example" not in debian_mirror(tmp_path, system)
    monkeypatch.setenv(MIRROR_VARIABLE, "https://other.example/debian/")
    assert debian_mirror(tmp_path, system) == "https://other.example/debian"


@pytest.fixture
def own_copy(arm64_system: Arm64System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's own system. Its files are links to the user's: they are replaced, never changed."""
    copy = tmp_path / "pocketlm" / "devices" / arm64_system.folder.name
    shutil.copytree(arm64_system.folder, copy, symlinks=True, copy_function=os.link)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return copy


def stages(progress: list[str]) -> Progress:
    return Progress(stage=lambda name, _bytes: progress.append(name))


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_a_second_set_up_does_nothing(own_copy):
    made: list[str] = []
    set_up(stages(made))
    assert made == []
    assert find_system().folder == own_copy


def test_damage_is_noticed_and_only_that_part_is_made_again(own_copy):
    counter = own_copy / "counter" / "instruction_counter.so"
    sound = counter.read_bytes()
    replaced(counter, sound[:100])
    with pytest.raises(UnavailableError, match=r"damaged: instruction_counter\.so was altered: run 'pocketlm devices"):
        find_system()
    replaced(counter, bytes([sound[0] ^ 1]) + sound[1:])  # of the same size: seen by its hash
    made: list[str] = []
    set_up(stages(made))
    assert made == ["compiling the counter of instructions"]
    assert counter.read_bytes() == sound
    library = own_copy / "root/lib/aarch64-linux-gnu/libc.so.6"
    library.unlink()
    with pytest.raises(UnavailableError, match=r"root: damaged: lib/aarch64-linux-gnu/libc\.so\.6 is missing"):
        find_system()


def fetched_files(folder: Path) -> dict[str, int]:
    """The whole ones, named by their hashes, and when each was written."""
    files = (path for path in (folder / "downloads").iterdir() if len(path.name) == 64)
    return {path.name: path.stat().st_mtime_ns for path in files}


class Stopped(BaseException):
    """As Ctrl-C."""


def test_an_interrupted_set_up_leaves_nothing_half_made_and_goes_on(own_copy):
    shutil.rmtree(own_copy / "root")

    def stop(name: str, _bytes: int) -> None:
        if name == "unpacking root":
            raise Stopped

    with pytest.raises(Stopped):
        set_up(Progress(stage=stop))
    assert not (own_copy / "root").exists()
    with pytest.raises(UnavailableError, match="root: not set up"):
        find_system()
    fetched = fetched_files(own_copy)
    assert len(fetched) > 10

    made: list[str] = []
    seen: dict[str, int] = {}

    def look(name: str, _bytes: int) -> None:
        made.append(name)
        if name == "unpacking root":
            seen.update(fetched_files(own_copy))

    set_up(Progress(stage=look))
    assert seen == fetched  # nothing was fetched twice
    # The packages' bytecode is of the files that are new now.
    assert made[-2:] == ["unpacking root", "starting the emulated Python"]
    assert not any("compiling" in name or "wheels" in name for name in made)
    assert find_system().folder == own_copy
    assert not (own_copy / "downloads").exists()


def test_a_folder_that_search_paths_cannot_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    with pytest.raises(UnavailableError, match="without a colon"):
        set_up(Progress())
