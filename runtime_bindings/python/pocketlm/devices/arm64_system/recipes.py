"""What an emulated arm64 system is made of, part by part, and how each part is made."""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pocketlm.devices.arm64_system.deb_archive import unpack_deb
from pocketlm.devices.arm64_system.debian import DebianRelease
from pocketlm.devices.arm64_system.parts import PartStore, Recipe
from pocketlm.devices.arm64_system.profiles import PROFILES
from pocketlm.devices.arm64_system.progress import Progress
from pocketlm.errors import UnavailableError

__all__ = ["SUITE", "native_source", "recipes"]

SUITE = "bookworm"
HERE = Path(__file__).parent
REQUIREMENTS, COUNTER = HERE / "requirements.txt", HERE / "instruction_counter.c"
UNPACKING = 1  # changes with which of the packages' files are kept
OLDEST_CMAKE = (3, 19)

# Listed rather than followed from one another: much that a distribution needs to install a package, running it doesn't.
ROOT = (
    "libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libuuid1 "
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
).split()
EMULATOR = (
    "qemu-user libc6 libcapstone4 libgcc-s1 libglib2.0-0 libpcre2-8-0 libgnutls30 libgmp10 libhogweed6 libidn2-0 "
    "libnettle8 libp11-kit0 libffi8 libtasn1-6 libunistring2 libnuma1 liburing2 zlib1g"
).split()
COMPILER = (
    "g++-12-aarch64-linux-gnu gcc-12-aarch64-linux-gnu cpp-12-aarch64-linux-gnu binutils-aarch64-linux-gnu libbinutils "
    "libjansson4 libisl23 libmpc3 libmpfr6 libgmp10 libzstd1 zlib1g libstdc++-12-dev-arm64-cross "
    "libgcc-12-dev-arm64-cross libc6-dev-arm64-cross linux-libc-dev-arm64-cross libgcc-s1-arm64-cross "
    "libstdc++6-arm64-cross libc6-arm64-cross"
).split()
HOST = "amd64"
# With the libraries of the compiler that a host may lack; its C library is the host's.
COMPILER_SCRIPT = """#!/bin/sh
LD_LIBRARY_PATH={compiler}/usr/lib/x86_64-linux-gnu exec {compiler}/usr/bin/aarch64-linux-gnu-g++-12 "$@"
"""


def recipes(store: PartStore, release: DebianRelease, progress: Progress) -> list[Recipe]:
    """All parts, in the order in which they need one another."""

    def unpacked(name: str, architecture: str, names: Sequence[str], wanted: Callable[[str], bool]) -> Recipe:
        def make(folder: Path) -> Mapping[str, str]:
            return _unpack_packages(release, architecture, names, wanted, folder, progress)

        return Recipe(name, f"{UNPACKING} {SUITE} {architecture} {' '.join(names)}", make)

    root = unpacked("root", "arm64", ROOT, _of_root)
    emulator = unpacked("emulator", HOST, EMULATOR, _of_emulator)
    compiler = unpacked("compiler", HOST, COMPILER, _of_compiler)
    wheels = Recipe("wheels", _key(REQUIREMENTS), lambda folder: _install_wheels(folder, progress))
    native = Recipe(
        "native",
        f"{compiler.key}\n{wheels.key}\n{_key(*_sources(native_source()))}",
        lambda folder: _compile_native(store, folder, progress),
    )
    counter = Recipe("counter", _key(COUNTER), lambda folder: _compile_counter(folder, progress))
    texts = (profile.cpuinfo for profile in PROFILES.values())
    return [root, emulator, compiler, wheels, native, counter, Recipe("profiles", _text_key(*texts), _link_profiles)]


def native_source() -> Path:
    """The C++ of the native ExecuTorch session: in an installed package, else in the repository."""
    places = (HERE.parents[1] / "native", HERE.parents[3] / "native")
    for place in places:
        if (place / "CMakeLists.txt").is_file():
            return place
    raise UnavailableError(f"{places[0]}: the native ExecuTorch session's source is missing: install PocketLM anew")


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h", ".txt"))


def _key(*files: Path) -> str:
    return _text_key(*(file.read_text(encoding="utf-8") for file in files))


