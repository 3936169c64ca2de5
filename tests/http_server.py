"""A local HTTP server of a directory with ranges and ETags, and faults as an object store has them."""

import http.server
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FAULTS = ("503", "429", "reset", "short", "stall", "reset_body")
# Decides what happens to request number i; None: nothing.
FaultPlan = Callable[[int], str | None]


class ShardServer(http.server.ThreadingHTTPServer):
    """Serves files of `root`; counts requests and bytes; `plan` chooses the fault of each request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.plan: FaultPlan = lambda i: None
        self.requests: list[tuple[str, int, int]] = []  # path, first byte, size
        self.faults: list[str] = []
        self.count, self.lock = 0, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ShardServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        with self.server.lock:
            number, self.server.count = self.server.count, self.server.count + 1
            fault = self.server.plan(number)
            if fault:
                self.server.faults.append(fault)
        path = self.server.root / self.path.lstrip("/")
        if fault in ("503", "429"):
            return self._send(int(fault), b"")
        if fault == "reset":
            return self._reset()
        if not path.is_file():
            return self._send(404, b"")
        data = path.read_bytes()
        etag = f'"{path.stat().st_mtime_ns:x}"'
        if (wanted := self.headers.get("If-Match")) and wanted != etag:
            return self._send(412, b"")
        begin, end, status = 0, len(data), 200
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end, status = int(match[1]), int(match[2]) + 1 if match[2] else len(data), 206
        piece = data[begin:end]
        with self.server.lock:
            self.server.requests.append((path.name, begin, len(piece) if body else 0))
        head = {"ETag": etag, "Last-Modified": "Wed, 25 Nov 2026 08:00:00 GMT"}
        if status == 206:
            head["Content-Range"] = f"bytes {begin}-{begin + len(piece) - 1}/{len(data)}"
        self._send(status, piece, head, body=body, fault=fault)

    def _send(
        self,
        status: int,
        data: bytes,
        head: dict[str, str] | None = None,
        *,
        body: bool = True,
        fault: str | None = None,
    ) -> None:
        lines = [f"HTTP/1.1 {status} x", *(f"{k}: {v}" for k, v in (head or {}).items())]
        message = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode()
        if body and fault in ("short", "reset_body", "stall"):
            data = data[: len(data) // 2]
        # One packet: two would wait for each other's acknowledgement.
        self.wfile.write(message + (data if body else b""))
        self.wfile.flush()
        if fault == "reset_body":
            self._reset()
        elif fault == "short":
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextmanager
def serving(root: Path) -> Iterator[ShardServer]:
    """A running server of `root`."""
    server = ShardServer(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
