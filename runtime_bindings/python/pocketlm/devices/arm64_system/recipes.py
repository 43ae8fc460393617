"""What an emulated arm64 system is made of, part by part, and how each part is made."""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pocketlm.devices.arm64_system.deb_archive import unpack_deb
from pocketlm.devices.arm64_system.debian import DebianRelease
from pocketlm.devices.arm64_system.emulation import COUNTER_IN_ROOT, emulated_python, environment, write_machine
from pocketlm.devices.arm64_system.parts import PartStore, Recipe
from pocketlm.devices.arm64_system.profiles import DEFAULT_PROFILE, PROFILES
from pocketlm.devices.arm64_system.progress import Progress
from pocketlm.errors import UnavailableError

__all__ = ["SUITE", "native_source", "recipes"]

SUITE = "bookworm"
HERE = Path(__file__).parent
REQUIREMENTS, COUNTER, CLOCK = HERE / "requirements.txt", HERE / "instruction_counter.c", HERE / "emulated_clock.cpp"
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


# What the agent and the runtimes import; of two runtimes also that their libraries load.
ONCE = """
import argparse, contextlib, ctypes, dataclasses, datetime, hashlib, importlib.metadata, json, math, platform, re, runpy
import secrets, shutil, subprocess, sys, tempfile, threading, typing, weakref
import numpy, onnxruntime, executorch
(folder,) = __import__("pocketlm_native").__path__
ctypes.CDLL(f"{folder}/libpocketlm_executorch.so")
print(platform.python_version())
"""


def recipes(store: PartStore, release: DebianRelease, progress: Progress) -> list[Recipe]:
    """All parts, in the order in which they need one another."""

    def unpacked(name: str, architecture: str, names: Sequence[str], wanted: Callable[[str], bool]) -> Recipe:
        def make(folder: Path) -> Mapping[str, str]:
            return _unpack_packages(release, architecture, names, wanted, folder, progress)

        return Recipe(name, f"{UNPACKING} {SUITE} {architecture} {' '.join(names)}", make)

    root = unpacked("root", "arm64", ROOT, _of_root)
    emulator = unpacked("emulator", HOST, EMULATOR, _of_emulator)
    compiler = replace(unpacked("compiler", HOST, COMPILER, _of_compiler), tool=True)
    wheels = Recipe("wheels", _key(REQUIREMENTS), lambda folder: _install_wheels(folder, progress))
    native = Recipe(
        "native",
        _key(*_sources(native_source())),
        lambda folder: _compile_native(store, folder, progress),
        needs=("compiler", "wheels"),
    )
    counter = Recipe(
        "counter",
        _key(COUNTER, CLOCK),
        lambda folder: _compile_counter(store.path("compiler"), folder, progress),
        needs=("compiler",),
    )
    profiles = Recipe("profiles", _key(HERE / "profiles.py", HERE / "emulation.py"), _link_profiles)
    bytecode = Recipe(
        "bytecode",
        _text_key(ONCE),
        lambda folder: _compile_bytecode(store, folder, progress),
        needs=("root", "emulator", "wheels", "native", "profiles"),
    )
    return [root, emulator, compiler, wheels, native, counter, profiles, bytecode]


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
    source, build = native_source(), folder / "build"
    (folder / "tools").mkdir()
    # The folders' names would reach the library through __FILE__, and move its code by a few instructions.
    maps = (f"-ffile-prefix-map={place}={name}" for place, name in ((store.folder, "."), (source, "native")))
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_SYSROOT": store.path("compiler"),
        "CMAKE_CXX_COMPILER": _write_cross_compiler(store.path("compiler"), folder / "tools/g++"),
        "CMAKE_CXX_FLAGS": shlex.join(maps),
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


def _write_cross_compiler(compiler: Path, script: Path) -> Path:
    script.write_text(COMPILER_SCRIPT.format(compiler=shlex.quote(str(compiler))), encoding="utf-8")
    script.chmod(0o755)
    return script


def _cmake(tools: Path) -> str:
    """The host's if it is new enough, else one from PyPI in ``tools``."""
    found = shutil.which("cmake")
    if found:
        version = re.search(r"(\d+)\.(\d+)", _run(found, "--version"))
        if version and (int(version[1]), int(version[2])) >= OLDEST_CMAKE:
            return found
    _pip("install", "--target", str(tools), "--only-binary=:all:", "cmake")
    return str(tools / "cmake/data/bin/cmake")


def _compile_counter(compiler: Path, folder: Path, progress: Progress) -> Mapping[str, str]:
    progress.stage("compiling the counter of instructions", 0)
    options = ("-shared", "-fPIC", "-O2", "-nostdlib", "-o")
    _run("cc", *options, folder / "instruction_counter.so", COUNTER)
    cross = _write_cross_compiler(compiler, folder / "g++")
    _run(
        cross,
        f"--sysroot={compiler}",
        "-fno-threadsafe-statics",
        "-mno-outline-atomics",
        *options,
        folder / "emulated_clock.so",
        CLOCK,
    )
    cross.unlink()
    return {"source": f"sha256:{_key(COUNTER, CLOCK)}"}


def _link_profiles(folder: Path) -> Mapping[str, str]:
    """A root for each CPU: the emulator finds /proc/cpuinfo in it, and all else through links."""
    for name, profile in PROFILES.items():
        write_machine(profile, folder / name)
        for top in ("lib", "usr", "etc"):
            (folder / name / top).symlink_to(Path("../../root") / top)
        (folder / name / COUNTER_IN_ROOT.lstrip("/")).symlink_to(Path("../../counter"))
    return {name: profile.kernels for name, profile in PROFILES.items()}


def _compile_bytecode(store: PartStore, folder: Path, progress: Progress) -> Mapping[str, str]:
    """Import once, on the emulated CPU, what each job imports: bytecode is left, and it is known to work."""
    progress.stage("starting the emulated Python", 0)
    settings = {
        **environment(store.folder),
        "PYTHONPYCACHEPREFIX": str(folder),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    printed = _run(*emulated_python(store.folder, DEFAULT_PROFILE), "-P", "-c", ONCE, environment=settings)
    return {"Python": printed.strip()}


def _pip(*arguments: str) -> None:
    _run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments)


def _run(*command: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """What the command printed. Raises :class:`UnavailableError` with what it said of an error if it fails."""
    process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
    )
    if process.returncode:
        lines = [line for line in (process.stdout + process.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["it said nothing"]
        raise UnavailableError(f"{Path(command[0]).name} failed with exit code {process.returncode}: {errors[0]}")
    return process.stdout
