"""The page's HTML in the language that was chosen: Gradio's own words follow the browser, and name Gradio."""

import html
import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stableavatar.apps.web.texts import LANGUAGES, Language, Texts

_TAGS: dict[Language, str] = {"en": "en", "zh": "zh-CN"}
PAGES: dict[str, Language] = {f"/{language}/": language for language in LANGUAGES}
_SCRIPT = """<script>
for (const [name, value] of [["language", "{tag}"], ["languages", ["{tag}"]]])
  Object.defineProperty(navigator, name, {{get: () => value}});
</script>"""


class InOneLanguage:
    """ASGI middleware over the pages of `LANGUAGES`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a page as a whole, since it is another one then."""
        language = PAGES.get(scope["path"]) if scope["type"] == "http" else None
        if language is None:
            await self.app(scope, receive, send)
            return
        start: Message = {}
        body = b""

        async def changed(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            if message["type"] != "http.response.body":
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            headers = MutableHeaders(scope=start)
            if "text/html" in headers.get("content-type", "") and "content-encoding" not in headers:
                body = in_language(body.decode(), language).encode()
                headers["content-length"] = str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, changed)


def in_language(page: str, language: Language) -> str:
    """Gradio's page with words of ours, and told which language its own words are to be in."""
    texts, tag = Texts(language), _TAGS[language]
    title, says = html.escape(texts["title"]), html.escape(texts["subtitle"])
    page = re.sub(r'<html\s+lang="\w+"', f'<html lang="{tag}"', page, count=1)
    page = re.sub(r'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>', "", page)
    about = f'<meta property="og:title" content="{title}"><meta property="og:description" content="{says}">'
    return page.replace("<head>", f"<head>{_SCRIPT.format(tag=tag)}{about}", 1)
