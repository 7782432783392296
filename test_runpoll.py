# SPDX-License-Identifier: MIT
"""The tests of runpoll, and a simulator of the four APIs that it knows.

    python -m pytest                     run the tests: real HTTP on 127.0.0.1, a virtual clock wherever time passes
    python test_runpoll.py               follow one run of each API in the terminal, in a few seconds, without a key
    python test_runpoll.py serve [PORT]  leave the simulator running
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
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
import shlex
import shutil
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
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Callable
from urllib.parse import unquote, urlsplit

import pytest
import urllib3

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


# ---- The two doubles, both real: a clock that moves when it is slept on, and a server on the loopback


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
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))  # else it is taken for the next request
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
    """Gives its answers one after the other, the last one again and again, and keeps what it received."""

    def __init__(self, *answers: Any, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._httpd = _HTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"owner": self}))
        self._httpd.tls = tls
        self.port = self._httpd.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01})

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

    def opened(self, connection: socket.socket) -> int:
        with self._lock:
            self._sockets.append(connection)
            return len(self._sockets)

    def respond(self, request: Request) -> Callable[[_Handler], None]:
        with self._lock:
            self.requests.append(request)
            item = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return item if callable(item) else answer({"error": f"no. {item}"}, item) if type(item) is int else answer(item)


Answer = Callable[[_Handler], None]


def answer(body: Any = None, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An ordinary answer: JSON, or bytes as they are; None is an empty body."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()

    def send(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)

    return send


def wire(*pieces: Any, every: float = 0.0, repeat: bool = False, close: bool = True) -> Answer:
    """Pieces of bytes as they are on the wire, `every` so many seconds, then the end of the connection."""

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
    return [text[i:i + 1] for i in range(len(text))]


def run(status: Any = "running", **more: Any) -> dict[str, Any]:
    return {"id": "r1", "status": status, **more}


DONE = run("succeeded", output={"total": 7})
ORDINARY = Api(base_url="https://api.example.com", status="/jobs/{run_id}", start="/jobs",
               cancel="/jobs/{run_id}/cancel")
KEYED = dataclasses.replace(ORDINARY, idempotency="header:Idempotency-Key")


def briefly(seconds: float) -> None:
    assert seconds < 5, "no test waits for that"
    time.sleep(seconds)


REAL = {"sleep": briefly, "clock": time.monotonic}

# Of a certificate authority for 127.0.0.1 and localhost that signed itself, good until 2046; it guards nothing.
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

    WORDS = {"rapidfolio": ("pending", "running", "completed"), "doclo": ("queued", "running", "success"),
             "dibby": ("PENDING", "RUNNING", "FINISHED"), "onepin": ("pending", "running", "completed")}
    INVOICE = {"invoiceNumber": "INV-2025-001", "totalAmount": 1234.56, "vendor": "Acme Corp"}

    def __init__(self, *, stages: int = 4, step: float | None = None, port: int = 0) -> None:
        super().__init__(port=port)
        self.plans: dict[str, list[str]] = {}  # API -> the words of the runs to come, where not the usual ones
        self.stages, self.step = stages, step
        self.runs: dict[str, Simulated] = {}
        self.keys: dict[str, Simulated] = {}  # by idempotency key

    def api(self, name: str) -> Api:
        path = urlsplit(getattr(runpoll, name.upper()).base_url).path
        return dataclasses.replace(getattr(runpoll, name.upper()), base_url=f"{self.url}/{name}{path}")

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
            body = {"error": {"code": code, "message": message, "details": []},
                    "meta": {"request_id": "req_1234567890abcdef"}}
        return answer(body, status)

    def begin(self, api: str, parent: str, said: Any) -> Simulated:
        waiting, working, success = self.WORDS[api]
        plan = self.plans.get(api) or [waiting, *[working] * (self.stages - 2), success]
        number = len(self.runs) + 1
        name = {"rapidfolio": "run_{}", "doclo": "exec_{}", "dibby": "run_d{}"}.get(api, str(uuid.UUID(int=number)))
        made = Simulated(name.format(number), parent, list(plan), said, time.time())
        self.runs[made.id] = made
        return made

    def advance(self, made: Simulated) -> None:
        reached = made.at + 1 if self.step is None else int((time.time() - made.begun) / self.step)
        if not made.ended:
            made.at = min(reached, len(made.plan) - 1)

    def cancel(self, made: Simulated) -> None:
        made.plan[made.at + 1:] = ["cancelled"]
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
        return answer({
            "id": made.id, "status": made.word, "type": "api", "environment": "sandbox", "input": made.said["data"],
            "output": {"approved": True} if made.word == "completed" else None,
            "error": "Rejected by the reviewer" if made.word == "failed" else None,
            "startedAt": made.time(0) if made.at else None, "completedAt": made.time(made.at) if made.ended else None,
            "createdAt": made.time(0),
            "procedureVersionId": "ver_" + made.said.get("metadata", {}).get("procedureVersion", "abc"),
        })

    def _rapidfolio_start(self, request: Request, procedure: str, environment: str) -> Answer:
        said = request.body if isinstance(request.body, dict) else {}
        control = said.get("control", {})
        limit = control.get("executionTimeout", 60_000)
        if not isinstance(said.get("data"), dict) or not 1000 <= limit <= 300_000:
            return answer({"error": "Invalid request body"}, 400)
        if environment not in ("sandbox", "live") or f"_{environment}_" not in request.headers["Authorization"]:
            return answer({"error": "API key does not match the environment"}, 403)
        made = self.begin("rapidfolio", procedure, said)
        # The documents write run.rapidfolio.com here: an absolute URL, on the Runner's host.
        body = {"runId": made.id, "status": "running", "statusUrl": f"{self.url}/rapidfolio/runs/{made.id}"}
        if control.get("executionMode", "async") == "async":
            return answer(body, 202)
        while not made.ended and made.word != "awaiting_review":
            if (made.at + 1) * 1000 > limit:
                return answer({**body, "status": "timeout", "error": f"Execution exceeded timeout of {limit}ms"}, 504)
            made.at += 1
        if made.word != "completed":
            return answer({**body, "status": made.word})
        return answer({"runId": made.id, "status": "completed",
                       "output": {"approved": True, "transactionId": "txn_abc"},
                       "completedAt": made.time(made.at)})

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
                return self.refuse("doclo", 409, "invalid_state", f"Execution is already {made.word}")
            self.cancel(made)
            return answer({**self._execution(made), "cancelledAt": made.time(made.at)})
        self.advance(made)
        return answer(self._execution(made))

    def _execution(self, made: Simulated) -> dict[str, Any]:
        body = {"id": made.id, "flowId": made.parent, "status": made.word, "createdAt": made.time(0),
                "traceId": "trace_1"}
        if "pending" in made.plan:  # the REST vocabulary, and not the SDK's
            body["progress"] = {"step": "extract", "percentage": made.done(100)}
        else:
            body["metrics"] = {"tokensUsed": 1500, "cost": 0.05, "stepsRun": made.done(3), "stepsTotal": 3}
        if made.ended:
            body.update(completedAt=made.time(made.at), duration=made.at * 1000)
        if made.word in ("success", "completed"):
            body["output"] = self.INVOICE
        if made.word == "failed":
            body["error"] = {"code": "EXTRACTION_FAILED", "message": "No text was found", "details": {"page": 2}}
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
        body = {"id": made.id, "versionName": "1.0", "status": made.word, "createdAt": made.time(0), "steps": 5,
                "stepsCompleted": made.done(5), "output": self.INVOICE if made.word == "FINISHED" else None}
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
            return self._enveloped([{"node_id": "node_1", "type": "audio",
                                     "url": f"https://cdn.onepin.ai/{made.id}.mp3"}])
        if asked == ("GET", "status"):
            self.advance(made)
        elif asked == ("POST", "cancel") and not made.ended:
            self.cancel(made)
        return self._enveloped(self._job(made))

    def _enveloped(self, body: Any, status: int = 200) -> Answer:
        return answer({"data": body, "meta": {"request_id": "req_1234567890abcdef",
                                              "timestamp": "2024-04-20T14:25:01Z"}}, status)

    def _job(self, made: Simulated) -> dict[str, Any]:
        pausing = made.word == "running" and "paused" in made.plan[made.at:]
        return {
            "id": made.id, "workflow_id": made.parent, "status": made.word, "run_number": 42, "token_cost": 350,
            "created_at": made.time(0), "updated_at": made.time(made.at), "total_nodes": 15,
            "total_steps": 120 if made.at else None, "finished_steps": made.done(120) if made.at else None,
            "usage_summary": {"cpu_seconds": 12.5, "memory_mb": 256, "api_calls": 8},
            "started_at": made.time(0) if made.at else None, "completed_at": made.time(made.at) if made.ended else None,
            "pause_requested_at": made.time(made.at) if pausing else None,
            "error": "Node 7 ran out of memory" if made.word == "failed" else None, "has_export": made.ended,
            "triggered_by": {"user_id": "d290f1ee-6c54-4b01-90e6-d701748f0851", "user_name": "jane.doe@example.com"},
        }


# What each API's start takes: its body, and the parameters of its path.
STARTS: dict[str, tuple[Any, dict[str, str]]] = {
    "rapidfolio": ({"data": {"customerId": "cust_123"}}, {"procedure_id": "proc_abc", "environment": "sandbox"}),
    "doclo": ({"input": {"document": {"base64": "JVBERi0=", "filename": "invoice.pdf"}}}, {"flow_id": "flow_abc123"}),
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
        self.certificate = directory / "certificate.pem"

    def open(self, *answers: Any, api: Api = ORDINARY, key: Any = KEY, tls: bool = False, **options: Any) -> Session:
        """A session on the virtual clock with an API that answers so."""
        self.server = self.enter(Server(*answers, tls=self.tls() if tls else None))
        return self.session(api, key, **{"base_url": self.server.url, **options})

    def session(self, api: Api = ORDINARY, key: Any = KEY, **options: Any) -> Session:
        return self.enter(Session(api, key, **{"sleep": self.clock.sleep, "clock": self.clock, **options}))

    def enter(self, opened: Any) -> Any:
        return self._stack.enter_context(opened)

    def tls(self) -> ssl.SSLContext:
        self.certificate.write_text(CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        return context

    @property
    def requests(self) -> list[Request]:
        return self.server.requests

    @property
    def naps(self) -> list[float]:
        return self.clock.naps


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


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- The four APIs, end to end


@pytest.mark.parametrize("name", STARTS)
def test_a_run_of_each_api_is_followed_to_its_end_over_one_connection(lab, simulator, name):
    body, params = STARTS[name]
    with lab.session(simulator.api(name)) as session:
        states = list(iter_status(session, session.start(body, **params)))
    assert [state.phase for state in states][1:] == [Phase.RUNNING, Phase.RUNNING, Phase.SUCCEEDED]
    assert states[-1].ok and states[-1].done and states[-1].error is None
    assert {state.id for state in states} == {states[0].params["run_id"]}
    assert [request.method for request in simulator.requests] == ["POST", "GET", "GET", "GET"]
    assert {request.connection for request in simulator.requests} == {1}


def test_rapidfolio_starts_asynchronously_and_pins_a_version(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    body = {"data": {"customerId": "cust_123", "amount": 5000}, "metadata": {"procedureVersion": "v2"},
            "control": {"executionMode": "async"}}
    begun = session.start(body, procedure_id="proc_abc", environment="sandbox")
    assert (begun.id, begun.status, begun.phase, begun.output) == ("run_1", "running", Phase.RUNNING, None)
    assert begun.status_url == simulator.url + "/rapidfolio/runs/run_1"
    assert begun.params == {"run_id": "run_1"}
    assert simulator.requests[0].body == body
    assert simulator.requests[0].path == "/rapidfolio/v1/procedures/proc_abc/sandbox"
    assert session.poll(begun).raw["procedureVersionId"] == "ver_v2"


def test_every_field_of_a_rapidfolio_status_answer_is_read(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    last = wait(session, session.start(*STARTS["rapidfolio"][:1], **STARTS["rapidfolio"][1]))
    assert (last.output, last.error, last.duration) == ({"approved": True}, None, 3.0)
    assert last.created_at == last.started_at and last.completed_at == last.started_at + timedelta(seconds=3)
    assert last.completed_at.utcoffset() == timedelta(0)
    assert last.progress is last.steps_done is last.steps_total is last.eta is None
    assert {name: last.raw[name] for name in ("type", "environment", "input", "procedureVersionId")} == {
        "type": "api", "environment": "sandbox", "input": {"customerId": "cust_123"}, "procedureVersionId": "ver_abc"}


@pytest.mark.parametrize("limit, plan, status, phase", [
    (60_000, ["running", "completed"], "completed", Phase.SUCCEEDED),
    (60_000, ["running", "awaiting_review", "completed"], "awaiting_review", Phase.PAUSED),
    (1_000, ["running", "running", "completed"], "timeout", Phase.RUNNING),
])
def test_a_synchronous_rapidfolio_start_is_a_state_and_sent_once(lab, simulator, limit, plan, status, phase):
    simulator.plans["rapidfolio"] = plan
    session = lab.session(simulator.api("rapidfolio"))
    body = {"data": {}, "control": {"executionMode": "sync", "executionTimeout": limit}}
    begun = session.start(body, procedure_id="proc_abc", environment="sandbox")
    assert (begun.id, begun.status, begun.phase) == ("run_1", status, phase)
    assert begun.error is None and begun.params == {"run_id": "run_1"}
    assert len(simulator.requests) == 1
    assert wait(session, begun).status == "completed"
    assert [request.method for request in simulator.requests].count("POST") == 1


@pytest.mark.parametrize("api, body, held", [
    (runpoll.RAPIDFOLIO, {"control": {"executionMode": "sync", "executionTimeout": 120_000}}, 120),
    (runpoll.RAPIDFOLIO, {"control": {"executionMode": "sync"}}, 60),
    (runpoll.RAPIDFOLIO, {"control": {"executionMode": "async", "executionTimeout": 120_000}}, 0),
    (runpoll.RAPIDFOLIO, {"data": {}}, 0),
    (runpoll.RAPIDFOLIO, None, 0),
    (runpoll.DOCLO, {"wait": True}, 30),
    (runpoll.DOCLO, {"wait": True, "timeout": 45_000}, 45),
    (runpoll.DOCLO, {"wait": False, "timeout": 45_000}, 0),
    (runpoll.DOCLO, {"input": {}}, 0),
])
def test_the_built_in_apis_know_for_how_long_a_start_is_held(api, body, held):
    assert api.hold is not None and (api.hold(body) or 0) == held


@pytest.mark.parametrize("held, error", [(0.0, TransportError), (0.5, None)])
def test_a_start_waits_for_as_long_as_the_server_may_hold_it(lab, held, error):
    slow = wire(b"", b"HTTP/1.1 200 OK\r\nContent-Length: 31\r\n\r\n" + b'{"id": "r1", "status": "done"}\n', every=0.4)
    session = lab.open(slow, api=dataclasses.replace(ORDINARY, hold=lambda body: held), request_timeout=0.2)
    with pytest.raises(error) if error else contextlib.nullcontext():
        assert session.start({}).ok


def test_the_request_timeout_of_a_start_overrules_its_hold(lab):
    session = lab.open(hang, api=dataclasses.replace(ORDINARY, hold=lambda body: 60.0))
    with pytest.raises(TransportError):
        session.start({}, request_timeout=0.1)


@pytest.mark.parametrize("plan, error, text", [
    (["running", "failed"], runpoll.RunFailed, "Rejected by the reviewer"),
    (["running", "cancelled"], runpoll.RunCancelled, "cancelled"),
])
def test_each_bad_end_of_a_rapidfolio_run_has_its_own_error(lab, simulator, plan, error, text):
    simulator.plans["rapidfolio"] = plan
    session = lab.session(simulator.api("rapidfolio"))
    last = wait(session, session.start({"data": {}}, procedure_id="p", environment="sandbox"))
    with pytest.raises(error, match=text) as caught:
        last.result()
    assert caught.value.state == last and caught.value.params == {"run_id": "run_1"} and "run_1" in str(caught.value)


def test_rapidfolio_cancels_an_active_run_and_answers_409_for_an_ended_one(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    first, second = (session.start({"data": {}}, procedure_id="p", environment="sandbox") for _ in "12")
    assert session.cancel(first) is True
    assert session.poll(first).phase is Phase.CANCELLED
    assert wait(session, second).ok
    assert session.cancel(second) is False
    assert session.cancel(first.id) is True


def test_the_documented_backoff_of_rapidfolio_is_one_value(lab):
    session = lab.open(*[run()] * 9, DONE)
    wait(session, "r1", interval=runpoll.Backoff(initial=1, factor=1.5, maximum=15, jitter=0))
    assert lab.naps == pytest.approx([1, 1.5, 2.25, 3.375, 5.0625, 7.59375, 11.390625, 15, 15])


def test_rapidfolio_errors_are_bare_texts(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    with pytest.raises(ApiError) as caught:
        session.start({"data": {}}, procedure_id="p", environment="live")
    assert caught.value.http_status == 403
    assert caught.value.error == ErrorInfo("API key does not match the environment")
    assert "API key does not match the environment" in str(caught.value) and "403" in str(caught.value)


@dataclass
class Invoice:
    number: str
    total: float


def test_doclo_results_are_decoded(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    last = wait(session, session.start(STARTS["doclo"][0], flow_id="flow_abc123"), interval=2, timeout=300)
    decoded = last.result(lambda said: Invoice(said["invoiceNumber"], said["totalAmount"]))
    assert decoded == Invoice("INV-2025-001", 1234.56)
    assert last.result() == last.output == Simulator.INVOICE
    assert lab.naps == [2, 2, 2]


def test_doclo_durations_and_metrics_are_read(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    states = list(iter_status(session, session.start(STARTS["doclo"][0], flow_id="flow_abc123")))
    assert statuses(states) == ["queued", "running", "running", "success"]
    assert [state.steps_done for state in states] == [0, 1, 2, 3] and states[0].steps_total == 3
    assert [state.progress for state in states] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert states[-1].duration == 3.0 and states[0].duration is None
    assert states[-1].raw["metrics"] == {"tokensUsed": 1500, "cost": 0.05, "stepsRun": 3, "stepsTotal": 3}


def test_doclo_is_also_read_in_the_words_of_its_rest_interface(lab, simulator):
    simulator.plans["doclo"] = ["pending", "running", "completed"]
    session = lab.session(simulator.api("doclo"))
    states = list(iter_status(session, session.start(STARTS["doclo"][0], flow_id="f")))
    assert [state.phase for state in states] == [Phase.PENDING, Phase.RUNNING, Phase.SUCCEEDED]
    assert [state.progress for state in states] == [0.0, 0.5, 1.0]


def test_doclo_failures_have_a_code_a_message_and_details(lab, simulator):
    simulator.plans["doclo"] = ["running", "failed"]
    session = lab.session(simulator.api("doclo"))
    last = wait(session, session.start(STARTS["doclo"][0], flow_id="f"))
    assert last.error == ErrorInfo("No text was found", "EXTRACTION_FAILED", None, {"page": 2})
    with pytest.raises(runpoll.RunFailed, match="No text was found"):
        last.result()


def test_doclo_takes_the_idempotency_key_in_the_body(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    body = {"input": {}}
    first, second = (session.start(body, flow_id="f", idempotency_key="order-7") for _ in "12")
    assert first.id == second.id and len(simulator.runs) == 1
    assert simulator.requests[0].body == {"input": {}, "idempotencyKey": "order-7"}
    assert body == {"input": {}}


def test_a_doclo_start_that_waits_is_done(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    last = wait(session, session.start({"input": {}, "wait": True}, flow_id="f"))
    assert last.ok and len(simulator.requests) == 1


def test_doclo_cancels_and_refuses_to_cancel_twice(lab, simulator):
    session = lab.session(simulator.api("doclo"))
    begun = session.start({"input": {}}, flow_id="f")
    assert session.cancel(begun) is True and session.cancel(begun) is True
    assert [request.path.rpartition("/")[2] for request in simulator.requests[1:]] == ["cancel", "cancel", begun.id]
    assert wait(session, begun).phase is Phase.CANCELLED


def test_doclo_errors_have_a_code(lab):
    said = {"error": {"code": "INSUFFICIENT_CREDITS", "message": "No credits are left", "details": {"needed": 3}}}
    session = lab.open(answer(said, 402), api=runpoll.DOCLO)
    with pytest.raises(ApiError) as caught:
        session.start({}, flow_id="f")
    assert caught.value.error == ErrorInfo("No credits are left", "INSUFFICIENT_CREDITS", None, {"needed": 3})
    assert caught.value.http_status == 402 and len(lab.requests) == 1


def test_dibby_steps_are_progress(lab, simulator):
    simulator.plans["dibby"] = ["PENDING", *["RUNNING"] * 4, "FINISHED"]
    session = lab.session(simulator.api("dibby"))
    states = list(iter_status(session, session.start(STARTS["dibby"][0])))
    assert [(state.steps_done, state.steps_total) for state in states] == [(done, 5) for done in range(6)]
    assert [state.progress for state in states] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert states[-1].result() == Simulator.INVOICE and states[0].output is None


def test_dibby_names_the_step_that_failed(lab, simulator):
    simulator.plans["dibby"] = ["RUNNING", "FAILED"]
    session = lab.session(simulator.api("dibby"))
    last = wait(session, session.start(STARTS["dibby"][0]))
    assert last.error == ErrorInfo("Failed to process document", None, "Document Extractor")
    with pytest.raises(runpoll.RunFailed, match="Document Extractor"):
        last.result()


def test_sixty_attempts_two_seconds_apart_are_an_islice(lab, simulator):
    simulator.plans["dibby"] = ["RUNNING"] * 100 + ["FINISHED"]
    session = lab.session(simulator.api("dibby"))
    begun = session.start(STARTS["dibby"][0])
    assert len(list(itertools.islice(iter_status(session, begun.id, interval=2), 60))) == 60
    assert lab.naps == [2] * 59 and len(simulator.requests) == 61


def test_dibby_has_no_cancel(lab, simulator):
    with pytest.raises(ValueError, match="cancel"):
        lab.session(simulator.api("dibby")).cancel("run_1")
    assert not simulator.requests


def test_every_field_of_a_onepin_status_answer_is_read(lab):
    text = (
        '{"data": {"id": "3fa85f64-5717-4562-b3fc-2c963f66afa6", "workflow_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",'
        '"status": "running", "run_number": 42, "created_at": "2024-04-20T14:20:00Z", "total_nodes": 15,'
        '"total_steps": 120, "finished_steps": 45, "started_at": "2024-04-20T14:22:00Z", "completed_at": null,'
        '"error": null, "has_export": true},'
        '"meta": {"request_id": "req_1234567890abcdef", "timestamp": "2024-04-20T14:25:01Z"}}')
    params = {"workflow_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7", "run_id": "3fa85f64-5717-4562-b3fc-2c963f66afa6"}
    session = lab.open(answer(text.encode()), api=runpoll.ONEPIN)
    state = session.poll(params)
    assert lab.requests[0].path == f"/api/v1/workflows/{params['workflow_id']}/runs/{params['run_id']}/status"
    assert (state.id, state.status, state.phase) == (params["run_id"], "running", Phase.RUNNING)
    assert (state.steps_done, state.steps_total, state.progress) == (45, 120, 0.375)
    assert state.created_at == datetime(2024, 4, 20, 14, 20, tzinfo=timezone.utc)
    assert state.started_at == datetime(2024, 4, 20, 14, 22, tzinfo=timezone.utc)
    assert state.completed_at is state.duration is state.error is state.output is None
    assert state.params == params and state.raw == json.loads(text)


def test_onepin_outputs_are_fetched_by_the_same_parameters(lab, simulator):
    session = lab.session(simulator.api("onepin"), headers={"X-Workspace-Id": "ws_1"})
    last = wait(session, session.start(None, workflow_id="wf/1"))
    assert last.params == {"workflow_id": "wf/1", "run_id": last.id} and last.output is None
    got = session.request("GET", "/api/v1/workflows/{workflow_id}/runs/{run_id}/outputs", params=last.params)
    assert got["data"][0]["node_id"] == "node_1"
    assert simulator.requests[-1].path == f"/onepin/api/v1/workflows/wf%2F1/runs/{last.id}/outputs"
    assert {request.headers["X-Workspace-Id"] for request in simulator.requests} == {"ws_1"}
    assert simulator.requests[0].body is None


def test_onepin_pauses_for_a_person(lab, simulator):
    simulator.plans["onepin"] = ["pending", "running", "paused", "paused", "running", "completed"]
    session = lab.session(simulator.api("onepin"))
    states = list(iter_status(session, session.start(None, workflow_id="w")))
    assert [state.phase.value for state in states] == ["pending", "running", "paused", "paused", "running", "succeeded"]
    assert states[1].raw["data"]["pause_requested_at"] and not states[4].raw["data"]["pause_requested_at"]
    assert lab.naps[2:4] == [pytest.approx(30, rel=0.11)] * 2 and max(lab.naps[:2]) < 2


def test_onepin_answers_200_when_an_ended_run_is_cancelled(lab, simulator):
    session = lab.session(simulator.api("onepin"))
    ended, active = (session.start(None, workflow_id="w") for _ in "12")
    wait(session, ended)
    before = len(simulator.requests)
    assert session.cancel(ended.params) is False and len(simulator.requests) == before + 1
    assert session.cancel(active) is True and session.poll(active).status == "cancelled"


@pytest.mark.parametrize("status, body, error, request_id", [
    (404, {"error": {"code": "run_not_found", "message": "Run not found",
                     "details": [{"field": "run_id", "message": "unknown"}]},
           "meta": {"request_id": "req_12"}}, ("Run not found", "run_not_found"), "req_12"),
    (401, {"code": "unauthorized", "message": "Token has expired", "detail": None},
     ("Token has expired", "unauthorized"), None),
    (426, {"code": "upgrade_required", "message": "This client is too old"},
     ("This client is too old", "upgrade_required"), None),
    (422, {"detail": [{"loc": ["path", "run_id"], "msg": "Input should be a valid UUID", "type": "uuid_parsing"}]},
     None, None),
])
def test_the_error_bodies_of_onepin_are_read(lab, status, body, error, request_id):
    session = lab.open(answer(body, status), api=runpoll.ONEPIN)
    with pytest.raises(ApiError) as caught:
        session.poll({"workflow_id": "w", "run_id": "r"})
    said = caught.value.error
    assert caught.value.http_status == status and caught.value.request_id == request_id
    if error:
        assert (said.message, said.code) == error
    else:
        assert "run_id" in said.message and "valid UUID" in said.message and said.details == body["detail"]


WORDS = {
    "rapidfolio": {"pending": "pending", "running": "running", "timeout": "running", "awaiting_review": "paused",
                   "completed": "succeeded", "failed": "failed", "cancelled": "cancelled"},
    "doclo": {"queued": "pending", "pending": "pending", "running": "running", "success": "succeeded",
              "completed": "succeeded",
              "failed": "failed", "cancelled": "cancelled"},
    "dibby": {"PENDING": "pending", "RUNNING": "running", "FINISHED": "succeeded", "FAILED": "failed"},
    "onepin": {"pending": "pending", "running": "running", "paused": "paused", "completed": "succeeded",
               "failed": "failed",
               "cancelled": "cancelled"},
}


@pytest.mark.parametrize("name, word, phase", [(name, *pair) for name in WORDS for pair in WORDS[name].items()])
def test_the_status_words_of_the_four_apis(name, word, phase):
    body = run(word)
    state = getattr(runpoll, name.upper()).read_state({"data": body} if name == "onepin" else body)
    assert (state.status, state.phase.value) == (word, phase)


# ---- Phases


VOCABULARY = {
    Phase.PENDING: "pending queued created scheduled submitted accepted enqueued not_started starting initializing",
    Phase.RUNNING: "running in_progress processing started active working executing finalizing cancelling canceling",
    Phase.PAUSED: "paused suspended awaiting_review awaiting_approval awaiting_input requires_action",
    Phase.SUCCEEDED: "success succeeded successful completed complete finished done",
    Phase.FAILED: "failed failure error errored timed_out crashed expired",
    Phase.CANCELLED: "cancelled canceled aborted",
    Phase.UNKNOWN: "stopped terminated timeout waiting skipped frobnicating unknown",
}


@pytest.mark.parametrize("word, phase", [(word, phase) for phase, words in VOCABULARY.items()
                                         for word in words.split()])
def test_the_default_vocabulary_in_any_spelling(word, phase):
    camel = re.sub("_(.)", lambda found: found[1].upper(), word)
    for spelled in (word, word.upper(), word.replace("_", "-").title(), word.replace("_", " "), camel):
        state = ORDINARY.read_state(run(spelled))
        assert (state.status, state.phase) == (spelled, phase)


@pytest.mark.parametrize("phase", Phase)
def test_a_phase_is_its_word_and_some_are_terminal(phase):
    assert str(phase) == f"{phase}" == phase.value == phase.name.lower() == phase
    assert phase.terminal is (phase.name in ("SUCCEEDED", "FAILED", "CANCELLED"))
    assert json.dumps(phase) == f'"{phase.value}"'


def test_an_unknown_word_is_polled_on_and_logged_once_a_session(lab, caplog):
    session = lab.open(run("frobnicating"), run("frobnicating"), run("running"), run("frobnicating"), DONE)
    states = list(iter_status(session, "r1"))
    assert [state.phase.value for state in states] == ["unknown", "unknown", "running", "unknown", "succeeded"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "frobnicating" in warnings[0]


def test_an_unknown_word_is_polled_until_the_deadline(lab):
    session = lab.open(run("frobnicating"))
    with pytest.raises(PollTimeout, match="frobnicating"):
        wait(session, "r1", timeout=60)
    assert lab.clock.now >= 1059


# ---- States


TEN = datetime(2026, 2, 27, 10, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize("said, instant", [
    ("2026-02-27T10:00:00Z", TEN),
    ("2026-02-27T10:00:00.000Z", TEN),
    ("2026-02-27T10:00:00.5Z", TEN + timedelta(seconds=0.5)),
    ("2026-02-27T10:00:00.123456789Z", TEN + timedelta(microseconds=123456)),
    ("2026-02-27T12:00:00+02:00", TEN),
    ("2026-02-27T04:30:00.25-05:30", TEN + timedelta(seconds=0.25)),
    ("2026-02-27T12:00:00+0200", TEN),
    ("2026-02-27T10:00:00", TEN),
    ("2026-02-27T10:00:00.000", TEN),
    ("20260227T100000Z", TEN), ("20260227T120000.5+0200", TEN + timedelta(seconds=0.5)), ("2026-02-27T10Z", TEN),
    (TEN.timestamp(), TEN),
    (int(TEN.timestamp()), TEN),
    (TEN.timestamp() + 0.5, TEN + timedelta(seconds=0.5)),
    (int(TEN.timestamp() * 1000), TEN),
    *[(said, None) for said in ("", "soon", "2026-13-45T10:00:00Z", "2026-02-27T10:00:00+99:99", "2026-02-27T10:00.5Z", "\u0662026-02-27", None, True, [], {},
                                1e300,
                                float("nan"), float("inf"), 10**400)],
])
def test_timestamps_are_aware_utc_or_none(said, instant):
    state = ORDINARY.read_state(run(created_at=said))
    assert state.created_at == instant
    assert instant is None or state.created_at.utcoffset() == timedelta(0)


@pytest.mark.parametrize("said, duration", [
    ({"createdAt": "2026-02-27T10:00:00Z", "startedAt": "2026-02-27T10:00:02Z", "completedAt": "2026-02-27T10:00:05Z"},
     3.0),
    ({"createdAt": "2026-02-27T10:00:00Z", "completedAt": "2026-02-27T10:00:05Z"}, 5.0),
    ({"secs": 2.5, "startedAt": "2026-02-27T10:00:02Z", "completedAt": "2026-02-27T10:00:05Z"}, 2.5),
    ({"secs": "long", "startedAt": "2026-02-27T10:00:02Z", "completedAt": "2026-02-27T10:00:05Z"}, 3.0),
    ({"createdAt": "2026-02-27T10:00:00Z"}, None),
    ({"duration": 4000}, None),
])
def test_the_duration_is_the_apis_own_or_counted(said, duration):
    names = {name: name[:-3] + "At" for name in ("created_at", "started_at", "completed_at")}
    assert dataclasses.replace(ORDINARY, fields={"duration": "secs",
                                                 **names}).read_state(run(**said)).duration == duration


@pytest.mark.parametrize("said, progress", [
    ({"done": 3, "all": 12}, 0.25), ({"done": 3, "all": 12, "share": 0.5}, 0.5), ({"done": 0, "all": 4}, 0.0),
    ({"done": 3, "all": 0}, None), ({"done": 3}, None), ({"all": 12}, None), ({"done": "3", "all": 12}, None),
    ({"done": None, "all": None}, None), ({"done": True, "all": 12}, None),
    ({"share": "half", "done": 6, "all": 12}, 0.5),
])
def test_progress_is_the_apis_own_or_counted_in_steps(said, progress):
    api = dataclasses.replace(ORDINARY, fields={"steps_done": "done", "steps_total": "all", "progress": "share"})
    assert api.read_state(run(**said)).progress == progress


@pytest.mark.parametrize("said, word", [(10, "10"), (True, "true"), (2.5, "2.5"), ("", None), (None, None), ([], None),
                                        ({}, None)])
def test_a_status_or_an_id_that_is_no_text_is_its_json(said, word):
    api = dataclasses.replace(ORDINARY, phases={"10": Phase.RUNNING, "true": Phase.SUCCEEDED})
    if word is None:
        with pytest.raises(BadResponse, match="status"):
            api.read_state({"id": "r1", "status": said})
        return
    assert api.read_state({"id": "r1", "status": said}).status == word
    state = api.read_state({"id": said, "status": "running"})
    assert state.id == word and state.params == {"run_id": word}


@pytest.mark.parametrize("said, error", [
    ("It broke", ErrorInfo("It broke")),
    ({"message": "It broke"}, ErrorInfo("It broke")),
    ({"code": "E7", "message": "It broke", "details": {"page": 2}}, ErrorInfo("It broke", "E7", None, {"page": 2})),
    ({"message": "It broke", "step": "Extractor"}, ErrorInfo("It broke", None, "Extractor")),
    ({"code": "E7", "message": "It broke", "detail": {"page": 2}}, ErrorInfo("It broke", "E7", None, {"page": 2})),
    ({"code": "E7", "message": "It broke", "details": "It broke"}, ErrorInfo("It broke", "E7", None, "It broke")),
    ({"message": "It broke", "error": {}}, ErrorInfo("It broke", None, None, {})),
    (None, None), ("", None), (0, None), (False, None), (True, None),
])
@pytest.mark.parametrize("word", ["failed", "cancelled"])
def test_the_error_of_a_run_that_ended_badly(said, error, word):
    assert ORDINARY.read_state(run(word, error=said)).error == error


@pytest.mark.parametrize("word", ["running", "succeeded", "paused", "frobnicating"])
def test_what_an_api_says_of_errors_beside_other_states_stands_in_raw(word):
    state = ORDINARY.read_state(run(word, error="almost"))
    assert state.error is None and state.raw["error"] == "almost"


@pytest.mark.parametrize("body, message, code", [
    ({"error": "It broke"}, "It broke", None),
    ({"error": {"code": "E7", "message": "It broke"}}, "It broke", "E7"),
    ({"code": "E7", "message": "It broke", "detail": None}, "It broke", "E7"),
    ({"detail": "It broke"}, "It broke", None),
    ({"detail": [{"loc": ["body", "text"], "msg": "field required"}]}, "field required", None),
    ({"title": "It broke"}, "It broke", None),
    ({"description": "It broke"}, "It broke", None),
    ("It broke", "It broke", None),
    (b"<html>\n<title>It broke</title>\n" + b"x" * 9000, "<html>", None),
    (b"It broke\nand more of it\n", "It broke", None),
])
def test_the_forms_of_an_error_answer(lab, body, message, code):
    session = lab.open(answer(body, 400, {"X-Request-Id": "req_9"}))
    with pytest.raises(ApiError) as caught:
        session.poll("r1")
    error = caught.value
    assert message in error.error.message and "\n" not in error.error.message and error.error.code == code
    assert message in str(error) and "\n" not in str(error) and len(str(error)) < 1000
    assert error.http_status == 400 and error.request_id == "req_9" and len(error.body) <= 500
    assert error.params == {"run_id": "r1"} and "r1" in str(error) and "req_9" in str(error)


def test_an_error_answer_without_a_body_is_an_error_all_the_same(lab):
    session = lab.open(answer(None, 403))
    with pytest.raises(ApiError, match="403") as caught:
        session.poll("r1")
    assert caught.value.body == "" and isinstance(caught.value.error.message, str)


def test_values_of_the_wrong_type_are_as_if_absent():
    odd = run("running", created_at={}, steps_done="many", steps_total=[], progress={}, duration_seconds=True,
              status_url=5)
    assert ORDINARY.read_state(odd) == dataclasses.replace(ORDINARY.read_state(run()), raw=odd)


def test_output_and_raw_stay_out_of_the_repr():
    assert "secret" not in repr(ORDINARY.read_state(run("done", output="secret", more="secret")))
    assert "r1" in repr(ORDINARY.read_state(run()))


def test_a_state_pickles_and_copies_and_has_no_hash():
    state = ORDINARY.read_state(run("failed", error={"code": "E7", "message": "no"}, created_at="2026-02-27T10:00:00Z"))
    for twin in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert twin == state and twin.raw == state.raw and twin.phase is Phase.FAILED
    with pytest.raises(TypeError):
        hash(state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.status = "other"  # type: ignore[misc]


def test_states_compare_by_what_the_api_said():
    state = ORDINARY.read_state(run())
    assert dataclasses.replace(state, polls=9, faults=3, elapsed=5.0, eta=2.0) == state
    assert dataclasses.replace(state, status="other") != state


def test_params_are_plain_json_and_those_that_were_asked_with(lab):
    session = lab.open(run(id="another"))
    state = session.poll("r1")
    assert state.id == "another" and state.params == {"run_id": "r1"}
    assert json.loads(json.dumps(state.params)) == state.params


@pytest.mark.parametrize("status, error", [("failed", runpoll.RunFailed), ("cancelled", runpoll.RunCancelled),
                                           ("running", runpoll.RunNotDone), ("paused", runpoll.RunNotDone)])
def test_a_result_is_only_that_of_a_successful_run(status, error):
    state = ORDINARY.read_state(run(status, output={"partial": 1}))
    with pytest.raises(error, match="r1") as caught:
        state.result(lambda output: output)
    assert caught.value.state is state and caught.value.params == {"run_id": "r1"}


def test_what_decode_raises_comes_out_unchanged():
    with pytest.raises(ZeroDivisionError):
        ORDINARY.read_state(DONE).result(lambda output: output["total"] / 0)


# ---- Any other API


def test_the_defaults_alone_drive_an_ordinary_api(lab):
    session = lab.open(run("in_progress", progress=0.5), DONE,
                       api=Api(base_url="https://api.example.com", status="/jobs/{run_id}"))
    states = list(iter_status(session, "r1"))
    assert [state.progress for state in states] == [0.5, None] and states[-1].result() == {"total": 7}
    assert lab.requests[0].path == "/jobs/r1" and lab.requests[0].method == "GET"


@pytest.mark.parametrize("names", [
    {"id": "r1", "status": "done", "output": 7, "created_at": TEN.isoformat(), "completed_at": TEN.isoformat(),
     "steps_done": 1},
    {"run_id": "r1", "state": "done", "result": 7, "createdAt": TEN.isoformat(), "completedAt": TEN.isoformat(),
     "stepsCompleted": 1},
    {"runId": "r1", "status": "done", "result": 7, "createdAt": TEN.isoformat(), "finished_at": TEN.isoformat(),
     "stepsCompleted": 1},
])
def test_the_usual_names_are_known(names):
    state = ORDINARY.read_state(names)
    assert (state.id, state.status, state.output, state.created_at, state.completed_at, state.steps_done) == (
        "r1", "done", 7, TEN, TEN, 1)


@pytest.mark.parametrize("options, body, status, phase", [
    ({"fields": {"status": "status.phase"}}, {"id": "r1", "status": {"phase": "Running"}}, "Running", Phase.RUNNING),
    ({"fields": {"status": ("conclusion", "status")}}, run("completed", conclusion="failure"), "failure", Phase.FAILED),
    ({"fields": {"status": ("conclusion", "status")}}, run("in_progress", conclusion=None), "in_progress",
     Phase.RUNNING),
    ({"root": "result.job"}, {"result": {"job": run("done")}}, "done", Phase.SUCCEEDED),
    ({"phases": {"2": Phase.RUNNING, "3": Phase.SUCCEEDED}}, run(3), "3", Phase.SUCCEEDED),
    ({"phases": {"Timed-Out": Phase.CANCELLED}}, run("TIMED_OUT"), "TIMED_OUT", Phase.CANCELLED),
    ({"phases": {"stopped": Phase.CANCELLED}}, run("done"), "done", Phase.SUCCEEDED),
    ({"fields": {"status": lambda body: "done" if body.get("done") else "running"}}, {"id": "r1"}, "running",
     Phase.RUNNING),
    ({"fields": {"status": lambda body: "done" if body.get("done") else "running"}}, {"id": "r1", "done": True}, "done",
     Phase.SUCCEEDED),
])
def test_one_value_describes_another_api(lab, options, body, status, phase):
    state = lab.open(body, api=dataclasses.replace(ORDINARY, **options)).poll("r1")
    assert (state.id, state.status, state.phase) == ("r1", status, phase)


def test_a_field_in_the_envelope_is_not_seen_under_a_root():
    state = dataclasses.replace(ORDINARY, root="data").read_state({"status": "failed", "data": run("running"),
                                                                   "output": 1})
    assert state.status == "running" and state.output is None and state.raw["status"] == "failed"


@pytest.mark.parametrize("options, header, value", [
    ({}, "Authorization", f"Bearer {KEY}"), ({"auth_scheme": "Token"}, "Authorization", f"Token {KEY}"),
    ({"auth_header": "X-Api-Key", "auth_scheme": ""}, "X-Api-Key", KEY),
])
def test_where_the_key_goes(lab, options, header, value):
    lab.open(DONE, api=dataclasses.replace(ORDINARY, **options)).poll("r1")
    assert lab.requests[0].headers[header] == value
    assert header == "Authorization" or "Authorization" not in lab.requests[0].headers


def test_without_a_key_none_is_sent(lab):
    lab.open(DONE, key=None).poll("r1")
    assert "Authorization" not in lab.requests[0].headers


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "PUT", "POST"])
def test_a_cancel_by_another_method_and_with_a_body(lab, method):
    session = lab.open(run("cancelled"), api=dataclasses.replace(ORDINARY, cancel=f"{method} /jobs/{{run_id}}"))
    assert session.cancel("r1", {"reason": "no need"}) is True
    sent = lab.requests[0]
    assert (sent.method, sent.path, sent.body) == (method, "/jobs/r1", {"reason": "no need"})
    assert sent.headers["Content-Type"] == "application/json"


def test_a_query_string_in_a_template(lab):
    session = lab.open(DONE, api=dataclasses.replace(ORDINARY, status="/jobs?id={run_id}&view=full", cancel=""))
    assert session.poll("a&b=c#d").params == {"run_id": "a&b=c#d"}
    assert session.poll(lab.server.url + "/jobs?id=a%26b&view=full").params == {"run_id": "a&b"}
    assert [request.path for request in lab.requests] == ["/jobs?id=a%26b%3Dc%23d&view=full",
                                                          "/jobs?id=a%26b&view=full"]


def test_a_base_url_with_a_path(lab):
    session = lab.open(DONE)
    lab.session(base_url=lab.server.url + "/v2/").poll("r1")
    assert lab.requests[0].path == "/v2/jobs/r1"
    assert session.poll("r1").ok and lab.requests[1].path == "/jobs/r1"


class Headed(Api):
    """Its state is in the HTTP status and in a header, and its bodies are empty."""

    def read_state(self, body: Any, params: Any = None, headers: Any = None, http_status: int = 200) -> RunState:
        status = headers["x-job-state"] if http_status == 200 else "running"
        return super().read_state({"id": (params or {}).get("run_id", "r9"), "status": status}, params, headers,
                                  http_status)


def test_a_subclass_reads_a_state_from_the_http_status_or_a_header(lab):
    api = Headed(base_url="https://api.example.com", status="/jobs/{run_id}", start="/jobs")
    session = lab.open(answer(None, 202), answer(None, 202), answer(None, 200, {"X-Job-State": "finished"}), api=api)
    states = list(iter_status(session, session.start()))
    assert statuses(states) == ["running", "running", "finished"] and states[0].params == {"run_id": "r9"}


@pytest.mark.parametrize("fault", [KeyError("x"), TypeError("x"), ValueError("x"), AttributeError("x"),
                                   IndexError("x")])
@pytest.mark.parametrize("way", ["subclass", "field"])
def test_an_override_that_cannot_read_the_answer_is_a_bad_response(lab, fault, way):
    def fail(*_: Any) -> Any:
        raise fault

    api = dataclasses.replace(ORDINARY, fields={"status": fail})
    if way == "subclass":
        api = type("Odd", (Api,), {"read_state": fail})(base_url="https://api.example.com", status="/jobs/{run_id}")
    with pytest.raises(BadResponse, match="r1") as caught:
        lab.open(run(), api=api, retries=0).poll("r1")
    assert caught.value.http_status == 200


def test_a_start_that_gives_an_id_alone_is_pending(lab):
    session = lab.open(answer({"id": "r1"}, 201), DONE)
    begun = session.start({"a": 1})
    assert (begun.id, begun.status, begun.phase, begun.params) == ("r1", "", Phase.PENDING, {"run_id": "r1"})
    assert wait(session, begun).ok
    assert lab.requests[0].body == {"a": 1} and lab.requests[0].path == "/jobs"


@pytest.mark.parametrize("where", ["{url}/jobs/r%2F7", "/jobs/r%2F7"])
@pytest.mark.parametrize("body", [None, {}, b"null"])
def test_a_start_that_gives_a_location_alone_is_pending(lab, where, body):
    session = lab.open(lambda handler: answer(body, 202, {"Location": where.format(url=handler.owner.url)})(handler),
                       DONE)
    begun = session.start()
    assert begun.params == {"run_id": "r/7"} and begun.phase is Phase.PENDING and begun.status == ""
    assert wait(session, begun).ok and lab.requests[1].path == "/jobs/r%2F7"


@pytest.mark.parametrize("headers", [{}, {"Location": "https://evil.example/jobs/r1"}, {"Location": "/elsewhere/r1"},
                                     {"Location": ""}])
def test_a_start_without_an_id_is_a_bad_response_and_not_sent_again(lab, headers):
    session = lab.open(answer({"ok": True}, 202, headers))
    with pytest.raises(BadResponse, match="may have begun"):
        session.start()
    assert len(lab.requests) == 1


def test_an_id_with_slashes_where_the_template_keeps_them(lab):
    api = Api(base_url="https://api.example.com", status="/v1/{+run_id}", start="/v1/models", fields={"id": "name"})
    session = lab.open({"name": "operations/a b", "status": "running"}, {"name": "operations/a b", "status": "done"},
                       api=api)
    assert wait(session, session.start({})).params == {"run_id": "operations/a b"}
    assert lab.requests[1].path == "/v1/operations/a%20b"
    assert session.poll(lab.server.url + "/v1/operations/a%20b").params == {"run_id": "operations/a b"}


@pytest.mark.parametrize("run_id", ["", "operations//a", "operations/../secrets", "./a", "operations/", "/etc"])
def test_a_slashed_id_cannot_leave_its_place(lab, run_id):
    with pytest.raises(ValueError):
        lab.open(DONE, api=Api(base_url="https://api.example.com", status="/v1/{+run_id}")).poll(run_id)
    assert not lab.requests


@pytest.mark.parametrize("options, text", [
    ({"fields": {"colour": "x"}}, "colour"),
    ({"fields": {"params": "x"}}, "params"),
    ({"status": "/jobs/last"}, "run_id"),
    ({"cancel": "/jobs/{run_id}/{reason}"}, "reason"),
    *[({"start": f"/jobs/{{{name}}}"}, name) for name in ("body", "request_timeout", "headers", "idempotency_key")],
])
def test_an_api_that_cannot_work_is_refused_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(ORDINARY, **options)


def test_read_state_reads_a_webhook_alone():
    state = runpoll.ONEPIN.read_state({"data": run("completed"), "meta": {}})
    assert state.ok and state.params == {"run_id": "r1"} and (state.polls, state.elapsed) == (0, 0.0)
    assert runpoll.ONEPIN.read_state({"data": run()}, {"workflow_id": "w", "run_id": "r1"}).params == {
        "workflow_id": "w", "run_id": "r1"}
    assert ORDINARY.read_state(run(), headers={"retry-AFTER": "7"}).retry_after == 7


@pytest.mark.parametrize("body", [None, [], "running", 5, {}, {"id": "r1"}, {"data": None}])
def test_read_state_refuses_what_is_no_state(body):
    with pytest.raises(BadResponse):
        ORDINARY.read_state(body)


# ---- Handles and paths


@pytest.mark.parametrize("run_id, path", [
    ("r1", "/jobs/r1"), ("a/b", "/jobs/a%2Fb"), ("../admin", "/jobs/..%2Fadmin"), ("a?b=c", "/jobs/a%3Fb%3Dc"),
    ("a#b", "/jobs/a%23b"),
    ("%2e%2e", "/jobs/%252e%252e"), ("a\r\nHost: evil", "/jobs/a%0D%0AHost%3A%20evil"), ("//evil", "/jobs/%2F%2Fevil"),
    ("\\\\evil", "/jobs/%5C%5Cevil"), ("@evil", "/jobs/%40evil"), ("é", "/jobs/%C3%A9"),
    ("{run_id}", "/jobs/%7Brun_id%7D"),
])
def test_an_id_cannot_change_the_path(lab, run_id, path):
    assert lab.open(DONE).poll(run_id).params == {"run_id": run_id}
    assert lab.requests[0].path == path
    assert lab.requests[0].headers["Host"] == lab.server.url.partition("//")[2]


@pytest.mark.parametrize("handle, error, text", [
    ("", ValueError, "run_id"), (".", ValueError, "run_id"), ("..", ValueError, "run_id"),
    ({}, TypeError, "run_id"), ({"run_id": "r1", "colour": "red"}, TypeError, "colour"),
    ({"run_id": ""}, ValueError, "run_id"),
    (None, TypeError, None), ({"run_id": None}, TypeError, "run_id"),
])
@pytest.mark.parametrize("call", ["poll", "cancel", "iter_status", "wait"])
def test_a_handle_that_names_no_run_is_refused_at_the_call(lab, handle, error, text, call):
    session = lab.open(DONE)
    with pytest.raises(error, match=text):
        getattr(session, call)(handle) if hasattr(session, call) else getattr(runpoll, call)(session, handle)
    assert not lab.requests


def test_every_kind_of_handle_names_the_same_run(lab):
    session = lab.open(run())
    state = session.poll("r1")
    for handle in ("r1", {"run_id": "r1"}, state, lab.server.url + "/jobs/r1"):
        assert session.poll(handle).params == {"run_id": "r1"}
    assert {request.path for request in lab.requests} == {"/jobs/r1"}


@pytest.mark.parametrize("url", [
    "https://evil.example/jobs/r1", "https://127.0.0.1:{port}/jobs/r1", "http://127.0.0.1:1/jobs/r1",
    "http://127.0.0.1/jobs/r1",
    "http://evil.example:{port}/jobs/r1", "http://user@127.0.0.1:{port}/jobs/r1",
    "http://127.0.0.1:{port}@evil.example/jobs/r1",
    "http://127.0.0.1:{port}/elsewhere/r1", "http://127.0.0.1:{port}/jobs/", "http://127.0.0.1:{port}/jobs/..",
    "http://127.0.0.1:{port}/jobs/%2e%2e", "http://127.0.0.1:{port}/jobs/a/b", "http://127.0.0.1:{port}", "http://",
])
def test_a_status_url_from_elsewhere_is_refused(lab, url):
    session = lab.open(DONE)
    with pytest.raises(ValueError):
        session.poll(url.format(port=lab.server.port))
    assert not lab.requests


def test_a_status_url_that_the_api_gives_is_reported_and_never_followed(lab):
    session = lab.open(run(status_url="https://evil.example/jobs/r1"), DONE)
    states = list(iter_status(session, session.start({})))
    assert states[0].status_url == "https://evil.example/jobs/r1" and lab.requests[1].path == "/jobs/r1"


def test_missing_and_unknown_start_parameters_are_named(lab, simulator):
    session = lab.session(simulator.api("rapidfolio"))
    with pytest.raises(TypeError, match="environment"):
        session.start({}, procedure_id="p")
    with pytest.raises(TypeError, match="colour"):
        session.start({}, procedure_id="p", environment="sandbox", colour="red")
    with pytest.raises(ValueError, match="procedure_id"):
        session.start({}, procedure_id="..", environment="sandbox")
    with pytest.raises(TypeError, match="run_id"):
        session.request("GET", "/runs/{run_id}")
    assert not simulator.requests


def test_an_api_without_a_start_template_starts_nothing(lab):
    with pytest.raises(ValueError, match="start"):
        lab.session(Api(base_url="https://api.example.com", status="/jobs/{run_id}")).start({})


# ---- Direct calls


def test_a_request_is_any_other_call_of_the_api(lab):
    session = lab.open(answer({"files": []}), answer(None, 204), headers={"X-Workspace-Id": "ws_1"})
    assert session.request("PUT", "/jobs/{run_id}/tags", ["a"], params={"run_id": "r/1"},
                           headers={"X-More": "2"}) == {"files": []}
    assert session.request("DELETE", "/tags") is None
    put, delete = lab.requests
    assert (put.method, put.path, put.body) == ("PUT", "/jobs/r%2F1/tags", ["a"]) and (delete.method,
                                                                                       delete.body) == ("DELETE", None)
    assert put.headers["Authorization"] == f"Bearer {KEY}" and put.headers["X-More"] == "2"
    assert put.headers["X-Workspace-Id"] == "ws_1"
    assert put.headers["User-Agent"] == f"runpoll/{runpoll.__version__}" and delete.headers["X-More"] is None


def test_a_start_sends_its_own_headers_too(lab):
    lab.open(run()).start({"a": 1}, headers={"X-Trace": "t1"})
    assert lab.requests[0].headers["X-Trace"] == "t1" and lab.requests[0].headers["Content-Type"] == "application/json"


def test_a_content_type_is_not_required_and_a_wrong_one_does_no_harm(lab):
    session = lab.open(run(), answer(run(), headers={"Content-Type": "text/html; charset=latin-1"}))
    assert session.poll("r1").status == session.poll("r1").status == "running"


def test_an_idempotency_key_in_a_header(lab):
    lab.open(run(), api=KEYED).start({"a": 1}, idempotency_key="order-7")
    assert lab.requests[0].headers["Idempotency-Key"] == "order-7" and lab.requests[0].body == {"a": 1}


def test_an_idempotency_key_for_an_api_that_has_none_is_refused(lab):
    session = lab.open(run())
    with pytest.raises(ValueError, match="idempotency"):
        session.start({}, idempotency_key="order-7")
    assert not lab.requests


# What a cancel is answered, and the status request after it; what the caller gets, and the number of requests.
CANCELS = [
    (run("cancelling"), None, True, 1),
    (run("cancelled"), None, True, 1),
    (run("running", cancel_requested=True), None, True, 1),
    (run("succeeded"), None, False, 1),
    (run("failed"), None, False, 1),
    ({"success": True}, run("running"), True, 2),
    ({"success": True}, run("cancelled"), True, 2),
    ({"success": True}, run("succeeded"), False, 2),
    (answer(None, 204), run("cancelled"), True, 2),
    (answer(b"<html>OK</html>"), run("failed"), False, 2),
    (answer({"id": "another", "status": "cancelled"}), run("succeeded"), False, 2),
    (answer([1]), run("cancelled"), True, 2),
    *[(status, run("succeeded"), False, 2) for status in (404, 409, 410, 422)],
    *[(status, run("cancelled"), True, 2) for status in (404, 409, 410, 422)],
    *[(status, run("running"), status, 2) for status in (404, 409, 410, 422)],
    *[(status, 404, status, 2) for status in (404, 409, 410, 422)],
    (403, None, 403, 1),
    (400, None, 400, 1),
    (500, None, 500, 4),
]


@pytest.mark.parametrize("first, second, outcome, requests", CANCELS)
def test_a_cancel_tells_whether_the_run_is_cancelled(lab, first, second, outcome, requests):
    session = lab.open(first, *([] if second is None else [second]))
    if isinstance(outcome, bool):
        assert session.cancel("r1") is outcome
    else:
        with pytest.raises(ApiError, match="r1") as caught:
            session.cancel("r1")
        assert caught.value.http_status == outcome
    assert len(lab.requests) == requests
    assert (lab.requests[0].method, lab.requests[0].path) == ("POST", "/jobs/r1/cancel")
    assert second is None or (lab.requests[1].method, lab.requests[1].path) == ("GET", "/jobs/r1")


@pytest.mark.parametrize("status, outcome", [("cancelled", True), ("succeeded", False), ("failed", False)])
def test_a_cancel_of_a_state_that_is_done_asks_nothing(lab, status, outcome):
    session = lab.open(500)
    assert session.cancel(ORDINARY.read_state(run(status))) is outcome and not lab.requests


@pytest.mark.parametrize("fault", [502, reset, answer(b"{")])
def test_a_cancel_is_tried_again(lab, fault):
    session = lab.open(fault, run("cancelled"), run("cancelled"))
    assert session.cancel("r1") is True


def test_a_closed_session_says_so(lab):
    session = lab.open(run())
    follow = iter_status(session, "r1")
    next(follow)
    session.close()
    session.close()
    for call in (lambda: session.poll("r1"), lambda: session.start({}), lambda: session.cancel("r1"),
                 lambda: next(follow),
                 lambda: session.request("GET", "/")):
        with pytest.raises(RuntimeError):
            call()
    assert len(lab.requests) == 1


def test_starts_from_several_threads_on_one_session(lab, simulator):
    session = lab.session(simulator.api("doclo"), **REAL)

    def follow(number: int) -> tuple[str, str]:
        begun = session.start({"input": {"number": number}}, flow_id=f"flow_{number}")
        return begun.id, wait(session, begun, interval=0).raw["flowId"]

    with ThreadPoolExecutor(8) as threads:
        ended = list(threads.map(follow, range(40)))
    assert [flow for _, flow in ended] == [f"flow_{number}" for number in range(40)]
    assert len({run_id for run_id, _ in ended}) == 40
    assert len({request.connection for request in simulator.requests}) <= 8


@pytest.mark.parametrize("options", [
    {"request_timeout": 0}, {"request_timeout": -1}, {"request_timeout": math.nan}, {"retries": -1},
    {"base_url": "ftp://127.0.0.1"},
    {"base_url": "127.0.0.1:80"}, {"base_url": "https://user:pw@api.example.com"},
])
def test_a_session_that_cannot_work_is_refused(options):
    with pytest.raises(ValueError):
        Session(ORDINARY, KEY, **options)


# ---- Iterating


def test_every_state_is_yielded_and_the_terminal_one_last(lab):
    session = lab.open(run("queued"), run("running"), run("running"), DONE, run("not asked for"))
    states = list(iter_status(session, "r1", interval=5))
    assert statuses(states) == ["queued", "running", "running", "succeeded"]
    assert [state.polls for state in states] == [1, 2, 3, 4]
    assert [state.elapsed for state in states] == pytest.approx([0, 5, 10, 15])
    assert lab.naps == [5, 5, 5] and len(lab.requests) == 4


def test_a_state_that_is_handed_in_is_yielded_first_without_a_request(lab):
    session = lab.open(DONE)
    begun = ORDINARY.read_state(run("queued"))
    follow = iter_status(session, begun, interval=5)
    first = next(follow)
    assert first == begun and first.polls == 0 and not lab.requests and not lab.naps
    assert next(follow).polls == 1 and lab.naps == [5]


def test_a_terminal_state_that_is_handed_in_costs_nothing(lab):
    session, done = lab.open(500), ORDINARY.read_state(DONE)
    assert list(iter_status(session, done)) == [done] and wait(session, done) == done
    assert not lab.requests and not lab.naps


def test_states_that_go_backwards_are_yielded_as_they_come(lab):
    session = lab.open(run("running", progress=0.5), run("queued", progress=0.1), DONE)
    assert statuses(iter_status(session, "r1")) == ["running", "queued", "succeeded"]


def test_wait_returns_the_last_state(lab):
    assert wait(lab.open(run(), run("failed", error="no")), "r1").error == ErrorInfo("no")


def test_a_loop_that_is_left_leaves_nothing_behind(lab):
    session = lab.open(run("awaiting_review"), DONE)
    for state in iter_status(session, "r1"):
        if state.phase is Phase.PAUSED:
            break
    assert session.poll(state).ok
    assert [request.connection for request in lab.requests] == [1, 1]


def test_a_loop_acts_once_per_phase_with_groupby(lab):
    session = lab.open(*[run("queued")] * 2, *[run()] * 3, run("paused"), run(), DONE)
    phases = [phase.value for phase, _ in itertools.groupby(iter_status(session, "r1"), key=lambda state: state.phase)]
    assert phases == ["pending", "running", "paused", "running", "succeeded"]


@pytest.mark.parametrize("arguments, error", [
    ({"interval": -1}, ValueError), ({"interval": math.nan}, ValueError), ({"interval": [1, -1]}, ValueError),
    ({"interval": []}, ValueError), ({"interval": "2"}, TypeError), ({"interval": None}, TypeError),
    ({"interval": [None]}, TypeError),
    ({"timeout": math.nan}, ValueError), ({"timeout": "5"}, TypeError), ({"max_outage": -1}, ValueError),
    ({"max_outage": math.nan}, ValueError), ({"max_outage": "5"}, TypeError),
])
@pytest.mark.parametrize("call", [iter_status, wait])
def test_wrong_arguments_are_refused_at_the_call(lab, arguments, error, call):
    session = lab.open(DONE)
    with pytest.raises(error):
        call(session, "r1", **arguments)
    assert not lab.requests


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_a_callable_interval_that_makes_no_sense_is_refused(lab, seconds):
    with pytest.raises(ValueError):
        wait(lab.open(run()), "r1", interval=lambda state: seconds)
    assert len(lab.requests) == 1


# ---- Pacing


def test_the_default_interval_grows_from_one_second_to_twelve(lab):
    wait(lab.open(*[run()] * 14, DONE), "r1")
    expected = [min(1.3**k, 12) for k in range(14)]
    assert all(0.9 * wanted - 1e-6 <= nap <= min(1.1 * wanted, 12) + 1e-6 for nap, wanted in zip(lab.naps, expected))
    assert len(lab.naps) == 14


@pytest.mark.parametrize("interval, naps", [
    (2, [2, 2, 2, 2]), (0.25, [0.25] * 4), ([1, 2, 5], [1, 2, 5, 5]), ((3,), [3, 3, 3, 3]),
    (lambda state: state.polls * 10, [10, 20, 30, 40]),
])
def test_an_interval_is_a_number_a_sequence_or_a_callable(lab, interval, naps):
    wait(lab.open(*[run()] * 4, DONE), "r1", interval=interval)
    assert lab.naps == pytest.approx(naps)


def test_an_interval_of_nothing_does_not_sleep(lab):
    assert wait(lab.open(*[run()] * 4, DONE), "r1", interval=0).polls == 5
    assert sum(lab.naps) == 0


def polled(polls: int = 1, **more: Any) -> RunState:
    return dataclasses.replace(ORDINARY.read_state(run(more.pop("status", "running"))), polls=polls, **more)


@pytest.mark.parametrize("options, state, seconds", [
    ({}, polled(0), 1), ({}, polled(1), 1), ({}, polled(2), 1.3), ({}, polled(5), 1.3**4), ({}, polled(11), 12),
    ({}, polled(10**6), 12),
    ({"initial": 2, "factor": 3, "maximum": 50}, polled(3), 18), ({"initial": 5, "factor": 1}, polled(9), 5),
    ({"initial": 20}, polled(1), 12),
    ({}, polled(10, eta=4.0), 2.8), ({}, polled(10, eta=0.1), 1), ({}, polled(10, eta=0.0), 1),
    ({}, polled(10, eta=1000.0), 1.3**9),
    ({"pace": 0.5}, polled(10, eta=4.0), 2), ({"pace": None}, polled(10, eta=4.0), 1.3**9), ({}, polled(1, eta=0.1), 1),
    ({"initial": 3, "factor": 2}, polled(9, eta=1.0), 3),
    ({}, polled(1, status="paused"), 30), ({"paused": 5}, polled(9, status="paused"), 5),
    ({}, polled(9, status="paused", eta=1.0), 30),
])
def test_the_backoff_is_a_function_of_the_state(options, state, seconds):
    assert runpoll.Backoff(**{"jitter": 0.0, **options})(state) == pytest.approx(seconds)


@pytest.mark.parametrize("backoff, state, least, most", [
    (runpoll.Backoff(), polled(1), 0.9, 1.1), (runpoll.Backoff(jitter=0.5), polled(4), 0.5 * 1.3**3, 1.5 * 1.3**3),
    (runpoll.Backoff(), polled(50), 10.8, 12), (runpoll.Backoff(), polled(1, status="paused"), 27, 33),
])
def test_the_jitter_stays_in_its_bounds(backoff, state, least, most):
    waits = [backoff(state) for _ in range(400)]
    assert least - 1e-9 <= min(waits) < max(waits) <= most + 1e-9
    assert max(waits) - min(waits) > (most - least) / 2


@pytest.mark.parametrize("options", [{"initial": -1}, {"factor": math.nan}, {"maximum": -1}, {"jitter": -0.1},
                                     {"pace": -1}, {"paused": -1}])
def test_a_backoff_that_cannot_work_is_refused(options):
    with pytest.raises(ValueError):
        runpoll.Backoff(**options)


def test_the_time_left_is_estimated_from_what_this_iteration_saw(lab):
    session = lab.open(*[run(progress=share) for share in (0.2, 0.2, 0.4, 0.7)], DONE)
    states = list(iter_status(session, "r1", interval=10))
    assert [state.eta for state in states[:2]] == [None, None]
    assert [state.eta for state in states[2:4]] == pytest.approx([0.6 / (0.2 / 20), 0.3 / (0.5 / 30)])


def test_a_run_taken_up_near_its_end_is_polled_at_its_own_pace(lab):
    session = lab.open(*[run(progress=share) for share in (0.90, 0.91, 0.92, 0.99)], DONE)
    wait(session, "r1", interval=runpoll.Backoff(initial=2, factor=10, maximum=1000, jitter=0))
    # 0.91 after 2 s leaves 18 s, and 0.92 after another 12.6 s leaves 58.4 s; 0.99 then is close to the end.
    assert lab.naps[:2] == pytest.approx([2, 0.7 * 18])
    assert lab.naps[2] == pytest.approx(0.7 * 0.08 / (0.02 / 14.6)) and lab.naps[3] < 6


def test_a_retry_after_on_a_good_answer_replaces_the_interval_once(lab):
    session = lab.open(run(), answer(run(), headers={"Retry-After": "7"}), run(), DONE)
    states = list(iter_status(session, "r1", interval=2))
    assert lab.naps == pytest.approx([2, 7, 2])
    assert [state.retry_after for state in states] == [None, 7.0, None, None]


def test_a_retry_after_on_a_start_holds_for_the_first_poll(lab):
    session = lab.open(answer(run(), 202, {"Retry-After": "5"}), run(), DONE)
    wait(session, session.start({}), interval=2)
    assert lab.naps == pytest.approx([5, 2])


def test_a_retry_after_on_a_good_answer_is_cut_to_two_minutes(lab):
    wait(lab.open(answer(run(), headers={"Retry-After": "3600"}), DONE), "r1", interval=2)
    assert lab.naps == pytest.approx([120])


@pytest.mark.parametrize("body, naps", [(3, [2, 2]), (5, []), (60, [])])
def test_the_time_that_the_loop_body_takes_is_part_of_the_interval(lab, body, naps):
    for _ in iter_status(lab.open(run(), run(), DONE), "r1", interval=5):
        lab.clock.now += body
    assert lab.naps == pytest.approx(naps)


def test_a_sleep_that_returns_early_is_slept_again(lab):
    def short(seconds: float) -> None:
        lab.clock.sleep(min(seconds, 2))

    session = lab.open(run(), DONE, sleep=short)
    wait(session, "r1", interval=5)
    assert lab.naps == pytest.approx([2, 2, 1]) and len(lab.requests) == 2


def test_the_real_clock_is_wired(lab):
    session = lab.open(run(), DONE, **REAL)
    begun = time.monotonic()
    assert wait(session, "r1", interval=0.05).elapsed >= 0.05 and time.monotonic() - begun >= 0.05


def test_the_defaults_are_the_real_clock():
    with Server(run(), DONE) as server, Session(ORDINARY, KEY, base_url=server.url) as session:
        begun = time.monotonic()
        last = wait(session, "r1", interval=0.05)
    assert last.ok and 0.05 <= last.elapsed <= time.monotonic() - begun


# ---- A sleep that ends what waits


def test_a_sleep_that_returns_true_ends_the_iteration(lab):
    stop = threading.Event()
    session = lab.open(run(), sleep=stop.wait, clock=time.monotonic)
    for state in iter_status(session, "r1", interval=3600):
        stop.set()
    assert state.status == "running" and len(lab.requests) == 1


def test_a_sleep_that_returns_true_ends_a_retry_in_an_iteration(lab):
    session = lab.open(run(), 502, sleep=lambda seconds: len(lab.requests) > 1)
    assert statuses(iter_status(session, "r1", interval=0)) == ["running"]


def test_a_sleep_that_returns_something_like_true_does_not(lab):
    def sleep(seconds: float) -> str:
        lab.clock.sleep(seconds)
        return "slept"

    assert wait(lab.open(run(), DONE, sleep=sleep), "r1").ok


def test_a_sleep_that_returns_true_makes_wait_a_timeout(lab):
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(run(), sleep=lambda seconds: True), "r1", timeout=None)
    assert caught.value.params == {"run_id": "r1"} and caught.value.state.status == "running"
    assert "sleep()" in str(caught.value) and "inf" not in str(caught.value)


def test_a_sleep_that_returns_true_in_a_retry_makes_wait_a_timeout_from_the_fault(lab):
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(503, sleep=lambda seconds: True), "r1")
    assert isinstance(caught.value.__cause__, ApiError)


def test_a_sleep_that_raises_stop_iteration_answers_nothing(lab):
    def sleep(seconds):
        raise StopIteration("mine")

    with pytest.raises(StopIteration, match="mine"):
        lab.open(503, sleep=sleep).poll("r1")


def test_a_sleep_that_returns_true_gives_up_a_direct_call_with_its_fault(lab):
    session = lab.open(503, sleep=lambda seconds: True)
    for call in (lambda: session.poll("r1"), lambda: session.cancel("r1"), lambda: session.request("GET", "/")):
        with pytest.raises(ApiError, match="503"):
            call()
    lab.server.answers = [429]
    with pytest.raises(ApiError, match="429"):
        session.start({})
    assert len(lab.requests) == 4


def test_what_sleep_raises_comes_out_unchanged(lab):
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait(lab.open(run(), sleep=sleep), "r1")
    with pytest.raises(KeyboardInterrupt):
        lab.open(502, sleep=sleep).poll("r1")


# ---- Deadlines


def test_the_last_sleep_is_cut_so_that_one_more_poll_fits(lab):
    with pytest.raises(PollTimeout):
        wait(lab.open(run()), "r1", interval=10, timeout=25)
    assert lab.naps[:3] == pytest.approx([10, 10, 4.9]) and sum(lab.naps) <= 25 and len(lab.requests) == 4


def test_the_last_poll_is_given_twice_the_time_of_the_one_before(lab):
    def slow(handler: Any) -> None:
        lab.clock.now += 1
        answer(run())(handler)

    with pytest.raises(PollTimeout):
        wait(lab.open(slow), "r1", interval=10, timeout=30)
    assert lab.naps[:3] == pytest.approx([10, 10, 5]) and len(lab.requests) == 4


def test_a_timeout_tells_what_was_seen_and_is_resumed_by_its_params(lab):
    session = lab.open(*[run("queued")] * 7, DONE)
    with pytest.raises(PollTimeout, match="r1.* 5 s.*queued.*goes on") as caught:
        wait(session, "r1", interval=1, timeout=5)
    assert isinstance(caught.value, TimeoutError) and caught.value.params == {"run_id": "r1"}
    assert caught.value.state.status == "queued" and caught.value.__cause__ is None
    assert wait(session, caught.value.params).ok


def test_a_timeout_while_faults_are_sat_out_is_raised_from_the_last(lab):
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(run(), 502, 503), "r1", timeout=20)
    assert isinstance(caught.value.__cause__, ApiError) and caught.value.__cause__.http_status == 503
    assert lab.clock.now <= 1020 and caught.value.state.status == "running"


@pytest.mark.parametrize("timeout", [0, -1, -math.inf])
def test_no_time_at_all_is_a_timeout_before_any_request(lab, timeout):
    session, begun = lab.open(DONE), ORDINARY.read_state(run())
    with pytest.raises(PollTimeout) as caught:
        next(iter_status(session, "r1", timeout=timeout))
    assert caught.value.state is None
    follow = iter_status(session, begun, timeout=timeout)
    assert next(follow) == begun
    with pytest.raises(PollTimeout) as caught:
        next(follow)
    assert caught.value.state == begun and not lab.requests and not lab.naps


def test_the_clock_starts_at_the_call(lab):
    follow = iter_status(lab.open(DONE), "r1", timeout=5)
    lab.clock.now += 6
    with pytest.raises(PollTimeout):
        next(follow)
    assert not lab.requests


def test_without_a_timeout_a_run_of_two_days_is_followed(lab):
    assert wait(lab.open(*[run()] * 48, DONE), "r1", interval=3600, timeout=None).elapsed == pytest.approx(48 * 3600)


def test_a_terminal_state_that_comes_just_in_time_is_returned(lab):
    assert wait(lab.open(run(), DONE), "r1", interval=60, timeout=5).ok
    assert lab.naps == pytest.approx([4.9])


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 35\r\n\r\n" + b'{"id": "r1", "status": "succeeded"}'
STALLS = {
    "hang": hang,
    "status line": wire(*in_bytes(b"HTTP/1.1 200 " + b"O" * 2000), every=0.02),
    "headers": wire(b"HTTP/1.1 200 OK\r\n", *in_bytes(b"X-Slow: " + b"s" * 2000), every=0.02),
    "many headers": wire(b"HTTP/1.1 200 OK\r\n", *[b"X-%d: 1\r\n" % number for number in range(90)], every=0.02),
    "body": wire(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n", *in_bytes(b" " * 2000), every=0.02),
    "chunks": wire(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 2000, every=0.02),
    "body without a length": wire(b"HTTP/1.1 200 OK\r\n\r\n", *in_bytes(b" " * 2000), every=0.02),
    "100 for ever": wire(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.001, repeat=True),
    "103 for ever": wire(b"HTTP/1.1 103 Early Hints\r\n\r\n", every=0.001, repeat=True),
    "half an answer": wire(OK[:50], b"", every=30),
}


@pytest.mark.parametrize("stall", STALLS.values(), ids=STALLS)
def test_the_timeout_of_an_iteration_holds_whatever_the_server_does(lab, stall):
    session = lab.open(stall, **REAL)
    begun = time.monotonic()
    with pytest.raises(PollTimeout, match="0.3 s"):
        wait(session, "r1", timeout=0.3)
    assert time.monotonic() - begun < 0.55


@pytest.mark.parametrize("after", [answer(None, 429, {"Retry-After": "3600"}),
                                   answer(None, 503, {"Retry-After": "3600"}),
                                   answer(run(), headers={"Retry-After": "3600"}), 502, reset])
def test_the_timeout_of_an_iteration_holds_in_every_wait(lab, after):
    session = lab.open(after, **REAL)
    begun = time.monotonic()
    with pytest.raises(PollTimeout):
        wait(session, "r1", timeout=0.3)
    assert time.monotonic() - begun < 0.55


@pytest.mark.parametrize("stall", STALLS.values(), ids=STALLS)
def test_the_request_timeout_bounds_one_attempt_however_it_drips(lab, stall):
    session = lab.open(stall, request_timeout=0.2, retries=0)
    begun = time.monotonic()
    with pytest.raises(TransportError, match="r1") as caught:
        session.poll("r1")
    assert time.monotonic() - begun < 0.45 and caught.value.sent and len(lab.requests) == 1


def test_the_request_timeout_holds_over_tls_too(lab, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(lab.certificate))
    session = lab.open(DONE, STALLS["body"], tls=True, request_timeout=0.3, retries=0)
    assert session.poll("r1").ok
    begun = time.monotonic()
    with pytest.raises(TransportError):
        session.poll("r1")
    assert time.monotonic() - begun < 0.55


def test_a_connection_that_stalled_is_not_used_again(lab):
    session = lab.open(STALLS["body"], DONE, request_timeout=0.1)
    assert session.poll("r1").ok
    assert [request.connection for request in lab.requests] == [1, 2]


# ---- Faults, and which of them are tried again


TRANSIENT = [408, 429, 500, 502, 503, 504, reset, wire(), answer(b"<html>"), answer(b"{"), answer(None),
             answer({"id": "r1"})]
FINAL = [400, 401, 402, 403, 404, 405, 409, 410, 413, 422, 426, 451, 301, 302, 303, 307, 308]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_poll_is_tried_again_after_a_transient_fault(lab, fault, caplog):
    state = lab.open(fault, fault, DONE).poll("r1")
    assert state.ok and len(lab.requests) == 3 and lab.naps == about(0.5, 1)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING and record.name == "runpoll"]
    assert len(warnings) == 2


@pytest.mark.parametrize("retries", [0, 1, 3, 7])
def test_the_retries_are_counted_and_their_waits_double_to_ten_seconds(lab, retries):
    with pytest.raises(ApiError, match="502"):
        lab.open(502, retries=retries).poll("r1")
    assert len(lab.requests) == retries + 1 and lab.naps == about(*[0.5, 1, 2, 4, 8, 10, 10][:retries])


def test_the_waits_of_retries_have_jitter(lab):
    session = lab.open(502, retries=1)
    for _ in range(5):
        with pytest.raises(ApiError):
            session.poll("r1")
    assert len(set(lab.naps)) > 1


@pytest.mark.parametrize("fault", FINAL)
def test_another_error_answer_is_final(lab, fault):
    session = lab.open(fault)
    for call in (lambda: session.poll("r1"), lambda: wait(session, "r1"), lambda: session.start({}),
                 lambda: session.request("GET", "/")):
        with pytest.raises(ApiError, match=str(fault)) as caught:
            call()
        assert caught.value.http_status == fault
    assert len(lab.requests) == 4 and not lab.naps


@pytest.mark.parametrize("method, requests", [("GET", 4), ("HEAD", 4), ("PUT", 4), ("DELETE", 4), ("OPTIONS", 4),
                                              ("POST", 1), ("PATCH", 1),
                                              ("get", 4)])
def test_a_request_is_tried_again_where_its_method_is_idempotent(lab, method, requests):
    with pytest.raises(ApiError):
        lab.open(502).request(method, "/things", None if method in ("HEAD", "GET") else {})
    assert len(lab.requests) == requests and {request.method for request in lab.requests} == {method.upper()}


BEGUN = {"408": 408, "500": 500, "502": 502, "503": 503, "503 later": answer(None, 503, {"Retry-After": "1"}),
         "504": 504,
         "504 html": answer(b"<html>", 504), "504 unknown": answer({"id": "r1", "status": "odd"}, 504),
         "504 no id": answer({}, 504),
         "reset": reset, "closed": wire(), "hang": hang, "html": answer(b"<html>"), "cut": wire(OK[:-5]),
         "empty": answer(None),
         "list": answer([1]), "103": wire(b"HTTP/1.1 103 Early Hints\r\n\r\n")}


@pytest.mark.parametrize("fault", BEGUN.values(), ids=BEGUN)
def test_a_start_is_never_sent_twice_where_the_first_may_have_begun_a_run(lab, fault):
    session = lab.open(fault, run(), request_timeout=0.1)
    with pytest.raises(runpoll.RunpollError, match="may have begun"):
        session.start({})
    assert len(lab.requests) == 1 and not lab.naps


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("fault", [408, 500, 503, reset, wire(OK[:-5]), answer(b"<html>")])
def test_a_request_that_may_have_been_carried_out_is_not_repeated(lab, method, fault):
    with pytest.raises(runpoll.RunpollError):
        lab.open(fault, run()).request(method, "/things", {})
    assert len(lab.requests) == 1 and not lab.naps


@pytest.mark.parametrize("fault", BEGUN.values(), ids=BEGUN)
def test_a_start_with_an_idempotency_key_is_sent_again_under_the_same_key(lab, fault):
    session = lab.open(fault, run(), api=KEYED, request_timeout=0.1)
    assert session.start({"a": 1}, idempotency_key="order-7").id == "r1"
    assert [(request.headers["Idempotency-Key"], request.body)
            for request in lab.requests] == [("order-7", {"a": 1})] * 2


def test_a_start_that_is_answered_429_is_sent_again(lab):
    assert lab.open(429, answer(None, 429, {"Retry-After": "3"}), run()).start({}).id == "r1"
    assert lab.naps == [pytest.approx(0.5, rel=0.26), pytest.approx(3)]


def test_a_start_that_made_no_connection_is_tried_again_and_says_that_nothing_has_begun(lab):
    session = lab.session(base_url=f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(TransportError) as caught:
        session.start({})
    assert caught.value.sent is False and caught.value.__cause__ is not None and lab.naps == about(0.5, 1, 2)
    assert "may have begun" not in str(caught.value)


@pytest.mark.parametrize("headers, wait_seconds", [
    ({"Retry-After": "7"}, 7), ({"Retry-After": "0.25"}, 0.25), ({"Retry-After": "120"}, 120),
    ({"retry-after": "7"}, 7),
    ({"Retry-After": "0"}, None), ({"Retry-After": "-5"}, None), ({"Retry-After": "soon"}, None),
    ({"Retry-After": "nan"}, None),
    ({"Retry-After": "inf"}, None), ({"Retry-After": ""}, None), ({"Retry-After": "1e2"}, None),
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
])
@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_retry_after_replaces_the_wait(lab, headers, wait_seconds, status):
    assert lab.open(answer({}, status, headers), DONE).poll("r1").ok
    assert lab.naps == (about(0.5) if wait_seconds is None else pytest.approx([wait_seconds]))


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
@pytest.mark.skipif(not hasattr(time, "tzset"), reason="sets the time zone")
def test_a_retry_after_may_be_a_date_in_any_form_of_http(lab, monkeypatch, form):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        date = time.strftime(form, time.gmtime(time.time() + 60))
        assert lab.open(answer({}, 503, {"Retry-After": date}), DONE).poll("r1").ok
    finally:
        monkeypatch.undo()
        time.tzset()
    assert lab.naps == [pytest.approx(59, abs=3)]


@pytest.mark.parametrize("status", [429, 503])
def test_a_retry_after_of_more_than_two_minutes_is_raised_outside_an_iteration(lab, status):
    session = lab.open(answer({}, status, {"Retry-After": "121"}))
    with pytest.raises(ApiError) as caught:
        session.poll("r1")
    assert caught.value.retry_after == 121 and len(lab.requests) == 1 and not lab.naps


def test_a_retry_after_is_cut_to_two_minutes_in_an_iteration(lab):
    assert wait(lab.open(answer({}, 429, {"Retry-After": "3600"}), DONE), "r1").ok
    assert lab.naps == pytest.approx([120])


@pytest.mark.parametrize("fault, held", [
    (answer({}, 429, {"Retry-After": "7"}), 7), (429, 0.5), (answer({}, 503, {"Retry-After": "7"}), 7), (503, 0),
    (502, 0),
])
def test_some_waits_hold_back_the_whole_session(lab, fault, held):
    session = lab.open(fault, run(), DONE)
    other: list[float] = []

    def meanwhile() -> None:  # another caller, while the first waits
        lab.clock.meanwhile = lambda: None
        before = lab.clock.now
        session.poll("r2")
        other.append(lab.clock.now - before)

    lab.clock.meanwhile = meanwhile
    assert session.poll("r1").ok
    assert other == [pytest.approx(held, rel=0.26)]


def test_faults_are_counted_since_the_last_good_answer_and_use_up_no_interval(lab):
    session = lab.open(run(), 502, reset, run(), run(), DONE)
    states = list(iter_status(session, "r1", interval=[3, 4, 5]))
    assert [(state.polls, state.faults) for state in states] == [(1, 0), (2, 2), (3, 0), (4, 0)]
    assert lab.naps[:1] + lab.naps[3:] == [3, 4, 5] and lab.naps[1:3] == about(0.5, 1)


@pytest.mark.parametrize("max_outage", [60, 10, 0])
def test_an_outage_is_sat_out_for_max_outage_seconds(lab, max_outage):
    with pytest.raises(ApiError, match="502"):
        wait(lab.open(run(), 502), "r1", interval=5, timeout=None, max_outage=max_outage)
    assert max_outage <= lab.clock.now - 1005 <= max_outage + 12.6 and (max_outage or len(lab.requests) == 2)


def test_an_outage_begins_anew_after_a_good_answer(lab):
    session = lab.open(*[502, 502, 502, 502, 502, run()] * 10, DONE)  # each about 15 s long
    assert wait(session, "r1", timeout=None, max_outage=20).polls == 11


def test_without_max_outage_nothing_but_the_timeout_ends_an_outage(lab):
    with pytest.raises(PollTimeout):
        wait(lab.open(502), "r1", timeout=3600, max_outage=None)
    assert lab.clock.now >= 4590


def test_being_asked_to_slow_down_is_no_outage(lab):
    session = lab.open(*[answer({}, 429, {"Retry-After": "60"})] * 60, DONE)
    assert wait(session, "r1", timeout=None, max_outage=5).faults == 60
    assert sum(lab.naps) == pytest.approx(3600)


def test_a_run_of_two_hours_survives_six_502s_and_fifty_seconds_of_refused_connections(lab):
    port = closed_port()
    session = lab.session(base_url=f"http://127.0.0.1:{port}")
    first = Server(run(), *[502] * 6, run(), port=port)
    follow = iter_status(session, "r1", timeout=3 * 3600)
    with first:
        assert [next(follow).faults for _ in range(2)] == [0, 6]
    back = lab.clock.now + 50
    started: list[Server] = []

    def meanwhile() -> None:
        if lab.clock.now > back and not started:
            started.append(lab.enter(Server(*[run()] * 600, DONE, port=port)))

    lab.clock.meanwhile = meanwhile
    states = list(follow)
    assert states[0].faults >= 3 and states[-1].ok and states[-1].elapsed > 7000


def test_a_run_just_started_may_not_be_found_yet(lab):
    session = lab.open(run("queued"), 404, 404, 404, run(), DONE)
    assert wait(session, session.start({}), interval=1).ok and len(lab.requests) == 6


def test_a_run_just_started_is_looked_for_ten_seconds(lab):
    session = lab.open(run("queued"), 404)
    with pytest.raises(ApiError, match="404"):
        wait(session, session.start({}), interval=1)
    assert 10 <= lab.clock.now - 1001 <= 20


@pytest.mark.parametrize("handed", [True, False])
def test_a_run_that_was_seen_or_named_and_is_not_found_is_gone(lab, handed):
    session = lab.open(*([run(), 404] if handed else [404]))
    with pytest.raises(ApiError, match="404"):
        wait(session, ORDINARY.read_state(run()) if handed else "r1")
    assert len(lab.requests) == 1 + handed


# ---- Strange answers


def huge(handler: Any) -> None:
    with contextlib.suppress(OSError):
        wire(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 2**30, *[b" " * 2**16] * 2**14)(handler)
    handler.close_connection = True


def bomb(size: int) -> Any:
    return answer(gzip.compress(b" " * size), headers={"Content-Encoding": "gzip"})


def framed(head: bytes, body: bytes = b"") -> Any:
    return wire(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body)


STRANGE = {
    "truncated": wire(OK[:-5]),
    "cut in the headers": wire(OK[:30]),
    "closed": wire(),
    "reset": reset,
    "not HTTP": wire(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "html": answer(b"<!doctype html>\n<title>Sign in</title>"),
    "empty": answer(None),
    "blank": answer(b" \r\n"),
    "no content": answer(None, 204),
    "null": answer(b"null"),
    "a list": answer([run()]),
    "a text": answer("running"),
    "no status": answer({"id": "r1"}),
    "deep": answer(b"[" * 200_000),
    "deep objects": answer(b'{"a":' * 200_000),
    "half of JSON": answer(b'{"id": "r1", "status": "runn'),
    "two of them": answer(b'{"id": "r1", "status": "running"}{"id": "r1"}'),
    "bad UTF-8": answer(b'{"id": "r1", "status": "\xff\xfe"}'),
    "UTF-16 in half": answer('{"id": "r1", "status": "running"}'.encode("utf-16")[:-1]),
    "10,000 headers": wire(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(10_000)) + b"\r\n"),
    "a long header": framed(b"X-Long: " + b"x" * 100_000),
    "a long status line": wire(b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n\r\n"),
    "garbage in chunks": framed(b"Transfer-Encoding: chunked", b"ZZZ\r\n{}\r\n0\r\n\r\n"),
    "chunks cut short": framed(b"Transfer-Encoding: chunked",
                               b"21\r\n" + b'{"id": "r1", "status": "running"}\r\n'[:20]),
    "no gzip": answer(b"{}{}{}{}", headers={"Content-Encoding": "gzip"}),
    "gzip cut short": answer(gzip.compress(json.dumps(run(text=os.urandom(99).hex())).encode())[:-30],
                             headers={"Content-Encoding": "gzip"}),
    "103 alone": wire(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"),
    "101": wire(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    "a bad length": framed(b"Content-Length: -5", b"{}"),
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_a_strange_answer_is_one_of_our_errors(lab, strange):
    session = lab.open(strange, retries=0, request_timeout=2)
    with pytest.raises((BadResponse, TransportError), match="r1") as caught:
        session.poll("r1")
    error = caught.value
    assert error.params == {"run_id": "r1"} and 20 < len(str(error)) < 1000 and "\n" not in str(error)
    assert isinstance(error, TransportError) or (error.http_status in (200, 204) and len(error.body) <= 500)


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_a_strange_answer_is_sat_out_in_an_iteration(lab, strange):
    assert statuses(iter_status(lab.open(run(), strange, DONE, request_timeout=2), "r1")) == ["running", "succeeded"]


@pytest.mark.parametrize("strange, status", [
    (wire(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n" + OK), "succeeded"),
    (wire(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + OK), "succeeded"),
    (answer(gzip.compress(json.dumps(DONE).encode()), headers={"Content-Encoding": "gzip"}), "succeeded"),
    (framed(b"Transfer-Encoding: chunked", b"21\r\n" + b'{"id": "r1", "status": "running"}\r\n0\r\n\r\n'), "running"),
    (framed(b"Connection: close", b'{"id": "r1", "status": "running"}'), "running"),
    (answer(b'{"id": "r1", "status": "running", "score": NaN}'), "running"),
    (answer('\ufeff{"id": "r1", "status": "l\u00e4uft"}'.encode()[3:]), "l\u00e4uft"),
    (answer(b'{"id": "r1", "status": "\\ud800"}'), "\ud800"),
])
def test_an_unusual_answer_is_read_all_the_same(lab, strange, status):
    assert lab.open(strange, retries=0).poll("r1").status == status


def test_a_number_of_5000_digits_is_sat_out_or_read(lab):
    session = lab.open(answer(b'{"id": "r1", "status": "running", "steps_done": ' + b"9" * 5000 + b"}"), DONE)
    assert statuses(iter_status(session, "r1")) in (["succeeded"], ["running", "succeeded"])


@pytest.mark.parametrize("large", [huge, bomb(2**26), answer(b" " * 2001),
                                   framed(b"Transfer-Encoding: chunked", b"FFFFFF\r\n" + b" " * 2**20)],
                         ids=["1 GiB", "gzip", "a byte too many", "chunked"])
@pytest.mark.parametrize("call", ["poll", "iter_status", "start"])
def test_an_answer_over_max_body_is_final(lab, large, call):
    session = lab.open(large, max_body=2000)
    with pytest.raises(BadResponse, match="2,?000") as caught:
        session.start({}) if call == "start" else session.poll("r1") if call == "poll" else wait(session, "r1")
    assert len(lab.requests) == 1 and not lab.naps and 0 < len(caught.value.body) <= 500


def test_an_answer_of_just_max_body_is_read(lab):
    content = json.dumps(DONE).encode()
    assert lab.open(answer(content), max_body=len(content)).poll("r1").ok


def test_a_stale_kept_alive_connection_is_replaced(lab):
    def leave(handler: Any) -> None:
        answer(run())(handler)
        handler.close_connection = True  # without having said so

    session = lab.open(leave, leave, DONE)
    assert statuses(iter_status(session, "r1")) == ["running", "running", "succeeded"]
    assert [request.connection for request in lab.requests] == [1, 2, 3]


def test_the_answer_of_an_abandoned_request_is_not_taken_for_the_next(lab):
    late = wire(b"", OK, every=0.2, close=False)
    session = lab.open(late, run("running"), request_timeout=0.1)
    assert session.poll("r1").status == "running"


# ---- The key


def shown(error: BaseException) -> str:
    """All that a log or a crash report may show of an error."""
    return "\n".join([str(error), repr(error), repr(error.args), repr(vars(error)), str(pickle.dumps(error, 0)),
                      *traceback.format_exception(type(error), error, error.__traceback__)])


ECHOES = {
    "error": answer({"error": f"bad key {KEY}", "code": KEY}, 403, {"X-Request-Id": KEY}),
    "text": answer(f"bad key {KEY}".encode(), 400),
    "transient": answer({"error": {"message": KEY, "details": {"key": [KEY]}}}, 503, {"Retry-After": "1"}),
    "redirect": answer(None, 302, {"Location": f"https://evil.example/?key={KEY}"}),
    "redirect path": answer(None, 307, {"Location": f"https://evil.example/{KEY}"}),
    "html": answer(f"<html>{KEY}</html>".encode()),
    "no state": answer({"key": KEY}),
    "status line": wire(f"{KEY} nonsense\r\n".encode()),
    "chunks": framed(b"Transfer-Encoding: chunked", f"{KEY}\r\n".encode()),
    "reason": wire(f"HTTP/1.1 403 {KEY}\r\nContent-Length: 0\r\n\r\n".encode()),
    "escaped": answer(b'{"error": "' + "".join(f"\\u{ord(letter):04x}" for letter in KEY).encode() + b'"}', 400),
    "slashed": answer(b'{"error": "' + KEY.replace("/", "\\/").encode() + b'"}', 400),
    "no header": wire(f"HTTP/1.1 403 No\r\nContent-Length: 0\r\nyou sent {KEY}\r\nX-A: b\r\n\r\n".encode()),
    "no header either": wire(f"HTTP/1.1 403 No\r\nContent-Length: 0\r\nX-A: b\r\r\n{KEY}\r\n\r\n".encode()),
    "cut": answer(("x" * (500 - len(KEY) // 2) + KEY).encode(), 400),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_a_key_that_the_api_echoes_is_in_no_error_log_or_pickle(lab, echo, caplog):
    caplog.set_level(logging.DEBUG, "runpoll")
    session = lab.open(echo, retries=1)
    for call in (lambda: session.poll("r1"), lambda: session.start({}), lambda: wait(session, "r1", timeout=9)):
        with pytest.raises(runpoll.RunpollError) as caught:
            call()
        cause = caught.value.__cause__
        assert KEY not in shown(caught.value) and (cause is None or KEY not in shown(cause))
    assert KEY not in caplog.text


def test_a_status_word_that_is_the_key_is_not_shown(lab, caplog):
    caplog.set_level(logging.DEBUG, "runpoll")
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(run(KEY)), "r1", timeout=9)
    assert KEY not in str(caught.value) and KEY not in caplog.text


def test_every_poll_is_logged_at_debug_level(lab, caplog):
    caplog.set_level(logging.DEBUG, "runpoll")
    wait(lab.open(run(), run(), DONE), "r1")
    polls = [record.getMessage() for record in caplog.records
             if record.name == "runpoll" and record.levelno == logging.DEBUG]
    assert len(polls) == 3 and all("r1" in text for text in polls) and "running" in polls[0] and "succeeded" in polls[2]


def test_the_repr_of_a_session_shows_no_key(lab):
    session = lab.open(DONE, headers={"X-Other-Key": "second-secret"})
    assert KEY not in repr(session) and "second-secret" not in repr(session) and lab.server.url in repr(session)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_redirect_is_never_followed(lab, status, method):
    elsewhere = lab.enter(Server(DONE))
    session = lab.open(answer(None, status, {"Location": elsewhere.url + "/jobs/r1?a=b"}))
    with pytest.raises(ApiError) as caught:
        session.poll("r1") if method == "GET" else session.start({})
    assert elsewhere.url in str(caught.value) and caught.value.http_status == status
    assert not elsewhere.requests and len(lab.requests) == 1


@pytest.mark.parametrize("key", ["a\nb", "a\r\nX-Evil: 1", "a\x00b", "a\x7fb"])
def test_a_control_character_in_a_key_is_refused(lab, key):
    with pytest.raises(ValueError) as caught:
        lab.session(key=key)
    assert key not in str(caught.value)
    session = lab.open(DONE, key=lambda: key)
    with pytest.raises(ValueError):
        session.poll("r1")
    assert not lab.requests


def test_white_space_around_a_key_is_dropped(lab):
    lab.open(DONE, key=f" {KEY}\n").poll("r1")
    lab.session(key=lambda: f"{KEY}\r\n", base_url=lab.server.url).poll("r1")
    assert [request.headers["Authorization"] for request in lab.requests] == [f"Bearer {KEY}"] * 2


def test_a_callable_key_is_asked_for_every_attempt(lab):
    keys = map("key-{}".format, itertools.count(1))
    wait(lab.open(run(), 502, DONE, key=lambda: next(keys)), "r1")
    assert [request.headers["Authorization"] for request in lab.requests] == ["Bearer key-1", "Bearer key-2",
                                                                              "Bearer key-3"]


@pytest.mark.parametrize("call", ["poll", "start", "request"])
def test_a_401_under_a_callable_key_is_tried_again_once(lab, call):
    keys = map("key-{}".format, itertools.count(1))
    session = lab.open(401, run(), 401, key=lambda: next(keys))
    ask = {"poll": lambda: session.poll("r1"), "start": lambda: session.start({}),
           "request": lambda: session.request("POST", "/")}[call]
    assert ask() and [request.headers["Authorization"] for request in lab.requests] == ["Bearer key-1", "Bearer key-2"]
    with pytest.raises(ApiError, match="401"):
        ask()
    assert len(lab.requests) == 4 and sum(lab.naps) < 3


def test_a_401_is_tried_again_once_a_request_whatever_comes_between(lab):
    session = lab.open(401, 500, 401, DONE, key=lambda: KEY)
    with pytest.raises(ApiError, match="401"):
        session.poll("r1")
    assert len(lab.requests) == 3


@pytest.mark.parametrize("raised", [KeyError("vault"), TransportError("the vault is shut"),
                                    ApiError("the vault", http_status=401), BadResponse("the vault")], ids=repr)
def test_what_a_callable_key_raises_comes_out_unchanged(lab, raised):
    calls = []

    def ask():
        calls.append(1)
        raise raised

    session = lab.open(DONE, key=ask)
    for call in (session.poll, lambda run: wait(session, run), lambda run: list(iter_batch(session, [run], timeout=9))):
        with pytest.raises(type(raised)) as caught:
            call("r1")
        assert caught.value is raised and calls == [1] and not lab.requests and not lab.naps
        calls.clear()


@pytest.mark.parametrize("keys", [("old-secret", "new-secret"), ("the-secret", "the-secret-secret"), ("a-secret-secret", "a-secret")])
def test_a_key_that_was_given_up_is_not_shown_either(lab, caplog, keys):
    old, new = keys
    keys = iter(keys)
    session = lab.open(401, answer({"error": f"neither {old} nor {new}"}, 403), key=lambda: next(keys))
    with pytest.raises(ApiError) as caught:
        session.poll("r1")
    assert "-secret" not in shown(caught.value) + caplog.text and "neither [key] nor [key]" in str(caught.value)


@pytest.mark.parametrize("base_url, error", [
    ("http://api.example.com", ValueError), ("http://127.0.0.1.evil.example", ValueError),
    ("http://localhost.evil.example", ValueError),
    ("http://10.0.0.1", ValueError), ("http://localhost:8000", None), ("http://127.0.0.1:8000", None),
    ("http://[::1]:8000", None),
    ("http://127.8.8.8", None), ("https://api.example.com", None),
])
def test_a_key_goes_over_plain_http_to_the_loopback_alone(lab, base_url, error):
    with pytest.raises(error, match="http") if error else contextlib.nullcontext():
        lab.session(base_url=base_url)
    lab.session(key=None, base_url=base_url)
    lab.session(base_url=base_url, allow_http=True)


# ---- Proxies and TLS


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_the_environments_proxy_is_used(lab, monkeypatch, name):
    proxy = lab.enter(Server(run(), DONE))
    monkeypatch.setenv(name, proxy.url)
    session = lab.session(base_url="http://api.test/v1", allow_http=True)
    assert wait(session, "r1").ok
    assert [request.path.replace(":80/", "/") for request in proxy.requests] == ["http://api.test/v1/jobs/r1"] * 2
    assert {request.connection for request in proxy.requests} == {1}


def test_https_goes_through_a_tunnel(lab, monkeypatch):
    proxy = lab.enter(Server(wire(b"HTTP/1.1 200 Connection established\r\n\r\n")))  # and then goes away
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    with pytest.raises(TransportError) as caught:
        lab.session(base_url="https://api.test").poll("r1")
    assert (proxy.requests[0].method, proxy.requests[0].path) == ("CONNECT", "api.test:443")
    assert "Authorization" not in proxy.requests[0].headers and KEY not in shown(caught.value)


@pytest.mark.parametrize("refusal", [503, wire(b"SSH-2.0-OpenSSH_9.9\r\n"), wire(b"HTTP/1.1 200 " + b"x" * 70_000)],
                         ids=["503", "no HTTP", "a long line"])
@pytest.mark.parametrize("own", [True, False], ids=["environment", "pool"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python 3.9 leaves a refused tunnel open
def test_a_start_that_a_proxy_did_not_let_through_is_tried_again(lab, monkeypatch, refusal, own):
    proxy = lab.enter(Server(refusal))
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    session = lab.session(base_url="https://api.test", retries=2, pool=None if own else urllib3.ProxyManager(proxy.url))
    with pytest.raises(TransportError) as caught:
        session.start({})
    unsent = own or refusal == 503
    assert caught.value.sent is not unsent and len(proxy.requests) == (3 if unsent else 1)
    del caught
    gc.collect()


def test_a_proxy_may_be_an_ipv6_address(lab, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://[::1]:{closed_port()}")
    with pytest.raises(TransportError, match="(?i)refused|assign|unreachable"):
        lab.session(base_url="https://api.test", retries=0).poll("r1")


def test_a_tunnel_is_part_of_the_attempt(lab, monkeypatch):
    proxy = lab.enter(Server(wire(b"", b"HTTP/1.1 200 Connection established\r\n\r\n", b"", every=0.2, repeat=True)))
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    begun = time.monotonic()
    with pytest.raises(TransportError) as caught:
        lab.session(base_url="https://api.test", request_timeout=0.3, retries=0, **REAL).start({})
    assert time.monotonic() - begun < 0.45 and caught.value.sent is False


def test_what_tls_took_is_no_time_to_send_in(lab, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(lab.certificate))
    tls, over = lab.tls(), threading.Event()

    def shake_hands_late_and_read_nothing():
        connection, _ = server.accept()
        over.wait(0.3)
        with tls.wrap_socket(connection, server_side=True):
            over.wait(5)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=shake_hands_late_and_read_nothing)
        thread.start()
        session = lab.session(base_url=f"https://127.0.0.1:{server.getsockname()[1]}", request_timeout=0.4, retries=0, **REAL)
        begun = time.monotonic()
        with pytest.raises(TransportError, match="no answer within 0.4 s"):
            session.start({"much": "x" * 2**24})
        took = time.monotonic() - begun
        over.set()
        thread.join()
    assert took < 0.62


def test_a_start_that_tls_did_not_let_through_is_tried_again(lab):
    plain = lab.enter(Server(wire(b"I do not speak TLS\r\n")))
    session = lab.session(base_url=plain.url.replace("http:", "https:"), retries=2)
    with pytest.raises(TransportError) as caught:
        session.start({})
    assert caught.value.sent is False and str(caught.value).endswith("no run has begun") and len(lab.naps) == 2


@pytest.mark.parametrize("hosts", ["127.0.0.1", "*", "api.test,127.0.0.1"])
def test_no_proxy_is_obeyed(lab, monkeypatch, hosts):
    proxy = lab.enter(Server(500))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", hosts)
    assert lab.open(DONE).poll("r1").ok and not proxy.requests


def test_a_ready_pool_is_used_and_left_open(lab):
    with urllib3.PoolManager(headers={"X-Mine": "yes"}) as pool:
        with lab.open(run(), DONE, pool=pool) as session:
            assert wait(session, "r1").ok
        assert pool.request("GET", lab.server.url).status == 200
    assert {request.connection for request in lab.requests} == {1} and len(lab.requests) == 3


def test_a_ready_pool_follows_no_redirects_and_retries_nothing_by_itself(lab):
    elsewhere = lab.enter(Server(DONE))
    with urllib3.PoolManager(retries=9) as pool:
        session = lab.open(answer(None, 302, {"Location": elsewhere.url}), reset, pool=pool, retries=0)
        for error in (ApiError, TransportError):
            with pytest.raises(error):
                session.poll("r1")
    assert not elsewhere.requests and len(lab.requests) == 2


def test_a_server_that_signed_its_own_certificate_is_refused(lab):
    session = lab.open(DONE, tls=True)
    for call in (lambda: session.poll("r1"), lambda: wait(session, "r1"), lambda: session.start({})):
        with pytest.raises(TransportError, match="(?i)certificate"):
            call()
    assert not lab.requests and not lab.naps


def test_a_private_authority_is_trusted_by_a_ready_pool(lab):
    with urllib3.PoolManager(ca_certs=str(lab.certificate)) as pool:
        assert lab.open(DONE, tls=True, pool=pool).poll("r1").ok


def test_https_verifies_by_the_environments_authorities(lab, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(lab.certificate))
    session = lab.open(run(), DONE, tls=True)
    assert wait(session, session.start({})).ok
    assert {request.connection for request in lab.requests} == {1}


# ---- Errors


def provoked(lab: Lab) -> Iterator[BaseException]:
    session = lab.open(answer({"error": {"code": "E7", "message": "no"}}, 403, {"X-Request-Id": "req_1"}),
                       answer(b"<html>"), reset,
                       answer({}, 429, {"Retry-After": "300"}), run(), retries=0)
    for call in (lambda: session.poll("r1"), lambda: session.poll("r1"), lambda: session.poll("r1"),
                 lambda: session.start({}),
                 lambda: wait(session, "r1", timeout=5), lambda: ORDINARY.read_state({}),
                 *[ORDINARY.read_state(run(word, error="no")).result for word in ("failed", "cancelled", "running")]):
        try:
            call()
        except runpoll.RunpollError as error:
            yield error


def test_every_error_pickles_and_copies(lab):
    errors = list(provoked(lab))
    assert [type(error).__name__ for error in errors] == [
        "ApiError", "BadResponse", "TransportError", "ApiError", "PollTimeout", "BadResponse", "RunFailed",
        "RunCancelled", "RunNotDone"]
    names = ("params", "sent", "http_status", "error", "body", "request_id", "retry_after", "state")
    for error in errors:
        assert isinstance(error, runpoll.RunpollError)
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(twin) is type(error) and str(twin) == str(error) != ""
            assert [getattr(twin, name, "-") for name in names] == [getattr(error, name, "-") for name in names]


def test_the_errors_are_what_the_contract_says():
    assert issubclass(runpoll.RunpollError, Exception) and issubclass(PollTimeout, TimeoutError)
    for name in ("TransportError", "ApiError", "BadResponse", "PollTimeout", "RunFailed", "RunCancelled", "RunNotDone"):
        assert issubclass(getattr(runpoll, name), runpoll.RunpollError)


def test_a_starts_error_concerns_no_run_and_says_whether_one_may_have_begun(lab):
    session = lab.open(500, 403, reset)
    for error, begun in ((ApiError, True), (ApiError, False), (TransportError, True)):
        with pytest.raises(error, match="/jobs") as caught:
            session.start({})
        assert caught.value.params is None and ("may have begun" in str(caught.value)) is begun


def test_a_start_over_a_connection_of_unknown_age_takes_a_fresh_one(lab):
    pool = urllib3.PoolManager()
    session = lab.open(run(), run(), pool=pool)
    session.poll("r1")
    session.start({})
    session.poll("r1")
    assert [request.connection for request in lab.server.requests] == [1, 2, 2]
    pool.clear()


def test_a_start_right_after_another_request_keeps_its_connection(lab):
    session = lab.open(run(), run())
    session.poll("r1")
    session.start({})
    assert [request.connection for request in lab.server.requests] == [1, 1]


# ---- Many runs at once


class Fleet(Server):
    """Many runs, each with answers of its own, the last one again and again; it keeps when each was asked for.

    An answer is a status word, a body, or whatever `Server` takes. `limit` is (requests, seconds): so many a window.
    """

    def __init__(self, clock: Callable[[], float], plans: Mapping[str, Any]) -> None:
        super().__init__()
        self.clock, self.begun = clock, clock()
        self.plans = {name: [plan] if isinstance(plan, (str, int)) else list(plan) for name, plan in plans.items()}
        self.asked: list[tuple[float, str]] = []
        self.refusals: list[tuple[float, float]] = []  # when, and the Retry-After
        self.limit: tuple[int, float] | None = None
        self.meanwhile: Callable[[str], object] = lambda name: None  # what else happens while a request is in flight
        self.flying = self.most = 0
        self.threads: set[threading.Thread] = set()
        self.others = set(threading.enumerate())

    def opened(self, connection: socket.socket) -> int:
        self.threads.add(threading.current_thread())
        return super().opened(connection)

    def respond(self, request: Request) -> Callable[[_Handler], None]:
        name = unquote(request.path.rpartition("/")[2])
        with self._lock:
            now = round(self.clock() - self.begun, 3)
            self.requests.append(request)
            self.asked.append((now, name))
            self.flying += 1
            self.most = max(self.most, self.flying)
            item = self.choose(name, now)

        def send(handler: _Handler) -> None:
            try:
                self.meanwhile(name)
            finally:
                with self._lock:
                    self.flying -= 1
            item(handler)

        return send

    def choose(self, name: str, now: float) -> Callable[[_Handler], None]:
        if self.limit and len(self.asked) - len(self.refusals) > self.taken(now) + self.limit[0]:
            self.refusals.append((now, self.limit[1] - now % self.limit[1]))
            return answer({"error": "slow down"}, 429, {"Retry-After": f"{self.refusals[-1][1]:.3f}"})
        plan = self.plans[name]
        item = plan.pop(0) if len(plan) > 1 else plan[0]
        if callable(item):
            return item  # type: ignore[no-any-return]
        if isinstance(item, (int, bytes)):
            return answer({"error": f"no. {item}"}, item) if isinstance(item, int) else answer(item)
        return answer({"id": name, **({"status": item} if isinstance(item, str) else item)})

    def taken(self, now: float) -> int:
        """How many requests were let through in the windows before."""
        assert self.limit
        start = now - now % self.limit[1]
        return sum(at < start for at, _ in self.asked) - sum(at < start for at, _ in self.refusals)

    def times(self, name: str) -> list[float]:
        return [now for now, asked in self.asked if asked == name]

    def clients(self) -> set[threading.Thread]:
        """The threads that are neither the test's nor the server's."""
        return set(threading.enumerate()) - self.others - {self._thread} - self.threads


def fleet(lab: Lab, plans: Mapping[str, Any], key: Any = KEY, **options: Any) -> tuple[Fleet, Session]:
    opened = lab.enter(Fleet(options.get("clock", lab.clock), plans))
    return opened, lab.session(key=key, base_url=opened.url, **options)


def becomes_true(condition: Callable[[], object]) -> bool:
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.005)
    return False


def handed(name: str, status: str = "running") -> RunState:
    return ORDINARY.read_state({"id": name, "status": status})


def slept(lab: Lab) -> list[float]:
    return [round(nap, 3) for nap in lab.naps if nap > 0]


def test_the_states_of_many_runs_arrive_and_end(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["queued", "running", "done"], "b": ["done"], "c": ["running", "failed"]})
    states = list(iter_batch(session, ["a", "b", "c"], timeout=300, interval=1))
    assert {name: [state.status for state in states if state.id == name] for name in "abc"} == {
        "a": ["queued", "running", "done"], "b": ["done"], "c": ["running", "failed"]}
    assert [state.params for state in states if state.done] == [{"run_id": "b"}, {"run_id": "c"}, {"run_id": "a"}]
    assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in server.requests)


def test_each_run_of_a_batch_has_its_own_schedule(lab: Lab) -> None:
    plan = ["running", "running", "running", "done"]
    server, session = fleet(lab, {"a": plan, "b": plan, "c": plan})
    waits = {"a": 1.0, "b": 2.5, "c": 4.0}
    states = list(iter_batch(session, list(waits), timeout=300, interval=lambda state: waits[state.id]))
    assert [server.times(name) for name in waits] == [[0, 1, 2, 3], [0, 2.5, 5, 7.5], [0, 4, 8, 12]]
    for name in waits:
        of_it = [state for state in states if state.id == name]
        assert [state.polls for state in of_it] == [1, 2, 3, 4]
        assert [state.elapsed for state in of_it] == pytest.approx(server.times(name))
    assert [state.elapsed for state in states] == sorted(state.elapsed for state in states)


def test_a_sequence_of_intervals_is_counted_by_run(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running"] * 3 + ["done"], "b": ["running", 503, "running", "done"]})
    assert len(list(iter_batch(session, ["a", "b"], timeout=300, interval=[1, 10, 3]))) == 7
    assert server.times("a") == [0, 1, 11, 14]
    assert [at for at in server.times("b") if at != server.times("b")[2]] == [0, 1, pytest.approx(11.5, abs=0.11)]


def test_a_retry_after_on_a_good_answer_replaces_the_interval_of_its_run_once(lab: Lab) -> None:
    later = answer({"id": "a", "status": "running"}, 200, {"Retry-After": "7"})
    server, session = fleet(lab, {"a": [later, "running", "done"], "b": ["running", "running", "done"]})
    list(iter_batch(session, ["a", "b"], timeout=300, interval=2))
    assert (server.times("a"), server.times("b")) == ([0, 7, 9], [0, 2, 4])


@pytest.mark.parametrize("plan", [
    ["queued", "running", "done"], ["done"], [answer({}, 503, {"Retry-After": "3"}), "running", "done"],
    [answer({}, 429, {"Retry-After": "9"}), "running", answer(b"<html>", 503, {"Retry-After": "4"}), "failed"],
])
def test_a_batch_of_one_is_what_iter_status_yields(lab: Lab, plan: list[Any]) -> None:
    _, session = fleet(lab, {"a": plan})
    alone = list(iter_status(session, "a", interval=[1, 2]))
    naps, lab.clock.naps = slept(lab), []
    _, session = fleet(lab, {"a": plan})
    batch = list(iter_batch(session, ["a"], timeout=300, interval=[1, 2]))
    assert [dataclasses.astuple(state) for state in batch] == [dataclasses.astuple(state) for state in alone]
    assert slept(lab) == naps


@pytest.mark.parametrize("runs", [[], (), iter(()), {}.keys()])
def test_a_batch_of_no_runs_ends_at_once(lab: Lab, runs: Any) -> None:
    server, session = fleet(lab, {})
    assert list(iter_batch(session, runs, timeout=300)) == []
    assert server.requests == [] and slept(lab) == []


def test_a_run_given_twice_is_followed_once(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running", "done"], "b": ["done"]})
    runs = ["a", {"run_id": "a"}, "b", f"{server.url}/jobs/a", handed("a"), "a"]
    states = list(iter_batch(session, runs, timeout=300, interval=1))
    assert sorted((state.id, state.status) for state in states) == [("a", "done"), ("a", "running"), ("b", "done")]
    assert (server.times("a"), server.times("b")) == ([0, 1], [0])


def test_a_state_handed_to_a_batch_is_yielded_first_and_polled_an_interval_later(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["done"], "b": ["done"]})
    states = list(iter_batch(session, [handed("a"), "b"], timeout=300, interval=5))
    assert [(state.status, state.polls, state.elapsed) for state in states if state.id == "a"] == [
        ("running", 0, 0.0), ("done", 1, pytest.approx(5.0))]
    assert (server.times("a"), server.times("b")) == ([5], [0])


def test_states_that_have_ended_cost_a_batch_nothing(lab: Lab) -> None:
    server, session = fleet(lab, {})
    states = list(iter_batch(session, [handed(f"r{i}", "done") for i in range(20)], timeout=300))
    assert sorted(state.id for state in states) == sorted(f"r{i}" for i in range(20))
    assert server.requests == [] and slept(lab) == []


def test_the_runs_of_a_batch_are_drained_at_the_call(lab: Lab) -> None:
    _, session = fleet(lab, {"a": "done", "b": "done"})
    names = iter(["a", "b"])
    states = iter_batch(session, names, timeout=300)
    assert list(names) == []
    assert sorted(state.id for state in states) == ["a", "b"]


@pytest.mark.parametrize("runs, options, error", [
    ("r1", {}, TypeError), ({"run_id": "r1"}, {}, TypeError), (None, {}, TypeError), (handed("r1"), {}, TypeError),
    (7, {}, TypeError), ([7], {}, TypeError), ([None], {}, TypeError), (["r1", ""], {}, ValueError),
    (["r1", ".."], {}, ValueError),
    (["r1", {"job": "r2"}], {}, TypeError), ([{"run_id": "r1", "more": "x"}], {}, TypeError),
    (["http://elsewhere.example/jobs/r1"], {}, ValueError),
    (["r1"], {"workers": 0}, ValueError), (["r1"], {"workers": -1}, ValueError), (["r1"], {"workers": "8"}, TypeError),
    ([], {"workers": 0}, ValueError), ([], {"interval": -1}, ValueError),
    (["r1"], {"interval": -1}, ValueError), (["r1"], {"interval": math.nan}, ValueError),
    (["r1"], {"interval": []}, ValueError), (["r1"], {"interval": [1, -1]}, ValueError),
    (["r1"], {"interval": None}, TypeError),
    (["r1"], {"timeout": math.nan}, ValueError), (["r1"], {"timeout": "5"}, TypeError),
    (["r1"], {"max_outage": -1}, ValueError), (["r1"], {"max_outage": math.nan}, ValueError),
])
def test_wrong_arguments_of_a_batch_are_refused_at_the_call(lab: Lab, runs: Any, options: Any, error: Any) -> None:
    session = lab.open(DONE)
    with pytest.raises(error):
        iter_batch(session, runs, **{"timeout": 300, **options})
    assert lab.requests == []


def test_a_batch_has_no_timeout_of_its_own(lab: Lab) -> None:
    with pytest.raises(TypeError, match="timeout"):
        iter_batch(lab.open(DONE), ["r1"])  # type: ignore[call-arg]


def test_workers_bound_the_requests_in_flight_the_threads_and_the_connections(lab: Lab) -> None:
    names = [f"r{i}" for i in range(24)]
    server, session = fleet(lab, {name: ["running", "done"] for name in names})
    together = threading.Barrier(4)
    server.meanwhile = lambda name: together.wait(5)  # so that four are in flight again and again
    counts = []
    for _ in iter_batch(session, names, timeout=300, interval=1, workers=4):
        counts.append(set(threading.enumerate()))
    most = max(len(seen - server.others - {server._thread} - server.threads) for seen in counts)
    assert server.most == 4 and most <= 4 and len({request.connection for request in server.requests}) <= 4
    assert len(counts) == 48 and becomes_true(lambda: not server.clients())


def test_there_are_no_more_threads_than_runs(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running", "done"], "b": ["running", "done"]})
    seen = [set(threading.enumerate()) for _ in iter_batch(session, ["a", "b"], timeout=300, interval=1, workers=50)]
    assert 0 < max(len(threads - server.others - {server._thread} - server.threads) for threads in seen) <= 2


def test_a_batch_that_waits_does_nothing(lab: Lab) -> None:
    calls = []

    def clock() -> float:
        calls.append(1)
        return time.monotonic()

    server, session = fleet(lab, {f"r{i}": ["running", "done"] for i in range(8)}, sleep=briefly, clock=clock)
    assert len(list(iter_batch(session, list(server.plans), timeout=30, interval=0.2))) == 16
    assert len(calls) < 1500  # in 0.2 s a loop that asks again and again makes a hundred thousand


def test_time_that_the_body_takes_is_part_of_the_interval_of_a_batch(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running", "running", "done"]})
    begun = time.monotonic()
    for _ in iter_batch(session, ["a"], timeout=300, interval=2):
        time.sleep(0.01)  # the workers are at rest by now
        lab.clock.now += 3
    assert server.times("a") == [0, 3, 6] and slept(lab) == []
    assert time.monotonic() - begun < 1.5, "it waited by another clock than the session's"


def test_a_sleep_that_returns_early_is_slept_again_in_a_batch(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running", "done"]}, sleep=lambda seconds: lab.clock.sleep(min(seconds, 0.4)))
    assert len(list(iter_batch(session, ["a"], timeout=300, interval=1))) == 2
    assert server.times("a") == [0, 1] and slept(lab) == [0.4, 0.4, 0.2]


# What the answers of a broken run are, and the error that it is.
BROKEN: list[tuple[Any, str, Any, str]] = [
    (404, "ApiError", 404, "404"), (500, "ApiError", 500, "500"), (b"<html>", "BadResponse", 200, "not JSON"),
    (403, "ApiError", 403, "403"), (reset, "TransportError", None, ""),
    (answer(None, 302, {"Location": "https://elsewhere.example/"}), "ApiError", 302, "302"),
]


def test_of_500_runs_the_broken_ones_are_listed_at_the_end_and_the_others_delivered(lab: Lab) -> None:
    names = [f"r{i}" for i in range(500)]
    broken = dict(zip(names[7::20], itertools.cycle(BROKEN)))
    server, session = fleet(lab, {name: [broken[name][0]] if name in broken else ["running", "done"] for name in names})
    states = []
    with pytest.raises(BatchError) as caught:
        states.extend(iter_batch(session, names, timeout=600, interval=1, max_outage=2))
    assert len(broken) == 25 and len(states) == 950
    assert {state.id for state in states if state.ok} == set(names) - set(broken)
    errors = caught.value.errors
    assert [error.params for error in errors] == [{"run_id": name} for name in broken]
    assert [(type(error).__name__, getattr(error, "http_status", None)) for error in errors] == [
        (kind, status) for _, kind, status, _ in broken.values()]
    assert all(part in str(error) for error, (_, _, _, part) in zip(errors, broken.values()))
    text = str(caught.value)
    assert "25" in text and "500" in text and "r7 " in text and "r27 " in text and "r487" not in text
    assert len({request.connection for request in server.requests}) <= 50, "connections are not kept"
    assert isinstance(caught.value, runpoll.RunpollError) and caught.value.params is None


def test_a_broken_run_is_logged_as_it_happens(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    _, session = fleet(lab, {"a": [404], "b": ["running", "done"]})
    with pytest.raises(BatchError):
        for state in iter_batch(session, ["a", "b"], timeout=300, interval=1):
            if state.polls == 2:
                of_a = [record for record in caplog.records if "run a " in record.getMessage()]
                assert [(record.name, record.levelno) for record in of_a] == [("runpoll", logging.WARNING)]
                assert "404" in of_a[0].getMessage()
                break
        else:
            raise AssertionError("the other run was not followed")
        raise BatchError


@pytest.mark.parametrize("fault", [500, b"<html>", reset, answer(None)])
def test_the_faults_of_one_run_delay_no_other(lab: Lab, fault: Any) -> None:
    plans = {"a": [fault] * 5 + ["done"], "b": ["running"] * 6 + ["done"], "c": ["running"] * 3 + ["done"]}
    server, session = fleet(lab, plans)
    states = list(iter_batch(session, ["a", "b", "c"], timeout=300, interval=1, workers=1))
    assert (server.times("b"), server.times("c")) == ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3])
    assert [(state.status, state.faults) for state in states if state.id == "a"] == [("done", 5)]


def test_a_request_that_hangs_delays_no_other_run(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["done"], "b": ["running", "running", "done"]}, **REAL)
    finished = threading.Event()
    server.meanwhile = lambda name: name == "b" or finished.wait(5)
    ends = []
    for state in iter_batch(session, ["a", "b"], timeout=30, interval=0.01, workers=2):
        ends += [state.id] if state.done else []
        if state.done:
            finished.set()
    assert ends == ["b", "a"]


def test_each_run_of_a_batch_has_its_own_outage_budget(lab: Lab) -> None:
    server, session = fleet(lab, {"a": [500], "b": [*[500, "running"] * 4, "done"]})
    with pytest.raises(BatchError) as caught:
        list(iter_batch(session, ["a", "b"], timeout=300, interval=5, max_outage=3))
    assert [error.params for error in caught.value.errors] == [{"run_id": "a"}]
    assert max(server.times("a")) == pytest.approx(3, abs=0.01) and len(server.times("b")) == 9


def test_a_refused_key_ends_a_batch_at_once(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running"], "b": ["running", 401], "c": [404], "d": ["running"]})
    states = []
    with pytest.raises(BatchError, match="401") as caught:
        states.extend(iter_batch(session, list("abcd"), timeout=300, interval=lambda state: 3 if state.id == "b" else 2))
    assert [(error.params, error.http_status) for error in caught.value.errors] == [  # type: ignore[attr-defined]
        ({"run_id": "b"}, 401), ({"run_id": "c"}, 404)]
    assert lab.clock.now == 1003 and len(states) == 5
    assert becomes_true(lambda: not server.clients()) and len(server.requests) == 7


def test_a_refused_key_sends_no_more_requests_while_the_loop_is_away(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running"], **{name: [401] for name in "bcdefgh"}}, **REAL)
    states = iter_batch(session, list("abcdefgh"), timeout=9, workers=1)
    next(states)
    assert becomes_true(lambda: len(server.asked) >= 2)
    time.sleep(0.05)
    with pytest.raises(BatchError, match="401"):
        next(states)
    assert len(server.asked) == 2


@pytest.mark.parametrize("what", ["log", "clock"])
def test_what_breaks_a_worker_comes_out_of_a_batch(lab: Lab, what: str) -> None:
    def broken(*_: Any) -> float:
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError(what)
        return lab.clock.now

    _, session = fleet(lab, {"a": [404]}, **({"clock": broken} if what == "clock" else {}))
    handler = logging.Handler()
    handler.emit = broken  # type: ignore[assignment]
    logging.getLogger("runpoll").addHandler(handler)
    try:
        with pytest.raises(ZeroDivisionError):
            list(iter_batch(session, ["a"], timeout=9))
    finally:
        logging.getLogger("runpoll").removeHandler(handler)


def test_an_interrupt_waits_for_no_loop_body(lab: Lab) -> None:
    def interval(state: RunState) -> float:
        raise KeyboardInterrupt

    _, session = fleet(lab, {name: ["running"] for name in "abc"})
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(iter_batch(session, ["a", "b", "c"], timeout=9, interval=interval))
    assert not seen


def test_a_batch_whose_first_run_was_in_trouble_is_timed_out_from_its_fault(lab: Lab) -> None:
    _, session = fleet(lab, {"a": ["running", 503], "b": ["running"]})
    with pytest.raises(PollTimeout) as caught:
        list(iter_batch(session, ["a", "b"], timeout=20))
    assert isinstance(caught.value.__cause__, ApiError)


def test_a_callable_interval_that_is_slow_holds_back_no_other_run(lab: Lab) -> None:
    server, session = fleet(lab, {name: ["running", "done"] for name in "ab"}, **REAL)

    def interval(state: RunState) -> float:
        assert becomes_true(lambda: len(server.asked) >= 2)
        return 0

    assert len(list(iter_batch(session, ["a", "b"], timeout=9, interval=interval, workers=1))) == 4


def test_a_batch_stops_at_its_deadline_and_says_what_goes_on(lab: Lab) -> None:
    plans = {"a": ["running", "done"], "b": ["running"], "c": [404], "d": ["queued"], "e": [500]}
    server, session = fleet(lab, plans)
    states = []
    with pytest.raises(PollTimeout) as caught:
        states.extend(iter_batch(session, list(plans), timeout=20, interval=6))
    error = caught.value
    assert isinstance(error, TimeoutError) and not isinstance(error, BatchError)
    assert error.runs == [{"run_id": "b"}, {"run_id": "d"}, {"run_id": "e"}]
    assert [(last.id, last.status, last.polls) for last in error.states] == [("b", "running", 5), ("d", "queued", 5)]
    assert [(one.params, getattr(one, "http_status", 0)) for one in error.errors] == [({"run_id": "c"}, 404)]
    assert all(part in str(error) for part in ("20 s", "3 of 5", "run b", "last status 'running'", "they go on"))
    assert error.__cause__ is None, "the first of them had no fault"
    assert server.times("b") == server.times("d") == [0, 6, 12, 18, 19.9] and 1019.9 <= lab.clock.now <= 1020
    assert len([state for state in states if state.id == "a"]) == 2


def test_a_batch_is_resumed_by_the_runs_of_its_timeout(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["done"], "b": ["running"] * 3 + ["done"], "c": ["running"] * 3 + ["failed"]})
    with pytest.raises(PollTimeout) as caught:
        list(iter_batch(session, ["a", "b", "c"], timeout=2, interval=1.5))
    handles = json.loads(json.dumps(caught.value.runs))
    states = list(iter_batch(session, handles, timeout=300, interval=1))
    assert sorted((state.id, state.status) for state in states if state.done) == [("b", "done"), ("c", "failed")]
    assert len(server.times("a")) == 1


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_batch_without_time_sends_no_request_but_yields_what_was_handed_in(lab: Lab, timeout: float) -> None:
    server, session = fleet(lab, {})
    states = iter_batch(session, ["a", handed("b"), handed("c", "done")], timeout=timeout)
    assert {(state.id, state.status) for state in (next(states), next(states))} == {("b", "running"), ("c", "done")}
    with pytest.raises(PollTimeout) as caught:
        next(states)
    assert caught.value.runs == [{"run_id": "a"}, {"run_id": "b"}] and statuses(caught.value.states) == ["running"]
    assert server.requests == [] and slept(lab) == []


def test_a_batch_without_a_limit_goes_on_for_days(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running"] * 40 + ["done"]})
    assert [state.ok for state in iter_batch(session, ["a"], timeout=None, interval=3600)][-1]
    assert server.times("a")[-1] == 40 * 3600


def test_the_clock_of_a_batch_starts_at_the_call(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["done"]})
    states = iter_batch(session, ["a"], timeout=5)
    lab.clock.now += 6
    with pytest.raises(PollTimeout):
        next(states)
    assert server.requests == []


def test_the_deadline_of_a_batch_ends_a_request_in_flight(lab: Lab) -> None:
    server, session = fleet(lab, {"a": [hang], "b": ["done"]}, **REAL)
    begun = time.monotonic()
    with pytest.raises(PollTimeout) as caught:
        list(iter_batch(session, ["a", "b"], timeout=0.3))
    assert caught.value.runs == [{"run_id": "a"}] and time.monotonic() - begun < 2
    assert becomes_true(lambda: not server.clients())


def held_back(server: Fleet) -> list[float]:
    """When a request came although a refusal had said to wait."""
    holds = [(said, said + seconds - 0.002) for said, seconds in server.refusals]
    return [at for at, _ in server.asked if any(begun < at < end for begun, end in holds)]


def test_a_429_holds_back_all_runs_and_nothing_fails(lab: Lab) -> None:
    names = [f"r{i}" for i in range(6)]
    server, session = fleet(lab, {name: ["running", "done"] for name in names})
    server.limit = (3, 10.0)
    states = list(iter_batch(session, names, timeout=300, interval=1, workers=1))
    assert len([state for state in states if state.ok]) == 6
    assert [when for when, _ in server.asked][:8] == [0] * 4 + [10] * 4 and server.refusals[:2] == [(0, 10), (10, 10)]
    assert not held_back(server) and len(server.asked) == 12 + len(server.refusals)


def test_a_503_with_retry_after_holds_back_all_runs(lab: Lab) -> None:
    plans = {"a": [answer({}, 503, {"Retry-After": "20"}), "done"], "b": ["running"] * 3 + ["done"]}
    server, session = fleet(lab, plans)
    list(iter_batch(session, ["a", "b"], timeout=300, interval=2, workers=1))
    assert server.times("a") == [0, 20] and server.times("b")[-3:] == [22, 24, 26]
    assert not [at for at in server.times("b") if 0 < at < 20]


def test_a_rate_limit_only_delays_a_batch(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"r{i}" for i in range(200)]
    server, session = fleet(lab, {name: ["running", "done"] for name in names})
    server.limit = (60, 60.0)
    states = list(iter_batch(session, names, timeout=3600, interval=5, max_outage=1))
    assert {state.id for state in states if state.ok} == set(names) and len(states) == 400
    assert not held_back(server)
    windows = [sum(60 * i <= at < 60 * i + 60 for at, _ in server.asked) for i in range(7)]
    assert all(60 <= count <= 68 for count in windows[:6]) and lab.clock.now < 1000 + 420
    assert len(server.asked) == 400 + len(server.refusals)


def test_a_slow_consumer_stops_no_other_run(lab: Lab) -> None:
    server, session = fleet(lab, {name: ["running", "running", "done"] for name in "abcd"}, **REAL)
    states = iter_batch(session, ["a", "b", "c", "d"], timeout=30, interval=0.001, workers=2)
    first = next(states)
    assert becomes_true(lambda: {name for _, name in server.asked} == set("abcd"))
    time.sleep(0.05)  # the body is slow: many intervals go by
    counts = {name: len(server.times(name)) for name in "abcd"}
    assert counts.pop(first.id) <= 2 and set(counts.values()) == {1}, "more than one undelivered state of a run"
    assert len(list(states)) == 11


def test_what_the_loop_misses_while_it_is_away_is_delivered_before_the_timeout(lab: Lab) -> None:
    server, session = fleet(lab, {name: ["running"] for name in "abc"}, **REAL)
    states = iter_batch(session, ["a", "b", "c"], timeout=0.3, interval=0.25)
    seen = [next(states).id]
    assert becomes_true(lambda: len(server.asked) >= 3)
    time.sleep(0.35)
    with pytest.raises(PollTimeout) as caught:
        for state in states:
            seen.append(state.id)
    assert set(seen) == set("abc") and [params["run_id"] for params in caught.value.runs] == ["a", "b", "c"]


def leave_by_break(states: Iterator[RunState], until: Callable[[], object]) -> None:
    for _ in states:
        assert becomes_true(until)
        break


def leave_by_an_exception(states: Iterator[RunState], until: Callable[[], object]) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for _ in states:
            assert becomes_true(until)
            raise ZeroDivisionError


def leave_by_close(states: Any, until: Callable[[], object]) -> None:
    next(states)
    assert becomes_true(until)
    states.close()
    assert list(states) == []


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_an_exception, leave_by_close])
def test_a_batch_that_is_left_starts_no_request_and_leaves_no_thread_or_connection(lab: Lab, leave: Any) -> None:
    pool = lab.enter(urllib3.PoolManager(maxsize=3, block=True))
    server, session = fleet(lab, {name: ["running"] for name in "abcdef"}, pool=pool, **REAL)
    gate = threading.Event()
    server.meanwhile = lambda name: name == "a" or gate.wait(5)
    runs = [handed("f"), "a", "b", "c", "d", "e"]  # two of them, and after a moment a third, are held by the server
    leave(iter_batch(session, runs, timeout=30, interval=0.05, workers=3), lambda: server.flying == 3)
    asked = len(server.asked)
    gate.set()
    assert becomes_true(lambda: not server.clients())
    assert len(server.asked) == asked
    connections = pool.connection_from_url(server.url).pool
    assert connections is not None and connections.qsize() == 3, "a connection was not given back"


def test_a_batch_that_is_left_while_all_runs_wait_is_over(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running"], "b": ["running"]})
    states = iter_batch(session, ["a", "b"], timeout=300, interval=1)
    for _ in range(4):
        next(states)
    states.close()
    naps = len(lab.naps)
    assert becomes_true(lambda: not server.clients())
    lab.clock.now += 10
    assert len(server.requests) == 4 and len(lab.naps) == naps


def test_a_batch_that_was_never_begun_has_no_thread_and_no_request(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["done"]})
    states = iter_batch(session, ["a"], timeout=300)
    assert not server.clients()
    states.close()
    assert server.requests == [] and not server.clients()


@pytest.mark.parametrize("plans, seen", [
    ({"a": ["running"], "b": ["queued"]}, 2), ({"a": [500], "b": [500]}, 0), ({"a": ["running"], "b": [404]}, 1),
])
def test_a_sleep_that_returns_true_ends_a_batch_without_an_exception(lab: Lab, plans: Any, seen: int) -> None:
    server, session = fleet(lab, plans, sleep=lambda seconds: True)
    assert len(list(iter_batch(session, list(plans), timeout=300))) == seen
    assert becomes_true(lambda: not server.clients()) and len(server.requests) == 2


@pytest.mark.parametrize("what", [KeyboardInterrupt, ZeroDivisionError])
def test_what_the_sleep_of_a_batch_raises_comes_out_unchanged(lab: Lab, what: Any) -> None:
    raised = what("mine")

    def sleep(seconds: float) -> None:
        if seconds > 0:
            raise raised

    server, session = fleet(lab, {"a": ["running"], "b": [404]}, sleep=sleep)
    with pytest.raises(what) as caught:
        list(iter_batch(session, ["a", "b"], timeout=300))
    assert caught.value is raised
    assert becomes_true(lambda: not server.clients()) and len(server.requests) == 2


def test_what_the_key_callable_raises_comes_out_of_a_batch_unchanged(lab: Lab) -> None:
    raised = LookupError("the vault is shut")
    calls: list[int] = []

    def ask() -> str:
        calls.append(1)
        if len(calls) > 3:
            raise raised
        return KEY

    server, session = fleet(lab, {name: ["running"] for name in "ab"}, key=ask)
    with pytest.raises(LookupError) as caught:
        list(iter_batch(session, ["a", "b"], timeout=300, workers=1))
    assert caught.value is raised and len(server.requests) == 3 and becomes_true(lambda: not server.clients())


@pytest.mark.parametrize("interval", [lambda state: -1, lambda state: math.nan, lambda state: int(state.status)])
def test_a_value_error_of_the_interval_callable_comes_out_of_a_batch(lab: Lab, interval: Any) -> None:
    server, session = fleet(lab, {"a": ["running"], "b": ["running"]})
    with pytest.raises(ValueError):
        list(iter_batch(session, ["a", "b"], timeout=300, interval=interval))
    assert becomes_true(lambda: not server.clients()) and len(server.requests) <= 2


def test_a_session_closed_under_a_batch_is_a_runtime_error(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running"]})
    states = iter_batch(session, ["a"], timeout=300)
    next(states)
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(states)
    assert len(server.requests) == 1 and becomes_true(lambda: not server.clients())


def test_two_batches_share_a_session(lab: Lab) -> None:
    _server, session = fleet(lab, {name: ["queued", "running", "done"] for name in "abcdef"}, **REAL)
    both = [iter_batch(session, list(names), timeout=30, interval=0.01, workers=2) for names in ("abc", "def")]
    for names, states in zip(("abc", "def"), zip(*zip(*both))):
        assert {state.id for state in states} == set(names) and len(states) == 9
        assert [state.status for state in sorted(states, key=lambda state: (state.id, state.polls))] == [
            "queued", "running", "done"] * 3


def test_two_batches_take_turns_on_one_virtual_clock(lab: Lab) -> None:
    server, session = fleet(lab, {name: ["running", "running", "done"] for name in "ab"})
    begun = time.monotonic()
    pairs = list(zip(*[iter_batch(session, [name], timeout=300, interval=2) for name in "ab"]))
    assert [(one.status, other.status) for one, other in pairs] == [("running",) * 2, ("running",) * 2, ("done",) * 2]
    assert server.times("a") == [0, 2, 4]
    assert time.monotonic() - begun < 1.5, "it waited by another clock than the session's"


def test_a_poll_and_a_start_go_on_beside_a_batch(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running", "running", "done"], "b": ["done"], "jobs": ["queued"]}, **REAL)
    for _ in iter_batch(session, ["a"], timeout=30, interval=0.01):
        assert session.poll("b").ok and session.start({}).status == "queued"
    assert len(server.times("b")) == len(server.times("jobs")) == 3


def test_a_key_for_every_attempt_shows_in_no_error_of_a_batch(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    def echo(handler: Any) -> None:
        assert becomes_true(lambda: len(server.requests) == 8)
        answer({"error": handler.headers["Authorization"]}, 400)(handler)

    server = lab.enter(Server(echo))
    numbers = itertools.count(10)
    session = lab.session(key=lambda: f"secret-{next(numbers)}", base_url=server.url)
    with pytest.raises(BatchError) as caught:
        list(iter_batch(session, list("abcdefgh"), timeout=300))
    assert "secret-" not in "".join(map(shown, caught.value.errors)) + shown(caught.value) + caplog.text


def test_a_late_error_does_not_open_a_closed_batch_again(lab: Lab) -> None:
    server, session = fleet(lab, {"a": ["running"], "b": [404], **{name: ["running"] for name in "cdefgh"}}, **REAL)
    leave = threading.Event()
    server.meanwhile = lambda name: name == "b" and leave.wait(5)
    states = iter_batch(session, list("abcdefgh"), timeout=9, workers=2)
    next(states)
    assert becomes_true(lambda: "b" in {name for _, name in server.asked})
    states.close()
    asked = len(server.asked)
    leave.set()
    assert becomes_true(lambda: not server.clients()) and len(server.asked) <= asked + 1


def test_the_errors_of_a_batch_pickle_and_copy(lab: Lab) -> None:
    _, session = fleet(lab, {"a": [404], "b": [b"<html>"], "c": ["running"]})
    errors: list[Any] = []
    for runs, timeout in ((["a", "b"], 300), (["a", "c", "b"], 30)):
        with pytest.raises((BatchError, PollTimeout)) as caught:
            list(iter_batch(session, runs, timeout=timeout, max_outage=1))
        errors.append(caught.value)
    assert [type(error) for error in errors] == [BatchError, PollTimeout]
    for error in errors:
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(twin) is type(error) and str(twin) == str(error) != "" and twin.params is error.params is None
            assert [(type(one), str(one), one.params, one.http_status) for one in twin.errors] == [
                (type(one), str(one), one.params, one.http_status) for one in error.errors]
            assert len(twin.errors) == 2
    twin = pickle.loads(pickle.dumps(errors[1]))
    assert twin.runs == errors[1].runs == [{"run_id": "c"}] and twin.states == errors[1].states != []
    hash(errors[0])


def test_no_key_shows_in_the_errors_and_logs_of_a_batch(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "runpoll")
    echo = {"error": f"bad key {KEY}"}
    _, session = fleet(lab, {"a": [answer(echo, 403)], "b": [answer({"id": "b", "status": KEY})]})
    with pytest.raises(PollTimeout) as caught:
        list(iter_batch(session, ["a", "b"], timeout=3, interval=1))
    shown_all = "".join(traceback.format_exception(None, caught.value, caught.value.__traceback__))
    assert KEY not in shown_all + str(caught.value.errors) + caplog.text
    assert KEY not in str(caught.value.errors[0]) and "403" in caplog.text


LEFT_BEHIND = """
import sys, runpoll
session = runpoll.Session(runpoll.Api(base_url=sys.argv[1], status="/jobs/{run_id}"))
states = runpoll.iter_batch(session, ["a", "b", "c"], timeout=60, interval=30)
try:
    print(next(states).status, flush=True)
    if sys.argv[2] == "wait":
        next(states)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", [
    "leave", pytest.param("wait", marks=pytest.mark.skipif(os.name == "nt", reason="sends SIGINT"))])
