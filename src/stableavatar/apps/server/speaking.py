"""The WebSocket: speech in pieces, and the video of it back while it is spoken.

The client sends a JSON text, `{"type": "start", ...}` (see `Start`), then binary messages of samples (16-bit
little-endian mono) of any length, at last `{"type": "end"}`. It is answered with JSON texts `ready`,
`progress`, and `done` or `error`, and with binary messages, which one after the other are a fragmented MP4.
"""

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import shutil
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stableavatar.apps.server.access import bearer_of, owner_of_key, refuse_foreign_pages
from stableavatar.apps.server.health import Metrics
from stableavatar.apps.server.schemas import VIDEO_ID, ApiError, SessionOptions, fault, no_room
from stableavatar.errors import InputError
from stableavatar.jobs.intake import OPTIONS, BusyError, EndingError, Limits, check_options, check_quality
from stableavatar.jobs.job import PORTRAIT
from stableavatar.jobs.sessions import DONE, ERROR, VIDEO, Session
from stableavatar.jobs.store import JobStore
from stableavatar.media.files import reason_of
from stableavatar.options import GenerateOptions

logger = logging.getLogger(__name__)

# Without a word, or without taking what is sent, a session ends.
_SILENT_SECONDS = 60.0
_PATIENCE_SECONDS = 60.0  # until a worker is free: one that makes a video has to save it first
# Of a message: a portrait in base64 at most. Of one owner few are read at a time; and of all whose key is in
# that message few, and for a shorter time, for anybody could send them.
MOST_MESSAGE = 16 * 2**20
_MOST_BEGINNING, _MOST_UNKNOWN = 4, 16
_UNKNOWN_SECONDS = 10.0
# Of a start, which has some thirty fields, and two prompts of a few thousand characters: of a text that has
# more, what is wrong with each would take seconds to say, and it comes before its key does.
_MOST_PARTS = 10_000
_MOST_FAULTS = 20
_MOST_END = 200  # characters of the text that ends the speech
# Of all owners, each of whom has one: their workers are waited for, and listened to, in threads of their own.
MOST_SESSIONS = 50
# Browsers cannot send a header, but name protocols: ["stableavatar", "key.KEY"].
_PROTOCOL, _KEY_PROTOCOL = "stableavatar", "key."
# Than the speech that is taken at most, a session may last, whether or not anything is said.
_LONGER_SECONDS = 120.0
_POLICY_VIOLATION, _SERVER_FAULT, _TRY_AGAIN = 1008, 1011, 1013
# That the client went away, or takes nothing.
_LEFT = (WebSocketDisconnect, TimeoutError)

router = APIRouter(prefix="/v1")


