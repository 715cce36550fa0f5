"""A folder of raw videos into clip folders for training.

    raw video -> frames at 25 a second -> stretches: one shot, one face, a still background
              -> clips: cut to a trained shape, with sound, masks and prompt -> path lists and a report

Every video is looked at in one pass and written in a second one, frame by frame. What became of it is kept
in `prepare.json`, so that a run that was stopped goes on with the next video, and another run does only what
is new.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stableavatar.data.clips import PROMPTS
from stableavatar.data.landmarks import FaceLandmarker, Points, face_mask, lip_mask
from stableavatar.data.prepare_report import report, thumbnails
from stableavatar.errors import InputError
from stableavatar.media.audio import SPEECH_RATE, Sound, Speech
from stableavatar.media.files import cannot_write, write_file
from stableavatar.media.image import fit_picture
from stableavatar.media.reading import Frame, read_frames_at
from stableavatar.media.video import VideoWriter
from stableavatar.media.wav import write_wav

logger = logging.getLogger(__name__)

Kind = Literal["speech", "singing", "dancing"]
Shape = Literal["square", "rec", "vec"]
Tell = Callable[[str], None]
Item = TypeVar("Item")

FPS = Fraction(25)
# Width and height of the trained shapes.
SIZES: Mapping[Shape, tuple[int, int]] = {"square": (512, 512), "rec": (832, 480), "vec": (480, 832)}
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv"}
STATE = "prepare.json"
REPORT = "report.html"

_SMALL = (64, 36)  # what shots and backgrounds are compared at
_CUT = 24.0  # of 255: mean difference of two neighbouring frames of which the second begins another shot
_CUT_RATIO = 4.0  # and so many times as large as differences before it
_FACES_EVERY = 12  # frames between looks for further faces
_OTHER_FACE = 0.5  # of the largest one's size: a smaller face is somebody in the background
_SILENT = 1e-3  # root mean square of a stretch without sound


@dataclass(frozen=True)
class PrepareSettings:
    """What is kept of raw videos.

    Attributes:
        kind: of all of them; it says the prompt, unless `prompt` does.
        least_seconds, most_seconds: of a clip; longer stretches are cut into several.
        least_face: height of the face, in heights of the clip.
        most_motion: of the background: mean difference, of 255, from the stretch's first frame.
    """

    kind: Kind = "speech"
    prompt: str | None = None
    least_seconds: float = 3.24
    most_seconds: float = 20.0
    least_face: float = 0.08
    most_motion: float = 12.0

    def __post_init__(self) -> None:
        if self.kind not in PROMPTS:
            raise InputError(f"kind {self.kind!r} is not known: choose one of {', '.join(PROMPTS)}")
        if not 0.2 <= self.least_seconds <= self.most_seconds:
            raise InputError(
                f"clips of {self.least_seconds} to {self.most_seconds} s are not possible: at least 0.2, and "
                "the longest not below the shortest"
            )


@dataclass
class Stretch:
    """Frames `start` to `stop` of a video, and why they are not kept, if they are not.

    `centre` is the middle of the face in widths and heights of the picture, `face` its height in those.
    """

    start: int
    stop: int
    reason: str | None = None
    centre: tuple[float, float] = (0.5, 0.4)
    face: float = 0.0

    @property
    def seconds(self) -> float:
        """Its length."""
        return float((self.stop - self.start) / FPS)


@dataclass
class _Run:
    """A stretch while it goes on."""

    start: int
    first: NDArray[np.float32]  # small picture of its first frame
    centres: NDArray[np.float32] = field(default_factory=lambda: np.zeros(2, np.float32))
    heights: float = 0.0
    count: int = 0
    motion: float = 0.0

    def take(self, small: NDArray[np.float32], points: Points, width: int, height: int) -> None:
        """The next frame."""
        low, high = points.min(axis=0), points.max(axis=0)
        self.centres += (low + high) / 2 / np.array([width, height], np.float32)
        self.heights += float(high[1] - low[1]) / height
        self.count += 1
        still = _background(points, width, height)
        if still.any():
            moved = np.abs(small - self.first).mean(axis=2)[still]
            self.motion = max(self.motion, float(moved.mean()))

    def ended(self, stop: int, settings: PrepareSettings) -> Stretch:
        """What has become of it."""
        x, y = (float(value) for value in self.centres / self.count)
        moves = self.motion > settings.most_motion
        reason = f"the background moves (by {self.motion:.0f} of 255)" if moves else None
        return Stretch(self.start, stop, reason, (x, y), self.heights / self.count)


def find_stretches(video: Path, landmarker: FaceLandmarker, settings: PrepareSettings) -> Iterator[Stretch]:
    """The stretches of a video in order, kept ones and others.

    Raises:
        InputError: the video cannot be read.
    """
    frames = _Last(read_frames_at(video, FPS))
    run: _Run | None = None
    bad: Stretch | None = None
    several = False
    last = None
    usual = 0.0
    longest = int(settings.most_seconds * FPS)
    number = -1
    for points in landmarker.track(frame for _, frame in frames):
        number, frame = frames.item
        height, width = frame.shape[:2]
        small = _small(frame)
        change = 0.0 if last is None else float(np.abs(small - last).mean())
        cut = last is not None and change > _CUT and change > _CUT_RATIO * usual
        usual = change if cut or last is None else 0.9 * usual + 0.1 * change
        last = small
        if cut or number % _FACES_EVERY == 0:
            several = _faces(landmarker, frame) > 1
        reason = "no face" if points is None else "more than one face" if several else None
        if run is not None and (cut or reason is not None or number - run.start >= longest):
            yield run.ended(number, settings)
            run = None
        if bad is not None and bad.reason != reason:
            yield replace(bad, stop=number)
            bad = None
        if points is None or reason is not None:
            bad = bad or Stretch(number, number, reason)
            continue
        if run is None:
            run = _Run(number, small)
        run.take(small, points, width, height)
    if run is not None:
        yield run.ended(number + 1, settings)
    if bad is not None:
        yield replace(bad, stop=number + 1)


def judge(stretch: Stretch, video: Path, settings: PrepareSettings) -> Stretch:
    """With the reason why it is not kept, where there is one that only the whole stretch tells."""
    if stretch.reason is not None:
        return stretch
    if stretch.seconds < settings.least_seconds:
        return replace(stretch, reason=f"only {stretch.seconds:.1f} s")
    if stretch.face < settings.least_face:
        return replace(stretch, reason=f"the face is small ({stretch.face:.0%} of the height)")
    try:
        with Speech.open(video, start=float(stretch.start / FPS), duration=stretch.seconds) as speech:
            samples = speech.samples(0, len(speech))
    except InputError as error:
        return replace(stretch, reason=f"no sound ({error})")
    if not len(samples) or float(np.sqrt(np.square(samples).mean())) < _SILENT:
        return replace(stretch, reason="silent")
    return stretch


def shape_of(width: int, height: int) -> Shape:
    """The trained shape that is nearest to a picture's."""

    def misfit(shape: Shape) -> float:
        ratio = SIZES[shape][0] / SIZES[shape][1] / (width / height)
        return max(ratio, 1 / ratio)

    return min(SIZES, key=misfit)