def test_the_interpreter_exits_while_an_unfinished_batch_is_referenced(lab: Lab, how: str) -> None:
    server = lab.enter(Fleet(time.monotonic, {"a": ["running"], "b": [hang], "c": [hang]}))
    arguments = [sys.executable, "-c", LEFT_BEHIND, server.url, how]
    with subprocess.Popen(arguments, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "running\n"
        if how == "wait":
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        try:
            printed, complaint = process.communicate(timeout=5)
        finally:
            process.kill()
    assert (process.returncode, printed, complaint) == (0, "interrupted\n" if how == "wait" else "", "")


# ---- The command line, in processes of its own

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
FORMS = [[sys.executable, str(HERE / "runpoll.py")], [sys.executable, "-m", "runpoll"],
         pytest.param(["runpoll"], marks=pytest.mark.skipif(not shutil.which("runpoll"), reason="it is not installed"))]
PLAIN = {"base_url": "http://127.0.0.1:9", "status": "/jobs/{run_id}"}  # an ordinary API, as a JSON file has it


def surroundings(**more: str) -> dict[str, str]:
    """The environment of a process: this one's, without what would change the output."""
    removed = ("COLUMNS", "LINES", "NO_COLOR", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return {**kept, "RUNPOLL_API_KEY": KEY, "PYTHONPATH": str(HERE), "TERM": "xterm", **more}


def invocation(*arguments: object, of: Server | None = None) -> list[str]:
    base = ["--base-url", of.url] if of else []
    return [sys.executable, "-m", "runpoll", *map(str, arguments), *base]


def ended(words: list[str], **env: str) -> Any:
    """A process that has ended: its returncode, stdout and stderr."""
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
                          env=surroundings(**env), timeout=20, check=False)


def called(*arguments: object, of: Server | None = None, by: list[str] | None = None, **env: str) -> Any:
    """The same of a command line, which never shows a traceback or the key; `by` is the command that it is given to."""
    done = ended([*(by or []), *invocation(*arguments, of=of)], **env)
    assert "Traceback" not in done.stderr and KEY not in done.stdout + done.stderr
    return done


def described(tmp_path: pathlib.Path, **fields: Any) -> pathlib.Path:
    """A file that describes an API."""
    path = tmp_path / "api.json"
    path.write_text(json.dumps({**PLAIN, **fields}), encoding="utf-8")
    return path


@contextlib.contextmanager
def started(*arguments: object, of: Server) -> Iterator[Any]:
    """A process that runs, and at the end does not any more."""
    with subprocess.Popen(invocation(*arguments, of=of), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8", env=surroundings()) as process:
        try:
            yield process
        finally:
            process.kill()


STEPS = [run("queued"), *[run("running", progress=progress) for progress in (0.25, 0.25, 0.5)], DONE]


@pytest.mark.parametrize("last, code, complaint", [
    (DONE, 0, ""), (run("failed", error={"message": "no text", "code": "E7"}), 1, "no text"),
    (run("cancelled"), 3, "cancelled"),
    (answer({"error": "Run not found"}, 404), 5, "Run not found"), (answer({"error": "no"}, 401), 5, "401"),
    (answer(None, 302, {"Location": "https://elsewhere.example/"}), 5, "302"),
])
def test_the_exit_code_says_how_the_run_ended(lab: Lab, last: Any, code: int, complaint: str) -> None:
    server = lab.enter(Server(run("running"), last))
    done = called("r1", "--interval", 0, of=server)
    assert done.returncode == code and complaint in done.stderr
    assert len(done.stderr.splitlines()) == (1 if code else 0) and done.stdout.startswith("running")
    assert [request.path for request in server.requests] == ["/runs/r1"] * 2


def test_a_server_that_is_down_is_timed_out_after_a_line_for_each_fault(lab: Lab) -> None:
    done = called("r1", "--base-url", f"http://127.0.0.1:{closed_port()}", "--timeout", 0.3)
    assert done.returncode == 124 and done.stdout == "" and "refused" in done.stderr.splitlines()[0].lower()


def test_an_answer_for_ever_broken_ends_in_a_transport_or_api_error(lab: Lab) -> None:
    server = lab.enter(Server(answer(b"x" * (17 * 2**20))))
    done = called("r1", of=server)
    assert done.returncode == 5 and len(done.stderr.splitlines()) == 1 and "max_body" in done.stderr


def refused_as_usage(lines: list[list[str]]) -> dict[str, str]:
    """Those of the command lines that are not answered by one line and exit code 2, and what they say instead."""
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda line: ended(invocation(*line)), lines))
    return {shlex.join(line): f"{done.returncode}: {done.stdout}{done.stderr}" for line, done in zip(lines, ends) if (
        done.returncode, done.stdout, done.stderr.count("\n"), done.stderr[:9]) != (2, "", 1, "runpoll: ")}


