"""Rendered clips on disk, quick to read at random: one folder a clip, frames as a memory-mapped array.

0000000042/frames.npy    uint8 [T, H, W, 3], opened as a memory map
0000000042/labels.npz    samples, articulation [T, 6], masks (bit-packed), portrait
0000000042/about.json    seed, prompt, expression, person, frames, size

A clip whose expression was chosen, not drawn from its seed, says so in its name: 0000000042-smiling; and
one of a varied person: 0000000042-smiling-varied.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from stableavatar.data.puppets.articulation import Articulation
from stableavatar.data.puppets.clip import FPS, PuppetClip, make_clip
from stableavatar.data.puppets.identity import Identity
from stableavatar.data.puppets.speech import SAMPLE_RATE
from stableavatar.errors import InputError
from stableavatar.media.files import replacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredClip:
    """A clip read back: `frames` is a memory map uint8 [T, H, W, 3], the rest is loaded when asked for.

    It is a `stableavatar.data.clips.TrainingClip`, so a data set takes it beside clip folders.
    """

    folder: Path
    seed: int
    prompt: str
    expression: str
    frames: NDArray[np.uint8]

    @property
    def name(self) -> str:
        """Where the clip is."""
        return str(self.folder)

    def mark(self, *, masks: bool = True, portrait: bool = True) -> str:
        """Its seed, of which everything is made, and what was chosen: an expression, a varied person."""
        del masks, portrait
        return " ".join([str(self.seed), *self.folder.name.split("-")[1:]])

    @property
    def length(self) -> int:
        """Frames."""
        return int(self.frames.shape[0])

    @property
    def fps(self) -> Fraction:
        """Frames a second."""
        return Fraction(FPS)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return int(self.frames.shape[2]), int(self.frames.shape[1])

    def _label(self, name: str) -> NDArray[np.generic]:
        try:
            with np.load(self.folder / "labels.npz") as labels:
                return np.asarray(labels[name])
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise InputError(
                f"{self.folder / 'labels.npz'} cannot be read ({error}); remove the folder and build it again"
            ) from error

    @property
    def samples(self) -> NDArray[np.float32]:
        """Sound, float32 mono at 16 kHz [T * 640]."""
        return self._label("samples").astype(np.float32)

    @property
    def articulation(self) -> Articulation:
        """The mouth's tracks."""
        return Articulation.from_array(self._label("articulation").astype(np.float32))

    @property
    def portrait(self) -> NDArray[np.uint8]:
        """The identity at rest, uint8 [H, W, 3]."""
        return self._label("portrait").astype(np.uint8)

    def _mask(self, name: str, frames: slice) -> NDArray[np.uint8]:
        packed = self._label(name).astype(np.uint8)[frames]
        bits = np.unpackbits(packed, axis=-1, count=int(self.frames.shape[2]))
        return (bits * 255).astype(np.uint8)

    @property
    def face_masks(self) -> NDArray[np.uint8]:
        """uint8 [T, H, W], 0 or 255."""
        return self._mask("face_masks", slice(None))

    @property
    def lip_masks(self) -> NDArray[np.uint8]:
        """uint8 [T, H, W], 0 or 255."""
        return self._mask("lip_masks", slice(None))

    def read_frames(self, start: int, count: int) -> NDArray[np.uint8]:
        """Frames `start` to `start + count` as uint8 [count, H, W, 3]."""
        return np.array(self.frames[start : start + count])

    def read_masks(
        self, kind: Literal["face_masks", "lip_masks"], start: int, count: int
    ) -> NDArray[np.float32]:
        """Masks of frames `start` to `start + count`, float32 [count, H, W], 0 or 1."""
        return self._mask(kind, slice(start, start + count)).astype(np.float32) / np.float32(255)

    def read_portrait(self) -> NDArray[np.uint8]:
        """The identity at rest, uint8 [H, W, 3]."""
        return self.portrait

    def read_speech(self, start: int, count: int) -> NDArray[np.float32]:
        """Speech from frame `start` to frame `start + count`, float32 [count * 640] at 16 kHz."""
        step = SAMPLE_RATE // FPS
        return self.samples[start * step : (start + count) * step]


class ClipStore:
    """Random access to the finished clips of a store that :func:`build_store` made, in order of names."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"There is no clip store in {self.folder}; make one with `build_store`.")
        self.folders = sorted(entry for entry in self.folder.iterdir() if entry.name[0].isdigit())

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> StoredClip:
        folder = self.folders[index]
        try:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            return StoredClip(
                folder=folder,
                seed=int(about["seed"]),
                prompt=str(about["prompt"]),
                expression=str(about["expression"]),
                frames=np.load(folder / "frames.npy", mmap_mode="r"),
            )
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise InputError(
                f"{folder} cannot be read ({error}); remove the folder and build it again"
            ) from error

    def __iter__(self) -> Iterator[StoredClip]:
        return (self[index] for index in range(len(self)))


def _save(clip: PuppetClip, folder: Path) -> None:
    about = {
        "seed": clip.seed,
        "prompt": clip.prompt,
        "expression": clip.expression,
        "person": clip.identity.person,
        "frames": int(clip.frames.shape[0]),
        "size": int(clip.frames.shape[1]),
    }
    if folder.exists():  # of another process that builds this store
        return
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        np.save(partial / "frames.npy", clip.frames)
        np.savez(
            partial / "labels.npz",
            samples=clip.samples,
            articulation=clip.articulation.as_array(),
            face_masks=np.packbits(clip.face_masks > 0, axis=-1),
            lip_masks=np.packbits(clip.lip_masks > 0, axis=-1),
            portrait=clip.portrait,
        )
        (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _clip_folder(folder: Path, seed: int, expression: str | None, *, varied: bool) -> Path:
    chosen = [] if expression is None else [expression.replace(" ", "-")]
    chosen += ["varied"] if varied else []
    return folder / "-".join([f"{seed:010d}", *chosen])


def _make_one(clip: tuple[int, str | None], folder: Path, seconds: float, size: int, *, varied: bool) -> None:
    torch.set_num_threads(1)
    seed, expression = clip
    person = Identity.varied(seed) if varied else None
    made = make_clip(seed, seconds, size=size, expression=expression, identity=person)
    _save(made, _clip_folder(folder, seed, expression, varied=varied))


def build_store(
    folder: str | Path,
    seeds: Iterable[int],
    *,
    seconds: float = 4.0,
    size: int = 128,
    expressions: Sequence[str] = (),
    varied: bool = False,
    processes: int = 2,
) -> ClipStore:
    """Render clips into `folder`; clips already there are kept, so an interrupted build can be run again.

    A clip of 4 s at 128x128 takes about 5 MB. Each clip appears under its name only when complete.

    Args:
        expressions: a clip for each, in which the same person says the same and, but for it, moves alike.
            Without, a clip a seed, with the seed's own expression.
        varied: persons of :meth:`Identity.varied`.

    Raises:
        InputError: `processes` below 1, or what :func:`make_clip` raises.
    """
    if processes < 1:
        raise InputError(f"A store is built by at least one process, got {processes}.")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    clips = product(seeds, expressions or (None,))
    missing = [clip for clip in clips if not _clip_folder(target, *clip, varied=varied).exists()]
    task = partial(_make_one, folder=target, seconds=seconds, size=size, varied=varied)
    if processes == 1:
        for done, clip in enumerate(missing, 1):
            task(clip)
            _report(done, len(missing))
    elif missing:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for done, _ in enumerate(pool.imap_unordered(task, missing), 1):
                _report(done, len(missing))
    return ClipStore(target)


def _report(done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        logger.info("%d of %d clips rendered", done, total)
