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
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import uuid
import wsgiref.simple_server
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Callable
from urllib.parse import unquote, urlsplit

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


class Clock:
    """`Session(sleep=clock.sleep, clock=clock)`: two hours pass at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None  # what else happens during a nap

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        assert len(self.naps) < 3000, "this would never end"
        self.meanwhile()
        self.now += seconds


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
    number: int

    def setup(self) -> None:
        super().setup()
        self.number = self.owner.opened(self.connection)

    def serve(self) -> None:
        self.owner.closing.wait(self.owner.reads_after)
        content = self.rfile.read(
            int(self.headers.get("Content-Length") or 0)
        )  # else it is taken for the next request
        try:
            body = json.loads(content) if content else None
        except ValueError:
            body = content
        request = Request(self.command, self.path, self.headers, body, self.number)
        self.owner.respond(request)(self)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = do_CONNECT = serve

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

    def __init__(self, *answers: Any, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.reads_after = 0.0  # seconds from a request's headers to its body
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._httpd = _HTTPServer(
            ("127.0.0.1", port), type("Handler", (_Handler,), {"owner": self})
        )
        self._httpd.tls = tls
        self.port = self._httpd.server_address[1]
        # By name: the first urllib3 1.26 checks no certificate of an address in a given context.
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01}
        )

    def __enter__(self) -> Server:
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

    def closed_by_client(self) -> bool:
        """Whether every connection ends within a second, without our doing."""
        ends = list(self._sockets)
        deadline = time.monotonic() + 1
        while ends and time.monotonic() < deadline:
            ends = [end for end in ends if end.fileno() >= 0]
            time.sleep(0.005)
        return not ends

    def opened(self, connection: socket.socket) -> int:
        with self._lock:
            self._sockets.append(connection)
            return len(self._sockets)

    def respond(self, request: Request) -> Callable[[_Handler], None]:
        with self._lock:
            self.requests.append(request)
            item = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return (
            item
            if callable(item)
            else answer({"error": f"no. {item}"}, item)
            if type(item) is int
            else answer(item)
        )


Answer = Callable[[_Handler], None]


def answer(body: Any = None, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An ordinary answer: JSON, or bytes as they are; None is an empty body."""
    content = (
        body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    )

    def send(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)

    return send


def wire(*pieces: Any, every: float = 0.0, repeat: bool = False, close: bool = True) -> Answer:
    """Bytes as they are on the wire, `every` so many seconds, then the connection's end."""

    def send(handler: _Handler) -> None:
        for piece in itertools.cycle(pieces) if repeat else pieces:
            handler.wfile.write(piece)
            if handler.owner.closing.wait(every):
                break
        handler.close_connection = close

    return send


def hang(handler: _Handler) -> None:
    handler.owner.closing.wait()
    handler.close_connection = True