def test_wrong_usage_is_one_line_and_exit_code_2() -> None:
    assert refused_as_usage([
        [], ["r1", "--pause", "1"], ["r1", "--interval", "soon"], ["r1", "--interval", "-1"],
        ["r1", "--timeout", "nan"], ["r1", "--api", "no-such-file.json"], ["r1", "--header", "X-Team"],
        ["r1", "--header", "X Team=7"],
        ["r1", "--param", "x=1"], ["r1", "--api", "onepin"], [".."], ["http://elsewhere.example/runs/r1"],
        ["r1", "--base-url", "http://example.com"]]) == {}


def test_a_file_that_describes_no_api_is_wrong_usage(tmp_path: pathlib.Path) -> None:
    wrong = [{"stauts": "/x"}, {"phases": {"done": "over"}}, {"phases": ["done"]}, {"fields": {"id": 5}},
             {"status": None}, {"base_url": 7}]
    contents = [json.dumps({**PLAIN, **fields}).encode() for fields in wrong]
    paths = []
    for number, content in enumerate([*contents, b"{", b"[]", b"\xff\xfe", b"[" * 100_000]):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_bytes(content)
    assert refused_as_usage([["r1", "--api", str(path)] for path in paths]) == {}


def test_a_key_that_no_header_can_carry_is_wrong_usage_and_not_shown(lab: Lab) -> None:
    done = called("r1", of=lab.enter(Server(DONE)), RUNPOLL_API_KEY="secret\x01part")
    assert done.returncode == 2 and "secret" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_key_is_named_when_the_api_refuses(lab: Lab) -> None:
    server = lab.enter(Server(answer({"error": "who are you?"}, 401)))
    done = called("r1", of=server, RUNPOLL_API_KEY="")
    assert done.returncode == 5 and "RUNPOLL_API_KEY" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "Authorization" not in server.requests[0].headers


