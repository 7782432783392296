# SPDX-License-Identifier: MIT
# runpoll 0.2.0
"""Start a remote run (a workflow, a job, a procedure) over HTTP and follow it until it ends.

    import runpoll

    with runpoll.Session(runpoll.RAPIDFOLIO, api_key) as session:
        body = {"data": {"customerId": "cust_123"}}
        run = session.start(body, procedure_id="proc_abc", environment="sandbox")
        for state in runpoll.iter_status(session, run):
            print(state.status, state.progress)
        print(state.result())

An `Api` reads answers. A `Session` makes attempts. A watch knows when the next one is due. An
iterator waits and yields `RunState`s, plain values: the loop is yours, to leave by `break` and to
take up again, in any process, by `state.params`.

Faults that pass are sat out. A start is never sent twice where the first may have begun a run,
nothing is cancelled unless you say so, and nothing is global. All times are seconds.
"""

from __future__ import annotations

import email.utils
import heapq
import http.client
import io
import json
import logging
import math
import os
import queue
import random
import re
import socket
import ssl
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar, Union, overload
from urllib.parse import quote, unquote

import urllib3
from urllib3 import exceptions
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import Url, make_headers, parse_url

__version__ = "0.2.0"
__all__ = ["Session", "iter_status", "wait", "iter_batch", "Backoff", "main"]
__all__ += ["Api", "RAPIDFOLIO", "DOCLO", "DIBBY", "ONEPIN", "RunState", "Phase", "ErrorInfo"]
__all__ += ["RunpollError", "TransportError", "ApiError", "BadResponse", "PollTimeout"]
__all__ += ["RunFailed", "RunCancelled", "RunNotDone", "BatchError"]

_T = TypeVar("_T")
_log = logging.getLogger("runpoll")

# One poll, from top to bottom; a direct call takes the same way by Session._call, without a watch:
#
#   _watches                            once: the _Request, the _Retry and the _Watch of a run
#   _follow                             the loop
#     Session._wait                     sleeps until _Watch.next_attempt, which raises PollTimeout
#     Session._attempt -> _Outcome      one request: a state, or an error that is not raised yet
#       _Wire.exchange -> _Answer       urllib3
#       Session._read_state             Api.read_state
#       _Retry.failed                   after a fault: when to try again, and whether to
#     _take_in
#       _Watch.succeeded -> RunState    to be yielded
#       _Watch.failed                   raises PollTimeout at the deadline
#       Session._sit_out                raises the fault, or logs that it is tried again
#     _Watch.schedule                   when the next poll is due


# ---- Errors


class RunpollError(Exception):
    """The base of all errors. They pickle and copy."""

    params: dict[str, str] | None = None  # those of the run, where it concerns one
    state: RunState | None = None  # the last one seen, in a timeout; that without a result
    transient: bool = False  # whether another try may fare better
    sent: bool = True  # False when no attempt of the call can have begun what was asked for

    def __init__(self, text: str = "", **attributes: Any) -> None:
        super().__init__(text)
        vars(self).update(attributes)


class TransportError(RunpollError):
    """No answer: DNS, refused, reset, TLS, timed out. `__cause__` is urllib3's error."""

    transient = True


class ApiError(RunpollError):
    """An HTTP error, or a redirect, which is never followed."""

    http_status: int = 0
    error: ErrorInfo | None = None  # what the API says of it
    body: str = ""  # the first 500 characters of the answer
    request_id: str | None = None  # X-Request-Id, Request-Id or meta.request_id
    retry_after: float | None = None  # seconds


class BadResponse(RunpollError):
    """An answer that is not the JSON promised, or larger than `max_body`."""

    transient = True
    http_status: int = 200
    body: str = ""  # the first 500 characters of the answer


class PollTimeout(RunpollError, TimeoutError):
    """`timeout` ran out. The run goes on."""

    transient = True


class RunFailed(RunpollError):
    """The result was asked of a run that failed."""


class RunCancelled(RunpollError):
    """The result was asked of a run that was cancelled."""


class RunNotDone(RunpollError):
    """The result was asked of a run that has not ended."""


class BatchError(RunpollError):
    """Runs of a batch that were not followed to their ends."""

    errors: Sequence[RunpollError] = ()  # in the order of the runs, each with its params


# ---- States


class Phase(str, Enum):
    """What a status word means: PAUSED waits for a person, UNKNOWN is a word not listed."""

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
        """Whether a run in this phase has ended."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


@dataclass(frozen=True)
class ErrorInfo:
    """What an API says of an error."""

    message: str
    code: str | None = None
    step: str | None = None  # of the run, that failed
    details: Any = None


@dataclass(frozen=True)
class RunState:
    """One answer of the API about a run. Timestamps are timezone-aware UTC."""

    id: str
    status: str  # the API's own word, untouched
    phase: Phase
    output: Any = field(default=None, repr=False)  # None until there is one
    error: ErrorInfo | None = None  # of a run that failed or was cancelled
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    duration: float | None = None  # seconds: the API's own figure, else from the timestamps
    steps_done: int | None = None
    steps_total: int | None = None
    progress: float | None = None  # 0.0 to 1.0: the API's own figure, else from the steps
    status_url: str | None = None  # as the API gave it; never followed
    params: dict[str, str] = field(default_factory=dict)  # the handle: plain JSON, to resume from
    raw: Any = field(default=None, repr=False)  # the whole answer
    retry_after: float | None = None  # seconds
    polls: int = field(default=0, compare=False)  # good answers in this iteration
    faults: int = field(default=0, compare=False)  # failed attempts since the good answer before
    elapsed: float = field(default=0.0, compare=False)  # seconds since this iteration began
    eta: float | None = field(default=None, compare=False)  # seconds that seem to be left

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return self.phase.terminal

    @property
    def ok(self) -> bool:
        """Whether the run has succeeded."""
        return self.phase is Phase.SUCCEEDED

    @overload
    def result(self, decode: None = None) -> Any: ...
    @overload
    def result(self, decode: Callable[[Any], _T]) -> _T: ...
    def result(self, decode: Callable[[Any], Any] | None = None) -> Any:
        """The output of a run that succeeded, through `decode` when given.

        Raises RunFailed, RunCancelled or, for a run that has not ended, RunNotDone.
        """
        if self.ok:
            return self.output if decode is None else decode(self.output)
        not_done = f"has not ended (status {_excerpt(self.status)!r}); iter_status() follows it"
        ends = {
            Phase.FAILED: (RunFailed, "failed"),
            Phase.CANCELLED: (RunCancelled, "was cancelled"),
        }
        kind, what = ends.get(self.phase, (RunNotDone, not_done))
        text = f"run {_excerpt(self.id)} {what}"
        if self.error:
            text += f": {_excerpt(self.error.message)}"
            text += f", in the step {_excerpt(self.error.step)!r}" if self.error.step else ""
            text += f" (code {_excerpt(self.error.code)})" if self.error.code else ""
        raise kind(text, params=self.params, state=self)


def _excerpt(text: str) -> str:
    """The start of the first line of what an API says, fit for one line of ours."""
    lines = text[:2000].strip().splitlines() or [""]
    line = "".join(char if char.isprintable() else " " for char in lines[0])
    if len(line) <= 200:
        return line
    # Not the word that is cut: a part of a key would not be recognized as one.
    return line[:200].rpartition(" ")[0] + "..."


def _rounded(seconds: float) -> str:
    """Seconds for a text: 0.25, 1800."""
    return f"{round(seconds, 2):.12g}"


# ---- Reading JSON: what has the wrong type is None, as if it were absent

_Reader = Callable[[Any], Any]  # a value as it is read; None for one of the wrong type
_Place = Union[list[str], Callable[[Any], Any]]  # the keys of a path, or what finds a value
_CALLERS_ERRORS = (LookupError, TypeError, ValueError, AttributeError)  # of a caller's own code


def _places(given: Any) -> list[_Place]:
    """Where a value may stand: dotted paths and callables. Raises TypeError for other things."""
    many = [given] if isinstance(given, str) or callable(given) else given
    return [place if callable(place) else str.split(place, ".") for place in many]


def _first_value(body: Any, places: Iterable[_Place], read: _Reader) -> Any:
    """The first value at one of the places that `read` takes, as it reads it; else None."""
    for place in places:
        value = body
        if callable(place):
            try:
                value = place(body)
            except _CALLERS_ERRORS:
                continue
        else:
            for key in place:
                value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            value = read(value)
            if value is not None:
                return value
    return None


def _as_is(value: Any) -> Any:
    return value


def _text(value: Any) -> str | None:
    """A text that is not blank, untouched."""
    return value if isinstance(value, str) and value and not value.isspace() else None


def _text_or_number(value: Any) -> str | None:
    """A text; of a number or a boolean its JSON."""
    return json.dumps(value) if isinstance(value, (int, float)) else _text(value)


def _number(value: Any) -> int | float | None:
    """A number of at least 0, as it is; NaN and true are none."""
    return value if type(value) in (int, float) and value >= 0 else None


def _seconds(value: Any) -> float | None:
    number = _number(value)
    return float(number) if number is not None and number <= 1e18 else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number % 1 == 0 else None


_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:[.,](\d+))? ?(?:[Zz]|([+-]\d\d)(?::?(\d\d))?)?"
)


def _instant(value: Any) -> datetime | None:
    """RFC 3339, or Unix time in seconds or milliseconds; without an offset it is UTC."""
    return _parsed_instant(value) if isinstance(value, (str, int, float, datetime)) else None


@lru_cache(maxsize=256, typed=True)  # most answers of a run bring the same ones again
def _parsed_instant(value: Any) -> datetime | None:
    found = _RFC_3339.fullmatch(value) if isinstance(value, str) else None
    number = _seconds(value)
    with suppress(ValueError, OverflowError, OSError):
        if found:
            date, clock, fraction, hours, minutes = found.groups()
            # The form that Python 3.9 reads, too.
            exact = f"{date}T{clock}.{fraction or '0':0<6.6}{hours or '+00'}:{minutes or '00'}"
            value = datetime.fromisoformat(exact)
        elif number is not None:
            seconds = number if number < 1e11 else number / 1000  # in seconds, the year 5138
            value = datetime.fromtimestamp(seconds, timezone.utc)
        if isinstance(value, datetime):  # a callable of the Api's may find one
            return value.replace(tzinfo=value.tzinfo or timezone.utc).astimezone(timezone.utc)
    return None


_MESSAGES = _places(
    ["message", "detail", "description", "error_description", "error_message", "title"]
)
_NESTINGS = _places(["error", "errors", "detail"])


def _error_info(value: Any) -> ErrorInfo | None:
    """What an API says of an error, in whichever form; what is empty is no error."""
    if not value or isinstance(value, ErrorInfo):
        return value or None
    if isinstance(value, str):
        return ErrorInfo(value) if _text(value) else None
    if isinstance(value, list):
        few = value[:100]  # nobody reads more
        texts = [info.message for info in map(_error_info, few) if info]
        return ErrorInfo("; ".join(texts)) if texts else None
    return _error_in(value) or ErrorInfo(json.dumps(value, ensure_ascii=False))


def _error_in(body: Any) -> ErrorInfo | None:
    """The error in an object that says what happened; None where it says nothing."""
    text = _first_value(body, _MESSAGES, _text)
    info = ErrorInfo(text) if text else _first_value(body, _NESTINGS, _error_info)
    if info is None:
        return None
    return ErrorInfo(
        info.message,
        info.code or _text_or_number(body.get("code")),
        info.step or _text(body.get("step")),
        body.get("details") if info.details is None else info.details,
    )


def _parsed_json(text: str) -> Any:
    """The JSON value, None for an empty text."""
    if not text or text.isspace():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # The cause would carry the document.
        raise BadResponse("the answer is not JSON; check the base_url and the Api") from None


def _lower_case_names(headers: Mapping[str, str] | None) -> dict[str, str]:
    return {name.lower(): value for name, value in (headers or {}).items()}


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After (RFC 9110 section 10.2.3); None for 0 and what is past.

    A date counts from the answer's own Date, so that the clock of this machine does not matter.
    """
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if re.fullmatch(r"[0-9]{1,300}(\.[0-9]+)?", value):
        return float(value) or None
    seconds = _http_date(value) - (_http_date(headers.get("date", "")) or time.time())
    return seconds if seconds > 0 else None


