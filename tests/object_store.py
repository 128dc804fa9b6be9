"""An S3 server on loopback for tests: moto behind a door that counts requests and makes some of them fail."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import os
import signal
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

FAULTS = ("403", "500", "reset", "cut", "slow", "kill", "kill late")


class Door(BaseHTTPRequestHandler):
    """Hands requests on to the server behind, or does what `fault` says: one of FAULTS."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes, and the second would wait for an acknowledgement

    def handle_one(self) -> None:
        door: FaultyStore = self.server.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = door.next_fault(self.command, self.path, self.headers.get("Range"))
        if fault in ("403", "500"):
            self.answer(int(fault), {}, b"<Error><Code>InternalError</Code></Error>")
            return
        if fault == "reset":  # the peer gets RST, not an orderly end
            self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "kill":  # whoever asks: the request is never served, or (late) its answer never read
            os.kill(door.victim(), signal.SIGKILL)
            self.close_connection = True
            return
        if fault == "slow":
            door.stopping.wait(10)
            self.close_connection = True
            return
        status, kept, data = self.forward(body)
        if fault == "kill late":
            os.kill(door.victim(), signal.SIGKILL)
            self.close_connection = True
            return
        if fault == "cut":
            self.answer(status, {**kept, "Content-Length": str(len(data))}, data[: len(data) // 2])
            self.close_connection = True
            return
        self.answer(status, kept if self.command == "HEAD" else {**kept, "Content-Length": str(len(data))}, data)

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer from behind."""
        with contextlib.closing(http.client.HTTPConnection(*self.server.owner.behind)) as behind:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            behind.request(self.command, self.path, body, headers)
            reply = behind.getresponse()
            dropped = ("connection", "transfer-encoding", "server")
            return reply.status, {k: v for k, v in reply.getheaders() if k.lower() not in dropped}, reply.read()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


_SIGNED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class GoogleDoor(Door):
    """Speaks Google's dialect, in which versions are numbers that count up."""

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """As the server behind answers, with a number for each version of an object, and conditions on it."""
        store: FaultyStore = self.server.owner
        key, wanted = self.path.partition("?")[0], self.headers.get("x-goog-if-generation-match")
        with store.generations_lock:
            if wanted is not None and int(wanted) != store.generations.get(key, 0):
                return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
            del self.headers["Authorization"]
            self.headers["Authorization"] = _SIGNED
            status, headers, data = super().forward(body)
            if self.command in ("PUT", "DELETE") and status < 300:
                store.generations[key] = next(store.generations_made) if self.command == "PUT" else 0
        return status, {**headers, "x-goog-generation": str(store.generations.get(key, 0))}, data


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass  # connections that tests break


class FaultyStore:
    """S3 at `endpoint`, with a bucket `bucket`.

    Attributes:
        requests: (method, path, range header) of all requests so far.
        faults: What happens to the next requests, "" for nothing.
        always: What happens to every request whose method and path hold a key of it: `PUT /bucket/x` -> fault.
        victim: Gives the process that the faults `kill` and `kill late` kill.
    """

    def __init__(self, port: int, door: type[Door] = Door) -> None:
        self.behind = ("127.0.0.1", port)
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: deque[str] = deque()
        self.always: dict[str, str] = {}
        self.victim: Callable[[], int]
        self.stopping = threading.Event()
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
                              aws_access_key_id="test", aws_secret_access_key="test")  # fmt: skip
        client.create_bucket(Bucket="bucket")
        self._objects = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # moto runs in this process: no request is needed
        self.generations: dict[str, int] = {}
        self.generations_made = itertools.count(1)
        self.generations_lock = threading.Lock()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), door)
        self._server.owner = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next_fault(self, method: str, path: str, range_header: str | None) -> str:
        with self._lock:
            self.requests.append((method, path, range_header))
            if self.faults:
                return self.faults.popleft()
            return next((fault for part, fault in self.always.items() if part in f"{method} {path}"), "")

    def settle(self) -> None:
        """Forgets requests and faults."""
        self.stopping.set()
        self.stopping = threading.Event()
        self.requests.clear()
        self.faults.clear()
        self.always.clear()

    def put(self, key: str, data: bytes) -> None:
        """Writes an object, past the door."""
        self._objects.put_object("bucket", key, data)

    def get(self, key: str) -> bytes:
        """An object, past the door."""
        return bytes(self._objects.get_object("bucket", key).value)

    def delete(self, key: str) -> None:
        """Removes an object, past the door."""
        self._objects.delete_object("bucket", key)

    def empty(self) -> None:
        """Removes all objects."""
        for key in self.list_keys():
            self.delete(key)

    def list_keys(self, prefix: str = "") -> list[str]:
        """All keys below a prefix, past the door."""
        return sorted(key for key in list(self._objects.buckets["bucket"].keys) if key.startswith(prefix))

    def upload(self, folder: Path, prefix: str) -> None:
        """Puts all files of a folder below a prefix."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


def serve(door: type[Door] = Door) -> Iterator[FaultyStore]:
    """Runs the servers while the caller uses them."""

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    store = FaultyStore(server.get_host_and_port()[1], door)
    try:
        yield store
    finally:
        store.empty()  # moto keeps its objects in this process, for whichever server comes next
        store.close()
        server.stop()


__all__ = ["FAULTS", "Door", "FaultyStore", "GoogleDoor", "serve"]
