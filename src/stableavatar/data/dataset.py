"""Training clips: T consecutive frames from a random start, a reference picture, the speech of the same
instant, masks, the prompt.
"""

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import cycle, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stableavatar.data.clips import FolderClip, MaskKind, TrainingClip, normalized_speech
from stableavatar.data.masks import masks_to_latents
from stableavatar.data.sampler import ClipKey
from stableavatar.errors import InputError

logger = logging.getLogger(__name__)

MASKS: tuple[MaskKind, ...] = ("face_masks", "lip_masks")
LATENT_PIXELS = 8  # pixels a latent cell in space
_LEAST_TRIES = 16  # windows that are drawn in the place of one that cannot be read
Result = TypeVar("Result")
Item = TypeVar("Item")


class Share:
    """A process of several that do one work; of itself, the only one."""

    process = 0
    processes = 1

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in all of them."""
        return items


@dataclass(frozen=True)
class _Found:
    """What opening a clip came to: the clip and its mark, or why it cannot be used."""

    name: str
    clip: TrainingClip | None = None
    mark: str = ""
    error: str = ""


OnError = Literal["raise", "skip"]
ReferenceKind = Literal["first", "portrait", "any"]


@dataclass(frozen=True)
class ClipDatasetSettings:
    """How clips become samples.

    When sampling a long video every window has the user's portrait as its reference, also in the middle of a
    sentence, where it is not the window's first frame. `portrait` and `any_frame` put that into the training.

    Attributes:
        frames: T = 4n+1 frames a sample.
        portrait: probability that the reference is the clip's `portrait.png`, the person at rest.
        any_frame: probability that the reference is a frame drawn from the whole clip. Otherwise it is the
            sample's first frame.
        masks: read face and lip masks; without them they are None.
        seed: of starts and references; the same clip and pass give the same sample.
        on_error: `raise` an `InputError` that names the file, or `skip` the clip, log it and count it in
            `skipped`.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    frames: int = 81
    portrait: float = 0.0
    any_frame: float = 0.0
    masks: bool = True
    seed: int = 0
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        if self.frames < 5 or self.frames % 4 != 1:
            raise InputError(f"frames must be 5, 9, 13, ... (4n+1), not {self.frames}")
        if self.portrait < 0 or self.any_frame < 0 or self.portrait + self.any_frame > 1:
            raise InputError("portrait and any_frame are probabilities and together at most 1")
        if self.on_error not in get_args(OnError):
            raise InputError(f"on_error must be one of {', '.join(get_args(OnError))}, not {self.on_error!r}")


@dataclass(frozen=True)
class Window:
    """What was drawn for a sample: its first frame, and the reference (`reference_frame` counts in the clip;
    for `any` alone).
    """

    start: int
    reference: ReferenceKind
    reference_frame: int


@dataclass(frozen=True)
class ClipSample:
    """A sample as it is on disk, before any encoder.

    Attributes:
        frames: uint8 `[T, H, W, 3]`. reference: uint8 `[H, W, 3]`.
        speech: float32 samples at 16 kHz, zero mean and unit variance, from the first frame's instant for
            T/fps seconds.
        face_mask, lip_mask: float32 `[(T-1)/4 + 1, H/8, W/8]` in [0, 1], or None.
    """

    clip: TrainingClip
    window: Window
    frames: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    speech: NDArray[np.float32]
    face_mask: torch.Tensor | None
    lip_mask: torch.Tensor | None
    prompt: str


def draw_window(clip: TrainingClip, settings: ClipDatasetSettings, rng: np.random.Generator) -> Window:
    """Draw start and reference of a sample."""
    start = int(rng.integers(clip.length - settings.frames + 1))
    draw = rng.random()
    anywhere = int(rng.integers(clip.length))
    if draw < settings.portrait:
        return Window(start, "portrait", -1)
    if draw < settings.portrait + settings.any_frame:
        return Window(start, "any", anywhere)
    return Window(start, "first", start)


def read_reference(clip: TrainingClip, window: Window) -> NDArray[np.uint8]:
    """The reference picture of a window, uint8 `[H, W, 3]`."""
    if window.reference == "portrait":
        return clip.read_portrait()
    return clip.read_frames(window.reference_frame, 1)[0]


