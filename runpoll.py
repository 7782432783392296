# SPDX-License-Identifier: MIT
# runpoll 0.1.0
"""Start a remote run (a workflow, a job, a procedure) over HTTP and follow it until it ends.

    import runpoll

    with runpoll.Session(runpoll.RAPIDFOLIO, api_key) as session:
        run = session.start({"data": {"customerId": "cust_123"}}, procedure_id="proc_abc", environment="sandbox")
        for state in runpoll.iter_status(session, run):
            print(state.status, state.progress)
        print(state.result())

An `Api` says how one API speaks, a `Session` speaks it, each answer about a run is a `RunState`, a plain value, and
`iter_status` yields them: the loop is yours. No start is sent twice where the first may have begun a run, nothing is
cancelled unless you say so, nothing is global. All times are seconds, and None is no limit.
"""

from __future__ import annotations

import email.utils
import heapq
import http.client
import itertools
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from enum import Enum
from functools import lru_cache, partial
from math import inf
from typing import Any, ClassVar, TypeVar, Union, overload
from urllib.parse import quote, unquote, urljoin

import urllib3
from urllib3._collections import HTTPHeaderDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, EmptyPoolError, HTTPError, NewConnectionError, SSLError
from urllib3.util import Url, make_headers, parse_url
from urllib3.util.connection import create_connection

__version__ = "0.1.0"
__all__ = [
    "RunpollError", "TransportError", "ApiError", "BadResponse", "PollTimeout", "RunFailed", "RunCancelled", "RunNotDone",
    "BatchError", "Phase", "ErrorInfo", "RunState", "Api", "RAPIDFOLIO", "DOCLO", "DIBBY", "ONEPIN",
    "Session", "Backoff", "iter_status", "wait", "iter_batch",
]

_IDEMPOTENT = {"GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"}  # RFC 9110 section 9.2.2
_TRANSIENT = {408, 429, 500, 502, 503, 504}  # HTTP statuses that another try may not meet
# All in seconds:
_RETRY_FIRST, _RETRY_MOST = 0.5, 10.0  # the wait before the first retry, and the longest
_RETRY_AFTER_MOST = 120.0  # the longest Retry-After that is waited for
_REPLICA_LAG = 10.0  # for so long a run just started may be unknown
_IDLE_MOST = 5.0  # a connection idle for longer is not trusted with what cannot be repeated
_HOLD_MARGIN = 10.0  # what a start's answer may take beyond the server's hold
_LAST_POLL = 0.1  # what is kept for the last poll before a deadline, at least
_TICK = 1e-6  # points on the clock that are closer are one

_log = logging.getLogger("runpoll")
_T = TypeVar("_T")


# ---- Errors


class RunpollError(Exception):
    """The base of all errors, which pickle. `params` are the run's, to resume it by, where it concerns one."""

    params: dict[str, str] | None = None
    _transient = False  # another try may fare better

    def __init__(self, text: str = "", **attributes: Any) -> None:
        super().__init__(_printable(text))
        self.__dict__.update(attributes)  # as pickle and copy restore them


class TransportError(RunpollError):
    """No answer. `sent` is False when no connection was made, so that nothing can have begun."""

    sent: bool = True


class ApiError(RunpollError):
    """An HTTP error, or a redirect, which is never followed. `body` is the first 500 characters."""

    http_status: int
    error: ErrorInfo
    body: str
    request_id: str | None
    retry_after: float | None


class BadResponse(RunpollError):
    """An answer that is not the JSON promised, or larger than `max_body`. `body` is the first 500 characters."""

    http_status: int = 200
    body: str = ""
    _transient = True


class PollTimeout(RunpollError, TimeoutError):
    """`timeout` ran out; what was followed goes on. `state` is the last seen.

    Of a batch: `runs` are the params of those unfinished, `states` the last seen of them, `errors` as in BatchError.
    """

    state: RunState | None = None
    runs: Sequence[dict[str, str]] = ()
    states: Sequence[RunState] = ()
    errors: Sequence[RunpollError] = ()


class RunFailed(RunpollError):
    """`state.result()` of a run that failed."""

    state: RunState


class RunCancelled(RunpollError):
    """`state.result()` of a run that was cancelled."""

    state: RunState


class RunNotDone(RunpollError):
    """`state.result()` of a run that has not ended."""

    state: RunState


class BatchError(RunpollError):
    """The `errors` of a batch's runs, in their order, each with its `params`."""

    errors: Sequence[RunpollError] = ()


# ---- States


class Phase(str, Enum):
    """What a status word means: PAUSED waits for a person, UNKNOWN is not in the Api's list."""

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value

    @property
    def terminal(self) -> bool:
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


_PHASES = {word: phase for phase, words in {
    Phase.PENDING: "pending queued created scheduled submitted accepted enqueued notstarted starting initializing",
    Phase.RUNNING: "running inprogress processing started active working executing finalizing cancelling canceling",
    Phase.PAUSED: "paused suspended awaitingreview awaitingapproval awaitinginput requiresaction",
    Phase.SUCCEEDED: "success succeeded successful completed complete finished done",
    Phase.FAILED: "failed failure error errored timedout crashed expired",
    Phase.CANCELLED: "cancelled canceled aborted",
}.items() for word in words.split()}


