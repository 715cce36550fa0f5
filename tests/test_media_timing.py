"""Frames and samples: exact positions (spec 5, faults 7 and 18)."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableavatar.errors import InputError
from stableavatar.media.timing import frame_count, parse_fps, sample_position

RATES = st.sampled_from(
    [Fraction(25), Fraction(30), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(50)]
)


@pytest.mark.parametrize(
    ("given_fps", "exact"),
    [
        (25, Fraction(25)),
        ("30", Fraction(30)),
        (29.97, Fraction(30000, 1001)),
        ("23.976", Fraction(24000, 1001)),
        ("24000/1001", Fraction(24000, 1001)),
        (12.5, Fraction(25, 2)),
        (Fraction(60), Fraction(60)),
    ],
)
def test_frame_rates(given_fps: int | str | float | Fraction, exact: Fraction) -> None:
    assert parse_fps(given_fps) == exact


@pytest.mark.parametrize("long", ["24.12345678912", 24.12345678912, Fraction(10**12 + 7, 4 * 10**10)])
def test_long_decimals_become_fractions_that_a_file_can_hold(long: str | float | Fraction) -> None:
    fps = parse_fps(long)
    assert fps.denominator <= 100_000
    assert float(fps) == pytest.approx(float(Fraction(long)), abs=1e-5)


@pytest.mark.parametrize("bad", ["fast", 1e-9, "25/0", 0, -25, 1000, float("nan"), float("inf")])
def test_bad_frame_rates(bad: str | float) -> None:
    with pytest.raises(InputError, match="frame rate"):
        parse_fps(bad)


def test_thirty_frames_a_second_do_not_drift() -> None:
    # 1.6 minutes at 533 samples a frame would be 960 samples, about two frames, early.
    assert sample_position(30 * 96, 16000, Fraction(30)) == 16000 * 96
    assert sample_position(30000, 16000, Fraction(30000, 1001)) == 1001 * 16000


@given(st.integers(0, 10**6), st.sampled_from([8000, 16000, 44100, 48000]), RATES)
def test_positions_are_never_off_by_more_than_half_a_sample(frame: int, rate: int, fps: Fraction) -> None:
    position = sample_position(frame, rate, fps)
    assert abs(position - Fraction(frame * rate) / fps) <= Fraction(1, 2)
    assert sample_position(frame + 1, rate, fps) > position


@given(st.integers(0, 10**6), RATES)
def test_a_video_has_the_frames_of_its_sound(frames: int, fps: Fraction) -> None:
    assert frame_count(sample_position(frames, 16000, fps), 16000, fps) == frames


def test_frames_are_counted_to_the_nearest() -> None:
    assert frame_count(319, 16000, Fraction(25)) == 0
    assert frame_count(321, 16000, Fraction(25)) == 1
    assert frame_count(84 * 640, 16000, Fraction(25)) == 84
