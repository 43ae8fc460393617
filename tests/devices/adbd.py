"""Debian's adbd on loopback, an Android device's own side of adb, and what it needs to run programs for arm64."""

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.devices.debian_files import unpacked_packages

SHIM = Path(__file__).with_name("adbd_shim.c")
# From backports: the release's own adbd knows neither shell,v2 nor a way to be reached but by USB.
BACKPORTS = "adbd android-libbase android-libboringssl android-libcutils android-liblog".split()
RELEASE = (
    "libbrotli1 libbsd0 libcap2 libgcrypt20 libgpg-error0 liblz4-1 liblzma5 libmd0 libprotobuf32 libsystemd0 libzstd1 "
    "zlib1g"
).split()
ADBD = "usr/lib/android-sdk/platform-tools/adbd"
PLACES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/android")


@contextmanager
def adbd_running(root: Path, port: int, emulator: Sequence[str]) -> Iterator[None]:
    """adbd at 127.0.0.1:``port`` until the end of the block; ``emulator``: the command that runs a program for arm64.

    What ``root/bin`` has comes before the host's commands.
    """
    shim, script = root / "adbd_shim.so", root / "emulator.sh"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, SHIM], check=True)
    script.write_text(f'exec {shlex.join(emulator)} "$@"\n')
    files = unpacked_packages("adbd", {"bookworm-backports": BACKPORTS, "bookworm": RELEASE})
    libraries = ":".join(str(files / place) for place in PLACES)
    process = subprocess.Popen(
        ["/lib64/ld-linux-x86-64.so.2", "--library-path", libraries, files / ADBD],
        cwd=root,
        env={
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "HOME": str(root),
            "TMPDIR": str(root),
            "LD_PRELOAD": str(shim),
            "ADBD_PORT": str(port),
            "EMULATOR": str(script),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(root / "adbd.log").open("wb"),
    )
    try:
        while process.poll() is None:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        assert process.poll() is None, (root / "adbd.log").read_text()
        yield
    finally:
        process.terminate()
        process.wait()