class _Value:
    """What dataclass would write for each class anew, at every import."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __repr__(self) -> str:
        shown = (f"{part.name}={getattr(self, part.name)!r}" for part in fields(self) if part.repr)
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return self._compared() == other._compared() if isinstance(other, _Value) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Any, ...]:
        return type(self), *(getattr(self, part.name) for part in fields(self) if part.compare)


@dataclass(frozen=True, eq=False, repr=False)
class ErrorInfo(_Value):
    """What an API says of an error; `step` is the step of the run that failed."""

    message: str
    code: str | None = None
    step: str | None = None
    details: Any = None


@dataclass(frozen=True, eq=False, repr=False)
class RunState(_Value):
    """One answer about a run, `done` when it has ended, `ok` when it has succeeded.

    `status` is the API's own word, `raw` its whole answer, `params` the handle to store and resume from. `duration`,
    `retry_after`, `elapsed` (in this iteration) and `eta` are seconds, `progress` is 0.0 to 1.0, timestamps are UTC.
    `polls` counts the iteration's good answers, `faults` the failed attempts since the last.
    """

    id: str
    status: str
    phase: Phase
    output: Any = field(default=None, repr=False)
    error: ErrorInfo | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    duration: float | None = None
    steps_done: int | None = None
    steps_total: int | None = None
    progress: float | None = None
    status_url: str | None = None
    params: dict[str, str] = field(default_factory=dict)
    raw: Any = field(default=None, repr=False)
    retry_after: float | None = None
    polls: int = field(default=0, compare=False)
    faults: int = field(default=0, compare=False)
    elapsed: float = field(default=0.0, compare=False)
    eta: float | None = field(default=None, compare=False)

    __hash__ = None  # type: ignore[assignment]

    @property
    def done(self) -> bool:
        return self.phase.terminal

    @property
    def ok(self) -> bool:
        return self.phase is Phase.SUCCEEDED

    @overload
    def result(self, decode: None = None) -> Any: ...
    @overload
    def result(self, decode: Callable[[Any], _T]) -> _T: ...
    def result(self, decode: Callable[[Any], Any] | None = None) -> Any:
        """The output of a run that succeeded, through `decode` if given. Raises RunFailed, RunCancelled, RunNotDone."""
        if self.ok:
            return self.output if decode is None else decode(self.output)
        kind = {Phase.FAILED: RunFailed, Phase.CANCELLED: RunCancelled}.get(self.phase, RunNotDone)
        what = self.phase if self.done else f"has not ended (status {self.status!r}): follow it with iter_status()"
        said = self.error or ErrorInfo("")
        parts = (what, _one_line(said.message), said.step and f"step {said.step}", said.code and f"code {said.code}")
        raise kind(f"run {self.id} {', '.join(filter(None, parts))}", params=self.params, state=self)


def _but(value: _T, **changes: Any) -> _T:
    """`dataclasses.replace` at a tenth of its cost."""
    other = object.__new__(type(value))
    vars(other).update(vars(value), **changes)
    return other


# ---- Reading JSON: a value of the wrong type is as if absent


def _json(content: bytes | str, *_: object) -> Any:
    import json  # not above: urllib3 does without it, and a cold start is felt

    try:
        return json.loads(content) if content.strip() else None
    except (ValueError, RecursionError):
        raise BadResponse("is not JSON") from None  # the cause would carry the content


def _dump(value: Any, **options: Any) -> str:
    import json

    return json.dumps(value, **{"ensure_ascii": False, **options})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _word(value: Any) -> str | None:
    return _dump(value) if isinstance(value, (int, float)) else _text(value)


def _number(value: Any, most: float = 1e18) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value <= most else None


def _count(value: Any) -> int | None:
    return int(value) if _number(value) is not None and value % 1 == 0 else None


_ISO_8601 = (r"(?ai)(\d{4})-?(\d\d)-?(\d\d)(?:[t ](\d\d)(?::?(\d\d)(?::?(\d\d)(?:[.,](\d+))?)?)?)?"
             r" ?(?:z|([+-](?:[01]\d|2[0-3])):?([0-5]\d)?)?")


def _instant(value: Any) -> datetime | None:
    """ISO 8601, or Unix time in seconds or milliseconds; without an offset it is UTC."""
    with suppress(ValueError, OverflowError, OSError):
        value = value.isoformat() if isinstance(value, datetime) else value
        if isinstance(value, str) and len(value) < 100:
            return _moment(value)
        if (number := _number(value)) is not None:
            return datetime.fromtimestamp(number if number < 1e11 else number / 1000, timezone.utc)
    return None


@lru_cache(256)  # most answers of a run bring the same again
def _moment(text: str) -> datetime | None:
    if not (found := re.fullmatch(_ISO_8601, text)):
        return None
    text = "{}-{}-{}T{}:{}:{}.{:0<6.6}{:+>3}:{}".format(*found.groups("00"))  # the form that Python 3.9 reads, too
    return datetime.fromisoformat(text).astimezone(timezone.utc)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """A positive Retry-After (RFC 9110 section 10.2.3) in seconds, else None."""
    with suppress(LookupError, TypeError, ValueError, OverflowError):
        text = headers["Retry-After"].strip()
        if re.fullmatch(r"\d{1,300}(\.\d+)?", text):
            return float(text) or None
        if date := _instant(email.utils.parsedate_to_datetime(text)):
            return max(date.timestamp() - time.time(), 0.0) or None
    return None


def _error_info(said: Any) -> ErrorInfo | None:
    """An error in whichever of the usual forms."""
    said = {"detail": said} if isinstance(said, list) else said
    while isinstance(said, dict) and not _text(said.get("message")) and (
            inner := [part for part in map(said.get, ("error", "detail")) if isinstance(part, dict)]):
        said = inner[0]
    if not isinstance(said, dict):
        return said if isinstance(said, ErrorInfo) else ErrorInfo(said) if _text(said) else None
    more = [said.get(name) for name in ("detail", "errors", "error")]
    listed = "; ".join(_fault(fault) for part in more if isinstance(part, list) for fault in part)
    texts = (*map(said.get, ("message", "detail", "description", "title", "error")), listed, *said.values())
    message: Any = next(filter(_text, texts), "no text")
    code = _word(said.get("code")) or (_text(said.get("error")) if said.get("error") != message else None)
    details = said.get("details") or next((part for part in more if part not in (None, message, code)), None)
    return ErrorInfo(message, code, _text(said.get("step")), details)


def _fault(fault: Any) -> str:
    """What a validation says, like {"loc": ["body", "text"], "msg": "field required"}."""
    if not isinstance(fault, dict):
        return _text(fault) or ""
    where = fault.get("loc")
    where = ".".join(map(str, where)) if isinstance(where, list) else where
    return ": ".join(str(part) for part in (where, fault.get("msg") or fault.get("message")) if part)


def _one_line(text: str) -> str:
    """The first line that is not blank, of at most 200 characters."""
    return _printable(next(filter(None, map(str.strip, text.splitlines())), ""))[:200]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _unescaped(text: str) -> str:
    """JSON's escapes as what they stand for."""
    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", lambda found: chr(int(found[1], 16)) if found[1] else found[2], text)


# ---- How an API speaks


_PARAMETER = re.compile(r"\\?\{\\?(\+?)([^\W\d]\w*)\\?\}")  # of a template, as it is or through re.escape


class _Path:
    """A path template with its method, like "DELETE /jobs/{run_id}"."""

    def __init__(self, template: str, method: str = "POST") -> None:
        names = [name for _, name in _PARAMETER.findall(template)]
        self.names = set(names)
        if len(names) > len(self.names) or not re.fullmatch("(([A-Za-z]+ )?/[^{} ]*)?", _PARAMETER.sub("x", template)):
            raise ValueError(f"a path template is like '/jobs/{{run_id}}', each parameter once, not like {template!r}")
        named, _, self.path = template.rpartition(" ")
        self.method = (named or method).upper()

    def fill(self, params: Mapping[str, Any]) -> str:
        """The path, each value encoded whole, so that it cannot change the rest."""
        if params.keys() != self.names:
            raise TypeError(f"{self.path!r} takes the parameters {sorted(self.names)}, not {sorted(params)}")

        def encoded(found: re.Match[str]) -> str:
            value = quote(str(_typed(f"path parameter {found[2]}", params[found[2]], str, int)), safe=found[1] and "/")
            if not {"", ".", ".."}.isdisjoint(value.split("/")):
                raise ValueError(f"path parameter {found[2]} may have no empty, '.' or '..' segment: {value!r}")
            return value

        return _PARAMETER.sub(encoded, self.path)


def _typed(name: str, value: Any, *kinds: Any) -> Any:
    if not isinstance(value, kinds):
        raise TypeError(f"{name} has to be {' or '.join(kind.__name__ for kind in kinds)}, not {type(value).__name__}")
    return value


def _checked(name: str, value: Any, least: float = 0.0, most: float = inf) -> Any:
    if not least <= _typed(name, value, float, int) <= most:
        raise ValueError(f"{name} has to be from {least:g} to {most:g}, not {value!r}")
    return value


_Run = Union[str, Mapping[str, Any], RunState]
_Field = Union[str, Sequence[str], Callable[[Any], Any]]