def reset(handler: _Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()
    handler.close_connection = True


def in_bytes(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


def run(status: Any = "running", **more: Any) -> dict[str, Any]:
    return {"id": "r1", "status": status, **more}


DONE = run("succeeded", output={"total": 7})
ORDINARY = Api(
    base_url="https://api.example.com",
    status="/jobs/{run_id}",
    start="/jobs",
    cancel="/jobs/{run_id}/cancel",
)


def briefly(seconds: float) -> None:
    assert seconds < 5, "no test waits for that"
    time.sleep(seconds)


REAL = {"sleep": briefly, "clock": time.monotonic}

# An authority for 127.0.0.1 that signed itself, good until 2046; it guards nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgxQgOwEAGYGvQClcS
xFwGpu9C18F1FIV/L9HeGq+aheahRANCAAT9CHtctepkmRX/9Z4xCLLLV8mKye79
blINlRQt+JX52uAH2hYVoZJ4fxRUVtmGrRQ9Ss8JcClTHXq4i8WQOvxU
-----END PRIVATE KEY-----
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


# ---- The simulator


@dataclass
class Simulated:
    """A run: `plan` holds its status words, and each stage takes a second of its own time."""

    id: str
    parent: str
    plan: list[str]
    said: Any  # the start's body
    begun: float
    at: int = 0

    @property
    def word(self) -> str:
        return self.plan[self.at]

    @property
    def ended(self) -> bool:
        return self.word.lower() in ("completed", "success", "finished", "failed", "cancelled")

    def time(self, seconds: float) -> str:
        instant = datetime.fromtimestamp(self.begun + seconds, timezone.utc)
        return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def done(self, steps: int) -> int:
        return steps * self.at // (len(self.plan) - 1)


class Simulator(Server):
    """The four APIs as their documents describe them, each under a prefix of its own.

    A run goes on by one stage with each status request, or every `step` seconds.
    """

    WORDS = {
        "rapidfolio": ("pending", "running", "completed"),
        "doclo": ("queued", "running", "success"),
        "dibby": ("PENDING", "RUNNING", "FINISHED"),
        "onepin": ("pending", "running", "completed"),
    }
    INVOICE = {"invoiceNumber": "INV-2025-001", "totalAmount": 1234.56, "vendor": "Acme Corp"}

    def __init__(self, *, stages: int = 4, step: float | None = None, port: int = 0) -> None:
        super().__init__(port=port)
        self.plans: dict[
            str, list[str]
        ] = {}  # API -> the words of the runs to come, where not the usual ones
        self.stages, self.step = stages, step
        self.runs: dict[str, Simulated] = {}
        self.keys: dict[str, Simulated] = {}  # by idempotency key

    def api(self, name: str) -> Api:
        path = urlsplit(getattr(runpoll, name.upper()).base_url).path
        return dataclasses.replace(
            getattr(runpoll, name.upper()), base_url=f"{self.url}/{name}{path}"
        )

    def respond(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            _, api, *parts = map(unquote, request.path.partition("?")[0].split("/"))
            if api not in self.WORDS:
                return answer({"error": "no such API"}, 404)
            if not re.fullmatch(r"Bearer \S+", request.headers.get("Authorization", "")):
                return self.refuse(api, 401, "unauthorized", "Invalid or missing API key")
            return getattr(self, f"_{api}")(request, parts)

    def refuse(self, api: str, status: int, code: str, message: str) -> Answer:
        body: dict[str, Any] = {"error": message}
        if api == "doclo":
            body = {"error": {"code": code.upper(), "message": message, "details": {}}}
        elif api == "onepin" and status in (401, 426):
            body = {"code": code, "message": message, "detail": None}
        elif api == "onepin" and status == 422:
            body = {"detail": [{"loc": ["path", "run_id"], "msg": message, "type": "uuid_parsing"}]}
        elif api == "onepin":
            body = {
                "error": {"code": code, "message": message, "details": []},
                "meta": {"request_id": "req_1234567890abcdef"},
            }
        return answer(body, status)

    def begin(self, api: str, parent: str, said: Any) -> Simulated:
        waiting, working, success = self.WORDS[api]
        plan = self.plans.get(api) or [waiting, *[working] * (self.stages - 2), success]
        number = len(self.runs) + 1
        name = {"rapidfolio": "run_{}", "doclo": "exec_{}", "dibby": "run_d{}"}.get(
            api, str(uuid.UUID(int=number))
        )
        made = Simulated(name.format(number), parent, list(plan), said, time.time())
        self.runs[made.id] = made
        return made

    def advance(self, made: Simulated) -> None:
        reached = made.at + 1 if self.step is None else int((time.time() - made.begun) / self.step)
        if not made.ended:
            made.at = min(reached, len(made.plan) - 1)

    def cancel(self, made: Simulated) -> None:
        made.plan[made.at + 1 :] = ["cancelled"]
        made.at += 1

    def _rapidfolio(self, request: Request, parts: list[str]) -> Answer:
        if request.method == "POST" and parts[:2] == ["v1", "procedures"] and len(parts) == 4:
            return self._rapidfolio_start(request, parts[2], parts[3])
        if parts[0] != "runs" or parts[1] not in self.runs:
            return self.refuse("rapidfolio", 404, "", "Run not found")
        made = self.runs[parts[1]]
        if (request.method, parts[2:]) == ("POST", ["cancel"]):
            if made.ended:
                return answer({"error": "Run is already in a terminal state"}, 409)
            self.cancel(made)
            return answer({"success": True})
        self.advance(made)
        return answer(
            {
                "id": made.id,
                "status": made.word,
                "type": "api",
                "environment": "sandbox",
                "input": made.said["data"],
                "output": {"approved": True} if made.word == "completed" else None,
                "error": "Rejected by the reviewer" if made.word == "failed" else None,
                "startedAt": made.time(0) if made.at else None,
                "completedAt": made.time(made.at) if made.ended else None,
                "createdAt": made.time(0),
                "procedureVersionId": "ver_"
                + made.said.get("metadata", {}).get("procedureVersion", "abc"),
            }
        )

    def _rapidfolio_start(self, request: Request, procedure: str, environment: str) -> Answer:
        said = request.body if isinstance(request.body, dict) else {}
        control = said.get("control", {})
        limit = control.get("executionTimeout", 60_000)
        if not isinstance(said.get("data"), dict) or not 1000 <= limit <= 300_000:
            return answer({"error": "Invalid request body"}, 400)
        if (
            environment not in ("sandbox", "live")
            or f"_{environment}_" not in request.headers["Authorization"]
        ):
            return answer({"error": "API key does not match the environment"}, 403)
        made = self.begin("rapidfolio", procedure, said)
        # The documents write run.rapidfolio.com here: an absolute URL, on the Runner's host.
        body = {
            "runId": made.id,
            "status": "running",
            "statusUrl": f"{self.url}/rapidfolio/runs/{made.id}",
        }
        if control.get("executionMode", "async") == "async":
            return answer(body, 202)
        while not made.ended and made.word != "awaiting_review":
            if (made.at + 1) * 1000 > limit:
                return answer(
                    {
                        **body,
                        "status": "timeout",
                        "error": f"Execution exceeded timeout of {limit}ms",
                    },
                    504,
                )
            made.at += 1
        if made.word != "completed":
            return answer({**body, "status": made.word})
        return answer(
            {
                "runId": made.id,
                "status": "completed",
                "output": {"approved": True, "transactionId": "txn_abc"},
                "completedAt": made.time(made.at),
            }
        )

    def _doclo(self, request: Request, parts: list[str]) -> Answer:
        said = request.body if isinstance(request.body, dict) else {}
        if request.method == "POST" and parts[:3:2] == ["api", "flows"] and parts[4:] == ["run"]:
            key = said.get("idempotencyKey")
            made = self.keys.get(key) or self.begin("doclo", parts[3], said)
            if key:
                self.keys[key] = made
            if said.get("wait"):
                made.at = len(made.plan) - 1
            return answer(self._execution(made))
        if parts[:3:2] != ["api", "runs"] or parts[3] not in self.runs:
            return self.refuse("doclo", 404, "not_found", "Execution not found")
        made = self.runs[parts[3]]
        if (request.method, parts[4:]) == ("POST", ["cancel"]):
            if made.ended:
                return self.refuse(
                    "doclo", 409, "invalid_state", f"Execution is already {made.word}"
                )
            self.cancel(made)
            return answer({**self._execution(made), "cancelledAt": made.time(made.at)})
        self.advance(made)
        return answer(self._execution(made))

    def _execution(self, made: Simulated) -> dict[str, Any]:
        body = {
            "id": made.id,
            "flowId": made.parent,
            "status": made.word,
            "createdAt": made.time(0),
            "traceId": "trace_1",
        }
        if "pending" in made.plan:  # the REST vocabulary, and not the SDK's
            body["progress"] = {"step": "extract", "percentage": made.done(100)}
        else:
            body["metrics"] = {
                "tokensUsed": 1500,
                "cost": 0.05,
                "stepsRun": made.done(3),
                "stepsTotal": 3,
            }
        if made.ended:
            body.update(completedAt=made.time(made.at), duration=made.at * 1000)
        if made.word in ("success", "completed"):
            body["output"] = self.INVOICE
        if made.word == "failed":
            body["error"] = {
                "code": "EXTRACTION_FAILED",
                "message": "No text was found",
                "details": {"page": 2},
            }
        return body

    def _dibby(self, request: Request, parts: list[str]) -> Answer:
        if (request.method, parts) == ("POST", ["api", "runs"]):
            said = request.body if isinstance(request.body, dict) else {}
            made = self.begin("dibby", said.get("workflowId"), said)
        elif request.method == "GET" and parts[:2] == ["api", "runs"] and parts[2] in self.runs:
            made = self.runs[parts[2]]
            self.advance(made)
        else:
            return self.refuse("dibby", 404, "", "Run not found")
        body = {
            "id": made.id,
            "versionName": "1.0",
            "status": made.word,
            "createdAt": made.time(0),
            "steps": 5,
            "stepsCompleted": made.done(5),
            "output": self.INVOICE if made.word == "FINISHED" else None,
        }
        if made.word == "FAILED":
            body["error"] = {"message": "Failed to process document", "step": "Document Extractor"}
        return answer(body)

    def _onepin(self, request: Request, parts: list[str]) -> Answer:
        if parts[:3] != ["api", "v1", "workflows"] or parts[4:5] != ["runs"]:
            return self.refuse("onepin", 404, "not_found", "Not found")
        if request.method == "POST" and len(parts) == 5:
            return self._enveloped(self._job(self.begin("onepin", parts[3], request.body)), 202)
        if not re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", parts[5]):
            return self.refuse("onepin", 422, "", "Input should be a valid UUID")
        if parts[5] not in self.runs or self.runs[parts[5]].parent != parts[3]:
            return self.refuse("onepin", 404, "run_not_found", "Run not found")
        made, asked = self.runs[parts[5]], (request.method, parts[6])
        if asked == ("GET", "outputs"):
            return self._enveloped(
                [
                    {
                        "node_id": "node_1",
                        "type": "audio",
                        "url": f"https://cdn.onepin.ai/{made.id}.mp3",
                    }
                ]
            )
        if asked == ("GET", "status"):
            self.advance(made)
        elif asked == ("POST", "cancel") and not made.ended:
            self.cancel(made)
        return self._enveloped(self._job(made))

    def _enveloped(self, body: Any, status: int = 200) -> Answer:
        return answer(
            {
                "data": body,
                "meta": {"request_id": "req_1234567890abcdef", "timestamp": "2024-04-20T14:25:01Z"},
            },
            status,
        )

    def _job(self, made: Simulated) -> dict[str, Any]:
        pausing = made.word == "running" and "paused" in made.plan[made.at :]
        return {
            "id": made.id,
            "workflow_id": made.parent,
            "status": made.word,
            "run_number": 42,
            "token_cost": 350,
            "created_at": made.time(0),
            "updated_at": made.time(made.at),
            "total_nodes": 15,
            "total_steps": 120 if made.at else None,
            "finished_steps": made.done(120) if made.at else None,
            "usage_summary": {"cpu_seconds": 12.5, "memory_mb": 256, "api_calls": 8},
            "started_at": made.time(0) if made.at else None,
            "completed_at": made.time(made.at) if made.ended else None,
            "pause_requested_at": made.time(made.at) if pausing else None,
            "error": "Node 7 ran out of memory" if made.word == "failed" else None,
            "has_export": made.ended,
            "triggered_by": {
                "user_id": "d290f1ee-6c54-4b01-90e6-d701748f0851",
                "user_name": "jane.doe@example.com",
            },
        }


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


class Lab:
    """Opens servers and sessions, and closes them after the test."""

    server: Server

    def __init__(self, stack: contextlib.ExitStack, directory: pathlib.Path) -> None:
        self.clock = Clock()
        self._stack = stack
        self.directory = directory
        self.certificate = directory / "certificate.pem"

    def open(
        self, *answers: Any, api: Api = ORDINARY, key: Any = KEY, tls: bool = False, **options: Any
    ) -> Session:
        """A session on the virtual clock with an API that answers so."""
        self.server = self.enter(Server(*answers, tls=self.tls() if tls else None))
        return self.session(api, key, **{"base_url": self.server.url, **options})

    def session(self, api: Api = ORDINARY, key: Any = KEY, **options: Any) -> Session:
        return self.enter(
            Session(api, key, **{"sleep": self.clock.sleep, "clock": self.clock, **options})
        )

    def enter(self, opened: Any) -> Any:
        return self._stack.enter_context(opened)

    def tls(self) -> ssl.SSLContext:
        self.certificate.write_text(CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        return context

    def trusting(self) -> ssl.SSLContext:
        """A context that trusts the certificate of these tests alone."""
        return ssl.create_default_context(cadata=CERTIFICATE[CERTIFICATE.index("-----BEGIN C") :])

    @property
    def requests(self) -> list[Request]:
        return self.server.requests

    @property
    def asked(self) -> list[str]:
        """The requests, as "GET /jobs/r1"."""
        return [f"{request.method} {request.path}" for request in self.requests]

    @property
    def naps(self) -> list[float]:
        """The naps that took time: `sleep` is also asked before every poll."""
        return [nap for nap in self.clock.naps if nap]


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield Lab(stack, tmp_path)


@pytest.fixture
def simulator(lab: Lab) -> Simulator:
    simulator = Simulator()
    lab.enter(simulator)
    return simulator


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def about(*seconds: float) -> Any:
    """These naps, give or take their jitter."""
    return pytest.approx(list(seconds), rel=0.26)


def statuses(states: Any) -> list[str]:
    return [state.status for state in states]


def quiet(handler: Any) -> Any:
    """A handler of the standard library's that logs nothing."""
    handler.func.log_message = lambda *_: None
    return handler


class QuietWSGI(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(server: Any) -> Iterator[str]:
    """The URL of a server of the standard library's, while it runs."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals or a terminal of POSIX")


def until(true: Callable[[], object]) -> None:
    """Wait, in real time, for what another process or thread does."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- The four APIs, end to end


@pytest.mark.parametrize("name", STARTS)
def test_a_run_of_each_api_is_followed_to_its_end_over_one_connection(lab, simulator, name):
    body, params = STARTS[name]
    session = lab.session(simulator.api(name))
    states = list(iter_status(session, session.start(body, **params)))
    assert states[-1].ok and [state.polls for state in states] == list(range(len(states)))
    assert statuses(states)[-1] == Simulator.WORDS[name][-1]
    assert {request.connection for request in simulator.requests} == {1}


WORDS_OF_THE_APIS = {
    "rapidfolio": {
        Phase.PENDING: "pending",
        Phase.RUNNING: "running timeout",
        Phase.PAUSED: "awaiting_review",
        Phase.SUCCEEDED: "completed",
        Phase.FAILED: "failed",
        Phase.CANCELLED: "cancelled",
    },
    "doclo": {
        Phase.PENDING: "queued pending",
        Phase.RUNNING: "running",
        Phase.SUCCEEDED: "success completed",
        Phase.FAILED: "failed",
        Phase.CANCELLED: "cancelled",
    },
    "dibby": {
        Phase.PENDING: "PENDING",
        Phase.RUNNING: "RUNNING",
        Phase.SUCCEEDED: "FINISHED",
        Phase.FAILED: "FAILED",
    },
    "onepin": {
        Phase.PENDING: "pending",
        Phase.RUNNING: "running",
        Phase.PAUSED: "paused",
        Phase.SUCCEEDED: "completed",
        Phase.FAILED: "failed",
        Phase.CANCELLED: "cancelled",
    },
}


@pytest.mark.parametrize(
    ("name", "word", "phase"),
    [
        (name, word, phase)
        for name, phases in WORDS_OF_THE_APIS.items()
        for phase, words in phases.items()
        for word in words.split()
    ],
)
def test_the_documented_words_of_each_api_are_known(name, word, phase):
    body = run(word)
    api = getattr(runpoll, name.upper())
    assert api.read_state({"data": body} if api.root else body).phase is phase


def test_rapidfolio_pins_a_version_and_every_field_is_read(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    body = {"data": {"customerId": "cust_123"}, "metadata": {"procedureVersion": "v2"}}
    begun = session.start(body, procedure_id="proc_abc", environment="sandbox")
    assert (begun.id, begun.status, begun.params) == ("run_1", "running", {"run_id": "run_1"})
    assert begun.status_url == f"{simulator.url}/rapidfolio/runs/run_1"
    state = wait(session, begun)
    assert state.raw["procedureVersionId"] == "ver_v2" and state.result() == {"approved": True}
    assert state.duration == 3.0 and state.error is None
    assert state.completed_at - state.started_at == timedelta(seconds=3)


@pytest.mark.parametrize(
    ("limit", "plan", "status", "phase"),
    [
        pytest.param(120_000, None, "completed", Phase.SUCCEEDED, id="in time"),
        pytest.param(1000, None, "timeout", Phase.RUNNING, id="held no longer"),
        pytest.param(
            60_000, ["running", "awaiting_review"], "awaiting_review", Phase.PAUSED, id="review"
        ),
    ],
)
def test_a_synchronous_rapidfolio_start_is_a_state(lab, simulator, limit, plan, status, phase):
    simulator.plans["rapidfolio"] = plan or []
    session = lab.session(simulator.api("rapidfolio"))
    control = {"executionMode": "sync", "executionTimeout": limit}
    body = {"data": {}, "control": control}
    state = session.start(body, procedure_id="proc_abc", environment="sandbox")
    assert (state.status, state.phase, state.params) == (status, phase, {"run_id": "run_1"})
    assert len(simulator.requests) == 1


def test_a_review_that_is_rejected_ends_a_rapidfolio_run_as_failed(lab, simulator):
    simulator.plans["rapidfolio"] = ["pending", "awaiting_review", "failed"]
    session = lab.session(simulator.api("rapidfolio"))
    begun = session.start({"data": {}}, procedure_id="proc_abc", environment="sandbox")
    states = list(iter_status(session, begun))
    assert states[1].phase is Phase.PAUSED and lab.naps[1:] == about(30)
    with pytest.raises(runpoll.RunFailed, match="run run_1 failed: Rejected by the reviewer"):
        states[-1].result()


def test_rapidfolio_cancels_an_active_run_and_leaves_an_ended_one_alone(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    where = {"procedure_id": "proc_abc", "environment": "sandbox"}
    assert session.cancel(session.start({"data": {}}, **where)) is True
    assert session.poll("run_1").phase is Phase.CANCELLED
    ended = wait(session, session.start({"data": {}}, **where))
    assert session.cancel(ended.params) is False


def test_the_documented_backoff_of_rapidfolio_is_one_value(lab):
    session = lab.open(*[run()] * 9, DONE)
    backoff = runpoll.Backoff(initial=1, factor=1.5, maximum=15, jitter=0)
    wait(session, "r1", interval=backoff)
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


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"duration": 1500}, "duration", 1.5),
        ({"metrics": {"durationMs": 250}}, "duration", 0.25),
        ({"progress": {"step": "extract", "percentage": 40}}, "progress", 0.4),
        ({"metrics": {"stepsRun": 1, "stepsTotal": 4}}, "progress", 0.25),
    ],
)
def test_doclo_is_read_in_the_words_of_its_sdk_and_of_its_rest_interface(body, field, value):
    assert getattr(runpoll.DOCLO.read_state(run("running", **body)), field) == value


def test_a_doclo_start_under_an_idempotency_key_is_sent_again_and_begins_one_run(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    body = {**STARTS["doclo"][0], "idempotencyKey": "order-7"}
    ids = {session.start(body, flow_id="f", repeatable=True).id for _ in range(2)}
    assert ids == {"exec_1"}


def test_doclo_failures_have_a_code_and_details(lab, simulator):
    simulator.plans["doclo"] = ["queued", "failed"]
    session = lab.session(simulator.api("doclo"))
    state = wait(session, session.start(STARTS["doclo"][0], flow_id="f"))
    assert state.error == ErrorInfo("No text was found", "EXTRACTION_FAILED", None, {"page": 2})
    assert session.cancel(state) is False


def test_dibby_steps_are_progress_and_the_failed_step_is_named(lab, simulator):
    simulator.plans["dibby"] = ["PENDING", "RUNNING", "FAILED"]
    session = lab.session(simulator.api("dibby"))
    states = list(iter_status(session, session.start(STARTS["dibby"][0])))
    assert [state.progress for state in states] == [0.0, 0.4, 1.0]
    assert states[-1].error == ErrorInfo("Failed to process document", step="Document Extractor")
    with pytest.raises(runpoll.RunFailed, match="in the step 'Document Extractor'"):
        states[-1].result()


def test_sixty_polls_of_dibby_two_seconds_apart_are_an_islice(lab):
    session = lab.open(run("RUNNING"), api=runpoll.DIBBY)
    states = list(itertools.islice(iter_status(session, "r1", interval=2), 60))
    assert len(states) == 60 and lab.naps == [2] * 59


def test_onepin_has_two_ids_an_envelope_and_a_workspace(lab, simulator):
    session = lab.session(simulator.api("onepin"), headers={"X-Workspace-Id": "ws_1"})
    body, params = STARTS["onepin"]
    begun = session.start(body, **params)
    assert set(begun.params) == {"workflow_id", "run_id"}
    state = wait(session, begun.params)
    assert (state.steps_done, state.steps_total, state.progress) == (120, 120, 1.0)
    assert simulator.requests[-1].headers["X-Workspace-Id"] == "ws_1"
    path = "/api/v1/workflows/{workflow_id}/runs/{run_id}/outputs"
    assert session.request("GET", path, params=state.params)["data"][0]["type"] == "audio"


def test_onepin_pauses_and_answers_200_when_an_ended_run_is_cancelled(lab, simulator):
    simulator.plans["onepin"] = ["pending", "paused", "completed"]
    session = lab.session(simulator.api("onepin"))
    states = list(iter_status(session, session.start(None, **STARTS["onepin"][1])))
    assert [state.phase for state in states][1] is Phase.PAUSED
    assert session.cancel(states[-1].params) is False


# ---- Phases and words


@pytest.mark.parametrize("phase", Phase)
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
SPELLINGS = {
    "as it is": str,
    "upper case": str.upper,
    "with hyphens": lambda word: word.title().replace("_", "-"),
    "camel case": lambda word: word[0] + word.title().replace("_", "")[1:],
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize(
    ("phase", "word"),
    [(phase, word) for phase, words in USUAL_WORDS.items() for word in words.split()],
)
def test_the_usual_words_are_known_in_any_spelling(phase, word, spell):
    state = ORDINARY.read_state(run(spell(word)))
    assert state.phase == phase and state.status == spell(word)


@pytest.mark.parametrize(
    ("status", "phase"),
    [(-2, "failed"), (2, "succeeded"), (" -2", "failed"), (2.0, "unknown"), (-1e22, "unknown")],
)
def test_a_word_that_is_a_number_keeps_its_sign(status, phase):
    api = dataclasses.replace(
        ORDINARY, phases={"-2": Phase.FAILED, "2": "succeeded", "1e+22": "failed"}
    )
    assert api.read_state(run(status)).phase == phase


def test_an_unknown_word_is_polled_on_and_logged_once_a_session(lab, caplog):
    session = lab.open(run("Odd"), run("odd"), run("ODD"), DONE)
    states = list(iter_status(session, "r1"))
    assert [state.phase.terminal for state in states] == [False, False, False, True]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "unknown status 'Odd'" in caplog.text


# ---- RunState


def read(status: Any = "running", **more: Any) -> RunState:
    """What an ordinary API reads of a run."""
    return ORDINARY.read_state(run(status, **more))


NOON = datetime(2026, 2, 27, 12, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("said", "instant"),
    [
        ("2026-02-27T12:00:00Z", NOON),
        ("2026-02-27t12:00:00z", NOON),
        ("2026-02-27 12:00:00", NOON),
        ("2026-02-27T14:00:00+02:00", NOON),
        ("2026-02-27T06:30:00-0530", NOON),
        ("2026-02-27T12:00:00.5Z", NOON + timedelta(seconds=0.5)),
        ("2026-02-27T12:00:00.123456789Z", NOON + timedelta(microseconds=123456)),
        (NOON.timestamp(), NOON),
        (int(NOON.timestamp()) * 1000, NOON),
        (NOON.replace(tzinfo=None), NOON),
        ("yesterday", None),
        ("2026-02-30T12:00:00Z", None),
        ("2026-02-27", None),
        ("", None),
        (-1, None),
        (1e300, None),
        (math.nan, None),
        (True, None),
        ({}, None),
    ],
)
def test_timestamps_are_aware_utc_or_none(said, instant):
    state = read(created_at=said)
    assert state.created_at == instant
    assert instant is None or state.created_at.tzinfo is timezone.utc


@pytest.mark.parametrize(
    ("said", "duration"),
    [
        ({"duration_seconds": 2}, 2.0),
        ({"started_at": 100, "completed_at": 107, "created_at": 50}, 7.0),
        ({"created_at": 100, "completed_at": 107}, 7.0),
        ({"started_at": 107, "completed_at": 100}, None),
        ({"started_at": 100}, None),
        ({"duration_seconds": "2"}, None),
        ({"duration": 2}, None),  # milliseconds, of some
    ],
)
def test_the_duration_is_the_apis_own_or_counted(said, duration):
    assert read("done", **said).duration == duration


@pytest.mark.parametrize(
    ("status", "said", "progress"),
    [
        ("running", {"progress": 0.25}, 0.25),
        ("running", {"progress": 1.0}, 1.0),
        ("running", {"progress": 1}, 0.01),  # R17
        ("done", {"progress": 1}, 1.0),
        ("running", {"progress": 42}, 0.42),
        ("running", {"progress": 1.5}, 0.015),
        ("running", {"progress": 100}, 1.0),
        ("running", {"progress": 10**400}, 1.0),
        ("running", {"progress": -1}, None),
        ("running", {"progress": math.nan}, None),
        ("running", {"progress": True}, None),
        ("running", {"steps_done": 1, "steps_total": 4}, 0.25),
        ("running", {"stepsDone": 9, "stepsTotal": 4}, 1.0),
        ("running", {"steps_done": 1, "steps_total": 0}, None),
        ("running", {"steps_done": 1}, None),
        ("running", {"progress": "20 %", "steps_done": 1, "steps_total": 4}, 0.25),
    ],
)
def test_progress_is_the_apis_own_figure_or_counted_in_steps(status, said, progress):
    assert read(status, **said).progress == progress


@pytest.mark.parametrize(
    ("said", "word"), [(10, "10"), (True, "true"), (2.5, "2.5"), ("a", "a"), ({}, None), ("", None)]
)
@pytest.mark.parametrize("field", ["id", "status"])
def test_a_number_or_a_boolean_as_a_word_is_its_json(field, said, word):
    body = {**run(), field: said}
    if word is None:
        with pytest.raises(BadResponse, match=f"has no {field} of"):
            ORDINARY.read_state(body, None if field == "id" else {"run_id": "r1"})
    else:
        assert getattr(ORDINARY.read_state(body), field) == word


# What an API says -> the message, and more where there is more.
ERROR_FORMS = {
    "text": ("no", ErrorInfo("no")),
    "message": ({"message": "no", "title": "t"}, ErrorInfo("no")),
    "detail": ({"detail": "no"}, ErrorInfo("no")),
    "description": ({"description": "no"}, ErrorInfo("no")),
    "oauth": ({"error": "x", "error_description": "no"}, ErrorInfo("no")),
    "error_message": ({"error_message": "no"}, ErrorInfo("no")),
    "title": ({"title": "no"}, ErrorInfo("no")),
    "all": (
        {"message": "no", "code": 7, "step": "s", "details": [1]},
        ErrorInfo("no", "7", "s", [1]),
    ),
    "nested": ({"error": {"message": "no", "code": "c"}}, ErrorInfo("no", "c")),
    "nested twice": ({"error": {"detail": {"title": "no"}}}, ErrorInfo("no")),
    "nested, code outside": ({"error": {"message": "no"}, "code": "c"}, ErrorInfo("no", "c")),
    "list of texts": (["no", "", "never"], ErrorInfo("no; never")),
    "errors": ({"errors": [{"title": "no"}, {"message": "never"}]}, ErrorInfo("no; never")),
    "other object": ({"loc": ["a"], "msg": "no"}, ErrorInfo('{"loc": ["a"], "msg": "no"}')),
    "number": (5, ErrorInfo("5")),
    "true": (True, ErrorInfo("true")),
}


@pytest.mark.parametrize(("said", "info"), ERROR_FORMS.values(), ids=ERROR_FORMS)
@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_the_error_of_a_run_that_ended_badly_is_read_in_any_form(status, said, info):
    assert read(status, error=said).error == info


@pytest.mark.parametrize(("said", "info"), ERROR_FORMS.values(), ids=ERROR_FORMS)
def test_the_error_of_an_error_answer_is_read_in_any_form(lab, said, info):
    with pytest.raises(ApiError) as caught:
        lab.open(answer(said, 400)).poll("r1")
    assert caught.value.error == info


@pytest.mark.parametrize("said", [None, "", " ", [], {}, [""], 0, False])
def test_what_is_empty_is_no_error(said):
    assert read("failed", error=said).error is None


@pytest.mark.parametrize("status", ["running", "paused", "succeeded", "odd"])
def test_what_an_api_says_beside_other_states_stands_in_raw(status):
    state = read(status, error="a warning")
    assert state.error is None and state.raw["error"] == "a warning"


def test_values_of_the_wrong_type_are_as_if_absent():
    names = ["created_at", "duration_seconds", "steps_done", "steps_total", "progress"]
    state = read(**{name: {"a": 1} for name in names}, status_url=7)
    assert state == dataclasses.replace(read(), raw=state.raw)


def test_output_and_raw_stay_out_of_the_repr():
    assert "secret" not in repr(read("done", output="secret"))


def test_a_state_pickles_and_compares_by_what_the_api_said():
    state = read("failed", error={"message": "no"}, created_at=5)
    assert pickle.loads(pickle.dumps(state)) == state == copy.deepcopy(state)
    assert dataclasses.replace(state, polls=9, faults=1, elapsed=2.0, eta=1.0) == state
    assert dataclasses.replace(state, status="odd") != state


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("failed", runpoll.RunFailed),
        ("cancelled", runpoll.RunCancelled),
        ("running", runpoll.RunNotDone),
        ("odd", runpoll.RunNotDone),
    ],
)
def test_a_result_is_only_that_of_a_successful_run(status, error):
    state = read(status, output=7)
    with pytest.raises(error, match="run r1 ") as caught:
        state.result()
    assert caught.value.state is state and caught.value.params == {"run_id": "r1"}


def test_a_result_goes_through_decode_and_what_that_raises_comes_out():
    assert read("done", output="7").result(int) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        read("done", output="x").result(int)


# ---- Any other API


def test_two_fields_alone_drive_an_ordinary_api(lab):
    api = Api(base_url="https://api.example.com", status="/jobs/{run_id}")
    session = lab.open(run(), DONE, api=api)
    assert wait(session, "r1").result() == {"total": 7}
    assert lab.asked == ["GET /jobs/r1"] * 2


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
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
    ],
)
def test_the_usual_names_are_known_in_snake_and_in_camel_case(body, field, value):
    body = {"status": "running", **({} if field == "id" else {"id": "r1"}), **body}
    assert getattr(ORDINARY.read_state(body), field) == value


@pytest.mark.parametrize(
    ("options", "body", "field", "value"),
    [
        pytest.param({"root": "a.b"}, {"a": {"b": run()}}, "status", "running", id="root"),
        pytest.param(
            {"fields": {"output": "a.b"}}, run(a={"b": 1}), "output", 1, id="a dotted path"
        ),
        pytest.param(
            {"fields": {"status": ("end", "status")}}, run(end=None), "status", "running", id="null"
        ),
        pytest.param(
            {"fields": {"status": ["end", "status"]}}, run(end={}), "status", "running", id="type"
        ),
        pytest.param(
            {"fields": {"progress": lambda job: job["a"] / 4}},
            run(a=1),
            "progress",
            0.25,
            id="call",
        ),
        pytest.param(
            {"phases": {"Odd-Word": "failed"}}, run("oddWord"), "phase", "failed", id="odd"
        ),
        pytest.param({"phases": {"done": "running"}}, run("done"), "phase", "running", id="usual"),
    ],
)
def test_one_value_describes_another_api(options, body, field, value):
    assert getattr(dataclasses.replace(ORDINARY, **options).read_state(body), field) == value


@pytest.mark.parametrize("fault", [KeyError, IndexError, TypeError, ValueError, AttributeError])
def test_a_callable_field_that_raises_finds_nothing(fault):
    def fail(_: Any) -> Any:
        raise fault("x")

    api = dataclasses.replace(ORDINARY, fields={"progress": fail})
    assert api.read_state(run()).progress is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"status": "/jobs"}, "run_id"),
        ({"status": "jobs/{run_id}"}, "a path template is like"),
        ({"status": "/jobs/{run_id}/{run_id}"}, "each parameter once"),
        ({"status": "/jobs/{run id}"}, "a path template is like"),
        ({"start": "POST"}, "a path template is like"),
        ({"cancel": "/jobs/{run_id}/{reason}"}, "the cancel template has a parameter"),
        ({"fields": {"state": "a"}}, "state"),
        ({"phases": {"a": "nothing"}}, "nothing"),
        ({"base_url": "api.example.com"}, "base_url"),
        ({"base_url": "ftp://api.example.com"}, "base_url"),
        ({"base_url": "https://user:pw@api.example.com"}, "base_url"),
        ({"base_url": "https://api example.com"}, "api example.com"),
        ({"base_url": "https://api.example.com?a=b"}, "base_url"),
    ],
)
def test_an_api_that_cannot_work_is_refused_at_construction(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        dataclasses.replace(ORDINARY, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": None},
        {"status": 5},
        {"root": ["a"]},
        {"fields": 5},
        {"fields": {"id": 5}},
        {"phases": 5},
        {"phases": {5: "failed"}},
        {"answer_statuses": 504},
        {"auth_scheme": None},
    ],
)
def test_an_api_of_the_wrong_types_is_a_type_error(options):
    with pytest.raises(TypeError):
        dataclasses.replace(ORDINARY, **options)


