"""What operators ask: whether the server lives, whether it can make videos, and figures for Prometheus."""

import time
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stableavatar.apps.server.access import refuse_foreign_pages
from stableavatar.apps.server.schemas import error_answer
from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.store import JobStore

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

router = APIRouter(tags=["operation"])


class Alive(BaseModel):
    """The server answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether the server can make videos, and why not."""

    status: Literal["ready", "not ready"]
    workers: int
    room_bytes: int
    reason: str | None = None


@router.get("/health")
async def health() -> Alive:
    """Whether the server lives."""
    return Alive()


@router.get("/ready", responses={503: {"model": Ready, "description": "No video can be made now."}})
def ready(request: Request, response: Response) -> Ready:
    """Whether a video that is asked for would be made: a worker has its model, and there is room."""
    store: JobStore = request.app.state.store
    workers = store.workers_ready()
    room = store.free_bytes()
    reason = None
    if not workers:
        reason = "no worker has loaded its model yet"
    elif room < LEAST_ROOM:
        reason = f"there is less than {LEAST_ROOM / 1e9:g} GB of room"
    response.status_code = 200 if reason is None else 503
    status: Literal["ready", "not ready"] = "ready" if reason is None else "not ready"
    return Ready(status=status, workers=workers, room_bytes=room, reason=reason)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        403: error_answer("A web page of another host."),
    },
)
def metrics(request: Request, _: Annotated[None, Depends(refuse_foreign_pages)]) -> Response:
    """Figures for Prometheus."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Metrics:
    """Requests that were answered, and what the store tells."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "stableavatar_requests", "Requests by route and status.", ("method", "route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "stableavatar_request_seconds", "Seconds until an answer began.", ("route",),
            registry=self.registry,
        )  # fmt: skip
        self.speaking = Gauge(
            "stableavatar_sessions_open", "Sessions that are going on.", registry=self.registry
        )
        self.sessions = Counter(
            "stableavatar_sessions", "Sessions by how they ended: done, refused, failed, left by the client.",
            ("outcome",), registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client: the figures of the store, as of now."""
        jobs = GaugeMetricFamily("stableavatar_videos", "Videos by state.", labels=("state",))
        for state, count in self._store.counts().items():
            jobs.add_metric((state,), count)
        yield jobs
        ready = GaugeMetricFamily("stableavatar_workers_ready", "Workers that have loaded their model.")
        ready.add_metric((), self._store.workers_ready())
        yield ready
        totals = self._store.totals()
        ended = CounterMetricFamily(
            "stableavatar_videos_ended", "Videos that came to an end, by state.", labels=("state",)
        )
        for name, value in totals.items():
            if name.startswith("videos_"):
                ended.add_metric((name.removeprefix("videos_"),), value)
        yield ended
        for name, what in (
            ("video_seconds", "Seconds of video that were made."),
            ("work_seconds", "Seconds that workers made them in."),
        ):
            yield CounterMetricFamily(f"stableavatar_{name}", what, value=totals.get(name, 0.0))


class Counted:
    """ASGI middleware that counts requests by the route that answered them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and count when the answer begins."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        answered = False

        def count(status: int) -> None:
            # Paths and methods as such would be without end; what no route answers is one of them.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - began)

        async def counted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                count(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            if not answered:
                count(500)
            raise