class Start(BaseModel):
    """How a session begins."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["start"]
    api_key: str | None = Field(None, description="For who can send neither a header nor a protocol.")
    portrait: str | None = Field(None, description="A picture, in base64.")
    portrait_from: str | None = Field(None, pattern=VIDEO_ID, description="A video of yours: its portrait.")
    sample_rate: int = Field(16_000, ge=8000, le=48_000, description="Samples a second of the speech.")
    options: SessionOptions = Field(
        default_factory=SessionOptions,
        description="Sampling options, size and quality, as for videos, but start, seconds, order and "
        "speech_normalisation.",
    )


@router.websocket("/sessions")
async def speak(socket: WebSocket) -> None:
    """A session, from its start to its end."""
    metrics: Metrics = socket.app.state.metrics
    await socket.accept(_PROTOCOL if _PROTOCOL in socket.scope["subprotocols"] else None)
    try:
        session, owner = await _begin(socket)
    except (WebSocketDisconnect, asyncio.CancelledError) as error:  # servers cancel what a client has left
        metrics.sessions.labels("left").inc()
        if isinstance(error, WebSocketDisconnect):
            return
        raise
    except Exception as error:
        metrics.sessions.labels("refused" if isinstance(error, ApiError) else "failed").inc()
        await _refuse(socket, error if isinstance(error, ApiError) else _fault(error))
        return
    metrics.speaking.inc()
    # From now on: a client whose messages are not read cannot answer whether it is still there.
    hearing = asyncio.create_task(_hear(socket, session))
    showing = asyncio.create_task(_show(socket, session))
    until = asyncio.get_running_loop().time() + socket.app.state.limits.seconds + _LONGER_SECONDS
    failed: BaseException | None = None
    outcome = "left"
    try:
        await asyncio.wait({hearing, showing}, timeout=_left(until), return_when=asyncio.FIRST_COMPLETED)
        failed = hearing.exception() if hearing.done() else None
        if failed is None:  # all has been said, or the worker takes no more: what it made is shown
            await asyncio.wait({showing}, timeout=_left(until))
        if showing.done():
            failed = failed or showing.exception()
        elif failed is None:
            failed = ApiError(400, "the session lasted too long, and is ended", code="too_long")
        if failed is not None and not isinstance(failed, (ApiError, *_LEFT)):
            failed = _fault(failed)
        outcome = "done" if failed is None else "failed" if isinstance(failed, ApiError) else "left"
    finally:
        hearing.cancel()
        showing.cancel()
        try:
            await anyio.to_thread.run_sync(session.close)
            await asyncio.gather(hearing, showing, return_exceptions=True)
        finally:
            _sessions(socket).discard(owner)
            metrics.speaking.dec()
            metrics.sessions.labels(outcome).inc()
    if isinstance(failed, ApiError):
        await _refuse(socket, failed)


def _fault(error: BaseException) -> ApiError:
    """What nobody foresaw, as the client is told it."""
    logger.error("a session has met a fault", exc_info=error)
    return fault(error)


def _left(until: float) -> float:
    return max(until - asyncio.get_running_loop().time(), 0.0)


async def _begin(socket: WebSocket) -> tuple[Session, str]:
    """What a session needs. Raises ApiError: something cannot be used."""
    state = socket.app.state
    refuse_foreign_pages(socket)
    try:
        text = await _first_message(socket)
    except KeyError:
        raise ApiError(400, _NO_START, code="bad_start") from None
    except TimeoutError:
        raise ApiError(400, "the start was not sent in time", code="bad_start") from None
    start = await anyio.to_thread.run_sync(_start, text)
    owner = owner_of_key(state.keys, start.api_key or _key_of(socket))
    options, quality = _options(start.options, state.limits)
    _check_silent(socket, owner)
    store: JobStore = state.store
    folder: Path | None = None
    _sessions(socket).add(owner)
    try:
        folder = await anyio.to_thread.run_sync(store.new_folder)
        await anyio.to_thread.run_sync(_portrait, start, store, owner, folder)
        await anyio.to_thread.run_sync(_check, state.checker, owner, folder, options)
        session = await anyio.to_thread.run_sync(
            state.line.open,
            folder,
            {**{name: getattr(options, name) for name in _CHOSEN}, "quality": quality},
            start.sample_rate,
            state.limits.seconds,
        )
    except BaseException as error:
        _sessions(socket).discard(owner)
        if folder is not None:
            store.discard(folder)
        if isinstance(error, OSError):
            raise no_room(reason_of(error)) from error
        raise
    return session, owner


async def _first_message(socket: WebSocket) -> str:
    """What the client says first. Raises ApiError: as many of this owner, or of whom nobody knows, are about
    to say something."""
    state = socket.app.state
    owner = state.keys.owner(_key_of(socket))
    if owner is not None:
        _check_silent(socket, owner)
    most = _MOST_UNKNOWN if owner is None else _MOST_BEGINNING
    if state.beginning[owner] >= most:
        raise _too_many("many sessions are beginning: try again in a moment")
    state.beginning[owner] += 1
    try:
        seconds = _UNKNOWN_SECONDS if owner is None else _SILENT_SECONDS
        return await asyncio.wait_for(socket.receive_text(), seconds)
    finally:
        state.beginning[owner] -= 1
        if not state.beginning[owner]:
            del state.beginning[owner]


def _key_of(socket: WebSocket) -> str | None:
    """The key that a session bears, as a header or, from a browser, as a protocol."""
    for protocol in socket.scope["subprotocols"]:
        if protocol.startswith(_KEY_PROTOCOL):
            return str(protocol.removeprefix(_KEY_PROTOCOL))
    return bearer_of(socket)


def _check_silent(socket: WebSocket, owner: str) -> None:
    """Raise ApiError where this owner speaks already, or as many others as may."""
    speaking = _sessions(socket)
    if owner in speaking:
        raise _too_many("you are speaking already: end that session first", code="one_session")
    if len(speaking) >= MOST_SESSIONS:
        raise _too_many("many are speaking: try again in a moment")


def _too_many(words: str, *, code: str = "busy") -> ApiError:
    return ApiError(429, words, kind="rate_limit_error", code=code)


# Not to be chosen: speech begins when it comes, and in another order all of it would have to be waited for.
_CHOSEN = tuple(name for name in OPTIONS if name not in ("start", "duration"))


async def _hear(socket: WebSocket, session: Session) -> None:
    """Speech from the client to the worker, until it says that there is no more. Raises ApiError: what it
    sends is no speech, or there is no room for it."""
    clock = asyncio.get_running_loop().time
    silent = clock() + _SILENT_SECONDS
    while True:
        waiting = not session.answered  # the client may wait for the word that it may speak
        try:
            message = await asyncio.wait_for(socket.receive(), max(silent - clock(), 0.0))
        except TimeoutError:
            if waiting:
                silent = clock() + _SILENT_SECONDS
                continue
            break
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        samples = message.get("bytes")
        if samples is None:
            _check_end(message.get("text") or "")
            break
        if not samples:  # no word
            continue
        silent = clock() + _SILENT_SECONDS
        try:
            await anyio.to_thread.run_sync(session.say, samples)
        except OSError as error:
            raise no_room(reason_of(error)) from error
    session.end_speech()


def _check_end(text: str) -> None:
    """Raises ApiError: a text that is not the end, such as speech in base64."""
    with contextlib.suppress(ValueError, RecursionError):
        if len(text) <= _MOST_END and json.loads(text) == {"type": "end"}:
            return
    words = 'what follows the start are samples as binary messages, and {"type": "end"}'
    raise ApiError(400, words, code="bad_message")


async def _show(socket: WebSocket, session: Session) -> None:
    """The video from the worker to the client, to its end. Raises ApiError: no worker is free, or it does not
    come to its end."""
    threads: anyio.CapacityLimiter = socket.app.state.session_threads
    if not await anyio.to_thread.run_sync(session.wait, _PATIENCE_SECONDS, limiter=threads):
        raise ApiError(503, "no worker is free: try again later", code="busy", kind="server_error")
    await _say(socket.send_json({"type": "ready"}))
    while True:
        message = await anyio.to_thread.run_sync(session.receive, limiter=threads)
        if message is None:
            raise ApiError(503, "the worker was lost: try again", code="lost", kind="server_error")
        letter, content = message
        if letter == ERROR:
            told = json.loads(content)
            if told["status"] < 500:
                raise ApiError(told["status"], told["message"], code="unusable")
            raise ApiError(told["status"], told["message"], code="failed", kind="server_error")
        if letter == VIDEO:
            sending = socket.send_bytes(content)
        else:
            kind = "done" if letter == DONE else "progress"
            sending = socket.send_json({"type": kind, **json.loads(content)})
        await _say(sending)
        if letter == DONE:
            await _say(socket.close())
            return


async def _say(sending: Awaitable[None]) -> None:
    """Send. Raises WebSocketDisconnect, TimeoutError: the client has gone, or takes nothing."""
    try:
        await asyncio.wait_for(sending, _SILENT_SECONDS)
    except RuntimeError as error:  # of a connection that is known to be lost, and not yet closed
        raise WebSocketDisconnect(1006) from error


def _options(chosen: BaseModel, limits: Limits) -> tuple[GenerateOptions, int]:
    """What was chosen, and the quality of the file. Raises ApiError: something cannot be."""
    values = chosen.model_dump()
    quality, size = values.pop("quality"), values.pop("size")
    if size is not None:
        width, _, height = size.partition("x")
        values |= {"width": int(width), "height": int(height)}
    try:
        return check_options({**values, "order": "causal"}, limits), check_quality(quality)
    except InputError as error:
        raise ApiError(400, str(error), code="bad_option") from error


def _portrait(start: Start, store: JobStore, owner: str, folder: Path) -> None:
    """The picture, into the session's folder."""
    if (start.portrait is None) == (start.portrait_from is None):
        raise ApiError(400, "give either portrait or portrait_from", code="bad_start", param="portrait")
    if start.portrait is not None:
        try:
            (folder / PORTRAIT).write_bytes(base64.b64decode(start.portrait, validate=True))
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, "portrait: this is no base64", code="bad_start", param="portrait") from error
        return
    assert start.portrait_from is not None
    job = store.get(owner, start.portrait_from)
    try:
        if job is not None:
            shutil.copyfile(job.portrait, folder / PORTRAIT)
            return
    except FileNotFoundError:  # removed meanwhile
        pass
    raise ApiError(404, "portrait_from: there is no such video", code="not_found", param="portrait_from")