def test_each_duration_of_doclo_is_milliseconds():
    for fields in ({"duration": 1500}, {"duration": True, "metrics": {"durationMs": 1500}}):
        assert runpoll.DOCLO.read_state({"id": "r1", "status": "success", **fields}).duration == 1.5
    for nothing in (10**400, "x", -1, True):
        answer = {"id": "r1", "status": "success", "duration": nothing}
        assert runpoll.DOCLO.read_state(answer).duration is None


def test_read_state_reads_a_webhook_alone():
    state = runpoll.RAPIDFOLIO.read_state({"runId": "r1", "status": "completed", "output": 1})
    assert (state.params, state.result(), state.raw["runId"]) == ({"run_id": "r1"}, 1, "r1")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (None, "the answer has no id of a run"),
        ({"run_id": "r1"}, "the answer has no status of run r1"),
    ],
)
@pytest.mark.parametrize("root", ["", "data"])
def test_what_is_no_state_is_told_in_a_sentence_with_what_the_api_says(params, text, root):
    said: Any = {"error": {"message": "no such run"}}  # R16
    api = dataclasses.replace(ORDINARY, root=root)
    with pytest.raises(BadResponse) as caught:
        api.read_state({root: said} if root else said, params, http_status=202)
    whole = f"{text}; it says: no such run; check the base_url and the Api's root and fields"
    assert str(caught.value) == whole and caught.value.params == params
    assert caught.value.transient and caught.value.http_status == 202


@pytest.mark.parametrize("body", [None, [], "running", 5, {}, {"data": None}])
def test_a_body_of_another_shape_is_a_bad_response(body):
    with pytest.raises(BadResponse):
        ORDINARY.read_state(body)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ({"id": "r1", "status": "timeout"}, "timeout"),
        ({"runId": "r1", "status": "done"}, "done"),
        ({"status": "error"}, None),  # a gateway's
        ({"id": "r2", "status": "error"}, None),
        ({"id": "r1", "status": "odd"}, None),
        ({"id": "r1"}, None),
        (b"<html>", None),
    ],
)
def test_of_the_answer_statuses_only_what_names_the_run_is_a_state(lab, said, state):
    api = dataclasses.replace(ORDINARY, answer_statuses=(504,), phases={"timeout": "running"})
    session = lab.open(answer(said, 504), api=api, max_outage=0)
    if state:
        assert session.poll("r1").status == state
    else:
        with pytest.raises(ApiError) as caught:
            session.poll("r1")
        assert caught.value.http_status == 504


class Headed(Api):
    """The state is in a header and in the HTTP status."""

    def read_state(self, body, params=None, headers=None, http_status=200):
        status = "running" if http_status == 202 else headers["X-STATE"]
        return super().read_state({"status": status, "output": body}, params, headers)


def test_a_subclass_reads_a_state_from_the_http_status_or_a_header(lab):
    api = Headed(base_url="https://api.example.com", status="/jobs/{run_id}")
    session = lab.open(answer(None, 202), answer({"a": 1}, headers={"x-state": "done"}), api=api)
    assert statuses(iter_status(session, "r1")) == ["running", "done"]


@pytest.mark.parametrize("fault", [KeyError, TypeError, ValueError, AttributeError, RecursionError])
def test_what_an_override_raises_is_a_transient_bad_response_that_names_it(lab, fault):
    class Failing(Api):
        def read_state(self, *_: Any, **__: Any) -> RunState:
            raise fault("secret output")

    api = Failing(base_url="https://api.example.com", status="/jobs/{run_id}")
    with pytest.raises(BadResponse, match=fault.__name__) as caught:
        lab.open(DONE, api=api, max_outage=0).poll("r1")
    assert caught.value.transient and "secret" not in str(caught.value)


@pytest.mark.parametrize("said", [None, {"id": "r1"}, "running"])
def test_an_override_that_returns_no_state_is_a_bad_response(lab, said):
    class Odd(Api):
        def read_state(self, *_: Any, **__: Any) -> Any:
            return said

    api = Odd(base_url="https://api.example.com", status="/jobs/{run_id}")
    with pytest.raises(BadResponse, match="TypeError in read_state"):
        lab.open(DONE, api=api, max_outage=0).poll("r1")


def test_the_handle_of_a_state_that_an_override_made_by_itself_is_filled_in(lab):
    class Own(Api):
        def read_state(self, *_: Any, **__: Any) -> RunState:
            return RunState("r7", "running", Phase.RUNNING)

    api = Own(base_url="https://api.example.com", status="/jobs/{run_id}", start="/jobs")
    assert lab.open(DONE, api=api).start().params == {"run_id": "r7"}


# ---- Handles, paths and Locations


@pytest.mark.parametrize(
    ("run_id", "path"),
    [
        ("a/b", "/jobs/a%2Fb"),
        ("../secrets", "/jobs/..%2Fsecrets"),
        ("a?b=c#d", "/jobs/a%3Fb%3Dc%23d"),
        ("ä 1\n", "/jobs/%C3%A4%201%0A"),
        ("100%", "/jobs/100%25"),
    ],
)
def test_an_id_cannot_change_the_path(lab, run_id, path):
    lab.open(DONE).poll(run_id)
    assert lab.asked == [f"GET {path}"]


@pytest.mark.parametrize("call", ["poll", "cancel", "iter_status", "wait"])
@pytest.mark.parametrize(
    ("handle", "error", "text"),
    [
        ("", ValueError, "run_id"),
        ("..", ValueError, "run_id"),
        ({"run_id": "."}, ValueError, "run_id"),
        ({}, TypeError, "run_id"),
        ({"run_id": "a", "other": "b"}, TypeError, "other"),
        ({"run_id": None}, TypeError, "run_id"),
        (None, TypeError, "NoneType"),
        (7, TypeError, "int"),
        ("https://api.example.com/elsewhere/r1", ValueError, "status URL"),
    ],
)
def test_a_handle_that_names_no_run_is_refused_at_the_call(lab, handle, error, text, call):
    session = lab.open(DONE)
    with pytest.raises(error, match=text):
        getattr(runpoll, call)(session, handle) if "wait iter_status".count(call) else getattr(
            session, call
        )(handle)
    assert not lab.requests


def test_every_kind_of_handle_names_the_same_run(lab):
    session = lab.open(run())
    state = session.poll("r1")
    for handle in (state, state.params, {"run_id": "r1"}, "https://elsewhere.test/v9/jobs/r1?a=b"):
        assert session.poll(handle).params == {"run_id": "r1"}
    assert set(lab.asked) == {"GET /jobs/r1"}


@pytest.mark.parametrize(
    ("status", "location", "run_id"),
    [
        ("/jobs/{run_id}", "/jobs/42", "42"),
        ("/jobs/{run_id}", "http://10.0.0.7:8080/jobs/42", "42"),  # R5
        ("/jobs/{run_id}", "https://api.example.com/v2/jobs/42/?wait=1#x", "42"),
        ("/jobs/{run_id}", "jobs/a%2Fb", "a/b"),
        ("/jobs/{run_id}", "/jobs/a&b", "a&b"),
        ("/jobs/{run_id}/state", "/jobs/42/state", "42"),
        ("/jobs?id={run_id}", "/jobs?id=42&a=b", "42"),
        ("/jobs/{run_id}?v=1", "/jobs/42", "42"),
        ("/jobs/{run_id}", "/elsewhere/42", None),
        ("/jobs/{run_id}", "/myjobs/42", None),
        ("/jobs/{run_id}", "/jobs/42/log", None),
        ("/jobs/{run_id}", "/jobs/", None),
        ("/jobs/{run_id}", "/jobs/%2E%2E", None),
        ("/jobs/{run_id}", "http://[broken/jobs/42", None),
    ],
)
def test_a_start_without_an_id_is_named_by_its_location(lab, status, location, run_id):
    api = Api(base_url="https://api.example.com", status=status, start="/jobs")
    session = lab.open(answer(None, 202, {"Location": location}), api=api)
    if run_id:
        state = session.start()
        assert (state.params, state.status, state.phase) == ({"run_id": run_id}, "", Phase.PENDING)
    else:
        with pytest.raises(BadResponse, match="its Location .* does not end as") as caught:
            session.start()
        assert "a run may have begun" in str(caught.value) and len(lab.requests) == 1


def test_the_known_parameters_of_a_location_have_to_be_its_own():
    params, headers = {"workflow_id": "w1"}, {"LOCATION": "/api/v1/workflows/w1/runs/r1/status"}
    assert runpoll.ONEPIN.read_state({}, params, headers).params == {**params, "run_id": "r1"}
    with pytest.raises(BadResponse):
        runpoll.ONEPIN.read_state({}, {"workflow_id": "w2"}, headers)


def test_parameters_of_the_start_alone_are_no_part_of_the_handle(lab):
    api = dataclasses.replace(ORDINARY, start="/{team}/jobs")
    assert lab.open(run(), api=api).start(team="a").params == {"run_id": "r1"}
    assert lab.asked == ["POST /a/jobs"]


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "the path '/{team}/jobs' lacks the parameter 'team'"),
        ({"other": "b"}, "lacks the parameter 'team'"),
        ({"team": "a", "other": "b"}, "has no 'other'"),
    ],
)
def test_missing_and_unknown_start_parameters_are_named(lab, params, text):
    session = lab.open(run(), api=dataclasses.replace(ORDINARY, start="/{team}/jobs"))
    with pytest.raises(TypeError, match=re.escape(text)):
        session.start(**params)
    assert not lab.requests


def test_an_api_without_a_template_refuses_its_call(lab):
    session = lab.open(run(), api=dataclasses.replace(ORDINARY, start="", cancel=""))
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


@pytest.mark.parametrize(
    ("options", "header", "value"),
    [
        ({}, "Authorization", f"Bearer {KEY}"),
        ({"auth_scheme": "Token"}, "Authorization", f"Token {KEY}"),
        ({"auth_header": "X-Api-Key", "auth_scheme": ""}, "X-Api-Key", KEY),
    ],
)
def test_where_the_key_goes(lab, options, header, value):
    lab.open(DONE, api=dataclasses.replace(ORDINARY, **options), key=f" {KEY}\n").poll("r1")
    assert lab.requests[0].headers[header] == value


def test_a_key_from_a_callable_is_asked_anew_for_every_attempt(lab):
    keys = iter(["first-key", "second-key"])
    session = lab.open(503, DONE, key=lambda: next(keys))
    session.poll("r1")
    sent = [request.headers["Authorization"] for request in lab.requests]
    assert sent == ["Bearer first-key", "Bearer second-key"]


def test_without_a_key_none_is_sent(lab):
    lab.open(DONE, key=None).poll("r1")
    assert "Authorization" not in lab.requests[0].headers


def test_a_request_is_any_other_call_of_the_api(lab):
    session = lab.open(answer([1]), answer(None, 204), base_url=None)
    session = lab.session(base_url=f"{lab.server.url}/v2/")
    assert session.request("get", "/logs/{name}?a=b", params={"name": "x/y"}) == [1]
    assert session.request("PUT", "/logs", {"a": 1}) is None
    assert lab.asked == ["GET /v2/logs/x%2Fy?a=b", "PUT /v2/logs"]


# The first look, the cancel's answer, the second look -> what comes of it, and how many requests.
CANCELS = {
    "accepted, gone on": (run(), answer({"ok": True}), run("cancelling"), True, 3),
    "accepted, cancelled": (run(), answer(None, 204), run("cancelled"), True, 3),
    "accepted, had ended": (run(), answer(None), DONE, False, 3),
    "accepted, deleted": (run(), answer(None), 404, True, 3),
    "accepted, gone": (run(), answer(None), 410, True, 3),
    "HTML": (run(), answer(b"<html>"), run("cancelled"), True, 3),
    "303": (run(), answer(None, 303, {"Location": "/"}), run("cancelled"), True, 3),  # R6
    "400, had ended": (run(), 400, DONE, False, 3),  # R9
    "409, had ended": (run(), 409, run("failed"), False, 3),
    "422, was cancelled": (run(), 422, run("cancelled"), True, 3),
    "409, active": (run(), 409, run(), 409, 3),
    "404, cannot be found": (404, 404, 404, 404, 3),
    "501, active": (run(), 501, run(), 501, 3),
    "not known yet": (404, answer(None), run("cancelled"), True, 3),
    "had ended": (DONE, None, None, False, 1),
    "was cancelled": (run("cancelled"), None, None, True, 1),
    "401 at first": (401, None, None, 401, 1),
    "403 at first": (403, None, None, 403, 1),
    "401 to the cancel": (run(), 401, None, 401, 2),
}


