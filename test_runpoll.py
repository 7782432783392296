# SPDX-License-Identifier: MIT
"""The tests of runpoll, and a simulator of the four APIs that it knows.

    python -m pytest                     run the tests, over real HTTP on 127.0.0.1
    python test_runpoll.py               follow one run of each API, without a key
    python test_runpoll.py serve [PORT]  leave the simulator running

Two doubles stand in for the world, and both are real: a clock that moves when it is slept on, and
a server on the loopback. Then come the simulator and, section by section, what runpoll promises.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import http.server
import inspect
import io
import itertools
import json
import logging
import math
import os
import pathlib
import pickle
import re
import select
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import wsgiref.simple_server
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Callable
from urllib.parse import urlsplit

import pytest

import runpoll
from runpoll import (
    Api,
    ApiError,
    BadResponse,
    BatchError,
    ErrorInfo,
    Phase,
    PollTimeout,
    RunState,
    Session,
    TransportError,
    iter_batch,
    iter_status,
    wait,
)

HERE = pathlib.Path(__file__).resolve().parent
KEY = "rsk_sandbox_test"


# ---- The two doubles


def nothing() -> None:
    pass


class Clock:
    """`Session(sleep=clock.sleep, clock=clock)`: two hours pass at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []
        self.meanwhile: Callable[[], object] = nothing  # what happens during the next nap

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        assert len(self.naps) < 3000, "this would never end"
        meanwhile, self.meanwhile = self.meanwhile, nothing
        meanwhile()
        self.now += seconds


REAL = {"sleep": time.sleep, "clock": time.monotonic}


@dataclass
class Request:
    """What the server received."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any  # parsed where it is JSON, None where there is none
    connection: int  # the how-manieth


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: Server

    def setup(self) -> None:
        super().setup()
        self.number = self.owner.opened(self.connection)

    def serve(self) -> None:
        self.owner.closing.wait(self.owner.reads_after)
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)  # else it is taken for the next request
        body: Any = content or None
        with contextlib.suppress(ValueError):
            body = json.loads(content)
        self.owner.respond(Request(self.command, self.path, self.headers, body, self.number))(self)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_CONNECT = serve

    def log_message(self, *_: Any) -> None:
        pass


class _HTTPServer(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() joins them
    tls: ssl.SSLContext | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        if not self.tls:
            return super().finish_request(request, client_address)
        with self.tls.wrap_socket(request, server_side=True) as wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, *_: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that goes away is no news
            super().handle_error(*_)


class Server:
    """Gives its answers in turn, the last one again and again, and keeps what it received."""

    def __init__(self, *answers: Any, port: int = 0, tls: bool = False) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.reads_after = 0.0  # seconds from a request's headers to its body
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        handler = type("Handler", (_Handler,), {"owner": self})
        self._httpd = _HTTPServer(("127.0.0.1", port), handler)
        self._httpd.tls = server_side_tls() if tls else None
        self.port = self._httpd.server_address[1]
        # By name: the first urllib3 1.26 checks no certificate of an address in a given context.
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"
        # How long it may take until the end is noticed is most of what a test costs.
        serve = functools.partial(self._httpd.serve_forever, poll_interval=0.001)
        self._thread = threading.Thread(target=serve)

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._httpd.shutdown()
        self._thread.join()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._httpd.server_close()

    def opened(self, connection: socket.socket) -> int:
        with self._lock:
            self._sockets.append(connection)
            return len(self._sockets)

    def respond(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            return as_answer(self.choose(request))

    def choose(self, request: Request) -> Any:
        return next_of(self.answers)

    def until_closed(self) -> None:
        """Wait until every connection has ended, while the server goes on."""
        until(lambda: all(connection.fileno() < 0 for connection in self._sockets))


# ---- What a server answers


Answer = Callable[[_Handler], None]


def next_of(plan: list[Any]) -> Any:
    return plan.pop(0) if len(plan) > 1 else plan[0]


def as_answer(item: Any) -> Answer:
    """An answer as it is, a number as an error of that status, anything else as JSON."""
    if callable(item):
        return item  # type: ignore[no-any-return]
    return answer({"error": f"no. {item}"}, item) if type(item) is int else answer(item)


def answer(body: Any = None, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """JSON, or bytes as they are; None is an empty body."""
    if not isinstance(body, bytes):
        body = b"" if body is None else json.dumps(body).encode()

    def send(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return send


def wire(*pieces: bytes | float, close: bool = True) -> Answer:
    """Bytes as they are on the wire, numbers as pauses, then the end of the connection."""

    def send(handler: _Handler) -> None:
        for piece in pieces:
            if isinstance(piece, bytes):
                handler.wfile.write(piece)
            elif handler.owner.closing.wait(piece):
                break
        handler.close_connection = close

    return send


hang = wire(600.0)


def reset(handler: _Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()
    handler.close_connection = True


def tunnel(handler: _Handler) -> None:
    """What a proxy makes of a CONNECT."""
    host, port = handler.path.split(":")
    handler.send_response(200)
    handler.end_headers()
    ends = [handler.connection, socket.create_connection((host, int(port)))]
    piece = b"the first"
    with ends[1], contextlib.suppress(OSError):
        while piece and not handler.owner.closing.is_set():
            for end in select.select(ends, [], [], 0.01)[0]:
                piece = end.recv(2**16)
                ends[end is handler.connection].sendall(piece)
    handler.close_connection = True


def limited(status: int, seconds: float) -> Answer:
    """An error that asks to come back after so many seconds."""
    return answer(None, status, {"Retry-After": str(seconds)})


def run(status: Any = "running", **more: Any) -> dict[str, Any]:
    return {"id": "r1", "status": status, **more}


DONE = run("succeeded", output={"total": 7})
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED, CHUNK = HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"3e8\r\n%s\r\n" % (b" " * 1000)
SLOW = {
    "hangs": hang,
    "drips headers": wire(HEAD, *[b"A: b\r\n", 0.02] * 9999),
    "drips a body": wire(HEAD + b"Content-Length: 9999\r\n\r\n", *[b" ", 0.02] * 9999),
    "drips chunks": wire(CHUNKED, *[CHUNK, 0.02] * 9999),
    "continues for ever": wire(*[b"HTTP/1.1 100 Continue\r\n\r\n", 0.001] * 9999),
}

# An authority for 127.0.0.1 that signed itself, good until 2046; it guards nothing.
PRIVATE_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgxQgOwEAGYGvQClcS
xFwGpu9C18F1FIV/L9HeGq+aheahRANCAAT9CHtctepkmRX/9Z4xCLLLV8mKye79
blINlRQt+JX52uAH2hYVoZJ4fxRUVtmGrRQ9Ss8JcClTHXq4i8WQOvxU
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBezCCASGgAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxydW5wb2xs
IHRlc3QwHhcNMjQwMTAxMDAwMDAwWhcNNDYwMTAxMDAwMDAwWjAXMRUwEwYDVQQD
DAxydW5wb2xsIHRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAT9CHtctepk
mRX/9Z4xCLLLV8mKye79blINlRQt+JX52uAH2hYVoZJ4fxRUVtmGrRQ9Ss8JcClT
HXq4i8WQOvxUo14wXDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAd
BgNVHQ4EFgQUPmqduvmA1hKEfYJczcW6OjA96t0wGgYDVR0RBBMwEYcEfwAAAYIJ
bG9jYWxob3N0MAoGCCqGSM49BAMCA0gAMEUCIQDeHwwcsbGJ0/BTkB4HCGWz2cFJ
OwlUFfNgjlJzadyt4wIgVhjJ2/lNSp5oZ7ylDgoB6bI1JRG325Hdp1wFFqTE9ws=
-----END CERTIFICATE-----
"""


@functools.cache
def server_side_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "both.pem")
        path.write_text(PRIVATE_KEY + CERTIFICATE)
        context.load_cert_chain(path)
    return context


# ---- The simulator


BUILT_IN = {
    "rapidfolio": runpoll.RAPIDFOLIO,
    "doclo": runpoll.DOCLO,
    "dibby": runpoll.DIBBY,
    "onepin": runpoll.ONEPIN,
}
INVOICE = {"invoiceNumber": "INV-2025-001", "totalAmount": 1234.56, "vendor": "Acme Corp"}
META = {"request_id": "req_1234567890abcdef", "timestamp": "2024-04-20T14:25:01Z"}


@dataclass
class Simulated:
    """A run: `plan` holds its status words, and each stage takes a second of its own time."""

    id: str
    parent: str
    plan: list[str]
    said: dict[str, Any]  # the start's body
    begun: float = field(default_factory=time.time)
    at: int = 0

    @property
    def word(self) -> str:
        return self.plan[self.at]

    @property
    def ended(self) -> bool:
        return self.word.lower() in ("completed", "success", "finished", "failed", "cancelled")

    @property
    def started_at(self) -> str | None:
        return self.time() if self.at else None

    @property
    def completed_at(self) -> str | None:
        return self.time(self.at) if self.ended else None

    def time(self, seconds: float = 0) -> str:
        instant = datetime.fromtimestamp(self.begun + seconds, timezone.utc)
        return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def share(self, steps: int) -> int:
        """How many of the steps are done."""
        return steps * self.at // (len(self.plan) - 1)

    def advance(self, step: float | None) -> None:
        """Go on by one stage, or to the one that so many seconds a stage have reached."""
        reached = int((time.time() - self.begun) / step) if step else self.at + 1
        if not self.ended:
            self.at = min(reached, len(self.plan) - 1)

    def cancel(self) -> None:
        self.plan[self.at + 1 :] = ["cancelled"]
        self.at += 1


class Simulator(Server):
    """The four APIs as their documents describe them, each under a prefix of its own.

    A run goes on by one stage with each status request, or every `step` seconds.
    """

    WORDS = {  # of the id, of waiting, of working and of a good end
        "rapidfolio": ("run_{}", "pending", "running", "completed"),
        "doclo": ("exec_{}", "queued", "running", "success"),
        "dibby": ("run_d{}", "PENDING", "RUNNING", "FINISHED"),
        "onepin": ("f47ac10b-58cc-4372-a567-{:012}", "pending", "running", "completed"),
    }
    CALLS = {
        "rapidfolio": {
            "start": "POST /v1/procedures/ID/(?:sandbox|live)",
            "status": "GET /runs/ID",
            "cancel": "POST /runs/ID/cancel",
        },
        "doclo": {
            "start": "POST /api/v1/flows/ID/run",
            "status": "GET /api/v1/runs/ID",
            "cancel": "POST /api/v1/runs/ID/cancel",
        },
        "dibby": {"start": "POST /api/runs", "status": "GET /api/runs/ID"},
        "onepin": {
            "start": "POST /api/v1/workflows/ID/runs",
            "status": "GET /api/v1/workflows/ID/runs/ID/status",
            "cancel": "POST /api/v1/workflows/ID/runs/ID/cancel",
            "outputs": "GET /api/v1/workflows/ID/runs/ID/outputs",
        },
    }

    def __init__(self, *, stages: int = 4, step: float | None = None, port: int = 0) -> None:
        super().__init__(port=port)
        self.stages, self.step = stages, step
        self.plans: dict[str, list[str]] = {}  # API -> the words of its runs, if not the usual ones
        self.runs: dict[str, Simulated] = {}

    def api(self, name: str) -> Api:
        path = urlsplit(BUILT_IN[name].base_url).path
        return replace(BUILT_IN[name], base_url=f"{self.url}/{name}{path}")

    def choose(self, request: Request) -> Any:
        api, _, path = urlsplit(request.path).path[1:].partition("/")
        if not re.fullmatch(r"Bearer \S+", request.headers.get("Authorization", "")):
            return self.refuse(api, 401, "unauthorized", "Invalid or missing API key")
        for call, asked in self.CALLS.get(api, {}).items():
            found = re.fullmatch(asked.replace("ID", "([^/]+)"), f"{request.method} /{path}")
            if found:
                said = request.body if isinstance(request.body, dict) else {}
                return self.called(api, call, found.groups(), said)
        return self.refuse(api, 404, "not_found", "Not found")

    def called(self, api: str, call: str, ids: tuple[str, ...], said: dict[str, Any]) -> Any:
        if api == "onepin" and not re.fullmatch(
            r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", ids[-1]
        ):
            return self.refuse(api, 422, "", "Input should be a valid UUID")
        made = self.begin(api, *ids, said=said) if call == "start" else self.runs.get(ids[-1])
        if not made or not {*ids} <= {made.parent, made.id}:
            return self.refuse(api, 404, "not_found", "Run not found")
        if call == "status":
            made.advance(self.step)
        if call == "cancel" and not made.ended:
            made.cancel()
        elif call == "cancel" and api != "onepin":
            return self.refuse(api, 409, "invalid_state", f"The run is already {made.word}")
        return getattr(self, f"_{api}")(made, call)

    def begin(self, api: str, parent: str = "", *, said: dict[str, Any]) -> Simulated:
        key = said.get("idempotencyKey")
        for made in self.runs.values():
            if key and made.said.get("idempotencyKey") == key:
                return made
        name, waiting, working, success = self.WORDS[api]
        plan = self.plans.get(api) or [waiting, *[working] * (self.stages - 2), success]
        made = Simulated(name.format(len(self.runs) + 1), parent, list(plan), said)
        self.runs[made.id] = made
        return made

    def refuse(self, api: str, status: int, code: str, message: str) -> Answer:
        body: dict[str, Any] = {"error": message}
        if api == "doclo":
            body = {"error": {"code": code.upper(), "message": message, "details": {}}}
        elif api == "onepin" and status == 401:
            body = {"code": code, "message": message, "detail": None}
        elif api == "onepin" and status == 422:
            body = {"detail": [{"loc": ["path", "run_id"], "msg": message, "type": "uuid_parsing"}]}
        elif api == "onepin":
            body = {"error": {"code": code, "message": message, "details": []}, "meta": META}
        return answer(body, status)

    def _rapidfolio(self, made: Simulated, call: str) -> Any:
        if call == "start":
            return self._rapidfolio_start(made)
        if call == "cancel":
            return {"success": True}
        return {
            "id": made.id,
            "status": made.word,
            "input": made.said.get("data"),
            "output": {"approved": True} if made.word == "completed" else None,
            "error": "Rejected by the reviewer" if made.word == "failed" else None,
            "startedAt": made.started_at,
            "completedAt": made.completed_at,
            "createdAt": made.time(),
            "procedureVersionId": made.said.get("metadata", {}).get("procedureVersion", "v1"),
        }

    def _rapidfolio_start(self, made: Simulated) -> Any:
        # The documents write run.rapidfolio.com here: an absolute URL, on the Runner's host.
        body = {"runId": made.id, "statusUrl": f"{self.url}/rapidfolio/runs/{made.id}"}
        control = made.said.get("control", {})
        if control.get("executionMode", "async") == "async":
            return answer({**body, "status": "running"}, 202)
        limit = control.get("executionTimeout", 60_000)
        while not made.ended and made.word != "awaiting_review":
            if (made.at + 1) * 1000 > limit:
                error = f"Execution exceeded timeout of {limit}ms"
                return answer({**body, "status": "timeout", "error": error}, 504)
            made.at += 1
        if made.word != "completed":
            return {**body, "status": made.word}
        output = {"approved": True, "transactionId": "txn_abc"}
        ended = {"status": "completed", "output": output, "completedAt": made.completed_at}
        return {"runId": made.id, **ended}

    def _doclo(self, made: Simulated, call: str) -> Any:
        body = {
            "id": made.id,
            "flowId": made.parent,
            "status": made.word,
            "createdAt": made.time(),
            "metrics": {"tokensUsed": 1500, "stepsRun": made.share(3), "stepsTotal": 3},
        }
        if made.ended:
            body.update(completedAt=made.completed_at, duration=made.at * 1000)
        if made.word == "success":
            body["output"] = INVOICE
        if made.word == "failed":
            body["error"] = {"code": "EXTRACTION_FAILED", "message": "No text", "details": {}}
        return body

    def _dibby(self, made: Simulated, call: str) -> Any:
        body = {
            "id": made.id,
            "status": made.word,
            "createdAt": made.time(),
            "steps": 5,
            "stepsCompleted": made.share(5),
            "output": INVOICE if made.word == "FINISHED" else None,
        }
        if made.word == "FAILED":
            body["error"] = {"message": "Failed to process document", "step": "Document Extractor"}
        return body

    def _onepin(self, made: Simulated, call: str) -> Any:
        if call == "outputs":
            url = f"https://cdn.onepin.ai/{made.id}.mp3"
            return {"data": [{"node_id": "node_1", "type": "audio", "url": url}], "meta": META}
        job = {
            "id": made.id,
            "workflow_id": made.parent,
            "status": made.word,
            "created_at": made.time(),
            "total_steps": 120 if made.at else None,
            "finished_steps": made.share(120) if made.at else None,
            "started_at": made.started_at,
            "completed_at": made.completed_at,
            "error": "Node 7 ran out of memory" if made.word == "failed" else None,
        }
        return answer({"data": job, "meta": META}, 202 if call == "start" else 200)


# What each API's start takes: its body, and the parameters of its path.
STARTS: dict[str, tuple[Any, dict[str, str]]] = {
    "rapidfolio": (
        {"data": {"customerId": "cust_123"}},
        {"procedure_id": "proc_abc", "environment": "sandbox"},
    ),
    "doclo": (
        {"input": {"document": {"base64": "JVBERi0=", "filename": "invoice.pdf"}}},
        {"flow_id": "flow_abc123"},
    ),
    "dibby": ({"workflowId": "wf_1", "inputs": {}}, {}),
    "onepin": (None, {"workflow_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7"}),
}


# ---- What the tests share


ORDINARY = Api(
    base_url="https://api.example.com",
    status="/jobs/{run_id}",
    start="/jobs",
    cancel="/jobs/{run_id}/cancel",
)
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals or a terminal of POSIX")


