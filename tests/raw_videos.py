"""Raw videos of puppets, for what is prepared of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from media_files import tone, write_video
from stableavatar.data.landmarks import NETWORKS, networks_folder
from stableavatar.data.puppets import make_clip
from stableavatar.data.stretches import PrepareSettings

Frames = NDArray[np.uint8]
SHORT = PrepareSettings(least_seconds=0.5, most_seconds=2.0)
SIZE = 128


def puppet(seed: int, seconds: float) -> Frames:
    return make_clip(seed, seconds, size=SIZE).frames


def empty(seconds: float) -> Frames:
    """A wall."""
    return np.full((round(25 * seconds), SIZE, SIZE, 3), 90, np.uint8)


def video(path: Path, parts: Sequence[Frames], *, sound: bool = True) -> Path:
    frames = np.concatenate(list(parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = tone(len(frames) / 25, 48_000) if sound else None
    return write_video(path, list(frames), samples)


needs_networks = pytest.mark.skipif(
    not all((networks_folder() / Path(name).name).is_file() for name in NETWORKS),
    reason="the networks for faces are not there: stableavatar download --landmarks",
)
