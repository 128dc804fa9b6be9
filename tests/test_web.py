"""Stores on plain web servers: ranges, weak versions, and nothing that could be listed."""

from __future__ import annotations

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import gpuparse
from gpuparse.errors import StorageError
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
from gpuparse.remote import RemoteOptions, RemotePath, RemoteSite

pytest.importorskip("obstore")


class Handler(BaseHTTPRequestHandler):
    """Files of a folder with ranges and versions. A condition on a weak version never holds (RFC 9110, 13.1.1)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, Path(f"{self.server.folder}{self.path}")
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        if not path.is_file():
            return self.answer(404, b"", {})
        content = path.read_bytes()
        etag = server.etag.format(hash(content)) if server.etag else None
        headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", **({"ETag": etag} if etag else {})}
        wanted = self.headers.get("If-Match")
        if wanted and (wanted != etag or etag.startswith("W/")):
            return self.answer(412, b"", {})
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(content) - int(last))
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= stop:
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.answer(206, content[start:stop], headers)
        return self.answer(200, content, headers)

    do_HEAD = do_GET

    def answer(self, status, content, headers):
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.folder, server.etag, server.requests = tmp_path, "", []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def decoded(keys):
    slices = ChunkReader().fetch(keys, (64, 64))
    return decode_on_host(slices, 1, np.zeros(slices.arena_bytes, np.uint8))


OPTIONS = RemoteOptions(num_attempts=2, backoff_seconds=0.0)


@pytest.mark.parametrize("etag", ['"{}"', 'W/"{}"', ""])
def test_a_store_reads_as_the_local_one_whatever_versions_the_server_tells(web, sample_stores, etag):
    web.etag = etag
    shutil.copytree(sample_stores["SAMPLE_CELLS"].parent, web.folder / "data/SAMPLE_CELLS")
    far, near = (
        gpuparse.open_store(f"{root}/SAMPLE_CELLS/train.zarr", remote=options)
        for root, options in ((f"{web.url}/data", OPTIONS), (web.folder / "data", None))
    )
    keys = [[SliceKey(store, 0, 0, position) for position in range(5)] for store in (far, near)]
    mine, expected = map(decoded, keys)
    np.testing.assert_array_equal(mine, expected)
    (found,) = gpuparse.info(f"{web.url}/data/SAMPLE_CELLS", remote=OPTIONS).stores
    assert found.num_cases == len(near.cases)


@pytest.mark.parametrize("etag", ['"{}"', 'W/"{}"'])
def test_an_object_that_changes_is_noticed_by_any_version(web, etag):
    web.etag = etag
    (web.folder / "object").write_bytes(b"a" * 100)
    place = RemotePath(RemoteSite(web.url, OPTIONS), "object")
    end = place.read_end(10)
    assert bytes(place.read_range(0, 5, end.etag).data) == b"aaaaa"
    (web.folder / "object").write_bytes(b"b" * 100)
    with pytest.raises(StorageError, match=r"/object' cannot be read: the object was changed since it was opened"):
        place.read_range(0, 5, end.etag)


def test_an_empty_object_has_an_empty_end(web):
    (web.folder / "empty").write_bytes(b"")
    place = RemotePath(RemoteSite(web.url, OPTIONS), "empty")
    assert place.read_end(10)[:3] == (memoryview(b""), 0, 0)
    assert place.read_bytes() == b""
    assert [method for method, *_ in web.requests] == ["GET", "HEAD", "GET"]


def test_what_a_web_server_cannot_do_is_said(web):
    site = RemoteSite(web.url, OPTIONS)
    refused = r"/x' cannot be written: the server does not offer it: .*(Overwrite|not yet impl)"
    with pytest.raises(StorageError, match=refused):
        RemotePath(site, "x").write_new(b"1")
    with pytest.raises(StorageError, match=r"cannot be listed: the server does not offer it"):
        RemotePath(site, "x").list_folder()
