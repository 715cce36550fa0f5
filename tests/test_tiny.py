"""The model that ships: it loads, it is small, and its mouth follows the speech."""

from pathlib import Path

import numpy as np
import pytest

from stableavatar.checkpoints.layout import TINY
from stableavatar.data.puppets import EVALUATION_SEED, make_clip
from stableavatar.evaluation.lips import lip_score
from stableavatar.evaluation.meter import shipped_meter
from stableavatar.evaluation.pictures import signal_to_noise, structural_similarity
from stableavatar.evaluation.regions import puppet_regions
from stableavatar.media.image import fit_picture, read_picture
from stableavatar.pipeline import AvatarPipeline, load

DEMO = Path(__file__).parents[1] / "src" / "stableavatar" / "assets" / "demo"


@pytest.fixture(scope="module")
def tiny() -> AvatarPipeline:
    return load("tiny")


def test_it_is_small() -> None:
    assert (
        10 * 2**20 < sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) <= 25 * 2**20
    )  # spec 6


def test_it_names_no_folder_of_the_machine_that_made_it() -> None:
    for config in TINY.rglob("*.json"):
        assert "_name_or_path" not in config.read_text(encoding="utf-8"), config


def test_an_unseen_puppet_talks(tiny: AvatarPipeline) -> None:
    truth = make_clip(EVALUATION_SEED + 1, 3.0)
    frames = np.stack(list(tiny.stream(truth.portrait, truth.samples, prompt=truth.prompt, seed=0)))
    assert frames.shape == (75, 128, 128, 3)
    opening = shipped_meter().measure(frames).opening
    score = lip_score(opening, truth.articulation.opening)
    silent = lip_score(opening, truth.articulation.opening[::-1].copy())
    assert score.correlation > 0.4
    assert score.correlation > silent.correlation + 0.2
    regions = puppet_regions(truth.identity, 128)
    assert structural_similarity(frames, truth.frames, regions.surroundings).mean() > 0.7


def test_the_demo_is_the_portrait(tiny: AvatarPipeline) -> None:
    portrait = read_picture(DEMO / "portrait.png")
    frames = np.stack(list(tiny.stream(portrait, DEMO / "speech.flac", duration=0.5, seed=1)))
    assert frames.shape == (12, 128, 128, 3)
    fitted = fit_picture(portrait, 128, 128, "crop")[None]
    likeness = signal_to_noise(frames[:1], fitted)[0]
    assert likeness > 20
    assert likeness > signal_to_noise(frames[:1], fitted[:, :, ::-1])[0] + 5  # and it is not mirrored
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0.3  # it moves