@pytest.mark.parametrize(
    ("look", "said", "settled", "outcome", "requests"), CANCELS.values(), ids=CANCELS
)
def test_what_comes_of_a_cancel(lab, look, said, settled, outcome, requests):
    session = lab.open(look, *[step for step in (said, settled) if step is not None])
    if isinstance(outcome, bool):
        assert session.cancel("r1") is outcome
    else:
        with pytest.raises(ApiError) as caught:
            session.cancel("r1")
        assert caught.value.http_status == outcome
    methods = [request.method for request in lab.requests]
    assert methods == ["GET", "POST", "GET"][:requests]


def test_a_cancel_that_fails_for_long_is_raised_at_once(lab):
    with pytest.raises(ApiError) as caught:
        lab.open(run(), 502, max_outage=0).cancel("r1")
    assert caught.value.http_status == 502 and len(lab.requests) == 2


def test_a_cancel_of_a_state_that_is_done_asks_nothing(lab):
    session = lab.open(500)
    assert [session.cancel(read(word)) for word in ("cancelled", "done", "failed")] == [
        True,
        False,
        False,
    ]
    assert not lab.requests


def test_a_cancel_by_another_method_and_with_a_body(lab):
    api = dataclasses.replace(ORDINARY, cancel="DELETE /jobs/{run_id}")
    lab.open(run(), answer(None), run("cancelled"), api=api).cancel("r1", {"why": "late"})
    assert lab.asked[1] == "DELETE /jobs/r1" and lab.requests[1].body == {"why": "late"}


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "https://user:pw@api.test"},
        {"base_url": "http://api.test"},
        {"request_timeout": 0},
        {"request_timeout": math.nan},
        {"max_outage": -1},
        {"max_body": -1},
        {"headers": {"a b": "c"}},
        {"headers": {"A": "b\nc"}},
        {"api_key": "a\nb"},
        {"api_key": "a\tb"},
        {"api_key": "\u20ac"},
        {"proxy": "socks5://127.0.0.1:1"},
    ],
)
def test_a_session_that_cannot_work_is_refused(options):
    with pytest.raises(ValueError, match=".") as caught:
        Session(ORDINARY, **{"api_key": KEY, **options})
    assert "b\nc" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"api": None},
        {"api_key": 7},
        {"max_outage": "1"},
        {"request_timeout": True},
        {"sleep": 5},
        {"headers": 5},
    ],
)
def test_an_argument_of_the_wrong_type_is_a_type_error(options):
    with pytest.raises(TypeError):
        Session(**{"api": ORDINARY, "api_key": KEY, **options})


def test_a_body_that_is_no_json_is_refused_before_any_request(lab):
    session = lab.open(run())
    with pytest.raises(ValueError, match="JSON"):
        session.start({"a": math.nan})
    with pytest.raises(TypeError):
        session.start({"a": object()})
    assert not lab.requests


def test_a_closed_session_says_so_and_has_no_connection_open(lab):
    session = lab.open(run())
    wait_for = iter_status(session, "r1")
    next(wait_for)
    session.close()
    for call in (lambda: session.poll("r1"), lambda: next(wait_for)):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert lab.server.closed_by_client()


def test_the_end_of_a_with_block_closes_the_session(lab):
    with lab.open(run()) as session:
        session.poll("r1")
    assert lab.server.closed_by_client()
    with pytest.raises(RuntimeError):
        session.poll("r1")


def test_starts_from_several_threads_share_a_session(lab, simulator):
    session = lab.session(simulator.api("dibby"), **REAL)
    with ThreadPoolExecutor(8) as pool:
        begun = pool.map(lambda _: session.start(STARTS["dibby"][0]).id, range(32))
    assert len(set(begun)) == 32


# ---- Faults, and which of them are tried again


PASSING = {
    **{str(status): status for status in (408, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)},
    "403 that limits": answer(None, 403, {"Retry-After": "1"}),  # R4
    "reset": reset,
    "cut off": wire(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
    "HTML": answer(b"<html>"),
    "empty": answer(None),
    "no state": answer([]),
    "no HTTP": wire(b"hello\r\n\r\n"),
}
FINAL = [301, 302, 303, 307, 400, 401, 402, 403, 404, 405, 409, 410, 422, 451, 501, 505]


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_is_sat_out_and_logged(lab, caplog, fault):
    assert lab.open(fault, DONE).poll("r1").ok
    assert len(lab.naps) == 1 and "trying again in" in caplog.text


@pytest.mark.parametrize("status", FINAL)
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


def test_at_a_max_outage_of_0_nothing_but_a_lag_is_sat_out(lab):
    for fault in (502, 429, reset):
        with pytest.raises(runpoll.RunpollError):
            lab.open(fault, max_outage=0).poll("r1")
        assert len(lab.requests) == 1
    assert lab.open(401, 401, DONE, key=lambda: KEY, max_outage=0).poll("r1").ok


def test_a_401_under_a_callable_key_is_sat_out_for_ten_seconds(lab):  # R13
    with pytest.raises(ApiError) as caught:
        lab.open(401, key=lambda: KEY).poll("r1")
    assert caught.value.http_status == 401 and sum(lab.naps) == pytest.approx(10)


@pytest.mark.parametrize("status", [429, 403, 503, 502])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 2.5 "}, 2.5),
        (  # R15: whatever the clock of this machine says
            {
                "Retry-After": "Fri, 27 Feb 2026 12:00:05 GMT",
                "Date": "Fri, 27 Feb 2026 12:00:00 GMT",
            },
            5,
        ),
        ({"Retry-After": "60"}, 60),
    ],
)
def test_a_retry_after_replaces_the_wait(lab, status, headers, seconds):
    lab.open(answer(None, status, headers), DONE).poll("r1")
    assert lab.naps == [pytest.approx(seconds)]


@pytest.mark.parametrize("value", ["0", "-1", "soon", "Fri, 27 Feb 2015 12:00:00 GMT", "1e3", ""])
def test_a_retry_after_that_says_nothing_is_as_if_absent(lab, value):
    lab.open(answer(None, 429, {"Retry-After": value}), DONE).poll("r1")
    assert lab.naps == about(0.5)


def test_a_direct_call_does_not_wait_for_what_ends_after_max_outage(lab):
    with pytest.raises(ApiError, match="in 61 s") as caught:
        lab.open(answer(None, 429, {"Retry-After": "61"})).poll("r1")
    assert caught.value.retry_after == 61 and not lab.naps


@pytest.mark.parametrize(("status", "held"), [(429, True), (403, True), (503, True), (502, False)])
def test_who_is_limited_holds_back_the_whole_session(lab, status, held):
    session = lab.open(answer(None, status, {"Retry-After": "9"}), run())
    begun: list[float] = []

    def another() -> None:
        lab.clock.meanwhile = lambda: None
        session.request("GET", "/other")
        begun.append(lab.clock.now)

    lab.clock.meanwhile = another
    session.poll("r1")
    assert begun == [1009 if held else 1000]


# ---- A start is never sent twice where the first may have begun a run


OPEN = {  # what leaves open whether a run has begun
    "408": 408,
    "425": 425,
    "500": 500,
    "502": 502,
    "504": 504,
    "303": answer(None, 303, {"Location": "/jobs/r1"}),  # R6
    "reset": reset,
    "cut off": wire(b"HTTP/1.1 202 Accepted\r\nContent-Length: 99\r\n\r\n{"),
    "HTML": answer(b"<html>"),
    "no id": answer({"status": "running"}),
    "an interim answer": wire(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


@pytest.mark.parametrize("fault", OPEN.values(), ids=OPEN)
def test_a_start_that_may_have_begun_is_not_sent_again(lab, fault):
    with pytest.raises(runpoll.RunpollError, match="a run may have begun: look before") as caught:
        lab.open(fault, run()).start()
    assert len(lab.requests) == 1 and getattr(caught.value, "sent", True)


def test_a_start_that_is_given_up_may_have_begun(lab):
    with pytest.raises(TransportError, match=r"no answer within 0.1 s.*may have begun") as caught:
        lab.open(hang).start(request_timeout=0.1)
    assert caught.value.sent and len(lab.requests) == 1


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_start_is_tried_again_where_no_run_can_have_begun(lab, method):
    api = dataclasses.replace(ORDINARY, start=f"{method} /jobs")
    limited = answer(None, 403, {"Retry-After": "1"})
    assert lab.open(429, limited, 401, run(), api=api, key=lambda: KEY).start().id == "r1"


def test_a_start_that_made_no_connection_has_begun_no_run(lab):
    session = lab.session(base_url=f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(TransportError, match="Connection refused.*; no run has begun") as caught:
        session.start()
    assert caught.value.sent is False and len(lab.naps) > 5


@pytest.mark.parametrize("status", [400, 401, 402, 404, 409, 422])
def test_a_start_that_is_refused_has_begun_no_run(lab, status):
    with pytest.raises(ApiError, match="; no run has begun"):
        lab.open(status).start()


@pytest.mark.parametrize("fault", [500, 502, reset, answer(b"<html>")])
def test_a_repeatable_start_is_sent_again_after_any_fault_that_passes(lab, fault):
    assert lab.open(fault, run()).start({"a": 1}, repeatable=True).id == "r1"
    assert [request.body for request in lab.requests] == [{"a": 1}] * 2


@pytest.mark.parametrize("last", [429, 401])
def test_what_an_earlier_attempt_left_open_stays_open(lab, last):  # R1
    session = lab.open(reset, last, max_outage=5)
    with pytest.raises(ApiError, match="a run may have begun"):
        session.start(repeatable=True)


def test_what_was_refused_after_it_may_have_arrived_was_sent(lab):  # R1
    session = lab.open(500, max_outage=5)

    def gone() -> None:
        lab.server.__exit__()
        lab.clock.meanwhile = lambda: None

    lab.clock.meanwhile = gone
    with pytest.raises(TransportError, match="a run may have begun") as caught:
        session.start(repeatable=True)
    assert caught.value.sent is True


@pytest.mark.parametrize(
    ("method", "again"),
    [
        ("GET", True),
        ("PUT", True),
        ("DELETE", True),
        ("HEAD", True),
        ("POST", False),
        ("PATCH", False),
    ],
)
def test_a_request_is_tried_again_where_its_method_is_idempotent(lab, method, again):
    session = lab.open(502, answer(None))
    if again:
        session.request(method, "/a")
    else:
        with pytest.raises(ApiError):
            session.request(method, "/a")
    assert len(lab.requests) == 1 + again


# ---- A sleep that ends what waits


def test_a_sleep_that_returns_true_ends_a_direct_call_with_its_fault(lab):
    with pytest.raises(ApiError) as caught:
        lab.open(502, sleep=lambda seconds: True).poll("r1")
    assert caught.value.http_status == 502 and len(lab.requests) == 1


def test_the_first_attempt_of_a_direct_call_is_always_made(lab):
    assert lab.open(DONE, sleep=lambda seconds: True).poll("r1").ok


def test_a_sleep_that_returns_early_is_slept_again(lab):
    def short(seconds: float) -> None:
        lab.clock.sleep(min(seconds, 0.3))

    session = lab.open(answer(None, 503, {"Retry-After": "1"}), DONE, sleep=short)
    session.poll("r1")
    assert lab.naps == [0.3, 0.3, 0.3, pytest.approx(0.1)]


# ---- Strange answers


STRANGE = {
    "deep": b"[" * 100_000,
    "5,000 digits": b'{"id": "r1", "status": "done", "n": ' + b"9" * 5000 + b"}",
    "truncated": b'{"id": "r1", "status": "do',
    "a list": b"[1]",
    "a text": b'"done"',
    "gzip that is none": b"\x1f\x8bgarbage",
}


@pytest.mark.parametrize("body", STRANGE.values(), ids=STRANGE)
def test_a_strange_success_answer_is_a_bad_response(lab, body):
    if sys.version_info < (3, 9, 14) and b"9" * 99 in body:
        pytest.skip("this Python reads numbers of any length")
    headers = {"Content-Encoding": "gzip"} if body[:1] == b"\x1f" else {}
    with pytest.raises(BadResponse, match="HTTP 200, but the answer") as caught:
        lab.open(answer(body, headers=headers), max_outage=0).poll("r1")
    assert caught.value.http_status == 200 and caught.value.__cause__ is None


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"3e8\r\n" + b" " * 1000 + b"\r\n",
)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"hello\r\n\r\n"], id="no HTTP"),
        pytest.param([b""], id="nothing"),
        pytest.param([b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 10_000, b"\r\n"], id="10,000 headers"),
        pytest.param([b"HTTP/1.1 200 OK\r\nA: ", b"b" * 2**17, b"\r\n\r\n"], id="a long header"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"], id="cut off"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"], id="a broken chunk"
        ),
        pytest.param([*CHUNKED[:1], b"-5\r\nabcde\r\n0\r\n\r\n"], id="a chunk of -5 bytes"),
        pytest.param([b"HTTP/1.1 103 Early Hints\r\n\r\n"], id="an interim answer alone"),
    ],
)
def test_an_answer_that_is_none_is_a_transport_error(lab, pieces):
    with pytest.raises(TransportError, match=r"no answer \(.+\); try again later") as caught:
        lab.open(wire(*pieces), max_outage=0).poll("r1")
    assert caught.value.sent and caught.value.transient and caught.value.__cause__


def test_a_byte_that_is_no_utf_8_is_replaced(lab):  # R11
    body = b'\xef\xbb\xbf{"id": "r1", "status": "running", "log": "caf\xc3"}'
    assert lab.open(answer(body)).poll("r1").raw["log"] == "caf\ufffd"


def test_a_gzipped_answer_is_unpacked(lab):
    body = gzip.compress(json.dumps({**DONE, "pad": "x" * 100_000}).encode())
    session = lab.open(answer(body, headers={"Content-Encoding": "gzip"}))
    assert session.poll("r1").ok and session.poll("r1").ok
    assert {request.connection for request in lab.requests} == {1}


@pytest.mark.parametrize(
    "too_large",
    [
        pytest.param(answer(b" " * 2001), id="a byte too many"),
        pytest.param(answer(b"x" * 2001, 500), id="an error"),
        pytest.param(wire(CHUNKED[0], *[CHUNKED[1]] * 99), id="chunked"),
        pytest.param(
            wire(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n", b" " * 2**20), id="1 GiB"
        ),
        pytest.param(
            answer(gzip.compress(b" " * 10**8), headers={"Content-Encoding": "gzip"}),
            id="gzip bomb",
        ),
    ],
)
def test_an_answer_over_max_body_is_final(lab, too_large):  # R28
    with pytest.raises(BadResponse, match="max_body, 2000 bytes; raise max_body") as caught:
        lab.open(too_large, max_body=2000).poll("r1")
    assert not caught.value.transient and len(lab.requests) == 1


def test_an_answer_of_exactly_max_body_is_read(lab):
    body = json.dumps(DONE).encode()
    assert lab.open(answer(body), max_body=len(body)).poll("r1").ok


def test_an_error_page_of_16_mib_in_one_line_is_only_looked_at(lab):
    session = lab.open(answer(b"<p>" * 5_000_000, 500), max_outage=0)
    with pytest.raises(ApiError) as caught:
        session.poll("r1")
    assert len(str(caught.value)) < 400 and len(caught.value.body) == 500


@pytest.mark.parametrize("body", [b"{}", b"", b'"' + b"x" * 70_000 + b'"'])
@pytest.mark.parametrize("status", [b"200 OK", b"204 No Content", b"103 Early Hints"])
def test_nothing_of_one_answer_is_taken_for_the_next(lab, status, body):
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    second = b"HTTP/1.1 200 OK\r\n" + length + body
    first = b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}"
    session = lab.open(wire(first + second, close=False), answer([7]), max_outage=0)
    with contextlib.suppress(TransportError):
        session.request("GET", "/a")
    assert session.request("GET", "/b") == [7]


def test_a_connection_that_the_server_closed_is_replaced(lab):
    session = lab.open(wire(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), DONE)
    session.request("GET", "/a")
    time.sleep(0.05)  # for the end of the connection to arrive
    assert session.start().ok and len({request.connection for request in lab.requests}) == 2


@pytest.mark.parametrize("way", ["plain", "tls", "tunnel"])
def test_a_connection_that_has_been_idle_for_long_is_not_used(lab, monkeypatch, way):
    monkeypatch.setattr(runpoll, "_IDLE_LIMIT", 0.05)  # instead of 15 s
    options: dict[str, Any] = {"ssl_context": lab.trusting()} if way != "plain" else {}
    if way == "tunnel":
        options["proxy"] = lab.enter(Proxy()).url
    session = lab.open(run(), tls=way != "plain", **options)
    session.poll("r1")
    time.sleep(0.1)
    session.poll("r1")
    assert [request.connection for request in lab.requests] == [1, 2]


