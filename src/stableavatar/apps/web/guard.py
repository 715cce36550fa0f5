"""What is refused before the page sees it: pages of other sites, and files that there is no room for."""

from collections.abc import Collection

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stableavatar.apps.arriving import Arriving, announced_bytes
from stableavatar.apps.origins import is_of_this_site
from stableavatar.jobs.store import JobStore

_UPLOAD = "/gradio_api/upload"
# Gradio takes files here too, into memory or past what looks at them. The page has no use for them.
_UNUSED = ("/gradio_api/component_server", "/gradio_api/process_recording")


class Guard:
    """ASGI middleware before the page.

    Args:
        hosts: see `origins.is_of_this_site`.
        most: bytes of a file.
    """

    def __init__(self, app: ASGIApp, store: JobStore, hosts: Collection[str] | None, most: int) -> None:
        self.app = app
        self.hosts = hosts
        self.most = most
        self.arriving = Arriving(store)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless it is another site that asks, or too much comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        path = request.url.path.rstrip("/")
        if not is_of_this_site(request, self.hosts):
            words = "This page answers to its own name alone. Start it with --allow-host NAME for another."
            await PlainTextResponse(words, 403)(scope, receive, send)
        elif path.endswith(_UNUSED):
            await PlainTextResponse("There is nothing here.", 404)(scope, receive, send)
        elif request.method != "POST" or not path.endswith(_UPLOAD):
            await self.app(scope, receive, send)
        elif self.arriving.has_room(comes := announced_bytes(request, self.most)):
            with self.arriving.kept(comes):
                await self.app(scope, receive, send)
        else:
            await PlainTextResponse("There is no room for this file.", 507)(scope, receive, send)