def _http_date(value: str) -> float:
    """An HTTP date as Unix time, 0 for what is none; without a zone it is GMT (RFC 9110, 5.6.7)."""
    with suppress(TypeError, ValueError, IndexError, OverflowError):
        date = email.utils.parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()
    return 0.0


# ---- Checking arguments


def _checked(kind: type[_T], name: str, value: Any) -> _T:
    """An argument of the type that it has to have. Raises TypeError for another."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} has to be a {kind.__name__}, not {type(value).__name__}")
    return value


def _at_least(least: float, name: str, value: Any) -> float:
    """A number that is an argument, checked."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} has to be a number, not {type(value).__name__}")
    if not value >= least:
        raise ValueError(f"{name} has to be at least {least:g}, not {value!r}")
    return value


def _checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers that can be sent; http.client would show the value that it refuses."""
    checked = {}
    for name, value in dict(headers or {}).items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):  # RFC 9110 section 5.6.2
            raise ValueError(f"{name!r} cannot be the name of a header")
        if not re.fullmatch(r"[ -~\xa0-\xff]*", value):
            raise ValueError(f"the header {name!r} has a character that cannot be sent")
        checked[name.title()] = value
    return checked


# ---- How an API speaks

_USUAL_WORDS = {
    Phase.PENDING: """pending queued in_queue created scheduled submitted accepted enqueued
        not_started starting initializing validating preparing provisioning""",
    Phase.RUNNING: """running in_progress processing started active working executing retrying
        finalizing stopping cancelling canceling""",
    Phase.PAUSED: """paused suspended awaiting_review awaiting_approval awaiting_input
        requires_action""",
    Phase.SUCCEEDED: "success succeeded successful completed complete finished done",
    Phase.FAILED: "failed failure error errored timed_out crashed expired rejected",
    Phase.CANCELLED: "cancelled canceled aborted",
}


def _spellings(names: str) -> list[_Place]:
    """Each name as a path, in snake_case and in camelCase."""
    paths: list[_Place] = []
    for name in names.split():
        camel_case = name[0] + name.title().replace("_", "")[1:]
        paths += [[spelling] for spelling in dict.fromkeys((name, camel_case))]
    return paths


# RunState field -> what reads it, and where it usually stands.
_USUAL_FIELDS: dict[str, tuple[_Reader, list[_Place]]] = {
    "id": (_text_or_number, _spellings("run_id id execution_id job_id task_id")),
    "status": (_text_or_number, _spellings("status state")),
    "output": (_as_is, _spellings("output outputs result results")),
    "error": (_error_info, _spellings("error errors error_message")),
    "created_at": (_instant, _spellings("created_at created submitted_at")),
    "started_at": (_instant, _spellings("started_at start_time")),
    "completed_at": (_instant, _spellings("completed_at finished_at ended_at end_time")),
    "duration": (_seconds, _spellings("duration_seconds")),
    "steps_done": (_count, _spellings("steps_done steps_completed completed_steps finished_steps")),
    "steps_total": (_count, _spellings("steps_total total_steps")),
    "progress": (_number, _spellings("progress")),
    "status_url": (_text, _spellings("status_url")),
}

_Run = Union[str, Mapping[str, Any], RunState]


@lru_cache(maxsize=256)
def _normalized(word: str) -> str:
    """Timed-Out, TIMED_OUT and timedOut are one word; a number is kept with its sign."""
    word = word[:100].strip()
    if re.fullmatch(r"[+-]?[0-9.]+([Ee][+-]?[0-9]+)?", word):
        return word
    return "".join(filter(str.isalnum, word)).lower() or word


_USUAL_PHASES = {
    _normalized(word): phase for phase, words in _USUAL_WORDS.items() for word in words.split()
}


_PARAMETER = re.compile(r"\{(\w+)\}")
_NO_SEGMENTS = {"", ".", ".."}  # they change a path (RFC 3986 section 5.2.4)


class _PathTemplate:
    """A path with parameters, perhaps behind its method: "DELETE /jobs/{run_id}"."""

    def __init__(self, template: str, method: str) -> None:
        found = re.fullmatch(r"(?:([A-Za-z]+) )?(/(?:[^{}\s]|\{\w+\})*)", template)
        self.names: list[str] = _PARAMETER.findall(template)
        if not found or len(self.names) > len(set(self.names)):
            raise ValueError(
                f"a path template is like '/jobs/{{run_id}}' or 'DELETE /jobs/{{run_id}}', "
                f"each parameter once, not like {template!r}"
            )
        self.method = (found[1] or method).upper()
        self.path = found[2]

    def fill(self, params: Mapping[str, Any]) -> str:
        """The path; each value is encoded whole, so that it cannot change the rest."""
        encoded = {}
        for name in (*self.names, *params):
            if name not in params:
                raise TypeError(f"the path {self.path!r} lacks the parameter {name!r}")
            if name not in self.names:
                raise TypeError(f"the path {self.path!r} has no {name!r}")
            value = params[name]
            if type(value) is not int:
                _checked(str, name, value)
            if value in _NO_SEGMENTS:
                raise ValueError(f"path parameter {name!r} may not be {value!r}")
            encoded[name] = quote(str(value), safe="")
        return _PARAMETER.sub(lambda found: encoded[found[1]], self.path)

    def own(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Those of the parameters that this path has."""
        return {name: str(params[name]) for name in self.names if name in params}

    def match(self, url: str) -> dict[str, str]:
        """The parameters of a URL that ends in this path; none where it does not.

        Its origin, a trailing slash and a query in which no parameter stands do not matter.
        """
        path, _, query = re.escape(self.path.strip("/")).partition(r"\?")
        pattern = rf"(?:[^?#]*/)?{path}/*"
        pattern += rf"\?(?:[^#]*&)?{query}(?:[&#].*)?" if "{" in query else r"(?:[?#].*)?"
        value = "[^/?&#]+" if "{" in query else "[^/?#]+"
        pattern = re.sub(r"\\{\w+\\}", f"({value})", pattern)
        found = re.fullmatch(pattern, re.sub(r"^([\w+.-]+:)?//[^/?#]*", "", url))
        values = list(map(unquote, found.groups())) if found else []
        return {} if _NO_SEGMENTS.intersection(values) else dict(zip(self.names, values))


