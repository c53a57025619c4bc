"""An HTTP proxy that does to a share of requests what a store does on a bad day: seeded, and counted by kind."""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("500", "503", "slow", "cut") * 2 + ("silent",)  # a silence takes as long as a client is patient
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
_SILENCE_SECONDS = 60.0  # longer than a client waits


class FaultProxy(ThreadingHTTPServer):
    """Stands between a client and `upstream`; a context manager that serves on a free loopback port.

    `500` and `503` (SlowDown) answer with that error; `slow` waits a second; `cut` lets the store do what was asked
    and closes the connection in the middle of its answer; `silent` never answers; `held` answers once `release` is set.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, share: float, seed: int = 0, kinds: Sequence[str] = KINDS) -> None:
        """
        Args:
            upstream: the real server, http://host:port.
            share: of requests that meet a fault, 0 to 1.
            seed: fixes which requests, in the order of their arrival, meet which fault.
            kinds: faults to draw from.
        """
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.share = share
        self.kinds = kinds
        self.refuses: Callable[[str], bool] = lambda access_key: False  # whose requests get 403 ExpiredToken
        self.spoils: Callable[[str], bool] = lambda request: False  # which, as in `asked`, always get 500
        self.release = threading.Event()
        self.done: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()  # `GET /bucket/name`, whatever came of it
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def draw(self, access_key: str, request: str) -> str:
        """Return what the next request meets: a fault, `expired`, or `good`."""
        with self._lock:
            self.asked[request] += 1
            kind = self._random.choice(self.kinds) if self._random.random() < self.share else "good"
            kind = "expired" if self.refuses(access_key) else "500" if self.spoils(request) else kind
            self.done[kind] += 1
            return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        access_key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        kind = self.server.draw(access_key, f"{self.command} {urlsplit(self.path).path}")
        if kind == "silent":
            time.sleep(_SILENCE_SECONDS)
            self.close_connection = True
        elif kind in ("500", "503", "expired"):
            code = {"500": "InternalError", "503": "SlowDown", "expired": "ExpiredToken"}[kind]
            text = f"<Error><Code>{code}</Code><Message>from the fault proxy</Message></Error>".encode()
            self._answer(400 if kind == "expired" else int(kind), [("Content-Type", "application/xml")], text)
        else:
            if kind == "slow":
                time.sleep(1)
            if kind == "held":
                self.server.release.wait()
            status, headers, text = self._ask(body)
            self._answer(status, headers, text, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self.server.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too: it is part of the signature
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            text = answer.read()
            headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, headers, text
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], text: bytes, cut: bool = False) -> None:
        if cut and not text:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text[: len(text) // 2] if cut else text)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