class Lab:
    """Opens servers and sessions, which are closed after the test."""

    server: Server  # the one that was opened last
    proxy: Server  # on the way to it

    def __init__(self, stack: contextlib.ExitStack, directory: pathlib.Path) -> None:
        self.clock = Clock()
        self.enter = stack.enter_context
        self.directory = directory
        self._threads = set(threading.enumerate())

    def open(
        self, *answers: Any, api: Api = ORDINARY, key: Any = KEY, way: str = "plain", **options: Any
    ) -> Session:
        """A session on the virtual clock with an API that answers so.

        The way to it is "plain", "tls", or a "tunnel": TLS through a proxy.
        """
        self.serve(*answers, tls=way != "plain")
        if way != "plain":
            trusting = ssl.create_default_context(cadata=CERTIFICATE)
            options = {"ssl_context": trusting, **options}
        if way == "tunnel":
            self.proxy = self.enter(Server(tunnel))
            options["proxy"] = self.proxy.url.replace("//", "//user:p%40ss@")
        return self.session(api, key, **{"base_url": self.server.url, **options})

    def serve(self, *answers: Any, **options: Any) -> Server:
        """A server alone."""
        self.server = self.enter(Server(*answers, **options))
        return self.server

    def session(self, api: Api = ORDINARY, key: Any = KEY, **options: Any) -> Session:
        options = {"sleep": self.clock.sleep, "clock": self.clock, **options}
        return self.enter(Session(api, key, **options))

    @property
    def requests(self) -> list[Request]:
        return self.server.requests

    @property
    def asked(self) -> list[str]:
        """The requests, as "GET /jobs/r1"."""
        return [f"{request.method} {request.path}" for request in self.requests]

    @property
    def connections(self) -> list[int]:
        """The connection of each request."""
        return [request.connection for request in self.requests]

    @property
    def naps(self) -> list[float]:
        """The naps that took time: `sleep` is also asked before every poll."""
        return [nap for nap in self.clock.naps if nap]

    @property
    def workers(self) -> list[threading.Thread]:
        """The threads that the test has begun and that are no server's: those are no daemons."""
        return [thread for thread in {*threading.enumerate()} - self._threads if thread.daemon]


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield Lab(stack, tmp_path)


@pytest.fixture
def simulator(lab: Lab) -> Simulator:
    lab.server = simulator = lab.enter(Simulator())
    return simulator


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes begin as they would in a terminal: not deaf to Ctrl-C, though we may be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def about(*seconds: float) -> Any:
    """These naps, give or take their jitter."""
    return pytest.approx(list(seconds), rel=0.11)


def table(names: str, /, *rows: Any, **named: Any) -> Any:
    """Runs a test with each row. Rows are called as they are written, or by their names."""
    single = "," not in names
    by_name = [pytest.param(*([row] if single else row), id=name) for name, row in named.items()]
    return pytest.mark.parametrize(names, [*rows, *by_name], ids=in_words)


def in_words(value: object) -> str:
    return getattr(value, "__name__", str(value))


def each_value(**options: list[Any]) -> Any:
    """Runs a test with the name of each option and with each of its values."""
    pairs = [(name, value) for name, values in options.items() for value in values]
    return table("name, value", **{f"{name}={value!a}": (name, value) for name, value in pairs})


def read(status: Any = "running", **more: Any) -> RunState:
    """What an ordinary API reads of a run."""
    return ORDINARY.read_state(run(status, **more))


def statuses(states: Iterable[RunState]) -> list[str]:
    return [state.status for state in states]


def until(true: Callable[[], object]) -> None:
    """Wait, in real time, for what another process or thread does."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@contextlib.contextmanager
def process(*words: object, **options: Any) -> Iterator[Any]:
    """A process, which is killed where it has not ended."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {**pipes, "env": buffered, **options}
    with subprocess.Popen([*map(str, words)], **options) as begun:
        try:
            yield begun
        finally:
            begun.kill()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- The four APIs, end to end


@table("name", *STARTS)
def test_a_run_of_each_api_is_followed_to_its_end_over_one_connection(lab, simulator, name):
    body, params = STARTS[name]
    session = lab.session(simulator.api(name))
    states = list(iter_status(session, session.start(body, **params)))
    assert states[-1].ok and [state.polls for state in states] == list(range(len(states)))
    assert statuses(states)[-1] == Simulator.WORDS[name][-1]
    assert set(lab.connections) == {1}


# A word alone is its phase's, too.
WORDS_OF_THE_APIS = {
    "rapidfolio": "pending running timeout=running awaiting_review=paused completed=succeeded "
    "failed cancelled",
    "doclo": "queued=pending pending running success=succeeded completed=succeeded "
    "failed cancelled",
    "dibby": "PENDING RUNNING FINISHED=succeeded FAILED",
    "onepin": "pending running paused completed=succeeded failed cancelled",
}


@table(
    "name, word",
    *((name, word) for name, words in WORDS_OF_THE_APIS.items() for word in words.split()),
)
def test_the_documented_words_of_each_api_are_known(name, word):
    word, _, phase = word.partition("=")
    api = BUILT_IN[name]
    state = api.read_state({"data": run(word)} if api.root else run(word))
    assert (state.status, state.phase) == (word, phase or word.lower())


@table("name", "rapidfolio", "doclo", "onepin")
def test_a_cancel_ends_an_active_run_and_leaves_an_ended_one_alone(lab, simulator, name):
    session, (body, params) = lab.session(simulator.api(name)), STARTS[name]
    active, ended = session.start(body, **params), wait(session, session.start(body, **params))
    assert session.cancel(active) is True and session.poll(active).phase is Phase.CANCELLED
    assert session.cancel(ended.params) is False