# ---- How long an attempt may take


HEAD = b"HTTP/1.1 200 OK\r\n"
SLOW = {
    "hangs": hang,
    "drips headers": wire(HEAD, b"A: b\r\n", every=0.02, repeat=True),
    "drips a body": wire(HEAD + b"Content-Length: 9999\r\n\r\n", *[b" "] * 9999, every=0.02),
    "drips chunks": wire(CHUNKED[0], *[CHUNKED[1]] * 9999, every=0.02),
    "continues for ever": wire(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.001, repeat=True),
}


@pytest.mark.parametrize("way", ["plain", "tls", "proxy", "tunnel"])
@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW)
def test_the_request_timeout_bounds_one_attempt_however_it_drips(lab, way, slow):
    tls = way in ("tls", "tunnel")
    options: dict[str, Any] = {"request_timeout": 0.2, "max_outage": 0}
    if tls:
        options["ssl_context"] = lab.trusting()
    if way in ("proxy", "tunnel"):
        options["proxy"] = lab.enter(Proxy()).url
    session = lab.open(slow, tls=tls, **options)
    begun = time.monotonic()
    with pytest.raises(TransportError, match=r"no answer within 0\.2 s"):
        session.poll("r1")
    assert 0.19 < time.monotonic() - begun < 1.2


def test_a_tls_handshake_that_hangs_has_sent_nothing(lab):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        session = lab.session(base_url=url, request_timeout=0.2, max_outage=0)
        with pytest.raises(TransportError, match=r"no connection within 0\.1 s.*no run") as caught:
            session.start(request_timeout=9)
    assert caught.value.sent is False


def test_what_an_answer_left_of_its_time_is_no_limit_for_the_next_request(lab):
    late = wire(HEAD + b"Content-Length: 2\r\n\r\n", b"", b"{}", every=0.1, close=False)
    session = lab.open(late, answer([7]), request_timeout=0.25)
    session.request("GET", "/a")
    assert session.request("PUT", "/b", "x" * 2**22) == [7]


def test_sending_a_body_has_the_time_of_the_attempt_not_that_of_connecting(lab):
    session = lab.open(run(), request_timeout=0.2)
    lab.server.reads_after = 0.3
    assert session.start("x" * 2**24, request_timeout=30).id == "r1"


# ---- Proxies and TLS


class Proxy(Server):
    """An HTTP proxy: it forwards plain requests, and tunnels by CONNECT."""

    def respond(self, request: Request) -> Answer:
        self.requests.append(request)
        return self.tunnel if request.method == "CONNECT" else self.forward

    def tunnel(self, handler: _Handler) -> None:
        host, port = handler.path.split(":")
        handler.send_response(200)
        handler.end_headers()
        self.relay(handler, socket.create_connection((host, int(port))))

    def forward(self, handler: _Handler) -> None:
        parts = urlsplit(handler.path)
        onward = socket.create_connection((parts.hostname or "", parts.port or 80))
        lines = [
            f"{handler.command} {parts.path} HTTP/1.1",
            *map(": ".join, handler.headers.items()),
        ]
        onward.sendall("\r\n".join([*lines, "", ""]).encode())
        self.relay(handler, onward)

    def relay(self, handler: _Handler, onward: socket.socket) -> None:
        handler.close_connection = True
        ends = [handler.connection, onward]
        with onward, contextlib.suppress(OSError):
            while not self.closing.is_set():
                for end in select.select(ends, [], [], 0.05)[0]:
                    piece = end.recv(2**16)
                    if not piece:
                        return
                    ends[end is handler.connection].sendall(piece)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_proxy_that_is_given_is_used(lab, tls):
    proxy = lab.enter(Proxy())
    url = proxy.url.replace("//", "//user:p%40ss@")
    session = lab.open(DONE, tls=tls, proxy=url, ssl_context=lab.trusting() if tls else None)
    assert session.poll("r1").ok and session.poll("r1").ok
    expected = f"CONNECT localhost:{lab.server.port}" if tls else f"GET {lab.server.url}/jobs/r1"
    first = proxy.requests[0]
    assert f"{first.method} {first.path}" == expected
    assert first.headers["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"
    assert {request.connection for request in proxy.requests} == {1}


@pytest.mark.parametrize(
    ("base_url", "asked"),
    [
        ("http://api.test", "GET http://api.test/jobs/r1"),
        ("https://api.test", "CONNECT api.test:443"),
    ],
)
def test_a_proxy_of_the_environment_is_used(lab, monkeypatch, base_url, asked):
    lab.server = proxy = lab.enter(Server(400))
    monkeypatch.setenv(base_url.partition(":")[0] + "_proxy", proxy.url[len("http://") :])
    with pytest.raises(runpoll.RunpollError):
        lab.session(base_url=base_url, allow_http=True, max_outage=0).poll("r1")
    assert lab.asked == [asked]


@pytest.mark.parametrize("proxy", [None, ""])
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
    proxy = lab.enter(Server(403))
    session = lab.session(base_url="https://api.test", proxy=proxy.url, max_outage=1)
    with pytest.raises(TransportError, match=r"403.*no run has begun") as caught:
        session.start()
    assert caught.value.sent is False and len(proxy.requests) > 1


def test_a_private_authority_is_trusted_by_an_ssl_context(lab):
    session = lab.open(DONE, tls=True, ssl_context=lab.trusting())
    assert session.poll("r1").ok and session.poll("r1").ok
    assert {request.connection for request in lab.requests} == {1}


def test_a_certificate_that_is_not_trusted_is_final_and_nothing_was_sent(lab):
    with pytest.raises(TransportError, match=r"not trusted .*ssl_context.*no run") as caught:
        lab.open(DONE, tls=True).start()
    assert not caught.value.transient and not caught.value.sent and not lab.requests


# ---- The key goes to the API's own origin and nowhere else


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_says_where_to(lab, status):
    elsewhere = lab.enter(Server(DONE))
    location = {"Location": f"{elsewhere.url}/login?token=secret"}
    with pytest.raises(ApiError, match=f"to {elsewhere.url}/login; redirects are not") as caught:
        lab.open(answer(None, status, location)).poll("r1")
    assert not elsewhere.requests and "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["api.test", "127.0.0.1.evil.test", "10.0.0.1", "[fe80::1]"])
def test_a_key_over_plain_http_to_another_machine_is_refused(host):
    with pytest.raises(ValueError, match="plain http"):
        Session(ORDINARY, KEY, base_url=f"http://{host}")
    Session(ORDINARY, KEY, base_url=f"http://{host}", allow_http=True)
    Session(ORDINARY, base_url=f"http://{host}")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_a_key_over_plain_http_to_this_machine_is_sent(host):
    Session(ORDINARY, KEY, base_url=f"http://{host}:8080")
    with pytest.raises(ValueError, match="plain http"):
        Session(ORDINARY, KEY, base_url=f"http://{host}:8080", proxy="http://proxy.test:3128")


ECHOES = {
    "error": answer({"error": {"message": f"bad key {KEY}", "code": KEY, "details": KEY}}, 400),
    "text": answer(f"bad key {KEY}".encode(), 400),
    "no state": answer({"error": f"bad key {KEY}"}),
    "HTML": answer(f"<p>{KEY}".encode()),
    "header": answer(None, 500, {"X-Request-Id": KEY}),
    "location": answer(None, 302, {"Location": f"/login/{KEY}"}),
    "status line": wire(f"HELLO {KEY}\r\n\r\n".encode()),
    "reason": wire(f"HTTP/1.1 400 {KEY}\r\nContent-Length: 0\r\n\r\n".encode()),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_a_key_that_the_api_sends_back_is_in_no_error_and_no_log(lab, caplog, echo):
    caplog.set_level(logging.DEBUG, "runpoll")
    session = lab.open(echo, max_outage=1)
    with pytest.raises(runpoll.RunpollError) as caught:
        session.poll("r1")
    error = caught.value
    shown = "".join(traceback.format_exception(type(error), error, None))
    records = "".join(record.getMessage() for record in caplog.records if record.name == "runpoll")
    assert KEY not in shown + records + repr(vars(error)) + repr(session)
    assert "[key]" in shown + repr(vars(error))


def test_a_key_that_is_escaped_in_json_is_shown_by_no_error_info(lab):
    session = lab.open(answer(rb'{"error": "bad key abc\/def\/ghi=="}', 400), key="abc/def/ghi==")
    with pytest.raises(ApiError) as caught:
        session.poll("r1")
    assert caught.value.error.message == "bad key [key]"


def test_a_key_of_seven_characters_may_be_an_ordinary_word(lab):
    with pytest.raises(ApiError, match="running out"):
        lab.open(answer({"error": "running out"}, 400), key="running").poll("r1")


def test_what_an_override_raises_is_the_cause_unless_it_shows_the_key(lab):
    class Failing(Api):
        def read_state(self, body: Any, *_: Any, **__: Any) -> RunState:
            raise KeyError(body)

    api = Failing(base_url="https://api.example.com", status="/jobs/{run_id}")
    causes = []
    for said in ("odd", KEY):
        with pytest.raises(BadResponse) as caught:
            lab.open(answer(said), api=api, max_outage=0).poll("r1")
        causes.append(type(caught.value.__cause__))
    assert causes == [KeyError, type(None)]


@pytest.mark.parametrize(
    "fault", [OSError, ValueError, KeyError, runpoll.BadResponse, KeyboardInterrupt]
)
@pytest.mark.parametrize("call", ["poll", "start", "cancel"])
def test_what_a_callable_key_raises_comes_out_unchanged(lab, call, fault):
    raised = fault("no key")

    def ask() -> str:
        raise raised

    session = lab.open(run(), key=ask)
    with pytest.raises(fault) as caught:
        getattr(session, call)(*[] if call == "start" else ["r1"])
    assert caught.value is raised and not lab.requests


# ---- Errors


ERRORS = [getattr(runpoll, name) for name in runpoll.__all__ if name.endswith("Error")] + [
    runpoll.BadResponse,
    runpoll.PollTimeout,
    runpoll.RunFailed,
    runpoll.RunCancelled,
    runpoll.RunNotDone,
]
ATTRIBUTES = {
    "TransportError": ["sent"],
    "ApiError": ["http_status", "error", "body", "request_id", "retry_after"],
    "BadResponse": ["http_status", "body"],
    "BatchError": ["errors"],
    "PollTimeout": ["state"],
    "RunFailed": ["state"],
    "RunCancelled": ["state"],
    "RunNotDone": ["state"],
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_can_be_made_with_its_text_alone_and_pickles(kind):
    error = kind("a text")
    for name in ["params", "transient", *ATTRIBUTES.get(kind.__name__, [])]:
        getattr(error, name)
    error.params = {"run_id": "r1"}
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(other), str(other), vars(other)) == (kind, "a text", vars(error))
    assert isinstance(error, runpoll.RunpollError)


def test_a_poll_timeout_is_a_timeout_error():
    assert issubclass(PollTimeout, TimeoutError)


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


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (401, "check the API key"),
        (404, "check the id, the base_url and whose key it is"),
        (429, "ask less often"),
        (500, "try again later"),
        (501, "unchanged it will fail again"),
        (answer(None, 403, {"Retry-After": "9"}), "ask less often, in 9 s as it says"),
        (answer(None, 503, {"Retry-After": "1800"}), "in 1800 s as it says"),
        (answer(None, 400), "HTTP 400: Bad Request"),
        (answer(b"\n <html>\x1b[31m\nx", 400), r"HTTP 400: Bad Request <html> \[31m;"),
        (answer(b"<html>"), "check the base_url and the Api"),
    ],
)
def test_a_text_says_what_to_do(lab, fault, text):
    with pytest.raises(runpoll.RunpollError, match=text):
        lab.open(fault, max_outage=0).poll("r1")


def test_the_text_of_another_call_has_its_path_and_no_query(lab):
    with pytest.raises(ApiError, match="^POST /a: HTTP 400") as caught:
        lab.open(400).request("POST", "/a?token=secret")
    assert caught.value.params is None


# ---- Servers that nobody here wrote


def test_a_status_file_of_the_standard_librarys_file_server_is_followed(lab, tmp_path):
    (tmp_path / "r1.json").write_text(json.dumps(DONE))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with served(http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet(handler))) as url:
        api = Api(base_url=url, status="/{run_id}.json")
        assert wait(lab.session(api, None), "r1").result() == {"total": 7}
        with pytest.raises(ApiError, match="HTTP 404"):
            lab.session(api, None).poll("r2")


def test_an_application_of_wsgiref_is_driven(lab):
    states = [run("queued"), run(), DONE]

    def application(environ: Any, start_response: Any) -> list[bytes]:
        begins = environ["REQUEST_METHOD"] == "POST"
        start_response("202 Accepted" if begins else "200 OK", [("Content-Type", "text/plain")])
        return [json.dumps(states.pop(0)).encode()]

    server = wsgiref.simple_server.make_server("127.0.0.1", 0, application, handler_class=QuietWSGI)
    with served(server) as url:
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
    begun = dataclasses.replace(session.start(), polls=7, faults=2, elapsed=9.0, eta=1.0)
    states = list(iter_status(session, begun, interval=5))
    assert [(state.polls, state.elapsed, state.eta) for state in states] == [
        (0, 0.0, None),
        (1, 5.0, None),
    ]
    assert states[0].faults == 0 and len(lab.requests) == 2


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
    assert session.poll("r1") and {request.connection for request in lab.requests} == {1}


def test_the_connection_is_kept_and_after_a_fault_there_is_another(lab):
    session = lab.open(run(), 502, run(), reset, run(), DONE)
    wait(session, "r1")
    assert [request.connection for request in lab.requests] == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("call", [iter_status, wait])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"interval": -1}, ValueError),
        ({"interval": math.nan}, ValueError),
        ({"interval": "1"}, TypeError),
        ({"interval": None}, TypeError),
        ({"timeout": math.nan}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"session": None}, TypeError),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(lab, arguments, error, call):
    with pytest.raises(error):
        call(**{"session": lab.open(run()), "run": "r1", **arguments})
    assert not lab.requests


# ---- Pacing


def test_the_default_interval_grows_from_one_second_to_twelve(lab):
    session = lab.open(*[run()] * 14, DONE)
    wait(session, "r1", timeout=None)
    plain = [min(1.3**k, 12) for k in range(14)]
    assert lab.naps == pytest.approx(plain, rel=0.11) and max(lab.naps) <= 12
    assert lab.naps != pytest.approx(plain, rel=0.001)


@pytest.mark.parametrize("interval", [2, 2.0, lambda state: 2])
def test_an_interval_is_a_number_or_a_callable_of_the_state(lab, interval):
    wait(lab.open(run(), run(), DONE), "r1", interval=interval)
    assert lab.naps == [2, 2]


@pytest.mark.parametrize("wrong", [-1, math.nan])
def test_a_callable_interval_that_makes_no_sense_is_refused(lab, wrong):
    states = iter_status(lab.open(run()), "r1", interval=lambda state: wrong)
    assert next(states).status == "running"
    with pytest.raises(ValueError, match="interval"):
        next(states)


def test_a_callable_interval_is_never_asked_about_the_end(lab):
    table = {"running": 3}
    wait(lab.open(run(), DONE), "r1", interval=lambda state: table[state.status])
    assert lab.naps == [3]


@pytest.mark.parametrize(
    ("options", "state", "seconds"),
    [
        ({}, {"polls": 0}, 1),
        ({}, {"polls": 1}, 1),
        ({}, {"polls": 3}, 1.69),
        ({}, {"polls": 10_000}, 12),
        ({"initial": 5, "factor": 2, "maximum": 30}, {"polls": 3}, 20),
        ({}, {"polls": 9, "eta": 5.0}, 3.5),
        ({}, {"polls": 9, "eta": 0.1}, 1),
        ({}, {"polls": 9, "eta": 1000.0}, 1.3**8),
        ({"pace": None}, {"polls": 9, "eta": 5.0}, 1.3**8),
        ({"initial": 5}, {"polls": 1, "eta": 1.0}, 5),
        ({}, {"polls": 9, "phase": Phase.PAUSED}, 30),
        ({"paused": 7}, {"polls": 1, "phase": Phase.PAUSED, "eta": 1.0}, 7),
    ],
)
def test_the_backoff_is_a_function_of_the_state(options, state, seconds):
    backoff = runpoll.Backoff(jitter=0, **options)
    assert backoff(dataclasses.replace(read(), **state)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("polls", "least", "most"), [(1, 0.5, 1.5), (99, 6, 12)], ids=["first", "never above maximum"]
)
def test_the_jitter_stays_in_its_bounds(polls, least, most):
    backoff, state = runpoll.Backoff(jitter=0.5), dataclasses.replace(read(), polls=polls)
    waits = [backoff(state) for _ in range(300)]
    assert least <= min(waits) < least * 1.1 and most * 0.95 < max(waits) <= most


