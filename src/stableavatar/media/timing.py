"""Where a video frame lies in a recording: exact, never accumulated (spec 5, fault 7).

At 30 frames a second a frame has 533 1/3 samples of 16 kHz speech: every position is computed anew from the
frame's number as a fraction and rounded once, so that it is never off by more than half a sample.
"""

from fractions import Fraction

from stableavatar.errors import InputError

MAX_FPS = 240
# FFmpeg counts time in fractions of 32 bits; this is exact for every rate that is in use.
MAX_DENOMINATOR = 100_000


def parse_fps(value: str | int | float | Fraction) -> Fraction:
    """The exact frame rate that is meant by `value`: 25, "30", "24000/1001", or 29.97 (which is 30000/1001).

    The decimal forms of the NTSC rates (23.976, 29.97, 59.94, 119.88) stand for k * 1000 / 1001;
    other numbers are taken to the nearest fraction with a denominator of at most 100 000.
    Raises InputError where `value` is no number, or not above 0 and at most 240.
    """
    try:
        fps = Fraction(value) if not isinstance(value, float) else Fraction(repr(value))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(
            f"{value!r} is not a frame rate: give frames a second as 25, 29.97 or 30000/1001"
        ) from error
    fps = fps.limit_denominator(MAX_DENOMINATOR)
    if not 0 < fps <= MAX_FPS:
        raise InputError(f"a frame rate of {value} is out of range: it must be above 0 and at most {MAX_FPS}")
    for nominal in (24, 30, 60, 120):
        exact = Fraction(nominal * 1000, 1001)
        if fps != nominal and abs(fps - exact) < Fraction(1, 200):
            return exact
    return fps


def sample_position(frame: int, sample_rate: int, fps: Fraction) -> int:
    """The sample at which video frame `frame` begins: round(frame * sample_rate / fps), exact."""
    return round(Fraction(frame * sample_rate) / fps)


def frame_count(samples: int, sample_rate: int, fps: Fraction) -> int:
    """How many video frames `samples` of sound fill, to the nearest frame (spec 5, fault 18); may be 0."""
    return round(Fraction(samples, sample_rate) * fps)
