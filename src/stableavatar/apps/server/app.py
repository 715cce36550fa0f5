"""The server's application, and running it."""

import contextlib
import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from stableavatar import __version__
from stableavatar.apps.running import THREADS, keep_temporary_files, listen, run_with_workers
from stableavatar.apps.server import health, speaking, videos
from stableavatar.apps.server.access import Gate, Keys, check_host
from stableavatar.apps.server.health import Counted, Metrics
from stableavatar.apps.server.schemas import RETRY_AFTER, ApiError, ErrorBody, answer_error, fault
from stableavatar.apps.watching import Viewers
from stableavatar.jobs.intake import FileChecker, Limits
from stableavatar.jobs.sessions import SessionLine
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import ModelChoice
from stableavatar.jobs.workers import HUNG_SECONDS, Workers
from stableavatar.options import SamplingDefaults

logger = logging.getLogger(__name__)

DESCRIPTION = """\
A portrait says a recording: send both, ask how far the video is, watch it while it is made, fetch it.

Paths, fields and states are those of OpenAI's videos API where it has them, so its clients work. Added are \
`portrait`, `speech`, sampling options, `cancel`, `events` and `live`. Errors are `{"error": {...}}`.
"""


@dataclass(frozen=True)
class Service:
    """What a server is made of.

    Attributes:
        folder: of its jobs. models: of each worker. keys: of its users.
        defaults: the settings of that model, where they are known: what it cannot make is refused at once.
        keep_seconds: finished videos are removed after so long; None: never.
        save_seconds: what workers have to save what they are making, when the server ends.
        hung_seconds: see `jobs.workers.Workers`.
    """

    folder: Path
    models: Sequence[ModelChoice] = (ModelChoice(),)
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    defaults: SamplingDefaults | None = None
    keep_seconds: float | None = None
    save_seconds: float = 60.0
    hung_seconds: float | None = HUNG_SECONDS
    verbosity: int = 0

    @property
    def model(self) -> str:
        """What the model is called in requests."""
        first = self.models[0]
        return first.name or Path(first.source).name

    def store(self) -> JobStore:
        """The jobs."""
        return JobStore(self.folder, self.limits.quotas)


def create_app(service: Service, store: JobStore) -> FastAPI:
    """The application; workers are not its business."""
    checker, line = FileChecker(service.limits, service.defaults), SessionLine(store)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        checker.close()
        line.close()

    app = FastAPIOffline(  # whose page /docs loads nothing from elsewhere
        docs_url="/docs",
        redoc_url=None,
        title="StableAvatar",
        version=__version__,
        description=DESCRIPTION,
        lifespan=life,
        form_limits={"max_files": 3, "max_fields": 40, "max_part_size": 100_000},
    )
    app.state.store = store
    app.state.limits = service.limits
    app.state.keys = service.keys
    app.state.model = service.model
    app.state.keep_seconds = service.keep_seconds
    app.state.checker = checker
    app.state.line = line
    app.state.speaking = set()
    app.state.session_threads = anyio.CapacityLimiter(speaking.MOST_SESSIONS)
    app.state.viewers = Viewers()
    quotas = service.limits.quotas
    app.state.listeners = Viewers(2 * quotas.waiting, 2 * quotas.waiting_each)  # to every video that waits
    app.state.beginning = Counter()
    app.state.metrics = Metrics(store)
    app.include_router(videos.router)
    app.include_router(speaking.router)
    app.include_router(health.router)
    app.add_middleware(Gate, keys=service.keys, limits=service.limits, store=store)
    app.add_middleware(Counted, metrics=app.state.metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(sqlite3.Error, _fault)
    app.add_exception_handler(Exception, _fault)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def serve(service: Service, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Run the server until it is told to end.

    Args:
        announce: told its URL.

    Raises:
        InputError: the folder is another server's, or the port, or anybody could use the server.
        CheckpointError: the model cannot be loaded.
    """
    check_host(host, service.keys)
    store = service.store()
    with contextlib.closing(store.own()):
        listener, url = listen(host, port)
        announce(url)
        workers = Workers(
            store, service.models, hung_seconds=service.hung_seconds, verbosity=service.verbosity
        )
        app = create_app(service, store)
        keep_temporary_files(store)  # after the line for sessions, whose name in a folder has to be short
        run_with_workers(
            app,
            workers,
            listener=listener,
            save_seconds=service.save_seconds,
            keep_seconds=service.keep_seconds,
            most_message=speaking.MOST_MESSAGE,
        )


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return answer_error(error)


async def _fault(_request: Request, error: Exception) -> JSONResponse:
    """What nobody foresaw; the log has its traceback."""
    return answer_error(fault(error))


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """The first thing that is wrong, as OpenAI's API says it: 400."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(where) or None
    message = first["msg"] if param is None else f"{param}: {first['msg']}"
    return _error(400, message, code=first["type"], param=param)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = _error(error.status_code, str(error.detail), code=f"http_{error.status_code}")
    answer.headers.update(error.headers or {})
    return answer


def _error(status: int, message: str, *, code: str, param: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return answer_error(ApiError(status, message, code=code, param=param, kind=kind))


_RETRY_HEADER = {
    "description": "Seconds until another try may be taken.",
    "schema": {"type": "integer"},
}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description, without the answer 422 that FastAPI adds: what it stands for is 400 here; and with
    the headers of errors."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                for status in RETRY_AFTER:
                    answer = operation["responses"].get(str(status), {})
                    if "ErrorBody" in str(answer.get("content")):
                        answer["headers"] = {"Retry-After": _RETRY_HEADER}
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        errors = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= {**errors.pop("$defs"), "ErrorBody": errors}
        app.openapi_schema = schema
    return app.openapi_schema
