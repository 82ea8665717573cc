"""Downloads from a server of our own: checksums, continued transfers, failures."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from experiments.common.data import download as module
from experiments.common.errors import UserError

CONTENT = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    """Serves one file, with ranges; hangs up halfway if told so."""

    content = CONTENT
    hang_up = False
    asked: ClassVar[list[str | None]] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        type(self).asked.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if wanted and start >= len(self.content):
            self.send_error(416)
            return
        body = self.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.hang_up else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    handler = type("Fresh", (Handler,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}/file"
        offer(monkeypatch, url, CONTENT)
        yield handler
        running.shutdown()
        thread.join()


def offer(monkeypatch, url, content, unpack=False):
    checksum = "md5:" + hashlib.md5(content).hexdigest()
    source = module.Source("mnist", {"file.bin": (url, checksum)}, unpack)
    monkeypatch.setitem(module.SOURCES, "mnist", source)


def test_a_file_is_fetched_once(server, tmp_path):
    assert module.download("mnist", tmp_path) == tmp_path / "mnist"
    assert (tmp_path / "mnist" / "file.bin").read_bytes() == CONTENT
    module.download("mnist", tmp_path)
    assert server.asked == [None]
    assert [path.name for path in (tmp_path / "mnist").iterdir()] == ["file.bin"]


def test_a_broken_transfer_is_continued(server, tmp_path):
    server.hang_up = True
    with pytest.raises(UserError, match="run the command again"):
        module.download("mnist", tmp_path)
    assert not (tmp_path / "mnist" / "file.bin").exists()
    have = (tmp_path / "mnist" / "file.bin.part").stat().st_size
    assert 0 < have < len(CONTENT)
    server.hang_up = False
    module.download("mnist", tmp_path)
    assert server.asked == [None, f"bytes={have}-"]
    assert (tmp_path / "mnist" / "file.bin").read_bytes() == CONTENT


def test_a_transfer_killed_after_its_last_byte_is_completed(server, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "file.bin.part").write_bytes(CONTENT)
    module.download("mnist", tmp_path)
    assert (tmp_path / "mnist" / "file.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    server.content = b"something else"
    with pytest.raises(UserError, match="checksum"):
        module.download("mnist", tmp_path)
    assert list((tmp_path / "mnist").iterdir()) == []


def test_an_archive_is_unpacked(server, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("inner/name.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    server.content = buffer.getvalue()
    url = next(iter(module.SOURCES["mnist"].files.values()))[0]
    offer(monkeypatch, url, server.content, unpack=True)
    module.download("mnist", tmp_path)
    assert (tmp_path / "mnist" / "inner" / "name.txt").read_bytes() == b"hello"


def test_without_a_network_the_error_says_so(tmp_path, monkeypatch):
    offer(monkeypatch, "http://127.0.0.1:9/file", CONTENT)  # nobody listens on port 9
    with pytest.raises(UserError, match=r"could not be fetched.*check the network"):
        module.download("mnist", tmp_path)


def test_an_unwritable_root_is_refused(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        module.download("mnist", tmp_path / "file")


def test_unknown_names_and_celeba_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="choose one of mnist"):
        module.download("imagenet", tmp_path)
    with pytest.raises(UserError, match="fetch it yourself"):
        module.download("celeba", tmp_path)
