"""What the tabs of the page have in common: the jobs, the model's own settings, and whose browser asks."""

import functools
import hashlib
import html
import inspect
import logging
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stableavatar.apps.web.downloads import Downloads
from stableavatar.apps.web.language import PAGES
from stableavatar.apps.web.sentences import in_words
from stableavatar.apps.web.texts import Texts
from stableavatar.jobs.intake import FileChecker, Limits
from stableavatar.jobs.job import Job
from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.store import JobStore
from stableavatar.options import SamplingDefaults

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

COOKIE = "stableavatar"
_YEAR = 365 * 86400
_NAME = re.compile(r"[\w-]{32}")
# Autoplay alone waits until all of it is sure to play through; some browsers refuse before a click.
_PLAYS = 'oncanplay="this.oncanplay=null;this.play().catch(()=>{})"'
_TRY_AGAIN_MILLISECONDS = 3000
_TRIES = 1200  # an hour of them


class Scratch:
    """Folders for files that Gradio takes copies of; they are gone after a while, at the latest with this."""

    _SECONDS = 3600.0

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="stableavatar-", ignore_cleanup_errors=True)
        self._held: set[Path] = set()

    def folder(self) -> Path:
        """An empty one."""
        root = Path(self._root.name)
        root.mkdir(mode=0o700, exist_ok=True)  # systems clean folders of this kind
        for old in root.iterdir():
            with suppress(OSError):
                if old not in self._held and time.time() - old.stat().st_mtime > self._SECONDS:
                    shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=root))

    @contextmanager
    def held(self) -> Iterator[Path]:
        """An empty one, which begins to age when this ends."""
        folder = self.folder()
        self._held.add(folder)
        try:
            yield folder
        finally:
            folder.touch()
            self._held.discard(folder)

    def close(self) -> None:
        """Remove all of them."""
        self._root.cleanup()


def sent(path: str, texts: Texts) -> Path:
    """A file that a visitor has sent. Raises gradio.Error: it is another one of this machine, which a request
    can name as well."""
    found = Path(path).resolve()
    if not found.is_relative_to(Path(get_upload_folder()).resolve()) or not found.is_file():
        raise gr.Error(texts["no_file"], print_exception=False)
    return found


def folder_for_page() -> Path:
    """An empty one for files that a page is shown, where Gradio neither hashes nor copies them, and removes
    them after a while."""
    root = Path(get_upload_folder())
    root.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=root))


@dataclass(frozen=True)
class Studio:
    """What tabs are made with.

    Attributes:
        model: what the model is called. defaults: its own settings.
        vocals: the network that separates voices, where it is on the disk.
        downloads: of published weights; None: visitors get none.
        scratch: for files that a tab makes.
    """

    store: JobStore
    checker: FileChecker
    limits: Limits
    model: str
    defaults: SamplingDefaults
    vocals: Path
    downloads: Downloads | None
    scratch: Scratch


def guarded(texts: Texts) -> Callable[[F], F]:
    """Has a handler of the page say what nobody foresaw as a sentence, and the log why; what it says itself
    stays."""

    @contextmanager
    def saying() -> Iterator[None]:
        try:
            yield
        except gr.Error:
            raise
        except Exception as error:
            logger.exception("the page")
            raise gr.Error(texts["fault"], print_exception=False) from error

    def guard(handler: Any) -> Any:
        if inspect.isasyncgenfunction(handler):

            async def guarded_stream(*values: Any, **named: Any) -> AsyncIterator[Any]:
                with saying():
                    async with aclosing(handler(*values, **named)) as stream:
                        async for shown in stream:
                            yield shown

            return functools.wraps(handler)(guarded_stream)
        if inspect.iscoroutinefunction(handler):

            async def guarded_coroutine(*values: Any, **named: Any) -> Any:
                with saying():
                    return await handler(*values, **named)

            return functools.wraps(handler)(guarded_coroutine)

        def guarded_function(*values: Any, **named: Any) -> Any:
            with saying():
                return handler(*values, **named)

        return functools.wraps(handler)(guarded_function)

    return guard


def owner_of(cookies: dict[str, str]) -> str | None:
    """Whose browser it is; None where it has not been given a name yet."""
    name = cookies.get(COOKIE)
    return None if not name else "page-" + hashlib.sha256(name.encode()).hexdigest()[:24]


def owner(request: gr.Request) -> str:
    """Whose browser asks. Raises gradio.Error: it does not keep cookies."""
    found = owner_of(dict(request.cookies))
    if found is None:
        raise gr.Error(  # who it is, and so the language, is not known
            "This page needs cookies, to know which videos are yours. / 本页需要 Cookie 来识别您的视频。",
            print_exception=False,
        )
    return found