@pytest.mark.parametrize("form", FORMS)
def test_all_ways_to_call_it_are_the_same(lab: Lab, form: list[str]) -> None:
    server = lab.enter(Server(run("running"), DONE))
    done = ended([*form, "r1", "--interval", "0", "--base-url", server.url])
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["running"] * 2 + ["succeeded"] * 2, "")
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_in_a_pipe_each_state_that_differs_is_one_plain_line(lab: Lab) -> None:
    done = called("r1", "--interval", 0, of=lab.enter(Server(run("queued"), *STEPS)))
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["pending", "queued"], ["running", "25%", "running"], ["running", "50%", "running"], ["succeeded", "succeeded"]]
    assert "\x1b" not in done.stdout and "\r" not in done.stdout and done.stderr == ""


def test_in_a_pipe_a_line_comes_as_soon_as_its_state(lab: Lab) -> None:
    server = lab.enter(Server(run("running"), hang))
    with started("r1", "--interval", 0.1, of=server) as process:
        assert process.stdout.readline().split() == ["running", "running"]


def test_with_json_each_state_is_a_line_with_every_field(lab: Lab) -> None:
    times = {"created_at": "2026-01-02T03:04:05Z", "started_at": 1767323046, "completed_at": "2026-01-02 03:04:09.5"}
    last = run("failed", error={"message": "né", "code": "E7", "step": "OCR", "details": [1]}, **times)
    done = called("r1", "--json", "--interval", 0, of=lab.enter(Server(run("running"), run("running"), last)))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(line) for line in lines] == [[field.name for field in dataclasses.fields(RunState)]] * 3
    assert [(line["status"], line["phase"], line["polls"]) for line in lines] == [
        ("running", "running", 1), ("running", "running", 2), ("failed", "failed", 3)]
    assert lines[2]["error"] == {"message": "né", "code": "E7", "step": "OCR", "details": [1]}
    assert lines[2]["params"] == {"run_id": "r1"} and lines[2]["duration"] == 3.5
    assert lines[2]["raw"] == last and lines[0]["error"] is lines[0]["progress"] is None
    assert [datetime.fromisoformat(lines[2][name]) for name in times] == [
        datetime(2026, 1, 2, 3, 4, second, micro, timezone.utc) for second, micro in ((5, 0), (6, 0), (9, 500_000))]
    assert done.returncode == 1 and "OCR" in done.stderr