def _text_key(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _of_root(name: str) -> bool:
    return not name.startswith("usr/share/")


def _of_emulator(name: str) -> bool:
    return name == "usr/bin/qemu-aarch64" or name.startswith(("lib/", "lib64/", "usr/lib/"))


def _of_compiler(name: str) -> bool:
    """Without the compilers of C and of link-time optimization, which are half of it."""
    return not name.startswith("usr/share/") and Path(name).name not in ("cc1", "lto1")


def _unpack_packages(
    release: DebianRelease,
    architecture: str,
    names: Sequence[str],
    wanted: Callable[[str], bool],
    folder: Path,
    progress: Progress,
) -> Mapping[str, str]:
    progress.stage(f"reading the index of Debian {release.suite} for {architecture}", 0)
    packages = release.packages(architecture, names)
    progress.stage(f"fetching packages for {folder.stem}", sum(package.file.size for package in packages))
    files = release.fetch(packages, progress.advance)
    progress.stage(f"unpacking {folder.stem}", sum(package.file.size for package in packages))
    for package, file in zip(packages, files, strict=True):
        unpack_deb(file, folder, wanted)
        progress.advance(package.file.size)
    signature = "checked" if release.can_be_verified else "not checked: no gpgv or no keyring"
    versions = {package.name: f"{package.version} sha256:{package.file.sha256}" for package in packages}
    return {"suite": release.suite, "signature": signature, **versions}


def _install_wheels(folder: Path, progress: Progress) -> Mapping[str, str]:
    progress.stage("installing wheels for arm64", 0)
    platforms = [f"--platform={name}_aarch64" for name in ("manylinux_2_28", "manylinux_2_27", "manylinux2014")]
    tags = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=abi3", "--abi=none"]
    chosen = ["--only-binary=:all:", "--no-deps", "--require-hashes", "--no-compile"]
    _pip("install", "--target", str(folder), *chosen, *platforms, *tags, "--requirement", str(REQUIREMENTS))
    stated = re.findall(r"^(\S+)==(\S+) --hash=(\S+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: f"{version} {hash_}" for name, version, hash_ in stated}


def _compile_native(store: PartStore, folder: Path, progress: Progress) -> Mapping[str, str]:
    progress.stage("compiling the native ExecuTorch session for arm64", 0)
    source, build, compiler = native_source(), folder / "build", folder / "tools/g++"
    compiler.parent.mkdir()
    compiler.write_text(COMPILER_SCRIPT.format(compiler=shlex.quote(str(store.path("compiler")))), encoding="utf-8")
    compiler.chmod(0o755)
    # The folders' names would reach the library through __FILE__, and move its code by a few instructions.
    maps = " ".join(f"-ffile-prefix-map={place}={name}" for place, name in ((store.folder, "."), (source, "native")))
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_SYSROOT": store.path("compiler"),
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_CXX_FLAGS": maps,
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
        "CMAKE_BUILD_TYPE": "Release",
        "executorch_DIR": store.path("wheels") / "executorch/lib/cmake/executorch",
    }
    cmake = _cmake(folder / "tools")
    _run(cmake, "-S", source, "-B", build, "-G", "Unix Makefiles", *(f"-D{key}={at}" for key, at in settings.items()))
    _run(cmake, "--build", build, "--parallel", "2")
    _run(cmake, "--install", build, "--prefix", folder)
    for rest in (build, folder / "tools"):
        shutil.rmtree(rest)
    # Its library finds ExecuTorch's beside its own folder.
    (folder / "executorch").symlink_to(Path("../wheels/executorch"))
    return {"source": f"sha256:{_key(*_sources(source))}"}


def _cmake(tools: Path) -> str:
    """The host's if it is new enough, else one from PyPI in ``tools``."""
    found = shutil.which("cmake")
    if found:
        version = re.search(r"(\d+)\.(\d+)", _run(found, "--version"))
        if version and (int(version[1]), int(version[2])) >= OLDEST_CMAKE:
            return found
    _pip("install", "--target", str(tools), "--only-binary=:all:", "cmake")
    return str(tools / "cmake/data/bin/cmake")


def _compile_counter(folder: Path, progress: Progress) -> Mapping[str, str]:
    progress.stage("compiling the counter of instructions", 0)
    _run("cc", "-shared", "-fPIC", "-O2", "-nostdlib", "-o", folder / "instruction_counter.so", COUNTER)
    return {"source": f"sha256:{_key(COUNTER)}"}


def _link_profiles(folder: Path) -> Mapping[str, str]:
    """A root for each CPU: the emulator finds /proc/cpuinfo in it, and all else through links."""
    for name, profile in PROFILES.items():
        (folder / name / "proc").mkdir(parents=True)
        (folder / name / "proc" / "cpuinfo").write_text(profile.cpuinfo, encoding="utf-8")
        for top in ("lib", "usr", "etc"):
            (folder / name / top).symlink_to(Path("../../root") / top)
    return {name: profile.kernels for name, profile in PROFILES.items()}


def _pip(*arguments: str) -> None:
    _run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments)


def _run(*command: str | Path) -> str:
    """What the command printed. Raises :class:`UnavailableError` with the last line of what it said if it fails."""
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = [line for line in (process.stdout + process.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["it said nothing"]
        raise UnavailableError(f"{Path(command[0]).name} failed with exit code {process.returncode}: {errors[0]}")
    return process.stdout
