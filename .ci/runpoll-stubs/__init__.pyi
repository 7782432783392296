# Written by .ci/stub
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
__version__ = '0.1.0'
__all__ = ['RunpollError', 'TransportError', 'ApiError', 'BadResponse', 'PollTimeout', 'RunFailed', 'RunCancelled', 'RunNotDone', 'BatchError', 'Phase', 'ErrorInfo', 'RunState', 'Api', 'RAPIDFOLIO', 'DOCLO', 'DIBBY', 'ONEPIN', 'Session', 'Backoff', 'iter_status', 'wait', 'iter_batch']
_T = TypeVar('_T')

class RunpollError(Exception):
    params: dict[str, str] | None = None

    def __init__(self, text: str='', **attributes: Any) -> None:
        ...

class TransportError(RunpollError):
    sent: bool = True

class ApiError(RunpollError):
    http_status: int
    error: ErrorInfo
    body: str
    request_id: str | None
    retry_after: float | None

class BadResponse(RunpollError):
    http_status: int = 200
    body: str = ''

class PollTimeout(RunpollError, TimeoutError):
    state: RunState | None = None
    runs: Sequence[dict[str, str]] = ()
    states: Sequence[RunState] = ()
    errors: Sequence[RunpollError] = ()

class RunFailed(RunpollError):
    state: RunState

class RunCancelled(RunpollError):
    state: RunState

class RunNotDone(RunpollError):
    state: RunState

class BatchError(RunpollError):
    errors: Sequence[RunpollError] = ()

class Phase(str, Enum):
    PENDING = 'pending'
    RUNNING = 'running'
    PAUSED = 'paused'
    SUCCEEDED = 'succeeded'
    FAILED = 'failed'
    CANCELLED = 'cancelled'
    UNKNOWN = 'unknown'

    def __str__(self) -> str:
        ...

    @property
    def terminal(self) -> bool:
        ...

@dataclass(frozen=True, eq=False, repr=False)
class ErrorInfo:
    message: str
    code: str | None = None
    step: str | None = None
    details: Any = None

@dataclass(frozen=True, eq=False, repr=False)
class RunState:
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
    __hash__ = None

    @property
    def done(self) -> bool:
        ...

    @property
    def ok(self) -> bool:
        ...

    @overload
    def result(self, decode: None=None) -> Any:
        ...

    @overload
    def result(self, decode: Callable[[Any], _T]) -> _T:
        ...
_Run = Union[str, Mapping[str, Any], RunState]
_Field = Union[str, Sequence[str], Callable[[Any], Any]]

@dataclass(frozen=True, eq=False, repr=False)
class Api:
    base_url: str
    status: str
    start: str = ''
    cancel: str = ''
    root: str = ''
    fields: Mapping[str, _Field] = field(default_factory=dict)
    phases: Mapping[str, Phase | str] = field(default_factory=dict)
    auth_header: str = 'Authorization'
    auth_scheme: str = 'Bearer'
    idempotency: str = ''
    hold: Callable[[Any], float] | None = None

    def __hash__(self) -> int:
        ...

    def __post_init__(self) -> None:
        ...

    def read_state(self, body: Any, params: Mapping[str, str] | None=None, headers: Mapping[str, str] | None=None, http_status: int=200) -> RunState:
        ...
RAPIDFOLIO: Api
DOCLO: Api
DIBBY: Api
ONEPIN: Api

class Session:

    def __init__(self, api: Api, api_key: str | Callable[[], str] | None=None, *, base_url: str | None=None, headers: Mapping[str, str] | None=None, request_timeout: float=30.0, retries: int=3, max_body: int=16 * 2 ** 20, pool: urllib3.PoolManager | None=None, allow_http: bool=False, sleep: Callable[[float], object]=time.sleep, clock: Callable[[], float]=time.monotonic) -> None:
        ...

    def __repr__(self) -> str:
        ...

    def __enter__(self) -> Session:
        ...

    def __exit__(self, *_: object) -> None:
        ...

    def close(self) -> None:
        ...

    def start(self, body: Any=None, *, request_timeout: float | None=None, headers: Mapping[str, str] | None=None, idempotency_key: str | None=None, **params: str) -> RunState:
        ...

    def poll(self, run: _Run) -> RunState:
        ...

    def cancel(self, run: _Run, body: Any=None) -> bool:
        ...

    def request(self, method: str, path: str, body: Any=None, *, params: Mapping[str, str] | None=None, request_timeout: float | None=None, headers: Mapping[str, str] | None=None) -> Any:
        ...

@dataclass(frozen=True, eq=False, repr=False)
class Backoff:
    initial: float = 1.0
    factor: float = 1.3
    maximum: float = 12.0
    jitter: float = 0.1
    pace: float | None = 0.7
    paused: float = 30.0

    def __post_init__(self) -> None:
        ...

    def __call__(self, state: RunState) -> float:
        ...
_Interval = Union[float, Sequence[float], Callable[[RunState], float]]

def iter_status(session: Session, run: _Run, *, interval: _Interval=Backoff(), timeout: float | None=300.0, max_outage: float | None=60.0) -> Generator[RunState, None, None]:
    ...

def wait(session: Session, run: _Run, *, interval: _Interval=Backoff(), timeout: float | None=300.0, max_outage: float | None=60.0) -> RunState:
    ...

def iter_batch(session: Session, runs: Iterable[_Run], *, timeout: float | None, interval: _Interval=Backoff(), max_outage: float | None=60.0, workers: int=8) -> Generator[RunState, None, None]:
    ...
