"""A device's side of adb on loopback, which fails on demand. The real adb client and server talk to it.

It speaks what they need: CNXN, OPEN, WRTE, OKAY, CLSE; sync (the first version) and shell,v2. Commands run
on this host. Source: protocol.txt, SYNC.TXT and shell_protocol.h of Android's packages/modules/adb.
"""

import itertools
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

HEADER = struct.Struct("<6I")  # command, two arguments, length, checksum, magic
SYNC, DONE = struct.Struct("<4sI"), b"DONE" + bytes(4)
VERSION, LARGEST = 0x01000001, 1 << 18
CNXN, OPEN, OKAY, WRTE, CLSE, AUTH = (
    int.from_bytes(name, "little") for name in (b"CNXN", b"OPEN", b"OKAY", b"WRTE", b"CLSE", b"AUTH")
)
STDOUT, EXIT = 1, 3  # of shell_protocol.h
TOKEN = 1  # what AUTH sends: bytes to be signed


class BrokenError(Exception):
    """The connection ends here."""


@dataclass
class Fault:
    """What goes wrong, once, in the next ``service`` whose path or command holds ``concerning``.

    ``disconnect``: the connection is cut in the middle; ``hang``: nothing more comes; ``full``: the disk is;
    ``garbage``: bytes that aren't the protocol's.
    """

    service: Literal["push", "pull", "shell"]
    kind: Literal["disconnect", "hang", "full", "garbage"]
    concerning: str = ""


@dataclass
class DeviceServer:
    """Accepts adb's server at ``serial``, until it is closed. ``shell`` runs commands in ``environment``."""

    environment: Mapping[str, str]
    model: str = "Pretended_Phone"
    shell: str = "/bin/sh"
    unauthorized: bool = False
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """What was asked: ``push PATH``, ``pull PATH``, ``shell COMMAND``."""

    def __post_init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.connections: list[Connection] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._listening.accept()
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(peer, self)
                self.connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()

    def fault(self, service: str, what: str) -> str:
        """The kind of the fault that this one hits, which is used up."""
        self.log.append(f"{service} {what}")
        for fault in self.faults:
            if fault.service == service and fault.concerning in what:
                self.faults.remove(fault)
                return fault.kind
        return ""

    def disconnect(self) -> None:
        for connection in self.connections:
            connection.cut()
        self.connections.clear()

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listening.close()
        self.disconnect()


class Stream:
    """One service: what adb writes to it is read here in order; what is written here adb acknowledges."""

    def __init__(self, connection: "Connection", local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self._arrived, self._changed = bytearray(), threading.Condition()
        self._ready, self._ended = False, False

    def arrived(self, data: bytes) -> None:
        with self._changed:
            self._arrived += data
            self._changed.notify_all()
        self.connection.send(OKAY, self.local, self.remote)

    def acknowledged(self) -> None:
        with self._changed:
            self._ready = True
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def read(self, count: int) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._arrived) >= count)
            if len(self._arrived) < count:
                raise BrokenError
            data = bytes(self._arrived[:count])
            del self._arrived[:count]
            return data

    def write(self, data: bytes) -> None:
        for begin in range(0, len(data), self.connection.largest):
            with self._changed:
                self._ready = False
            part = data[begin : begin + self.connection.largest]
            self.connection.send(WRTE, self.local, self.remote, part)
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._ready)
                if self._ended:
                    raise BrokenError


