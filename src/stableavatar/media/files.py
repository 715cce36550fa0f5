"""Opening what the user named: one place that says, in plain words, why a file cannot be read."""

from pathlib import Path

import av
import av.container

from stableavatar.errors import InputError

# What FFmpeg calls files of moving pictures. It decodes texts and stills as videos of one frame as well.
VIDEO_FORMATS = {
    "mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "asf", "flv", "ogg", "mxf",
    "nut", "yuv4mpegpipe", "ivf", "h264", "hevc", "m4v", "rm", "dv", "wtv",
}  # fmt: skip


def check_file(path: str | Path, role: str) -> Path:
    """The absolute path of a file that exists, is a file, may be read and is not empty.

    `role` names what the file is for ("recording", "portrait") in the InputError that is raised otherwise.
    """
    given, path = path, Path(path).expanduser().absolute()
    try:
        if not path.exists():
            raise InputError(f"{role} {given}: there is no such file. Check the path.")
        if path.is_dir():
            raise InputError(f"{role} {given}: this is a folder. Name one file in it.")
        with path.open("rb") as file:
            if path.is_file() and not file.read(1):
                raise InputError(f"{role} {given}: the file is empty (0 bytes). Copy or download it again.")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{role} {given}: cannot be read ({reason}). Check the path and its rights."
        ) from error
    return path


def open_media(path: str | Path, role: str) -> "av.container.InputContainer":
    """Open a sound or video file with FFmpeg; local files only, whatever a playlist inside may say.

    Raises InputError: missing, a folder, empty, unreadable, or nothing that FFmpeg knows.
    """
    absolute = check_file(path, role)
    try:
        return av.open(str(absolute), "r", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise InputError(
            f"{role} {path}: not a sound or video file, or one that is cut off or damaged "
            f"({reason_of(error)}). Check that it plays, or convert it to WAV or MP4."
        ) from error


def reason_of(error: BaseException) -> str:
    """FFmpeg's or the system's own words for an error, without numbers and paths."""
    return str(getattr(error, "strerror", None) or error)