@dataclass(frozen=True)
class Api:
    """How one API speaks.

    `Api(base_url="https://api.example.com", status="/jobs/{run_id}")` drives an ordinary one.

    Args:
        base_url: scheme, host and an optional path prefix.
        status: path template of the status request; it has to name `{run_id}`.
        start, cancel: path templates, "" where the API has none. POST, unless the template begins
            with another method: "DELETE /jobs/{run_id}".
        root: dotted path to the object that holds the run, "" for the body itself.
        fields: RunState field -> where it stands: a dotted path under `root`, a tuple of them (the
            first that holds a value of the right type), or a callable of that object. What is left
            out keeps the usual names.
        phases: status word -> Phase, or its word. Only letters and digits count, in any case. What
            is left out keeps the usual words.
        auth_header, auth_scheme: where the key goes; an empty scheme sends the bare key.
        answer_statuses: HTTP statuses besides 2xx whose answer to a start or a poll may be a state.

    Raises ValueError for a template, a field or a phase that cannot be.
    """

    base_url: str
    status: str
    start: str = ""
    cancel: str = ""
    root: str = ""
    fields: Mapping[str, str | Sequence[Any] | Callable[[Any], Any]] = field(default_factory=dict)
    phases: Mapping[str, Phase | str] = field(default_factory=dict)
    auth_header: str = "Authorization"
    auth_scheme: str = "Bearer"
    answer_statuses: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("base_url", "status", "start", "cancel", "root", "auth_header", "auth_scheme"):
            _checked(str, name, getattr(self, name))
        _parsed_base_url(self.base_url)
        names = self._templates["poll"].names
        if "run_id" not in names:
            raise ValueError(f"the status template has to name {{run_id}}: {self.status!r}")
        if self.cancel and set(self._templates["cancel"].names) - set(names):
            raise ValueError("the cancel template has a parameter that the status template lacks")
        _ = self._phases, self._readers, tuple(self.answer_statuses)  # refuse what cannot be

    @cached_property
    def _templates(self) -> dict[str, _PathTemplate]:
        templates = {"poll": _PathTemplate(self.status, "GET")}
        if self.start:
            templates["start"] = _PathTemplate(self.start, "POST")
        if self.cancel:
            templates["cancel"] = _PathTemplate(self.cancel, "POST")
        return templates

    @cached_property
    def _root(self) -> list[_Place]:
        return _places(self.root) if self.root else [[]]  # no keys lead to the body itself

    @cached_property
    def _phases(self) -> dict[str, Phase]:
        own = {_normalized(word): Phase(phase) for word, phase in {**self.phases}.items()}
        return {"": Phase.PENDING, **_USUAL_PHASES, **own}  # "" is no word at all, as of a start

    @cached_property
    def _readers(self) -> dict[str, tuple[_Reader, list[_Place]]]:
        """RunState field -> what reads it, and where it stands."""
        readers = dict(_USUAL_FIELDS)
        for name, given in {**self.fields}.items():
            if name not in readers:
                raise ValueError(f"fields names {name!r}; it may name {', '.join(readers)}")
            readers[name] = readers[name][0], _places(given)
        return readers

    def read_state(
        self,
        body: Any,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        http_status: int = 200,
    ) -> RunState:
        """The state of a run in one parsed JSON answer, a webhook's body too.

        A subclass overrides it for an API that no table can express: it is called for every
        success answer to a start and a poll.

        Args:
            body: the parsed JSON, None for an empty answer.
            params: the path parameters that are known; those of a start lack `run_id`.
            headers: the answer's, which compare without regard to case.
            http_status: outside 2xx, only an answer that names the run itself, with a word that
                the Api lists, is a state.

        Raises:
            BadResponse: the answer names no run, or has no status of the run that was asked for.
        """
        lowered = _lower_case_names(headers)
        location = lowered.get("location", "")
        run = _first_value(body, self._root, _as_is)
        found = {
            name: _first_value(run, places, read) for name, (read, places) in self._readers.items()
        }
        template = self._templates["poll"]
        known = template.own(params or {})
        is_poll = "run_id" in known
        if not is_poll and found["id"]:
            known["run_id"] = found["id"]
        elif not is_poll:
            from_location = template.match(location)
            if from_location.items() >= known.items():  # and nothing else than is known
                known = from_location
        run_id, status = known.get("run_id"), found["status"] or ""
        phase = self._phases.get(_normalized(status), Phase.UNKNOWN)
        # An error answer may be a state all the same, but a gateway's {"status": "error"} is not.
        listed = status and phase is not Phase.UNKNOWN and found["id"] == run_id
        usable = 200 <= http_status < 300 or listed
        problem = ""
        if run_id is None:
            problem = "the answer has no id of a run"
            if location:
                shown = _shown_url(location)
                problem += f", and its Location {shown} does not end as {self.status!r}"
        elif not usable or (is_poll and not status):
            problem = f"the answer has no status of run {_excerpt(run_id)}"
        if problem:
            concerned = known if run_id else None
            raise _not_a_state(problem, body, run, params=concerned, http_status=http_status)
        found.update(id=found["id"] or run_id, status=status, phase=phase)
        _derive_fields(found)
        return RunState(**found, params=known, raw=body, retry_after=_retry_after(lowered))

    def _status_params(self, run: _Run) -> Mapping[str, Any]:
        """The status parameters of a run: of an id, a status URL, a mapping or a RunState."""
        params: Any = run.params if isinstance(run, RunState) else run
        if isinstance(run, str):
            params = self._templates["poll"].match(run) if "://" in run else {"run_id": run}
            if not params:
                raise ValueError(f"the status URL does not end as {self.status!r}")
        if not isinstance(params, Mapping):
            raise TypeError(f"a run is a str, a mapping or a RunState, not {type(run).__name__}")
        return params


def _parsed_base_url(url: str) -> Url:
    base = parse_url(url)
    if base.scheme not in ("http", "https") or not base.host or re.search(r"\s", url):
        raise ValueError("a base_url begins with https:// (or http://) and a host")
    if base.auth or base.query or base.fragment:
        raise ValueError("a base_url has no user, query or fragment")
    return base


def _shown_url(url: str) -> str:
    """A URL as texts show it; its query may be secret."""
    return _excerpt(url.partition("?")[0])


def _not_a_state(problem: str, body: Any, run: Any, **attributes: Any) -> BadResponse:
    """The error for an answer that is no state, with what it says of an error, and what to do."""
    info = _error_in(body) or _error_in(run)
    said = f"; it says: {_excerpt(info.message)}" if info else ""
    advice = "check the base_url and the Api's root and fields"
    return BadResponse(f"{problem}{said}; {advice}", **attributes)


def _derive_fields(found: dict[str, Any]) -> None:
    """Work out what the fields of a state say together, in place."""
    if found["phase"] not in (Phase.FAILED, Phase.CANCELLED):
        found["error"] = None
    begun, ended = found["started_at"] or found["created_at"], found["completed_at"]
    if found["duration"] is None and begun and ended and ended >= begun:
        found["duration"] = (ended - begun).total_seconds()
    figure, done, total = found["progress"], found["steps_done"], found["steps_total"]
    if figure is None and done is not None and total:
        found["progress"] = min(done, total) / total
    elif figure == 1 and found["phase"] is Phase.SUCCEEDED:
        found["progress"] = 1.0  # what has ended well is not at 1 %
    elif figure is not None and not (isinstance(figure, float) and figure <= 1.0):
        found["progress"] = min(figure, 100) / 100


# ---- The built-in APIs, as their documents describe them


def _doclo_duration(run: Any) -> float | None:
    """Seconds; both figures of Doclo are milliseconds."""
    milliseconds = _first_value(run, [["duration"], ["metrics", "durationMs"]], _seconds)
    return None if milliseconds is None else milliseconds / 1000


RAPIDFOLIO = Api(
    base_url="https://run.rapidfolio.com",
    start="/v1/procedures/{procedure_id}/{environment}",
    status="/runs/{run_id}",
    cancel="/runs/{run_id}/cancel",
    phases={"timeout": Phase.RUNNING},  # a synchronous start that is held no longer goes on
    answer_statuses=(504,),
)
DOCLO = Api(
    base_url="https://app.doclo.ai/api/v1",
    start="/flows/{flow_id}/run",
    status="/runs/{run_id}",
    cancel="/runs/{run_id}/cancel",
    fields={
        "duration": _doclo_duration,
        "steps_done": "metrics.stepsRun",
        "steps_total": "metrics.stepsTotal",
        "progress": "progress.percentage",
    },
)
DIBBY = Api(
    base_url="https://dibby.ai/api",
    start="/runs",
    status="/runs/{run_id}",
    fields={"steps_total": "steps"},
)
ONEPIN = Api(
    base_url="https://api.onepin.ai",
    start="/api/v1/workflows/{workflow_id}/runs",
    status="/api/v1/workflows/{workflow_id}/runs/{run_id}/status",
    cancel="/api/v1/workflows/{workflow_id}/runs/{run_id}/cancel",
    root="data",
)


# ---- A request and its answer


class _Request(NamedTuple):
    """What is sent, worked out once for all attempts at it."""

    call: str  # the Session's method: "start", "poll", "cancel" or "request"
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    timeout: float  # seconds for one attempt
    repeatable: bool  # even where an earlier attempt may have arrived
    params: dict[str, str]  # those of the status path that are known

    @property
    def run_params(self) -> dict[str, str] | None:
        """Those of the run that it concerns; None where none is known."""
        return self.params if "run_id" in self.params else None

    @property
    def label(self) -> str:
        """The request as texts call it; a query may be secret."""
        name = f"{self.method} {self.path.partition('?')[0]}"
        if self.call == "start":
            return f"start ({name})"
        return f"run {_excerpt(self.params['run_id'])} ({name})" if self.run_params else name


class _Answer(NamedTuple):
    status: int
    reason: str
    headers: Mapping[str, str]
    text: str


def _bad_response(answer: _Answer, problem: str, transient: bool = True) -> BadResponse:
    """The error for an answer that is not what was promised."""
    text = f"HTTP {answer.status}, but {problem}"
    return BadResponse(text, http_status=answer.status, body=answer.text, transient=transient)