@pytest.mark.parametrize(
    "options",
    [{"initial": -1}, {"factor": math.nan}, {"jitter": 1.1}, {"pace": -1}, {"paused": -1}],
)
def test_a_backoff_that_cannot_work_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        runpoll.Backoff(**options)


def test_the_time_left_is_estimated_from_what_this_iteration_saw(lab):
    shares = [0.2, 0.2, 0.4, 0.7]
    session = lab.open(*[run(progress=share) for share in shares], DONE)
    stored = dataclasses.replace(read(progress=0.1), eta=0.8)
    states = list(iter_status(session, stored, interval=10))
    assert [state.eta for state in states[:3]] == [None, None, None]
    assert [state.eta for state in states[3:5]] == pytest.approx([0.6 / 0.2 * 20, 0.3 / 0.5 * 30])


def test_a_retry_after_on_a_good_answer_replaces_the_interval_once(lab):
    asked_to_wait = answer(run(), headers={"Retry-After": "7"})
    far = answer(run(), headers={"Retry-After": "3600"})
    session = lab.open(asked_to_wait, run(), asked_to_wait, run(), far, DONE)
    wait(session, session.start(), interval=2, timeout=None)
    assert lab.naps == [7, 2, 7, 2, 120]


@pytest.mark.parametrize(("body", "naps"), [(3, [2, 2]), (5, []), (60, [])])
def test_the_time_that_the_loop_body_takes_is_part_of_the_interval(lab, body, naps):
    for _ in iter_status(lab.open(run(), run(), DONE), "r1", interval=5):
        lab.clock.now += body
    assert lab.naps == naps and len(lab.requests) == 3


def test_the_real_clock_is_wired_and_a_wait_is_no_busy_loop(lab):
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return time.monotonic()

    session = lab.open(run(), DONE, sleep=time.sleep, clock=clock)
    begun = time.monotonic()
    wait(session, "r1", interval=0.05)
    assert time.monotonic() - begun >= 0.05
    assert looks < 40


# ---- A sleep that ends what waits


def test_a_sleep_that_returns_true_ends_an_iteration_without_an_exception(lab):
    stop = threading.Event()
    session = lab.open(run(), sleep=stop.wait)
    states = []
    for state in iter_status(session, "r1", interval=0):  # so that no wait is long
        states.append(state)
        if len(states) == 3:
            stop.set()
    assert len(states) == len(lab.requests) == 3
    assert list(iter_status(session, "r1")) == [] and len(lab.requests) == 3


def test_a_sleep_that_returns_true_makes_wait_a_timeout(lab):
    with pytest.raises(PollTimeout, match=r"sleep\(\) ended the wait.*last status 'running'"):
        wait(lab.open(run(), sleep=lambda seconds: seconds > 0), "r1")


def test_a_sleep_that_returns_true_while_a_fault_is_sat_out_keeps_it_as_the_cause(lab):
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(502, sleep=lambda seconds: seconds > 0), "r1")
    assert caught.value.__cause__.http_status == 502


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
def test_what_sleep_raises_comes_out_unchanged(lab, fault):
    def sleep(_: float) -> None:
        raise fault

    with pytest.raises(fault):
        wait(lab.open(run(), sleep=sleep), "r1")


# ---- Deadlines


def test_one_last_poll_is_made_just_before_the_deadline(lab):
    session = lab.open(run())
    with pytest.raises(PollTimeout):
        wait(session, "r1", interval=4, timeout=10)
    assert lab.naps == [4, 4, pytest.approx(1.9)] and len(lab.requests) == 4


def test_the_last_poll_is_given_twice_the_time_of_the_one_before(lab):
    session = lab.open(run())

    class Slow(Clock):
        def __call__(self) -> float:
            self.now += 0.25  # at each look at the clock
            return self.now

    slow = Slow()
    session = lab.session(base_url=lab.server.url, clock=slow, sleep=slow.sleep)
    with pytest.raises(PollTimeout):
        wait(session, "r1", interval=100, timeout=20)
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
    assert error.state.status == "Working" and error.__cause__ is None
    assert statuses(itertools.islice(iter_status(session, error.params), 1)) == ["Working"]


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_of_nothing_sends_no_request(lab, timeout):
    session = lab.open(run())
    with pytest.raises(PollTimeout, match="no status seen"):
        wait(session, "r1", timeout=timeout)
    states = iter_status(session, read(), timeout=timeout)
    assert next(states).status == "running"
    with pytest.raises(PollTimeout):
        next(states)
    assert not lab.requests


def test_without_a_timeout_a_run_is_followed_for_days(lab):
    assert wait(lab.open(*[run()] * 20, DONE), "r1", interval=86_400, timeout=None).ok


def test_the_clock_starts_at_the_call(lab):
    states = iter_status(lab.open(run()), "r1", timeout=10)
    lab.clock.now += 10
    with pytest.raises(PollTimeout):
        next(states)


def test_a_loop_body_that_outlasts_the_deadline_ends_in_a_timeout(lab):
    states = iter_status(lab.open(run()), "r1", timeout=10)
    next(states)
    lab.clock.now += 60
    with pytest.raises(PollTimeout):
        next(states)


ASKS_FOR_AN_HOUR = {
    "429": answer(None, 429, {"Retry-After": "3600"}),
    "503": answer(None, 503, {"Retry-After": "3600"}),
    "a good answer": answer(run(), headers={"Retry-After": "3600"}),
}


@pytest.mark.parametrize("asked", ASKS_FOR_AN_HOUR.values(), ids=ASKS_FOR_AN_HOUR)
def test_who_is_asked_to_wait_for_an_hour_times_out_at_the_deadline(lab, asked):
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(asked), "r1", timeout=20)
    assert 19.8 < lab.clock.now - 1000 <= 20
    assert len(lab.requests) == (2 if caught.value.__cause__ is None else 1)


@pytest.mark.parametrize("way", ["plain", "tunnel"])
@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW)
def test_the_deadline_ends_a_request_in_flight(lab, way, slow):
    options: dict[str, Any] = {"ssl_context": lab.trusting()} if way != "plain" else {}
    if way == "tunnel":
        options["proxy"] = lab.enter(Proxy()).url
    session = lab.open(slow, tls=way != "plain", **REAL, **options)
    begun = time.monotonic()
    with pytest.raises(PollTimeout) as caught:
        wait(session, "r1", timeout=0.3)
    assert 0.19 < time.monotonic() - begun < 1.3
    assert isinstance(caught.value.__cause__, TransportError)


def test_a_request_that_the_deadline_ends_is_a_timeout_even_where_no_outage_is_sat_out(lab):
    with pytest.raises(PollTimeout):
        wait(lab.open(hang, max_outage=0, **REAL), "r1", timeout=0.1)


def test_a_key_that_took_all_the_time_is_not_used(lab):
    def slow_key() -> str:
        lab.clock.now += 10
        return KEY

    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(run(), key=slow_key), "r1", timeout=5)
    assert "the key took all the time" in str(caught.value.__cause__) and not lab.requests


# ---- Faults in an iteration


def test_a_run_of_two_hours_survives_six_502s_in_a_row(lab, caplog):
    session = lab.open(*[run()] * 320, *[502] * 6, *[run()] * 320, DONE)
    states = list(iter_status(session, "r1", timeout=None))
    assert states[-1].ok and states[-1].elapsed > 7000
    assert [state.faults for state in states if state.faults] == [6]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 6


def test_fifty_seconds_of_refused_connections_are_sat_out(lab):
    session = lab.open(run(), DONE)
    states = iter_status(session, "r1", interval=1)
    next(states)
    server, port = lab.server, lab.server.port
    server.__exit__()

    def back_after_fifty_seconds() -> None:
        if lab.clock.now > 1050:
            lab.clock.meanwhile = lambda: None
            lab.server = lab.enter(Server(DONE, port=port))

    lab.clock.meanwhile = back_after_fifty_seconds
    assert next(states).ok


@pytest.mark.parametrize("max_outage", [0, 5, 60])
def test_an_outage_is_sat_out_for_max_outage_seconds(lab, max_outage):
    states = iter_status(lab.open(run(), 502, max_outage=max_outage), "r1", interval=1)
    next(states)
    with pytest.raises(ApiError) as caught:
        next(states)
    assert caught.value.http_status == 502
    assert lab.clock.now - 1001 == pytest.approx(max_outage)


def test_a_good_answer_ends_an_outage(lab):
    plan = [*[502] * 5, run()] * 9
    assert wait(lab.open(*plan, DONE, max_outage=20), "r1", timeout=None).ok


@pytest.mark.parametrize(
    "plan",
    [
        [*[429] * 40],
        [502, *[answer(None, 403, {"Retry-After": "90"})] * 3, 502],
        [*[answer(None, 429, {"Retry-After": "500"})] * 3],
    ],
)
def test_a_rate_limit_only_delays_and_uses_up_no_max_outage(lab, plan):
    assert wait(lab.open(*plan, DONE), "r1", timeout=None).ok
    assert max(lab.naps) <= 120


def test_a_rate_limit_delays_at_a_max_outage_of_0_too(lab):
    assert wait(lab.open(429, 429, DONE, max_outage=0), "r1").ok


def test_a_run_just_started_may_be_unknown_for_ten_seconds(lab):
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


@pytest.mark.parametrize("handle", ["r1", {"run_id": "r1"}])
def test_a_handle_that_is_unknown_is_an_error_at_once(lab, handle):
    with pytest.raises(ApiError, match="404"):
        wait(lab.open(404), handle)
    assert len(lab.requests) == 1


# ---- Many runs at once


class Fleet(Server):
    """Each run has a plan of its own: what its status requests are answered, the last for ever."""

    def __init__(self, plans: Mapping[str, list[Any]], latency: float = 0.0) -> None:
        super().__init__()
        self.plans = {name: list(plan) for name, plan in plans.items()}
        self.latency = latency
        self.busy = self.most_busy = 0

    def respond(self, request: Request) -> Answer:
        name = request.path.rpartition("/")[2]
        with self._lock:
            self.requests.append(request)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            plan = self.plans[name]
            item = plan.pop(0) if len(plan) > 1 else plan[0]
        self.closing.wait(self.latency)
        with self._lock:
            self.busy -= 1
        if isinstance(item, str):
            item = {"id": name, "status": item}
        return item if callable(item) else answer({}, item) if type(item) is int else answer(item)


def fleet(
    lab: Lab, plans: Mapping[str, list[Any]], latency: float = 0.0, **options: Any
) -> Session:
    lab.server = lab.enter(Fleet(plans, latency))
    return lab.session(base_url=lab.server.url, **options)


def errors_of(states: Iterator[RunState]) -> list[runpoll.RunpollError]:
    with pytest.raises(BatchError) as caught:
        for _ in states:
            pass
    return list(caught.value.errors)


def test_the_states_of_many_runs_are_yielded_as_they_arrive(lab):
    session = fleet(lab, {"a": ["running", "done"], "b": ["done"], "c": ["running"] * 3 + ["done"]})
    states = list(iter_batch(session, ["a", "b", "c"], timeout=60, interval=5))
    seen = sorted((state.id, state.status, state.polls) for state in states)
    assert seen == sorted(
        [("a", "running", 1), ("a", "done", 2), ("b", "done", 1), ("c", "done", 4)]
        + [("c", "running", polls) for polls in (1, 2, 3)]
    )
    assert lab.naps == [5, 5, 5]


def test_a_rate_limit_of_one_run_uses_up_no_outage_of_another(lab):
    limited = answer(None, 429, {"Retry-After": "90"})
    session = fleet(lab, {"a": [502, 502, "done"], "b": [limited, "done"]})
    ended = [state.id for state in iter_batch(session, ["a", "b"], timeout=600) if state.done]
    assert sorted(ended) == ["a", "b"]


def test_runs_are_polled_while_the_states_that_were_handed_in_are_looked_at(lab):
    session = fleet(lab, {"a": ["running", "done"], "b": ["done"], "r1": ["done"]})
    states = iter_batch(session, [read(), "a", "b"], timeout=60)
    assert next(states).id == "r1"
    until(lambda: len(lab.requests) == 2)


def workers_left() -> list[threading.Thread]:
    """The threads that are no server's: runpoll's alone are daemons."""
    return [thread for thread in threading.enumerate() if thread.daemon]


def test_an_error_that_read_state_raises_itself_stops_no_other_run(lab):
    class Own(Api):
        def read_state(self, body: Any, *arguments: Any, **named: Any) -> RunState:
            if body["id"] == "a":
                raise runpoll.RunpollError("of another tenant")
            return super().read_state(body, *arguments, **named)

    session = fleet(
        lab, {"a": ["done"], "b": ["running", "done"]}, api=Own(ORDINARY.base_url, ORDINARY.status)
    )
    states = iter_batch(session, ["a", "b"], timeout=60)
    assert [str(error) for error in errors_of(states)] == ["of another tenant"]
    assert lab.asked.count("GET /jobs/b") == 2


def test_a_batch_that_has_ended_leaves_no_thread(lab):
    session = fleet(lab, {name: ["done"] for name in "abcdefgh"})
    assert len(list(iter_batch(session, list("abcdefgh"), timeout=60))) == 8
    assert not workers_left()


def test_a_batch_of_none_ends_at_once(lab):
    assert list(iter_batch(lab.session(), iter([]), timeout=1)) == [] and not lab.naps


def test_a_run_given_twice_is_followed_once_and_the_runs_are_drained_at_the_call(lab):
    session = fleet(lab, {"a": ["done"], "b": ["done"]})
    runs = iter(["a", {"run_id": "a"}, "b"])
    states = iter_batch(session, runs, timeout=60)
    assert next(runs, None) is None and len(list(states)) == 2


def test_states_that_are_handed_in_are_yielded_first_and_waited_after(lab):
    session = fleet(lab, {"a": ["done"]})
    given = ORDINARY.read_state({"id": "a", "status": "queued"})
    ended = ORDINARY.read_state({"id": "b", "status": "done"})
    states = list(iter_batch(session, [given, ended], timeout=60, interval=9))
    assert [(state.id, state.polls) for state in states] == [("a", 0), ("b", 0), ("a", 1)]
    assert lab.naps == [9] and lab.asked == ["GET /jobs/a"]


@pytest.mark.parametrize(
    ("runs", "options", "error"),
    [
        ("r1", {}, TypeError),
        ({"run_id": "r1"}, {}, TypeError),
        (None, {}, TypeError),
        (["a", ""], {}, ValueError),
        ([], {"interval": -1}, ValueError),
        ([], {"timeout": math.nan}, ValueError),
        ([], {"workers": 0}, ValueError),
        ([], {"workers": 1.5}, TypeError),
    ],
)
def test_wrong_arguments_of_a_batch_are_refused_at_the_call(lab, runs, options, error):
    with pytest.raises(error):
        iter_batch(lab.session(), runs, **{"timeout": 1, **options})


def test_workers_bound_the_requests_in_flight_the_threads_and_the_connections(lab):
    names = [f"r{number}" for number in range(40)]
    session = fleet(lab, {name: ["running", "done"] for name in names}, 0.01)
    before = threading.active_count()
    most = 0
    for _ in iter_batch(session, names, timeout=60, workers=4):
        most = max(most, threading.active_count())
    assert lab.server.most_busy <= 4 and len({request.connection for request in lab.requests}) <= 4
    # Beside the workers there may be a thread of the server's for each connection.
    assert most <= before + 4 + 4


def test_a_thousand_runs_end_on_eight_workers(lab):
    names = [f"r{number}" for number in range(1000)]
    session = fleet(lab, {name: ["done"] for name in names})
    ended = [state.id for state in iter_batch(session, names, timeout=None) if state.done]
    assert sorted(ended) == sorted(names) and len(lab.requests) == 1000
    assert len({request.connection for request in lab.requests}) <= 8


def test_a_batch_that_waits_does_nothing(lab):
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return time.monotonic()

    session = fleet(lab, {"a": ["running", "done"]}, sleep=briefly, clock=clock)
    list(iter_batch(session, ["a"], timeout=60, interval=0.3))
    assert looks < 40


def test_the_faults_of_one_run_stop_no_other_and_are_all_raised_at_the_end(lab):
    plans = {"a": [404], "b": ["running", 502, "done"], "c": ["running"], "d": ["running", 400]}
    session = fleet(lab, plans)
    states = []
    with pytest.raises(BatchError, match="3 of 4 runs were not followed to their ends") as caught:
        for state in iter_batch(session, ["a", "b", "c", "d"], timeout=60):
            states.append(state)
    assert [state.id for state in states if state.done] == ["b"]
    errors = caught.value.errors
    assert [error.params["run_id"] for error in errors] == ["a", "c", "d"]
    assert [type(error) for error in errors] == [ApiError, PollTimeout, ApiError]
    assert errors[1].state.id == "c"
    copied = pickle.loads(pickle.dumps(caught.value))
    assert [str(error) for error in copied.errors] == [str(error) for error in errors]