def write_clip(
    video: Path,
    stretch: Stretch,
    frames: Iterator[Frame],
    folder: Path,
    landmarker: FaceLandmarker,
    settings: PrepareSettings,
) -> Shape:
    """Write a stretch as a clip folder.

    Args:
        frames: those of the stretch.

    Raises:
        InputError: in the cut picture a frame shows no face; or it cannot be written.
    """
    for name in ("images", "face_masks", "lip_masks"):
        (folder / name).mkdir(parents=True)
    first = next(frames)
    shape = shape_of(first.shape[1], first.shape[0])
    size = SIZES[shape]
    focus = _focus(stretch.centre, first.shape[1], first.shape[0], *size)
    start, seconds = float(stretch.start / FPS), stretch.seconds
    cut = _Last(_cut(first, frames, size, focus))
    with VideoWriter(folder / "sub_clip.mp4", *size, FPS, sound=Sound(video, start, seconds)) as writer:
        for number, points in enumerate(landmarker.track(cut)):
            if points is None:
                raise InputError(f"no face in the cut picture at {start + float(number / FPS):.1f} s")
            writer.write(cut.item)
            name = f"frame_{number}.png"
            Image.fromarray(cut.item).save(folder / "images" / name, compress_level=3)
            Image.fromarray(face_mask(points, size)).save(folder / "face_masks" / name)
            Image.fromarray(lip_mask(points, size)).save(folder / "lip_masks" / name)
    with Speech.open(video, start=start, duration=seconds) as speech:
        write_wav(folder / "audio.wav", (block[:, None] for block in speech.blocks(1 << 16)), SPEECH_RATE, 1)
    (folder / "prompt.txt").write_text(settings.prompt or PROMPTS[settings.kind], encoding="utf-8")
    return shape


