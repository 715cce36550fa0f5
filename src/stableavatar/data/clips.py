"""A clip folder of the training layout (spec 4, "Data layout"): frames, speech, masks and prompt.

    talking_face_data/{rec,vec,square}/{speech,singing,dancing}/00001/
        sub_clip.mp4  audio.wav  images/frame_0.png ...  face_masks/frame_0.png ...  lip_masks/frame_0.png ...
        prompt.txt (optional)  portrait.png (optional: the person at rest)

`images/` may be missing: the frames are then decoded from `sub_clip.mp4`, which also knows the frame rate.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol, get_args

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stableavatar.conditioning.speech import Normalisation
from stableavatar.errors import InputError
from stableavatar.media.audio import Speech
from stableavatar.media.decoding import picture_delay
from stableavatar.media.files import open_media, reason_of
from stableavatar.media.reading import read_frames, square_width, video_stream
from stableavatar.media.timing import sample_position

_EVEN = 1e-3  # by which the rate that a video's time stamps suggest may differ from its frames a second
# How many frames one may be off its place: the next one's is where it stands after a frame that was lost.
_FURTHEST = 1.5
SAMPLE_RATE = 16_000  # of the speech that is handed on, mono
PROMPTS = {
    "speech": "The protagonist is talking",
    "singing": "The protagonist is singing",
    "dancing": "The protagonist is simultaneously dancing and singing",
}

MaskKind = Literal["face_masks", "lip_masks"]
Shape = Literal["square", "rec", "vec"]

# Width and height of the trained shapes.
SHAPES: Mapping[Shape, tuple[int, int]] = {"square": (512, 512), "rec": (832, 480), "vec": (480, 832)}


class TrainingClip(Protocol):
    """What the data set asks of a clip, wherever it lies: on disk in the layout above, or rendered."""

    @property
    def name(self) -> str:
        """For messages: where the clip is."""
        ...

    def mark(self, *, masks: bool, portrait: bool) -> str:
        """By which another clip of the same name, prompt and length is told, without reading all of it; where
        they are used by its masks and its portrait too."""
        ...

    @property
    def length(self) -> int:
        """Frames."""
        ...

    @property
    def fps(self) -> Fraction:
        """Frames a second."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        ...

    @property
    def prompt(self) -> str:
        """What the clip shows."""
        ...

    def read_frames(self, start: int, count: int) -> NDArray[np.uint8]:
        """Frames `start` to `start + count` as uint8 `[count, height, width, 3]`."""
        ...

    def read_masks(self, kind: MaskKind, start: int, count: int) -> NDArray[np.float32]:
        """Masks of frames `start` to `start + count`, float32 `[count, h, w]` in [0, 1]."""
        ...

    def read_portrait(self) -> NDArray[np.uint8]:
        """The person at rest, uint8 `[height, width, 3]`."""
        ...

    def read_speech(self, start: int, count: int) -> NDArray[np.float32]:
        """Speech from the instant of frame `start` to that of frame `start + count`: samples at 16 kHz, as
        recorded.
        """
        ...


def normalized_speech(clip: TrainingClip, start: int, count: int) -> NDArray[np.float32]:
    """A clip's speech of some frames with zero mean and unit variance."""
    samples = clip.read_speech(start, count)
    return Normalisation.of(samples).normalise(samples)