def test_a_refused_key_ends_a_batch_at_once(lab):
    session = fleet(lab, {"a": [401], "b": ["running"]})
    errors = errors_of(iter_batch(session, ["a", "b"], timeout=None))
    assert [error.http_status for error in errors] == [401]


def test_a_batch_of_a_refused_key_says_that_no_run_is_followed(lab):
    session = fleet(lab, {"a": [401], "b": ["running"]})
    with pytest.raises(BatchError, match="the key was refused, and no run is followed any more"):
        list(iter_batch(session, ["a", "b"], timeout=None))


def test_a_max_body_of_infinity_is_no_limit(lab):
    assert lab.open(DONE, max_body=math.inf).poll("r1").ok


def test_a_rate_limit_holds_back_all_runs_of_a_batch(lab):
    limit = answer(None, 429, {"Retry-After": "50"})
    names = ["a", "b", "c", "d"]
    session = fleet(
        lab, {name: [limit, "done"] if name == "a" else ["running", "done"] for name in names}
    )
    when: list[float] = []
    for _ in iter_batch(session, names, timeout=None, workers=1, interval=1):
        when.append(lab.clock.now - 1000)
    assert when == pytest.approx([50, 50, 50, 50, 51, 51, 51])


def test_a_batch_times_out_run_by_run_at_its_deadline(lab):
    session = fleet(lab, {"a": ["running"], "b": ["running"]})
    errors = errors_of(iter_batch(session, ["a", "b"], timeout=30))
    assert [type(error) for error in errors] == [PollTimeout] * 2
    assert 29.8 < lab.clock.now - 1000 <= 30
    assert len(errors_of(iter_batch(session, [error.params for error in errors], timeout=0))) == 2


def test_the_deadline_of_a_batch_ends_a_request_in_flight(lab):
    session = fleet(lab, {"a": [hang], "b": ["done"]}, **REAL)
    begun = time.monotonic()
    errors = errors_of(iter_batch(session, ["a", "b"], timeout=0.3))
    assert [error.params["run_id"] for error in errors] == ["a"]
    assert 0.19 < time.monotonic() - begun < 1.3


def leave_by_break(states: Iterator[RunState]) -> None:
    for _ in states:
        break


def leave_by_an_exception(states: Iterator[RunState]) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in states:
            raise ZeroDivisionError


def leave_by_close(states: Any) -> None:
    next(states)
    states.close()


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_an_exception, leave_by_close])
def test_a_batch_that_is_left_begins_no_request_and_leaves_no_thread(lab, leave):
    names = [f"r{number}" for number in range(30)]
    session = fleet(lab, {name: ["running"] for name in names}, 0.01, **REAL)
    states = iter_batch(session, names, timeout=None, interval=0)
    leave(states)
    del states
    gc.collect()
    begun = len(lab.requests)
    until(lambda: not workers_left())
    settled = len(lab.requests)
    assert settled <= begun + 8  # those that were on their way to the server
    time.sleep(0.05)
    assert len(lab.requests) == settled


def test_a_batch_that_was_never_begun_has_no_thread_and_no_request(lab):
    session = fleet(lab, {"a": ["running"]})
    before = threading.active_count()
    states = iter_batch(session, ["a"], timeout=1)
    assert threading.active_count() == before and not lab.requests
    del states


def test_a_sleep_that_returns_true_ends_a_busy_batch(lab):
    stop = threading.Event()
    session = fleet(
        lab, {"a": ["running"], "b": ["running"]}, sleep=stop.wait, clock=time.monotonic
    )
    seen = 0
    for _ in iter_batch(session, ["a", "b"], timeout=None, interval=0):
        seen += 1
        if seen == 5:
            stop.set()
            settled = len(lab.requests)
    assert len(lab.requests) <= settled + 2 and seen <= 7


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt, runpoll.BadResponse])
def test_what_a_callable_key_raises_comes_out_of_a_batch(lab, fault):
    raised = fault("no key")

    def ask() -> str:
        raise raised

    session = fleet(lab, {"a": ["done"]}, key=ask)
    with pytest.raises(fault) as caught:
        list(iter_batch(session, ["a"], timeout=60))
    assert caught.value is raised


def test_the_interval_of_a_batch_is_asked_in_the_callers_thread(lab):
    threads = set()

    def interval(state: RunState) -> float:
        threads.add(threading.current_thread())
        return 1

    session = fleet(lab, {"a": ["running", "done"], "b": ["running", "done"]})
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
def test_ctrl_c_ends_a_batch_without_waiting_for_what_is_in_flight(lab):
    fleet(lab, {"a": [hang], "b": [hang]})
    command = [sys.executable, "-c", INTERRUPTED, lab.server.url]
    with subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE) as process:
        until(lambda: len(lab.requests) == 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0 and b"KeyboardInterrupt" in process.stderr.read()


# ---- The command line


def command(lab: Lab, *arguments: object, api: str = "") -> list[str]:
    """The arguments that follow r1 on the server of the test."""
    if not api:
        path = lab.directory / "api.json"
        fields = {"base_url": lab.server.url, "status": "/jobs/{run_id}"}
        path.write_text(json.dumps({**fields, "phases": {"stopped": "cancelled"}}))
        api = str(path)
    return ["r1", "--api", api, *map(str, arguments)]


@pytest.fixture
def shell(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    """Runs main(): its exit code, the lines of its output and of its complaints."""
    monkeypatch.setenv("RUNPOLL_API_KEY", KEY)

    def call(*arguments: object, answers: Iterable[Any] = (DONE,)) -> Any:
        lab.server = lab.enter(Server(*answers))
        code = runpoll.main(command(lab, "--interval", 0.01, *arguments))
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return call


@pytest.mark.parametrize(
    ("last", "code", "complaint"),
    [
        (DONE, 0, []),
        (run("failed", error="no text"), 1, ["runpoll: run r1 failed: no text"]),
        (run("stopped"), 3, ["runpoll: run r1 was cancelled"]),
    ],
)
def test_the_exit_code_says_how_the_run_ended(shell, last, code, complaint):
    assert shell(answers=[run(), last])[::2] == (code, complaint)


def test_in_a_pipe_each_state_that_differs_is_one_plain_line(shell):
    plan = [run("queued"), run("queued"), run(progress=0.25), run(progress=0.25), DONE]
    assert shell(answers=plan)[1] == [
        "pending   queued",
        "running    25% running",
        "succeeded succeeded",
    ]


def test_with_json_each_state_is_a_line_of_valid_json_with_every_field(shell):  # R12
    plan = [answer(b'{"id": "r1", "status": "running", "loss": NaN, "created_at": 5}'), DONE]
    lines = shell("--json", answers=plan)[1]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    first, last = [json.loads(line, parse_constant=refuse) for line in lines]
    assert first.keys() == {field.name for field in dataclasses.fields(RunState)}
    assert first["raw"]["loss"] is None and first["created_at"] == "1970-01-01T00:00:05+00:00"
    assert last["phase"] == "succeeded" and last["output"] == {"total": 7}


def test_a_timeout_is_124_and_says_that_the_same_command_follows_the_run_again(shell):
    code, _, complaints = shell("--timeout", 0.2, answers=[run()])
    assert code == 124 and complaints[-1].startswith("runpoll: run r1 (GET /jobs/r1): not ended")
    assert complaints[-1].endswith("the run goes on, and the same command follows it again")


def test_a_timeout_of_0_is_no_limit(shell):
    assert shell("--timeout", 0, answers=[run(), DONE])[0] == 0


def test_an_error_of_the_api_is_5_and_a_missing_key_is_named(shell, monkeypatch):
    assert shell(answers=[401])[::2] == (
        5,
        [
            "runpoll: run r1 (GET /jobs/r1): HTTP 401: no. 401; check the API key, "
            "and the Api's auth_header and auth_scheme"
        ],
    )
    monkeypatch.delenv("RUNPOLL_API_KEY")
    assert shell(answers=[401])[2][0].endswith("(RUNPOLL_API_KEY is not set)")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
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
    ],
)
def test_wrong_usage_is_2_and_says_what_to_do_without_a_value(shell, arguments, complaint):
    code, lines, complaints = shell(*arguments)
    assert code == 2 and not lines and complaint in " ".join(complaints)
    assert "secret" not in " ".join(complaints)


def test_a_param_beside_a_status_url_is_wrong_usage(capsys):
    assert runpoll.main(["--param", "b=c", "https://a.test/runs/r1"]) == 2
    assert "--param goes with an id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory) is rapidfolio, doclo, dibby, onepin or a JSON file"),
        ("{", "Expecting property name"),
        ("[1]", "must be a mapping"),
        ('{"base_url": "https://a"}', "status"),
        ('{"base_url": "https://a", "status": "/x"}', "has to name {run_id}"),
        ('{"base_url": "https://a", "status": "/{run_id}", "colour": 1}', "colour"),
        ('{"base_url": 5, "status": "/{run_id}"}', "api.json"),
        ('{"base_url": "https://a", "status": "/{run_id}", "fields": 5}', "api.json"),
    ],
)
def test_a_file_that_describes_no_api_is_wrong_usage(tmp_path, capsys, content, complaint):
    path = tmp_path / "api.json"
    if content:
        path.write_text(content)
    assert runpoll.main(["r1", "--api", str(path)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_built_in_api_takes_other_parameters_headers_and_a_status_url(lab, simulator, capsys):
    session = lab.session(simulator.api("onepin"))
    ids = session.start(None, **STARTS["onepin"][1]).params
    base = ["--api", "onepin", "--base-url", f"{simulator.url}/onepin", "--interval", "0"]
    given = ["--param", f"workflow_id={ids['workflow_id']}", "--header", "X-Workspace-Id=ws_1"]
    os.environ["RUNPOLL_API_KEY"] = KEY
    try:
        assert runpoll.main([ids["run_id"], *base, *given]) == 0
        url = "https://api.onepin.ai/api/v1/workflows/{workflow_id}/runs/{run_id}/status"
        assert runpoll.main([url.format(**ids), *base]) == 0
    finally:
        del os.environ["RUNPOLL_API_KEY"]
    assert simulator.requests[1].headers["X-Workspace-Id"] == "ws_1"
    assert "succeeded 100% completed" in capsys.readouterr().out


def test_verbose_logs_each_poll_and_never_the_key(shell):
    code, _, complaints = shell("--verbose", answers=[run(), 502, DONE])
    assert code == 0 and len(complaints) == 3 and KEY not in " ".join(complaints)
    assert complaints[0] == "runpoll: run 'r1': 'running'"
    assert not logging.getLogger("runpoll").handlers


def test_help_and_version_are_0(capsys):
    assert runpoll.main(["--help"]) == 0 and runpoll.main(["--version"]) == 0
    printed = capsys.readouterr().out
    for word in ("RUNPOLL_API_KEY", "--param NAME=VALUE", "124 timed out", runpoll.__version__):
        assert word in printed


def test_importing_the_module_does_not_import_what_only_the_command_line_needs():
    code = "import sys, runpoll; print({'argparse', 'urllib.request'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def started(lab: Lab, *arguments: object, **options: Any) -> Any:
    """The command in a process of its own."""
    words = [sys.executable, str(HERE / "runpoll.py"), *command(lab, *arguments)]
    environment = {**os.environ, "RUNPOLL_API_KEY": KEY}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=environment, **{**streams, **options})


@POSIX
def test_an_interrupt_is_130_and_says_that_the_run_goes_on(lab):
    lab.server = lab.enter(Server(run()))
    with started(lab) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        said = process.stderr.read().decode()
    assert said.startswith("runpoll: interrupted; the run goes on, and the same command")
    assert "Traceback" not in said


@POSIX
@pytest.mark.parametrize("output", ["closed pipe", "full", "closed"])
def test_an_output_that_takes_no_more_ends_it_without_a_traceback(lab, output):
    lab.server = lab.enter(Server(*[run(progress=n) for n in range(9)], DONE))
    if output == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    arguments = ["--interval", 0.01]
    if output == "closed pipe":
        with started(lab, *arguments) as process:
            process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read()
        assert said == b"" and process.returncode == 130
    else:
        target = "> /dev/full" if output == "full" else ">&-"
        line = shlex.join([sys.executable, str(HERE / "runpoll.py"), *command(lab, *arguments)])
        done = subprocess.run(f"{line} {target}", shell=True, capture_output=True, timeout=20)
        assert done.returncode == (130 if output == "full" else 0)
        assert b"Traceback" not in done.stderr


@POSIX
def test_what_the_locale_lacks_is_replaced(lab):
    lab.server = lab.enter(Server(run("gr\u00f6\u00dfer"), DONE))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, str(HERE / "runpoll.py"), *command(lab, "--interval", 0)]
    done = subprocess.run(words, capture_output=True, env=environment, timeout=20)
    assert done.stdout.splitlines() == [b"unknown   gr??er", b"succeeded succeeded"]


