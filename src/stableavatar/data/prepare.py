"""A folder of raw videos into clip folders for training.

    raw video -> frames at 25 a second -> stretches: one shot, one face, a still background
              -> clips: cut to a trained shape, with sound, masks and prompt -> path lists and a report

Every video is looked at in one pass and written in a second one, frame by frame. What became of it is kept
in `prepare.jsonl`, so that a run that was stopped goes on with the next video, and another run does only what
is new.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stableavatar.data.clips import PROMPTS, SHAPES, Shape, folders_below
from stableavatar.data.landmarks import FaceLandmarker, face_mask, lip_mask
from stableavatar.data.prepare_report import places, report, thumbnail
from stableavatar.data.prepare_state import THUMBNAILS, PrepareState
from stableavatar.data.stretches import (
    FPS,
    Last,
    PassingError,
    PrepareSettings,
    Stretch,
    find_stretches,
    judge,
    refuse_passing,
)
from stableavatar.errors import InputError, StorageError
from stableavatar.lifetimes import end_with_parent
from stableavatar.media.audio import SPEECH_RATE, Sound, SoundTape
from stableavatar.media.files import cannot_write, locked, write_file
from stableavatar.media.image import fit_picture
from stableavatar.media.reading import Frame, read_frames_at
from stableavatar.media.video import VideoWriter
from stableavatar.media.wav import write_wav

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]

VIDEO_SUFFIXES = {
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv",
    ".asf", ".3gp", ".3g2", ".mxf", ".ogv", ".vob", ".qt",
}  # fmt: skip
REPORT = "report.html"


def shape_of(width: int, height: int) -> Shape:
    """The trained shape that is nearest to a picture's."""

    def misfit(shape: Shape) -> float:
        ratio = SHAPES[shape][0] / SHAPES[shape][1] / (width / height)
        return max(ratio, 1 / ratio)

    return min(SHAPES, key=misfit)


@dataclass(frozen=True)
class Sounds:
    """A video's sound as a file holds it, and as the model hears it; each in one pass."""

    tape: SoundTape
    channels: int
    speech: SoundTape

    @classmethod
    def open(cls, video: Path) -> "Sounds":
        """Raises InputError: there is no sound."""
        plain = Sound(video)
        tape = SoundTape(video, plain.sample_rate, "mono" if plain.channels == 1 else "stereo")
        return cls(tape, plain.channels, SoundTape(video, SPEECH_RATE))

    def sound(self, start: float, seconds: float) -> Sound:
        """A stretch for a file."""
        return Sound.from_blocks(
            lambda: self.tape.stretch(start, seconds), self.tape.sample_rate, self.channels
        )


def write_clip(
    stretch: Stretch,
    frames: Iterator[Frame],
    folder: Path,
    landmarker: FaceLandmarker,
    sounds: Sounds,
    settings: PrepareSettings,
) -> Shape:
    """Write a stretch as a clip folder.

    Args:
        frames, sounds: those of the stretch come next.

    Raises:
        InputError: in the cut picture a frame shows no face; or it cannot be written.
    """
    for name in ("images", "face_masks", "lip_masks"):
        (folder / name).mkdir(parents=True)
    first = next(frames)
    shape = shape_of(first.shape[1], first.shape[0])
    size = SHAPES[shape]
    focus = _focus(stretch.centre, first.shape[1], first.shape[0], *size)
    start, seconds = float(stretch.start / FPS), stretch.seconds
    cut = Last(_cut(first, frames, size, focus))
    with VideoWriter(folder / "sub_clip.mp4", *size, FPS, sound=sounds.sound(start, seconds)) as writer:
        for number, points in enumerate(landmarker.track(cut)):
            if points is None:
                raise InputError(f"no face in the cut picture at {start + float(number / FPS):.1f} s")
            writer.write(cut.item)
            name = f"frame_{number}.png"
            Image.fromarray(cut.item).save(folder / "images" / name, compress_level=3)
            Image.fromarray(face_mask(points, size)).save(folder / "face_masks" / name)
            Image.fromarray(lip_mask(points, size)).save(folder / "lip_masks" / name)
    write_wav(folder / "audio.wav", sounds.speech.stretch(start, seconds), SPEECH_RATE, 1)
    (folder / "prompt.txt").write_text(settings.prompt or PROMPTS[settings.kind], encoding="utf-8")
    return shape


