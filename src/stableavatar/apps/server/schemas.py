"""What is sent and what is answered, with the names that OpenAI's videos API has where it has any."""

import sqlite3
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fastapi import UploadFile
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, create_model

from stableavatar.jobs.intake import OPTIONS, ORDERS
from stableavatar.jobs.job import Job, State
from stableavatar.jobs.store import JobStore
from stableavatar.options import GenerateOptions, OutputOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

VIDEO_ID = r"^video_[0-9a-f]{24}$"


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP. message: a sentence. code: a word for programs. param: the field that is to blame.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def no_room(reason: str = "there is too little room left") -> ApiError:
    """That what was sent cannot be kept."""
    return ApiError(507, f"the server cannot keep this ({reason})", kind="server_error", code="no_room")


def fault(error: BaseException) -> ApiError:
    """What nobody foresaw, as it is answered."""
    if isinstance(error, sqlite3.Error):
        words, status, code = "the server's table of videos cannot be used now", 503, "no_table"
    else:
        words, status, code = "the server has met a fault of its own; its log says more", 500, "fault"
    return ApiError(status, words, kind="server_error", code=code)


# Seconds until another try may be taken.
RETRY_AFTER = {429: "5", 503: "5", 507: "60"}


def answer_error(error: ApiError) -> JSONResponse:
    """What is sent of an error."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in RETRY_AFTER:
        headers["Retry-After"] = RETRY_AFTER[error.status]
    return JSONResponse(error.body.model_dump(), error.status, headers=headers)


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str = Field(description="A sentence for people: what was wrong, and what to do.")
    type: str
    param: str | None = Field(None, description="The field that is to blame.")
    code: str | None = Field(None, description="A word for programs.")


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


def error_answer(description: str) -> dict[str, Any]:
    """How an error is described in the OpenAPI document, also where the answer is no JSON otherwise."""
    schema = {"$ref": "#/components/schemas/ErrorBody"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


class Step(BaseModel):
    """How far a video is."""

    step: int
    steps: int
    window: int
    windows: int | None
    frame: int
    frames: int | None
    share: float | None
    seconds_left: float | None


class Failure(BaseModel):
    """Why a video could not be made."""

    code: str
    message: str


class Video(BaseModel):
    """A video: one that was asked for, is being made, or is there."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: State
    progress: int = Field(ge=0, le=100, description="Percent of the work.")
    created_at: int = Field(description="Seconds since 1970.")
    started_at: int | None
    completed_at: int | None = Field(description="When it was completed, failed or was cancelled.")
    expires_at: int | None = Field(description="When the server will remove it.")
    prompt: str
    size: str | None = Field(description="Width x height; null until that is known.")
    seconds: str | None = Field(description="Its length.")
    error: Failure | None
    queue_position: int | None = Field(description="How many videos are to be made before; null once begun.")
    step: Step | None = Field(description="How far it is, in detail.")
    options: dict[str, Any] = Field(
        description="What was asked for; of a completed one, everything that repeats it."
    )


class VideoList(BaseModel):
    """Some of your videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """What was removed."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    """A model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "stableavatar"


class ModelList(BaseModel):
    """The models of this server."""

    object: Literal["list"] = "list"
    data: list[Model]


class VideoParts(BaseModel):
    """What a video is made of, where nothing is sent: portrait and speech of videos that are there."""

    model_config = ConfigDict(extra="forbid", title="VideoRequestWithoutFiles")

    model: str | None = Field(None, max_length=200, description="The server's model; by default that one.")
    portrait_from: str | None = Field(None, pattern=VIDEO_ID, description="A video of yours: its portrait.")
    speech_from: str | None = Field(None, pattern=VIDEO_ID, description="A video of yours: its speech.")
    size: str | None = Field(
        None,
        pattern=r"^[0-9]{1,5}x[0-9]{1,5}$",
        description="Width x height in pixels, multiples of 16; by default the trained size nearest to the "
        "portrait's shape.",
    )
    seconds: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Length of the video; by default the speech's."
    )


