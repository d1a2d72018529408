"""A stand-in for Google's metadata server, on this machine."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KEYS = "/computeMetadata/v1/instance/"


@contextmanager
def metadata_server() -> Iterator[tuple[dict[str, str], str]]:
    """What it answers by key, empty at first, and its address. Who does not say the flavor is refused."""
    answers: dict[str, str] = {}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = answers.get(self.path.removeprefix(KEYS).partition("?")[0])
            allowed = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(403 if not allowed else 404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield answers, f"127.0.0.1:{server.server_port}"
        server.shutdown()