def test_rapidfolio_pins_a_version_and_every_field_is_read(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    body = {"data": {"customerId": "cust_123"}, "metadata": {"procedureVersion": "v2"}}
    begun = session.start(body, procedure_id="proc_abc", environment="sandbox")
    assert (begun.id, begun.status, begun.params) == ("run_1", "running", {"run_id": "run_1"})
    assert begun.status_url == f"{simulator.url}/rapidfolio/runs/run_1"
    state = wait(session, begun)
    assert state.raw["procedureVersionId"] == "v2" and state.result() == {"approved": True}
    assert state.duration == 3.0 and state.error is None
    assert state.completed_at - state.started_at == timedelta(seconds=3)


@table(
    "limit, plan, status, phase",
    in_time=(120_000, "running completed", "completed", Phase.SUCCEEDED),
    too_slow=(1000, "running running completed", "timeout", Phase.RUNNING),
    review=(60_000, "running awaiting_review", "awaiting_review", Phase.PAUSED),
)
def test_a_synchronous_rapidfolio_start_is_a_state(lab, simulator, limit, plan, status, phase):
    simulator.plans["rapidfolio"] = plan.split()
    session = lab.session(simulator.api("rapidfolio"))
    control = {"executionMode": "sync", "executionTimeout": limit}
    body = {"data": {}, "control": control}
    state = session.start(body, procedure_id="proc_abc", environment="sandbox")
    assert (state.status, state.phase, state.params) == (status, phase, {"run_id": "run_1"})
    assert len(lab.requests) == 1


def test_a_review_that_is_rejected_ends_a_rapidfolio_run_as_failed(lab, simulator):
    simulator.plans["rapidfolio"] = ["pending", "awaiting_review", "failed"]
    session = lab.session(simulator.api("rapidfolio"))
    begun = session.start({"data": {}}, procedure_id="proc_abc", environment="sandbox")
    states = list(iter_status(session, begun))
    assert states[1].phase is Phase.PAUSED and lab.naps[1:] == about(30)
    with pytest.raises(runpoll.RunFailed, match="run run_1 failed: Rejected by the reviewer"):
        states[-1].result()


def test_the_documented_backoff_of_rapidfolio_is_one_value(lab):
    backoff = runpoll.Backoff(initial=1, factor=1.5, maximum=15, jitter=0)
    wait(lab.open(*[run()] * 9, DONE, api=runpoll.RAPIDFOLIO), "r1", interval=backoff)
    assert lab.naps == [1, 1.5, 2.25, 3.375, 5.0625, 7.59375, 11.390625, 15, 15]


@dataclass
class Invoice:
    invoiceNumber: str  # as the API spells it
    totalAmount: float
    vendor: str


def test_doclo_results_are_decoded_and_its_milliseconds_are_seconds(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    state = wait(session, session.start(STARTS["doclo"][0], flow_id="flow_abc123"))
    assert state.result(lambda output: Invoice(**output)).vendor == "Acme Corp"
    assert (state.duration, state.steps_done, state.steps_total, state.progress) == (3.0, 3, 3, 1.0)


CODED = {"code": "c", "message": "no", "details": {"a": 1}}


@table(
    "body, field, value",
    milliseconds=(run(duration=1500), "duration", 1.5),
    milliseconds_of_metrics=(run(metrics={"durationMs": 250}), "duration", 0.25),
    no_figures=(run(duration=None, metrics=None, progress=None), "duration", None),
    steps=(run(metrics={"stepsRun": 1, "stepsTotal": 4}), "progress", 0.25),
    percentage=(run(progress={"step": "extract", "percentage": 40}), "progress", 0.4),
    error=(run("failed", error=CODED), "error", ErrorInfo("no", "c", None, {"a": 1})),
)
def test_doclo_is_read_in_the_words_of_its_sdk_and_of_its_rest_interface(body, field, value):
    assert getattr(runpoll.DOCLO.read_state(body), field) == value


def test_a_doclo_start_under_an_idempotency_key_is_sent_again_and_begins_one_run(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    body = {**STARTS["doclo"][0], "idempotencyKey": "order-7"}
    ids = {session.start(body, flow_id="f", repeatable=True).id for _ in range(2)}
    assert ids == {"exec_1"}


def test_dibby_steps_are_progress_and_the_failed_step_is_named(lab, simulator):
    simulator.plans["dibby"] = ["PENDING", "RUNNING", "FAILED"]
    session = lab.session(simulator.api("dibby"))
    states = list(iter_status(session, session.start(STARTS["dibby"][0])))
    assert [state.progress for state in states] == [0.0, 0.4, 1.0]
    assert states[-1].error == ErrorInfo("Failed to process document", step="Document Extractor")
    with pytest.raises(runpoll.RunFailed, match="in the step 'Document Extractor'"):
        states[-1].result()


def test_sixty_polls_of_dibby_two_seconds_apart_are_an_islice(lab):
    states = iter_status(lab.open(run("RUNNING"), api=runpoll.DIBBY), "r1", interval=2)
    assert len(list(itertools.islice(states, 60))) == 60 and lab.naps == [2] * 59


def test_onepin_has_two_ids_an_envelope_and_a_workspace(lab, simulator):
    session = lab.session(simulator.api("onepin"), headers={"X-Workspace-Id": "ws_1"})
    body, params = STARTS["onepin"]
    begun = session.start(body, **params)
    assert set(begun.params) == {"workflow_id", "run_id"}
    state = wait(session, begun.params)
    assert (state.steps_done, state.steps_total, state.progress) == (120, 120, 1.0)
    assert lab.requests[-1].headers["X-Workspace-Id"] == "ws_1"
    path = "/api/v1/workflows/{workflow_id}/runs/{run_id}/outputs"
    assert session.request("GET", path, params=state.params)["data"][0]["type"] == "audio"


@table("key, status, said", (KEY, 422, "Input should be a valid UUID"), (None, 401, "Invalid or"))
def test_what_onepin_refuses_is_told_in_its_words(lab, simulator, key, status, said):
    session = lab.session(simulator.api("onepin"), key)
    with pytest.raises(ApiError, match=said) as caught:
        session.poll({"workflow_id": "w", "run_id": "r1"})
    assert caught.value.http_status == status


# ---- Phases and words


@table("phase", *Phase)
def test_a_phase_is_its_word_and_three_are_terminal(phase):
    assert str(phase) == f"{phase}" == phase.value == phase.name.lower()
    assert phase.terminal == (phase.name in ("SUCCEEDED", "FAILED", "CANCELLED"))


USUAL_WORDS = {
    "pending": "pending queued in_queue created scheduled submitted accepted enqueued not_started "
    "starting initializing validating preparing provisioning",
    "running": "running in_progress processing started active working executing retrying "
    "finalizing stopping cancelling canceling",
    "paused": "paused suspended awaiting_review awaiting_approval awaiting_input requires_action",
    "succeeded": "success succeeded successful completed complete finished done",
    "failed": "failed failure error errored timed_out crashed expired rejected",
    "cancelled": "cancelled canceled aborted",
    "unknown": "stopped terminated timeout waiting skipped ended ready",
}


@table(
    "phase, word",
    *((phase, word) for phase, words in USUAL_WORDS.items() for word in words.split()),
)
def test_the_usual_words_are_known_in_any_spelling(phase, word):
    title = word.title()
    camel_case = word[0] + title.replace("_", "")[1:]
    for spelling in (word, word.upper(), title.replace("_", "-"), camel_case):
        state = read(spelling)
        assert (state.phase, state.status) == (phase, spelling)


@table(
    "status, phase",
    (-2, "failed"),
    (2, "succeeded"),
    (" -2", "failed"),
    (2.0, "unknown"),
    (-1e22, "unknown"),
)
def test_a_word_that_is_a_number_keeps_its_sign(status, phase):
    api = replace(ORDINARY, phases={"-2": Phase.FAILED, "2": "succeeded", "1e+22": "failed"})
    assert api.read_state(run(status)).phase == phase


def test_an_unknown_word_is_polled_on_and_logged_once_a_session(lab, caplog):
    session = lab.open(run("Odd"), run("odd"), run("ODD"), DONE)
    states = list(iter_status(session, "r1"))
    assert [state.phase.terminal for state in states] == [False, False, False, True]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "unknown status 'Odd'" in caplog.text


# ---- RunState


NOON = datetime(2026, 2, 27, 12, 0, tzinfo=timezone.utc)


@table(
    "said, later",
    ("2026-02-27T12:00:00Z", 0),
    ("2026-02-27t12:00:00z", 0),
    ("2026-02-27 12:00:00", 0),
    ("2026-02-27T14:00:00+02:00", 0),
    ("2026-02-27T06:30:00-0530", 0),
    ("2026-02-27T12:00:00.5Z", 0.5),
    ("2026-02-27T12:00:00.123456789Z", 0.123456),
    (NOON.timestamp(), 0),
    (int(NOON.timestamp()) * 1000, 0),
    (NOON.replace(tzinfo=None), 0),  # of a callable
)
def test_timestamps_are_aware_utc(said, later):
    state = read(created_at=said)
    assert state.created_at == NOON + timedelta(seconds=later)
    assert state.created_at.tzinfo is timezone.utc


def test_unix_time_is_milliseconds_from_where_seconds_would_be_far_in_the_future():
    assert read(created_at=150_000_000_000).created_at.year == 1974


@table("said", "yesterday", "2026-02-30T12:00:00Z", "2026-02-27", "", -1, 1e300, math.nan, True, {})
def test_a_timestamp_that_cannot_be_read_is_none(said):
    assert read(created_at=said).created_at is None


@table(
    "said, duration",
    ({"duration_seconds": 2}, 2.0),
    ({"started_at": 100, "completed_at": 107, "created_at": 50}, 7.0),
    ({"created_at": 100, "completed_at": 107}, 7.0),
    ({"started_at": 107, "completed_at": 100}, None),
    ({"started_at": 100}, None),
    ({"duration_seconds": "2"}, None),
)
def test_the_duration_is_the_apis_own_or_counted(said, duration):
    assert read("done", **said).duration == duration


@table(
    "status, said, progress",
    ("running", {"progress": 0.25}, 0.25),
    ("running", {"progress": 1.0}, 1.0),
    ("running", {"progress": 1}, 0.01),
    ("done", {"progress": 1}, 1.0),
    ("running", {"progress": 42}, 0.42),
    ("running", {"progress": 1.5}, 0.015),
    ("running", {"progress": 100}, 1.0),
    ("running", {"steps_done": 1, "steps_total": 4}, 0.25),
    ("running", {"stepsDone": 9, "stepsTotal": 4}, 1.0),
    ("running", {"progress": "20 %", "steps_done": 1, "steps_total": 4}, 0.25),
    huge=("running", {"progress": 10**400}, 1.0),
)
def test_progress_is_the_apis_own_figure_or_counted_in_steps(status, said, progress):
    assert read(status, **said).progress == progress


@each_value(progress=[-1, math.nan, True], steps_total=[0, None])
def test_without_a_figure_that_makes_sense_there_is_no_progress(name, value):
    assert read(steps_done=1, **{name: value}).progress is None


@table("said, word", (10, "10"), (True, "true"), (2.5, "2.5"), ("a", "a"))
@table("field", "id", "status")
def test_a_number_or_a_boolean_as_a_word_is_its_json(field, said, word):
    assert getattr(ORDINARY.read_state({**run(), field: said}), field) == word


@table("body", None, [], "r1", 5, {}, {"data": None}, run(id={}), run(id=""))
def test_without_an_id_an_answer_is_no_state(body):
    with pytest.raises(BadResponse, match="has no id of"):
        ORDINARY.read_state(body)


@table("said", None, {}, "")
def test_without_a_status_an_answer_about_a_run_is_no_state(said):
    with pytest.raises(BadResponse, match="has no status of"):
        ORDINARY.read_state(run(said), {"run_id": "r1"})


# What an API says of an error -> what is read of it.
ERROR_FORMS = {
    "text": ("no", ErrorInfo("no")),
    "oauth": ({"error": "x", "error_description": "no"}, ErrorInfo("no")),
    "all": ({**CODED, "code": 7, "step": "s"}, ErrorInfo("no", "7", "s", {"a": 1})),
    "nested": ({"error": {"message": "no", "code": "c"}}, ErrorInfo("no", "c")),
    "nested twice": ({"error": {"detail": {"title": "no"}}}, ErrorInfo("no")),
    "nested, code outside": ({"error": {"message": "no"}, "code": "c"}, ErrorInfo("no", "c")),
    "list of texts": (["no", "", "never"], ErrorInfo("no; never")),
    "errors": ({"errors": [{"title": "no"}, {"message": "never"}]}, ErrorInfo("no; never")),
    "other object": ({"loc": ["a"], "msg": "no"}, ErrorInfo('{"loc": ["a"], "msg": "no"}')),
    "number": (5, ErrorInfo("5")),
    "true": (True, ErrorInfo("true")),
}


@table("said, info", **ERROR_FORMS)
def test_the_error_of_a_run_that_ended_badly_is_read_in_any_form(said, info):
    assert read("failed", error=said).error == read("cancelled", error=said).error == info


@table("said, info", **ERROR_FORMS)
def test_the_error_of_an_error_answer_is_read_in_any_form(lab, said, info):
    with pytest.raises(ApiError) as caught:
        lab.open(answer(said, 400)).poll("r1")
    assert caught.value.error == info


def test_of_many_errors_the_first_hundred_are_read():
    assert read("failed", errors=["no"] * 150).error.message == "; ".join(["no"] * 100)


ERROR_TEXTS = ["message", "detail", "description", "error_description", "error_message", "title"]


@table("name", *ERROR_TEXTS)
def test_of_the_texts_of_an_error_the_first_is_its_message(name):
    behind = ERROR_TEXTS[ERROR_TEXTS.index(name) :]
    said = {other: f"the {other}" for other in reversed(behind)}
    assert read("failed", error=said).error == ErrorInfo(f"the {name}")


@table("said", None, "", " ", [], {}, [""], 0, False)
def test_what_is_empty_is_no_error(said):
    assert read("failed", error=said).error is None


@table("status", "running", "paused", "succeeded", "odd")
def test_what_an_api_says_beside_other_states_stands_in_raw(status):
    state = read(status, error="a warning")
    assert state.error is None and state.raw["error"] == "a warning"


def test_values_of_the_wrong_type_are_as_if_absent():
    names = ["created_at", "duration_seconds", "steps_done", "steps_total", "progress"]
    state = read(**{name: {"a": 1} for name in names}, status_url=7)
    assert state == replace(read(), raw=state.raw)


@table("headers, seconds", ({"RETRY-after": " 7 "}, 7.0), ({"retry-after": "0.5"}, 0.5), ({}, None))
def test_a_state_has_the_retry_after_of_its_answer(headers, seconds):
    assert ORDINARY.read_state(run(), headers=headers).retry_after == seconds


def test_the_handle_is_what_was_asked_whatever_the_answer_names():
    state = ORDINARY.read_state(run(id="other"), {"run_id": "r1", "team": "a"})
    assert (state.id, state.params) == ("other", {"run_id": "r1"})


def test_output_and_raw_stay_out_of_the_repr():
    assert "secret" not in repr(read("done", output="secret"))


def test_a_state_pickles_and_compares_by_what_the_api_said():
    state = read("failed", error={"message": "no"}, created_at=5)
    assert pickle.loads(pickle.dumps(state)) == state == copy.deepcopy(state)
    assert replace(state, polls=9, faults=1, elapsed=2.0, eta=1.0) == state
    assert replace(state, status="odd") != state


@table(
    "status, error, text",
    ("failed", runpoll.RunFailed, "run r1 failed$"),
    ("cancelled", runpoll.RunCancelled, "run r1 was cancelled$"),
    ("running", runpoll.RunNotDone, "run r1 has not ended .*'running'"),
    ("odd", runpoll.RunNotDone, "run r1 has not ended .*'odd'"),
)
def test_a_result_is_only_that_of_a_successful_run(status, error, text):
    state = read(status, output=7)
    with pytest.raises(error, match=text) as caught:
        state.result()
    assert caught.value.state is state and caught.value.params == {"run_id": "r1"}


def test_a_result_goes_through_decode_and_what_that_raises_comes_out():
    assert read("done", output="7").result(int) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        read("done", output="x").result(int)


# ---- Any other API


MINIMAL = {"base_url": "https://api.example.com", "status": "/jobs/{run_id}"}


def test_two_fields_alone_drive_an_ordinary_api(lab):
    session = lab.open(run(), DONE, api=Api(**MINIMAL))
    assert wait(session, "r1").result() == {"total": 7}
    assert lab.asked == ["GET /jobs/r1"] * 2


@table(
    "body, field, value",
    ({"runId": "r2"}, "id", "r2"),
    ({"job_id": "r2"}, "id", "r2"),
    ({"results": [1]}, "output", [1]),
    ({"output": None, "result": 0}, "output", 0),
    ({"submittedAt": 5}, "created_at", datetime.fromtimestamp(5, timezone.utc)),
    ({"startTime": 5}, "started_at", datetime.fromtimestamp(5, timezone.utc)),
    ({"finishedAt": 5}, "completed_at", datetime.fromtimestamp(5, timezone.utc)),
    ({"completedSteps": 3}, "steps_done", 3),
    ({"total_steps": 3.0}, "steps_total", 3),
    ({"statusUrl": "u"}, "status_url", "u"),
)
def test_the_usual_names_are_known_in_snake_and_in_camel_case(body, field, value):
    body = {"status": "running", **({} if field == "id" else {"id": "r1"}), **body}
    assert getattr(ORDINARY.read_state(body), field) == value


@table(
    "options, body, field",
    steps=({}, run(steps=5), "steps_total"),
    milliseconds=({}, run(duration=5), "duration"),
    name_replaced=({"fields": {"output": "a"}}, run(output=1), "output"),
    beside_the_root=({"root": "a"}, {"output": 1, "a": run()}, "output"),
)
def test_what_may_mean_something_else_is_not_read(options, body, field):
    assert getattr(replace(ORDINARY, **options).read_state(body), field) is None


QUARTERS = {"progress": lambda job: job["a"] / 4}


@table(
    "options, body, field, value",
    root=({"root": "a.b"}, {"a": {"b": run()}, "status": "done"}, "status", "running"),
    dotted_path=({"fields": {"output": "a.b"}}, run(a={"b": 1}), "output", 1),
    first_path=({"fields": {"status": ("end", "status")}}, run(end="done"), "status", "done"),
    null=({"fields": {"status": ("end", "status")}}, run(end=None), "status", "running"),
    wrong_type=({"fields": {"status": ["end", "status"]}}, run(end={}), "status", "running"),
    callable=({"fields": QUARTERS}, run(a=1), "progress", 0.25),
    word=({"phases": {"Odd-Word": "failed"}}, run("oddWord"), "phase", "failed"),
    usual_word=({"phases": {"done": Phase.RUNNING}}, run("done"), "phase", "running"),
)
def test_one_value_describes_another_api(options, body, field, value):
    assert getattr(replace(ORDINARY, **options).read_state(body), field) == value


def raising(fault: BaseException) -> Callable[..., Any]:
    """What raises this, whatever it is given."""

    def fail(*_: Any, **__: Any) -> Any:
        raise fault

    return fail


@table("fault", KeyError, IndexError, TypeError, ValueError, AttributeError)
def test_a_callable_field_that_raises_finds_nothing(fault):
    api = replace(ORDINARY, fields={"progress": raising(fault("x"))})
    assert api.read_state(run()).progress is None


@each_value(
    status=["/jobs", "jobs/{run_id}", "/jobs/{run_id}/{run_id}", "/jobs/{run id}"],
    start=["POST"],
    cancel=["/jobs/{run_id}/{reason}"],
    fields=[{"state": "a"}],
    phases=[{"a": "nothing"}],
    base_url=["a.test", "ftp://a.test", "https://a:b@a.test", "https://a.test?b", "https://a b"],
)
def test_an_api_that_cannot_work_is_refused_at_construction(name, value):
    with pytest.raises(ValueError, match=f"{name}|a path template is like|valid Phase|a b"):
        replace(ORDINARY, **{name: value})


@each_value(
    base_url=[5],
    status=[5],
    start=[5],
    cancel=[5],
    root=[5],
    fields=[5, {"id": 5}],
    phases=[5, {5: "failed"}],
    auth_header=[5],
    auth_scheme=[5],
    answer_statuses=[5],
)
def test_an_api_of_the_wrong_types_is_a_type_error(name, value):
    with pytest.raises(TypeError):
        replace(ORDINARY, **{name: value})


def test_each_duration_of_doclo_is_milliseconds():
    for fields in ({"duration": 1500}, {"duration": True, "metrics": {"durationMs": 1500}}):
        assert runpoll.DOCLO.read_state({"id": "r1", "status": "success", **fields}).duration == 1.5
    for nothing in (10**400, "x", -1, True):
        answer = {"id": "r1", "status": "success", "duration": nothing}
        assert runpoll.DOCLO.read_state(answer).duration is None


def test_read_state_reads_a_webhook_alone():
    state = runpoll.RAPIDFOLIO.read_state({"runId": "r1", "status": "completed", "output": 1})
    assert (state.params, state.result(), state.raw["runId"]) == ({"run_id": "r1"}, 1, "r1")
    assert (state.polls, state.faults, state.elapsed, state.eta) == (0, 0, 0.0, None)


@table("params, what", (None, "id of a run"), ({"run_id": "r1"}, "status of run r1"))
@table("root", "", "data")
def test_what_is_no_state_is_told_in_a_sentence_with_what_the_api_says(params, what, root):
    said: Any = {"error": {"message": "no such run"}}
    with pytest.raises(BadResponse, match="; check the base_url and the Api's root") as caught:
        replace(ORDINARY, root=root).read_state({root: said} if root else said, params, None, 202)
    assert str(caught.value).startswith(f"the answer has no {what}; it says: no such run; ")
    assert caught.value.params == params and caught.value.http_status == 202
    assert caught.value.transient


@table(
    "said, state",
    ({"id": "r1", "status": "timeout"}, "timeout"),
    ({"runId": "r1", "status": "done"}, "done"),
    ({"status": "error"}, None),  # a gateway's
    ({"id": "r2", "status": "error"}, None),
    ({"id": "r1", "status": "odd"}, None),
    ({"id": "r1"}, None),
    (b"<html>", None),
)
def test_of_the_answer_statuses_only_what_names_the_run_is_a_state(lab, said, state):
    api = replace(ORDINARY, answer_statuses=(504,), phases={"timeout": "running"})
    session = lab.open(answer(said, 504), api=api, max_outage=0)
    if state:
        assert session.poll("r1").status == state
    else:
        with pytest.raises(ApiError, match="HTTP 504"):
            session.poll("r1")


class Headed(Api):
    """The state is in a header and in the HTTP status."""

    def read_state(self, body, params=None, headers=None, http_status=200):
        status = "running" if http_status == 202 else headers["X-STATE"]
        return super().read_state({"status": status, "output": body}, params, headers)


def test_a_subclass_reads_a_state_from_the_http_status_or_a_header(lab):
    told = answer({"a": 1}, headers={"x-state": "done"})
    states = list(iter_status(lab.open(answer(None, 202), told, api=Headed(**MINIMAL)), "r1"))
    assert statuses(states) == ["running", "done"]
    assert states[-1].raw == {"status": "done", "output": {"a": 1}}  # what the override handed on


def overridden(read_state: Callable[..., Any]) -> Api:
    """An Api whose read_state is this function."""
    kind = type("Overridden", (Api,), {"read_state": lambda self, *args, **_: read_state(*args)})
    return kind(**MINIMAL, start="/jobs")


@table("fault", KeyError, TypeError, ValueError, AttributeError, RecursionError)
def test_what_an_override_raises_is_a_transient_bad_response_that_names_it(lab, fault):
    api = overridden(raising(fault("secret output")))
    with pytest.raises(BadResponse, match=fault.__name__) as caught:
        lab.open(DONE, api=api, max_outage=0).poll("r1")
    assert caught.value.transient and "secret" not in str(caught.value)


@table("said", None, {"id": "r1"}, "running")
def test_an_override_that_returns_no_state_is_a_bad_response(lab, said):
    with pytest.raises(BadResponse, match="TypeError in read_state"):
        lab.open(DONE, api=overridden(lambda *_: said), max_outage=0).poll("r1")


def test_the_handle_of_a_state_that_an_override_made_by_itself_is_filled_in(lab):
    api = overridden(lambda *_: RunState("r7", "running", Phase.RUNNING))
    assert lab.open(DONE, api=api).start().params == {"run_id": "r7"}


# ---- Handles, paths and Locations


@table(
    "run_id, path",
    ("a/b", "/jobs/a%2Fb"),
    ("../secrets", "/jobs/..%2Fsecrets"),
    ("a?b=c#d", "/jobs/a%3Fb%3Dc%23d"),
    ("ä 1\n", "/jobs/%C3%A4%201%0A"),
    ("100%", "/jobs/100%25"),
)
def test_an_id_cannot_change_the_path(lab, run_id, path):
    lab.open(DONE).poll(run_id)
    assert lab.asked == [f"GET {path}"]


@table(
    "handle, error, text",
    ("", ValueError, "run_id"),
    ("..", ValueError, "run_id"),
    ({"run_id": "."}, ValueError, "run_id"),
    ({}, TypeError, "run_id"),
    ({"run_id": "a", "other": "b"}, TypeError, "other"),
    ({"run_id": None}, TypeError, "run_id"),
    (None, TypeError, "NoneType"),
    (7, TypeError, "int"),
    ("https://api.example.com/elsewhere/r1", ValueError, "status URL"),
)
def test_a_handle_that_names_no_run_is_refused_at_the_call(lab, handle, error, text):
    session = lab.open(DONE)
    for call in (Session.poll, Session.cancel, iter_status, wait):
        with pytest.raises(error, match=text):
            call(session, handle)
    assert not lab.requests


def test_every_kind_of_handle_names_the_same_run(lab):
    session = lab.open(run(status_url="https://elsewhere.test/jobs/r2"))  # never followed
    state = session.poll("r1")
    for handle in (state, state.params, {"run_id": "r1"}, "https://elsewhere.test/v9/jobs/r1?a=b"):
        assert session.poll(handle).params == {"run_id": "r1"}
    assert set(lab.asked) == {"GET /jobs/r1"}


@table(
    "status, location, run_id",
    ("/jobs/{run_id}", "/jobs/42", "42"),
    ("/jobs/{run_id}", "http://10.0.0.7:8080/jobs/42", "42"),
    ("/jobs/{run_id}", "https://api.example.com/v2/jobs/42/?wait=1#x", "42"),
    ("/jobs/{run_id}", "jobs/a%2Fb", "a/b"),
    ("/jobs/{run_id}", "/jobs/a&b", "a&b"),
    ("/jobs/{run_id}/state", "/jobs/42/state", "42"),
    ("/jobs?id={run_id}", "/jobs?id=42&a=b", "42"),
    ("/jobs/{run_id}?v=1", "/jobs/42", "42"),
)
def test_a_start_without_an_id_is_named_by_its_location(lab, status, location, run_id):
    api = replace(ORDINARY, status=status, cancel="")
    state = lab.open(answer(None, 202, {"Location": location}), api=api).start()
    assert (state.params, state.status, state.phase) == ({"run_id": run_id}, "", Phase.PENDING)


@table(
    "location",
    "/other/42?a=b",
    "/myjobs/42",
    "/jobs/42/log",
    "/jobs/",
    "/jobs/%2E%2E",
    "http://[broken/1",
)
def test_a_location_that_names_no_run_stands_in_the_error(lab, location):
    text = f"its Location {location.partition('?')[0]} does not end as"
    with pytest.raises(BadResponse, match=re.escape(text)) as caught:
        lab.open(answer(None, 202, {"Location": location})).start()
    assert "a run may have begun" in str(caught.value) and len(lab.requests) == 1


def test_the_known_parameters_of_a_location_have_to_be_its_own():
    params, headers = {"workflow_id": "w1"}, {"LOCATION": "/api/v1/workflows/w1/runs/r1/status"}
    assert runpoll.ONEPIN.read_state({}, params, headers).params == {**params, "run_id": "r1"}
    with pytest.raises(BadResponse):
        runpoll.ONEPIN.read_state({}, {"workflow_id": "w2"}, headers)


def test_parameters_of_the_start_alone_are_no_part_of_the_handle(lab):
    api = replace(ORDINARY, start="/{team}/jobs")
    assert lab.open(run(), api=api).start(team="a").params == {"run_id": "r1"}
    assert lab.asked == ["POST /a/jobs"]


@table("params, text", ({}, "lacks the parameter 'team'"), ({"team": "a", "b": "c"}, "has no 'b'"))
def test_missing_and_unknown_start_parameters_are_named(lab, params, text):
    session = lab.open(run(), api=replace(ORDINARY, start="/{team}/jobs"))
    with pytest.raises(TypeError, match=f"the path '/{{team}}/jobs' {text}"):
        session.start(**params)
    assert not lab.requests


def test_an_api_without_a_template_refuses_its_call(lab):
    session = lab.open(run(), api=replace(ORDINARY, start="", cancel=""))
    for call in (session.start, lambda: session.cancel("r1")):
        with pytest.raises(ValueError, match="this Api has no (start|cancel) template"):
            call()


# ---- The calls of a session


def test_a_start_sends_json_and_the_key_and_a_poll_accepts_gzip(lab):
    session = lab.open(run(), headers={"x-team": "a"})
    session.start({"a": 1}, headers={"Idempotency-Key": "k"})
    session.poll("r1")
    start, poll = lab.requests
    assert start.body == {"a": 1} and start.headers["Content-Type"] == "application/json"
    assert start.headers["Idempotency-Key"] == "k" and poll.headers["X-Team"] == "a"
    assert poll.headers["Authorization"] == f"Bearer {KEY}" and poll.body is None
    assert poll.headers["User-Agent"] == f"runpoll/{runpoll.__version__}"
    assert "gzip" in poll.headers["Accept-Encoding"]


@table(
    "options, header, value",
    ({}, "Authorization", f"Bearer {KEY}"),
    ({"auth_scheme": "Token"}, "Authorization", f"Token {KEY}"),
    ({"auth_header": "X-Api-Key", "auth_scheme": ""}, "X-Api-Key", KEY),
)
def test_where_the_key_goes(lab, options, header, value):
    lab.open(DONE, api=replace(ORDINARY, **options), key=f" {KEY}\n").poll("r1")
    assert lab.requests[0].headers[header] == value


def test_a_key_from_a_callable_is_asked_anew_for_every_attempt(lab):
    keys = iter(["first-key", "second-key"])
    lab.open(503, DONE, key=lambda: next(keys)).poll("r1")
    sent = [request.headers["Authorization"] for request in lab.requests]
    assert sent == ["Bearer first-key", "Bearer second-key"]


def test_without_a_key_none_is_sent(lab):
    lab.open(DONE, key=None).poll("r1")
    assert "Authorization" not in lab.requests[0].headers


def test_a_request_is_any_other_call_of_the_api(lab):
    lab.open(answer([1]), answer(None, 204))
    session = lab.session(base_url=f"{lab.server.url}/v2/")
    assert session.request("get", "/logs/{name}?a=b", params={"name": "x/y"}) == [1]
    assert session.request("PUT", "/logs", {"a": 1}) is None
    assert lab.asked == ["GET /v2/logs/x%2Fy?a=b", "PUT /v2/logs"]


# What a first look, the cancel and a second look are answered -> what comes of it: whether the run
# is cancelled, or the HTTP status of the error.
CANCELS = {
    "accepted, gone on": ([run(), {"ok": True}, run("cancelling")], True),
    "accepted, cancelled": ([run(), answer(None, 204), run("cancelled")], True),
    "accepted, had ended": ([run(), answer(), DONE], False),
    "accepted, deleted": ([run(), answer(), 404], True),
    "accepted, gone": ([run(), answer(), 410], True),
    "HTML": ([run(), answer(b"<html>"), run("cancelled")], True),
    "303": ([run(), answer(None, 303, {"Location": "/"}), run("cancelled")], True),
    "400, had ended": ([run(), 400, DONE], False),
    "409, had ended": ([run(), 409, run("failed")], False),
    "422, was cancelled": ([run(), 422, run("cancelled")], True),
    "409, active": ([run(), 409, run()], 409),
    "404, cannot be found": ([404, 404, 404], 404),
    "501, active": ([run(), 501, run()], 501),
    "not known yet": ([404, answer(), run("cancelled")], True),
    "had ended": ([DONE], False),
    "was cancelled": ([run("cancelled")], True),
    "401 at first": ([401], 401),
    "403 at first": ([403], 403),
    "401 to the cancel": ([run(), 401], 401),
    "502 to the cancel": ([run(), 502], 502),
}


@table("answers, outcome", **CANCELS)
def test_what_comes_of_a_cancel(lab, answers, outcome):
    session = lab.open(*answers, max_outage=0)
    if isinstance(outcome, bool):
        assert session.cancel("r1") is outcome
    else:
        with pytest.raises(ApiError, match=f"HTTP {outcome}"):
            session.cancel("r1")
    look, cancel = "GET /jobs/r1", "POST /jobs/r1/cancel"
    assert lab.asked == [look, cancel, look][: len(answers)]


def test_a_cancel_is_tried_again_after_a_fault_that_passes(lab):
    assert lab.open(run(), 502, answer(), run("cancelled")).cancel("r1") is True
    assert len(lab.requests) == 4


@table("word, outcome", ("cancelled", True), ("done", False), ("failed", False))
def test_a_cancel_of_a_state_that_is_done_asks_nothing(lab, word, outcome):
    assert lab.open(500).cancel(read(word)) is outcome
    assert not lab.requests


def test_a_cancel_by_another_method_and_with_a_body(lab):
    api = replace(ORDINARY, cancel="DELETE /jobs/{run_id}")
    lab.open(run(), answer(), run("cancelled"), api=api).cancel("r1", {"why": "late"})
    assert lab.asked[1] == "DELETE /jobs/r1" and lab.requests[1].body == {"why": "late"}


@each_value(
    base_url=["https://user:pw@api.test", "ftp://api.test"],
    request_timeout=[0, math.nan],
    max_outage=[-1],
    max_body=[-1],
    headers=[{"a b": "c"}, {"A": "b\nc"}],
    api_key=["a\nb", "a\tb", "\u20ac"],
    proxy=["socks5://127.0.0.1:1"],
)
def test_a_session_that_cannot_work_is_refused(name, value):
    with pytest.raises(ValueError, match=".") as caught:
        Session(ORDINARY, **{"api_key": KEY, name: value})
    assert not re.search("[ab]\n[bc]|a\tb", str(caught.value))


@each_value(
    api=[None],
    api_key=[7],
    headers=[5],
    request_timeout=[True],
    max_outage=["1"],
    sleep=[5],
    clock=[None],
)
def test_an_argument_of_the_wrong_type_is_a_type_error(name, value):
    with pytest.raises(TypeError):
        Session(**{"api": ORDINARY, "api_key": KEY, name: value})


@table(
    "call",
    no_method=lambda session: session.request("", "/a"),
    another_host=lambda session: session.request("GET", "@elsewhere.test/"),
    a_line_break_in_a_path=lambda session: session.request("GET", "/a\r\nX: y"),
    a_line_break_in_a_header=lambda session: session.start(headers={"A": "b\nc"}),
    no_time=lambda session: session.start(request_timeout=0),
    NaN=lambda session: session.start({"a": math.nan}),
    no_JSON=lambda session: session.start({"a": object()}),
)
def test_a_call_that_cannot_be_made_is_refused_before_any_request(lab, call):
    session = lab.open(run())
    with pytest.raises((TypeError, ValueError)):
        call(session)
    assert not lab.requests


def test_a_closed_session_says_so_and_has_no_connection_open(lab):
    with lab.open(run()) as session:
        states = iter_status(session, "r1")
        next(states)
    for call in (lambda: session.poll("r1"), lambda: next(states)):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    lab.server.until_closed()


def test_starts_from_several_threads_share_a_session(lab, simulator):
    session = lab.session(simulator.api("dibby"), **REAL)
    with ThreadPoolExecutor(8) as pool:
        begun = pool.map(lambda _: session.start(STARTS["dibby"][0]).id, range(32))
    assert len(set(begun)) == 32 and len(set(lab.connections)) <= 8


# ---- Faults, and which of them are tried again


PASSING = {
    **{str(status): status for status in (408, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)},
    "403 that limits": limited(403, 1),
    "reset": reset,
    "cut off": wire(HEAD + b"Content-Length: 99\r\n\r\n{"),
    "HTML": answer(b"<html>"),
    "empty": answer(),
    "no state": answer([]),
    "no HTTP": wire(b"hello\r\n\r\n"),
}
FINAL = [301, 302, 303, 307, 400, 401, 402, 403, 404, 405, 409, 410, 422, 451, 501, 505, 600]


@table("fault", **PASSING)
def test_a_fault_that_passes_is_sat_out_and_logged(lab, caplog, fault):
    assert lab.open(fault, DONE).poll("r1").ok
    assert len(lab.naps) == 1 and "run r1 (GET /jobs/r1): " in caplog.text


@table("status", *FINAL)
def test_another_error_is_raised_at_once(lab, status):
    with pytest.raises(ApiError) as caught:
        lab.open(status).poll("r1")
    assert caught.value.http_status == status and not caught.value.transient
    assert len(lab.requests) == 1 and not lab.naps


def test_the_waits_double_from_half_a_second_to_ten_with_jitter_until_max_outage(lab):
    with pytest.raises(ApiError) as caught:
        lab.open(502).poll("r1")
    assert caught.value.transient and sum(lab.naps) == pytest.approx(60)
    assert lab.naps[:-1] == about(*[0.5, 1, 2, 4, 8, 10, 10, 10, 10][: len(lab.naps) - 1])
    assert len(set(lab.naps)) > 5


def test_a_direct_call_has_one_patience_for_outages_and_rate_limits(lab):
    with pytest.raises(ApiError):
        lab.open(*[502, 429] * 20).poll("r1")
    assert sum(lab.naps) == pytest.approx(60)


@table("fault", 502, 429, reset)
def test_at_a_max_outage_of_0_a_fault_is_raised_at_once(lab, fault):
    with pytest.raises(runpoll.RunpollError):
        lab.open(fault, max_outage=0).poll("r1")
    assert len(lab.requests) == 1


@table("max_outage", 0, 60)
def test_a_401_under_a_callable_key_is_sat_out_for_ten_seconds(lab, max_outage):
    with pytest.raises(ApiError, match="HTTP 401"):
        lab.open(401, key=lambda: KEY, max_outage=max_outage).poll("r1")
    assert sum(lab.naps) == pytest.approx(10)


@table("status", 429, 403, 503, 502)
@table(
    "headers, seconds",
    seconds=({"Retry-After": "7"}, 7),
    fractional=({"Retry-After": " 2.5 "}, 2.5),
    just_in_time=({"Retry-After": "60"}, 60),
    a_date_whatever_the_clock_here_says=(
        {"Retry-After": "Fri, 27 Feb 2026 12:00:05 GMT", "Date": "Fri, 27 Feb 2026 12:00:00 GMT"},
        5,
    ),
)
def test_a_retry_after_replaces_the_wait(lab, caplog, status, headers, seconds):
    lab.open(answer(None, status, headers), DONE).poll("r1")
    assert lab.naps == [pytest.approx(seconds)]
    assert f"; trying again in {seconds:.1f} s" in caplog.text


def test_the_wait_that_is_announced_before_a_deadline_is_the_one_that_is_made(lab, caplog):
    with pytest.raises(PollTimeout):
        wait(lab.open(*[answer(None, 503)] * 20), "r1", timeout=5)
    announced = [float(found) for found in re.findall(r"again in (\S+) s", caplog.text)]
    assert len(lab.naps) > 3 and lab.naps == pytest.approx(announced[: len(lab.naps)], abs=0.06)


@table("value", "0", "-1", "soon", "Fri, 27 Feb 2015 12:00:00 GMT", "1e3", "")
def test_a_retry_after_that_says_nothing_is_as_if_absent(lab, value):
    lab.open(answer(None, 429, {"Retry-After": value}), DONE).poll("r1")
    assert lab.naps == about(0.5)
    assert ORDINARY.read_state(run(), headers={"Retry-After": value}).retry_after is None


def test_a_direct_call_does_not_wait_for_what_ends_after_max_outage(lab):
    with pytest.raises(ApiError, match="in 61 s") as caught:
        lab.open(limited(429, 61)).poll("r1")
    assert caught.value.retry_after == 61 and not lab.naps


@table("seconds, held", (100, 100), (3600, 120))
def test_what_is_not_waited_for_holds_back_the_next_call_for_two_minutes(lab, seconds, held):
    session = lab.open(limited(429, seconds), run())
    with pytest.raises(ApiError):
        session.poll("r1")
    assert session.poll("r1").id == "r1" and lab.naps == [held]


@table("status, held", (429, True), (403, True), (503, True), (502, False))
def test_who_is_limited_holds_back_the_whole_session(lab, status, held):
    session = lab.open(limited(status, 9), run())
    begun = []

    def another() -> None:
        session.request("GET", "/other")
        begun.append(lab.clock.now)

    lab.clock.meanwhile = another
    session.poll("r1")
    assert begun == [1009 if held else 1000]


def test_a_rate_limit_without_a_time_holds_back_the_session_for_its_wait(lab):
    session = lab.open(429, run())
    lab.clock.meanwhile = lambda: session.request("GET", "/other")
    session.poll("r1")
    assert lab.naps == about(0.5, 0.5)


# ---- A start is never sent twice where the first may have begun a run


OPEN = {  # what leaves open whether a run has begun
    **{str(status): status for status in (408, 425, 500, 502, 504)},
    "303": answer(None, 303, {"Location": "/jobs/r1"}),
    "reset": reset,
    "cut off": wire(b"HTTP/1.1 202 Accepted\r\nContent-Length: 99\r\n\r\n{"),
    "HTML": answer(b"<html>"),
    "no id": answer({"status": "running"}),
    "an interim answer": wire(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


@table("fault", **OPEN)
def test_a_start_that_may_have_begun_is_not_sent_again(lab, fault):
    text = r"^start \(POST .*; a run may have begun: look before"
    with pytest.raises(runpoll.RunpollError, match=text) as caught:
        lab.open(fault, run()).start()
    assert len(lab.requests) == 1 and getattr(caught.value, "sent", True)


def test_a_start_whose_answer_an_override_does_not_take_is_not_sent_again(lab):
    class Own(Api):
        def read_state(self, *arguments: Any, **named: Any) -> RunState:
            raise runpoll.RunpollError("not this", transient=True)

    api = Own(ORDINARY.base_url, ORDINARY.status, start="/jobs")
    with pytest.raises(runpoll.RunpollError, match="not this"):
        lab.open(run(), api=api).start()
    assert len(lab.requests) == 1


def test_a_start_that_is_given_up_may_have_begun(lab):
    with pytest.raises(TransportError, match=r"no answer within 0.1 s.*may have begun") as caught:
        lab.open(hang).start(request_timeout=0.1)
    assert caught.value.sent and len(lab.requests) == 1


@table("method", "POST", "PUT")
def test_a_start_is_tried_again_where_no_run_can_have_begun(lab, method):
    api = replace(ORDINARY, start=f"{method} /jobs")
    assert lab.open(429, limited(403, 1), 401, run(), api=api, key=lambda: KEY).start().id == "r1"


def test_a_start_that_made_no_connection_has_begun_no_run(lab):
    session = lab.session(base_url=f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(TransportError, match="Connection refused.*; no run has begun") as caught:
        session.start()
    assert caught.value.sent is False and len(lab.naps) > 5


@table("status", 400, 401, 402, 404, 409, 422)
def test_a_start_that_is_refused_has_begun_no_run(lab, status):
    with pytest.raises(ApiError, match="; no run has begun"):
        lab.open(status).start()


@table("name", "500", "502", "reset", "HTML")
def test_a_repeatable_start_is_sent_again_after_any_fault_that_passes(lab, name):
    assert lab.open(OPEN[name], run()).start({"a": 1}, repeatable=True).id == "r1"
    assert [request.body for request in lab.requests] == [{"a": 1}] * 2


@table("last", 429, 401)
def test_what_an_earlier_attempt_left_open_stays_open(lab, last):
    session = lab.open(reset, last, max_outage=5)
    with pytest.raises(ApiError, match="a run may have begun"):
        session.start(repeatable=True)


def test_what_was_refused_after_it_may_have_arrived_was_sent(lab):
    session = lab.open(500, max_outage=5)
    lab.clock.meanwhile = lab.server.__exit__
    with pytest.raises(TransportError, match="a run may have begun") as caught:
        session.start(repeatable=True)
    assert caught.value.sent is True


@table("method", "GET", "HEAD", "PUT", "DELETE")
def test_a_request_by_an_idempotent_method_is_tried_again(lab, method):
    lab.open(502, answer()).request(method, "/a")
    assert lab.asked == [f"{method} /a"] * 2


@table("method", "POST", "PATCH")
def test_a_request_by_another_method_is_not(lab, method):
    with pytest.raises(ApiError):
        lab.open(502, answer()).request(method, "/a")
    assert len(lab.requests) == 1


# ---- Strange answers


@table(
    "body",
    deep=b"[" * 100_000,
    five_thousand_digits=b'{"id": "r1", "status": "done", "n": ' + b"9" * 5000 + b"}",
    truncated=b'{"id": "r1", "status": "do',
    a_list=b"[1]",
    a_text=b'"done"',
    gzip_that_is_none=b"\x1f\x8bgarbage",
)
def test_a_strange_success_answer_is_a_bad_response(lab, body):
    if sys.version_info < (3, 9, 14) and b"9" * 99 in body:
        pytest.skip("this Python reads numbers of any length")
    headers = {"Content-Encoding": "gzip"} if body[:1] == b"\x1f" else {}
    with pytest.raises(BadResponse, match="HTTP 200, but the answer") as caught:
        lab.open(answer(body, headers=headers), max_outage=0).poll("r1")
    assert caught.value.http_status == 200 and caught.value.__cause__ is None


@table(
    "pieces",
    no_HTTP=[b"hello\r\n\r\n"],
    nothing=[b""],
    ten_thousand_headers=[HEAD, b"A: b\r\n" * 10_000, b"\r\n"],
    a_long_header=[HEAD + b"A: ", b"b" * 2**17, b"\r\n\r\n"],
    cut_off=[HEAD + b"Content-Length: 9\r\n\r\n{}"],
    a_broken_chunk=[CHUNKED + b"zz\r\n"],
    a_chunk_of_less_than_nothing=[CHUNKED + b"-5\r\nabcde\r\n0\r\n\r\n"],
    an_interim_answer_alone=[b"HTTP/1.1 103 Early Hints\r\n\r\n"],
)
def test_an_answer_that_is_none_is_a_transport_error(lab, pieces):
    with pytest.raises(TransportError, match=r"no answer \(.+\); try again later") as caught:
        lab.open(wire(*pieces), max_outage=0).poll("r1")
    assert caught.value.sent and caught.value.transient and caught.value.__cause__


@table("http_status", 200, 404)
def test_an_error_does_not_keep_the_whole_answer(lab, http_status):
    with pytest.raises(runpoll.RunpollError) as caught:
        lab.open(answer(b"<p>" + b"x" * 999 + b"</p>", http_status), max_outage=0).poll("r1")
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    ours = [frame for frame in frames if frame.f_code.co_filename == runpoll.__file__]
    assert ours and "</p>" not in repr([frame.f_locals for frame in ours])


def test_a_byte_that_is_no_utf_8_is_replaced(lab):
    body = b'\xef\xbb\xbf{"id": "r1", "status": "running", "log": "caf\xc3"}'
    assert lab.open(answer(body)).poll("r1").raw["log"] == "caf\ufffd"


def gzipped(content: bytes) -> Answer:
    return answer(gzip.compress(content), headers={"Content-Encoding": "gzip"})


def test_a_gzipped_answer_is_unpacked(lab):
    session = lab.open(gzipped(json.dumps({**DONE, "pad": "x" * 100_000}).encode()))
    assert session.poll("r1").ok and session.poll("r1").ok
    assert lab.connections == [1, 1]


@table(
    "too_large",
    a_byte_too_many=answer(b" " * 2001),
    an_error=answer(b"x" * 2001, 500),
    chunked=wire(CHUNKED, *[CHUNK] * 99),
    a_gibibyte=wire(HEAD + b"Content-Length: 1073741824\r\n\r\n", b" " * 2**20),
    gzip_bomb=gzipped(b" " * 10**7),
)
def test_an_answer_over_max_body_is_final(lab, too_large):
    with pytest.raises(BadResponse, match="max_body, 2000 bytes; raise max_body") as caught:
        lab.open(too_large, max_body=2000).poll("r1")
    assert not caught.value.transient and len(lab.requests) == 1


@table("max_body", len(json.dumps(DONE)), math.inf)
def test_an_answer_of_exactly_max_body_is_read(lab, max_body):
    assert lab.open(DONE, max_body=max_body).poll("r1").ok


def test_a_long_error_page_in_one_line_is_only_looked_at(lab):
    with pytest.raises(ApiError) as caught:
        lab.open(answer(b"<p>" * 100_000, 500), max_outage=0).poll("r1")
    assert len(str(caught.value)) < 400 and len(caught.value.body) == 500


@table("body", short=b"{}", empty=b"", long=b'"' + b"x" * 70_000 + b'"')
@table("status", b"200 OK", b"204 No Content", b"103 Early Hints")
def test_nothing_of_one_answer_is_taken_for_the_next(lab, status, body):
    first = b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}"
    second = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    session = lab.open(wire(first + second, close=False), answer([7]), max_outage=0)
    with contextlib.suppress(TransportError):
        session.request("GET", "/a")
    assert session.request("GET", "/b") == [7]


def test_an_answer_of_http_1_0_ends_with_its_connection(lab):
    session = lab.open(wire(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(DONE).encode()))
    assert session.poll("r1").ok and session.poll("r1").ok
    assert lab.connections == [1, 2]


def test_a_connection_that_the_server_closed_is_replaced(lab):
    session = lab.open(wire(HEAD + b"Content-Length: 2\r\n\r\n{}"), DONE)
    session.request("GET", "/a")
    lab.server.until_closed()
    assert session.start().ok and lab.connections == [1, 2]


@table("way", "plain", "tls", "tunnel")
def test_a_connection_that_was_idle_for_more_than_15_s_is_not_used(lab, monkeypatch, way):
    session, real = lab.open(run(), way=way), time.monotonic
    session.poll("r1")
    for later in (10, 26):
        monkeypatch.setattr(time, "monotonic", lambda later=later: real() + later)
        session.poll("r1")
    assert lab.connections == [1, 1, 2]


# ---- How long an attempt may take


@table("way, limit", ("plain", 0.1), ("tls", 0.2), ("tunnel", 0.2))
@table("slow", **SLOW)
def test_the_request_timeout_bounds_one_attempt_however_it_drips(lab, way, limit, slow):
    session = lab.open(slow, way=way, request_timeout=limit, max_outage=0)
    begun = time.monotonic()
    with pytest.raises(TransportError, match=f"no answer within {limit} s"):
        session.poll("r1")
    assert limit * 0.95 < time.monotonic() - begun < 5


def test_a_tls_handshake_that_hangs_has_sent_nothing(lab):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        session = lab.session(base_url=url, request_timeout=0.2, max_outage=0)
        with pytest.raises(TransportError, match=r"no connection within 0\.1 s.*no run") as caught:
            session.start(request_timeout=9)
    assert caught.value.sent is False


def test_what_an_answer_left_of_its_time_is_no_limit_for_the_next_request(lab):
    # Its last byte comes late, and what follows is not taken in for a while.
    late = wire(HEAD + b"Content-Length: 2\r\n\r\n", 0.2, b"{", 0.01, b"}", 0.3, close=False)
    session = lab.open(late, answer([7]), max_outage=0)
    session.request("GET", "/a", request_timeout=0.4)
    assert session.request("PUT", "/b", "x" * 2**24) == [7]


def test_sending_a_body_has_the_time_of_the_attempt_not_that_of_connecting(lab):
    session = lab.open(run(), request_timeout=0.2)
    lab.server.reads_after = 0.3
    assert session.start("x" * 2**24, request_timeout=30).id == "r1"


# ---- Proxies and TLS


def test_a_proxy_tunnels_to_an_api_over_tls(lab):
    session = lab.open(DONE, way="tunnel")
    assert session.poll("r1").ok and session.poll("r1").ok
    (connect,) = lab.proxy.requests
    assert f"{connect.method} {connect.path}" == f"CONNECT localhost:{lab.server.port}"
    assert connect.headers["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"


def test_a_proxy_is_asked_for_whole_urls_over_plain_http(lab):
    proxy = lab.serve(DONE).url.replace("//", "//user:p%40ss@")
    session = lab.session(base_url="http://api.test/v2", proxy=proxy, allow_http=True)
    assert session.poll("r1").ok and session.poll("r1").ok
    assert lab.asked == ["GET http://api.test/v2/jobs/r1"] * 2 and lab.connections == [1, 1]
    assert lab.requests[0].headers["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"


def test_a_proxy_that_refuses_to_connect_leaves_no_connection_open(lab):
    proxy = lab.serve(400)
    session = lab.session(base_url="https://api.test", proxy=proxy.url, max_outage=0)
    with pytest.raises(TransportError) as caught:
        session.poll("r1")
    proxy.until_closed()
    assert caught.value.sent is False and lab.asked == ["CONNECT api.test:443"]


@table("scheme", "http", "https")
def test_a_proxy_of_the_environment_is_used(lab, monkeypatch, scheme):
    monkeypatch.setenv(f"{scheme}_proxy", lab.serve(400).url[len("http://") :])
    with pytest.raises(runpoll.RunpollError):
        lab.session(base_url=f"{scheme}://api.test", allow_http=True, max_outage=0).poll("r1")
    assert lab.asked in (["GET http://api.test/jobs/r1"], ["CONNECT api.test:443"])


@table("proxy", None, "")
def test_this_machine_is_asked_directly(lab, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    assert lab.open(DONE, proxy=proxy).poll("r1").ok


def test_no_proxy_is_obeyed(monkeypatch):
    monkeypatch.setenv("https_proxy", "ftp://refused.test")
    monkeypatch.setenv("no_proxy", "api.example.com")
    Session(ORDINARY, KEY)
    monkeypatch.delenv("no_proxy")
    with pytest.raises(ValueError, match="a proxy is http"):
        Session(ORDINARY, KEY)


def test_a_proxy_that_lets_nothing_through_has_begun_no_run(lab):
    proxy = lab.serve(403)
    session = lab.session(base_url="https://api.test", proxy=proxy.url, max_outage=1)
    with pytest.raises(TransportError, match=r"403.*no run has begun") as caught:
        session.start()
    assert caught.value.sent is False and len(proxy.requests) > 1


def test_a_private_authority_is_trusted_by_an_ssl_context(lab):
    session = lab.open(DONE, way="tls")
    assert session.poll("r1").ok and session.poll("r1").ok
    assert lab.connections == [1, 1]


def test_a_certificate_that_is_not_trusted_is_final_and_nothing_was_sent(lab):
    with pytest.raises(TransportError, match=r"not trusted .*ssl_context.*no run") as caught:
        lab.open(DONE, way="tls", ssl_context=None).start()
    assert not caught.value.transient and not caught.value.sent and not lab.requests


def test_a_host_that_cannot_be_is_told_from_one_that_is_not_trusted(lab):
    with pytest.raises(TransportError, match="no answer .*label empty or too long") as caught:
        lab.session(base_url=f"https://{'a' * 70}.test", max_outage=0).poll("r1")
    assert caught.value.sent is False


# ---- The key goes to the API's own origin and nowhere else


@table("status", 301, 302, 303, 307, 308)
def test_a_redirect_is_not_followed_and_says_where_to(lab, status):
    elsewhere = lab.enter(Server(DONE))
    location = {"Location": f"{elsewhere.url}/login?token=secret"}
    with pytest.raises(ApiError, match=f"to {elsewhere.url}/login; redirects are not") as caught:
        lab.open(answer(None, status, location)).poll("r1")
    assert not elsewhere.requests and "secret" not in str(caught.value)


@table("host", "api.test", "127.0.0.1.evil.test", "10.0.0.1", "[fe80::1]")
def test_a_key_over_plain_http_to_another_machine_is_refused(host):
    with pytest.raises(ValueError, match="plain http"):
        Session(ORDINARY, KEY, base_url=f"http://{host}")
    Session(ORDINARY, KEY, base_url=f"http://{host}", allow_http=True)
    Session(ORDINARY, "", base_url=f"http://{host}")


@table("host", "localhost", "127.0.0.1", "127.1.2.3", "[::1]")
def test_a_key_over_plain_http_to_this_machine_is_sent(host):
    Session(ORDINARY, KEY, base_url=f"http://{host}:8080")
    with pytest.raises(ValueError, match="plain http"):
        Session(ORDINARY, KEY, base_url=f"http://{host}:8080", proxy="http://proxy.test:3128")


@table(
    "echo",
    error=answer({"error": {"message": f"bad key {KEY}", "code": KEY, "details": KEY}}, 400),
    text=answer(f"bad key {KEY}".encode(), 400),
    no_state=answer({"error": f"bad key {KEY}"}),
    HTML=answer(f"<p>{KEY}".encode()),
    header=answer(None, 500, {"X-Request-Id": KEY}),
    location=answer(None, 302, {"Location": f"/login/{KEY}"}),
    status_line=wire(f"HELLO {KEY}\r\n\r\n".encode()),
    reason=wire(f"HTTP/1.1 400 {KEY}\r\nContent-Length: 0\r\n\r\n".encode()),
)
def test_a_key_that_the_api_sends_back_is_in_no_error_and_no_log(lab, caplog, echo):
    caplog.set_level(logging.DEBUG, "runpoll")
    session = lab.open(echo, max_outage=1)
    with pytest.raises(runpoll.RunpollError) as caught:
        session.poll("r1")
    error = caught.value
    shown = "".join(traceback.format_exception(type(error), error, None)) + repr(vars(error))
    records = "".join(record.getMessage() for record in caplog.records if record.name == "runpoll")
    assert KEY not in shown + records + repr(session) and "[key]" in shown


def test_a_text_that_is_cut_is_cut_between_words_as_part_of_a_key_is_not_known_as_one(lab):
    session = lab.open(answer({"error": f"{'no ' * 63}{KEY}"}), max_outage=0)
    with pytest.raises(BadResponse, match=r"no no\.\.\.; check") as caught:
        session.poll("r1")
    assert KEY[:8] not in str(caught.value)


@table("length, shown", (200, "x" * 200), (201, "..."))
def test_a_word_that_is_longer_than_a_text_may_be_a_key_and_is_not_shown(lab, length, shown):
    with pytest.raises(ApiError, match=f": {re.escape(shown)}; unchanged"):
        lab.open(answer({"error": "x" * length}, 400)).poll("r1")


def test_no_part_of_a_key_that_is_longer_than_a_text_is_shown(lab):
    key = "secret_" * 50
    with pytest.raises(ApiError) as caught:
        lab.open(answer({"error": f"{key} is unknown"}, 401), key=key).poll("r1")
    assert "secret" not in str(caught.value)
    assert caught.value.error.message == "[key] is unknown"


@table("key, shown", ("seven77", True), ("eight888", False))
def test_a_key_of_eight_characters_or_more_is_not_shown(lab, key, shown):
    with pytest.raises(ApiError) as caught:
        lab.open(answer({"error": f"bad {key}"}, 400), key=key).poll("r1")
    assert (key in str(caught.value)) is shown


def test_a_key_that_is_escaped_in_json_is_shown_by_no_error_info(lab):
    session = lab.open(answer(rb'{"error": "bad key abc\/def\/ghi=="}', 400), key="abc/def/ghi==")
    with pytest.raises(ApiError) as caught:
        session.poll("r1")
    assert caught.value.error.message == "bad key [key]"


@table("depth", 100, 300, 450, 600, 900)
def test_details_that_are_nested_deep_hide_neither_the_error_nor_the_key_in_them(lab, depth):
    details = "[" * depth + f'"{KEY}"' + "]" * depth
    body = f'{{"message": "no such run", "details": {details}}}'.encode()
    with pytest.raises(ApiError, match="HTTP 404") as caught:
        lab.open(answer(body, 404)).poll("r1")
    value = caught.value.error.details
    while isinstance(value, list):
        [value] = value
    assert value in ("[key]", None) and KEY not in str(caught.value) + caught.value.error.message


def test_a_key_of_seven_characters_may_be_an_ordinary_word(lab):
    with pytest.raises(ApiError, match="running out"):
        lab.open(answer({"error": "running out"}, 400), key="running").poll("r1")


@table("said, cause", ("odd", KeyError), (KEY, type(None)))
def test_what_an_override_raises_is_the_cause_unless_it_shows_the_key(lab, said, cause):
    api = overridden(raising(KeyError(said)))
    with pytest.raises(BadResponse) as caught:
        lab.open(DONE, api=api, max_outage=0).poll("r1")
    assert type(caught.value.__cause__) is cause


@table("fault", OSError, ValueError, KeyError, BadResponse, KeyboardInterrupt)
def test_what_a_callable_key_raises_comes_out_unchanged(lab, fault):
    raised = fault("no key")
    session = lab.open(run(), key=raising(raised))
    batch = iter_batch(session, ["r1"], timeout=60)
    for call in (session.start, lambda: session.poll("r1"), lambda: next(batch)):
        with pytest.raises(fault) as caught:
            call()
        assert caught.value is raised
    assert not lab.requests


# ---- Errors


ATTRIBUTES = {
    runpoll.RunpollError: "params transient",
    TransportError: "params transient sent",
    ApiError: "params transient http_status error body request_id retry_after",
    BadResponse: "params transient http_status body",
    PollTimeout: "params transient state",
    runpoll.RunFailed: "params transient state",
    runpoll.RunCancelled: "params transient state",
    runpoll.RunNotDone: "params transient state",
    BatchError: "params transient errors",
}


@table("kind, names", *ATTRIBUTES.items())
def test_an_error_can_be_made_with_its_text_alone_and_pickles(kind, names):
    error = kind("a text")
    assert isinstance(error, runpoll.RunpollError)
    assert all(hasattr(error, name) for name in names.split())
    error.params = {"run_id": "r1"}
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(other), str(other), vars(other)) == (kind, "a text", vars(error))


def test_an_api_error_carries_what_the_answer_said(lab):
    said = {"error": {"code": "LIMIT", "message": "at its limit"}, "meta": {"request_id": "req_1"}}
    with pytest.raises(ApiError) as caught:
        lab.open(answer(said, 409)).poll("r1")
    error = caught.value
    assert str(error) == (
        "run r1 (GET /jobs/r1): HTTP 409: at its limit (request req_1); "
        "unchanged it will fail again"
    )
    assert error.error == ErrorInfo("at its limit", "LIMIT") and error.request_id == "req_1"
    assert error.body == json.dumps(said) and error.params == {"run_id": "r1"}


@table("header", "X-Request-Id", "Request-Id")
def test_the_id_of_a_request_that_failed_may_stand_in_a_header(lab, header):
    with pytest.raises(ApiError, match=r"\(request req_1\)") as caught:
        lab.open(answer(None, 400, {header: "req_1"})).poll("r1")
    assert caught.value.request_id == "req_1"


ADVICE = {
    "401": (401, "check the API key"),
    "403": (403, "check the API key and what it may do"),
    "404": (404, "check the id, the base_url, and whether the key may see it"),
    "429": (429, "ask less often"),
    "500": (500, "try again later"),
    "501": (501, "unchanged it will fail again"),
    "403 that limits": (limited(403, 9), "ask less often, in 9 s as it says"),
    "503 that limits": (limited(503, 1800), "in 1800 s as it says"),
    "nothing": (answer(None, 400), "HTTP 400: Bad Request"),
    "page": (answer(b"\n <html>\x1b[31m\nx", 400), r"HTTP 400: Bad Request <html> \[31m;"),
    "no JSON": (answer(b"<html>"), "check the base_url and the Api"),
}


@table("fault, text", **ADVICE)
def test_a_text_says_what_happened_and_what_to_do(lab, fault, text):
    with pytest.raises(runpoll.RunpollError, match=text):
        lab.open(fault, max_outage=0).poll("r1")


def test_the_text_of_another_call_has_its_path_and_no_query(lab):
    with pytest.raises(ApiError, match="^POST /a: HTTP 400") as caught:
        lab.open(400).request("POST", "/a?token=secret")
    assert caught.value.params is None


# ---- Servers that nobody here wrote


@contextlib.contextmanager
def served(server: Any) -> Iterator[str]:
    """The URL of a server of the standard library's, while it runs, without its log."""
    silent = {"log_message": lambda *_: None}
    server.RequestHandlerClass = type("Silent", (server.RequestHandlerClass,), silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.001})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_status_file_of_the_standard_librarys_file_server_is_followed(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r1.json").write_text(json.dumps(DONE))
    handler = http.server.SimpleHTTPRequestHandler
    with served(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        session = lab.session(Api(base_url=url, status="/{run_id}.json"), None)
        assert wait(session, "r1").result() == {"total": 7}
        with pytest.raises(ApiError, match="HTTP 404"):
            session.poll("r2")


def test_an_application_of_wsgiref_is_driven(lab):
    states = [run("queued"), run(), DONE]

    def application(environ: Any, start_response: Any) -> list[bytes]:
        begins = environ["REQUEST_METHOD"] == "POST"
        start_response("202 Accepted" if begins else "200 OK", [("Content-Type", "text/plain")])
        return [json.dumps(states.pop(0)).encode()]

    with served(wsgiref.simple_server.make_server("127.0.0.1", 0, application)) as url:
        session = lab.session(base_url=url)
        assert statuses(iter_status(session, session.start())) == ["queued", "running", "succeeded"]


# ---- Following one run


def test_every_state_is_yielded_and_the_terminal_one_last(lab):
    session = lab.open(run("queued"), run(progress=0.5), DONE)
    states = list(iter_status(session, "r1", interval=5))
    assert statuses(states) == ["queued", "running", "succeeded"]
    assert [state.polls for state in states] == [1, 2, 3]
    assert [state.elapsed for state in states] == [0, 5, 10]
    assert lab.naps == [5, 5] and states[-1].result() == {"total": 7}


def test_a_state_that_is_handed_in_is_yielded_first_without_a_request(lab):
    session = lab.open(run(), DONE)
    begun = replace(session.start(), polls=7, faults=2, elapsed=9.0, eta=1.0)
    states = list(iter_status(session, begun, interval=5))
    seen = [(state.polls, state.faults, state.elapsed, state.eta) for state in states]
    assert seen == [(0, 0, 0.0, None), (1, 0, 5.0, None)] and len(lab.requests) == 2


def test_a_terminal_state_that_is_handed_in_costs_nothing(lab):
    session = lab.open(500)
    done = read("done")
    assert wait(session, done) == done and list(iter_status(session, done)) == [done]
    assert not lab.requests and not lab.naps


def test_a_loop_that_is_left_leaves_nothing_behind(lab):
    session = lab.open(run())
    for state in iter_status(session, "r1"):
        assert not state.done
        break
    assert session.poll("r1") and lab.connections == [1, 1]


def test_the_connection_is_kept_and_after_a_fault_there_is_another(lab):
    wait(lab.open(run(), 502, run(), reset, run(), DONE), "r1")
    assert lab.connections == [1, 1, 1, 1, 2, 2]


@table("call", iter_status, wait)
@each_value(interval=[-1, math.nan, "1", None], timeout=[math.nan, "1"], session=[None])
def test_wrong_arguments_are_refused_at_the_call(lab, call, name, value):
    with pytest.raises((TypeError, ValueError)):
        call(**{"session": lab.open(run()), "run": "r1", name: value})
    assert not lab.requests


# ---- Pacing


def test_the_default_interval_grows_from_one_second_to_twelve(lab):
    wait(lab.open(*[run()] * 14, DONE), "r1", timeout=None)
    plain = [min(1.3**k, 12) for k in range(14)]
    assert lab.naps == about(*plain) and max(lab.naps) <= 12
    assert lab.naps != pytest.approx(plain, rel=0.001)


@table("interval", 2, 2.0, lambda state: {"running": 2}[state.status])
def test_an_interval_is_a_number_or_a_callable_that_is_not_asked_about_the_end(lab, interval):
    wait(lab.open(run(), run(), DONE), "r1", interval=interval)
    assert lab.naps == [2, 2]


@table("wrong", -1, math.nan)
def test_a_callable_interval_that_makes_no_sense_is_refused(lab, wrong):
    states = iter_status(lab.open(run()), "r1", interval=lambda state: wrong)
    assert next(states).status == "running"
    with pytest.raises(ValueError, match="interval"):
        next(states)


@table(
    "options, state, seconds",
    ({}, {"polls": 0}, 1),
    ({}, {"polls": 1}, 1),
    ({}, {"polls": 3}, 1.69),
    ({}, {"polls": 10_000}, 12),
    ({"initial": 0}, {"polls": 10_000}, 0),
    ({"initial": 5, "factor": 2, "maximum": 30}, {"polls": 3}, 20),
    ({}, {"polls": 9, "eta": 5.0}, 3.5),
    ({}, {"polls": 9, "eta": 0.1}, 1),
    ({}, {"polls": 9, "eta": 1000.0}, 1.3**8),
    ({"pace": None}, {"polls": 9, "eta": 5.0}, 1.3**8),
    ({"initial": 5}, {"polls": 1, "eta": 1.0}, 5),
    ({}, {"polls": 9, "phase": Phase.PAUSED}, 30),
    ({"paused": 7}, {"polls": 1, "phase": Phase.PAUSED, "eta": 1.0}, 7),
)
def test_the_backoff_is_a_function_of_the_state(options, state, seconds):
    backoff = runpoll.Backoff(jitter=0, **options)
    assert backoff(replace(read(), **state)) == pytest.approx(seconds)


@table("polls, least, most", first=(1, 0.5, 1.5), never_above_maximum=(99, 6, 12))
def test_the_jitter_stays_in_its_bounds(polls, least, most):
    backoff, state = runpoll.Backoff(jitter=0.5), replace(read(), polls=polls)
    waits = [backoff(state) for _ in range(300)]
    assert least <= min(waits) < least * 1.1 and most * 0.95 < max(waits) <= most


@table("jitter", 0, 1)
def test_a_jitter_is_a_share(jitter):
    assert 0 <= runpoll.Backoff(jitter=jitter)(read()) <= 2


@each_value(initial=[-1], factor=[math.nan], jitter=[1.1], pace=[-1], paused=[-1])
def test_a_backoff_that_cannot_work_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        runpoll.Backoff(**{name: value})


def test_no_time_left_is_estimated_where_none_has_passed(lab):
    states = iter_status(lab.open(run(progress=0.1), run(progress=0.5)), "r1", interval=0)
    assert [state.eta for state in itertools.islice(states, 2)] == [None, None]


def test_the_time_left_is_estimated_from_what_this_iteration_saw(lab):
    shares = [0.2, 0.2, 0.4, 0.7]
    session = lab.open(*[run(progress=share) for share in shares], DONE)
    stored = replace(read(progress=0.1), eta=0.8)
    states = list(iter_status(session, stored, interval=10))
    assert [state.eta for state in states[:3]] == [None, None, None]
    assert [state.eta for state in states[3:5]] == pytest.approx([0.6 / 0.2 * 20, 0.3 / 0.5 * 30])


def test_a_retry_after_on_a_good_answer_replaces_the_interval_once(lab):
    asked_to_wait = answer(run(), headers={"Retry-After": "7"})
    far = answer(run(), headers={"Retry-After": "3600"})
    session = lab.open(asked_to_wait, run(), asked_to_wait, run(), far, DONE)
    wait(session, session.start(), interval=2, timeout=None)
    assert lab.naps == [7, 2, 7, 2, 120]


@table("body, naps", (3, [2, 2]), (5, []), (60, []))
def test_the_time_that_the_loop_body_takes_is_part_of_the_interval(lab, body, naps):
    for _ in iter_status(lab.open(run(), run(), DONE), "r1", interval=5):
        lab.clock.now += body
    assert lab.naps == naps and len(lab.requests) == 3


class CountingClock:
    """The real one, and how often it was looked at."""

    looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return time.monotonic()


@table("follow, runs", (iter_status, "r1"), (iter_batch, ["r1"]))
def test_the_real_clock_is_wired_and_a_wait_is_no_busy_loop(lab, follow, runs):
    clock = CountingClock()
    session = lab.open(run(), DONE, sleep=time.sleep, clock=clock)
    begun = time.monotonic()
    assert len(list(follow(session, runs, interval=0.1, timeout=60))) == 2
    assert time.monotonic() - begun >= 0.1 and clock.looks < 40


# ---- A sleep that ends what waits


def test_a_sleep_that_returns_true_ends_a_direct_call_with_its_fault(lab):
    with pytest.raises(ApiError, match="HTTP 502"):
        lab.open(502, sleep=lambda seconds: True).poll("r1")
    assert len(lab.requests) == 1


def test_the_first_attempt_of_a_direct_call_is_always_made(lab):
    assert lab.open(DONE, sleep=lambda seconds: True).poll("r1").ok


def test_a_sleep_that_returns_early_is_slept_again(lab):
    session = lab.open(limited(503, 1), DONE, sleep=lambda most: lab.clock.sleep(min(most, 0.3)))
    session.poll("r1")
    assert lab.naps == [0.3, 0.3, 0.3, pytest.approx(0.1)]


def test_a_sleep_that_returns_true_ends_an_iteration_without_an_exception(lab):
    stop = threading.Event()
    session = lab.open(run(), sleep=stop.wait)
    for state in iter_status(session, "r1", interval=0):  # so that no wait is long
        if state.polls == 3:
            stop.set()
    assert state.polls == len(lab.requests) == 3
    assert list(iter_status(session, "r1")) == [] and len(lab.requests) == 3


def test_a_sleep_that_returns_true_ends_a_busy_batch(lab):
    stop = threading.Event()
    session = lab.open(run(), sleep=stop.wait, clock=time.monotonic)
    for seen, _ in enumerate(iter_batch(session, ["a", "b"], timeout=None, interval=0)):
        if seen == 5:
            stop.set()
            settled = len(lab.requests)
    assert len(lab.requests) <= settled + 2 and seen <= 7


@table("said, cause", state=(run(), None), fault=(502, 502))
def test_a_sleep_that_returns_true_makes_wait_a_timeout_from_the_last_fault(lab, said, cause):
    with pytest.raises(PollTimeout, match=r"sleep\(\) ended the wait") as caught:
        wait(lab.open(said, sleep=lambda seconds: seconds > 0), "r1")
    assert getattr(caught.value.__cause__, "http_status", None) == cause
    assert caught.value.transient and "within 300 s" in str(caught.value)


def test_a_wait_without_a_limit_that_sleep_ends_names_none(lab):
    with pytest.raises(PollTimeout, match=r"not ended, as sleep\(\) ended the wait \(last status"):
        wait(lab.open(run(), sleep=lambda seconds: seconds > 0), "r1", timeout=None)


@table("fault", KeyboardInterrupt, ZeroDivisionError)
def test_what_sleep_raises_comes_out_unchanged(lab, fault):
    with pytest.raises(fault):
        wait(lab.open(run(), sleep=raising(fault())), "r1")


# ---- Deadlines


def test_one_last_poll_is_made_just_before_the_deadline(lab):
    with pytest.raises(PollTimeout):
        wait(lab.open(run()), "r1", interval=4, timeout=10)
    assert lab.naps == [4, 4, pytest.approx(1.9)] and len(lab.requests) == 4


def test_the_last_poll_is_given_twice_the_time_of_the_one_before(lab):
    class Slow(Clock):
        def __call__(self) -> float:
            self.now += 0.25  # at each look at the clock
            return self.now

    slow = Slow()
    with pytest.raises(PollTimeout):
        wait(lab.open(run(), clock=slow, sleep=slow.sleep), "r1", interval=100, timeout=20)
    assert 16.5 < sum(slow.naps) < 18.5


def test_a_terminal_state_that_comes_just_in_time_is_returned(lab):
    assert wait(lab.open(run(), DONE), "r1", interval=100, timeout=10).ok


def test_a_timeout_says_the_limit_the_last_status_and_that_the_run_goes_on(lab):
    session = lab.open(run("Working"))
    with pytest.raises(PollTimeout) as caught:
        wait(session, "r1", timeout=1800)
    error = caught.value
    assert str(error) == (
        "run r1 (GET /jobs/r1): not ended within 1800 s (last status 'Working'); the run goes on, "
        "and iter_status(session, error.params) follows it again"
    )
    assert isinstance(error, TimeoutError) and error.__cause__ is None
    assert error.state.status == "Working"
    assert next(iter_status(session, error.params)).status == "Working"


@table("timeout", 0, -1)
def test_a_timeout_of_nothing_sends_no_request(lab, timeout):
    session = lab.open(run())
    with pytest.raises(PollTimeout, match="no status seen"):
        wait(session, "r1", timeout=timeout)
    states = iter_status(session, read(), timeout=timeout)
    assert next(states).status == "running"
    with pytest.raises(PollTimeout):
        next(states)
    assert not lab.requests


@table("polls", 0, 1)
def test_the_clock_starts_at_the_call_and_runs_on_in_the_loop_body(lab, polls):
    states = iter_status(lab.open(run()), "r1", timeout=10)
    assert len(list(itertools.islice(states, polls))) == polls
    lab.clock.now += 10
    with pytest.raises(PollTimeout):
        next(states)


@table(
    "asked",
    limited_by_429=limited(429, 3600),
    limited_by_503=limited(503, 3600),
    a_good_answer=answer(run(), headers={"Retry-After": "3600"}),
)
def test_who_is_asked_to_wait_for_an_hour_times_out_at_the_deadline(lab, asked):
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(asked), "r1", timeout=20)
    assert 19.8 < lab.clock.now - 1000 <= 20
    assert len(lab.requests) == (2 if caught.value.__cause__ is None else 1)


@table(
    "way, name, max_outage",
    ("plain", "hangs", 0),
    ("plain", "drips headers", 60),
    ("tunnel", "drips a body", 60),
)
def test_the_deadline_ends_a_request_in_flight(lab, way, name, max_outage):
    session = lab.open(SLOW[name], way=way, max_outage=max_outage, **REAL)
    begun = time.monotonic()
    with pytest.raises(PollTimeout) as caught:
        wait(session, "r1", timeout=0.3)
    assert 0.19 < time.monotonic() - begun < 5
    assert isinstance(caught.value.__cause__, TransportError)


def test_a_key_that_took_all_the_time_is_not_used(lab):
    def slow_key() -> str:
        lab.clock.now += 10
        return KEY

    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(run(), key=slow_key), "r1", timeout=5)
    cause = caught.value.__cause__
    assert "the key took all the time" in str(cause) and cause.sent is False and not lab.requests


# ---- Faults in an iteration


def test_a_run_of_two_hours_survives_six_502s_in_a_row(lab, caplog):
    session = lab.open(*[run()] * 60, *[502] * 6, *[run()] * 60, DONE)
    states = list(iter_status(session, "r1", interval=60, timeout=None))
    assert states[-1].ok and states[-1].elapsed >= 7200
    assert [state.faults for state in states if state.faults] == [6]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 6


def test_fifty_seconds_of_refused_connections_are_sat_out(lab):
    session = lab.open(run(), DONE)
    states = iter_status(session, "r1", interval=1)
    next(states)
    lab.server.__exit__()

    def back_after_fifty_seconds() -> None:
        if lab.clock.now > 1050:
            lab.serve(DONE, port=lab.server.port)
        else:
            lab.clock.meanwhile = back_after_fifty_seconds

    lab.clock.meanwhile = back_after_fifty_seconds
    assert next(states).ok


@table("max_outage", 0, 5, 60)
def test_an_outage_is_sat_out_for_max_outage_seconds(lab, max_outage):
    states = iter_status(lab.open(run(), 502, max_outage=max_outage), "r1", interval=1)
    next(states)
    with pytest.raises(ApiError, match="HTTP 502"):
        next(states)
    assert lab.clock.now - 1001 == pytest.approx(max_outage)


def test_what_a_good_answer_settled_is_not_left_open(lab):
    session = lab.open(502, run(), max_outage=5)
    states = iter_status(session, "r1")
    next(states)
    lab.clock.meanwhile = lab.server.__exit__
    with pytest.raises(TransportError, match="Connection refused") as caught:
        next(states)
    assert caught.value.sent is False


def test_a_good_answer_ends_an_outage(lab):
    plan = [*[502] * 5, run()] * 9
    assert wait(lab.open(*plan, DONE, max_outage=20), "r1", timeout=None).ok


@table(
    "max_outage, plan",
    many=(60, [429] * 40),
    long=(60, [limited(429, 500)] * 3),
    amid_an_outage=(60, [502, *[limited(403, 90)] * 3, 502]),
    though_no_outage_is_sat_out=(0, [429] * 2),
)
def test_a_rate_limit_only_delays_and_uses_up_no_max_outage(lab, max_outage, plan):
    assert wait(lab.open(*plan, DONE, max_outage=max_outage), "r1", timeout=None).ok
    assert max(lab.naps) <= 120


def test_a_run_just_started_may_be_unknown_until_it_has_been_seen(lab):
    session = lab.open(run(), 404, 404, run(), 404)
    states = iter_status(session, session.start(), interval=1)
    assert statuses(itertools.islice(states, 2)) == ["running", "running"]
    with pytest.raises(ApiError, match="404"):
        next(states)
    assert len(lab.requests) == 5


def test_a_run_that_stays_unknown_is_an_error_after_ten_seconds(lab):
    with pytest.raises(ApiError, match="404"):
        wait(lab.open(404), read(), interval=1)
    assert lab.clock.now - 1001 == pytest.approx(10)


@table("handle", "r1", {"run_id": "r1"})
def test_a_handle_that_is_unknown_is_an_error_at_once(lab, handle):
    with pytest.raises(ApiError, match="404"):
        wait(lab.open(404), handle)
    assert len(lab.requests) == 1


# ---- Many runs at once


class Fleet(Server):
    """Each run has a plan of its own: what its status requests are answered, the last for ever."""

    def __init__(self, plans: Mapping[str, list[Any]]) -> None:
        super().__init__()
        self.plans = {name: list(plan) for name, plan in plans.items()}

    def choose(self, request: Request) -> Any:
        name = request.path.rpartition("/")[2]
        item = next_of(self.plans[name])
        return {"id": name, "status": item} if isinstance(item, str) else item


def fleet(lab: Lab, plans: Mapping[str, list[Any]], **options: Any) -> Session:
    lab.server = lab.enter(Fleet(plans))
    return lab.session(base_url=lab.server.url, **options)


def errors_of(states: Iterable[RunState], match: str | None = None) -> list[Any]:
    with pytest.raises(BatchError, match=match) as caught:
        list(states)
    return list(caught.value.errors)


def test_the_states_of_many_runs_are_yielded_as_they_arrive(lab):
    session = fleet(lab, {"a": ["running", "done"], "b": ["done"], "c": ["running"] * 3 + ["done"]})
    states = list(iter_batch(session, ["a", "b", "c"], timeout=60, interval=5))
    for name, seen in [("a", "running done"), ("b", "done"), ("c", "running running running done")]:
        its = [state for state in states if state.id == name]
        assert statuses(its) == seen.split()
        assert [state.polls for state in its] == list(range(1, len(its) + 1))
    assert lab.naps == [5, 5, 5]


def test_a_batch_of_none_ends_at_once(lab):
    assert list(iter_batch(lab.session(), iter([]), timeout=1)) == [] and not lab.naps


def test_a_run_given_twice_is_followed_once_and_the_runs_are_drained_at_the_call(lab):
    runs = iter(["a", {"run_id": "a"}, "b"])
    states = iter_batch(lab.open(run("done")), runs, timeout=60)
    assert next(runs, None) is None and len(list(states)) == 2


def test_states_that_are_handed_in_are_yielded_first_and_waited_after(lab):
    session = fleet(lab, {"a": ["done"]})
    given = [read("queued", id="a"), read("done", id="b")]
    states = list(iter_batch(session, given, timeout=60, interval=9))
    assert [(state.id, state.polls) for state in states] == [("a", 0), ("b", 0), ("a", 1)]
    assert lab.naps == [9] and lab.asked == ["GET /jobs/a"]


@each_value(
    runs=["r1", {"run_id": "r1"}, None, ["a", ""]],
    interval=[-1],
    timeout=[math.nan],
    workers=[0, 1.5],
)
def test_wrong_arguments_of_a_batch_are_refused_at_the_call(lab, name, value):
    with pytest.raises((TypeError, ValueError)):
        iter_batch(lab.session(), **{"runs": [], "timeout": 1, name: value})


def test_workers_are_the_requests_in_flight_the_threads_and_the_connections(lab):
    together = threading.Barrier(4)

    def meet(handler: Any) -> None:
        together.wait(10)
        answer(DONE)(handler)

    names = [f"r{number}" for number in range(40)]
    states = iter_batch(lab.open(meet), names, timeout=60, workers=4)
    assert max(len(lab.workers) for _ in states) == 4
    assert set(lab.connections) == {1, 2, 3, 4}


def test_a_thousand_runs_end_on_eight_workers(lab):
    names = [f"r{number}" for number in range(1000)]
    session = fleet(lab, {name: ["done"] for name in names})
    ended = [state.id for state in iter_batch(session, names, timeout=None) if state.done]
    assert sorted(ended) == sorted(names) and len(lab.requests) == 1000
    assert len(set(lab.connections)) <= 8 and not lab.workers


def test_the_faults_of_one_run_stop_no_other_and_are_all_raised_at_the_end(lab):
    plans = {"a": [404], "b": ["running", 502, "done"], "c": ["running"], "d": ["running", 400]}
    ended = []
    with pytest.raises(BatchError, match="3 of 4 runs were not followed to their ends") as caught:
        for state in iter_batch(fleet(lab, plans), list(plans), timeout=60):
            ended += [state.id] if state.done else []
    assert ended == ["b"]
    errors = caught.value.errors
    assert [error.params["run_id"] for error in errors] == ["a", "c", "d"]
    assert [type(error) for error in errors] == [ApiError, PollTimeout, ApiError]
    assert errors[1].state.id == "c"
    copied = pickle.loads(pickle.dumps(caught.value))
    assert [str(error) for error in copied.errors] == [str(error) for error in errors]


def test_an_error_that_read_state_raises_itself_stops_no_other_run(lab):
    class Own(Api):
        def read_state(self, body: Any, *arguments: Any, **named: Any) -> RunState:
            if body["id"] == "a":
                raise runpoll.RunpollError("of another tenant")
            return super().read_state(body, *arguments, **named)

    api = Own(ORDINARY.base_url, ORDINARY.status)
    session = fleet(lab, {"a": ["done"], "b": ["running", "done"]}, api=api)
    errors = errors_of(iter_batch(session, ["a", "b"], timeout=60))
    assert [str(error) for error in errors] == ["run a (GET /jobs/a): of another tenant"]
    assert errors[0].params == {"run_id": "a"}
    assert lab.asked.count("GET /jobs/b") == 2


def test_a_refused_key_ends_a_batch_at_once(lab):
    session = fleet(lab, {"a": [401], "b": ["running"]})
    states = iter_batch(session, ["a", "b"], timeout=None)
    errors = errors_of(states, "the key was refused, and no run is followed any more")
    assert [error.http_status for error in errors] == [401]


def test_a_rate_limit_holds_back_all_runs_of_a_batch(lab):
    plans = {"a": [limited(429, 50), "done"], **{name: ["running", "done"] for name in "bcd"}}
    states = iter_batch(fleet(lab, plans), list(plans), timeout=None, workers=1, interval=1)
    when = [lab.clock.now - 1000 for _ in states]
    assert when == pytest.approx([50, 50, 50, 50, 51, 51, 51])


def test_a_rate_limit_of_one_run_uses_up_no_outage_of_another(lab):
    session = fleet(lab, {"a": [502, 502, "done"], "b": [limited(429, 90), "done"]})
    ended = [state.id for state in iter_batch(session, ["a", "b"], timeout=600) if state.done]
    assert sorted(ended) == ["a", "b"]


def test_runs_are_polled_while_the_states_that_were_handed_in_are_looked_at(lab):
    session = fleet(lab, {"a": ["running", "done"], "b": ["done"], "r1": ["done"]})
    states = iter_batch(session, [read(), "a", "b"], timeout=60)
    assert next(states).id == "r1"
    until(lambda: len(lab.requests) == 2)


def test_a_batch_times_out_run_by_run_at_its_deadline(lab):
    session = lab.open(run())
    errors = errors_of(iter_batch(session, ["a", "b"], timeout=30))
    assert [type(error) for error in errors] == [PollTimeout] * 2
    assert 29.8 < lab.clock.now - 1000 <= 30
    assert len(errors_of(iter_batch(session, [error.params for error in errors], timeout=0))) == 2


def test_a_request_in_flight_delays_no_other_run_and_is_ended_by_the_deadline(lab):
    session = fleet(lab, {"a": [hang], "b": ["running", "done"]}, **REAL)
    begun = time.monotonic()
    errors = errors_of(iter_batch(session, ["a", "b"], timeout=0.3, interval=0.01))
    assert [error.params["run_id"] for error in errors] == ["a"]
    assert 0.19 < time.monotonic() - begun < 5


@table("closed", True, False)
def test_a_batch_that_is_left_begins_no_request_and_leaves_no_thread(lab, closed):
    names = [f"r{number}" for number in range(30)]
    states = iter_batch(lab.open(run(), **REAL), names, timeout=None, interval=0)
    for _ in states:
        break
    if closed:
        states.close()
    del states
    gc.collect()
    begun = len(lab.requests)
    until(lambda: not lab.workers)
    assert len(lab.requests) <= begun + 8  # those that were on their way to the server


def test_a_batch_that_was_never_begun_has_no_thread_and_no_request(lab):
    states = iter_batch(lab.open(run()), ["a"], timeout=1)
    assert states and not lab.workers and not lab.requests


def test_the_interval_of_a_batch_is_asked_in_the_callers_thread(lab):
    threads = set()

    def interval(state: RunState) -> float:
        threads.add(threading.current_thread())
        return 1

    session = lab.open(run(), run(), run("done"))
    list(iter_batch(session, ["a", "b"], timeout=60, interval=interval))
    assert threads == {threading.current_thread()}


def test_two_batches_and_a_poll_share_a_session(lab):
    session = fleet(lab, {name: ["running", "done"] for name in "abcd"}, **REAL)
    first = iter_batch(session, ["a", "b"], timeout=60, interval=0.01)
    second = iter_batch(session, ["c"], timeout=60, interval=0.01)
    next(first)
    assert session.poll("d").status == "running"
    assert [state.done for state in second] == [False, True]
    assert len(list(first)) == 3


INTERRUPTED = """
import runpoll, sys
api = runpoll.Api(base_url=sys.argv[1], status="/jobs/{run_id}")
session = runpoll.Session(api)
list(runpoll.iter_batch(session, ["a", "b"], timeout=None))
"""


@POSIX
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_batch_without_waiting_for_what_is_in_flight(lab):
    lab.open(hang)
    with process(sys.executable, "-c", INTERRUPTED, lab.server.url, cwd=HERE) as batch:
        until(lambda: len(lab.requests) == 2)
        batch.send_signal(signal.SIGINT)
        assert batch.wait(10) != 0 and b"KeyboardInterrupt" in batch.stderr.read()


# ---- The command line


def command(lab: Lab, *arguments: object) -> list[str]:
    """The arguments that follow r1 on the server of the test."""
    path = lab.directory / "api.json"
    api = {**MINIMAL, "base_url": lab.server.url, "phases": {"stopped": "cancelled"}}
    path.write_text(json.dumps(api))
    return ["r1", "--api", str(path), "--interval", "0.01", *map(str, arguments)]


@pytest.fixture
def shell(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    """Runs main(): its exit code, the lines of its output and of its complaints."""
    monkeypatch.setenv("RUNPOLL_API_KEY", KEY)

    def call(*arguments: object, answers: Iterable[Any] = (DONE,)) -> Any:
        lab.serve(*answers)
        code = runpoll.main(command(lab, *arguments))
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return call


@table(
    "last, code, complaint",
    succeeded=(DONE, 0, []),
    failed=(run("failed", error="no text"), 1, ["runpoll: run r1 failed: no text"]),
    cancelled=(run("stopped"), 3, ["runpoll: run r1 was cancelled"]),
)
def test_the_exit_code_says_how_the_run_ended(shell, last, code, complaint):
    assert shell("--timeout", 0, answers=[run(), last])[::2] == (code, complaint)  # 0: no limit


def test_in_a_pipe_each_state_that_differs_is_one_plain_line(shell):
    plan = [run("queued"), run("queued"), run(progress=0.25), run(progress=0.25), DONE]
    _, lines, _ = shell(answers=plan)
    assert lines == ["pending   queued", "running    25% running", "succeeded succeeded"]


def test_with_json_each_state_is_a_line_of_valid_json_with_every_field(shell):
    plan = [answer(b'{"id": "r1", "status": "running", "loss": NaN, "created_at": 5}'), DONE]
    lines = shell("--json", answers=plan)[1]
    no_constant = raising(AssertionError("NaN is no JSON"))
    first, last = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert first.keys() == {field.name for field in dataclasses.fields(RunState)}
    assert first["raw"]["loss"] is None and first["created_at"] == "1970-01-01T00:00:05+00:00"
    assert last["phase"] == "succeeded" and last["output"] == {"total": 7}


def test_a_timeout_is_124_and_says_that_the_same_command_follows_the_run_again(shell):
    code, _, complaints = shell("--timeout", 0.2, answers=[run()])
    assert code == 124 and complaints[-1].startswith("runpoll: run r1 (GET /jobs/r1): not ended")
    assert complaints[-1].endswith("the run goes on, and the same command follows it again")


def test_an_error_of_the_api_is_5_and_a_missing_key_is_named(shell, monkeypatch):
    code, _, (complaint,) = shell(answers=[401])
    assert code == 5 and complaint.startswith("runpoll: run r1 (GET /jobs/r1): HTTP 401: no. 401;")
    assert "RUNPOLL_API_KEY" not in complaint
    monkeypatch.delenv("RUNPOLL_API_KEY")
    assert shell(answers=[401])[2][0].endswith("(RUNPOLL_API_KEY is not set)")


@table(
    "arguments, complaint",
    (["--interval", "-1"], "--interval: it has to be a number of seconds"),
    (["--interval", "soon"], "--interval: it has to be a number of seconds"),
    (["--timeout", "nan"], "--timeout: it has to be a number of seconds"),
    (["--param", "secret"], "--param: it has to be NAME=VALUE"),
    (["--header", "secret"], "--header: it has to be NAME=VALUE"),
    (["--header", "A=sec\nret"], "the header 'A' has a character"),
    (["--param", "b=c"], "the path '/jobs/{run_id}' has no 'b'; see runpoll --help"),
    (["--base-url", "ftp://a"], "a base_url begins with https://"),
    (["--headers=secret"], "unknown arguments: --headers"),
    (["--he=A=secret"], "unknown arguments: --he"),
    (["-Hsecret"], "unknown arguments: is there a value to be quoted?"),
    (["--header", "Authorization=Bearer", "secret"], "is there a value to be quoted?"),
    (["--header", "A: secret="], "--header: it has to be NAME=VALUE"),
)
def test_wrong_usage_is_2_and_says_what_to_do_without_a_value(shell, arguments, complaint):
    code, lines, complaints = shell(*arguments)
    assert code == 2 and not lines and complaint in " ".join(complaints)
    assert "secret" not in " ".join(complaints)


def test_a_param_beside_a_status_url_is_wrong_usage(capsys):
    assert runpoll.main(["--param", "b=c", "https://a.test/runs/r1"]) == 2
    assert "--param goes with an id" in capsys.readouterr().err


@table(
    "content, complaint",
    (None, "No such file or directory) is rapidfolio, doclo, dibby, onepin or a JSON file"),
    ("{", "Expecting property name"),
    ("[1]", "must be a mapping"),
    ('{"base_url": "https://a", "status": "/x"}', "has to name {run_id}"),
    ('{"base_url": "https://a", "status": "/{run_id}", "colour": 1}', "colour"),
    ('{"base_url": 5, "status": "/{run_id}"}', "api.json"),
)
def test_a_file_that_describes_no_api_is_wrong_usage(tmp_path, capsys, content, complaint):
    path = tmp_path / "api.json"
    if content:
        path.write_text(content)
    assert runpoll.main(["r1", "--api", str(path)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_built_in_api_takes_parameters_and_headers_or_a_url(lab, simulator, capsys, monkeypatch):
    monkeypatch.setenv("RUNPOLL_API_KEY", KEY)
    ids = lab.session(simulator.api("onepin")).start(None, **STARTS["onepin"][1]).params
    base = ["--api", "onepin", "--base-url", f"{simulator.url}/onepin", "--interval", "0"]
    given = ["--param", f"workflow_id={ids['workflow_id']}", "--header", "X-Workspace-Id=a=b=c"]
    url = f"https://api.onepin.ai{BUILT_IN['onepin'].status}".format(**ids)
    assert runpoll.main([ids["run_id"], *base, *given]) == runpoll.main([url, *base]) == 0
    assert lab.requests[1].headers["X-Workspace-Id"] == "a=b=c"
    assert "succeeded 100% completed" in capsys.readouterr().out


def test_verbose_logs_each_poll_and_never_the_key(shell):
    before = logging.getLogger("runpoll").level
    code, _, complaints = shell("--verbose", answers=[run(), limited(503, 0.01), DONE])
    assert code == 0 and len(complaints) == 3 and KEY not in " ".join(complaints)
    assert complaints[0] == "runpoll: run 'r1': 'running'"
    logger = logging.getLogger("runpoll")
    assert not logger.handlers and logger.level == before


def test_help_and_version_are_0(capsys):
    assert runpoll.main(["--help"]) == runpoll.main(["--version"]) == 0
    printed = capsys.readouterr().out
    for word in ("RUNPOLL_API_KEY", "--param NAME=VALUE", "124 timed out", runpoll.__version__):
        assert word in printed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(shell: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs main() on a terminal: what is written there."""

    def call(*answers: Any) -> str:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("COLUMNS", "100")
        shell(answers=answers)
        return screen.getvalue()

    return call


def test_the_line_on_a_terminal_has_a_bar_and_the_time_left(terminal):
    written = terminal(*[run(progress=n) for n in range(0, 100, 10)], DONE)
    assert re.match(r"\rrunning   \[ {12}\]  0% \d+ s  running\x1b\[K", written)
    assert re.search(r"\rrunning   \[##  +\] 20% \d+ s, \d+ s left  running", written)


def test_control_characters_of_the_api_do_not_reach_a_terminal(terminal):
    written = terminal(run("a\x1b]0;evil\x07\x9b2Jb"), run("failed", error="\x1b[2J!"))
    written = written.replace("\x1b[K", "")
    assert not set(written) & set("\x1b\x07\x9b") and "a ]0;evil  2Jb" in written


def test_on_a_terminal_a_warning_has_a_row_of_its_own(terminal):
    rows = terminal(run(), limited(503, 0.01), DONE).split("\n")
    shown = [row.rpartition("\r")[2].replace("\x1b[K", "") for row in rows]
    assert shown[0].startswith("runpoll: run r1") and shown[1].startswith("succeeded")


def started(lab: Lab, *arguments: object, after: str = "", **options: Any) -> Any:
    """The command in a process of its own, by way of a shell where something stands after it."""
    words = [sys.executable, str(HERE / "runpoll.py"), *command(lab, *arguments)]
    if after:
        words = ["sh", "-c", f"{shlex.join(words)} {after}"]
    return process(*words, **options)


@POSIX
def test_on_a_terminal_one_line_that_fits_is_drawn_again_and_stays(lab):
    import fcntl
    import pty
    import termios

    words = ["queued", "\u4e2d" * 90, "x" * 90]
    lab.serve(*[run(word, progress=0.5) for word in words], DONE)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with started(lab, stdout=theirs, env=environment) as begun, os.fdopen(ours, "rb") as screen:
        begun.wait(20)
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # its end
            while piece := screen.read1():
                written += piece
    *frames, end = written.decode().split("\x1b[K")
    assert len(frames) == 4 and end == "\r\n"
    assert frames[0].startswith("\rpending   [##  ] 50% 0 s  queued")
    for frame in frames:
        assert frame[0] == "\r" and "\n" not in frame
        wide = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in frame[1:])
        assert wide < 40


@POSIX
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_130_and_says_that_the_run_goes_on(lab):
    lab.serve(run())
    with started(lab, "--json") as begun:
        begun.stdout.readline()
        begun.send_signal(signal.SIGINT)
        assert begun.wait(10) == 130
        said = begun.stderr.read().decode()
    assert said.startswith("runpoll: interrupted; the run goes on, and the same command")
    assert "Traceback" not in said


@POSIX
def test_a_pipe_whose_reader_has_gone_ends_it_quietly(lab):
    lab.serve(*[run(progress=n) for n in range(9)], DONE)
    with started(lab) as begun:
        begun.stdout.readline()
        begun.stdout.close()
        assert begun.stderr.read() == b"" and begun.wait(20) == 130


@POSIX
@table("after, code", ("> /dev/full", 130), (">&-", 0))
def test_an_output_that_takes_nothing_ends_it_without_a_traceback(lab, after, code):
    if "full" in after and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    lab.serve(run(), DONE)
    with started(lab, after=after) as begun:
        assert b"Traceback" not in begun.stderr.read() and begun.wait(20) == code


@POSIX
def test_what_the_locale_lacks_is_replaced(lab):
    lab.serve(run("gr\u00f6\u00dfer"), DONE)
    with started(lab, env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}) as begun:
        assert begun.stdout.read().split(b"\n")[0] == b"unknown   gr??er"


# ---- The services of the README, by bodies shaped as in their documents


@dataclass
class Service:
    """How a run of a service goes: what is asked on the wire, and what the answers mean."""

    paths: tuple[str, str, str]  # of start, status and cancel, "" where there is none
    body: Callable[..., Any]  # of a status word, and what the answer says beside it
    words: str  # word=phase; a word alone is its phase's, too
    good: tuple[dict[str, Any], dict[str, Any]]  # what a good end says, and what is read of it
    bad: tuple[dict[str, Any], str] = ({}, "")  # what a bad end says, and the error's message
    begun: Any = "as polled"  # the start's answer
    headers: dict[str, str] = field(default_factory=dict)  # of the start's answer
    params: dict[str, str] = field(default_factory=dict)  # of the start
    key: tuple[str, str] = ("Authorization", f"Bearer {KEY}")
    cancel_body: Any = None

    @property
    def meanings(self) -> dict[str, str]:
        pairs = (word.partition("=") for word in self.words.split())
        return {word: phase or word.lower() for word, _, phase in pairs}

    def body_in(self, phase: str, **more: Any) -> Any:
        """What is answered under the first word that means this phase."""
        word = next(word for word, meant in self.meanings.items() if meant == phase)
        return self.body(word, **more)


def body(word_at: str = "status", root: str = "", **base: Any) -> Callable[..., Any]:
    """Makes the bodies of a service that says its status word at one place."""

    def of(word: str, **more: Any) -> Any:
        said = {**base, word_at: int(word) if word.isdigit() else word, **more}
        return {root: said} if root else said

    return of


def message_batch(word: str, **more: Any) -> Any:
    """A cancelled batch is "ended", too: only its counts tell."""
    counts = {"succeeded": 1, "errored": 0, "canceled": int(word == "canceled")}
    word = word.replace("canceled", "ended")
    return {"id": "mb", "processing_status": word, "request_counts": counts, **more}


def workflow_run(word: str) -> Any:
    """The words of an end are conclusions."""
    active = word in ("requested", "queued", "waiting", "in_progress")
    ended = {"status": "completed", "conclusion": word if word != "completed" else None}
    return {"id": 3043, "run_number": 562, **({"status": word} if active else ended)}


LIFE_CYCLES = "QUEUED BLOCKED RUNNING WAITING_FOR_RETRY TERMINATING INTERNAL_ERROR SKIPPED"


def job_run(word: str, end_time: int = 0, state_message: str = "") -> Any:
    """A run that has ended by itself has a result beside its life cycle."""
    ended = {"life_cycle_state": "TERMINATED", "result_state": word}
    state = {"life_cycle_state": word} if word in LIFE_CYCLES.split() else ended
    state["state_message"] = state_message
    return {"run_id": 45, "state": state, "start_time": 1772193600000, "end_time": end_time}


LATER = "2026-02-27T12:02:00Z"  # than NOON
TWO_MINUTES = {"completed_at": NOON + timedelta(minutes=2), "duration": 120.0}
AZURE = "/documentintelligence/documentModels/prebuilt-read"
SERVICES = {
    "REPLICATE": Service(
        ("/v1/predictions", "/v1/predictions/g3", "/v1/predictions/g3/cancel"),
        body(id="g3", output=None, error=None, created_at="2026-02-27T12:00:00Z"),
        "starting=pending processing=running succeeded failed canceled=cancelled aborted=cancelled",
        ({"output": ["a"], "completed_at": LATER}, {"output": ["a"], **TWO_MINUTES}),
        ({"error": "Out of memory"}, "Out of memory"),
    ),
    "OPENAI_BATCHES": Service(
        ("/v1/batches", "/v1/batches/b_1", "/v1/batches/b_1/cancel"),
        body(id="b_1", request_counts={"total": 100, "completed": 38, "failed": 2}),
        "validating=pending in_progress=running finalizing=running cancelling=running "
        "completed=succeeded failed expired=failed cancelled",
        ({"output_file_id": "file-out"}, {"output": "file-out", "progress": 0.4}),
        ({"errors": {"object": "list", "data": [{"message": "No JSON"}]}}, "No JSON"),
    ),
    "OPENAI_RESPONSES": Service(
        ("/v1/responses", "/v1/responses/resp_1", "/v1/responses/resp_1/cancel"),
        body(id="resp_1", created_at=1772193600.0, output=[], incomplete_details=None),
        "queued=pending in_progress=running completed=succeeded failed incomplete=failed cancelled",
        ({"output": [{"type": "message"}]}, {"output": [{"type": "message"}], "created_at": NOON}),
        ({"error": None, "incomplete_details": {"reason": "max_tokens"}}, "max_tokens"),
    ),
    "ANTHROPIC": Service(
        ("/v1/messages/batches", "/v1/messages/batches/mb", "/v1/messages/batches/mb/cancel"),
        message_batch,
        "in_progress=running canceling=running ended=succeeded canceled=cancelled odd=unknown",
        ({"results_url": "https://a.test/1"}, {"output": "https://a.test/1"}),
        key=("x-api-key", KEY),
    ),
    "GITHUB": Service(
        (
            "/repos/octo/demo/actions/workflows/ci.yml/dispatches",
            "/repos/octo/demo/actions/runs/3043",
            "/repos/octo/demo/actions/runs/3043/cancel",
        ),
        workflow_run,
        "queued=pending requested=pending waiting=paused in_progress=running completed=running "
        "action_required=paused success=succeeded neutral=succeeded failure=failed stale=failed "
        "timed_out=failed startup_failure=failed cancelled skipped=cancelled",
        ({}, {"output": None}),
        begun={"workflow_run_id": 3043, "run_url": "https://api.github.com/"},
        params={"owner": "octo", "repo": "demo", "workflow": "ci.yml"},
    ),
    "GITLAB": Service(
        (
            "/api/v4/projects/team%2Fapp/pipeline",
            "/api/v4/projects/team%2Fapp/pipelines/61",
            "/api/v4/projects/team%2Fapp/pipelines/61/cancel",
        ),
        body(id=61, iid=21, yaml_errors=None, duration=34, created_at="2026-02-27T12:00:00Z"),
        "created=pending waiting_for_resource=pending waiting_for_callback=pending running "
        "preparing=pending canceling=running manual=paused success=succeeded failed "
        "canceled=cancelled skipped=cancelled",
        ({"finished_at": LATER}, TWO_MINUTES),
        ({"yaml_errors": "jobs:test is unknown"}, "jobs:test is unknown"),
        params={"project": "team/app"},
    ),
    "APIFY": Service(
        ("/v2/actors/acme~crawler/runs", "/v2/actor-runs/HG7M", "/v2/actor-runs/HG7M/abort"),
        body(root="data", id="HG7M", startedAt="2026-02-27T12:00:00.000Z"),
        "READY=pending RUNNING TIMING-OUT=running ABORTING=running SUCCEEDED FAILED "
        "TIMED-OUT=failed ABORTED=cancelled",
        ({"statusMessage": "Page 9", "finishedAt": LATER}, {**TWO_MINUTES, "error": None}),
        ({"statusMessage": "The page is gone"}, "The page is gone"),
        params={"actor": "acme~crawler"},
    ),
    "RUNPOD": Service(
        ("/v2/ep1/run", "/v2/ep1/status/c80f-u1", "/v2/ep1/cancel/c80f-u1"),
        body(id="c80f-u1", delayTime=2624),
        "IN_QUEUE=pending IN_PROGRESS=running COMPLETED=succeeded FAILED TIMED_OUT=failed "
        "CANCELLED",
        ({"output": {"text": "Hi"}}, {"output": {"text": "Hi"}}),
        ({"error": "The handler raised"}, "The handler raised"),
        params={"endpoint": "ep1"},
    ),
    "DATABRICKS": Service(
        ("/api/2.2/jobs/run-now", "/api/2.2/jobs/runs/get?run_id=45", "/api/2.2/jobs/runs/cancel"),
        job_run,
        "QUEUED=pending BLOCKED=pending RUNNING WAITING_FOR_RETRY=running TERMINATING=running "
        "SUCCESS=succeeded SUCCESS_WITH_FAILURES=succeeded FAILED TIMEDOUT=failed "
        "UPSTREAM_FAILED=failed INTERNAL_ERROR=failed SKIPPED=cancelled CANCELED=cancelled "
        "UPSTREAM_CANCELED=cancelled MAXIMUM_CONCURRENT_RUNS_REACHED=cancelled "
        "DISABLED=cancelled EXCLUDED=cancelled",
        ({"end_time": 1772193720000}, TWO_MINUTES),
        ({"state_message": "Task load failed"}, "Task load failed"),
        begun={"run_id": 45, "number_in_job": 45},
        cancel_body={"run_id": 45},
    ),
    "DBT_CLOUD": Service(
        (
            "/api/v2/accounts/7/jobs/1021/run/",
            "/api/v2/accounts/7/runs/7040/",
            "/api/v2/accounts/7/runs/7040/cancel/",
        ),
        body(root="data", id=7040, duration="00:02:00", created_at="2026-02-27 12:00:00+00:00"),
        "1=pending 2=pending 3=running 10=succeeded 20=failed 30=cancelled",
        ({"finished_at": "2026-02-27 12:02:00.000000+00:00"}, TWO_MINUTES),
        ({"status_message": "A model failed"}, "A model failed"),
        params={"account": "7", "job": "1021"},
        key=("Authorization", f"Token {KEY}"),
    ),
    "AIRFLOW": Service(
        ("/api/v2/dags/etl/dagRuns", "/api/v2/dags/etl/dagRuns/manual__12%3A00%2B00", ""),
        body("state", dag_run_id="manual__12:00+00", queued_at="2026-02-27T12:00:00Z"),
        "queued=pending running success=succeeded failed",
        (
            {"start_date": "2026-02-27T12:00:00Z", "end_date": LATER},
            {"created_at": NOON, "started_at": NOON, **TWO_MINUTES},
        ),
        params={"dag": "etl"},
    ),
    "AZURE": Service(
        (
            f"{AZURE}:analyze?api-version=2024-11-30",
            f"{AZURE}/analyzeResults/0d1c?api-version=2024-11-30",
            "",
        ),
        body(createdDateTime="2026-02-27T12:00:00Z"),
        "notStarted=pending running succeeded failed canceled=cancelled skipped=cancelled",
        ({"analyzeResult": {"a": 1}}, {"output": {"a": 1}, "created_at": NOON}),
        ({"error": {"code": "InvalidRequest", "message": "Unreadable"}}, "Unreadable"),
        begun=None,
        headers={"Operation-Location": f"https://a.test{AZURE}/analyzeResults/0d1c?api=1"},
        params={"model": "prebuilt-read"},
        key=("Ocp-Apim-Subscription-Key", KEY),
    ),
    "ASSEMBLYAI": Service(
        ("/v2/transcript", "/v2/transcript/9ea6", ""),
        body(id="9ea6", text=None),
        "queued=pending processing=running completed=succeeded error=failed",
        ({"text": "Hello"}, {"output": "Hello"}),
        ({"error": "No audio"}, "No audio"),
        key=("Authorization", KEY),
    ),
}


@pytest.fixture(scope="module")
def pasted() -> dict[str, Any]:
    """The values of the README's block of services."""
    names: dict[str, Any] = {"runpoll": runpoll}
    exec(next(block for block in readme_blocks() if "REPLICATE =" in block), names)
    return names


each_service = table("name, service", **{name: (name, value) for name, value in SERVICES.items()})


@each_service
def test_a_run_of_a_service_is_started_polled_and_cancelled(lab, pasted, name, service):
    api, (start, status, cancel) = pasted[name], service.paths
    active = service.body_in("running")
    begun = active if service.begun == "as polled" else service.begun
    lab.serve(answer(begun, 202, service.headers), active)
    session = lab.session(api, base_url=lab.server.url + urlsplit(api.base_url).path)
    state = session.start({"a": 1}, **service.params)
    assert not state.done and session.poll(state).phase is Phase.RUNNING
    assert lab.asked == [f"POST {start}", f"GET {status}"]
    assert {request.headers[service.key[0]] for request in lab.requests} == {service.key[1]}
    if cancel:
        lab.server.answers[:] = [active, {}, service.body_in("cancelled")]
        assert session.cancel(state, service.cancel_body) is True
        assert lab.asked[2:] == [f"GET {status}", f"POST {cancel}", f"GET {status}"]
        assert lab.requests[3].body == service.cancel_body


@each_service
def test_each_word_of_a_service_is_known(pasted, name, service):
    params = {**service.params, "run_id": "r1"}
    bodies = {word: service.body(word) for word in service.meanings}
    phases = {word: pasted[name].read_state(body, params).phase for word, body in bodies.items()}
    assert phases == service.meanings
    tried = {word.lower().replace("-", "_") for word in phases}
    assert tried >= pasted[name].phases.keys()


@each_service
def test_a_good_and_a_bad_end_of_a_service_are_read(pasted, name, service):
    api, params = pasted[name], {**service.params, "run_id": "r1"}
    says, reads = service.good
    state = api.read_state(service.body_in("succeeded", **says), params)
    assert {field: getattr(state, field) for field in reads} == reads
    says, message = service.bad
    if message:
        assert api.read_state(service.body_in("failed", **says), params).error.message == message


# ---- The module, its examples, and the demonstration


def test_all_is_what_is_public():
    public = {
        name
        for name, value in vars(runpoll).items()
        if not name.startswith("_")
        and (isinstance(value, Api) or getattr(value, "__module__", "") == "runpoll")
    }
    assert public == set(runpoll.__all__) and len(runpoll.__all__) == len(public)


@table(
    "function, documented",
    (Session, {"request_timeout": 30, "max_outage": 60, "max_body": 16 * 2**20, "proxy": None}),
    (Session.start, {"body": None, "request_timeout": 330, "repeatable": False}),
    (iter_status, {"interval": runpoll.Backoff(), "timeout": 300}),
    (wait, {"interval": runpoll.Backoff(), "timeout": 300}),
    (iter_batch, {"interval": runpoll.Backoff(), "workers": 8}),
    (
        runpoll.Backoff,
        {"initial": 1, "factor": 1.3, "maximum": 12, "jitter": 0.1, "pace": 0.7, "paused": 30},
    ),
)
def test_the_defaults_are_those_that_are_documented(function, documented):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert {**defaults, **documented} == defaults
    assert function is not iter_batch or "timeout" not in defaults


@table("value", backoff=runpoll.Backoff(), error=ErrorInfo("no"), api=ORDINARY, state=read())
def test_values_are_frozen(value):
    for slot in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, slot.name, None)


def test_importing_the_module_does_not_import_what_only_the_command_line_needs():
    code = "import sys, runpoll; print({'argparse', 'urllib.request'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "set()\n"


@pytest.fixture
def examples(lab: Lab, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that an example finds.

    Its built-in APIs are the simulator's, other APIs are an ordinary server, and no time passes.
    """
    for name in STARTS:
        monkeypatch.setattr(runpoll, name.upper(), simulator.api(name))
    jobs = lab.serve(run("queued"), run(progress=0.5), DONE)

    class Hasty(Session):
        def __init__(self, api: Api, *arguments: Any, **options: Any) -> None:
            stop = options.pop("sleep", None)

            def sleep(seconds: float) -> object:
                lab.clock.sleep(seconds)
                return stop(0) if stop else None

            base_url = jobs.url if "example.com" in api.base_url else None
            options = {"base_url": base_url, "sleep": sleep, "clock": lab.clock, **options}
            super().__init__(api, *arguments, **options)
            lab.enter(self)

    monkeypatch.setattr(runpoll, "Session", Hasty)
    return {"api_key": KEY}


def test_the_example_in_the_docstring_runs(examples, capsys):
    text = runpoll.__doc__ or ""
    example = text[text.index("    import runpoll") : text.index("An `Api` reads")]
    exec(textwrap.dedent(example), examples)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "running None" and lines[-1] == "{'approved': True}"


README = HERE / "README.md"


def readme_blocks() -> list[str]:
    """The Python blocks of the README that are run, each at its line of the file."""
    text = README.read_text(encoding="utf-8")
    pattern = r"(<!-- not run -->\s*)?^```python\n(.*?)^```"
    blocks = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    return [
        "\n" * text.count("\n", 0, found.start(2)) + found[2] for found in blocks if not found[1]
    ]


def test_the_examples_in_the_readme_run(examples, capsys):
    for block in readme_blocks():
        exec(compile(block, str(README), "exec"), examples)
    examples["test_report"]()
    context = types.SimpleNamespace(get_remaining_time_in_millis=lambda: 90_000)
    assert examples["handler"]({"data": {}}, context)["done"] is True
    assert capsys.readouterr().out.startswith("queued None\nrunning 0.5\nsucceeded None\n")


@table("slow", hangs=hang, asks_for_an_hour=limited(429, 3600))
def test_a_lambda_function_hands_over_before_its_limit(lab, slow):
    api = replace(ORDINARY, base_url=lab.serve(slow).url)
    module = types.SimpleNamespace(**{**vars(runpoll), "RAPIDFOLIO": api})
    names: dict[str, Any] = {"runpoll": module, "api_key": KEY, "where": {}}
    exec(next(block for block in readme_blocks() if "def handler" in block), names)
    context = types.SimpleNamespace(get_remaining_time_in_millis=lambda: 2300)
    event = {"params": {"run_id": "r1"}}
    begun = time.monotonic()
    assert names["handler"](event, context) == {"done": False, **event}
    assert time.monotonic() - begun < 2.3


def test_the_demonstration_follows_one_run_of_each_api(capsys):
    demonstrate(interval=0.01)
    lines = capsys.readouterr().out.splitlines()
    for name, (*_, last) in Simulator.WORDS.items():
        of_it = [line.split() for line in lines if line.startswith(name.upper())]
        assert len(of_it) >= 4 and any({last, "succeeded"} <= {*words} for words in of_it)


@POSIX
@pytest.mark.usefixtures("interruptible")
def test_the_simulator_is_left_running_until_it_is_interrupted():
    with process(sys.executable, __file__, "serve", text=True) as begun:
        found = re.search(r"http://127\.0\.0\.1:\d+", begun.stdout.readline())
        api = replace(runpoll.DIBBY, base_url=found[0] + "/dibby/api")
        with Session(api, KEY) as session:
            assert session.start(STARTS["dibby"][0]).phase is Phase.PENDING
        begun.send_signal(signal.SIGINT)
        assert begun.wait(10) == 0 and "Traceback" not in begun.stderr.read()


def demonstrate(interval: float = 0.4) -> None:
    """Follow one run of each API, side by side, and print each state as it comes."""

    def follow(name: str) -> str:
        body, params = STARTS[name]
        with Session(simulator.api(name), KEY) as session:
            begun = session.start(body, **params)
            for state in iter_status(session, begun, interval=interval):
                progress = "" if state.progress is None else f"{state.progress:.0%}"
                words = f"{name.upper():<12}{state.status:<12}{state.phase:<12}{progress:>8}"
                print(f"{words}{state.elapsed:>8.1f} s\n", end="", flush=True)
            output = state.result()
            if name == "onepin":  # not inline
                path = runpoll.ONEPIN.status.replace("/status", "/outputs")
                output = session.request("GET", path, params=state.params)["data"]
        return f"{name.upper():<12}{state.phase} after {state.polls} polls: {json.dumps(output)}"

    print(f"{'api':<12}{'status':<12}{'phase':<12}{'progress':>8}{'elapsed':>10}")
    with Simulator(stages=5) as simulator, ThreadPoolExecutor() as pool:
        ends = list(pool.map(follow, STARTS))
    print("", *ends, sep="\n")
    print("\nNext: the README's first example, with the address and the paths of your own API.")


def serve(port: int) -> None:
    """Leave the simulator running until Ctrl-C."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        Simulator(stages=9, step=1.0, port=port) as simulator,
    ):
        url = f"{simulator.url}/rapidfolio"
        header = f"-H 'Authorization: Bearer {KEY}'"
        print(f"the simulator listens on {simulator.url}, where a run takes 8 s; any key will do.")
        print(f"""Ctrl-C ends it.

    curl {header} -d '{{"data": {{}}}}' {url}/v1/procedures/proc_abc/sandbox
    curl {header} {url}/runs/run_1
    RUNPOLL_API_KEY={KEY} python runpoll.py run_1 --base-url {url}
""")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]) if sys.argv[2:] else 0)
    elif sys.argv[1:]:
        sys.exit("usage: python test_runpoll.py [serve [PORT]]")
    else:
        try:
            demonstrate()
        except KeyboardInterrupt:
            sys.exit(130)