@pytest.mark.parametrize("name, at", [("rapidfolio", "/runs/"), ("doclo", "/api/v1/runs/"), ("dibby", "/api/runs/")])
def test_each_built_in_api_has_its_name(lab: Lab, simulator: Simulator, name: str, at: str) -> None:
    body, params = STARTS[name]
    begun = lab.session(simulator.api(name)).start(body, **params)
    done = called(begun.id, "--api", name.title(), "--interval", 0, "--base-url", simulator.api(name).base_url)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split()[0] == "succeeded"
    assert simulator.requests[-1].path == f"/{name}{at}{begun.id}"


def test_other_path_parameters_and_headers_are_sent(lab: Lab, simulator: Simulator) -> None:
    begun = lab.session(simulator.api("onepin")).start(None, **STARTS["onepin"][1])
    others = ["--param", f"workflow_id={begun.params['workflow_id']}", "--header", "X-Team=a=b", "--header", "X-Env="]
    base_url = simulator.api("onepin").base_url
    done = called(begun.id, "--api", "onepin", "--base-url", base_url, "--interval", 0, *others)
    assert done.returncode == 0
    assert simulator.requests[-1].headers["X-Team"] == "a=b" and simulator.requests[-1].headers["X-Env"] == ""


def test_an_id_may_look_like_a_url_of_another_scheme(lab: Lab, tmp_path: pathlib.Path) -> None:
    server = lab.enter(Server(DONE))
    api = described(tmp_path, base_url=server.url, status="/teams/{team}/jobs/{run_id}")
    done = called("gs://bucket/7", "--api", api, "--param", "team=blue")
    assert (done.returncode, done.stderr) == (0, "")
    assert [request.path for request in server.requests] == ["/teams/blue/jobs/gs%3A%2F%2Fbucket%2F7"]