@dataclass(frozen=True)
class FolderClip:
    """A clip folder that was looked into by `FolderClip.open`.

    Every method that reads raises `InputError` with the file that is missing, unreadable or of another size;
    nothing is replaced by zeros or ones (spec 5, fault 12).
    """

    folder: Path
    length: int
    fps: Fraction
    size: tuple[int, int]
    prompt: str
    has_images: bool

    @classmethod
    def open(cls, folder: Path) -> "FolderClip":
        """Look into a clip folder: number, rate and size of frames, prompt.

        Raises:
            InputError: a file is missing or unreadable, the pictures are not the video's, or neither
            `prompt.txt` nor the path says what the clip shows.
        """
        if not folder.is_dir():
            raise InputError(f"there is no clip folder {folder}")
        length, fps, size, has_sound = _probe(folder / "sub_clip.mp4")
        if not (has_sound or (folder / "audio.wav").exists()):
            raise InputError(f"{folder} has no speech: neither an audio.wav, nor sound in sub_clip.mp4")
        images = folder / "images"
        if images.is_dir():
            pictures = clip_length(folder)
            # Extracted at another rate, or not to the end, they would not be of the instants of the speech.
            if abs(pictures - length) > 1:
                raise InputError(
                    f"{images} holds {pictures} frames, and sub_clip.mp4 beside it {length}: extract them "
                    "again (stableavatar extract-frames)"
                )
            length = pictures
            size = _picture_size(images / "frame_0.png")
        return cls(folder, length, fps, size, _prompt(folder), images.is_dir())

    @property
    def name(self) -> str:
        return str(self.folder)

    def mark(self, *, masks: bool, portrait: bool) -> str:
        """Of its video, sound, middle picture and masks, and portrait: how many bytes, and some of them.
        Raises InputError: the middle masks, or the portrait, are missing."""
        middle = f"frame_{self.length // 2}.png"
        for kind in get_args(MaskKind) if masks else ():
            if not (self.folder / kind / middle).exists():
                raise InputError(
                    f"{self.folder / kind / middle} is missing: make masks (stableavatar extract-"
                    f"{kind.replace('_', '-')}), or train with objective.mask_loss none and data.clips.masks "
                    "false"
                )
        if portrait and not (self.folder / "portrait.png").exists():
            raise InputError(
                f"{self.folder / 'portrait.png'}, the person at rest, is missing: put it there, or train "
                "with data.clips.portrait 0 and any_frame in its place"
            )
        names = ["sub_clip.mp4", "audio.wav", f"images/{middle}"]
        names += [f"{kind}/{middle}" for kind in get_args(MaskKind)] if masks else []
        names += ["portrait.png"] if portrait else []
        return " ".join(_piece(self.folder / name) for name in names)

    def read_frames(self, start: int, count: int) -> NDArray[np.uint8]:
        """Frames `start` to `start + count` as uint8 `[count, height, width, 3]`."""
        shape = (self.size[1], self.size[0], 3)
        if self.has_images:
            images = self.folder / "images"
            files = (images / f"frame_{k}.png" for k in range(start, start + count))
            return _stack((_read_picture(path, "RGB") for path in files), count, shape, images)
        video = self.folder / "sub_clip.mp4"
        # From the first frame on: clips are short, and seeking is exact in few containers.
        with contextlib.closing(read_frames(video)) as decoded:
            return _stack(islice(decoded, start, start + count), count, shape, video)

    def read_masks(self, kind: MaskKind, start: int, count: int) -> NDArray[np.float32]:
        """Masks of frames `start` to `start + count`, float32 `[count, h, w]` in [0, 1]."""
        folder = self.folder / kind
        pictures = [_read_picture(folder / f"frame_{k}.png", "L") for k in range(start, start + count)]
        height, width = pictures[0].shape
        # Of another size they are brought to the latents' as well; of another shape they are of other frames.
        if abs(width * self.size[1] - height * self.size[0]) > max(width, height) * 8:
            raise InputError(
                f"{folder}: masks of {width}x{height} pixels to frames of {self.size[0]}x{self.size[1]}; "
                f"make them again (stableavatar extract-{kind.replace('_', '-')})"
            )
        return np.asarray(_stack(pictures, count, pictures[0].shape, folder) / np.float32(255), np.float32)

    def read_portrait(self) -> NDArray[np.uint8]:
        """The person at rest from `portrait.png`, uint8 `[height, width, 3]`."""
        path = self.folder / "portrait.png"
        return _stack([_read_picture(path, "RGB")], 1, (self.size[1], self.size[0], 3), path)[0]

    def read_speech(self, start: int, count: int) -> NDArray[np.float32]:
        """Speech of frames `start` to `start + count` from `audio.wav`, or where there is none from the sound
        of `sub_clip.mp4`.

        Raises:
            InputError: the sound cannot be read, or ends more than a frame too early.
        """
        path, begin = self.folder / "audio.wav", 0
        if not path.exists():
            path = self.folder / "sub_clip.mp4"
            begin = round(picture_delay(path) * SAMPLE_RATE)
        first, last = (begin + sample_position(k, SAMPLE_RATE, self.fps) for k in (start, start + count))
        frame = sample_position(1, SAMPLE_RATE, self.fps)
        with Speech.open(path) as speech:
            if len(speech) < last - frame:
                raise InputError(
                    f"the sound of {path} ends after {speech.seconds:.2f} s, before frame {start + count - 1}"
                )
            return speech.samples(first, last)


def _piece(file: Path) -> str:
    """A file's size and a hash of 4 KiB in its middle; nothing where there is none."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            stream.seek(max(0, size // 2 - 2048))
            return f"{size}:{hashlib.sha256(stream.read(4096)).hexdigest()[:16]}"
    except FileNotFoundError:
        return "-"
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error


def clip_length(folder: Path) -> int:
    """Frames of a clip folder. Raises InputError where neither `images` nor `sub_clip.mp4` can be read."""
    images = folder / "images"
    if images.is_dir():
        return sum(1 for path in images.iterdir() if path.name.startswith("frame_"))
    return _probe(folder / "sub_clip.mp4")[0]


def clip_frames(folder: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a clip folder in order, uint8 `[H, W, 3]`. Raises InputError as `clip_length`."""
    images = folder / "images"
    if images.is_dir():
        for number in range(clip_length(folder)):
            yield _read_picture(images / f"frame_{number}.png", "RGB")
    else:
        yield from read_frames(folder / "sub_clip.mp4")