def _check(checker: Any, owner: str, folder: Path, options: GenerateOptions) -> None:
    try:
        found = checker.check(owner, folder / PORTRAIT, None, GenerateOptions(duration=1.0, fps=options.fps))
    except InputError as error:
        raise ApiError(400, str(error), code="unusable", param="portrait") from error
    except BusyError as error:
        raise _too_many(str(error)) from error
    except EndingError as error:
        raise ApiError(503, str(error), kind="server_error", code="ending") from error
    try:
        checker.check_options(options, found)
    except InputError as error:
        raise ApiError(400, str(error), code="bad_option") from error


def _sessions(socket: WebSocket) -> set[str]:
    """Owners who are speaking."""
    speaking: set[str] = socket.app.state.speaking
    return speaking


async def _refuse(socket: WebSocket, error: ApiError) -> None:
    codes = {429: _TRY_AGAIN, 503: _TRY_AGAIN, 507: _TRY_AGAIN, 500: _SERVER_FAULT}

    async def say() -> None:
        await socket.send_json({"type": "error", "error": error.body.error.model_dump()})
        await socket.close(codes.get(error.status, _POLICY_VIOLATION))

    with contextlib.suppress(Exception):  # the client may have gone, or take nothing
        await asyncio.wait_for(say(), _SILENT_SECONDS)


_NO_START = 'the first message has to be a JSON text {"type": "start", ...}'


def _start(text: str) -> Start:
    """What the first message says. Raises ApiError: it is no start."""
    if text.count(":") + text.count(",") > _MOST_PARTS:
        raise ApiError(400, "the start has more parts than any", code="bad_start")
    try:
        return Start.model_validate_json(text)
    except ValidationError as error:
        raise ApiError(400, _first(error), code="bad_start") from None


def _first(error: ValidationError) -> str:
    """What is wrong with a start."""
    if (count := error.error_count()) > _MOST_FAULTS:
        return f"{count} fields of the start cannot be used"
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
