"""Opening and writing what the user named: one place that says, in plain words, why that cannot be."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import av
import av.container
from av.format import formats_available

from stableavatar.errors import InputError, StorageError

# What FFmpeg calls files of moving pictures. It decodes texts and stills as videos of one frame as well.
VIDEO_FORMATS = {
    "mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "asf", "flv", "ogg", "mxf",
    "nut", "yuv4mpegpipe", "ivf", "h264", "hevc", "m4v", "rm", "dv", "wtv",
}  # fmt: skip
# What FFmpeg reads that names other files, addresses or devices: whoever wrote such a file would have any
# file of this machine read, and spoken, by the one who opens it.
_POINTERS = {
    "hls", "applehttp", "concat", "concatf", "dash", "webm_dash_manifest", "imf", "sdp", "rtsp", "rtp", "sap",
    "image2", "lavfi", "vobsub", "mlv", "avisynth", "vapoursynth", "alsa", "oss", "fbdev", "kmsgrab",
    "video4linux2", "v4l2", "x11grab", "xcbgrab", "pulse", "jack", "sndio", "iec61883", "dshow", "gdigrab",
    "vfwcap", "avfoundation", "openal", "android_camera", "decklink", "libdc1394", "libcdio", "libndi_newtek",
}  # fmt: skip
_FORMATS = ",".join(sorted({name for entry in formats_available for name in entry.split(",")} - _POINTERS))
OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
_ENDS = 2**20  # bytes of either end of a file, by which it is known
_LONGEST_NAME = 255


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
    """Open a sound or video file with FFmpeg, and nothing but this file: no playlist, no list of files.

    Raises InputError: missing, a folder, empty, unreadable, or nothing that FFmpeg knows.
    """
    absolute = check_file(path, role)
    try:
        return av.open(str(absolute), "r", options=OPEN_OPTIONS, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise InputError(
            f"{role} {path}: not a sound or video file, or one that is cut off or damaged "
            f"({reason_of(error)}). Check that it plays, or convert it to WAV or MP4."
        ) from error


def reason_of(error: BaseException) -> str:
    """FFmpeg's or the system's own words for an error, without numbers and paths."""
    return str(getattr(error, "strerror", None) or error)


def check_output(path: str | Path) -> Path:
    """The absolute path of an MP4 that can be written; to be called before long work begins.

    Raises InputError: the name does not end in .mp4, its folder is missing or cannot be written, or it is a
    folder itself.
    """
    absolute = Path(path).expanduser().absolute()
    if absolute.is_dir():
        raise InputError(
            f"output {path}: this is a folder. Name a file in it, such as {Path(path) / 'out.mp4'}."
        )
    if absolute.suffix.lower() != ".mp4":
        raise InputError(f"output {path}: only MP4 is written. Let the name end in .mp4.")
    check_parent(absolute, path)
    return absolute


def check_frames_folder(path: str | Path) -> Path:
    """The absolute path of a folder that pictures can be written to; to be called before long work begins.

    Raises InputError: its parent is missing or cannot be written, or it is a file, or not empty.
    """
    absolute = Path(path).expanduser().absolute()
    check_parent(absolute, path)
    if absolute.exists() and not absolute.is_dir():
        raise InputError(f"output {path}: there is a file of this name. Name a folder for the frames.")
    if absolute.is_dir() and any(absolute.iterdir()):
        raise InputError(f"output {path}: this folder is not empty. Name a new or an empty one.")
    return absolute


def check_parent(absolute: Path, given: str | Path) -> None:
    """Raise InputError, which names `given`, unless the folder of a path is there and can be written."""
    folder = absolute.parent
    if not folder.is_dir():
        raise InputError(f"output {given}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"output {given}: the folder {folder} cannot be written. Choose another one.")


def check_folder(path: Path) -> None:
    """Make a folder, unless it is there, and see that it can be written.

    Raises InputError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {path}: the folder cannot be made ({reason_of(error)})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"output {path}: the folder cannot be written. Choose another one.")


def partial_name(stem: str, suffix: str) -> str:
    """`.STEM.PROCESS.SUFFIX`: two programs may write to one output at a time."""
    return hidden_name(stem, f"{os.getpid()}.{suffix}")


def hidden_name(stem: str, suffix: str) -> str:
    """`.STEM.SUFFIX`, see `shortened`."""
    return shortened(f".{stem}", f".{suffix}")


def shortened(stem: str, ending: str) -> str:
    """A name of both; the stem is shortened where it would be longer than file systems allow."""
    room = _LONGEST_NAME - len(os.fsencode(ending))
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return stem + ending


def refuse_source(output: Path, source: Path, role: str = "recording") -> None:
    """Raise InputError where an output is the very file that it is made of, whose `role` the text names."""
    try:
        same = output.samefile(source)
    except (OSError, ValueError):  # one of them is not there
        return
    if same:
        raise InputError(f"output {output}: is the {role} itself. Choose another name.")


def file_fingerprint(path: Path) -> str:
    """Of a file's size, beginning and end, by which it is known again without reading all of it.

    Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(size - _ENDS, 0))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()


def locked(path: Path) -> IO[bytes]:
    """An open file that no other process has locked. Raises BlockingIOError where one has; where the disk
    knows no locks, two runs may disturb each other."""
    file = path.open("ab")
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                return file
            file.close()
            raise
    return file


def unlock(file: IO[bytes]) -> None:
    """Let others lock it, also where a process that was started meanwhile has it open still."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def to_disk(path: Path) -> None:
    """Wait until what a file or a folder holds is on the disk (of a folder: its names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(target: Path, *, alone: bool = False, durable: bool = True) -> Iterator[Path]:
    """A name beside a file or a folder to write it under; afterwards it is complete under its own, and on the
    disk, or not there. What had the name before has it until then.

    Args:
        alone: nobody else writes this one, so what a killed process left of it can be removed.
        durable: False: a power cut may take it; for many files that can be made again.

    Raises:
        OSError: of the disk, beside what the body raises.
    """
    partial, previous = (
        target.with_name(hidden_name(target.name, end) if alone else partial_name(target.name, end))
        for end in ("partial", "previous")
    )
    _put_back(previous, target)
    remove(partial)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial) if durable else ():
            to_disk(path)
        if target.is_dir() or (target.exists() and partial.is_dir()):  # a file takes a file's place at once
            target.rename(previous)
        partial.replace(target)
        if durable:
            to_disk(target.parent)
    finally:
        if previous.exists() and not target.exists():
            previous.rename(target)
        for left in (previous, partial):  # somebody may have it open; what was written is there all the same
            with contextlib.suppress(OSError):
                remove(left)


def _put_back(previous: Path, target: Path) -> None:
    if previous.exists() and not target.exists():
        previous.rename(target)
    remove(previous)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file that is complete under its name, and on the disk, or not there.

    Raises OSError.
    """
    partial = path.with_name(partial_name(path.name, "partial"))
    try:
        partial.write_bytes(content)
        to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: BaseException) -> StorageError:
    """What to say of an output that could not be written."""
    if getattr(error, "errno", None) == errno.EPIPE:
        return StorageError(f"output {path}: cannot be written on, its reader has ended.")
    return StorageError(
        f"output {path}: cannot be written ({reason_of(error)}). Make room, or choose another folder."
    )
