"""Puppets from a store as clips to train the autoencoder on, with their face and lip masks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stableavatar.data.puppets import ClipStore
from stableavatar.errors import InputError

logger = logging.getLogger(__name__)


class PuppetClips:
    """Random crops of random stretches of the clips of stores.

    A store that is still being built grows: it is opened again every `refresh` seconds. Masks are kept bit-
    packed in memory. Raises InputError while the store holds no finished clip.
    """

    def __init__(self, folders: Sequence[Path], refresh: float = 120.0) -> None:
        self.folders = folders
        self.refresh = refresh
        self._masks: dict[Path, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
        self._open()

    def _open(self) -> None:
        self.stores = [ClipStore(folder) for folder in self.folders]
        self.opened = time.monotonic()
        self.ends = np.cumsum([len(store) for store in self.stores])
        if self.ends[-1] == 0:
            raise InputError(f"no finished clip in {', '.join(map(str, self.folders))}")
        logger.info("%d puppet clips", self.ends[-1])

    def _packed_masks(self, folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if folder not in self._masks:
            with np.load(folder / "labels.npz") as labels:
                self._masks[folder] = (labels["face_masks"], labels["lip_masks"])
        return self._masks[folder]

    def sample(
        self, rng: np.random.Generator, frames: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A clip float32 [3, frames, size, size] in [-1, 1]; face and lip masks [frames, size, size] in 0..1.

        A crop smaller than the frame holds the middle of the mouth in half of the draws. Clips may be
        mirrored and tinted.
        """
        if time.monotonic() - self.opened > self.refresh:
            self._open()
        index = int(rng.integers(self.ends[-1]))
        which = int(np.searchsorted(self.ends, index, side="right"))
        clip = self.stores[which][index - int(self.ends[which])]
        length, height, width = clip.frames.shape[:3]
        start = int(rng.integers(0, length - frames + 1))
        face, lips = (
            np.unpackbits(mask[start : start + frames], axis=-1, count=width)
            for mask in self._packed_masks(clip.folder)
        )
        top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
        rows, columns = np.nonzero(lips[0])
        if size < height and len(rows) and rng.random() < 0.5:
            middle_y, middle_x = int(rows.mean()), int(columns.mean())
            reach = size // 2 - 8
            top = int(np.clip(middle_y - size // 2 + rng.integers(-reach, reach + 1), 0, height - size))
            left = int(np.clip(middle_x - size // 2 + rng.integers(-reach, reach + 1), 0, width - size))
        window = (slice(None), slice(top, top + size), slice(left, left + size))
        pixels = torch.from_numpy(clip.frames[start : start + frames][window].astype(np.float32)) / 127.5 - 1
        if rng.random() < 0.3:
            tint = torch.from_numpy(rng.uniform(0.75, 1.2, 3).astype(np.float32))
            pixels = (pixels * tint + float(rng.uniform(-0.15, 0.15))).clamp(-1, 1)
        masks = [torch.from_numpy(mask[window].astype(np.float32)) for mask in (face, lips)]
        if rng.random() < 0.5:
            pixels, masks = pixels.flip(2), [mask.flip(2) for mask in masks]
        return pixels.permute(3, 0, 1, 2).contiguous(), masks[0], masks[1]