def test_an_api_of_ones_own_is_described_in_a_file(lab: Lab, tmp_path: pathlib.Path) -> None:
    server = lab.enter(Server(*[{"job": {"key": 7, "now": {"word": word}, "share": share}} for word, share in (
        ("brewing", 0.5), ("Served-Hot", 1))]))
    api = described(
        tmp_path, base_url=server.url, status="/v2/teams/{team}/jobs/{run_id}", start="/v2/jobs",
        cancel="DELETE /v2/jobs/{run_id}", root="job",
        fields={"id": ["nothing", "key"], "status": "now.word", "progress": ["share"]},
        phases={"brewing": "running", "served_hot": "succeeded"}, auth_header="X-Api-Key", auth_scheme="",
        idempotency="header:Idempotency-Key")
    done = called("7", "--api", api, "--param", "team=blue", "--json", "--interval", 0)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["id"], line["phase"], line["progress"]) for line in lines] == [
        ("7", "running", 0.5), ("7", "succeeded", 1.0)]
    assert done.returncode == 0 and server.requests[0].path == "/v2/teams/blue/jobs/7"
    assert server.requests[0].headers["X-Api-Key"] == KEY


def test_a_status_url_names_a_run(lab: Lab) -> None:
    server = lab.enter(Server(DONE))
    assert called(f"{server.url}/runs/r%2F1", of=server).returncode == 0
    assert server.requests[0].path == "/runs/r%2F1"