def read_path_list(path: Path) -> list[Path]:
    """Clip folders of a path list, one a line; relative ones count from the list's own folder.

    Raises:
        InputError: the list cannot be read or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        there = sorted(other.name for other in path.parent.glob("*_path.txt"))
        hint = f"; beside it are {', '.join(there)}" if there else ""
        raise InputError(f"cannot read the list of clips {path}: {error}{hint}") from error
    folders = [path.parent / line.strip() for line in lines if line.strip()]
    if not folders:
        raise InputError(f"the list of clips {path} is empty")
    return folders


def folders_below(root: Path, *, hidden: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """A folder and its sub-folders, each once, with the names of their files. Links to folders are followed
    after all else, so that what lies in the folder itself has its own name.

    Args:
        hidden: also those whose names begin with a dot.
    """
    seen = set()
    links = [root]
    for link in links:  # grows meanwhile
        for folder, names, files in os.walk(link):
            real = os.path.realpath(folder)
            if real in seen:
                names.clear()
                continue
            seen.add(real)
            names[:] = sorted(name for name in names if hidden or not name.startswith("."))
            links += (path for name in names if (path := Path(folder, name)).is_symlink())
            yield Path(folder), files


def find_clips(root: Path) -> list[Path]:
    """Every folder below `root` that holds a `sub_clip.mp4`, sorted; none in hidden folders, where clips
    are made.

    Raises:
        InputError: there is none.
    """
    found = folders_below(root, hidden=False)
    folders = sorted(folder for folder, files in found if "sub_clip.mp4" in files)
    if not folders:
        raise InputError(f"no clip (a folder with sub_clip.mp4) was found below {root}")
    return folders


def _probe(video: Path) -> tuple[int, Fraction, tuple[int, int], bool]:
    """Frames, frame rate, width and height of a video, and whether it has sound.

    Raises InputError: it cannot be read, or its frames are not evenly spaced, so that their numbers say
    nothing of when they are.
    """
    with open_media(video, "video") as container:
        stream = video_stream(container, video, "video")
        rate = stream.average_rate
        # Some muxers leave the number of frames out of the header.
        frames = stream.frames
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        uneven = rate and stream.guessed_rate and abs(stream.guessed_rate / rate - 1) > _EVEN
        try:
            # Of those that are there an edit list may show fewer.
            if uneven or not frames or abs(seconds * float(rate or 0) - frames) > 1.5:
                shown = [
                    packet.pts
                    for packet in container.demux(stream)
                    if packet.size > 0 and not packet.is_discard
                ]
                frames = len(shown)
                if uneven and _unevenness(shown) > _FURTHEST:
                    raise InputError(
                        f"video {video}: its frames are not evenly spaced. stableavatar prepare makes clips "
                        "of it whose frames are."
                    )
        except av.FFmpegError as error:
            raise InputError(f"video {video}: damaged ({reason_of(error)}). Fetch it again.") from error
        has_sound = bool(container.streams.audio)
        codec = stream.codec_context
        size = (square_width(codec.width, stream.sample_aspect_ratio), codec.height)
    if rate is None or rate <= 0 or frames < 1:
        raise InputError(f"{video} does not say its frame rate, or holds no frame")
    return frames, Fraction(rate), size, has_sound


def _unevenness(times: list[int | None]) -> float:
    """By how many frames the frame that is furthest from its place is off it, were they evenly spaced from
    the first to the last."""
    known = sorted(time for time in times if time is not None)
    if len(known) < 3 or known[0] == known[-1]:
        return 0.0
    step = (known[-1] - known[0]) / (len(known) - 1)
    return max(abs((time - known[0]) / step - k) for k, time in enumerate(known))


def _prompt(folder: Path) -> str:
    file = folder / "prompt.txt"
    if file.exists():
        try:
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompt {file}: {error}") from error
        if not text:
            raise InputError(f"the prompt {file} is empty")
        return text
    words = [PROMPTS[part] for part in reversed(folder.parts) if part in PROMPTS]
    if not words:
        raise InputError(
            f"{folder} has no prompt.txt, and its path names none of {', '.join(PROMPTS)}: no prompt is known"
        )
    return words[0]


def _picture_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, SyntaxError) as error:  # the latter of a PNG whose check sums are wrong
        raise InputError(f"cannot read the picture {path}: {error}") from error


def _read_picture(path: Path, mode: Literal["RGB", "L"]) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert(mode))
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read the picture {path}: {error}") from error


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _stack(
    pictures: Iterable[NDArray[np.uint8]], count: int, shape: tuple[int, ...], source: Path
) -> NDArray[np.uint8]:
    stacked = np.empty((count, *shape), np.uint8)
    read = 0
    for picture in pictures:
        if picture.shape != shape:
            raise InputError(
                f"{source}: a picture of {_size(picture.shape)} pixels where {_size(shape)} were expected"
                + (
                    " (it is to be shown turned: stableavatar extract-frames writes its frames upright)"
                    if source.suffix == ".mp4" and picture.shape[:2] == (shape[1], shape[0])
                    else ""
                )
            )
        stacked[read] = picture
        read += 1
    if read < count:
        raise InputError(f"{source} ends {count - read} frames early")
    return stacked