def terminal(lab: Lab, *arguments: object, columns: int = 80) -> str:
    """What the command writes on a terminal of so many columns."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    written = b""
    with started(lab, "--interval", 0.01, *arguments, **streams) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # its end
            while piece := os.read(ours, 2**16):
                written += piece
        process.wait(10)
    os.close(ours)
    return written.decode()


@POSIX
@pytest.mark.parametrize("columns", [80, 40])
def test_on_a_terminal_one_line_that_fits_is_drawn_again_and_stays(lab, columns):
    words = ["queued", "\u4e2d" * 90, "x" * 90]
    lab.server = lab.enter(Server(*[run(word, progress=0.5) for word in words], DONE))
    written = terminal(lab, columns=columns)
    assert written.count("\n") == written.count("\r\n")
    *_, end = written.split("\r\n")
    frames = [frame.replace("\x1b[K", "") for frame in written.split("\r") if "\x1b[K" in frame]
    complaint = [frame for frame in frames if frame.startswith("runpoll:")]
    drawn = [frame for frame in frames if frame not in complaint]
    assert len(drawn) == 4 and end == "" and drawn[-1].startswith("succeeded")
    for frame in drawn:
        wide = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in frame)
        assert wide < columns
    assert drawn[0].startswith("pending   [##") and " 50% 0 s  queued" in drawn[0]


@POSIX
def test_the_line_on_a_terminal_has_the_time_left(lab):
    lab.server = lab.enter(Server(*[run(progress=n) for n in range(0, 100, 10)], DONE))
    assert re.search(r"running   \[#+ +\] +\d+% \d+ s, \d+ s left  running", terminal(lab))


@POSIX
def test_control_characters_of_the_api_do_not_reach_a_terminal(lab):
    lab.server = lab.enter(Server(run("a\x1b]0;evil\x07\x9b2Jb"), run("failed", error="\x1b[2J!")))
    written = terminal(lab).replace("\x1b[K", "")
    assert not set(written) & set("\x1b\x07\x9b") and "a ]0;evil  2Jb" in written


@POSIX
def test_on_a_terminal_a_warning_has_a_row_of_its_own(lab):
    lab.server = lab.enter(Server(run(), 502, DONE))
    rows = [row.rpartition("\r")[2].replace("\x1b[K", "") for row in terminal(lab).split("\r\n")]
    assert rows[0].startswith("runpoll: run r1") and rows[1].startswith("succeeded")


# ---- The services of the README, by bodies shaped as in their documents


@dataclass
class Service:
    """How a run of a service goes: the paths on the wire, and what its states mean."""

    start: str
    status: str
    cancel: str  # "" where there is none
    begun: Any  # the start's answer
    states: list[tuple[Any, str]]  # the last three: a good end, a bad one, a cancelled one
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    said: str = ""  # of the bad end
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # of the start's answer
    key: tuple[str, str] = ("Authorization", f"Bearer {KEY}")
    cancel_body: Any = None


def of(base: dict[str, Any], *states: tuple[dict[str, Any], str]) -> list[tuple[Any, str]]:
    """States that share most of their bodies."""
    return [({**base, **more}, phase) for more, phase in states]


def databricks(phase: str, life: str, result: str | None = None, said: str = "") -> Any:
    state = {"life_cycle_state": life, "state_message": said}
    if result:
        state["result_state"] = result
    return {"run_id": 4556, "state": state, "start_time": 1767607200000, "end_time": 0}, phase


COUNTS = {"processing": 0, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
AZURE = "/documentintelligence/documentModels/prebuilt-read"
SERVICES = {
    "REPLICATE": Service(
        "POST /v1/predictions",
        "GET /v1/predictions/gm3q",
        "POST /v1/predictions/gm3q/cancel",
        {"id": "gm3q", "status": "starting", "output": None, "error": None},
        of(
            {"id": "gm3q", "output": None, "error": None, "created_at": "2026-01-05T10:00:00.391Z"},
            ({"status": "processing"}, "running"),
            ({"status": "aborted"}, "cancelled"),
            ({"status": "succeeded", "output": ["a.png"]}, "succeeded"),
            ({"status": "failed", "error": "Out of memory"}, "failed"),
            ({"status": "canceled"}, "cancelled"),
        ),
        said="Out of memory",
    ),
    "OPENAI_BATCHES": Service(
        "POST /v1/batches",
        "GET /v1/batches/batch_1",
        "POST /v1/batches/batch_1/cancel",
        {"id": "batch_1", "object": "batch", "status": "validating", "errors": None},
        of(
            {"id": "batch_1", "request_counts": {"total": 100, "completed": 38, "failed": 2}},
            ({"status": "in_progress"}, "running"),
            ({"status": "finalizing"}, "running"),
            ({"status": "cancelling"}, "running"),
            ({"status": "expired"}, "failed"),
            ({"status": "completed", "output_file_id": "file-out"}, "succeeded"),
            (
                {
                    "status": "failed",
                    "errors": {"object": "list", "data": [{"message": "No JSON"}]},
                },
                "failed",
            ),
            ({"status": "cancelled"}, "cancelled"),
        ),
        said="No JSON",
    ),
    "OPENAI_RESPONSES": Service(
        "POST /v1/responses",
        "GET /v1/responses/resp_1",
        "POST /v1/responses/resp_1/cancel",
        {"id": "resp_1", "object": "response", "status": "queued", "output": []},
        of(
            {"id": "resp_1", "created_at": 1767607200.0, "output": [], "error": None},
            ({"status": "in_progress"}, "running"),
            ({"status": "incomplete", "incomplete_details": {"reason": "length"}}, "failed"),
            ({"status": "completed", "output": [{"type": "message"}]}, "succeeded"),
            ({"status": "failed", "error": {"code": "server_error", "message": "Broke"}}, "failed"),
            ({"status": "cancelled"}, "cancelled"),
        ),
        said="Broke",
    ),
    "ANTHROPIC": Service(
        "POST /v1/messages/batches",
        "GET /v1/messages/batches/msgbatch_1",
        "POST /v1/messages/batches/msgbatch_1/cancel",
        {"id": "msgbatch_1", "processing_status": "in_progress", "request_counts": COUNTS},
        of(
            {"id": "msgbatch_1", "request_counts": COUNTS, "results_url": None},
            ({"processing_status": "canceling"}, "running"),
            ({"processing_status": "ended", "results_url": "https://a/results"}, "succeeded"),
            ({"processing_status": "odd"}, "unknown"),  # no batch fails as a whole
            (
                {"processing_status": "ended", "request_counts": {**COUNTS, "canceled": 2}},
                "cancelled",
            ),
        ),
        key=("x-api-key", KEY),
    ),
    "GITHUB": Service(
        "POST /repos/octo/demo/actions/workflows/ci.yml/dispatches",
        "GET /repos/octo/demo/actions/runs/3043",
        "POST /repos/octo/demo/actions/runs/3043/cancel",
        {"workflow_run_id": 3043, "run_url": "https://api.github.com/repos/octo/demo/runs/3043"},
        of(
            {"id": 3043, "status": "completed", "conclusion": None, "run_number": 562},
            ({"status": "queued"}, "pending"),
            ({"status": "waiting"}, "paused"),
            ({"status": "in_progress"}, "running"),
            ({"conclusion": "action_required"}, "paused"),
            ({"conclusion": "timed_out"}, "failed"),
            ({"conclusion": "startup_failure"}, "failed"),
            ({"conclusion": "skipped"}, "cancelled"),
            ({"conclusion": "success"}, "succeeded"),
            ({"conclusion": "failure"}, "failed"),
            ({"conclusion": "cancelled"}, "cancelled"),
        ),
        {"owner": "octo", "repo": "demo", "workflow": "ci.yml"},
    ),
    "GITLAB": Service(
        "POST /api/v4/projects/team%2Fapp/pipeline",
        "GET /api/v4/projects/team%2Fapp/pipelines/61",
        "POST /api/v4/projects/team%2Fapp/pipelines/61/cancel",
        {"id": 61, "iid": 21, "status": "created", "yaml_errors": None},
        of(
            {"id": 61, "yaml_errors": None, "duration": None},
            ({"status": "waiting_for_resource"}, "pending"),
            ({"status": "preparing"}, "pending"),
            ({"status": "running"}, "running"),
            ({"status": "manual"}, "paused"),
            ({"status": "skipped"}, "cancelled"),
            ({"status": "success"}, "succeeded"),
            ({"status": "failed", "yaml_errors": "jobs:test is unknown"}, "failed"),
            ({"status": "canceled"}, "cancelled"),
        ),
        {"project": "team/app"},
        said="jobs:test is unknown",
    ),
    "APIFY": Service(
        "POST /v2/actors/acme~crawler/runs",
        "GET /v2/actor-runs/HG7M",
        "POST /v2/actor-runs/HG7M/abort",
        {"data": {"id": "HG7M", "status": "READY", "startedAt": "2026-01-05T10:00:00.000Z"}},
        [
            ({"data": {"id": "HG7M", "status": "RUNNING", "statusMessage": "Page 3"}}, "running"),
            ({"data": {"id": "HG7M", "status": "TIMING-OUT"}}, "running"),
            ({"data": {"id": "HG7M", "status": "ABORTING"}}, "running"),
            ({"data": {"id": "HG7M", "status": "TIMED-OUT"}}, "failed"),
            ({"data": {"id": "HG7M", "status": "SUCCEEDED"}}, "succeeded"),
            ({"data": {"id": "HG7M", "status": "FAILED", "statusMessage": "Gone"}}, "failed"),
            ({"data": {"id": "HG7M", "status": "ABORTED"}}, "cancelled"),
        ],
        {"actor": "acme~crawler"},
        said="Gone",
    ),
    "RUNPOD": Service(
        "POST /v2/ep123/run",
        "GET /v2/ep123/status/c80f-u1",
        "POST /v2/ep123/cancel/c80f-u1",
        {"id": "c80f-u1", "status": "IN_QUEUE"},
        of(
            {"id": "c80f-u1", "delayTime": 2624},
            ({"status": "IN_PROGRESS"}, "running"),
            ({"status": "TIMED_OUT"}, "failed"),
            ({"status": "COMPLETED", "output": {"text": "Hi"}}, "succeeded"),
            ({"status": "FAILED", "error": "The handler raised"}, "failed"),
            ({"status": "CANCELLED"}, "cancelled"),
        ),
        {"endpoint": "ep123"},
        said="The handler raised",
    ),
    "DATABRICKS": Service(
        "POST /api/2.2/jobs/run-now",
        "GET /api/2.2/jobs/runs/get?run_id=4556",
        "POST /api/2.2/jobs/runs/cancel",
        {"run_id": 4556, "number_in_job": 4556},
        [
            databricks("pending", "QUEUED"),
            databricks("pending", "BLOCKED"),
            databricks("running", "WAITING_FOR_RETRY"),
            databricks("running", "TERMINATING"),
            databricks("failed", "INTERNAL_ERROR"),
            databricks("failed", "TERMINATED", "TIMEDOUT"),
            databricks("cancelled", "SKIPPED"),
            databricks("succeeded", "TERMINATED", "SUCCESS_WITH_FAILURES"),
            databricks("succeeded", "TERMINATED", "SUCCESS"),
            databricks("failed", "TERMINATED", "FAILED", "Task load failed"),
            databricks("cancelled", "TERMINATED", "CANCELED"),
        ],
        said="Task load failed",
        cancel_body={"run_id": 4556},
    ),
    "DBT_CLOUD": Service(
        "POST /api/v2/accounts/7/jobs/1021/run/",
        "GET /api/v2/accounts/7/runs/7040/",
        "POST /api/v2/accounts/7/runs/7040/cancel/",
        {"status": {"code": 200}, "data": {"id": 7040, "status": 1, "status_message": None}},
        [
            ({"data": {"id": 7040, "status": 2, "duration": "00:02:00"}}, "pending"),
            ({"data": {"id": 7040, "status": 3}}, "running"),
            ({"data": {"id": 7040, "status": 10}}, "succeeded"),
            ({"data": {"id": 7040, "status": 20, "status_message": "A model failed"}}, "failed"),
            ({"data": {"id": 7040, "status": 30}}, "cancelled"),
        ],
        {"account": "7", "job": "1021"},
        said="A model failed",
        key=("Authorization", f"Token {KEY}"),
    ),
    "AIRFLOW": Service(
        "POST /api/v2/dags/etl/dagRuns",
        "GET /api/v2/dags/etl/dagRuns/manual__2026-01-05T10%3A00",
        "",
        {"dag_run_id": "manual__2026-01-05T10:00", "state": "queued", "queued_at": None},
        of(
            {"dag_run_id": "manual__2026-01-05T10:00", "start_date": "2026-01-05T10:00:01Z"},
            ({"state": "running"}, "running"),
            ({"state": "success"}, "succeeded"),
            ({"state": "failed"}, "failed"),
            ({"state": "odd"}, "unknown"),  # no run is cancelled
        ),
        {"dag": "etl"},
    ),
    "AZURE": Service(
        f"POST {AZURE}:analyze?api-version=2024-11-30",
        f"GET {AZURE}/analyzeResults/0d1c?api-version=2024-11-30",
        "",
        None,
        [
            ({"status": "running", "createdDateTime": "2026-01-05T10:00:00Z"}, "running"),
            ({"status": "succeeded", "analyzeResult": {"content": "Hi"}}, "succeeded"),
            ({"status": "failed", "error": {"code": "Invalid", "message": "Unreadable"}}, "failed"),
            ({"status": "canceled"}, "cancelled"),
        ],
        {"model": "prebuilt-read"},
        said="Unreadable",
        headers={"Operation-Location": f"https://example{AZURE}/analyzeResults/0d1c?api-version=2"},
        key=("Ocp-Apim-Subscription-Key", KEY),
    ),
    "ASSEMBLYAI": Service(
        "POST /v2/transcript",
        "GET /v2/transcript/9ea6",
        "",
        {"id": "9ea6", "status": "queued", "text": None},
        of(
            {"id": "9ea6", "text": None},
            ({"status": "processing"}, "running"),
            ({"status": "completed", "text": "Hello"}, "succeeded"),
            ({"status": "error", "error": "No audio"}, "failed"),
            ({"status": "odd"}, "unknown"),  # no transcript is cancelled
        ),
        said="No audio",
        key=("Authorization", KEY),
    ),
}


@pytest.fixture(scope="module")
def pasted() -> dict[str, Any]:
    """The values of the README's block of services."""
    names: dict[str, Any] = {"runpoll": runpoll}
    exec(next(block for block in readme_blocks() if "REPLICATE =" in block), names)
    return names


@pytest.mark.parametrize(("name", "service"), SERVICES.items(), ids=SERVICES)
def test_a_run_of_a_service_is_started_followed_and_cancelled(lab, pasted, name, service):
    api = pasted[name]
    working, (_, ends, _) = service.states[0][0], [body for body, _ in service.states[-3:]]
    session = lab.open(answer(service.begun, 202, service.headers), working, working, api=api)
    session = lab.session(api, base_url=lab.server.url + urlsplit(api.base_url).path)
    begun = session.start({"a": 1}, **service.params)
    assert begun.phase in (Phase.PENDING, Phase.RUNNING) and not begun.done
    assert session.poll(begun).phase == service.states[0][1]
    if service.cancel:
        lab.server.answers[:] = [working, answer({}), service.states[-1][0]]
        assert session.cancel(begun, service.cancel_body) is True
        assert lab.requests[3].body == service.cancel_body
    expected = [service.start, *[service.status] * 2, service.cancel, service.status]
    assert lab.asked == (expected if service.cancel else expected[:2])
    assert lab.requests[0].headers[service.key[0]] == service.key[1]
    state = api.read_state(ends, begun.params)
    assert service.said == (state.error.message if state.error else "")


@pytest.mark.parametrize(("name", "service"), SERVICES.items(), ids=SERVICES)
def test_each_state_of_a_service_is_read(pasted, name, service):
    api, params = pasted[name], {**service.params, "run_id": "r1"}
    phases = [api.read_state(body, params).phase for body, _ in service.states]
    assert phases == [phase for _, phase in service.states]
    good = api.read_state(service.states[-3][0], params)
    assert good.ok and (good.output is not None) == (name not in NO_OUTPUT)


NO_OUTPUT = {"GITHUB", "GITLAB", "APIFY", "DATABRICKS", "DBT_CLOUD", "AIRFLOW"}
# ---- The module, its examples, and the demonstration


def test_all_is_what_is_public():
    public = {
        name
        for name, value in vars(runpoll).items()
        if not name.startswith("_")
        and (isinstance(value, Api) or getattr(value, "__module__", "") == "runpoll")
    }
    assert public == set(runpoll.__all__) and len(runpoll.__all__) == len(public)


@pytest.mark.parametrize("value", [runpoll.Backoff(), ErrorInfo("no"), ORDINARY, read()])
def test_values_are_frozen(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


@pytest.fixture
def examples(lab: Lab, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that an example finds.

    Its built-in APIs are the simulator's, other APIs are an ordinary server, and no time passes.
    """
    for name in STARTS:
        monkeypatch.setattr(runpoll, name.upper(), simulator.api(name))
    jobs = lab.enter(Server(run("queued"), run(progress=0.5), DONE))

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
        "\n" * text.count("\n", 0, block.start(2)) + block[2] for block in blocks if not block[1]
    ]


def test_the_examples_in_the_readme_run(examples, capsys):
    for block in readme_blocks():
        exec(compile(block, str(README), "exec"), examples)
    examples["test_report"]()
    context = type("Context", (), {"get_remaining_time_in_millis": lambda _: 90_000})()
    assert examples["handler"]({"data": {}}, context)["done"] is True
    assert capsys.readouterr().out.startswith("queued None\nrunning 0.5\nsucceeded None\n")


SLOW_OR_BUSY = {**SLOW, "asks for an hour": answer(None, 429, {"Retry-After": "3600"})}


@pytest.mark.parametrize("slow", SLOW_OR_BUSY.values(), ids=SLOW_OR_BUSY)
def test_a_lambda_function_hands_over_before_its_limit(lab, slow):
    names: dict[str, Any] = {"runpoll": runpoll, "api_key": KEY, "where": {}}
    exec(next(block for block in readme_blocks() if "def handler" in block), names)
    lab.server = lab.enter(Server(slow))
    api = dataclasses.replace(ORDINARY, base_url=lab.server.url)
    context = type("Context", (), {"get_remaining_time_in_millis": lambda _: 2300})()
    names["runpoll"] = types.SimpleNamespace(**{**vars(runpoll), "RAPIDFOLIO": api})
    event = {"params": {"run_id": "r1"}}
    begun = time.monotonic()
    assert names["handler"](event, context) == {"done": False, **event}
    assert time.monotonic() - begun < 2.3


def test_the_demonstration_follows_one_run_of_each_api(capsys):
    demonstrate(interval=0.01)
    lines = capsys.readouterr().out.splitlines()
    for name, last in (
        ("RAPIDFOLIO", "completed"),
        ("DOCLO", "success"),
        ("DIBBY", "FINISHED"),
        ("ONEPIN", "completed"),
    ):
        of_it = [line.split() for line in lines if line.startswith(name)]
        assert len(of_it) >= 4 and any(last in words and "succeeded" in words for words in of_it)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_the_simulator_is_left_running_until_it_is_interrupted():
    with subprocess.Popen(
        [sys.executable, __file__, "serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        api = dataclasses.replace(runpoll.DIBBY, base_url=found[0] + "/dibby/api")
        with Session(api, KEY) as session:
            assert session.start(STARTS["dibby"][0]).phase is Phase.PENDING
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0 and "Traceback" not in process.stderr.read()


def demonstrate(interval: float = 0.2) -> None:
    """Follow one run of each API and print each state as it comes."""
    print(f"{'api':<12}{'status':<12}{'phase':<12}{'progress':>8}{'elapsed':>10}")
    ends = {}
    with Simulator(stages=5) as simulator:
        assert isinstance(simulator, Simulator)
        for name, (body, params) in STARTS.items():
            with Session(simulator.api(name), KEY) as session:
                begun = session.start(body, **params)
                for state in iter_status(session, begun, interval=interval):
                    progress = "" if state.progress is None else f"{state.progress:.0%}"
                    words = f"{name.upper():<12}{state.status:<12}{state.phase:<12}"
                    print(f"{words}{progress:>8}{state.elapsed:>8.1f} s", flush=True)
                if name == "onepin":
                    output = session.request(
                        "GET",
                        "/api/v1/workflows/{workflow_id}/runs/{run_id}/outputs",
                        params=state.params,
                    )["data"]
                else:
                    output = state.result()
                ends[name] = f"{state.phase} after {state.polls} polls: {json.dumps(output)}"
    print()
    for name, end in ends.items():
        print(f"{name.upper():<12}{end}")
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