class NamedBrowsers:
    """ASGI middleware that gives every browser a name of its own, by which its videos are known; for a year
    from when it last opened the page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, with a cookie for who has none, or opens the page."""
        name = cookies_of(scope).get(COOKIE) if scope["type"] == "http" else None
        opens = scope["type"] == "http" and scope["path"] in PAGES and name and _NAME.fullmatch(name)
        if scope["type"] != "http" or (name and not opens):
            await self.app(scope, receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                cookie = (
                    f"{COOKIE}={name or secrets.token_urlsafe(24)}; Path=/; Max-Age={_YEAR}; HttpOnly; "
                    "SameSite=Lax"
                )
                MutableHeaders(scope=message).append("Set-Cookie", cookie)
            await send(message)

        await self.app(scope, receive, named)


def cookies_of(scope: Scope) -> dict[str, str]:
    """The cookies of a request."""
    return dict(HTTPConnection(scope).cookies)  # as requests have them: others' odd ones do not hide ours


def player(job: Job, texts: Texts, *, plays: bool = True) -> str:
    """The video as an element of the page: while it is made, or complete.

    Args:
        plays: of itself.

    Where it cannot be played while it is made, because the connection breaks or the browser plays files alone
    (Safari), the file is asked for until it is there.
    """
    file = f"/video/{job.id}.mp4"
    source = file if job.is_finished else f"/live/{job.id}.mp4"
    again = (
        "const v=this;if(v.currentTime)v.at=v.currentTime;v.tries=(v.tries||0)+1;"
        f"if(v.tries<{_TRIES})setTimeout(()=>{{if(!v.isConnected)return;"
        "v.onloadedmetadata=()=>{v.currentTime=v.at||0;v.play().catch(()=>{})};"
        f"v.src='{file}?'+v.tries}},{_TRY_AGAIN_MILLISECONDS})"
    )
    return (
        f'<video class="player" data-job="{job.id}" src="{source}" controls playsinline '
        f'{_PLAYS if plays else ""} onerror="{again}" '
        f'aria-label="{html.escape(texts["video"])}"></video>'
    )


def empty_player(texts: Texts) -> str:
    """The place where the video will play."""
    return f'<div class="player empty"><p>{html.escape(texts["nothing_yet"])}</p></div>'


def status(job: Job, store: JobStore, texts: Texts) -> str:
    """How far a job is: a bar and a sentence."""
    progress: dict[str, Any] = dict(job.progress or {})
    share = 1.0 if job.state == "completed" else progress.get("share") or 0.0
    if job.state == "queued" and store.free_bytes() < LEAST_ROOM:
        text = texts["waits_for_room"]
    elif job.state == "queued" and job.started is None:
        before = store.position(job)
        near = {0: texts["queued_first"], 1: texts["queued_second"]}
        text = near.get(before) or texts("queued", count=before)
        if not store.workers_ready():
            text = texts["loading"]
    elif job.state == "completed":
        made = job.result or {}
        text = texts(
            "completed", seconds=f"{job.details['seconds']:.1f}", size=f"{made['width']}×{made['height']}"
        )
    elif job.state == "failed":
        text = texts("failed", error=in_words(job.error or "", texts.language))
    elif job.state == "cancelled":
        text = texts["cancelled"] if job.video else texts["cancelled_empty"]
    elif job.stopping:
        text = texts["stopping"]
    elif not progress:
        text = texts["starting"]
    else:
        text = texts(
            "making",
            window=progress["window"],
            windows=progress["windows"] or "?",
            step=progress["step"],
            steps=progress["steps"],
            frames=progress["frame"],
            total=progress["frames"] or "?",
        )
        if progress.get("seconds_left") is not None:
            text += " · " + texts("left", time=texts.time(progress["seconds_left"]))
    return line(job.state, text, share, download_link(job, texts))


def line(state: str, text: str, share: float = 0.0, more: str = "") -> str:
    """A bar that is full by a share, a sentence, and what follows it as HTML."""
    return (
        f'<div class="status {state}" role="status">'
        f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>'
        f"<p>{html.escape(text)}</p>{more}</div>"
    )


def download_link(job: Job, texts: Texts) -> str:
    """A link to what is there of a finished job."""
    if not job.is_finished or job.video is None:
        return ""
    name = html.escape(texts["download"])
    return f'<a class="download" href="/video/{job.id}.mp4" download="{job.id}.mp4">{name}</a>'