def prepare_video(video: Path, work: Path, settings: PrepareSettings) -> list[dict[str, Any]]:
    """One video into numbered clip folders in `work`; what became of each of its stretches, as JSON holds it.

    A video that cannot be read is a stretch with that reason.

    Raises:
        StorageError: something cannot be written, for which the video is not to blame.
        PassingError: the video could not be read just now.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    landmarker = FaceLandmarker()
    try:
        heard = SoundTape(video, SPEECH_RATE)
        stretches = [judge(it, heard, settings) for it in find_stretches(video, landmarker, settings)]
        results: dict[int, dict[str, Any]] = {}
        sounds = Sounds.open(video) if any(it.reason is None for it in stretches) else None
        frames = read_frames_at(video, FPS)
        for number, stretch in enumerate(stretches):
            folder = work / str(number)
            if stretch.start == stretch.stop:  # of what cannot be read there is nothing to be shown
                continue
            part = _between(frames, stretch)
            if stretch.reason is not None or sounds is None:
                results[stretch.start] = _dropped(part, stretch)
                continue
            try:
                shape = write_clip(stretch, part, folder, landmarker, sounds, settings)
                results[stretch.start] = {
                    "work": str(folder),
                    "shape": shape,
                    "thumbnails": [
                        thumbnail(np.asarray(Image.open(folder / "images" / f"frame_{place}.png")))
                        for place in places(stretch.stop - stretch.start)
                    ],
                }
            except StorageError:
                raise
            except InputError as error:
                refuse_passing(error)
                shutil.rmtree(folder, ignore_errors=True)
                stretch.reason = str(error)
                results[stretch.start] = _dropped(part, stretch)
        frames.close()
    except StorageError:
        raise
    except InputError as error:
        refuse_passing(error)
        return [asdict(Stretch(0, 0, str(error)))]
    return [{**asdict(it), **results.get(it.start, {})} for it in stretches]


def _dropped(part: Iterator[Frame], stretch: Stretch) -> dict[str, Any]:
    """A picture out of the middle of what is not kept, or of what is left of it; small, as there may be many
    such stretches. All of the part is read, so that the next one can be looked for."""
    middle = (stretch.stop - stretch.start) // 2
    shown: Frame | None = None
    for number, frame in enumerate(part):
        if shown is None or number == middle:
            shown = frame
    return {} if shown is None else {"thumbnails": [thumbnail(shown, 96)]}


def prepare(
    raw: Path, data: Path, settings: PrepareSettings, *, workers: int = 1, tell: Tell = logger.info
) -> dict[str, int]:
    """Prepare every video below a folder; how many clips were kept, and how many stretches were not.

    Args:
        raw: searched for videos, sub-folders included. data: gets the layout of `data.clips`, the lists
            `video_SHAPE_path.txt`, `report.html` with `report_pictures`, and `prepare.jsonl`.
        workers: processes, a video each. tell: gets a line a video.

    Raises:
        InputError: there is no video, the data folder belongs to other settings or cannot be written.
    """
    if not raw.is_dir():
        raise InputError(f"{raw}: there is no such folder")
    if data.exists() and not data.is_dir():
        raise InputError(f"{data}: is a file: name a folder for the clips")
    data = data.absolute()
    own = data.resolve()
    paths = (folder / name for folder, names in folders_below(raw) for name in names)
    files = sorted(path for path in paths if _is_file(path) and own not in path.resolve().parents)
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise InputError(f"{raw}: holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    if len(videos) < len(files):
        left = Counter(path.suffix or path.name for path in set(files) - set(videos))
        names = ", ".join(name for name, _ in left.most_common(_NAMES_TOLD))
        more = ", ..." if len(left) > _NAMES_TOLD else ""
        tell(f"left out, no videos by their names: {left.total()} ({names}{more})")
    FaceLandmarker()  # what is missing should be said before the work begins
    try:
        data.mkdir(parents=True, exist_ok=True)
        with _alone(data):
            return _prepare(raw, data, videos, settings, workers, tell)
    except OSError as error:
        raise cannot_write(data, error) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # of a folder that may be listed, but not looked into
        return path.suffix.lower() in VIDEO_SUFFIXES


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Raises InputError where another run prepares into this folder."""
    try:
        file = locked(data / ".prepare.lock")
    except BlockingIOError as error:
        raise InputError(f"{data}: another run prepares into this folder: wait for its end") from error
    with file:
        yield