class Connection:
    """From adb's server. Each service has a thread of its own."""

    def __init__(self, peer: socket.socket, server: DeviceServer) -> None:
        self._peer, self._server, self._sending = peer, server, threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)
        self.largest, self._version = 4096, 0x01000000

    def serve(self) -> None:
        with suppress(BrokenError, OSError):
            while True:
                command, first, second, length, _, _ = HEADER.unpack(self._receive(HEADER.size))
                self._handle(command, first, second, self._receive(length))
        for stream in list(self._streams.values()):
            stream.end()
        self._peer.close()

    def cut(self) -> None:
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        checksum = sum(data) if self._version < VERSION else 0
        header = HEADER.pack(command, first, second, len(data), checksum, command ^ 0xFFFFFFFF)
        with self._sending:
            self._peer.sendall(header + data)

    def send_garbage(self) -> None:
        with self._sending:
            self._peer.sendall(bytes(range(256)) * 4)

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._peer.recv(count - len(data))
            if not part:
                raise BrokenError
            data += part
        return bytes(data)

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        if command == CNXN:
            self._version, self.largest = min(first, VERSION), min(second, LARGEST)
            if self._server.unauthorized:
                self.send(AUTH, TOKEN, 0, bytes(20))
                return
            names = ("name", "model", "device")
            properties = "".join(f"ro.product.{name}={self._server.model};" for name in names)
            self.send(CNXN, self._version, self.largest, f"device::{properties}features=shell_v2,cmd".encode())
        elif command == AUTH:  # a signature, or a key that nobody allows
            self.send(AUTH, TOKEN, 0, bytes(20))
        elif command == OPEN:
            stream = Stream(self, next(self._numbers), first)
            self._streams[stream.local] = stream
            threading.Thread(target=self._serve_stream, args=(stream, data.rstrip(b"\0")), daemon=True).start()
        elif second in self._streams:
            stream = self._streams[second]
            {WRTE: stream.arrived, OKAY: lambda _: stream.acknowledged(), CLSE: lambda _: stream.end()}[command](data)

    def _serve_stream(self, stream: Stream, name: bytes) -> None:
        kind, _, argument = name.partition(b":")
        with suppress(BrokenError, OSError):
            if kind == b"sync":
                self.send(OKAY, stream.local, stream.remote)
                while self._sync(stream):
                    pass
            elif kind.startswith(b"shell,v2"):
                self.send(OKAY, stream.local, stream.remote)
                self._shell(stream, argument)
        with suppress(OSError):
            self.send(CLSE, stream.local, stream.remote)

    def _meet(self, kind: str, stream: Stream) -> None:
        """Let the fault happen that concerns any service."""
        if kind == "disconnect":
            self.cut()
            raise BrokenError
        if kind == "garbage":
            self.send_garbage()
            raise BrokenError
        if kind == "hang":
            stream.read(LARGEST)  # which never comes
        if kind == "full":
            raise OSError("No space left on device")

    def _sync(self, stream: Stream) -> bool:
        command, length = SYNC.unpack(stream.read(SYNC.size))
        argument = stream.read(length) if length else b""
        if command == b"QUIT":
            return False
        if command in (b"STAT", b"LSTA"):
            stream.write(b"STAT" + _status(Path(os.fsdecode(argument))))
        elif command == b"LIST":
            folder = Path(os.fsdecode(argument))
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                name = os.fsencode(path.name)
                stream.write(b"DENT" + _status(path) + struct.pack("<I", len(name)) + name)
            stream.write(b"DONE" + bytes(16))
        elif command == b"RECV":
            self._receive_file(stream, Path(os.fsdecode(argument)))
        elif command == b"SEND":
            path, mode = argument.rsplit(b",", 1)
            self._send_file(stream, Path(os.fsdecode(path)), int(mode))
        return True

    def _receive_file(self, stream: Stream, path: Path) -> None:
        fault = self._server.fault("pull", str(path))
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 16):
                    stream.write(SYNC.pack(b"DATA", len(block)) + (block[: len(block) // 2] if fault else block))
                    self._meet(fault, stream)
            stream.write(DONE)
        except FileNotFoundError as error:
            _refuse(stream, str(error).encode())

    def _send_file(self, stream: Stream, path: Path, mode: int) -> None:
        fault = self._server.fault("push", str(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                while (header := SYNC.unpack(stream.read(SYNC.size)))[0] == b"DATA":
                    file.write(stream.read(header[1]))
                    self._meet(fault, stream)
            path.chmod(mode & 0o777)
            stream.write(b"OKAY" + bytes(4))
        except OSError as error:
            _refuse(stream, str(error).encode())
            while (header := SYNC.unpack(stream.read(SYNC.size)))[0] == b"DATA":
                stream.read(header[1])

    def _shell(self, stream: Stream, command: bytes) -> None:
        fault = self._server.fault("shell", os.fsdecode(command))
        if fault in ("hang", "garbage"):
            self._meet(fault, stream)
        # As of a full disk: no file can grow.
        limited = b"ulimit -f 0; " + command if fault == "full" else command
        process = subprocess.Popen(
            [self._server.shell, "-c", limited],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(self._server.environment),
            cwd="/",
        )
        if fault == "disconnect":
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            self._meet(fault, stream)
        assert process.stdout is not None
        with process.stdout as output:
            while block := output.read1(1 << 12):
                stream.write(struct.pack("<BI", STDOUT, len(block)) + block)
        stream.write(struct.pack("<BIB", EXIT, 1, process.wait() & 0xFF))


def _status(path: Path) -> bytes:
    """Mode, size and time of change; zeros for what isn't there."""
    try:
        status = path.stat()
    except OSError:
        return bytes(12)
    return struct.pack("<3I", status.st_mode, status.st_size, int(status.st_mtime))


def _refuse(stream: Stream, reason: bytes) -> None:
    stream.write(SYNC.pack(b"FAIL", len(reason)) + reason)


def processes_in(folder: Path) -> Iterator[int]:
    """The processes whose current folder lies in ``folder``."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(folder):
                yield int(process.name)


def end_processes_in(folder: Path) -> None:
    for process in processes_in(folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