def prepare_video(video: Path, work: Path, settings: PrepareSettings) -> list[dict[str, Any]]:
    """One video into numbered clip folders in `work`; what became of each of its stretches, as JSON holds it.

    A video that cannot be read is a stretch with that reason.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    landmarker = FaceLandmarker()
    try:
        stretches = [judge(it, video, settings) for it in find_stretches(video, landmarker, settings)]
        kept = [it for it in stretches if it.reason is None]
        results: dict[int, dict[str, Any]] = {}
        frames = read_frames_at(video, FPS)
        for number, stretch in enumerate(kept):
            folder = work / str(number)
            part = _between(frames, stretch)
            try:
                shape = write_clip(video, stretch, part, folder, landmarker, settings)
                results[stretch.start] = {
                    "work": str(folder),
                    "shape": shape,
                    "thumbnails": thumbnails(folder),
                }
            except InputError as error:
                shutil.rmtree(folder, ignore_errors=True)
                stretch.reason = str(error)
                for _ in part:  # up to its end, where the next one is looked for
                    pass
        frames.close()
    except InputError as error:
        return [asdict(Stretch(0, 0, str(error)))]
    return [{**asdict(it), **results.get(it.start, {})} for it in stretches]


def prepare(
    raw: Path, data: Path, settings: PrepareSettings, *, workers: int = 1, tell: Tell = logger.info
) -> dict[str, int]:
    """Prepare every video below a folder; how many clips were kept, and how many stretches were not.

    Args:
        raw: searched for videos, sub-folders included. data: gets the layout of `data.clips`, the lists
            `video_SHAPE_path.txt`, `report.html` and `prepare.json`.
        workers: processes, a video each. tell: gets a line a video.

    Raises:
        InputError: there is no video, the data folder belongs to other settings or cannot be written.
    """
    videos = sorted(path for path in raw.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise InputError(f"{raw}: holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    data = data.absolute()
    FaceLandmarker()  # what is missing should be said before the work begins
    try:
        data.mkdir(parents=True, exist_ok=True)
        state = _State.open(data, settings)
        work = data / ".prepare"
        waiting = [video for video in videos if not state.has(video, raw)]
        if len(waiting) < len(videos):
            tell(f"{len(videos) - len(waiting)} of {len(videos)} videos were prepared before")
        # Each worker has a thread: the networks are small, and there are as many videos as one likes.
        pool = ProcessPoolExecutor(workers, get_context("spawn"))
        try:
            jobs = {
                pool.submit(prepare_video, video, work / _digest(video, raw), settings): video
                for video in waiting
            }
            for number, job in enumerate(as_completed(jobs), 1):
                video = jobs[job]
                entry = state.add(video, raw, _result(job))
                kept = sum(it["reason"] is None for it in entry)
                tell(f"{number}/{len(waiting)} {video}: {kept} clips, {len(entry) - kept} stretches dropped")
        finally:  # after Ctrl-C or an error, videos that were not begun are not begun
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(work, ignore_errors=True)
        state.write_lists()
        write_file(data / REPORT, report(state.videos, FPS).encode())
    except OSError as error:
        raise cannot_write(data, error) from error
    return state.counts()


def _result(job: "Future[list[dict[str, Any]]]") -> list[dict[str, Any]]:
    """What became of a video; one that brings its worker to an error of another kind is dropped with that."""
    try:
        return job.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker was killed, perhaps for want of memory: use fewer of them; the same command goes on"
        ) from error
    except OSError:
        raise
    except Exception as error:
        logger.exception("a video cannot be prepared")
        return [asdict(Stretch(0, 0, f"{type(error).__name__}: {error}"))]


class _State:
    """What became of every video, on disk after each of them."""

    def __init__(self, data: Path, settings: PrepareSettings, videos: dict[str, Any]) -> None:
        self.data, self.settings, self.videos = data, settings, videos

    @classmethod
    def open(cls, data: Path, settings: PrepareSettings) -> "_State":
        file = data / STATE
        if not file.exists():
            return cls(data, settings, {})
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}): remove it, and the clips beside it") from error
        if stored["settings"] != asdict(settings):
            raise InputError(f"{data} was prepared with other settings: give those, or choose another folder")
        state = cls(data, settings, stored["videos"])
        for entry in state.videos.values():
            state._move(entry["stretches"])  # a run may have been stopped in the middle of it
        return state

    def has(self, video: Path, raw: Path) -> bool:
        """Whether this very video was prepared."""
        entry = self.videos.get(str(video.relative_to(raw)))
        return entry is not None and entry["file"] == _file(video)

    def add(self, video: Path, raw: Path, stretches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give a video's clips their places. They are written down before they are taken."""
        taken: dict[str, int] = {}
        for it in stretches:
            if it["reason"] is None:
                shape = it["shape"]
                taken[shape] = taken.get(shape, self._last(shape)) + 1
                it["clip"] = f"{shape}/{self.settings.kind}/{taken[shape]:05d}"
        name = str(video.relative_to(raw))
        before = self.videos.get(name)
        self.videos[name] = {"file": _file(video), "stretches": stretches}
        self._write()
        if before is not None:  # the file was another one then
            for it in before["stretches"]:
                if it["reason"] is None:
                    shutil.rmtree(self.data / it["clip"], ignore_errors=True)
        self._move(stretches)
        return stretches

    def _move(self, stretches: Sequence[dict[str, Any]]) -> None:
        waiting = [it for it in stretches if "work" in it]
        for it in waiting:
            target = self.data / it["clip"]
            if Path(it["work"]).exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                Path(it["work"]).replace(target)
            del it["work"]  # another run may use that place
        if waiting:
            self._write()

    def _last(self, shape: Shape) -> int:
        """The highest number of a clip, also of those on disk that are in no state."""
        folder = self.data / shape / self.settings.kind
        on_disk = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        known = [int(clip.rsplit("/", 1)[1]) for clip in self._clips() if clip.startswith(f"{shape}/")]
        return max([*on_disk, *known], default=0)

    def _clips(self) -> list[str]:
        return [
            it["clip"] for entry in self.videos.values() for it in entry["stretches"] if it["reason"] is None
        ]

    def write_lists(self) -> None:
        """A path list a shape, with the clips of every run."""
        for shape in SIZES:
            clips = sorted(clip for clip in self._clips() if clip.startswith(f"{shape}/"))
            if clips:
                write_file(self.data / f"video_{shape}_path.txt", "".join(f"{it}\n" for it in clips).encode())

    def counts(self) -> dict[str, int]:
        """Clips that are there, stretches that are not kept, videos."""
        stretches = [it for entry in self.videos.values() for it in entry["stretches"]]
        kept = sum(it["reason"] is None for it in stretches)
        return {"kept": kept, "dropped": len(stretches) - kept, "videos": len(self.videos)}

    def _write(self) -> None:
        content = {"settings": asdict(self.settings), "videos": self.videos}
        write_file(self.data / STATE, json.dumps(content, indent=1, ensure_ascii=False).encode())


