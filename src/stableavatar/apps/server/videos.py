"""The routes of videos: ask for one, see how far it is, watch, fetch, cancel and remove it."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, NoReturn

import anyio.to_thread
from fastapi import APIRouter, Depends, Form, Path, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import ValidationError

from stableavatar.apps.server.access import Owner
from stableavatar.apps.server.schemas import (
    VIDEO_ID,
    ApiError,
    DeletedVideo,
    Model,
    ModelList,
    Video,
    VideoList,
    VideoRequest,
    VideoRequestWithoutFiles,
    answer_error,
    as_video,
    error_answer,
    no_room,
)
from stableavatar.apps.watching import ManyWatchError, Viewers, thumbnail_response, video_response
from stableavatar.errors import InputError
from stableavatar.jobs.asking import Bring, ask, copied
from stableavatar.jobs.intake import (
    OPTIONS,
    BusyError,
    EndingError,
    FileChecker,
    Limits,
    check_options,
    check_quality,
)
from stableavatar.jobs.job import Job
from stableavatar.jobs.quotas import NoRoomError, QueueFullError
from stableavatar.jobs.store import JobStore
from stableavatar.media.files import reason_of
from stableavatar.options import GenerateOptions

_JSON = "application/json"
_MOST_JSON = 100_000
_COPY = 2**20
_EVENT_SECONDS = 0.25
_SAY_AGAIN_SECONDS = 15.0

_Answers = dict[int | str, dict[str, Any]]
_ERRORS: _Answers = {
    400: error_answer("Something cannot be used as it was sent."),
    401: error_answer("No API key, or an unknown one."),
    403: error_answer("A web page of another host."),
    503: error_answer("The server ends, or its table of videos cannot be used now."),
}
_NOT_FOUND: _Answers = {404: error_answer("No such video.")}
_NOT_THERE: _Answers = {409: error_answer("Not there yet.")}
_MP4: dict[str, Any] = {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}

router = APIRouter(prefix="/v1", responses=_ERRORS)
VideoPath = Annotated[str, Path(pattern=VIDEO_ID, description="The video's id.")]


def job_of(request: Request, owner: Owner, video_id: VideoPath) -> Job:
    """The owner's video of that id. Raises ApiError: there is none."""
    return _job(request, owner, video_id)


Asked = Annotated[Job, Depends(job_of)]


@router.get("/models", tags=["models"])
def list_models(request: Request, owner: Owner) -> ModelList:
    """The models of this server."""
    return ModelList(data=[Model(id=request.app.state.model)])