class _Outcome(NamedTuple):
    """What came of an attempt, and when on the clock it was made."""

    value: Any  # what was read in the answer, or the RunpollError
    began: float
    ended: float


# ---- The wire: one request, one answer. It knows nothing of what they mean.

# urllib3 limits each receive but not the whole answer, begins a new limit after a proxy's CONNECT,
# and lends connections that have been idle for hours. The connections and pools here mend that:
# `exchange` hands the deadline to the pool, which keeps it on the connection; before it sends, and
# before it awaits the answer, the connection gives its socket the time that is left; and the reader
# of the answer gives each receive what is left of that.


_SHORTEST_TIMEOUT, _LONGEST_TIMEOUT = 0.001, 1e9  # seconds; sockets take no more
_IDLE_LIMIT = 15.0  # seconds; what is idle for longer, servers and middleboxes close unseen
_CHUNK = 2**16  # bytes of an answer that are read at once
_PACKED_CHUNK = 2**12  # and of a gzipped one, which may unpack to a thousand times as many
_ONE_ATTEMPT = urllib3.Retry(False)
# A ValueError is what http.client makes of a malformed chunk.
_NO_ANSWER = (exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|\[::1\]")


class _DeadlineReader(io.RawIOBase):
    """Reads a socket until one deadline for all receives; the socket's own timeout is for each."""

    def __init__(self, sock: socket.socket, file: io.RawIOBase) -> None:
        self._sock, self._file = sock, file
        self._deadline = time.monotonic() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise socket.timeout("timed out")
        self._sock.settimeout(seconds)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """An answer whose headers and body share the time that the socket has when it is awaited."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp.detach()))


class _HTTPConnection(HTTPConnection):
    """Keeps the deadline of an attempt."""

    response_class = _BoundedResponse
    deadline = math.inf
    last_answer = math.inf  # when it came

    def connect(self) -> None:
        """Connect; what fails until the proxy and TLS are through has not sent the request."""
        try:
            super().connect()
        except (OSError, ValueError, http.client.HTTPException) as error:
            traceback.clear_frames(error.__traceback__)  # a proxy's answer would hold the socket
            raise exceptions.NewConnectionError(self, str(error)) from error

    def request(self, *args: Any, **kwargs: Any) -> None:
        if not self.sock:
            self.connect()  # under its own limit
        self._limit_to_deadline()
        super().request(*args, **kwargs)

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:
        self._limit_to_deadline()
        response: Any = super().getresponse(*args, **kwargs)
        self.last_answer = time.monotonic()
        return response

    def _limit_to_deadline(self) -> None:
        self.timeout = max(self.deadline - time.monotonic(), _SHORTEST_TIMEOUT)
        self.sock.settimeout(self.timeout)


class _HTTPSConnection(_HTTPConnection, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    """Lends no connection that has been idle for long: it may be dead without our knowing.

    It never waits for one, so the time for that, `pool_timeout`, is free to carry the deadline.
    """

    ConnectionCls: Any = _HTTPConnection

    def _get_conn(self, timeout: float | None = None) -> Any:
        deadline = timeout  # as `exchange` gives it
        conn: Any = super()._get_conn(timeout)
        while time.monotonic() - conn.last_answer > _IDLE_LIMIT:
            conn.close()
            conn = super()._get_conn(timeout)
        conn.deadline = deadline
        return conn


class _HTTPSPool(_HTTPPool, HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class _Wire:
    """Sends requests to one origin, perhaps through a proxy."""

    def __init__(
        self, base: Url, proxy: Url | None, ssl_context: ssl.SSLContext | None, max_body: float
    ) -> None:
        origin = f"{base.scheme}://{base.netloc}"
        self._prefix = (base.path or "").rstrip("/")
        self._max_body = max_body
        options: dict[str, Any] = {"maxsize": 0, "ssl_context": ssl_context}  # 0 keeps them all
        manager = urllib3.PoolManager(**options)
        if proxy:
            options["proxy_headers"] = make_headers(proxy_basic_auth=unquote(proxy.auth or ""))
            options["proxy_ssl_context"] = ssl_context
            manager = urllib3.ProxyManager(f"{proxy.scheme}://{proxy.netloc}", **options)
            if base.scheme == "http":  # then the proxy is asked for whole URLs
                self._prefix = origin + self._prefix
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        self._pool: Any = manager.connection_from_url(origin)

    def exchange(
        self, request: _Request, headers: dict[str, str], connect_seconds: float, seconds: float
    ) -> _Answer:
        """Send a request and read its answer.

        `headers` are those of this attempt alone; connecting and all together have their seconds.
        Raises TransportError where no answer comes, BadResponse for one that is too large.
        """
        try:
            response = self._pool.urlopen(
                request.method,
                self._prefix + request.path,
                body=request.body,
                headers={**request.headers, **headers},
                retries=_ONE_ATTEMPT,
                redirect=False,
                assert_same_host=False,
                timeout=urllib3.Timeout(connect=connect_seconds, read=seconds),
                pool_timeout=time.monotonic() + seconds,
                preload_content=False,
                enforce_content_length=True,
            )
            content = self._content(response)
        except exceptions.ClosedPoolError:
            raise RuntimeError("the session is closed") from None
        except _NO_ANSWER as error:
            raise _transport_error(error, connect_seconds, seconds) from error
        text = content.decode("utf-8-sig", "replace")  # bytes that are not UTF-8 are replaced
        answer = _Answer(response.status, response.reason or "", response.headers, text)
        if len(content) > self._max_body:
            problem = f"the answer is larger than max_body, {self._max_body} bytes; raise max_body"
            raise _bad_response(answer, problem, transient=False)
        return answer

    def _content(self, response: Any) -> bytes:
        """The whole body, unpacked, or more than `max_body` bytes of it."""
        packed = "Content-Encoding" in response.headers
        content = bytearray()
        try:
            if response.status < 200:
                raise http.client.BadStatusLine("an interim answer alone")
            chunk_size = _PACKED_CHUNK if packed else _CHUNK
            for chunk in response.stream(chunk_size, decode_content=packed):
                content += chunk
                if len(content) > self._max_body:
                    break
        except exceptions.DecodeError:
            return b"(what could not be unpacked)"
        finally:
            response.close()  # a rest of it must not be taken for the next answer
        return bytes(content)

    def close(self) -> None:
        self._pool.close()


def _transport_error(
    error: BaseException, connect_seconds: float, seconds: float
) -> TransportError:
    """The error for what urllib3 raised instead of an answer."""
    fault = error.original_error if isinstance(error, exceptions.ProxyError) else error
    reason = _root_cause(fault)
    # A NewConnectionError, as of a refusal, is a ConnectTimeoutError, too.
    sent = not isinstance(fault, exceptions.ConnectTimeoutError)
    # A ValueError while connecting is a certificate's, unless the host name itself is bad.
    bad_host = isinstance(reason, exceptions.LocationValueError)
    untrusted = not sent and isinstance(reason, ValueError) and not bad_host
    words = _excerpt(re.split(r": |\] ", str(reason))[-1])  # the system's own stand last
    timed_out = "timed out" in f"{fault} {reason}"
    if untrusted:
        what = f"the certificate is not trusted ({words}); check the base_url, or the ssl_context"
    elif not timed_out:
        what = f"no answer ({words}); try again later"
    elif sent:
        what = f"no answer within {_rounded(seconds)} s; try again later"
    else:
        what = f"no connection within {_rounded(connect_seconds)} s; try again later"
    return TransportError(what, sent=sent, transient=not untrusted)


def _root_cause(error: BaseException) -> BaseException:
    """What the system said: urllib3 wraps it, as an argument or as the cause."""
    inner = next((arg for arg in error.args if isinstance(arg, BaseException)), error.__cause__)
    return _root_cause(inner) if inner else error


def _proxy_for(base: Url, proxy: str | None) -> Url | None:
    """The proxy that was given, "" being none, else the environment's, but to this machine none."""
    named = any(name.lower().endswith("_proxy") for name in os.environ)
    if proxy is None and named and not _LOOPBACK.fullmatch(base.host or ""):
        from urllib.request import getproxies, proxy_bypass  # slow to import, and seldom needed

        proxy = "" if proxy_bypass(base.netloc or "") else getproxies().get(base.scheme or "")
    if not proxy:
        return None
    parsed = parse_url(proxy if "://" in proxy else f"http://{proxy}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("a proxy is http://[USER:PASSWORD@]HOST[:PORT], or https://")
    return parsed


# ---- What goes wrong, and when it is tried again. Nothing here waits.

_CLOCK_TOLERANCE = 1e-6  # seconds; two points on the clock that are closer are one
_LAG = 10.0  # seconds in which replicas may not know a run just started, or a fresh key
_FIRST_RETRY, _LONGEST_RETRY = 0.5, 10.0  # seconds; each wait is twice the one before
_RETRY_JITTER = 0.9, 1.1  # each wait is multiplied by a factor between these
_LONGEST_RETRY_AFTER = 120.0  # seconds; an iteration looks again then, whatever it was told
_SHORTEST_SECRET = 8  # characters; a shorter key may be an ordinary word of any answer
_BODY_SHOWN = 500  # characters of an answer that an error carries
_TRANSIENT = {408, 425, 429, *range(500, 600)} - {501, 505}
_RATE_LIMITS = {403, 429}  # a 403 only with Retry-After, as of some APIs
_NOTHING_DONE = {*range(400, 500)} - {408, 425}  # the server has not done what was asked
_ADVICE = {
    401: "check the API key, and the Api's auth_header and auth_scheme",
    403: "check the API key and what it may do",
    404: "check the id, the base_url, and whether the key may see it",
}


def _api_error(answer: _Answer) -> ApiError:
    """The error for an HTTP error or a redirect."""
    status, headers = answer.status, _lower_case_names(answer.headers)
    retry_after = _retry_after(headers)
    transient = status in _TRANSIENT or (status == 403 and retry_after is not None)
    said = _excerpt(answer.text)
    if not said or said[0] in "<{[":  # a gateway's page, say, which tells little
        said = f"{answer.reason} {said}".strip()
    body, info = None, ErrorInfo(said or "no text")
    with suppress(BadResponse, RecursionError):
        body = _parsed_json(answer.text)
        info = _error_info(body) or info
    request_id = headers.get("x-request-id") or headers.get("request-id")
    request_id = request_id or _first_value(body, [["meta", "request_id"]], _text)

    what = f"HTTP {status}: {_excerpt(info.message)}"
    if request_id:
        what += f" (request {_excerpt(request_id)})"
    if status < 400:
        what += f", to {_shown_url(headers.get('location', 'nowhere'))}"
    return ApiError(
        f"{what}; {_advice(status, transient, retry_after)}",
        http_status=status,
        error=info,
        body=answer.text,
        request_id=request_id,
        retry_after=retry_after,
        transient=transient,
        sent=status not in _NOTHING_DONE,
    )


def _advice(status: int, transient: bool, retry_after: float | None) -> str:
    if status < 400:
        return "redirects are not followed: is that the base_url to use?"
    if not transient:
        return _ADVICE.get(status, "unchanged it will fail again")
    advice = "ask less often" if status in _RATE_LIMITS else "try again later"
    return f"{advice}, in {_rounded(retry_after)} s as it says" if retry_after else advice


def _for_caller(
    fault: RunpollError, request: _Request, key: str, may_have_begun: bool
) -> RunpollError:
    """A fault as the caller sees it: it names the request, tells of all attempts, shows no key.

    A text says what was asked, what came, what to do, and of a start whether a run may have begun:
    "run 42 (GET /runs/42): HTTP 404: no such run; check the id, ...".
    """
    text, cause = f"{request.label}: {fault}", fault.__cause__
    fault.sent = fault.sent or may_have_begun
    if request.call == "start" and fault.sent:
        text += "; a run may have begun: look before you start it again"
    elif request.call == "start":
        text += "; no run has begun"
    if cause:
        shown = "".join(traceback.format_exception(type(cause), cause, cause.__traceback__))
        cause = cause if _redacted(shown, key) == shown else None
    fault.__cause__, fault.__context__ = cause, None
    fault.__traceback__ = None  # whose frames hold the whole answer
    fault.args = (_redacted(text, key),)
    vars(fault).update(_redacted(vars(fault), key))
    if isinstance(fault, (ApiError, BadResponse)):
        fault.body = fault.body[:_BODY_SHOWN]  # not before: half a key is not known as one
    fault.params = fault.params or request.run_params
    return fault


def _redacted(value: Any, key: str) -> Any:
    """A text without the key, or a value without it in its texts."""
    if len(key) < _SHORTEST_SECRET:
        return value
    if isinstance(value, str):
        return value.replace(key, "[key]")
    if isinstance(value, list):
        return [_redacted(inner, key) for inner in value]
    if isinstance(value, dict):
        return {_redacted(name, key): _redacted(inner, key) for name, inner in value.items()}
    if isinstance(value, ErrorInfo):
        try:
            return ErrorInfo(**_redacted(vars(value), key))
        except RecursionError:  # in its details
            return ErrorInfo(_redacted(value.message, key))
    return value


def _is_rate_limit(fault: RunpollError) -> bool:
    return isinstance(fault, ApiError) and fault.transient and fault.http_status in _RATE_LIMITS


def _holds_back(fault: RunpollError) -> bool:
    """Whether the server asks for fewer requests, of any run."""
    if not isinstance(fault, ApiError):
        return False
    return _is_rate_limit(fault) or (fault.http_status == 503 and fault.retry_after is not None)


class _Retry:
    """The one retry rule: when to try again after a fault, and whether that is worth it.

    Each kind of fault has seconds of its own, which its attempts and waits use up until a good
    answer comes. What else delays an attempt, such as another run's rate limit, does not count.

        kind     faults                                              are sat out for
        final    what is not worth another try, or not safe          0 s
        lag      404 of a run just started, 401 of a callable key    10 s
        limited  a rate limit, in an iteration                       its timeout
        outage   what else is transient, where repeating is safe,
                 and a rate limit in a direct call                   max_outage
    """

    def __init__(
        self, repeatable: bool, max_outage: float, lag_statuses: set[int], iterating: bool
    ) -> None:
        self.due = -math.inf  # the next attempt
        self.worth_it = True
        self.faults = 0
        self.may_have_begun = False  # what was asked for, by some attempt
        self._lag_statuses = lag_statuses
        self._repeatable, self._iterating = repeatable, iterating
        self._patience = {"final": 0.0, "lag": _LAG, "limited": math.inf, "outage": max_outage}
        self._spent = dict.fromkeys(self._patience, 0.0)
        self._kind = ""  # of the last fault

    def next_attempt(self, now: float, held_until: float) -> float:
        """When the next attempt is due."""
        return max(self.due, held_until)

    def failed(self, fault: RunpollError, began: float, ended: float) -> None:
        """Plan another attempt after a fault, where one is worth it."""
        if self.faults:  # what the attempt took counts against the fault that called for it
            self._spent[self._kind] += ended - began
        self._kind = kind = self._kind_of(fault)
        left = self._patience[kind] - self._spent[kind]
        backoff = _FIRST_RETRY * 2.0 ** min(self.faults, 10) * random.uniform(*_RETRY_JITTER)
        wait = min(backoff, _LONGEST_RETRY, max(left, 0.0))
        retry_after = getattr(fault, "retry_after", None)
        if retry_after:
            wait = min(retry_after, _LONGEST_RETRY_AFTER) if self._iterating else retry_after
        self._spent[kind] += wait
        self.due = ended + wait
        self.faults += 1
        self.may_have_begun = fault.sent  # or an earlier attempt, as `_for_caller` has noted
        # An iteration sits out a Retry-After that is longer than what is left, too.
        self.worth_it = left > _CLOCK_TOLERANCE and (wait <= left or self._iterating)

    def succeeded(self) -> None:
        """A good answer came: what fails from now on is another trouble."""
        self.faults = 0
        self.may_have_begun = False
        self._spent = dict.fromkeys(self._patience, 0.0)
        self._lag_statuses.discard(404)  # the run is known

    def _kind_of(self, fault: RunpollError) -> str:
        if getattr(fault, "http_status", None) in self._lag_statuses:
            return "lag"
        if _is_rate_limit(fault):
            return "limited" if self._iterating else "outage"
        safe = self._repeatable or not fault.sent
        return "outage" if fault.transient and safe else "final"


# ---- The session: makes attempts. It does not know when a run is polled.

_IDEMPOTENT = {"GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"}  # RFC 9110 section 9.2.2
_LONGEST_SLEEP = 86_400.0  # seconds, at a time; the system refuses what is beyond its clock


class Session:
    """Speaks one API. A context manager; safe to share between threads, not across a fork.

    Args:
        api_key: the key, or a callable that returns it, asked anew for every attempt, possibly
            from several threads.
        base_url: instead of the Api's.
        headers: sent with every request.
        request_timeout: seconds for one attempt, its headers and body included. Connecting gets
            half of it for each address of the host.
        max_outage: seconds for which faults that pass are sat out, from the first in a row on.
        max_body: bytes that an answer may have.
        proxy: its URL, "" for none. None obeys HTTP_PROXY, HTTPS_PROXY and NO_PROXY, but goes to
            this machine directly.
        ssl_context: for a private authority or mutual TLS.
        allow_http: let the key go over plain http to another machine.
        sleep, clock: used for every wait, but for that of a batch for requests in flight. A
            `sleep` that returns True, as `wait` of a threading.Event does once it is set, ends what
            waits; an iteration asks it before every poll.

    Raises ValueError or TypeError for an argument that cannot be.
    """

    def __init__(
        self,
        api: Api,
        api_key: str | Callable[[], str] | None = None,
        *,
        base_url: str | None = None,
        headers: Mapping[str, str] | None = None,
        request_timeout: float = 30.0,
        max_outage: float = 60.0,
        max_body: int = 16 * 2**20,
        proxy: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        allow_http: bool = False,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _checked(Api, "api", api)
        if ssl_context is not None:
            _checked(ssl.SSLContext, "ssl_context", ssl_context)
        if not (callable(sleep) and callable(clock)):
            raise TypeError("sleep and clock have to be callables")
        base = _parsed_base_url(api.base_url if base_url is None else base_url)
        via = _proxy_for(base, proxy)
        hops = [base, via] if via else [base]
        private = base.scheme == "https" or all(_LOOPBACK.fullmatch(hop.host or "") for hop in hops)
        if api_key and not private and not allow_http:
            raise ValueError(
                "the key would go over plain http: use https, or allow_http=True in a network "
                "that you trust"
            )
        self._api = api
        self._api_key = api_key
        self._base_url = base.url
        # What cannot be sent is refused here.
        self._fixed_authorization = None if callable(api_key) else self._authorization()
        self._headers = {
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
            "User-Agent": f"runpoll/{__version__}",
            **_checked_headers(headers),
        }
        self._timeout = _at_least(_SHORTEST_TIMEOUT, "request_timeout", request_timeout)
        self._max_outage = _at_least(0, "max_outage", max_outage)
        self._wire = _Wire(base, via, ssl_context, _at_least(0, "max_body", max_body))
        self._sleep, self._clock = sleep, clock
        self._lock = threading.Lock()  # of what follows
        self._held_until = -math.inf  # until when no request begins, as the server asked
        self._unknown_words: set[str] = set()  # those that were warned of

    def __repr__(self) -> str:
        return f"Session({self._base_url!r})"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection. Calls raise RuntimeError from then on."""
        self._wire.close()

    def start(
        self,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        request_timeout: float = 330.0,
        repeatable: bool = False,
        **params: str,
    ) -> RunState:
        """Start a run, and return its first state.

        It is tried again only where no run can have begun: no connection was made, a rate limit.

        Args:
            body: sent as JSON; None for none.
            headers: besides the session's.
            request_timeout: seconds for one attempt, long because a synchronous start is held
                until the run ends, and because one that is given up may have begun.
            repeatable: the body or a header carries an idempotency key, so that a start may be
                tried again after any fault that passes.
            params: those of the start template.

        Raises RunpollError, whose text says whether a run may have begun.
        """
        request = self._request("start", params, body, headers, request_timeout, repeatable)
        state: RunState = self._call(request)
        return state

    def poll(self, run: _Run) -> RunState:
        """The state of a run (its id, status URL, path parameters or RunState), by one request."""
        state: RunState = self._call(self._status_request(run))
        return state

    def cancel(self, run: _Run, body: Any = None) -> bool:
        """Cancel a run, as `concurrent.futures.Future.cancel`.

        True when the run is being or has been cancelled, False when it had ended otherwise. Raises
        ApiError where the API refuses, and the run is still active or cannot be found.
        """
        if isinstance(run, RunState) and run.done:
            return run.phase is Phase.CANCELLED
        status = self._status_request(run)
        cancel = self._request("cancel", status.params, body)
        # Some APIs delete or fail a run that has ended when it is cancelled: look first.
        state = self._call(status, absent=(404,))
        refusal = None
        if not (state and state.done):
            try:
                self._call(cancel)
            except (ApiError, BadResponse) as error:
                if error.transient or error.http_status == 401:  # that says nothing of the run
                    raise
                refusal = error
            state = self._call(status, absent=(404, 410))
        if state and state.done:
            return state.phase is Phase.CANCELLED
        if refusal:
            raise refusal
        return True

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        request_timeout: float | None = None,
    ) -> Any:
        """Any other call of the same API: the parsed JSON, None for an empty answer.

        By an idempotent method it is tried again after any fault that passes, by POST or PATCH as
        a start is. `path` is a template under the base_url, filled from `params`. The other
        arguments are as for `start`; `request_timeout` None is the session's.
        """
        other = _PathTemplate(f"{method} {path}", method)
        repeatable = other.method in _IDEMPOTENT
        request = self._request(
            "request", params or {}, body, headers, request_timeout, repeatable, other
        )
        return self._call(request)

    # What the calls are made of: requests, attempts, waits.

    def _request(
        self,
        call: str,
        params: Mapping[str, Any],
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        repeatable: bool = True,
        other: _PathTemplate | None = None,  # than the Api's
    ) -> _Request:
        template = other or self._api._templates.get(call)
        if not template:
            raise ValueError(f"this Api has no {call} template")
        known = {} if other else self._api._templates["poll"].own(params)
        path = template.fill(template.own(params) if call == "cancel" else params)
        all_headers = {**self._headers, **_checked_headers(headers)}
        content = None
        if body is not None:
            content = json.dumps(body, allow_nan=False).encode()
            all_headers.setdefault("Content-Type", "application/json")
        seconds = self._timeout if timeout is None else timeout
        _at_least(_SHORTEST_TIMEOUT, "request_timeout", seconds)
        return _Request(
            call, template.method, path, all_headers, content, seconds, repeatable, known
        )

    def _status_request(self, run: _Run) -> _Request:
        return self._request("poll", self._api._status_params(run))

    def _authorization(self) -> tuple[str, dict[str, str]]:
        """The key as it is now, and the header that carries it; of no key "" and none."""
        key = self._api_key() if callable(self._api_key) else self._api_key
        key = "" if key is None else _checked(str, "api_key", key).strip()
        header = {self._api.auth_header: f"{self._api.auth_scheme} {key}".strip()}
        return key, _checked_headers(header if key else None)

    def _call(self, request: _Request, absent: Sequence[int] = ()) -> Any:
        """What comes of a request in the end; None of an HTTP status that means `absent`.

        Raises the fault that does not pass.
        """
        retry = self._new_retry(request)
        self._wait(retry.next_attempt)  # the first attempt is made, whatever `sleep` says
        while True:
            outcome = self._attempt(request, retry)
            if not isinstance(outcome.value, RunpollError):
                return outcome.value
            if getattr(outcome.value, "http_status", None) in absent:
                return None
            self._sit_out(retry, outcome)
            if not self._wait(retry.next_attempt):
                raise outcome.value

    def _attempt(self, request: _Request, retry: _Retry, deadline: float = math.inf) -> _Outcome:
        """Make one attempt, which does not pass the deadline. A fault is not raised yet."""
        began = self._clock()
        key, header = self._fixed_authorization or self._authorization()
        seconds = min(request.timeout, deadline - self._clock(), _LONGEST_TIMEOUT)
        try:
            value = self._result_of(request, header, seconds)
        except RunpollError as fault:
            value = _for_caller(fault, request, key, retry.may_have_begun)
        ended = self._clock()
        if isinstance(value, RunpollError):
            retry.failed(value, began, ended)
            if _holds_back(value):
                with self._lock:
                    until = min(retry.due, ended + _LONGEST_RETRY_AFTER)
                    self._held_until = max(self._held_until, until)
        return _Outcome(value, began, ended)

    def _result_of(self, request: _Request, header: dict[str, str], seconds: float) -> Any:
        """What one attempt brings: a state, or JSON, or None of a cancel."""
        if seconds <= 0:
            what = "not sent, as the key took all the time that was left; try again later"
            raise TransportError(what, sent=False)
        connect_seconds = min(self._timeout, seconds) / 2
        answer = self._wire.exchange(request, header, connect_seconds, seconds)
        good = 200 <= answer.status < 300
        of_a_run = request.call in ("start", "poll")
        if not good and not (of_a_run and answer.status in self._api.answer_statuses):
            raise _api_error(answer)
        if request.call == "cancel":
            return None  # a status request says what came of it
        try:
            body = _parsed_json(answer.text)
            return self._read_state(request, body, answer) if of_a_run else body
        except BadResponse as problem:
            if not good:
                raise _api_error(answer) from None
            text, transient = str(problem), problem.transient
            raise _bad_response(answer, text, transient) from problem.__cause__

    def _read_state(self, request: _Request, body: Any, answer: _Answer) -> RunState:
        try:
            state = self._api.read_state(body, dict(request.params), answer.headers, answer.status)
            _checked(RunState, "what read_state returns", state)
        except (*_CALLERS_ERRORS, RecursionError) as error:
            # Not its message, which may quote what a run returns.
            text = f"{type(error).__name__} in read_state; check how the Api reads such an answer"
            raise BadResponse(text) from error
        if not state.params:  # an override may leave them to us
            state = replace(state, params={"run_id": state.id, **request.params})
        _log.debug("run %r: %r", state.id, state.status)
        if state.phase is Phase.UNKNOWN:
            word = _normalized(state.status)
            with self._lock:
                known = word in self._unknown_words
                self._unknown_words.add(word)
            if not known:
                text = "run %r: unknown status %r, taken as not ended; Api.phases may list it"
                _log.warning(text, state.id, _excerpt(state.status))
        return state

    def _new_retry(
        self, request: _Request, iterating: bool = False, just_started: bool = False
    ) -> _Retry:
        lag_statuses = {404} if just_started else set()
        if callable(self._api_key):
            lag_statuses.add(401)
        return _Retry(request.repeatable, self._max_outage, lag_statuses, iterating)

    def _sit_out(self, retry: _Retry, outcome: _Outcome, latest: float = math.inf) -> None:
        """Have a fault tried again at `retry.due`. Raises it where that is not worth it."""
        if not retry.worth_it:
            raise outcome.value
        retry.due = min(retry.due, latest)
        seconds = retry.due - outcome.ended
        _log.warning("%s; trying again in %.1f s", outcome.value, seconds)

    def _wait(self, next_attempt: Callable[[float, float], float]) -> bool:
        """Sleep until an attempt is due. False when `sleep` ends all.

        `next_attempt` says when, given the clock and until when the session is held back. It is
        asked again after each sleep, which may return early.
        """
        while True:
            now = self._clock()
            seconds = next_attempt(now, self._held_until) - now
            if seconds <= _CLOCK_TOLERANCE:
                return True
            if self._sleep(min(seconds, _LONGEST_SLEEP)) is True:
                return False

    def _stopped(self) -> bool:
        """Whether `sleep` ends also what has nothing to wait for."""
        return self._sleep is not time.sleep and self._sleep(0.0) is True


# ---- Following runs: knows when a run is polled, and nothing of HTTP.

_LAST_POLL_MARGIN = 0.1  # seconds before the deadline that are kept for a last poll, at least
_Interval = Union[float, Callable[[RunState], float]]


@dataclass(frozen=True)
class Backoff:
    """The default interval: a pure function of the state (and chance), good for any number of runs.

    Args:
        initial: seconds, the first wait.
        factor: by which the wait grows with each poll.
        maximum: seconds, the longest wait.
        jitter: each wait is up to this share longer or shorter, by chance.
        pace: the longest wait as a share of the time that seems to be left, though that makes no
            wait shorter than `initial`; None leaves progress out of it.
        paused: seconds to wait while the run waits for a person.
    """

    initial: float = 1.0
    factor: float = 1.3
    maximum: float = 12.0
    jitter: float = 0.1
    pace: float | None = 0.7
    paused: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "pace" or value is not None:
                _at_least(0, name, value)
        if self.jitter > 1:
            raise ValueError(f"jitter has to be at most 1, not {self.jitter!r}")

    def __call__(self, state: RunState) -> float:
        jitter = random.uniform(1 - self.jitter, 1 + self.jitter)
        if state.phase is Phase.PAUSED:
            return self.paused * jitter
        try:
            grown = self.initial * self.factor ** max(0, state.polls - 1)
        except OverflowError:  # after thousands of polls
            grown = self.maximum if self.initial else 0.0
        seconds = min(min(grown, self.maximum) * jitter, self.maximum)
        if self.pace is None or state.eta is None:
            return seconds
        return min(seconds, max(self.pace * state.eta, self.initial))


@dataclass(eq=False, repr=False)
class _Watch:
    """When the next attempt at one run is due. It never waits and makes no request.

    It keeps the deadline: what would be due later is planned as a last poll, at a time when twice
    the seconds that the last one took are left, and `next_attempt` raises PollTimeout where none
    fits any more. An attempt gets the time until the deadline.
    """

    request: _Request
    retry: _Retry
    interval: _Interval
    began: float
    timeout: float
    state: RunState | None  # the last one seen, at first the one handed in
    fault: RunpollError | None = None  # the last one since a good answer
    polls: int = 0
    first_progress: tuple[float, float] | None = None  # of this iteration, and when

    def __post_init__(self) -> None:
        self.due = self.began
        self.deadline = self.began + self.timeout
        self.last_poll = self.deadline - _LAST_POLL_MARGIN
        if self.state:
            self.state = replace(self.state, polls=0, faults=0, elapsed=0.0, eta=None)

    def __lt__(self, other: _Watch) -> bool:
        return self.due < other.due

    def next_attempt(self, now: float, held_until: float) -> float:
        """When the next attempt is due. Raises PollTimeout where that is never."""
        due = max(self.due, held_until, now)
        if not _reached(self.deadline, due):
            return due
        if not _reached(self.last_poll, now):
            return self.last_poll  # held back beyond the deadline: a PollTimeout comes no earlier
        raise self.timeout_error()

    def succeeded(self, outcome: _Outcome) -> RunState:
        """Take in a good answer, and return it as the caller sees it."""
        answer, began, ended = outcome
        self.polls += 1
        self.last_poll = self.deadline - max(_LAST_POLL_MARGIN, 2 * (ended - began))
        state: RunState = replace(
            answer,
            polls=self.polls,
            faults=self.retry.faults,
            elapsed=ended - self.began,
            eta=self._eta(answer.progress, ended),
        )
        self.state, self.fault = state, None
        self.retry.succeeded()
        return state

    def failed(self, outcome: _Outcome) -> None:
        """Take in a fault. Raises PollTimeout where it came of the deadline."""
        self.fault = outcome.value
        if outcome.value.transient and _reached(self.deadline, outcome.ended):
            raise self.timeout_error()

    def schedule(self, state: RunState, now: float) -> None:
        """Set when the poll after a state is due, counted from its answer."""
        seconds = min(state.retry_after or 0.0, _LONGEST_RETRY_AFTER)
        if not seconds:
            seconds = self.interval(state) if callable(self.interval) else self.interval
            _at_least(0, "interval", seconds)
        self.due = min(self.began + state.elapsed + seconds, self.latest(now))

    def latest(self, now: float) -> float:
        """The latest due time: that of a last poll, or the deadline, which means never."""
        return self.deadline if _reached(self.last_poll, now) else self.last_poll

    def _eta(self, progress: float | None, now: float) -> float | None:
        """Seconds that seem to be left, at the pace since this iteration's first poll."""
        if progress is None:
            return None
        if self.first_progress is None:
            self.first_progress = progress, now
        gained, taken = progress - self.first_progress[0], now - self.first_progress[1]
        return (1 - progress) * taken / gained if gained > 0 and taken > 0 else None

    def timeout_error(self, why: str = "") -> PollTimeout:
        within = f" within {_rounded(self.timeout)} s" if self.timeout < math.inf else ""
        seen = f"last status {_excerpt(self.state.status)!r}" if self.state else "no status seen"
        text = (
            f"{self.request.label}: not ended{within}{why} ({seen}); the run goes on, and "
            "iter_status(session, error.params) follows it again"
        )
        error = PollTimeout(text, params=self.request.run_params, state=self.state)
        error.__cause__ = self.fault
        return error


def _reached(point: float, now: float) -> bool:
    return now >= point - _CLOCK_TOLERANCE


def iter_status(
    session: Session,
    run: _Run,
    *,
    interval: _Interval = Backoff(),
    timeout: float | None = 300.0,
) -> Generator[RunState, None, None]:
    """Poll a run until it ends, and yield every state, the terminal one last.

    Args:
        run: an id, a status URL or path parameters, polled at once; or a RunState, yielded first
            without a request.
        interval: seconds from a good answer to the next poll, or a callable of the state that
            returns them. A Retry-After of the answer replaces it once, at most 120 s.
        timeout: seconds for the whole iteration, from this call on. The last poll is made just
            before they are over. None is no limit.

    Raises:
        PollTimeout: the run goes on; `iter_status(session, error.params)` follows it again.
        RunpollError: a fault that does not pass.
    """
    [watch] = _watches(session, [run], interval, timeout)
    return _follow(session, watch)


def wait(
    session: Session,
    run: _Run,
    *,
    interval: _Interval = Backoff(),
    timeout: float | None = 300.0,
) -> RunState:
    """The last state of `iter_status`, with its arguments and errors.

    Raises PollTimeout, too, when the session's `sleep` ends the wait.
    """
    [watch] = _watches(session, [run], interval, timeout)
    for state in _follow(session, watch):
        if state.done:
            return state
    raise watch.timeout_error(", as sleep() ended the wait")


def iter_batch(
    session: Session,
    runs: Iterable[_Run],
    *,
    timeout: float | None,
    interval: _Interval = Backoff(),
    workers: int = 8,
) -> Generator[RunState, None, None]:
    """Poll many runs, each on its own schedule, and yield their states as they arrive.

    `session`, `interval` and `timeout` are as for `iter_status`. Of `runs`, one given twice is
    followed once. Up to `workers` requests, each in its thread, are in flight while the loop's body
    runs.

    Raises:
        BatchError: at the end, with the errors of the runs that were not followed to their ends,
            timeouts among them; at once where the key is refused (401).
    """
    if isinstance(runs, (str, Mapping, RunState)):
        raise TypeError("runs has to be an iterable of runs; for one, use iter_status")
    _at_least(1, "workers", _checked(int, "workers", workers))
    return _Batch(session, _watches(session, runs, interval, timeout), workers).follow()


def _watches(
    session: Session, runs: Iterable[_Run], interval: _Interval, timeout: float | None
) -> list[_Watch]:
    """A watch for each of the runs, all begun now; the arguments are checked."""
    began = _checked(Session, "session", session)._clock()
    seconds = math.inf if timeout is None else _at_least(-math.inf, "timeout", timeout)
    if not callable(interval):
        _at_least(0, "interval", interval)
    watches: dict[str, _Watch] = {}
    for run in runs:
        request = session._status_request(run)
        if request.path not in watches:
            given = run if isinstance(run, RunState) else None
            retry = session._new_retry(request, iterating=True, just_started=given is not None)
            watches[request.path] = _Watch(request, retry, interval, began, seconds, given)
    return list(watches.values())


def _follow(session: Session, watch: _Watch) -> Generator[RunState, None, None]:
    """Ask the watch when, sleep until then, make an attempt, tell the watch what came of it."""
    state = watch.state
    while True:
        if state:
            yield state
            if state.done:
                return
            watch.schedule(state, session._clock())
        if not session._wait(watch.next_attempt) or session._stopped():
            return
        outcome = session._attempt(watch.request, watch.retry, watch.deadline)
        state = _take_in(session, watch, outcome)


def _take_in(session: Session, watch: _Watch, outcome: _Outcome) -> RunState | None:
    """The state that came of an attempt; None for a fault that is sat out."""
    if not isinstance(outcome.value, RunpollError):
        return watch.succeeded(outcome)
    watch.failed(outcome)
    session._sit_out(watch.retry, outcome, watch.latest(outcome.ended))
    watch.due = watch.retry.due
    return None


class _Batch:
    """The watches of many runs, under a heap of due times.

    A run is in one place at a time, so that nothing here needs a lock: `_due`, its next poll being
    planned; in flight, by `_orders` and `_outcomes`; `_arrived`, its state being handed out next.
    The threads only make attempts. They are daemons, so that nobody waits for what is in flight
    after Ctrl-C.
    """

    def __init__(self, session: Session, watches: list[_Watch], workers: int) -> None:
        self._session, self._watches, self._workers = session, watches, workers
        self._due = [watch for watch in watches if not watch.state]  # a heap
        self._arrived = deque(watch for watch in watches if watch.state)
        self._in_flight = 0
        self._errors: dict[_Watch, RunpollError] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._orders: queue.SimpleQueue[_Watch | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[_Watch, Any]] = queue.SimpleQueue()

    def follow(self) -> Generator[RunState, None, None]:
        """As `_follow` does for one: send what is due, hand out what has arrived, or wait."""
        try:
            while self._due or self._in_flight or self._arrived:
                seconds = self._seconds_until_due()
                idle = not (self._in_flight or self._arrived)
                if seconds <= _CLOCK_TOLERANCE or idle:
                    if not self._send():  # which waits, where nothing else is to be done
                        return
                elif self._arrived:
                    watch = self._arrived.popleft()
                    assert watch.state
                    yield watch.state
                    if not watch.state.done:
                        watch.schedule(watch.state, self._session._clock())
                        heapq.heappush(self._due, watch)
                else:
                    self._receive(seconds)
        finally:
            self._closed = True
            for _ in self._threads:
                self._orders.put(None)  # for one that waits to see it
        for thread in self._threads:
            thread.join()
        if self._errors:
            many = f"{len(self._errors)} of {len(self._watches)}"
            raise self._error(f"{many} runs were not followed to their ends")

    def _seconds_until_due(self) -> float:
        """Until an attempt can be sent; for ever while every worker is busy."""
        if not self._due or self._in_flight == self._workers:
            return math.inf
        due = max(self._due[0].due, self._session._held_until)
        return due - self._session._clock()

    def _send(self) -> bool:
        """Once it is due, hand the first run to a worker. False when `sleep` ends all."""
        watch = heapq.heappop(self._due)
        try:
            if not self._session._wait(watch.next_attempt) or self._session._stopped():
                return False
        except PollTimeout as error:
            self._errors[watch] = error
            return True
        if self._in_flight == len(self._threads):
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        self._in_flight += 1
        self._orders.put(watch)
        return True

    def _work(self) -> None:
        """In a thread: make the attempts that are ordered, until the batch is closed."""
        for watch in iter(self._orders.get, None):
            if self._closed:
                return
            try:
                outcome = self._session._attempt(watch.request, watch.retry, watch.deadline)
                self._outcomes.put((watch, outcome))
            except BaseException as error:  # for the caller's thread to raise
                self._outcomes.put((watch, error))

    def _receive(self, seconds: float) -> None:
        """Wait at most so long for what comes of an attempt."""
        try:
            watch, outcome = self._outcomes.get(timeout=min(seconds, _LONGEST_SLEEP))
        except queue.Empty:
            return
        self._in_flight -= 1
        if isinstance(outcome, BaseException):
            raise outcome
        try:
            if _take_in(self._session, watch, outcome):
                self._arrived.append(watch)
            else:
                heapq.heappush(self._due, watch)
        except RunpollError as error:
            self._errors[watch] = error
            if isinstance(error, ApiError) and error.http_status == 401:
                raise self._error("the key was refused, and no run is followed any more") from None

    def _error(self, what: str) -> BatchError:
        errors = [self._errors[watch] for watch in self._watches if watch in self._errors]
        return BatchError(f"{what}: {'; '.join(map(str, errors[:3]))}", errors=errors)


# ---- The command line


def main(argv: Sequence[str] | None = None) -> int:
    """Follow a run to its end, as the command `runpoll RUN`, and return the exit code.

    `argv` are the arguments, by default those of the process; `--help` describes them.
    """
    try:
        options = _parsed_arguments(argv)
    except SystemExit as ended:  # as argparse does after --help and wrong usage
        return int(ended.code or 0)
    live = bool(sys.stdout and sys.stdout.isatty()) and not options.json
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the locale lacks
    handler = logging.StreamHandler()
    clear = "\r\x1b[K" if live else ""
    handler.setFormatter(logging.Formatter(f"{clear}runpoll: %(message)s"))
    level = _log.level
    _log.setLevel(logging.DEBUG if options.verbose else logging.WARNING)
    _log.addHandler(handler)
    try:
        code, problem = _run_command(options, live)
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
    if problem and sys.stderr:
        print(f"runpoll: {problem}", file=sys.stderr)
    return code


def _parsed_arguments(argv: Sequence[str] | None) -> Any:
    import argparse

    def pair(text: str) -> list[str]:
        if not re.match(r"[\w-]+=", text):  # the value may be a secret, and is not shown
            raise argparse.ArgumentTypeError("it has to be NAME=VALUE")
        return text.split("=", 1)

    def seconds(text: str) -> float:
        try:
            return _at_least(0, "it", float(text))
        except ValueError:
            raise argparse.ArgumentTypeError("it has to be a number of seconds") from None

    parser = argparse.ArgumentParser(
        prog="runpoll",
        allow_abbrev=False,
        description="Follow a remote run until it ends. The API key is read from RUNPOLL_API_KEY.",
        epilog="Exit code: 0 succeeded, 1 failed, 3 cancelled, 2 wrong usage, 5 an API or "
        "transport error, 124 timed out, 130 interrupted.",
    )
    add = parser.add_argument
    pairs: dict[str, Any] = {"type": pair, "action": "append", "default": []}
    add("run", metavar="RUN", help="its id, or its status URL")
    add("--api", default="rapidfolio", help="rapidfolio (default), doclo, dibby, onepin, or a file")
    add("--base-url", metavar="URL", help="instead of the API's own")
    add("--param", metavar="NAME=VALUE", help="another parameter of the status path", **pairs)
    add("--header", metavar="NAME=VALUE", help="sent with every request", **pairs)
    add("--interval", type=seconds, default=Backoff(), help="seconds between polls")
    add("--timeout", type=seconds, default=300.0, help="seconds for all (300); 0: no limit")
    add("--json", action="store_true", help="print each state as a line of JSON")
    add("--verbose", "-v", action="store_true", help="log each poll")
    add("--version", action="version", version=f"runpoll {__version__}")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [argument.partition("=")[0] for argument in unknown if argument[:2] == "--"]
        parser.error(f"unknown arguments: {' '.join(names) or 'is there a value to be quoted?'}")
    if options.param and "://" in options.run:
        parser.error("--param goes with an id; a status URL has every parameter in it")
    return options


def _run_command(options: Any, live: bool) -> tuple[int, str]:
    """Follow the run: the exit code, and what is to be said at the end."""
    key = os.environ.get("RUNPOLL_API_KEY")
    run = options.run if "://" in options.run else {"run_id": options.run, **dict(options.param)}
    timeout = options.timeout or None
    try:
        api = _named_api(options.api)
        session = Session(api, key, base_url=options.base_url, headers=dict(options.header))
        states = iter_status(session, run, interval=options.interval, timeout=timeout)
    except (ValueError, TypeError) as error:
        return 2, f"{error}; see runpoll --help"
    goes_on = "the run goes on, and the same command follows it again"
    try:
        with session:
            _print_states(states, live, options.json).result()
        return 0, ""
    except (RunFailed, RunCancelled) as error:
        return 1 if isinstance(error, RunFailed) else 3, str(error)
    except PollTimeout as error:
        return 124, f"{str(error).partition(';')[0]}; {goes_on}"
    except RunpollError as error:
        return 5, f"{error}" if key else f"{error} (RUNPOLL_API_KEY is not set)"
    except KeyboardInterrupt:
        return 130, f"interrupted; {goes_on}"
    except OSError as error:  # of the output; what is still to be flushed goes nowhere
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        broken = isinstance(error, BrokenPipeError)  # its reader has gone, and wants no more
        return 130, "" if broken else f"the output failed ({error.strerror}); {goes_on}"


def _named_api(name: str) -> Api:
    built_in = {"rapidfolio": RAPIDFOLIO, "doclo": DOCLO, "dibby": DIBBY, "onepin": ONEPIN}
    if name in built_in:
        return built_in[name]
    try:
        with open(name, encoding="utf-8") as file:
            return Api(**json.load(file))
    except OSError as error:
        known = ", ".join(built_in)
        raise ValueError(f"--api {name!r} ({error.strerror}) is {known} or a JSON file") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--api {name!r}: {error}") from error


def _print_states(states: Iterable[RunState], live: bool, as_json: bool) -> RunState:
    """Print each state as it comes, and return the last."""
    state, shown = None, ""
    try:
        for state in states:
            if as_json:
                line = _json_line(state)
            elif live:
                line = f"\r{_progress_line(state)}\x1b[K"
            else:
                share = "" if state.progress is None else f"{state.progress:4.0%} "
                line = f"{state.phase:<9} {share}{_excerpt(state.status)}"
            if live or line != shown:  # lines of JSON always differ, by their polls
                print(line, end="" if live else "\n", flush=True)
            shown = line
    finally:
        if live and shown:
            print()
    assert state is not None  # iter_status ends with one, or raises
    return state


def _progress_line(state: RunState) -> str:
    """A line with a bar and the time, and of the status what then fits the terminal."""
    import shutil
    import unicodedata

    columns = shutil.get_terminal_size().columns - 1
    line = f"{state.phase:<9} "
    if state.progress is not None:
        size = min(20, columns // 8)
        line += f"[{'#' * int(state.progress * size):<{size}}]{state.progress:4.0%} "
    left = f", {state.eta:.0f} s left" if state.eta and not state.done else ""
    line += f"{state.elapsed:.0f} s{left}  {_excerpt(state.status)}"
    widths = [2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line]
    while sum(widths) > columns:
        widths.pop()
    return line[: len(widths)]


def _json_line(state: RunState) -> str:
    """Every field; timestamps as ISO 8601, and what JSON has no number for as null."""

    def plain(value: Any) -> Any:
        return value.isoformat() if isinstance(value, datetime) else vars(value)

    with_constants = json.dumps(vars(state), default=plain)
    return json.dumps(json.loads(with_constants, parse_constant=lambda _: None))


if __name__ == "__main__":
    raise SystemExit(main())