def resumes(complaint: str) -> list[str]:
    """The command that the last line gives."""
    return shlex.split(complaint.splitlines()[-1].rpartition(": ")[2])


def test_a_timeout_is_124_and_prints_the_line_that_resumes_it(lab: Lab, tmp_path: pathlib.Path) -> None:
    server = lab.enter(Server(run("running")))
    folder = tmp_path / "my apis"
    folder.mkdir()
    api = described(folder, base_url=server.url)
    done = called("it's one", "--api", api, "--timeout", 0.3, "--interval", 0.05, "--header", "X-Note=a 'b'")
    assert done.returncode == 124 and len(done.stderr.splitlines()) == 1 and "0.3 s" in done.stderr
    assert {request.path for request in server.requests} == {"/jobs/it%27s%20one"}
    server.answers = [DONE]
    assert ended(resumes(done.stderr)).returncode == 0
    assert server.requests[-1].path == "/jobs/it%27s%20one" and server.requests[-1].headers["X-Note"] == "a 'b'"


def test_a_timeout_of_nothing_sends_no_request(lab: Lab) -> None:
    server = lab.enter(Server(DONE))
    assert called("r1", "--timeout", 0, of=server).returncode == 124 and server.requests == []


def test_the_interval_is_kept(lab: Lab) -> None:
    server = lab.enter(Server(run("running")))
    begun = time.monotonic()
    assert called("r1", "--timeout", 0.7, "--interval", 0.25, of=server).returncode == 124
    assert 3 <= len(server.requests) <= 4 and 0.5 < time.monotonic() - begun < 5


@POSIX
@pytest.mark.parametrize("then", [run("running"), hang])
def test_an_interrupt_is_130_and_prints_the_line_that_resumes_it(lab: Lab, then: Any) -> None:
    server = lab.enter(Server(run("running"), then))
    with started("r1", "--interval", 0.05, of=server) as process:
        assert process.stdout.readline().split() == ["running", "running"]
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=10)
    assert process.returncode == 130 and len(complaint.splitlines()) == 1 and "Traceback" not in complaint
    server.answers = [DONE]
    assert ended(resumes(complaint)).returncode == 0


def test_faults_that_are_sat_out_are_lines_on_standard_error(lab: Lab) -> None:
    done = called("r1", of=lab.enter(Server(answer({"error": "busy"}, 503, {"Retry-After": "0.05"}), DONE)))
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and "busy" in done.stderr


def test_verbose_logs_each_poll_and_never_the_key(lab: Lab) -> None:
    done = called("r1", "-v", "--interval", 0, of=lab.enter(Server(*STEPS, answer({"error": f"not {KEY}"}, 403))))
    lines = [line for line in done.stderr.splitlines() if "GET /runs/r1" in line]
    assert len(lines) == 5 and "queued" in lines[0] and "succeeded" in lines[4]
    assert all(line.startswith("runpoll: ") for line in lines)
    refused = called("r1", "-v", of=lab.enter(Server(answer({"error": f"not {KEY}"}, 403, {"X-Request-Id": KEY}))))
    assert refused.returncode == 5 and "403" in refused.stderr


def test_help_names_the_options_the_variable_and_the_exit_codes() -> None:
    done = called("--help")
    assert done.returncode == 0 and done.stderr == ""
    options = ["--api", "--base-url", "--param", "--header", "--interval", "--timeout", "--json"]
    assert [word for word in [*options, "RUNPOLL_API_KEY", "124", "130"] if word not in done.stdout] == []


def test_importing_the_module_does_not_import_what_only_the_command_line_needs() -> None:
    script = "import sys, runpoll; print('argparse' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "False\n"


# What a shell does with the output, and what is left of it there.
@POSIX
def test_a_reader_that_goes_away_after_a_line_gets_no_traceback(lab: Lab) -> None:
    server = lab.enter(Server(*[run("running", progress=i / 100) for i in range(90)], DONE))
    with started("r1", "--interval", 0.02, of=server) as process:
        assert process.stdout.readline().split()[0] == "running"
        process.stdout.close()
        complaint = process.stderr.read()
        process.wait(10)
    assert "Traceback" not in complaint and "Exception ignored" not in complaint and "Errno" not in complaint
    assert len(complaint.splitlines()) <= 1 and len(server.requests) < 50


@POSIX
@pytest.mark.parametrize("redirected, last, code", [
    (">&-", DONE, 0), (">&- 2>&-", run("cancelled"), 3), ("<&- >&-", 404, 5), ("<&- >/dev/null 2>&-", 404, 5),
    pytest.param(">/dev/full", DONE, None, marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")),
])
def test_a_closed_or_full_output_is_no_crash(lab: Lab, redirected: str, last: Any, code: int | None) -> None:
    server = lab.enter(Server(run("running"), last))
    done = called("r1", "--interval", 0, of=server, by=["sh", "-c", f'"$@" {redirected}', "sh"])
    assert done.stdout == "" and "Exception ignored" not in done.stderr and len(done.stderr.splitlines()) <= 1
    assert done.returncode == code if code is not None else done.returncode != 0


@POSIX
def test_an_error_without_a_standard_error_does_not_go_to_the_output(lab: Lab) -> None:
    done = called("r1", "--json", of=lab.enter(Server(404)), by=["sh", "-c", '"$@" 2>&-', "sh"])
    assert (done.returncode, done.stdout) == (5, "")


@POSIX
@pytest.mark.skipif(not shutil.which("nohup"), reason="there is no nohup")
def test_under_nohup_it_writes_plain_lines_into_the_file(lab: Lab, tmp_path: pathlib.Path) -> None:
    server = lab.enter(Server(run("running"), run("running"), DONE))
    out = tmp_path / "nohup.out"
    to_file = ["sh", "-c", f'exec nohup "$@" >{shlex.quote(str(out))} 2>&1', "sh"]
    done = called("r1", "--interval", 0, of=server, by=to_file)
    lines = out.read_text().splitlines()
    assert done.returncode == 0
    assert [line.split()[0] for line in lines if "nohup" not in line] == ["running", "succeeded"]


@pytest.mark.parametrize("env", [
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}])
def test_words_that_the_locale_lacks_are_no_crash(lab: Lab, env: dict[str, str]) -> None:
    server = lab.enter(Server(run("läuft 進行中 \ud83d"), run("failed", error="größer \u2192 \ud83d")))
    done = subprocess.run(invocation("r1", "--interval", 0, of=server), stdin=subprocess.DEVNULL, capture_output=True,
                          env=surroundings(**env), timeout=20, check=False)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [b"unknown", b"failed"] and b"uft" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(b"runpoll: run r1 failed, gr")


def test_words_beyond_ascii_are_kept_where_the_locale_has_them(lab: Lab) -> None:
    server = lab.enter(Server(run("läuft 進行中"), DONE))
    done = called("r1", "--interval", 0, of=server, PYTHONIOENCODING="utf-8")
    assert done.stdout.splitlines()[0].split() == ["unknown", "läuft", "進行中"]


# What a terminal shows


def terminal(*arguments: object, of: Server, columns: int = 80, code: int = 0, interrupted_at: int = 0,
             env: Mapping[str, str] = {}) -> str:
    """What a process writes to a terminal so wide (its standard error stands there, too)."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, master)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = stack.enter_context(subprocess.Popen(
            invocation(*arguments, of=of), stdin=slave, stdout=slave, stderr=slave,
            env=surroundings(**{"PYTHONIOENCODING": "utf-8", **env})))
        stack.callback(process.kill)
        os.close(slave)
        written = b""
        if interrupted_at:
            for _ in range(1000):
                if len(of.requests) >= interrupted_at:
                    break
                time.sleep(0.005)
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux ends a terminal so, others with nothing
            while piece := os.read(master, 2**16):
                written += piece
        assert process.wait(20) == code
    assert b"Traceback" not in written and KEY.encode() not in written
    return written.decode("utf-8")


def screen(written: str, columns: int) -> tuple[list[str], int]:
    """The rows that a terminal shows in the end, and how many rows were ever written to."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]|\x1b", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[K":
            rows[row] = rows[row][:column]
        elif part.startswith("\x1b["):
            assert re.fullmatch(r"\x1b\[[\d;]*m", part), f"a terminal is told {part!r}"
        else:
            assert part.isprintable(), f"{part!r} reached the terminal"
            width = 2 if unicodedata.east_asian_width(part) in "WF" else 0 if unicodedata.combining(part) else 1
            if column + width > columns:
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1:]
            column += width
    return rows, len(rows)