async def _asked_for(
    request: Request, form: Annotated[VideoRequest, Form(media_type="multipart/form-data")]
) -> VideoRequest:
    """What is asked for, of a form, or of JSON: OpenAI's client sends that where there is no file."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        return form
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_JSON:
            raise ApiError(413, f"{_MOST_JSON} bytes of JSON at most", code="too_large")
    try:
        chosen = VideoRequestWithoutFiles.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return VideoRequest(**chosen.model_dump())


@router.post(
    "/videos",
    tags=["videos"],
    openapi_extra={
        "requestBody": {"content": {_JSON: {"schema": VideoRequestWithoutFiles.model_json_schema()}}}
    },
    responses={
        404: error_answer("No such model, or no such video of yours."),
        413: error_answer("More bytes than are taken."),
        429: error_answer("Too many videos are waiting."),
        507: error_answer("The server has no room left."),
    },
)
def create_video(request: Request, owner: Owner, form: Annotated[VideoRequest, Depends(_asked_for)]) -> Video:
    """Ask for a video: a portrait says a recording.

    It is made when its turn comes. Owners take turns, whatever the number of their videos.
    """
    store: JobStore = request.app.state.store
    limits: Limits = request.app.state.limits
    checker: FileChecker = request.app.state.checker
    model: str = request.app.state.model
    if form.model is not None and form.model != model:
        raise ApiError(
            404, f"there is no such model: this server has {model}", code="no_model", param="model"
        )
    portrait = form.portrait or form.input_reference
    if form.portrait is not None and form.input_reference is not None:
        _refuse("give portrait or input_reference, not both", "portrait")
    if (portrait is None) == (form.portrait_from is None):
        _refuse("give either portrait, a picture, or portrait_from, a video of yours", "portrait")
    if form.speech is not None and form.speech_from is not None:
        _refuse("give speech or speech_from, not both", "speech")
    options = _options(form, limits)
    speech = None
    if form.speech is not None or form.speech_from is not None:
        speech = _brought(store, owner, form.speech, form.speech_from, "speech")
    try:
        job = ask(
            store,
            checker,
            owner,
            _brought(store, owner, portrait, form.portrait_from, "portrait"),
            speech,
            options,
            check_quality(form.model_dump()["quality"]),
        )
    except InputError as error:
        raise ApiError(400, str(error), code="unusable") from error
    except QueueFullError as error:
        raise ApiError(429, str(error), kind="rate_limit_error", code="queue_full") from error
    except BusyError as error:
        raise ApiError(429, str(error), kind="rate_limit_error", code="busy") from error
    except EndingError as error:
        raise ApiError(503, str(error), kind="server_error", code="ending") from error
    except FileNotFoundError as error:
        raise ApiError(404, "that video was removed meanwhile", code="not_found") from error
    except NoRoomError as error:
        raise no_room() from error
    except OSError as error:
        raise no_room(reason_of(error)) from error
    return _answer(request, job)


@router.get("/videos", tags=["videos"], responses=_NOT_FOUND)
def list_videos(
    request: Request,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=VIDEO_ID, description="Those that follow this one.")] = None,
    order: Annotated[
        Literal["asc", "desc"], Query(description="By age; desc begins with the newest.")
    ] = "desc",
) -> VideoList:
    """Your videos."""
    store: JobStore = request.app.state.store
    try:
        jobs = store.list(owner, limit=limit + 1, after=after, newest_first=order == "desc")
    except InputError as error:
        raise ApiError(404, str(error), code="not_found", param="after") from error
    data = [_answer(request, job) for job in jobs[:limit]]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(jobs) > limit,
    )


@router.get("/videos/{video_id}", tags=["videos"], responses=_NOT_FOUND)
def retrieve_video(request: Request, job: Asked) -> Video:
    """How far a video is."""
    return _answer(request, job)


@router.delete("/videos/{video_id}", tags=["videos"], responses=_NOT_FOUND)
def delete_video(request: Request, owner: Owner, video_id: VideoPath) -> DeletedVideo:
    """Remove a video and what it was made of; one that is being made is stopped."""
    if not request.app.state.store.delete(owner, video_id):
        raise _unknown()
    return DeletedVideo(id=video_id)


@router.post("/videos/{video_id}/cancel", tags=["videos"], responses=_NOT_FOUND)
def cancel_video(request: Request, owner: Owner, video_id: VideoPath) -> Video:
    """Stop a video within a step; what is finished of it can be fetched. A finished one is left as it is."""
    job = request.app.state.store.cancel(owner, video_id)
    if job is None:
        raise _unknown()
    return _answer(request, job)


@router.get(
    "/videos/{video_id}/content",
    tags=["videos"],
    response_class=FileResponse,
    responses={
        **_NOT_FOUND,
        **_NOT_THERE,
        200: {"content": {**_MP4, "image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"content": _MP4, "description": "The bytes that Range asked for."},
        416: {"description": "Range asks for bytes that are not there."},
    },
)
def download_video(
    job: Asked,
    variant: Annotated[
        Literal["video", "thumbnail"], Query(description="The MP4, or a JPEG of its first frame.")
    ] = "video",
) -> Response:
    """The video, complete, or as far as it was made when it was cancelled."""
    path = job.video if job.is_finished else None
    if path is None:
        what = f"it is {job.state.replace('_', ' ')}" if not job.is_finished else "it has no frame"
        raise ApiError(409, f"this video cannot be fetched: {what}", code="not_there")
    if variant == "thumbnail":
        try:
            return thumbnail_response(path)
        except InputError as error:
            raise ApiError(409, "this video cannot be read", code="not_there") from error
    return video_response(job, path, answer_error(_unknown()))


@router.get(
    "/videos/{video_id}/live",
    tags=["videos"],
    response_class=StreamingResponse,
    responses={
        **_NOT_FOUND,
        **_NOT_THERE,
        429: error_answer("Many watch videos in the making."),
        200: {"content": _MP4},
        206: {"content": _MP4, "description": "Of a finished one, the bytes that Range asked for."},
        416: {"description": "Of a finished one, Range asks for bytes that are not there."},
    },
)
async def watch_video(request: Request, job: Asked) -> Response:
    """The video while it is made: fragmented MP4, from its beginning on, which ends with the video.

    A `<video>` element plays it. It may be asked for at any time, also before the first frame is there. Of a
    video that is finished it is the file, as `content` has it, of which ranges are answered.
    """
    store: JobStore = request.app.state.store
    if job.state == "failed" or (job.is_finished and job.video is None):
        raise ApiError(409, "there is nothing of this video to watch", code="not_there")
    viewers: Viewers = request.app.state.viewers
    try:
        return viewers.live_response(store, job, answer_error(_unknown()))
    except ManyWatchError as error:
        raise ApiError(429, str(error), kind="rate_limit_error", code="busy") from error


async def _listens(request: Request, job: Asked) -> AsyncIterator[None]:
    """One more listens, until his answer has ended. Raises ApiError: too many do already."""
    listeners: Viewers = request.app.state.listeners
    try:
        go = listeners.come(job.owner)
    except ManyWatchError as error:
        raise ApiError(429, str(error), kind="rate_limit_error", code="busy") from error
    try:
        yield
    finally:
        go()


@router.get(
    "/videos/{video_id}/events",
    tags=["videos"],
    response_class=EventSourceResponse,
    responses={**_NOT_FOUND, 429: error_answer("Many watch videos in the making.")},
    dependencies=[Depends(_listens)],
)
async def video_events(request: Request, job: Asked) -> AsyncIterator[ServerSentEvent]:
    """How far a video is, as it changes: events `progress`, at the end `completed`, `failed` or `cancelled`,
    each with the video."""
    said, silent = "", 0.0
    while True:
        answer = await anyio.to_thread.run_sync(_answer, request, job)
        text = answer.model_dump_json()
        if text != said or silent >= _SAY_AGAIN_SECONDS:
            event = job.state if job.is_finished else "progress"
            yield ServerSentEvent(raw_data=text, event=event)
            said, silent = text, 0.0
        if job.is_finished:
            return
        await asyncio.sleep(_EVENT_SECONDS)
        silent += _EVENT_SECONDS
        try:
            job = await anyio.to_thread.run_sync(_job, request, job.owner, job.id)
        except ApiError:
            return  # removed meanwhile


def _options(form: Any, limits: Limits) -> GenerateOptions:
    """What was chosen. Raises ApiError: something cannot be."""
    values = {name: value for name, value in form.model_dump().items() if name in OPTIONS}
    if form.size is not None:
        width, _, height = form.size.partition("x")
        values |= {"width": int(width), "height": int(height)}
    values["duration"] = form.seconds
    try:
        return check_options(values, limits)
    except InputError as error:
        raise ApiError(400, str(error), code="bad_option") from error


def _brought(store: JobStore, owner: str, upload: UploadFile | None, source: str | None, name: str) -> Bring:
    """A file that was sent, or one of an earlier video. Raises ApiError: there is none."""
    if upload is not None:
        sent = upload.file

        def bring(target: FilePath) -> None:
            with target.open("wb") as file:
                shutil.copyfileobj(sent, file, _COPY)

        return bring
    assert source is not None
    job = store.get(owner, source)
    path = None if job is None else (job.portrait if name == "portrait" else job.speech)
    if path is None or not path.exists():
        field = f"{name}_from"
        raise ApiError(404, f"{field}: there is no such video with a {name}", code="not_found", param=field)
    return copied(path)


def _job(request: Request, owner: str, video_id: str) -> Job:
    job: Job | None = request.app.state.store.get(owner, video_id)
    if job is None:
        raise _unknown()
    return job


def _answer(request: Request, job: Job) -> Video:
    state = request.app.state
    return as_video(job, state.store, state.model, state.keep_seconds)


def _unknown() -> ApiError:
    return ApiError(404, "there is no such video", code="not_found", param="video_id")


def _refuse(message: str, param: str) -> NoReturn:
    raise ApiError(400, message, code="bad_request", param=param)
