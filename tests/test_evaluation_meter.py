"""The meter of the mouth reads puppets, photographs and expressions."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from puppet_frames import blurred, still, talking_photograph
from stableavatar.data.puppets import (
    EVALUATION_SEED,
    PuppetClip,
    make_clip,
)
from stableavatar.errors import CheckpointError
from stableavatar.evaluation.expression import corner_lift, read_expression
from stableavatar.evaluation.lips import correlate, lip_score
from stableavatar.evaluation.meter import METER_FILE, MouthMeter, read_meter
from stableavatar.evaluation.pictures import shifted


def test_meter_reads_unseen_puppets(meter: MouthMeter, clips: list[PuppetClip]) -> None:
    scores = [correlate(meter.measure(clip.frames).opening, clip.articulation.opening) for clip in clips]
    assert np.median(scores) >= 0.95
    amplitudes = [lip_score(meter.measure(c.frames).opening, c.articulation.opening).amplitude for c in clips]
    assert 0.8 < np.median(amplitudes) < 1.2


def test_meter_does_not_mind_place_blur_and_size(meter: MouthMeter, clips: list[PuppetClip]) -> None:
    def median(change) -> float:
        return float(
            np.median(
                [correlate(meter.measure(change(c.frames)).opening, c.articulation.opening) for c in clips]
            )
        )

    assert median(partial(shifted, right=7, down=-6)) > 0.94
    assert median(partial(blurred, sigma=1.5)) > 0.94
    double = partial(np.repeat, repeats=2, axis=1)
    assert median(lambda frames: np.repeat(double(frames), 2, axis=2)) > 0.96
    assert median(lambda frames: frames.mean(axis=-1, keepdims=True).repeat(3, -1).astype(np.uint8)) > 0.88


def test_meter_finds_the_mouth(meter: MouthMeter, clip: PuppetClip) -> None:
    rows, columns = np.nonzero(clip.lip_masks[0])
    place = meter.measure(clip.frames[:1]).centre[0] * 128
    assert abs(place[0] - columns.mean()) < 5
    assert abs(place[1] - rows.mean()) < 5


def test_meter_on_stills_and_wrong_speech(meter: MouthMeter, clips: list[PuppetClip]) -> None:
    first, second = clips[0], clips[1]
    assert lip_score(meter.measure(still(first)).opening, first.articulation.opening).correlation == 0
    wrong = lip_score(meter.measure(first.frames).opening, second.articulation.opening)
    assert wrong.correlation < 0.4


def test_meter_reads_a_photograph_whose_mouth_is_opened(meter: MouthMeter, clip: PuppetClip) -> None:
    opening = clip.articulation.opening
    measured = meter.measure(talking_photograph(opening)).opening
    assert lip_score(measured, opening).correlation > 0.8


def test_meter_weights_are_small_and_checked(tmp_path: Path, meter: MouthMeter) -> None:
    assert METER_FILE.stat().st_size <= 300_000
    with pytest.raises(CheckpointError, match=r"stableavatar\.training\.tiny\.meter"):
        read_meter(tmp_path / "none.safetensors")
    MouthMeter(channels=(16, 48, 64)).save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        read_meter(tmp_path / "other.safetensors")
    meter.save(tmp_path / "same.safetensors")
    frames = np.random.default_rng(0).integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    again = read_meter(tmp_path / "same.safetensors").measure(frames)
    np.testing.assert_array_equal(again.opening, meter.measure(frames).opening)
    with pytest.raises(ValueError, match="the meter reads"):
        meter.measure(frames[0])


# Expression.


def test_smiling_and_serious_are_told_apart(meter: MouthMeter) -> None:
    for index in (2, 6):
        for expression in ("smiling", "serious"):
            clip = make_clip(EVALUATION_SEED + index, 2.0, expression=expression)
            at_rest = float(meter.measure(clip.portrait[None]).smile[0])
            assert read_expression(meter.measure(clip.frames), at_rest) == expression


def test_corners_are_held_against_their_place_at_rest(meter: MouthMeter) -> None:
    """Where the middle between a person's smile and frown lies depends less on the person."""
    plain, above_rest = [], []
    for seed in range(940_000, 940_008):
        clips = [make_clip(seed, 2.0, expression=expression) for expression in ("smiling", "serious")]
        at_rest = float(meter.measure(clips[0].portrait[None]).smile[0])
        mouths = [meter.measure(clip.frames) for clip in clips]
        plain.append(np.mean([corner_lift(mouth, 0.0) for mouth in mouths]))
        above_rest.append(np.mean([corner_lift(mouth, at_rest) for mouth in mouths]))
    assert np.std(above_rest) < 0.85 * np.std(plain)


def test_a_neutral_face_neither_smiles_nor_frowns(meter: MouthMeter) -> None:
    neutral = make_clip(EVALUATION_SEED + 2, 2.0, expression="neutral")
    at_rest = float(meter.measure(neutral.portrait[None]).smile[0])
    assert abs(corner_lift(meter.measure(neutral.frames), at_rest)) < 0.35
