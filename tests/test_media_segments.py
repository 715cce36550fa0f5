"""Segments joined to one video: every frame in its place, with the sound, at every rate and preset."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stableavatar.errors import InputError
from stableavatar.media.audio import Sound
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.media.segments import SegmentWriter
from stableavatar.media.video import PRESETS

WIDTH, HEIGHT, BITS = 128, 32, 8


def numbered(number: int) -> np.ndarray:
    """A frame that carries its number as light and dark fields, over a texture that moves."""
    rng = np.random.default_rng(7)
    frame = np.roll(rng.integers(90, 166, (HEIGHT, WIDTH, 3), dtype=np.uint8), 3 * number, axis=1)
    for bit in range(BITS):
        frame[8:24, 16 * bit + 2 : 16 * bit + 14] = 230 if number >> bit & 1 else 20
    return frame


def number_of(frame: np.ndarray) -> int:
    fields = [frame[12:20, 16 * bit + 5 : 16 * bit + 11].mean() for bit in range(BITS)]
    assert all(field < 90 or field > 160 for field in fields)
    return sum((field > 125) << bit for bit, field in enumerate(fields))


def write(
    folder: Path, lengths: list[int], fps: Fraction = Fraction(25), preset: str = "medium"
) -> SegmentWriter:
    writer = SegmentWriter(folder, WIDTH, HEIGHT, fps, quality=18, preset=preset)
    for length in lengths:
        for _ in range(length):
            writer.write(numbered(writer.frames))
        writer.cut()
    return writer


def times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.pts * stream.time_base for frame in container.decode(stream)]


@pytest.mark.parametrize("preset", PRESETS)
def test_frames_are_in_their_places_at_every_preset(tmp_path: Path, preset: str) -> None:
    writer = write(tmp_path, [24, 1, 1, 2, 3, 30], preset=preset)
    writer.join(tmp_path / "out.mp4", sound=None)
    assert [number_of(frame) for frame in read_frames(tmp_path / "out.mp4")] == list(range(61))
    assert times(tmp_path / "out.mp4") == [Fraction(number, 25) for number in range(61)]


@pytest.mark.parametrize("fps", [Fraction(24), Fraction(30000, 1001), Fraction(25)])
def test_the_sound_begins_and_ends_with_the_picture(tmp_path: Path, fps: Fraction) -> None:
    rate, count = 22050, 75
    samples = np.zeros((round(count / fps * rate), 2), dtype=np.float32)
    clicks = [round(number / fps * rate) for number in (10, 40, 70)]
    for click in clicks:
        samples[click : click + 200] = 0.9
    writer = write(tmp_path, [24, 24, 27], fps)
    path = tmp_path / "out.mp4"
    writer.join(path, sound=Sound.from_array(samples, rate), metadata={"a": "b"})
    info = probe(path)
    assert (info.frames, info.fps) == (count, fps)
    assert info.sound_seconds == pytest.approx(float(count / fps), abs=1e-3)
    heard = np.concatenate(list(Sound(path).blocks()))[:, 0]
    for click in clicks:
        near = np.abs(heard[click - 400 : click + 400])
        assert abs(int(np.argmax(near > 0.4)) - 400) < 40
    assert read_metadata(path) == {"a": "b"}


def test_a_segment_does_not_depend_on_the_ones_before(tmp_path: Path) -> None:
    """Written by a run that went on after the first one, the second is the same file."""
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", [20, 30])
    write(tmp_path / "resumed", [20])
    resumed = SegmentWriter(
        tmp_path / "resumed", WIDTH, HEIGHT, Fraction(25), quality=18, preset="medium", segments=1, frames=20
    )
    for number in range(20, 50):
        resumed.write(numbered(number))
    resumed.cut()
    second = "segment-000001.mp4"
    assert (tmp_path / "whole" / second).read_bytes() == (tmp_path / "resumed" / second).read_bytes()
    assert (resumed.segments, resumed.frames) == (2, 50)


def test_what_is_open_is_not_a_segment(tmp_path: Path) -> None:
    writer = write(tmp_path, [5])
    writer.cut()  # nothing to close
    writer.write(numbered(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["segment-000000.mp4", "unfinished.mp4"]
    writer.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["segment-000000.mp4"]


def test_no_frame_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no frame"):
        write(tmp_path, []).join(tmp_path / "out.mp4", sound=None)