class VideoFiles(VideoParts):
    """What a video is made of: a portrait and its speech, each sent, or taken of a video that is there."""

    model_config = ConfigDict(extra="forbid", title="VideoRequest")

    portrait: UploadFile | None = Field(None, description="A picture of the person.")
    input_reference: UploadFile | None = Field(None, description="The same, by the name OpenAI's API has.")
    speech: UploadFile | None = Field(
        None, description="What is said: a recording. Without one the video is silent, and needs seconds."
    )


def _request_fields() -> dict[str, Any]:
    """Fields for the options of `GenerateOptions` that a request may choose, with its checks and help."""
    hints = get_type_hints(GenerateOptions)
    made: dict[str, Any] = {}
    for field in fields(GenerateOptions):
        if field.name in OPTIONS and field.name not in ("width", "height", "duration"):
            hint = Literal[ORDERS] if field.name == "order" else hints[field.name]
            made[field.name] = (hint, _described(field.default, field.metadata))
    quality = next(field for field in fields(OutputOptions) if field.name == "quality")
    made["quality"] = (int, _described(quality.default, quality.metadata))
    return made


def _session_fields() -> dict[str, Any]:
    """The same, of what is spoken now: it begins when it comes, in one order alone, and nobody knows yet how
    loud all of it will be."""
    of_recordings = ("start", "order", "speech_normalisation")
    made = {name: entry for name, entry in _request_fields().items() if name not in of_recordings}
    size = VideoParts.model_fields["size"]
    return {**made, "size": (size.annotation, size)}


def _described(default: Any, metadata: "Mapping[str, Any]") -> Any:
    checks = {"minimum": "ge", "maximum": "le", "above": "gt"}
    bounds = {checks[name]: value for name, value in metadata.items() if name in checks}
    if isinstance(default, float) or "ge" in bounds or "gt" in bounds:
        bounds.setdefault("le", 2**63 - 1)
    return Field(default, description=metadata["help"], **bounds)


if TYPE_CHECKING:
    VideoRequest = VideoFiles
    VideoRequestWithoutFiles = VideoParts
else:
    VideoRequest = create_model("VideoRequest", __base__=VideoFiles, **_request_fields())
    VideoRequestWithoutFiles = create_model(
        "VideoRequestWithoutFiles", __base__=VideoParts, **_request_fields()
    )


class ChosenNow(BaseModel):
    """Options of a session; see `VideoRequest`."""

    model_config = ConfigDict(extra="forbid", title="SessionOptions")


if TYPE_CHECKING:
    SessionOptions = ChosenNow
else:
    SessionOptions = create_model("SessionOptions", __base__=ChosenNow, **_session_fields())


def as_video(job: Job, store: JobStore, model: str, keep_seconds: float | None) -> Video:
    """A job as it is answered."""
    made = job.result or {}
    options = {**job.options, **{name: value for name, value in made.items() if value is not None}}
    width, height = options.get("width"), options.get("height")
    share = 1.0 if job.state == "completed" else (job.progress or {}).get("share") or 0.0
    seconds = job.details.get("seconds")
    return Video(
        id=job.id,
        model=model,
        status=job.state,
        progress=int(100 * share),
        created_at=int(job.created),
        started_at=None if job.started is None else int(job.started),
        completed_at=None if job.finished is None else int(job.finished),
        expires_at=None if job.finished is None or not keep_seconds else int(job.finished + keep_seconds),
        prompt=str(job.options.get("prompt", "")),
        size=f"{width}x{height}" if width and height else None,
        seconds=None if seconds is None else f"{seconds:.2f}",
        error=None if job.error is None else Failure(code="generation_failed", message=job.error),
        queue_position=store.position(job) if job.state == "queued" and job.started is None else None,
        step=None if job.progress is None or job.is_finished else Step(**job.progress),
        options={name: value for name, value in options.items() if name not in _PRIVATE},
    )


# Of a result's settings: where the server has its files.
_PRIVATE = ("model", "lora", "decoder_device")
