"The archives of the real scans, from an index that does not say their size, or breaks off"

import http.server
import threading

import pytest

from asap.data import real

BODY = b"x" * (2**20 + 7)


class Index(http.server.BaseHTTPRequestHandler):
    claimed: int | None = None  # bytes, in the header

    def do_GET(self):
        page = self.path.endswith("/")
        body = b'<a href="/files/toy-1.tar.gz#sha256=0">toy</a>' if page else BODY
        self.send_response(200)
        if self.claimed and not page:
            self.send_header("Content-Length", str(self.claimed))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def index(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(real, "package_index", lambda: f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()


@pytest.mark.parametrize("claimed", [None, len(BODY)])
def test_an_archive(index, tmp_path, monkeypatch, claimed):
    monkeypatch.setattr(Index, "claimed", claimed)
    assert real.download_archive("toy", "1", tmp_path).read_bytes() == BODY
    with pytest.raises(RuntimeError, match="does not list toy-2"):
        real.download_archive("toy", "2", tmp_path)


def test_a_download_that_breaks_off(index, tmp_path, monkeypatch):
    monkeypatch.setattr(Index, "claimed", 2 * len(BODY))
    with pytest.raises(OSError, match="broke off after 1,048,583 of 2,097,166 bytes"):
        real.download_archive("toy", "1", tmp_path)
