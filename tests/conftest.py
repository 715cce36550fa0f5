"""What several tests look at: puppets that nothing was trained on, the meter of the mouth, toy weights; and what
they leave behind in a process."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from published_toy import write_published
from stableavatar.data.puppets import EVALUATION_SEED, PuppetClip, make_clip
from stableavatar.evaluation.meter import MouthMeter, shipped_meter

# As the processes that tests start: on some processors another number of threads rounds otherwise.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clips() -> list[PuppetClip]:
    return [make_clip(EVALUATION_SEED + index, 3.0) for index in (3, 9, 14)]


@pytest.fixture(scope="session")
def clip(clips: list[PuppetClip]) -> PuppetClip:
    return clips[0]


@pytest.fixture(scope="session")
def meter() -> MouthMeter:
    return shipped_meter()


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of toy weights, laid out and named as the published ones."""
    return write_published(tmp_path_factory.mktemp("published") / "checkpoints")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of one clip of 12 frames at 32x32 with a square of mouth."""
    folder = tmp_path / "store" / "0000000007"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    face, lips = np.zeros((2, 12, 32, 32), dtype=bool)
    face[:, 4:28, 4:28] = True
    lips[:, 20:24, 12:20] = True
    frames[lips] = (255, 0, 0)
    np.save(folder / "frames.npy", frames)
    np.savez(
        folder / "labels.npz",
        samples=rng.normal(0, 0.1, 7680).astype(np.float32),
        articulation=np.zeros((12, 6), np.float32),
        face_masks=np.packbits(face, axis=-1),
        lip_masks=np.packbits(lips, axis=-1),
        portrait=frames[0],
    )
    about = {"seed": 7, "prompt": "", "expression": "neutral", "person": "man", "frames": 12, "size": 32}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return folder.parent


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """What accelerate knows of processes and devices is forgotten, before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