def _prepare(
    raw: Path, data: Path, videos: Sequence[Path], settings: PrepareSettings, workers: int, tell: Tell
) -> dict[str, int]:
    state = PrepareState.open(data, settings)
    work = data / ".prepare"
    waiting = state.take(videos)
    if len(waiting) < len(videos):
        tell(f"{len(videos) - len(waiting)} of {len(videos)} videos were prepared before, or are copies")
    jobs = ((video, work / _digest(video, raw), settings) for video in waiting)
    alive = False
    with contextlib.closing(_in_workers(jobs, workers)) as results:
        for number, ((video, place, _), result) in enumerate(results, 1):
            # A process that comes to a video makes its folder first: one that is killed later is the video's.
            alive = alive or place.exists() or not isinstance(result.exception(), BrokenProcessPool)
            if number == _LOST_AT_MOST and not alive:
                raise InputError(
                    "every process that was to prepare a video was killed at once, perhaps for want of "
                    "memory (--workers); from Python, begin it below: if __name__ == '__main__'"
                )
            entry, settled = _result(result)
            entry = state.add(video, entry, settled=settled)
            kept = sum(it["reason"] is None for it in entry)
            name = os.fsencode(video).decode(errors="replace")
            tell(f"{number}/{len(waiting)} {name}: {kept} clips, {len(entry) - kept} stretches dropped")
    shutil.rmtree(work, ignore_errors=True)
    state.write_lists()
    write_file(data / REPORT, report(state.videos, FPS, THUMBNAILS).encode(errors="replace"))
    return state.counts()


_NAMES_TOLD = 10
_LOST_AT_MOST = 3  # processes, one after another and before any has done its work
_Job = tuple[Path, Path, PrepareSettings]
_Made = list[dict[str, Any]]


_Results = Generator[tuple[_Job, "Future[_Made]"], None, list[_Job]]


def _in_workers(jobs: Iterator[_Job], workers: int) -> Generator[tuple[_Job, "Future[_Made]"], None, None]:
    """Results as they come.

    A worker that is killed, for want of memory or by a file that brings its decoder down, takes the others'
    work with it. What was going on is then done once more, one after another: only what is killed then too
    ends as that.
    """
    while torn := (yield from _in_pool(jobs, workers)):
        for job in torn:
            for again in (yield from _in_pool(iter([job]), 1)):
                killed: Future[_Made] = Future()
                killed.set_exception(BrokenProcessPool())
                yield again, killed


def _in_pool(jobs: Iterator[_Job], workers: int) -> _Results:
    """Results as they come, until there are no more jobs, or a worker was killed; the jobs that this tore.

    No more jobs are begun than there are workers, and where the caller leaves, by Ctrl-C or an error, and
    closes this, what runs is ended: it would be done again anyway.
    """
    others = set(active_children())
    # Each worker has a thread: the networks are small, and there are as many videos as one likes.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)
    running: dict[Future[_Made], _Job] = {}
    try:
        while True:
            for job in islice(jobs, workers - len(running)):
                try:
                    running[pool.submit(prepare_video, *job)] = job
                except BrokenProcessPool:
                    return [*running.values(), job]
            if not running:
                return []
            for result in wait(running, return_when=FIRST_COMPLETED).done:
                if isinstance(result.exception(), BrokenProcessPool):
                    return list(running.values())
                yield running.pop(result), result
    except BaseException:
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _result(job: "Future[_Made]") -> tuple[_Made, bool]:
    """What became of a video, and whether that is the video's own doing: one that brings its worker to an
    error of another kind is left out with that, and tried again another time."""
    try:
        return job.result(), True
    except PassingError as error:
        return [asdict(Stretch(0, 0, f"{error}; another run tries again"))], False
    except BrokenProcessPool:
        reason = "its worker was killed, perhaps for want of memory; another run tries again"
        return [asdict(Stretch(0, 0, reason))], False
    except (OSError, StorageError):
        raise
    except Exception as error:
        logger.exception("a video cannot be prepared")
        return [asdict(Stretch(0, 0, f"{type(error).__name__}: {error}"))], False


def _cut(
    first: Frame, frames: Iterator[Frame], size: tuple[int, int], focus: tuple[float, float]
) -> Iterator[Frame]:
    yield fit_picture(first, *size, "crop", focus)
    for frame in frames:
        yield fit_picture(frame, *size, "crop", focus)


def _between(frames: Iterator[tuple[int, Frame]], stretch: Stretch) -> Iterator[Frame]:
    """The frames of a stretch; those before it are left out."""
    for number, frame in frames:
        if number >= stretch.start:
            yield frame
        if number + 1 >= stretch.stop:
            return


def _focus(
    centre: tuple[float, float], source_width: int, source_height: int, width: int, height: int
) -> tuple[float, float]:
    """Where `fit_picture` has to cut for the face to be in the middle, and in the upper half."""
    scale = max(width / source_width, height / source_height)
    spare_x, spare_y = source_width - width / scale, source_height - height / scale
    left = centre[0] * source_width - width / scale / 2
    top = centre[1] * source_height - 0.45 * height / scale
    return (
        float(np.clip(left / spare_x, 0, 1)) if spare_x > 1e-6 else 0.5,
        float(np.clip(top / spare_y, 0, 1)) if spare_y > 1e-6 else 0.5,
    )


def _digest(video: Path, raw: Path) -> str:
    return hashlib.sha256(os.fsencode(video.relative_to(raw))).hexdigest()[:16]