class _Last(Generic[Item]):
    """Items, of which the one that was taken last is kept."""

    item: Item

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Item]:
        for item in self.items:
            self.item = item
            yield item


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


def _small(frame: Frame) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(frame).resize(_SMALL, Image.Resampling.BOX), np.float32)


def _background(points: Points, width: int, height: int) -> NDArray[np.bool_]:
    """Where in a small picture nobody is: beside and above the head, away from the body."""
    low, high = points.min(axis=0), points.max(axis=0)
    face = high - low
    x = (np.arange(_SMALL[0]) + 0.5) / _SMALL[0] * width
    y = (np.arange(_SMALL[1]) + 0.5) / _SMALL[1] * height
    beside = (x < low[0] - 0.8 * face[0]) | (x > high[0] + 0.8 * face[0])
    above = y < low[1] - 0.8 * face[1]
    at_head = y < high[1]  # further down are shoulders and hands
    result: NDArray[np.bool_] = (beside[None] & at_head[:, None]) | above[:, None]
    return result


def _faces(landmarker: FaceLandmarker, frame: Frame) -> int:
    """Faces that are not much smaller than the largest."""
    sides = [square.side for square in landmarker.faces(frame)]
    return sum(side >= _OTHER_FACE * max(sides) for side in sides)


def _digest(video: Path, raw: Path) -> str:
    return hashlib.sha256(str(video.relative_to(raw)).encode()).hexdigest()[:16]


def _file(video: Path) -> list[int]:
    """By which a file is known to be the same: size, and time of its last change."""
    found = video.stat()
    return [found.st_size, found.st_mtime_ns]