# RunState field -> its converter, and its usual names, which _spelled adds to.
_FIELDS: dict[str, tuple[Any, str]] = {
    "id": (_word, "run_id id execution_id job_id task_id"),
    "status": (_word, "status state"),
    "output": (lambda value: value, "output outputs result results"),
    "error": (_error_info, "error error_message"),
    "created_at": (_instant, "created_at created submitted_at"),
    "started_at": (_instant, "started_at start_time"),
    "completed_at": (_instant, "completed_at finished_at ended_at end_time"),
    "duration": (_number, "duration_seconds"),
    "steps_done": (_count, "steps_done steps_completed completed_steps finished_steps"),
    "steps_total": (_count, "steps_total total_steps"),
    "progress": (partial(_number, most=1), "progress"),
    "status_url": (_text, "status_url"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Api(_Value):
    """How one API speaks. `Api(base_url="https://api.example.com", status="/jobs/{run_id}")` drives an ordinary one.

    Args:
        base_url: scheme, host and an optional path prefix.
        status: path template with `{run_id}`; `{+name}` keeps the slashes of a value (RFC 6570).
        start, cancel: path templates, "" for none; POST, unless one begins otherwise: "DELETE /jobs/{run_id}".
        root: dotted path to the object that holds the run.
        fields: RunState field -> a dotted path under `root`, a tuple of them (the first that is there), or a callable of
            that object. Others stand under their usual names.
        phases: status word -> Phase; only letters and digits count, in any case. Others mean the usual.
        auth_header, auth_scheme: where the key goes; an empty scheme sends it bare.
        idempotency: where a start's idempotency key goes: "header:NAME", "body:NAME", or "".
        hold: from a start's body, the seconds for which the server may hold its connection.
    """

    base_url: str
    status: str
    start: str = ""
    cancel: str = ""
    root: str = ""
    fields: Mapping[str, _Field] = field(default_factory=dict)
    phases: Mapping[str, Phase | str] = field(default_factory=dict)
    auth_header: str = "Authorization"
    auth_scheme: str = "Bearer"
    idempotency: str = ""
    hold: Callable[[Any], float] | None = None
    _paths: ClassVar[tuple[_Path, _Path, _Path]]
    _phases: ClassVar[dict[str, Phase]]
    _places: ClassVar[dict[str, Any]]
    _root: ClassVar[list[list[str]]]

    def __hash__(self) -> int:
        return hash((self.base_url, self.start, self.status))

    def __post_init__(self) -> None:
        _base_url(self.base_url)
        start, status, cancel = paths = _Path(self.start), _Path(self.status, "GET"), _Path(self.cancel)
        for wrong, rule in (
            (dict(self.fields).keys() - _FIELDS.keys(), f"fields may only name {', '.join(_FIELDS)}"),
            ({"run_id"} - status.names, "the status template has to name {run_id}"),
            (cancel.names - status.names, "the cancel template may only name what the status template names"),
            (start.names & {"self", "body", "request_timeout", "headers", "idempotency_key"},
             "a start parameter may not be named like an argument of Session.start"),
        ):
            if wrong:
                raise ValueError(f"{rule}: {', '.join(sorted(wrong))}")
        place, _, name = str.partition(self.idempotency, ":")
        if self.idempotency and (place not in ("header", "body") or name.split() != [name]):
            raise ValueError(f"idempotency is 'header:NAME' or 'body:NAME', not {self.idempotency!r}")
        vars(self).update(
            _paths=paths,
            _phases={**_PHASES, **{_bare(word): Phase(phase) for word, phase in dict(self.phases).items()}},
            _places={**_USUAL, **{name: _place(where) for name, where in self.fields.items()}},
            _root=_place(self.root) if self.root else [[]])

    def read_state(self, body: Any, params: Mapping[str, str] | None = None,
                   headers: Mapping[str, str] | None = None, http_status: int = 200) -> RunState:
        """The state in a parsed JSON answer, a webhook's too; a BadResponse without an id or a status.

        A subclass overrides it for an API that no table can express: every success answer to a start and a poll comes
        here, None for an empty one. `params` are those that were asked with (a start's lack `run_id`), None for the id
        alone; `headers` compare in any case.
        """
        headers = headers if isinstance(headers, HTTPHeaderDict) else HTTPHeaderDict(dict(headers or {}))
        asked: dict[str, Any] = dict(params or {})
        starts = params is not None and "run_id" not in asked
        run = _first(body, self._root)
        known: dict[str, Any] = {"http_status": http_status, "params": None if starts else params}
        with _readable("a field of the Api", **known):
            found = {name: _first(run, place, _FIELDS[name][0]) for name, place in self._places.items()}
        if starts and not found["id"] and "Location" in headers:
            with suppress(ValueError):  # it leads elsewhere
                path = _PARAMETER.sub(lambda name: quote(str(asked.get(name[2], name[0])), safe="/{}"), self._paths[0].path)
                asked.update(self._from_url(urljoin(self.base_url + path, headers["Location"])))
        for name, other in (("id", asked.get("run_id")), ("status", "" if starts else None)):
            found[name] = found[name] or other
            if found[name] is None:
                raise BadResponse(f"has no {name} of a run", **known)
        phase = self._phases.get(_bare(found["status"]), Phase.UNKNOWN) if found["status"] else Phase.PENDING
        found["error"] = found["error"] if phase in (Phase.FAILED, Phase.CANCELLED) else None
        if found["progress"] is None and found["steps_total"] and found["steps_done"] is not None:
            found["progress"] = min(found["steps_done"] / found["steps_total"], 1.0)
        begun, ended = found["started_at"] or found["created_at"], found["completed_at"]
        if found["duration"] is None and begun and ended and ended >= begun:
            found["duration"] = (ended - begun).total_seconds()
        asked.setdefault("run_id", found["id"])
        return RunState(**found, phase=phase, params=asked, raw=body, retry_after=_retry_after(headers))

    def _handle(self, run: _Run) -> dict[str, str]:
        """The path parameters of a run, however it is named."""
        if isinstance(run, str):
            run = self._from_url(run) if run.startswith(("http://", "https://")) else {"run_id": run}
        params = run.params if isinstance(run, RunState) else _typed("a run", run, str, Mapping, RunState)
        self._paths[1].fill(params)
        return {name: str(value) for name, value in params.items()}

    def _from_url(self, url: str) -> dict[str, str]:
        base, given, path = _base_url(self.base_url), parse_url(url), self._paths[1].path
        pattern = re.escape(_origin(base) + (base.path or "").rstrip("/") + path)
        pattern = _PARAMETER.sub(lambda name: f"(?P<{name[2]}>[^?&{'' if name[1] else '/'}]+)", pattern)
        found = re.fullmatch(pattern, _origin(given) + (given.request_uri if "?" in path else given.path or ""))
        if not found or given.auth or "{" in url:
            raise ValueError(f"the status URL does not fit {self.base_url + path!r}")
        return self._handle({name: unquote(value) for name, value in found.groupdict().items()})


@contextmanager
def _readable(where: str, **known: Any) -> Generator[None, None, None]:
    """Code that is not ours reads an answer here."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadResponse(f"could not be read ({type(error).__name__} in {where})", **known) from error


def _place(where: _Field) -> Any:
    """A callable, or dotted paths, split."""
    return where if callable(where) else [str.split(path, ".") for path in ([where] if isinstance(where, str) else where)]


def _spelled(names: str) -> list[str]:
    """created_at is createdAt, too."""
    both = ((name, name[0] + name.title().replace("_", "")[1:]) for name in names.split())
    return list(dict.fromkeys(itertools.chain(*both)))


_USUAL = {name: _place(_spelled(usual)) for name, (_, usual) in _FIELDS.items()}


def _first(body: Any, place: Any, convert: Callable[[Any], Any] = lambda value: value) -> Any:
    """The first value at `place` that `convert` takes, else None."""
    if callable(place):
        return convert(place(body))
    for path in place:
        value = body
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and (value := convert(value)) is not None:
            return value
    return None


def _bare(word: str) -> str:
    """Timed-Out, TIMED_OUT and timedOut are one word."""
    return "".join(filter(str.isalnum, word)).lower()


def _base_url(url: str) -> Url:
    base = parse_url(url)
    if base.scheme not in ("http", "https") or not base.host or base.auth or base.query or base.fragment:
        raise ValueError("base_url is http(s)://HOST[:PORT][/PREFIX], without user, query or fragment")
    return base


def _origin(url: Url) -> str:
    return f"{url.scheme}://{url.host}:{url.port or (443 if url.scheme == 'https' else 80)}"


# ---- The built-in APIs, as their documents describe them


def _scaled(units: float, place: Any, body: Any) -> Any:
    """A number that is in another unit."""
    return _first(body, place, lambda value: _number(value) and value / units)


def _held(switch: str, on: object, milliseconds: str, usual: float, body: Any) -> float:
    """For how many seconds a start is held whose body has `on` at `switch`."""
    return (_scaled(1000, _place(milliseconds), body) or usual) if _first(body, _place(switch)) == on else 0.0


RAPIDFOLIO = Api(
    base_url="https://run.rapidfolio.com",
    start="/v1/procedures/{procedure_id}/{environment}",
    status="/runs/{run_id}",
    cancel="/runs/{run_id}/cancel",
    phases={"timeout": Phase.RUNNING},  # of a synchronous start that the server holds no longer
    hold=partial(_held, "control.executionMode", "sync", "control.executionTimeout", 60.0),
)
DOCLO = Api(
    base_url="https://app.doclo.ai/api/v1",
    start="/flows/{flow_id}/run",
    status="/runs/{run_id}",
    cancel="/runs/{run_id}/cancel",
    fields={
        "duration": partial(_scaled, 1000, _place(["duration", "metrics.durationMs"])),
        "steps_done": "metrics.stepsRun",
        "steps_total": "metrics.stepsTotal",
        "progress": partial(_scaled, 100, _place("progress.percentage")),
    },
    idempotency="body:idempotencyKey",
    hold=partial(_held, "wait", True, "timeout", 30.0),
)
DIBBY = Api(base_url="https://dibby.ai/api", start="/runs", status="/runs/{run_id}", fields={"steps_total": "steps"})
ONEPIN = Api(
    base_url="https://api.onepin.ai",
    start="/api/v1/workflows/{workflow_id}/runs",
    status="/api/v1/workflows/{workflow_id}/runs/{run_id}/status",
    cancel="/api/v1/workflows/{workflow_id}/runs/{run_id}/cancel",
    root="data",
)


# ---- The wire


def _left(end: float) -> float:
    """The seconds until `end`; a timeout when there are none."""
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise socket.timeout("timed out")
    return seconds


class _Receiver(socket.SocketIO):
    """All receives share the socket's timeout; http.client would allow it to each."""

    _sock: socket.socket
    end: float

    def readinto(self, b: Any) -> int | None:
        self._sock.settimeout(_left(self.end))
        return super().readinto(b)


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        receiver: Any = self.fp.raw  # the socket counts its files, so this one changes and no other is made
        receiver.__class__, receiver.end = _Receiver, time.monotonic() + (sock.gettimeout() or 0.0)

    def begin(self) -> None:
        """Drops what is no header, which urllib3 would log."""
        super().begin()
        self.msg.defects.clear()
        self.msg.set_payload("")

    def _read_status(self) -> tuple[str, int, str]:
        """Passes over every interim answer (RFC 9110 section 15.2), not the 100 alone."""
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, 100 if 100 < status < 200 else status, reason


class _HTTP(HTTPConnection):
    response_class = _Response
    used_at = -inf

    def request(self, *args: Any, **kwargs: Any) -> None:
        self.used_at = time.monotonic()
        if self.sock:
            self.sock.settimeout(self.timeout)  # urllib3 1.26.0 would send under what the last attempt left
        super().request(*args, **kwargs)

    def connect(self) -> None:
        """Until a proxy's CONNECT and TLS are through, no connection was made."""
        try:
            super().connect()
            self.timeout = _left(self._end)
        except ssl.CertificateError:
            raise
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise NewConnectionError(self, str(error)) from error.with_traceback(None)

    def _new_conn(self) -> socket.socket:
        """A host's addresses share the timeout, and TLS has what they leave of it."""
        self._end = time.monotonic() + (self.timeout or 0.0)
        addresses = [found[4][0] for found in socket.getaddrinfo(self._dns_host.strip("[]"), self.port, 0, socket.SOCK_STREAM)]
        while True:
            address = str(addresses.pop(0)), self.port
            with suppress(*([OSError] if addresses else [])):
                sock = create_connection(address, _left(self._end) / (len(addresses) + 1), self.source_address, self.socket_options)
                sock.settimeout(_left(self._end))
                return sock

    def _tunnel(self) -> None:
        self.sock.settimeout(_left(self._end))
        super()._tunnel()
        self.sock.settimeout(_left(self._end))


class _HTTPS(_HTTP, HTTPSConnection):
    pass


class _Total(urllib3.Timeout):
    """One clock for all of an attempt; urllib3 would start another after a proxy's CONNECT."""

    def clone(self) -> _Total:
        return self

    @property
    def connect_timeout(self) -> Any:
        return self.read_timeout or 0.001

    def start_connect(self) -> float:
        return self._start_connect or super().start_connect()


_ONCE = urllib3.Retry(False, redirect=False)
_NO_ANSWER = (HTTPError, http.client.HTTPException, OSError)
_LATER = "try again later"
_ADVICE = {401: "check the API key", 404: "check the id, the base_url and whose key it is", 408: _LATER, 429: "ask less often",
           3: "redirects are never followed: is that the base_url to use?", 4: "unchanged it will fail again"}


def _proxy(base: Url) -> Url | None:
    """The proxy that the environment names for a URL."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        from urllib.request import getproxies, proxy_bypass  # as costly to import as all the rest

        url = getproxies().get(base.scheme or "")
        if url and not proxy_bypass(base.netloc or ""):
            return parse_url(url if "://" in url else f"http://{url}")
    return None


def _headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """`headers`, checked here because http.client would show a value that it refuses."""
    checked = {}
    for name, value in dict(headers or {}).items():
        if not (re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) and re.fullmatch(r"[ -~\xa0-\xff]*", value)):
            raise ValueError(f"header {name!r} has a character that no header can carry")
        checked[name.title()] = value
    return checked


def _error(ask: _Pursuit, seconds: float, response: Any, body: bytes, fault: Any) -> RunpollError:
    """What went wrong with an attempt, without the key, even where the API sent it back."""
    clean = ask.clean
    text, status = clean(body.decode("utf-8-sig", "replace")), response and response.status
    known: dict[str, Any] = {"http_status": status, "body": text[:500]}
    kind: type[RunpollError] = ApiError
    begun, advice = True, _LATER
    if isinstance(fault, _NO_ANSWER):
        inner = fault = getattr(fault, "original_error", fault)  # of a proxy's
        while nested := next((arg for arg in inner.args if isinstance(arg, BaseException)), None):
            inner = nested
        what = _one_line(re.split(r"(?<!SSL): |\] ", str(inner))[-1])
        if "timed out" in str(inner):
            what = f"no answer within {round(seconds, 2):g} s"
        if untrusted := isinstance(fault, SSLError) and isinstance(inner, ValueError):  # a certificate does not verify
            advice = "check the host, or trust its certificate by pool="
        unsent = isinstance(fault, (ConnectTimeoutError, EmptyPoolError)) or str(fault).startswith("Tunnel connection failed")
        begun = not untrusted and not unsent
        kind, known = TransportError, {"sent": begun, "_transient": not untrusted}
    elif fault and (status < 300 or not fault._transient):
        kind, known["_transient"] = BadResponse, fault._transient
        what, advice = f"answered HTTP {status}, but the answer {fault}", "check the base_url and the Api"
    else:
        said: Any = _one_line(text)
        with suppress(BadResponse):
            said = _json(text)
        error, headers = _error_info(said) or ErrorInfo(clean(response.reason or "no text")), response.headers
        request_id = clean(headers.get("X-Request-Id") or headers.get("Request-Id", ""))
        request_id = request_id or _first(said, [["meta", "request_id"]], _text)
        after = _retry_after(headers)
        known.update(error=error, request_id=request_id, retry_after=after, _transient=status in _TRANSIENT)
        what = f"answered HTTP {status}: {_one_line(error.message)}" + (f" (request {request_id})" if request_id else "")
        if status < 400 and "Location" in headers:
            what += f", to {clean(headers['Location']).partition('?')[0]}"
        begun = status >= 500 or status == 408
        advice = _ADVICE.get(status) or _ADVICE.get(status // 100, _LATER)
        if after:
            advice += f" (Retry-After: {after:g} s)"
    if ask.starts:
        advice += "; a run may have begun: look before you start it again" if begun else "; no run has begun"
    raised = kind(clean(f"{ask.name}: {what}; {advice}"), params=ask.run, **known)
    raised.__cause__ = link = fault.__cause__ if isinstance(fault, BadResponse) else fault
    while link:
        if clean(str(link)) != str(link):
            raised.__cause__ = None
        link = link.__cause__ or link.__context__
    return raised


# ---- The session


class Session:
    """Speaks one API. A context manager; safe to share between threads, not across a fork.

    Args:
        api_key: the key, or a callable that returns it, asked for every attempt, possibly from several threads.
        base_url: instead of the Api's.
        request_timeout: seconds for one attempt, its connecting, headers and body included.
        retries: of a call, after transient faults; an iteration has `max_outage`.
        max_body: bytes that an answer may have.
        pool: a ready PoolManager (a proxy, a private CA, mutual TLS), which `close()` leaves open, and where each read
            has `request_timeout`. None obeys HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
        allow_http: lets the key go over plain http to other hosts than this one.
        sleep, clock: for every wait. A `sleep` that returns True (`threading.Event().wait`) ends what waits.
    """

    def __init__(self, api: Api, api_key: str | Callable[[], str] | None = None, *, base_url: str | None = None,
                 headers: Mapping[str, str] | None = None, request_timeout: float = 30.0, retries: int = 3,
                 max_body: int = 16 * 2**20, pool: urllib3.PoolManager | None = None, allow_http: bool = False,
                 sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.monotonic) -> None:
        base = _base_url(_typed("api", api, Api).base_url if base_url is None else base_url)
        self._api = _but(api, base_url=base.url)
        self._key = api_key if callable(api_key) else self._prove(api_key)
        self._headers = {"Accept": "application/json", "User-Agent": f"runpoll/{__version__}", **_headers(headers)}
        self._timeout = _checked("request_timeout", request_timeout, 0.001, 1e9)
        self._retries, self._max_body = _checked("retries", retries, most=1e9), _checked("max_body", max_body)
        self._sleep, self._clock, self._lock = _typed("sleep", sleep, Callable), _typed("clock", clock, Callable), threading.Lock()
        self._closed, self._held_until = False, -inf
        self._unknown: set[str] = set()  # the status words that were warned of

        self._origin, self._owned, proxy = _origin(base), not pool, None if pool else _proxy(base)
        hops = [url.host or "" for url in (base, proxy) if url and base.scheme == "http"]
        if api_key and not allow_http and not all(re.fullmatch(r"localhost|127(\.\d+){3}|\[::1\]", hop) for hop in hops):
            raise ValueError("the key would go over plain http: use https, or allow_http=True if the network is yours")
        self._prefix = (self._origin if pool or (proxy and hops) else "") + (base.path or "").rstrip("/")
        self._pool = _typed("pool", pool or urllib3.PoolManager(maxsize=0), urllib3.PoolManager)  # 0: keep all that are needed
        if proxy:
            auth = make_headers(proxy_basic_auth=unquote(proxy.auth or ""))
            self._pool = urllib3.ProxyManager(proxy._replace(auth=None).url, maxsize=0, proxy_headers=auth)
        self._send: Callable[..., Any] = self._pool.urlopen
        if self._owned:  # the host's own pool saves a fifth of a poll, and lets its connections be ours
            host: Any = self._pool.connection_from_url(self._origin)
            host.ConnectionCls = _HTTPS if host.scheme == "https" else _HTTP
            self._send = host.urlopen

    def __repr__(self) -> str:
        return f"Session({self._api.base_url!r})"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the session then raises RuntimeError."""
        self._closed = True
        if self._owned:
            self._pool.clear()

    def start(self, body: Any = None, *, request_timeout: float | None = None, headers: Mapping[str, str] | None = None,
              idempotency_key: str | None = None, **params: str) -> RunState:
        """Start a run with `body` as JSON, and return its first state; `params` fill the start template.

        It is tried again only where no run can have begun (no connection was made, 429), or under an idempotency key; an
        error says whether one may have. `request_timeout` None is the session's or, when longer, what `hold` says plus 10.
        """
        api, (path, status_path, _) = self._api, self._api._paths
        if not api.start:
            raise ValueError("this Api has no start template")
        if idempotency_key is not None:
            place, _, name = api.idempotency.partition(":")
            if not place or not str.strip(idempotency_key):
                raise ValueError("the idempotency key is empty, or this Api has none")
            if place == "header":
                headers = {**(headers or {}), name: idempotency_key}
            else:
                body = {**(body or {}), name: idempotency_key}
        if api.hold and request_timeout is None and (held := api.hold(body)):
            request_timeout = max(self._timeout, held + _HOLD_MARGIN)
        read = partial(self._state, {name: str(value) for name, value in params.items() if name in status_path.names})
        return self._call(path, params, read, body, headers, request_timeout, starts=True)  # type: ignore[no-any-return]

    def poll(self, run: _Run) -> RunState:
        """One status request, for an id, path parameters, a RunState, or a status URL of the API's."""
        return self._call(**self._following(run))  # type: ignore[no-any-return]

    def cancel(self, run: _Run, body: Any = None) -> bool:
        """Cancel a run, as `concurrent.futures.Future.cancel`: False when it had already ended otherwise.

        An ApiError means that the API refuses, and the run is still active, or cannot be found either.
        """
        path = self._api._paths[2]
        if not path.path:
            raise ValueError("this Api has no cancel template")
        if isinstance(run, RunState) and run.done:
            return run.phase is Phase.CANCELLED
        handle = self._api._handle(run)

        def read(*answer: Any) -> RunState | None:
            with suppress(BadResponse):
                if (state := self._state(None, *answer)).id == handle["run_id"]:
                    return state
            return None

        refusal = None
        try:
            state = self._call(path, {name: handle[name] for name in path.names}, read, body, run=handle)
        except ApiError as error:
            if error.http_status not in (404, 409, 410, 422):
                raise
            state, refusal = None, error
        try:
            state = state or self.poll(handle)
        except ApiError as error:
            if error.http_status != 404:
                raise
        if state and state.done:
            return state.phase is Phase.CANCELLED
        if refusal:
            raise refusal
        return True  # what is gone was cancelled

    def request(self, method: str, path: str, body: Any = None, *, params: Mapping[str, str] | None = None,
                request_timeout: float | None = None, headers: Mapping[str, str] | None = None) -> Any:
        """Any other call of the API: the parsed JSON, None for an empty answer. `params` fill the template `path`.

        POST and PATCH are tried again as a start is.
        """
        return self._call(_Path(method + " " + path), dict(params or {}), _json, body, headers, request_timeout)

    def _following(self, run: _Run) -> dict[str, Any]:
        """The arguments of the _Pursuit of a run."""
        handle = self._api._handle(run)
        return {"path": self._api._paths[1], "params": handle, "run": handle, "read": partial(self._state, handle)}

    def _state(self, params: dict[str, str] | None, content: bytes, headers: HTTPHeaderDict, status: int) -> RunState:
        with _readable("read_state"):  # which may be a subclass's
            asked = None if params is None or status == 504 else dict(params)  # a 504 has to name the run itself
            state = self._api.read_state(_json(content), asked, headers, status)
            if status == 504 and state.phase is Phase.UNKNOWN:
                raise BadResponse("has no state")
            handle = params if params and "run_id" in params else {"run_id": state.id, **(params or {}), **state.params}
            return _but(state, status="" + state.status, phase=Phase(state.phase), params=dict(handle))

    def _call(self, *request: Any, **options: Any) -> Any:
        """The answer to a direct call."""
        ask = _Pursuit(self, *request, **options, retries=self._retries)
        for until in ask.answers(self._clock()):
            if self._nap(until):
                begun = "; no run has begun" if ask.starts else ""
                text = f"{ask.name}: not sent, as sleep() ended the wait{begun}"
                raise ask.fault or TransportError(text, params=ask.run, sent=False)
        return ask.answer

    def _nap(self, until: float) -> bool:
        """Wait until a point on the clock; true when `sleep` ends all."""
        seconds = until - self._clock()
        return seconds > 0 and self._sleep(seconds) is True

    def _authorize(self, ask: _Pursuit) -> dict[str, str]:
        """The header with the key, which a callable is asked for anew."""
        if self._closed:
            raise RuntimeError("the session is closed")
        key, header = self._prove(self._key()) if callable(self._key) else self._key
        if len(key) > 3 and key not in ask.keys:  # one so short is no secret, but many a word
            ask.keys = [*ask.keys[-1:], key]  # an answer may speak of the one before, too
        return header

    def _prove(self, given: str | None) -> tuple[str, dict[str, str]]:
        """A key, and the header that carries it."""
        key: str = _typed("api_key", "" if given is None else given, str).strip()
        return key, _headers({self._api.auth_header: f"{self._api.auth_scheme} {key}".strip()} if key else None)

    def _attempt(self, ask: _Pursuit, auth: dict[str, str], seconds: float) -> Any:
        """One attempt; the one place that reaches the network."""
        if ask.starts or not ask.repeatable:  # a connection long idle may be dead, which is learned too late
            idle: Any = self._pool.connection_from_url(self._origin).pool
            with idle.mutex:  # nobody takes one meanwhile
                for connection in filter(None, idle.queue):
                    if time.monotonic() - getattr(connection, "used_at", -inf) > _IDLE_MOST:
                        connection.close()
        response: Any = None
        body, fault, total = b"", None, _Total(total=seconds)
        total.start_connect()
        try:
            response = self._send(
                ask.method, ask.target, body=ask.body, headers={**ask.headers, **auth}, retries=_ONCE, redirect=False,
                timeout=total, pool_timeout=seconds, assert_same_host=False, preload_content=False,
                enforce_content_length=True)
            body = self._read(response)
            if len(body) > self._max_body:
                raise BadResponse(f"is larger than max_body, {self._max_body} bytes", _transient=False)
            if 200 <= response.status < 300 or (response.status == 504 and ask.starts):
                return ask.read(body, response.headers, response.status)
        except (BadResponse, *_NO_ANSWER) as caught:
            fault = caught
        raise _error(ask, seconds, response, body, fault)  # here, where it has no context that shows what it hides

    def _read(self, response: Any) -> bytes:
        """The whole body, or more than `max_body` bytes of it."""
        body, packed = bytearray(), "Content-Encoding" in response.headers
        try:
            if response.status < 200:
                raise http.client.BadStatusLine("an interim answer alone")
            while len(body) <= self._max_body and (piece := response.read(2**14 if packed else 2**16, packed)):
                body += piece
                if response.length_remaining == 0 and not packed:
                    break  # which spares a last read of nothing
        finally:
            if not response.isclosed():
                response.close()  # the rest would be taken for the next answer
            response.release_conn()
        return bytes(body)


# ---- Following


class _Pursuit:
    """A request, tried until it is answered; a run, polled until it ends.

    Its generators yield the points on the clock until which the caller is to wait.
    """

    run: dict[str, str] | None = None
    starts = False
    begun, deadline, max_outage, retries = 0.0, inf, inf, inf
    interval: Callable[[RunState, int], float]
    answer: Any = None  # at first the state that was handed in
    state: RunState | None = None
    fault: RunpollError | None = None
    faults, polls, took = 0, 0, 0.0

    def __init__(self, session: Session, path: _Path, params: Mapping[str, Any], read: Callable[..., Any], body: Any = None,
                 headers: Mapping[str, str] | None = None, request_timeout: float | None = None, **options: Any) -> None:
        for name, value in options.items():
            setattr(self, name, value)
        self.session, self.read = session, read
        self.method, self.target = path.method, session._prefix + path.fill(params)
        run, shown = self.run, f"{self.method} {self.target.partition('?')[0]}"
        self.name = f"run {_printable(run['run_id'])} ({shown})" if run else f"start ({shown})" if self.starts else shown
        own, (place, _, name) = _headers(headers), session._api.idempotency.partition(":")
        keyed = name and (own.get(name.title()) if place == "header" else isinstance(body, dict) and body.get(name))
        self.repeatable = bool(run or keyed or (self.method in _IDEMPOTENT and not self.starts))
        self.body = None if body is None else _dump(body, allow_nan=False).encode()
        self.headers = {**session._headers, **({"Content-Type": "application/json"} if self.body else {}), **own}
        self.request_timeout = session._timeout if request_timeout is None else _checked(
            "request_timeout", request_timeout, 0.001, 1e9)
        self.keys: list[str] = []  # to be kept out of texts

    def clean(self, text: str) -> str:
        """`text` without the keys, as they are or escaped in JSON."""
        for key in sorted(self.keys, key=len, reverse=True):
            text = text.replace(key, "[key]")
            if "\\" in text and key in (plain := _unescaped(text)):
                text = plain.replace(key, "[key]")
        return text

    def answers(self, due: float) -> Generator[float, None, None]:
        """The one retry loop, from when the request is `due` until it has its `answer`."""
        session, self.faults, self.renewed = self.session, 0, False
        self.since: dict[bool, float] = {}  # when the first fault was, a 404 that may pass apart
        while True:
            yield from self.pause(due)
            auth, asked = session._authorize(self), session._clock()
            if asked >= self.deadline:
                continue  # the key took all the time, and pause() raises
            try:
                self.answer = session._attempt(self, auth, min(self.request_timeout, self.deadline - asked))
                break
            except RunpollError as fault:
                self.faults += 1
                due = self.retry_at(fault)
                self.fault = fault
        self.fault, self.took = None, session._clock() - asked
        phase, status = getattr(self.answer, "phase", None), self.clean(getattr(self.answer, "status", ""))
        _log.debug("%s: %r, after %d faults", self.name, status, self.faults)
        if phase is Phase.UNKNOWN and (word := _bare(status)) not in session._unknown:
            session._unknown.add(word)
            _log.warning("%s: unknown status %r, taken as not ended; Api.phases may list it", self.name, status)

    def pause(self, due: float) -> Generator[float, None, None]:
        """Waits until `due`, or until one more poll just fits before the deadline, and while the session is held back."""
        session, now = self.session, self.session._clock()
        last = self.deadline - max(_LAST_POLL, 2 * self.took)
        due = last if now + _TICK < last < due else due
        while max(now, due) < self.deadline:
            yield min(max(due, session._held_until), self.deadline)  # at least once, so that the first step sends nothing
            now = session._clock() + _TICK
            if max(due, session._held_until) <= now < self.deadline:
                return
        raise self.timed_out(f"within {self.deadline - self.begun:g} s") from self.fault

    def timed_out(self, when: str) -> PollTimeout:
        seen = f"last status {self.state.status!r}" if self.state else "no status seen"
        text = f"{self.name}: not ended {when} ({seen}); it goes on, and iter_status(session, error.params) resumes it"
        return PollTimeout(self.clean(text), params=self.run, state=self.state)

    def retry_at(self, fault: RunpollError) -> float:
        """When to try again after a fault, which is raised where that is never."""
        session = self.session
        now: float = session._clock()
        status, after = getattr(fault, "http_status", 0), getattr(fault, "retry_after", None) or 0.0
        if status == 401 and callable(session._key) and not self.renewed:
            self.renewed = True
            _log.warning("%s; asking for it again", fault)
            return now
        if fault._transient and now >= self.deadline - _TICK:
            return now  # the deadline ended it, and is what is raised
        lagging = status == 404 and self.state is not None and not self.polls
        ends, safe = inf, True
        if status != 429:  # which is no outage, and only delays
            ends = self.since.setdefault(lagging, now) + (_REPLICA_LAG if lagging else self.max_outage)
            safe = self.repeatable or not getattr(fault, "sent", True)
        late = now >= ends or self.faults > self.retries + self.renewed or (self.retries < inf and after > _RETRY_AFTER_MOST)
        if late or not safe or not (fault._transient or lagging):
            raise fault
        wait = min(after, _RETRY_AFTER_MOST) or min(
            _RETRY_FIRST * 2 ** min(self.faults - 1, 9) * random.uniform(0.9, 1.1), _RETRY_MOST, ends - now)
        if status == 429 or (status == 503 and after):
            with session._lock:
                session._held_until = max(session._held_until, now + wait)
        _log.warning("%s; trying again in %.1f s", fault, wait)
        return now + wait

    def states(self) -> Generator[float | RunState, None, None]:
        """Every state, each after the points to wait for."""
        answered = due = self.begun
        first = None
        for index in itertools.count():
            if index or not self.answer:
                yield from self.answers(due)
                answered, self.polls = self.session._clock(), self.polls + 1
            elapsed, share, eta = answered - self.begun, self.answer.progress, None
            if share is not None:
                first = first or (share, elapsed)
                gained, taken = share - first[0], elapsed - first[1]
                eta = (1 - share) / (gained / taken) if gained > 0 and taken > 0 else None
            self.state = self.answer = state = _but(self.answer, polls=self.polls, faults=self.faults, elapsed=elapsed, eta=eta)
            yield state
            if state.done:
                return
            due = answered + (min(state.retry_after or 0.0, _RETRY_AFTER_MOST) or self.interval(state, index))

    def follow(self) -> Generator[RunState, None, None]:
        """The states, waited for by the session's sleep."""
        for step in self.states():
            if isinstance(step, RunState):
                yield step
            elif self.session._nap(step):
                return


@dataclass(frozen=True, eq=False, repr=False)
class Backoff(_Value):
    """The default interval, a pure function of the state (and chance): one serves any number of runs.

    The seconds grow from `initial` by `factor` a poll to `maximum`, give or take the share `jitter`. An `eta` cuts them
    to its share `pace`, though not below `initial`; while PAUSED they are `paused`.
    """

    initial: float = 1.0
    factor: float = 1.3
    maximum: float = 12.0
    jitter: float = 0.1
    pace: float | None = 0.7
    paused: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _checked(name, 0.0 if (name, value) == ("pace", None) else value, most=1.0 if name == "jitter" else inf)

    def __call__(self, state: RunState) -> float:
        chance = random.uniform(1 - self.jitter, 1 + self.jitter)
        if state.phase is Phase.PAUSED:
            return self.paused * chance
        wait = self.maximum
        with suppress(OverflowError):
            wait = min(self.initial * self.factor ** max(0, state.polls - 1), wait)
        wait = min(wait * chance, self.maximum)
        return wait if self.pace is None or state.eta is None else min(wait, max(self.pace * state.eta, self.initial))


_Interval = Union[float, Sequence[float], Callable[[RunState], float]]


def iter_status(session: Session, run: _Run, *, interval: _Interval = Backoff(), timeout: float | None = 300.0,
                max_outage: float | None = 60.0) -> Generator[RunState, None, None]:
    """Poll a run until it ends, and yield every state, the terminal one last.

    Args:
        run: an id, path parameters or a status URL, polled at once; or a RunState, yielded first.
        interval: seconds from a good answer to the next poll: a number, a sequence whose last repeats, or a callable of
            the state. A Retry-After replaces it once.
        timeout: seconds for all, from this call on; the last wait is cut so that one more poll fits.
        max_outage: seconds for which faults are sat out, from the first on.

    Raises:
        PollTimeout: `iter_status(session, error.params)` takes the run up again.
        RunpollError: a fault that does not pass.
    """
    return _asks(session, [run], interval, timeout, max_outage)[0].follow()


def wait(session: Session, run: _Run, *, interval: _Interval = Backoff(), timeout: float | None = 300.0,
         max_outage: float | None = 60.0) -> RunState:
    """The last state of `iter_status`, with its arguments and errors; PollTimeout, too, when `sleep` ends it."""
    ask, = _asks(session, [run], interval, timeout, max_outage)
    for state in ask.follow():
        if state.done:
            return state
    raise ask.timed_out("when sleep() ended the wait") from ask.fault


def _asks(session: Session, runs: Iterable[_Run], interval: _Interval, timeout: float | None,
          max_outage: float | None) -> list[_Pursuit]:
    """One for each run, however often it is given; the clock of the iteration starts here."""
    if not hasattr(session, "_following"):
        raise TypeError(f"session has to be a Session, not {type(session).__name__}")
    begun = session._clock()
    limits = {
        "begun": begun,
        "deadline": begun + _checked("timeout", inf if timeout is None else timeout, -inf),
        "max_outage": _checked("max_outage", inf if max_outage is None else max_outage),
        "interval": _waits(interval),
    }
    asks: dict[str, _Pursuit] = {}
    for run in runs:
        ask = _Pursuit(session, **session._following(run), **limits, answer=run if isinstance(run, RunState) else None)
        asks.setdefault(ask.target, ask)
    return list(asks.values())


def _waits(interval: _Interval) -> Callable[[RunState, int], float]:
    """The seconds to wait after a state, which is the how-manieth."""
    def seconds(number: float) -> Any:
        return min(_checked("interval", number), 1e9)  # no clock goes on for longer

    if callable(interval):
        return lambda state, _: seconds(interval(state))
    numbers = [seconds(number) for number in (interval if isinstance(interval, Sequence) else [interval])]
    last = _checked("the length of interval", len(numbers), 1) - 1
    return lambda _, index: numbers[min(index, last)]


# ---- Many runs at once


def iter_batch(session: Session, runs: Iterable[_Run], *, timeout: float | None, interval: _Interval = Backoff(),
               max_outage: float | None = 60.0, workers: int = 8) -> Generator[RunState, None, None]:
    """Poll many runs until all have ended, each on its own schedule, and yield every state as it arrives.

    Arguments are as in `iter_status`; `workers` requests, each in its thread, may be in flight.

    Raises:
        BatchError: at the end, for the runs that could not be followed; at once where the key is refused (401).
        PollTimeout: `iter_batch(session, error.runs, timeout=...)` takes the rest up again.
    """
    if isinstance(runs, (str, Mapping)):
        raise TypeError("runs has to be an iterable of runs; for one, use iter_status")
    asks = _asks(session, runs, interval, timeout, max_outage)
    return _batch(session, asks, _checked("workers", _typed("workers", workers, int), 1))


def _batch(session: Session, asks: list[_Pursuit], workers: int) -> Generator[RunState, None, None]:
    """Workers resume the runs that are due; the consumer takes the states that come of it, and waits."""
    steps = [ask.states() for ask in asks]
    due = [*((ask.begun, index) for index, ask in enumerate(asks)), (inf, -1)]  # a heap that is never empty
    ready: deque[tuple[int, RunState]] = deque()
    errors: list[Any] = [None] * len(asks)
    fatal: BaseException | None = None
    changed, left, closed = threading.Condition(), len(due), False  # what is left and neither due nor ready is in flight

    def close(error: BaseException | None = None) -> None:
        nonlocal fatal, closed
        with changed:
            fatal, closed = fatal or error, True
            changed.notify_all()

    def resume(index: int) -> None:
        """Take a run's next step: a state, a point to wait for, or its end."""
        nonlocal left
        step, error = None, None
        try:
            step = next(steps[index], None)
        except BaseException as caught:  # noqa: BLE001  # the consumer raises it
            error = caught
        with changed:
            if isinstance(step, RunState):
                ready.append((index, step))
            elif step is not None:
                heapq.heappush(due, (step, index))
            else:
                left -= 1
            if error:
                ours = getattr(error, "params", None) is asks[index].run  # or the caller's, of its key or its interval
                errors[index] = error if ours else None
                if not ours or getattr(error, "http_status", 0) == 401:
                    close(error)
            changed.notify_all()
        if errors[index] and not isinstance(error, PollTimeout):
            _log.warning("%s; the others go on", error)

    def work() -> None:
        try:
            while True:
                with changed:
                    while not closed and (wait := due[0][0] - session._clock()) >= _TICK:
                        changed.wait(min(wait, threading.TIMEOUT_MAX))
                    if closed:
                        return
                    index = heapq.heappop(due)[1]
                resume(index)
        except BaseException as caught:  # noqa: BLE001  # of the clock or a log handler; the consumer raises it
            close(caught)

    threads = [threading.Thread(target=work, daemon=True) for _ in asks[:workers]]
    try:
        for thread in threads:
            thread.start()
        while True:
            with changed:
                while not (ready or closed or (left == len(due) and due[0][0] - session._clock() >= _TICK)):
                    changed.notify_all()  # workers may have slept through a leap of the clock
                    changed.wait()
                index, state = ready.popleft() if ready else (-1, None)
                until = inf if closed else due[0][0]
            if state:
                resume(index)  # no further than to when the next poll is due
                if fatal and not isinstance(fatal, Exception):
                    break  # Ctrl-C waits for no loop body
                yield state
            elif until == inf:
                break
            elif session._nap(until):
                return
    finally:
        close()
    for thread in threads if left == len(due) else ():  # none is in flight
        thread.join()
    late = [error for error in errors if isinstance(error, PollTimeout)]
    broken = [error for error in errors if error and not isinstance(error, PollTimeout)]
    if fatal and fatal not in broken:
        raise fatal
    if late and not fatal:
        raise PollTimeout(
            f"{len(late)} of {len(asks)} runs not ended; they go on, and iter_batch(session, error.runs, timeout=...) resumes "
            f"them; the first: {late[0]}", errors=broken, runs=[error.params for error in late],
            states=[error.state for error in late if error.state]) from late[0].__cause__
    if broken:
        first = "; ".join(map(str, broken[:3]))
        raise BatchError(f"{len(broken)} of {len(asks)} runs could not be followed: {first}", errors=broken)


# ---- The command line


def _main() -> int:
    """Follow a run to its end, and return the exit code."""
    import argparse
    import pathlib
    import shlex
    import shutil
    import sys
    import unicodedata

    def pair(text: str) -> list[str]:
        if "=" not in text:
            raise argparse.ArgumentTypeError("it has to be NAME=VALUE")
        return text.split("=", 1)

    parser = argparse.ArgumentParser(
        prog="runpoll", description="Follow a remote run until it ends. The API key is read from RUNPOLL_API_KEY.",
        epilog="exit code: 0 succeeded, 1 failed, 3 cancelled, 2 wrong usage, 5 API or transport error, 124 timed out, "
               "130 interrupted")
    parser.error = lambda message: parser.exit(2, f"runpoll: {message}; see runpoll --help\n")  # type: ignore[method-assign]
    option = parser.add_argument
    option("run", help="its id, or its status URL")
    option("--api", default="rapidfolio", help="rapidfolio (default), doclo, dibby, onepin, or a JSON file of Api fields")
    option("--base-url", metavar="URL", help="instead of the API's own")
    for name, use in (("--param", "another path parameter"), ("--header", "sent with every request")):
        option(name, metavar="NAME=VALUE", type=pair, action="append", default=[], help=use)
    option("--interval", type=float, default=Backoff(), help="seconds between polls (default: they back off)")
    option("--timeout", type=float, default=300.0, help="seconds for all (default: 300)")
    option("--json", action="store_true", help="print each state as a line of JSON")
    option("-v", "--verbose", action="store_true", help="log each poll")
    option("--version", action="version", version=f"runpoll {__version__}")
    args = parser.parse_args()

    nowhere = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere  # None when they were closed
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not args.json
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # what the locale lacks
    clear, end = ("\r\x1b[K", "") if live else ("", "\n")
    logging.basicConfig(format=f"{clear}runpoll: %(message)s")
    _log.setLevel("DEBUG" if args.verbose else "WARNING")
    key = os.environ.get("RUNPOLL_API_KEY")
    built_in = {"rapidfolio": RAPIDFOLIO, "doclo": DOCLO, "dibby": DIBBY, "onepin": ONEPIN}
    try:
        api = built_in.get(args.api.lower()) or Api(**_json(pathlib.Path(args.api).read_bytes()))
        session = Session(api, key, base_url=args.base_url, headers=dict(args.header))
        run = args.run if args.run.startswith(("http://", "https://")) else {"run_id": args.run, **dict(args.param)}
        states = iter_status(session, run, interval=args.interval, timeout=args.timeout)
    except (OSError, ValueError, TypeError, BadResponse) as error:
        parser.error(str(error))

    def draw(state: RunState) -> str:
        columns = shutil.get_terminal_size().columns
        wide = min(20, columns // 4)
        share = "" if state.progress is None else f"{state.progress:4.0%} "
        bar = f"[{'#' * int((state.progress or 0) * wide):<{wide}}] " if live and share else ""
        line = f"{state.phase:<9} {bar}{share}{_one_line(state.status)}"
        if not live:
            return line
        left = f"{state.eta:.0f} s left, " if state.eta else ""
        line = f"{line} ({left}{state.elapsed:.0f} s)"
        while sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) >= columns:
            line = line[:-1]
        colour = {Phase.SUCCEEDED: 32, Phase.FAILED: 31, Phase.CANCELLED: 31, Phase.PAUSED: 33}.get(state.phase, 36)
        return line if os.environ.get("NO_COLOR") else f"\x1b[{colour}m{line[:9]}\x1b[0m{line[9:]}"

    state: Any = None
    shown, code, problem = "", 5, ""
    goes_on = f"the run goes on, and this resumes it: python -m runpoll {shlex.join(sys.argv[1:])}"
    try:
        with session:
            for state in states:
                fields = {**vars(state), "error": state.error and vars(state.error)}
                line = _dump(fields, ensure_ascii=True, default=datetime.isoformat) if args.json else draw(state)
                if live or line != shown:  # as JSON, two states always differ
                    print(f"{clear}{line}", end=end, flush=True)
                shown = line
        code = {Phase.SUCCEEDED: 0, Phase.FAILED: 1}.get(state.phase, 3)
        state.result()
    except PollTimeout as error:
        code, problem = 124, f"{str(error).partition(';')[0]}; {goes_on}"
    except RunpollError as error:
        problem = f"{error} (RUNPOLL_API_KEY is not set)" if code == 5 and not key else str(error)
    except (KeyboardInterrupt, OSError) as error:
        code, problem = 130, f"interrupted; {goes_on}"
        if isinstance(error, OSError):  # nobody reads the output, nor what is still to be flushed
            os.dup2(nowhere.fileno(), 1)
    if live and shown:
        print()
    if problem:
        print(f"runpoll: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(_main())
