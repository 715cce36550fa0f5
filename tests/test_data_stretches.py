"""Stretches of raw videos: what is one shot of one person before a still background, and what is not."""

import errno
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from raw_videos import SHORT, SIZE, Frames, empty, needs_networks, puppet, video
from stableavatar.data.landmarks import FaceLandmarker
from stableavatar.data.stretches import (
    PassingError,
    PrepareSettings,
    Stretch,
    find_stretches,
    judge,
    refuse_passing,
)
from stableavatar.errors import InputError
from stableavatar.media.audio import SPEECH_RATE, SoundTape
from stableavatar.media.reading import read_frames_at

pytestmark = needs_networks


@pytest.fixture(scope="module")
def landmarker() -> FaceLandmarker:
    return FaceLandmarker()


def stretches(path: Path, landmarker: FaceLandmarker, settings: PrepareSettings = SHORT) -> list[Stretch]:
    heard = SoundTape(path, SPEECH_RATE)
    return [judge(it, heard, settings) for it in find_stretches(path, landmarker, settings)]


def spans(found: list[Stretch]) -> list[tuple[int, int, str | None]]:
    return [(it.start, it.stop, it.reason) for it in found]


def test_shots_and_what_shows_no_face(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    path = video(
        tmp_path / "a.mp4", [puppet(950_000, 1.0), puppet(950_004, 0.8), empty(0.4), puppet(950_002, 0.2)]
    )
    found = spans(stretches(path, landmarker))
    assert found == [(0, 25, None), (25, 45, None), (45, 55, "no face"), (55, 60, "only 0.2 s")]


def test_people_before_one_backdrop_and_what_was_taken_out(
    tmp_path: Path, landmarker: FaceLandmarker
) -> None:
    """Most of the picture stays the same there, but for the face."""

    def before_the_wall(person: Frames, left: int) -> Frames:
        room = np.full((len(person), SIZE, 5 * SIZE, 3), 20, np.uint8)
        room[:, :, left : left + SIZE] = person
        return room

    one, other = puppet(950_000, 1.6), puppet(950_004, 0.8)
    shots = [
        before_the_wall(one[:20], 2 * SIZE),
        before_the_wall(other, 2 * SIZE),  # another person in the same place
        before_the_wall(one[20:], 2 * SIZE + 60),  # the same person, elsewhere
        before_the_wall(one[20:], 2 * SIZE + 90),  # and moved by less than their width
    ]
    found = spans(stretches(video(tmp_path / "a.mp4", shots), landmarker))
    assert found == [(0, 20, None), (20, 40, None), (40, 60, None), (60, 80, None)]


def test_long_stretches_are_cut_and_nothing_lies_between(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    path = video(tmp_path / "a.mp4", [puppet(950_003, 2.6)])
    settings = PrepareSettings(least_seconds=0.5, most_seconds=1.0)
    assert spans(stretches(path, landmarker, settings)) == [(0, 25, None), (25, 50, None), (50, 65, None)]


def test_two_people_a_moving_background_no_sound(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    one, other = puppet(950_004, 1.0), puppet(950_005, 1.0)
    path = video(tmp_path / "two.mp4", [np.concatenate([one, other], axis=2)])
    assert spans(stretches(path, landmarker)) == [(0, 25, "more than one face")]

    # The other one comes between two looks for further faces, and with no cut.
    there = np.clip((np.arange(25) - 13) / 10, 0, 1)[:, None, None, None]
    joined = np.concatenate([one, (there * other + (1 - there) * 90).astype(np.uint8)], axis=2)
    found = spans(stretches(video(tmp_path / "joined.mp4", [joined]), landmarker))
    assert [reason for *_, reason in found] == [None, "more than one face"]
    assert found[0][1] == found[1][0] <= 14
    assert found[1][1] == 25

    blocks = np.random.default_rng(0).integers(0, 2, (4, 24), dtype=np.uint8) * 200
    wall = np.kron(blocks, np.ones((SIZE // 4, 6 * SIZE // 24), np.uint8))
    moving = np.stack([np.roll(wall, 6 * k, axis=1) for k in range(25)])[..., None].repeat(3, -1)
    moving[:, :, 300 : 300 + SIZE] = one
    (found,) = stretches(video(tmp_path / "moving.mp4", [moving]), landmarker)
    assert "the background moves" in str(found.reason)
    still = np.broadcast_to(wall[None, ..., None], (25, SIZE, 6 * SIZE, 3)).copy()
    still[:, :, 300 : 300 + SIZE] = one
    assert spans(stretches(video(tmp_path / "still.mp4", [still]), landmarker)) == [(0, 25, None)]

    (found,) = stretches(video(tmp_path / "silent.mp4", [one], sound=False), landmarker)
    assert "no sound" in str(found.reason)


def test_a_length_is_rounded_to_frames(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    """4.6 s of 25 frames are 114.99999999999999 in floating point, and 115."""
    path = video(tmp_path / "a.mp4", [puppet(950_003, 4.7)])
    settings = PrepareSettings(least_seconds=4.6, most_seconds=4.6)
    assert spans(stretches(path, landmarker, settings))[0] == (0, 115, None)


def test_a_small_face_is_dropped(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    path = video(tmp_path / "a.mp4", [puppet(950_006, 1.0)])
    settings = PrepareSettings(least_seconds=0.5, least_face=0.99)
    (found,) = stretches(path, landmarker, settings)
    assert "the face is small" in str(found.reason)


@pytest.mark.parametrize("rate", [25, 50, 20, Fraction(30000, 1001)])
def test_frames_at_another_rate(tmp_path: Path, rate: int | Fraction) -> None:
    """Every frame is the one that is nearest in time, and none is missing at the end."""
    count = round(2 * Fraction(rate))
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"qp": "0"})
        stream.width = stream.height = 32
        for k in range(count):
            picture = np.full((32, 32, 3), 20 + 20 * (k % 10), np.uint8)
            picture[:, 16:] = 20 + 20 * (k // 10)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    found = list(read_frames_at(path, Fraction(25)))
    assert [number for number, _ in found] == list(range(50))
    for number, frame in found:
        ones, tens = (round((half.mean() - 20) / 20) for half in (frame[:, 2:14], frame[:, 18:30]))
        shown = 10 * tens + ones
        assert abs(shown / float(rate) - number / 25) <= 0.5 / float(rate) + 0.01


def test_settings_that_cannot_be() -> None:
    with pytest.raises(InputError, match="kind"):
        PrepareSettings(kind="whispering")
    with pytest.raises(InputError, match="not possible"):
        PrepareSettings(least_seconds=3, most_seconds=2)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"most_seconds": float("inf")}, "finite"),
        ({"least_face": 5.0}, "least_face"),
        ({"least_face": float("nan")}, "least_face"),
        ({"most_motion": float("nan")}, "most_motion"),
        ({"prompt": "  "}, "prompt is empty"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        PrepareSettings(**values)


def test_flashes_that_go_on_are_no_cuts(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    """A cut at their beginning is one; what follows is kept."""
    still = np.repeat(puppet(950_000, 0.2)[:1], 60, axis=0)
    flashing = still.copy()
    flashing[20::2] = np.clip(still[20::2].astype(int) + 90, 0, 255)
    found = stretches(video(tmp_path / "a.mp4", [flashing]), landmarker)
    assert max(it.stop - it.start for it in found) >= 25


def test_what_a_disk_does_not_give_just_now_is_not_the_video_s_doing() -> None:
    def failed(number: int) -> InputError:
        error = InputError("video a.mp4: damaged after 3.0 s")
        error.__cause__ = OSError(number, "no")
        return error

    refuse_passing(failed(errno.EINVAL))
    with pytest.raises(PassingError, match=r"a\.mp4"):
        refuse_passing(failed(errno.EIO))


def test_photographs_and_a_picture_that_hangs(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    """They would be learned as faces that are still while they talk."""
    person = puppet(950_000, 2.0)
    photograph = np.repeat(person[:1], 50, axis=0)
    hangs = [person[:25], np.repeat(person[24:25], 25, axis=0), person[25:]]
    paths = [video(tmp_path / f"{k}.mp4", parts) for k, parts in enumerate([[photograph], hangs])]
    assert spans(stretches(paths[0], landmarker)) == [(0, 50, "the picture stands still")]
    first, still, last = stretches(paths[1], landmarker)
    assert (first.start, first.reason, last.stop, last.reason) == (0, None, 75, None)
    assert still.reason == "the picture stands still"
    assert 24 <= still.start <= 36  # the encoder mends its picture for a while
    assert still.stop == pytest.approx(50, abs=1)
    assert (first.stop, last.start) == (still.start, still.stop)

    large = np.asarray(Image.fromarray(person[0]).resize((2 * SIZE, 2 * SIZE)))
    nearer = [large[k : 2 * SIZE - k, k : 2 * SIZE - k] for k in range(40)]
    shown = [np.asarray(Image.fromarray(it).resize((SIZE, SIZE))) for it in nearer]
    (moved,) = stretches(video(tmp_path / "moved.mp4", [np.stack(shown)]), landmarker)
    assert moved.reason == "the mouth does not move"
    dancing = replace(SHORT, kind="dancing")  # where nobody needs to speak
    heard = SoundTape(tmp_path / "moved.mp4", SPEECH_RATE)
    assert judge(replace(moved, reason=None), heard, dancing).reason is None


def test_a_hole_in_the_picture_is_none_of_a_clip(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    """As of a camera that gave nothing for a while, and whose sound went on."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = SIZE
        for k, picture in enumerate(puppet(950_000, 2.0)):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = k if k < 25 else k + 25, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = spans(list(find_stretches(path, landmarker, SHORT)))
    still = "the picture stands still"
    assert found == [(0, 24, None), (24, 38, still), (38, 51, still), (51, 75, None)]


def test_of_joined_recordings_the_first_is_kept(tmp_path: Path, landmarker: FaceLandmarker) -> None:
    """Their time stamps begin again: the sound of what comes then is not that of its picture."""
    parts = [video(tmp_path / f"{k}.ts", [puppet(950_003 + k, 1.6)]) for k in (0, 1)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(path.read_bytes() for path in parts))
    first, rest = stretches(joined, landmarker)
    assert first.reason is None
    assert first.stop == pytest.approx(40, abs=2)
    assert rest.start == rest.stop == first.stop
    assert "its time stamps go back at 1.6 s" in str(rest.reason)


def test_frames_that_are_a_little_out_of_order_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25, options={"qmin": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for k in range(20):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * k, np.uint8))):
                packet.pts, packet.dts = (k ^ 1) + 1, k
                container.mux(packet)
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux() if packet.size]
    assert stamps != sorted(stamps)
    assert [number for number, _ in read_frames_at(path, Fraction(25))][:18] == list(range(18))


def test_of_avi_whose_stamps_are_guessed_all_is_read(tmp_path: Path) -> None:
    """It has no presentation times: frames between others come with stamps that go back a little."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = SIZE
        for picture in puppet(950_000, 2.0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        stamps = [float(frame.time) for frame in container.decode(video=0)]
    assert min(np.diff(stamps)) < -1 / 25
    assert len(list(read_frames_at(path, Fraction(25)))) == pytest.approx(50, abs=2)
