"""What is refused before the page sees it: pages of other sites, and files that there is no room for."""

from collections.abc import Collection

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stableavatar.apps.origins import is_of_this_site
from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.store import JobStore

_UPLOAD = "/gradio_api/upload"


class Guard:
    """ASGI middleware before the page.

    Args:
        hosts: see `origins.is_of_this_site`.
        most: bytes of a file.
    """

    def __init__(self, app: ASGIApp, store: JobStore, hosts: Collection[str] | None, most: int) -> None:
        self.app = app
        self.store = store
        self.hosts = hosts
        self.most = most
        self._announced = 0  # bytes of the files that arrive now, at most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless it is another site that asks, or too much comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        if not is_of_this_site(request, self.hosts):
            words = "This page answers to its own name alone. Start it with --allow-host NAME for another."
            await PlainTextResponse(words, 403)(scope, receive, send)
            return
        if request.method != "POST" or not request.url.path.endswith(_UPLOAD):
            await self.app(scope, receive, send)
            return
        length = request.headers.get("content-length", "")
        comes = int(length) if length.isdecimal() else self.most
        if self.store.free_bytes() - self._announced - comes < LEAST_ROOM:
            await PlainTextResponse("There is no room for this file.", 507)(scope, receive, send)
            return
        self._announced += comes
        try:
            await self.app(scope, receive, send)
        finally:
            self._announced -= comes