LONG = "extracting-the-line-items-of-every-page-and-checking-them-against-what-was-ordered-last-year"
WIDE = "処理" * 30
SEEN = {LONG: "running", WIDE: "running"}


def watched(lab: Lab, tmp_path: pathlib.Path, *answers: Any, columns: int = 80, **options: Any) -> str:
    """What a terminal is told of a run with these answers."""
    server = lab.enter(Server(*answers))
    api = described(tmp_path, base_url=server.url, phases=SEEN)
    return terminal("r1", "--interval", 0.02, "--api", api, of=server, columns=columns, **options)


def frames(written: str) -> list[str]:
    """What the line says each time that it is drawn, without its colours."""
    drawn = re.split("[\r\n]+", re.sub(r"\x1b\[[\d;]*[mK]", "", written))
    return [frame.strip() for frame in drawn if frame.strip()]


@POSIX
@pytest.mark.parametrize("word, columns", [(LONG, 80), (LONG, 40), (WIDE, 40)], ids=["80", "40", "40 wide"])
def test_on_a_terminal_one_line_that_fits_is_drawn_again_and_again_and_stays(
        lab: Lab, tmp_path: pathlib.Path, word: str, columns: int) -> None:
    answers = [run("queued"), run(word), *[run(word, progress=i / 4) for i in range(4)], DONE]
    written = watched(lab, tmp_path, *answers, columns=columns)
    rows, count = screen(written, columns)
    assert count == 2 and rows[1] == "" and rows[0].startswith("succeeded"), "more than one row was written to"
    assert len(frames(written)) == 7 and written.endswith("\n") and written.count("\n") == 1


@POSIX
def test_the_line_on_a_terminal_has_the_phase_the_word_a_bar_and_the_times(lab: Lab, tmp_path: pathlib.Path) -> None:
    working = [run("working", progress=progress) for progress in (0.25, 0.5)]
    drawn = frames(watched(lab, tmp_path, run("queued"), *working, DONE))
    assert all(re.search(r"\b\d+ s\b", frame) for frame in drawn)
    assert [frame.split()[0] for frame in drawn] == ["pending", "running", "running", "succeeded"]
    assert "queued" in drawn[0] and "working" in drawn[1] and "%" not in drawn[0] and "left" not in drawn[0]
    bars = [frame[frame.index("[") + 1:frame.index("]")] for frame in drawn[1:3]]
    assert len(bars[0]) == len(bars[1]) and [len(bar.strip()) / len(bar) for bar in bars] == [0.25, 0.5]
    assert "25%" in drawn[1] and "50%" in drawn[2] and "left" in drawn[2]


@POSIX
@pytest.mark.parametrize("env, live, coloured", [
    ({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, False, False)])
def test_colour_is_left_out_where_it_is_not_wanted(
        lab: Lab, tmp_path: pathlib.Path, env: dict[str, str], live: bool, coloured: bool) -> None:
    written = watched(lab, tmp_path, run("queued"), run("running", progress=0.5), DONE, env=env)
    assert (re.search(r"\x1b\[[\d;]+m", written) is not None) is coloured
    assert ("\x1b" in written) is live and (written.count("\n") == 1) is live
    assert [frame.split()[0] for frame in frames(written)] == ["pending", "running", "succeeded"]


@POSIX
def test_each_end_has_a_colour_of_its_own(lab: Lab, tmp_path: pathlib.Path) -> None:
    colours = [re.findall(r"\x1b\[([\d;]+)m", watched(lab, tmp_path, run(word), code=code))[0]
               for word, code in (("done", 0), ("failed", 1))]
    assert len(set(colours)) == 2


EVIL = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\r\ne\u202ef"
EVILS = {
    "a status": ([run(EVIL), DONE], 0),
    "a code": ([run("failed", error={"message": EVIL, "code": EVIL})], 1),
    "a step": ([run("failed", error={"message": EVIL, "step": EVIL})], 1),
    "an error answer": ([answer({"error": EVIL}, 403, {"X-Request-Id": "r\x1b[2Jr"})], 5),
    "a Location": ([answer(None, 302, {"Location": "https://elsewhere.example/\x1b[2J"})], 5),
}


@POSIX
@pytest.mark.parametrize("what", EVILS)
def test_control_characters_of_the_api_do_not_reach_a_terminal(lab: Lab, tmp_path: pathlib.Path, what: str) -> None:
    answers, code = EVILS[what]
    server = lab.enter(Server(*answers))
    written = terminal("r1", "-v", "--interval", 0, of=server, columns=300, code=code)
    screen(re.sub(r"\r\x1b\[K", "\r", written), 300)


def test_json_is_one_line_a_state_whatever_the_api_says(lab: Lab) -> None:
    server = lab.enter(Server(run(EVIL + "\u2028"), run("done", output=[EVIL])))
    done = called("r1", "--interval", 0, "--json", of=server)
    lines = done.stdout.splitlines()
    assert all(map(str.isprintable, lines)) and json.loads(lines[0])["status"] == EVIL + "\u2028" and len(lines) == 2


@POSIX
def test_on_a_terminal_a_warning_has_a_row_of_its_own(lab: Lab, tmp_path: pathlib.Path) -> None:
    busy = answer({"error": "busy"}, 503, {"Retry-After": "0.05"})
    rows, _ = screen(watched(lab, tmp_path, run(LONG), busy, run("failed", error="no text"), code=1, columns=200), 200)
    assert [row.split()[0] for row in rows if row] == ["runpoll:", "failed", "runpoll:"]
    assert "busy" in rows[0] and "running" not in rows[0] and "no text" in rows[2]


@POSIX
def test_json_on_a_terminal_is_plain_lines(lab: Lab) -> None:
    server = lab.enter(Server(run("queued"), DONE))
    written = terminal("r1", "--interval", 0, "--json", of=server)
    assert [json.loads(line)["status"] for line in written.splitlines()] == ["queued", "succeeded"]
    assert "\x1b" not in written


@POSIX
def test_an_interrupt_on_a_terminal_leaves_the_line_and_prints_how_to_resume(lab: Lab) -> None:
    server = lab.enter(Server(run("running"), hang))
    written = terminal("r1", "--interval", 0.05, of=server, columns=300, code=130, interrupted_at=2)
    rows, _ = screen(written, 300)
    assert rows[0].startswith("running") and rows[1].startswith("runpoll: ") and len([row for row in rows if row]) == 2
    server.answers = [DONE]
    assert ended(resumes(rows[1])).returncode == 0


# ---- What would be easy to get wrong


def test_a_pool_that_is_busy_for_ever_holds_nothing_for_ever(lab):
    pool = urllib3.PoolManager(maxsize=1, block=True)
    session = lab.open(run(), pool=pool, request_timeout=0.05, retries=0)
    host: Any = pool.connection_from_url(lab.server.url)
    taken = host._get_conn()  # as another user of the pool would
    with pytest.raises(TransportError) as caught:
        session.start({})
    assert caught.value.sent is False and "no run has begun" in str(caught.value) and lab.requests == []
    host._put_conn(taken)
    pool.clear()


@pytest.mark.parametrize("none", [None, ""])
def test_an_empty_idempotency_key_is_none(lab, none):
    session = lab.open(502, run(), api=dataclasses.replace(ORDINARY, idempotency="body:key"))
    with pytest.raises(ApiError):
        session.start({"key": none})
    assert len(lab.requests) == 1
    with pytest.raises((TypeError, ValueError)):
        lab.session(KEYED, base_url=lab.server.url).start({}, idempotency_key="" if none is None else 5)
    assert len(lab.requests) == 1


def test_a_clock_that_moves_at_every_look_meets_the_deadline_all_the_same(lab):
    looks = itertools.count(0.0, 0.3)
    session = lab.open(run(), sleep=lambda seconds: None, clock=lambda: next(looks))
    with pytest.raises(PollTimeout):
        wait(session, "r1", timeout=1.0)


def test_a_request_that_the_deadline_ends_is_a_timeout_even_where_no_outage_is_sat_out(lab):
    with pytest.raises(PollTimeout) as caught:
        wait(lab.open(hang, **REAL), "r1", timeout=0.1, max_outage=0)
    assert isinstance(caught.value.__cause__, TransportError)


def test_a_clock_a_rounding_error_short_of_the_deadline_ends_the_loop(lab):
    session = lab.open(run(), sleep=lambda seconds: lab.clock.sleep(seconds - 1e-9))
    with pytest.raises(PollTimeout):
        wait(session, "r1", timeout=10.0, interval=4)
    assert len(lab.requests) < 10


def test_the_clock_of_a_batch_starts_before_the_runs_are_drained(lab):
    def slowly():
        for name in "abc":
            lab.clock.now += 50
            yield name

    session = lab.open(run())
    with pytest.raises(PollTimeout):
        list(iter_batch(session, slowly(), timeout=100))
    assert lab.requests == []


def test_a_start_refused_by_its_certificate_has_begun_no_run(lab):
    with pytest.raises(TransportError) as caught:
        lab.open(run(), tls=True).start({})
    assert caught.value.sent is False and str(caught.value).endswith("no run has begun")


def test_the_addresses_of_a_host_share_the_timeout(lab, monkeypatch):
    session = lab.open(run(), **REAL, request_timeout=0.3, retries=0)
    full = lab.enter(socket.socket())
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = []
    for _ in range(4):  # until its queue takes no more, and connecting to it is a wait
        waiting.append(lab.enter(socket.socket()))
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex(full.getsockname())
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", full.getsockname()[1]))]
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: found * 3 if host == "many.test" else real(host, *rest))
    session = lab.session(base_url=f"http://many.test:{full.getsockname()[1]}", allow_http=True, **REAL,
                          request_timeout=0.3, retries=0)
    begun = time.monotonic()
    with pytest.raises(TransportError) as caught:
        session.poll("r1")
    assert caught.value.sent is False and time.monotonic() - begun < 0.55


@pytest.mark.parametrize(("said", "fault"), [
    ({"status": 5}, BadResponse), ({"status": None}, BadResponse), ({"phase": "odd"}, BadResponse), ({"phase": "running"}, None),
])
def test_what_an_override_returns_is_checked(lab, said, fault):
    class Odd(Api):
        def read_state(self, body, params=None, headers=None, http_status=200):
            return RunState(**{"id": "r1", "status": "running", "phase": Phase.RUNNING, **said})

    session = lab.open(run(), retries=0, api=Odd(base_url="http://127.0.0.1", status="/jobs/{run_id}", start="/jobs"))
    with pytest.raises(fault) if fault else contextlib.nullcontext():
        assert session.poll("r7").params == {"run_id": "r7"}
    with pytest.raises(fault) if fault else contextlib.nullcontext():
        begun = session.start({})
        assert begun.params == {"run_id": "r1"} and begun.phase is Phase.RUNNING


@pytest.mark.parametrize(("start", "location"), [
    ("/v2/w/{wf}/jobs/", "r9"), ("/v2/w/{wf}/jobs", "jobs/r9"), ("/v2/w/{wf}/jobs", "/v2/w/w1/jobs/r9")])
def test_a_location_may_be_relative_to_the_start(lab, start, location):
    api = Api(base_url="http://127.0.0.1", start=start, status="/v2/w/{wf}/jobs/{run_id}")
    session = lab.open(answer(None, 201, {"Location": location}), api=api)
    assert session.start({}, wf="w1").params == {"wf": "w1", "run_id": "r9"}


def test_a_location_relative_to_what_is_not_known_names_no_run(lab):
    api = Api(base_url="http://127.0.0.1", start="/{+parent}/jobs", status="/{+run_id}")
    with pytest.raises(BadResponse):
        lab.open(answer(None, 201, {"Location": "jobs/r9"}), api=api).start({}, parent="a/b")


def test_a_504_has_to_name_the_run_in_its_body(lab):
    with pytest.raises(ApiError):
        lab.open(answer({"status": "running"}, 504, {"Location": "/runs/r9"})).start({})


def test_a_start_by_put_is_not_repeated_either(lab):
    session = lab.open(503, run(), api=dataclasses.replace(ORDINARY, start="PUT /runs"))
    with pytest.raises(ApiError):
        session.start({})
    assert len(lab.requests) == 1


def test_an_override_cannot_change_what_was_asked_with(lab):
    class Odd(Api):
        def read_state(self, body, params=None, headers=None, http_status=200):
            params["run_id"] = "other"
            return super().read_state(body, params, headers, http_status)

    session = lab.open(run(), api=Odd(base_url="http://127.0.0.1", status="/jobs/{run_id}"))
    assert session.poll("r7").params == {"run_id": "r7"}


@pytest.mark.parametrize(("header", "seconds"), [(" 7 ", 7), ("9999999999", 9999999999)])
def test_a_retry_after_is_a_number_however_long_and_wherever_it_stands(header, seconds):
    assert ORDINARY.read_state(run(), headers={"retry-after": header}).retry_after == seconds


def test_the_headers_of_a_webhook_may_be_those_of_http_server():
    headers = http.client.HTTPMessage()
    headers["Retry-After"] = "7"
    assert ORDINARY.read_state(run(), headers=headers).retry_after == 7


def test_a_bad_response_of_read_state_names_the_run_and_the_status():
    api = dataclasses.replace(ORDINARY, fields={"output": lambda body: body["nope"]})
    for body in (run(), {"id": "r1"}):
        with pytest.raises(BadResponse) as caught:
            api.read_state(body, {"run_id": "r1"}, None, 202)
        assert caught.value.http_status == 202 and caught.value.params == {"run_id": "r1"}


def test_a_datetime_without_a_zone_is_utc():
    api = dataclasses.replace(ORDINARY, fields={"created_at": lambda body: TEN.replace(tzinfo=None)})
    assert api.read_state(run()).created_at == TEN


def test_a_date_with_a_zone_is_read_by_its_zone():
    date = (datetime.now(timezone(timedelta(hours=2))) + timedelta(seconds=30)).strftime("%a, %d %b %Y %H:%M:%S %z")
    assert ORDINARY.read_state(run(), headers={"Retry-After": date}).retry_after == pytest.approx(30, abs=3)


def test_an_api_is_a_value():
    again = dataclasses.replace(runpoll.DOCLO)
    assert again == runpoll.DOCLO and hash(again) == hash(runpoll.DOCLO) and again != runpoll.ONEPIN
    assert dataclasses.replace(again, start="") != again and again != "doclo"


def test_a_key_that_took_all_the_time_is_not_used(lab):
    def ask():
        lab.clock.now += 20
        return KEY

    with pytest.raises(PollTimeout):
        wait(lab.open(run(), key=ask), "r1", timeout=10)
    assert not lab.requests


def test_an_interval_without_end_is_no_timeout(lab):
    assert len(list(iter_status(lab.open(run(), sleep=lambda seconds: True), "r1", interval=math.inf, timeout=None))) == 1


def test_an_interval_without_end_leaves_the_last_poll(lab):
    with pytest.raises(PollTimeout):
        wait(lab.open(run()), "r1", interval=math.inf, timeout=10)
    assert len(lab.requests) == 2 and lab.naps == [pytest.approx(9.9)]


@pytest.mark.parametrize(("fault", "advice"), [
    (408, "try again later"), (answer({}, 429, {"Retry-After": "300"}), "Retry-After: 300 s"), (418, "unchanged it will fail again")])
def test_an_error_says_what_to_do(lab, fault, advice):
    with pytest.raises(ApiError, match=advice):
        lab.open(fault, retries=0).poll("r1")


def test_a_percentage_is_exact():
    shares = [runpoll.DOCLO.read_state(run(progress={"percentage": percentage})).progress for percentage in range(101)]
    assert shares == [percentage / 100 for percentage in range(101)]


def test_a_missing_run_has_its_ten_seconds_after_other_faults_too(lab):
    session = lab.open(503, 503, 503, 503, 503, 404, DONE)
    begun = ORDINARY.read_state(run())
    assert wait(session, begun).ok and len(lab.requests) == 7


def test_a_word_is_unknown_once_however_it_is_spelt(lab, caplog):
    session = lab.open(run("Odd-Word"), run("ODD_WORD"), run("oddWord"), DONE)
    wait(session, "r1")
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


@pytest.mark.parametrize("api", [runpoll.RAPIDFOLIO, runpoll.DOCLO, runpoll.DIBBY, runpoll.ONEPIN], ids=STARTS)
def test_the_built_in_apis_pickle(api):
    again = pickle.loads(pickle.dumps(api))
    assert again.read_state({"data": {"id": "r", "status": "x"}, "id": "r", "status": "x"}).id == "r"


@pytest.mark.parametrize(("body", "message"), [
    ({"detail": [{"msg": "bad"}]}, "bad"), ({"detail": [{"loc": None, "msg": "bad"}]}, "bad"), ({"detail": ["bad", "worse"]}, "bad; worse"),
    ({"detail": {"code": "c", "message": "bad"}}, "bad"), ({"error": [{"message": "bad"}]}, "bad"), ([{"message": "bad"}], "bad"),
    ({"detail": [{"loc": "body", "msg": "bad"}]}, "body: bad"), ({"detail": [{"loc": 5, "msg": 7}]}, "5: 7"),
])
def test_an_error_in_an_odd_form_is_read_too(lab, body, message):
    with pytest.raises(ApiError) as caught:
        lab.open(answer(body, 422)).poll("r1")
    assert caught.value.error.message == message


@pytest.mark.parametrize("call", [
    lambda lab: lab.session(key=b"key"), lambda lab: lab.session(key=lambda: 5).poll("r1"),
    lambda lab: lab.session(sleep=3), lambda lab: lab.session(clock=None), lambda lab: lab.session(base_url=""),
    lambda lab: lab.session(retries=math.inf),
    lambda lab: iter_batch(lab.session(), [], timeout=9, workers=1.5), lambda lab: lab.session(max_body="1"), lambda lab: lab.session(retries=-1), lambda lab: lab.session(headers="abc"),
    lambda lab: lab.session(headers={"X": None}), lambda lab: lab.session(headers={"X: y": "1"}), lambda lab: lab.session(pool="x"),
    lambda lab: iter_status("x", "r1"), lambda lab: iter_batch(lab.session(), [], timeout="x"),
    lambda lab: iter_batch(lab.session(), [], timeout=9, workers=math.inf), lambda lab: lab.session().request(None, "/x"),
    lambda lab: lab.session().request("", "/x"), lambda lab: lab.session().request("GET", None),
    lambda lab: lab.session().request("POST", "DELETE /x"), lambda lab: lab.session().request("GET", "/x", params="abc"),
    lambda lab: lab.session().request("PUT", "/x", math.nan), lambda lab: Api(base_url="http://a", status=None),
    lambda lab: Api(base_url="http://a", status="/{run_id}", fields=None), lambda lab: Api(base_url="http://a", status="/{run_id}", phases=5),
    lambda lab: Api(base_url="http://a", status="/{run_id}", fields={"id": [1]}),
    lambda lab: Api(base_url="http://a", status="/{run_id}", idempotency=None),
    lambda lab: Api(base_url="http://a", status="/{run_id}", idempotency="header:a b"),
    lambda lab: Api(base_url="http://a", status="/{run_id}", root=5), lambda lab: Api(base_url="http://a", status="/{run_id}/{run_id}"),
    lambda lab: Api(base_url=None, status="/{run_id}"),
])
def test_a_wrong_argument_is_said_at_the_call(lab, call):
    with pytest.raises((TypeError, ValueError)):
        call(lab)


# ---- The module, its examples, and the demonstration


def test_all_is_what_is_public():
    public = {name for name, value in vars(runpoll).items()
              if not name.startswith("_") and (isinstance(value, Api) or getattr(value, "__module__", "") == "runpoll")}
    assert public == set(runpoll.__all__) and len(runpoll.__all__) == len(public)
    assert public >= {"Phase", "ErrorInfo", "RunState", "Api", "RAPIDFOLIO", "DOCLO", "DIBBY", "ONEPIN", "Session",
                      "Backoff", "iter_status",
                      "wait", "RunpollError", "TransportError", "ApiError", "BadResponse", "PollTimeout", "RunFailed",
                      "RunCancelled",
                      "RunNotDone"}


@pytest.mark.parametrize("value", [runpoll.Backoff(), ErrorInfo("no"), ORDINARY, ORDINARY.read_state(run())])
def test_values_are_frozen(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


def indented(text: str) -> str:
    """The first indented block of a text."""
    found = re.search(r"(?:^    .*\n|^\n)+", text[text.index("\n    "):].lstrip("\n"), re.MULTILINE)
    assert found
    return textwrap.dedent(found[0])


@pytest.fixture
def examples(lab: Lab, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that an example finds; its built-in APIs are the simulator's, and no time passes in its sessions."""
    for name in STARTS:
        monkeypatch.setattr(runpoll, name.upper(), simulator.api(name))

    def hasty(*arguments: Any, sleep: Callable[[float], object] = time.sleep, **options: Any) -> Session:
        def nap(seconds: float) -> object:
            lab.clock.sleep(seconds)
            return sleep(0)

        return lab.enter(Session(*arguments, sleep=nap, clock=lab.clock, **options))

    monkeypatch.setattr(runpoll, "Session", hasty)
    return {"api_key": KEY}


def test_the_example_in_the_docstring_runs(examples, capsys):
    exec(indented(runpoll.__doc__ or ""), examples)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "running None" and printed.splitlines()[-1] == "{'approved': True}"


README = HERE / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the examples of the README are run where it stands")
def test_the_examples_in_the_readme_run(examples):
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"(<!-- not run -->\s*)?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        if not block[1]:
            line = text.count("\n", 0, block.start(2))
            tree = ast.increment_lineno(ast.parse(block[2]), line)  # so that a traceback points into the README
            exec(compile(tree, str(README), "exec"), examples)


def test_the_demonstration_follows_one_run_of_each_api(capsys):
    demonstrate(interval=0.01)
    lines = capsys.readouterr().out.splitlines()
    for name, last in (("RAPIDFOLIO", "completed"), ("DOCLO", "success"), ("DIBBY", "FINISHED"),
                       ("ONEPIN", "completed")):
        of_it = [line.split() for line in lines if line.startswith(name)]
        assert len(of_it) >= 4 and any(last in words and "succeeded" in words for words in of_it)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_the_simulator_is_left_running_until_it_is_interrupted():
    with subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
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
                    print(f"{name.upper():<12}{state.status:<12}{state.phase:<12}{progress:>8}{state.elapsed:>8.1f} s",
                          flush=True)
                if name == "onepin":
                    output = session.request("GET", "/api/v1/workflows/{workflow_id}/runs/{run_id}/outputs",
                                             params=state.params)["data"]
                else:
                    output = state.result()
                ends[name] = f"{state.phase} after {state.polls} polls: {json.dumps(output)}"
    print()
    for name, end in ends.items():
        print(f"{name.upper():<12}{end}")


def serve(port: int) -> None:
    """Leave the simulator running until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), Simulator(stages=9, step=1.0, port=port) as simulator:
        print(f"the simulator listens on {simulator.url}, where a run takes 8 s; any key will do. Ctrl-C ends it.\n\n"
              f"    curl -H 'Authorization: Bearer {KEY}' -d '{{\"data\": {{}}}}' "
              f"{simulator.url}/rapidfolio/v1/procedures/proc_abc/sandbox\n"
              f"    curl -H 'Authorization: Bearer {KEY}' {simulator.url}/rapidfolio/runs/run_1\n"
              f"    RUNPOLL_API_KEY={KEY} python runpoll.py run_1 --base-url {simulator.url}/rapidfolio\n\n"
              "or in Python\n\n"
              "    import runpoll\n"
              f"    session = runpoll.Session(runpoll.RAPIDFOLIO, '{KEY}', base_url='{simulator.url}/rapidfolio')\n"
              "    run = session.start({'data': {}}, procedure_id='proc_abc', environment='sandbox')\n"
              "    for state in runpoll.iter_status(session, run): print(state.status)\n", flush=True)
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
