"""What is refused before the page sees it: pages of other sites, more than is taken, and files that there is
no room for."""

from collections import Counter
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stableavatar.apps.arriving import Arriving, announced_bytes, counted
from stableavatar.apps.origins import is_of_this_site
from stableavatar.apps.web.studio import cookies_of, owner_of
from stableavatar.apps.web.texts import LANGUAGES, Language, Texts
from stableavatar.jobs.store import JobStore

_UPLOAD = "/gradio_api/upload"
# Gradio takes files here too, into memory or past what looks at them, or keeps what nobody removes. The page
# has no use for them.
_UNUSED = ("/gradio_api/component_server", "/gradio_api/process_recording", "/gradio_api/deep_link")
_MOST_JSON = 2_000_000
_FORM = 100_000  # that a file's form takes beside the file
_MOST_ARRIVING, _MOST_ARRIVING_EACH = 40, 4  # files, of all and of one browser


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
        self._sending: Counter[str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless it is another site that asks, or too much comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        path = request.url.path.rstrip("/")
        texts = Texts(_language(path))
        brings_file = request.method == "POST" and path.endswith(_UPLOAD)
        most = self.most + _FORM if brings_file else _MOST_JSON
        comes = announced_bytes(request, most)

        def too_much() -> HTTPException:
            return HTTPException(413, texts["too_large"])

        if not is_of_this_site(request, self.hosts):
            await PlainTextResponse(texts["own_name_alone"], 403)(scope, receive, send)
        elif path.endswith(_UNUSED):
            await PlainTextResponse("There is nothing here.", 404)(scope, receive, send)
        elif comes > most:
            await PlainTextResponse(texts["too_large"], 413)(scope, receive, send)
        elif not brings_file:
            await self.app(scope, counted(receive, most, too_much), send)
        elif not self.arriving.has_room(comes):
            headers = {"Retry-After": "60"}
            await PlainTextResponse(texts["no_room_for_file"], 507, headers)(scope, receive, send)
        elif self._many_send(who := owner_of(cookies_of(scope))):
            await PlainTextResponse(texts["many_arrive"], 429, {"Retry-After": "5"})(scope, receive, send)
        else:
            self._sending[who] += 1
            try:
                with self.arriving.kept(comes):
                    await self.app(scope, counted(receive, most, too_much), send)
            finally:
                self._sending[who] -= 1
                self._sending += Counter()  # without those that have none

    def _many_send(self, who: str | None) -> bool:
        """Whether so many files are being sent that this browser's is not taken."""
        return self._sending[who] >= _MOST_ARRIVING_EACH or self._sending.total() >= _MOST_ARRIVING


def _language(path: str) -> Language:
    """Of the page that asks."""
    first = path.split("/")[1] if path.startswith("/") else ""
    return first if first in LANGUAGES else "en"
