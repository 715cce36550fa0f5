"""What several tests look at: puppets that nothing was trained on, the meter of the mouth, toy weights; and what
they leave behind in a process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from published_toy import write_published
from stableavatar.data.puppets import EVALUATION_SEED, PuppetClip, make_clip
from stableavatar.evaluation.meter import MouthMeter, shipped_meter


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
def fresh_accelerator() -> Iterator[None]:
    """What accelerate knows of processes and devices is forgotten, before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