def read_sample(clip: TrainingClip, window: Window, settings: ClipDatasetSettings) -> ClipSample:
    """Read a sample's files.

    Raises:
        InputError: naming the file that is missing or damaged. Nothing is replaced by zeros (spec 5, fault
        12).
    """
    count = settings.frames
    frames = clip.read_frames(window.start, count)
    face_mask = lip_mask = None
    if settings.masks:
        width, height = (pixels // LATENT_PIXELS for pixels in clip.size)
        face_mask, lip_mask = (
            masks_to_latents(torch.from_numpy(clip.read_masks(kind, window.start, count)), height, width)
            for kind in MASKS
        )
    return ClipSample(
        clip=clip,
        window=window,
        frames=frames,
        reference=frames[0] if window.reference == "first" else read_reference(clip, window),
        speech=normalized_speech(clip, window.start, count),
        face_mask=face_mask,
        lip_mask=lip_mask,
        prompt=clip.prompt,
    )


class ClipDataset(Dataset[ClipSample]):
    """Clips as samples; a key is `(index, pass)`, so that every pass over the data draws other windows,
    reproducibly.

    Attributes:
        skipped: what could not be read with `on_error="skip"`: names, and the first reason. Other windows of
            such a clip may be readable, and are read: what is drawn does not depend on what was drawn before,
            so that a resumed run, or one of more readers or processes, draws the same.
        groups: width, height and frame rate of every clip: what may share a batch.

    Args:
        clips: of any mixture of sizes and frame rates.

    Raises:
        InputError: a clip is too short or not a multiple of 16 pixels (with `on_error="raise"`), or none is
            usable.
    """

    def __init__(self, clips: Iterable[TrainingClip], settings: ClipDatasetSettings) -> None:
        self._begin(settings)
        for clip in clips:
            self._add(clip.name, partial(self._checked, clip))
        self._require_clips()

    @classmethod
    def from_folders(
        cls,
        folders: Iterable[Path],
        settings: ClipDatasetSettings,
        *,
        others: Iterable[tuple[str, Callable[[], TrainingClip]]] = (),
        sizes: Collection[tuple[int, int]] | None = None,
        share: Share | None = None,
    ) -> "ClipDataset":
        """Open clip folders; those that cannot be opened raise or are skipped as `settings.on_error` says.

        Args:
            others: clips before them, by their names and what opens them.
            sizes: width and height of clips that are taken; one of another is as one that cannot be opened.
                None: any.
            share: of several processes that all open the same folders each looks into its part of them, and
                all get, or are told, the same. None: there is one.
        """
        share = share or Share()
        dataset = cls.__new__(cls)
        dataset._begin(settings, sizes)
        for name, read in others:
            dataset._add(name, partial(dataset._opened, read))
        own = dataset._look_into(islice(enumerate(folders), share.process, None, share.processes))
        for _, found in sorted(share.gather(list(own)), key=itemgetter(0)):
            dataset._take(found)
        dataset._require_clips()
        return dataset

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def fingerprint(self) -> str:
        """Another one for other clips, another order or other settings."""
        return _digest([self.clips_digest(), asdict(self.settings)])

    def clips_digest(self, count: int | None = None) -> str:
        """Of the first `count` clips, or of all: names of their own folders (where these lie does not count),
        prompts, lengths, sizes, rates, and what tells them from others of the same name."""
        return _digest(
            [
                (Path(clip.name).name, mark, clip.prompt, clip.length, *map(str, group))
                for clip, mark, group in zip(
                    self.clips[:count], self._marks[:count], self.groups[:count], strict=True
                )
            ]
        )

    def __getitem__(self, key: ClipKey) -> ClipSample:
        """Sample of clip `index` in pass `epoch`. With `on_error="skip"`, another readable clip of its size
        stands in for a bad one: any, so that no clip is trained on in the place of many.
        """
        index, epoch = key
        sample = self._sample(index, np.random.default_rng((self.settings.seed, index, epoch)))
        if sample is not None:
            return sample
        with self._stand_ins.get_lock():
            self._stand_ins.value += 1
        drawn = (self.settings.seed, index, epoch)
        # The first that is said is this one's; others may have been left out for reasons of their own.
        reason = self.skipped[self.clips[index].name]
        alike = [other for other, group in enumerate(self.groups) if group == self.groups[index]]
        order = np.random.default_rng((*drawn, 0)).permutation(alike)
        # Of a clip some windows may be readable: a single one is not given up after a few.
        tries = islice(cycle(order), max(len(order), _LEAST_TRIES))
        for number, other in enumerate(tries, 1):
            sample = self._sample(int(other), np.random.default_rng((*drawn, number)))
            if sample is not None:
                return sample
        raise InputError(
            f"no window that was drawn of any clip of {self.clips[index].size} pixels can be read; of the "
            f"first: {reason}. Mend them, or take them out of the data and go on with --resume latest "
            "--new-data"
        )

    @property
    def stand_ins(self) -> int:
        """How often a clip stood in for one that could not be read, in this process and in those that it has
        started as its readers."""
        return int(self._stand_ins.value)

    def _sample(self, index: int, rng: np.random.Generator) -> ClipSample | None:
        clip = self.clips[index]
        window = draw_window(clip, self.settings, rng)
        return self.guarded(clip.name, partial(read_sample, clip, window, self.settings))

    def _begin(self, settings: ClipDatasetSettings, sizes: Collection[tuple[int, int]] | None = None) -> None:
        self.settings = settings
        self._sizes = sizes
        self.skipped: dict[str, str] = {}
        self._stand_ins = multiprocessing.Value("Q", 0)
        self.clips: list[TrainingClip] = []
        self._marks: list[str] = []  # as they were when the data set was opened
        self.groups: list[tuple[int, int, Fraction]] = []

    def _add(self, name: str, read: Callable[[], TrainingClip]) -> None:
        self._take(self._look(name, read))

    def _look_into(self, folders: Iterable[tuple[int, Path]]) -> Iterator[tuple[int, _Found]]:
        for number, folder in folders:
            found = self._look(str(folder), partial(self._opened, partial(FolderClip.open, folder)))
            yield number, found
            if found.clip is None and self.settings.on_error == "raise":
                return  # the others of this process are not needed to say so

    def _look(self, name: str, read: Callable[[], TrainingClip]) -> _Found:
        try:
            clip = read()
            mark = clip.mark(masks=self.settings.masks, portrait=self.settings.portrait > 0)
        except InputError as error:
            return _Found(name, error=str(error))
        return _Found(name, clip, mark)

    def _take(self, found: _Found) -> None:
        """Raises InputError: a clip that cannot be used, where none is to be skipped."""
        if found.clip is None:
            if self.settings.on_error == "raise":
                raise InputError(found.error)
            self._skip(found.name, found.error)
            return
        self.clips.append(found.clip)
        self._marks.append(found.mark)
        # Average rates differ in their fourth digit from file to file; their speech is as long.
        self.groups.append((*found.clip.size, Fraction(round(found.clip.fps * 10), 10)))

    def _require_clips(self) -> None:
        if not self.clips:
            first = next(iter(self.skipped.values()), "none was given")
            raise InputError(f"there is no usable clip: {first}")
        if self.skipped:
            logger.warning(
                "%d of %d clips cannot be used and are left out",
                len(self.skipped),
                len(self.skipped) + len(self.clips),
            )

    def _opened(self, read: Callable[[], TrainingClip]) -> TrainingClip:
        return self._checked(read())

    def _checked(self, clip: TrainingClip) -> TrainingClip:
        width, height = clip.size
        if clip.length < self.settings.frames:
            raise InputError(
                f"{clip.name} has {clip.length} frames, fewer than the {self.settings.frames} of a sample"
            )
        if self._sizes is not None and (width, height) not in self._sizes:
            taken = " and ".join(f"{size[0]}x{size[1]}" for size in self._sizes)
            raise InputError(
                f"{clip.name} is {width}x{height} pixels, and this training is of {taken} (data.sizes)"
            )
        if width % 16 or height % 16:
            raise InputError(f"{clip.name} is {width}x{height} pixels: both must be multiples of 16")
        return clip

    def guarded(self, name: str, read: Callable[[], Result]) -> Result | None:
        """What is read of a clip; None where it raises InputError and `on_error` is "skip"."""
        try:
            return read()
        except InputError as error:
            if self.settings.on_error == "raise":
                raise
            self._skip(name, str(error))
            return None

    def _skip(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.skipped[name] = reason
            logger.warning("skipped (%d so far): %s", len(self.skipped), reason)


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
