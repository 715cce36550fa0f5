"""Frames out and in again: colour, rate, sound in step, and nothing half-written whatever happens."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from media_files import click, tone, write_sound, write_video, write_wav
from stableavatar.errors import InputError
from stableavatar.media import video
from stableavatar.media.audio import Sound
from stableavatar.media.files import check_output
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.media.timing import sample_position
from stableavatar.media.video import FrameWriter, VideoWriter

Frame = NDArray[np.uint8]
SHARED = Path(__file__).parents[2] / "shared" / "samples"


def flat(colour: tuple[int, int, int] = (90, 120, 60), width: int = 64, height: int = 48) -> Frame:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def write(
    path: Path, frames: int = 10, sound: Sound | None = None, fps: Fraction | int = 25, **options: object
) -> Path:
    with VideoWriter(path, 64, 48, fps, sound=sound, **options) as writer:  # type: ignore[arg-type]
        for index in range(frames):
            writer.write(flat((index * 20 % 256, 120, 60)))
        assert writer.frames == frames
    return path


def sound_of(path: Path) -> NDArray[np.float32]:
    return np.concatenate(list(Sound(path).blocks()))


@pytest.mark.parametrize(
    "colour", [(230, 20, 20), (20, 220, 40), (30, 30, 230), (250, 240, 20), (255, 255, 255), (0, 0, 0)]
)
def test_colours_come_back(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None, quality=8) as writer:
        for _ in range(3):
            writer.write(flat(colour))
    for frame in read_frames(tmp_path / "a.mp4"):
        assert np.abs(frame.astype(int) - colour).max() <= 3


def test_the_matrix_is_bt709_and_says_so(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None, quality=4) as writer:
        writer.write(flat((0, 255, 0)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.codec.canonical_name) == ("yuv420p", "h264")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )
        luma = next(container.decode(video=0)).to_ndarray()[:48]
    # 16 + 219 * 0.7152 for pure green; BT.601 would give 145, full range 182.
    assert np.abs(luma.astype(int) - 173).max() <= 2


@pytest.mark.parametrize(("colours", "height"), [((219, 30, 60), 48), ((219, 30, 60), 720)])
def test_untagged_video_is_read_as_players_do(
    tmp_path: Path, colours: tuple[int, int, int], height: int
) -> None:
    matrix = "ITU709" if height >= 720 else "ITU601"
    frame = av.VideoFrame.from_ndarray(flat(colours, 64, height), format="rgb24")
    converted = frame.reformat(format="yuv420p", dst_colorspace=av.video.reformatter.Colorspace[matrix])
    converted.colorspace = 2
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    assert np.abs(next(read_frames(tmp_path / "a.mp4")).astype(int) - colours).max() <= 4


@pytest.mark.parametrize("fps", [25, 30, Fraction(24000, 1001), 29.97, "12.5"])
def test_rate_frames_and_sound_are_exact(tmp_path: Path, fps: Fraction | float | str) -> None:
    sound = Sound.from_array(click(9.0, 44100, 1.5, 2), 44100)
    path = write(tmp_path / "a.mp4", 75, sound, fps)  # type: ignore[arg-type]
    info = probe(path)
    exact = {29.97: Fraction(30000, 1001), "12.5": Fraction(25, 2)}.get(fps, fps)  # type: ignore[arg-type]
    assert (info.width, info.height, info.frames, info.fps) == (64, 48, 75, exact)
    assert (info.sound_rate, info.sound_channels) == (44100, 2)
    assert info.sound_samples == sample_position(75, 44100, Fraction(exact))
    assert info.sound_seconds == pytest.approx(info.seconds, abs=1 / 44100)
    samples = sound_of(path)
    assert np.abs(samples[:, 1]).argmax() == round(1.5 * 44100)
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert times[0] == 0
        assert times[-1] == pytest.approx(float(74 / Fraction(exact)), abs=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 60),
    st.sampled_from([8000, 16000, 24000, 48000, 96000]),
    st.integers(1, 2),
    st.floats(0, 3),
)
def test_sound_is_always_as_long_as_the_picture(
    tmp_path_factory: pytest.TempPathFactory, frames: int, rate: int, channels: int, seconds: float
) -> None:
    path = tmp_path_factory.mktemp("a") / "a.mp4"
    samples = np.full((max(round(seconds * rate), 1), channels), 0.1, np.float32)
    with VideoWriter(path, 16, 16, 30, sound=Sound.from_array(samples, rate), preset="ultrafast") as writer:
        for _ in range(frames):
            writer.write(flat(width=16, height=16))
    info = probe(path)
    assert info.frames == frames
    assert info.sound_samples == sample_position(frames, min(rate, 48000), Fraction(30))


def test_short_sound_is_followed_by_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 50, Sound.from_array(tone(1.0, 48000), 48000))
    samples = sound_of(path)[:, 0]
    assert len(samples) == 96000
    assert np.abs(samples[24000:46000]).max() > 0.4
    assert np.abs(samples[50000:]).max() < 1e-3


def test_the_recording_reaches_the_file(tmp_path: Path) -> None:
    recording = write_wav(tmp_path / "speech.wav", tone(1.0, 44100, 300.0)[:, None].repeat(2, axis=1), 44100)
    path = write(tmp_path / "a.mp4", 25, Sound(recording))
    got, wanted = sound_of(path)[:, 0], tone(1.0, 44100, 300.0)
    assert np.corrcoef(got[2000:42000], wanted[2000:42000])[0, 1] > 0.999


def test_the_index_comes_first_and_the_streams_are_interleaved(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 100, Sound.from_array(tone(4.0, 48000), 48000))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        order = sorted(
            (packet.pos, float(packet.pts * packet.time_base), packet.stream.type)
            for packet in container.demux()
            if packet.size
        )
    sound = [time for _, time, kind in order if kind == "audio"]
    behind = max(
        abs(time - sound[np.searchsorted(sound, time) - 1]) for _, time, kind in order if kind == "video"
    )
    assert behind < 0.1
    first_half = [kind for _, _, kind in order[: len(order) // 2]]
    assert 30 < first_half.count("video") < 70


def test_quality_and_preset_have_an_effect(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)

    def size(**options: object) -> int:
        with VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None, **options) as writer:  # type: ignore[arg-type]
            for frame in noise:
                writer.write(frame)
        return (tmp_path / "a.mp4").stat().st_size

    assert size(quality=10) > 1.3 * size(quality=18) > 1.3 * 1.3 * size(quality=35)
    assert size(preset="ultrafast") != size(preset="slow")


def test_metadata_survives(tmp_path: Path) -> None:
    settings_ = {"seed": "3", "prompt": '他说 "你好" — ünï\n', "long": "x" * 20_000, "steps": "50"}
    path = write(tmp_path / "a.mp4", 3, metadata=settings_)
    assert read_metadata(path) == settings_
    with av.open(str(path)) as container:  # where every other program finds it
        assert json.loads(container.metadata["comment"])["stableavatar"]["seed"] == "3"
    assert "encoder" in read_metadata(write_video(tmp_path / "b.mp4", [flat()]))
    assert "seed" not in read_metadata(write(tmp_path / "c.mp4", 3))


def test_names_with_spaces_and_chinese_and_their_full_length(tmp_path: Path) -> None:
    for name in ("我的 视频 100%d:x.mp4", "长" * 83 + ".mp4", "UPPER.MP4"):
        write(tmp_path / name, 2)
        assert probe(tmp_path / name).frames == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_is_seen_before_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "a.mp4"
    final.write_bytes(b"an earlier video")
    with VideoWriter(final, 64, 48, 25, sound=None) as writer:
        writer.write(flat())
        assert final.read_bytes() == b"an earlier video"
        assert [path.name for path in tmp_path.iterdir() if path != final] == [
            f".a.{os.getpid()}.partial.mp4"
        ]
    assert probe(final).frames == 1
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("frames", [0, 3, 80])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException], frames: int) -> None:
    sound = Sound.from_array(tone(4.0, 16000), 16000)
    with (  # noqa: PT012
        pytest.raises(error),
        VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=sound) as writer,
    ):
        for _ in range(frames):
            writer.write(flat())
        raise error
    assert list(tmp_path.iterdir()) == []


def test_two_programs_with_one_output_do_not_mix(tmp_path: Path) -> None:
    code = """
import sys, numpy as np
from stableavatar.media.video import FrameWriter, VideoWriter
black = np.zeros((48, 64, 3), np.uint8)
with VideoWriter(sys.argv[1] + "/a.mp4", 64, 48, 25, sound=None) as video:
    with FrameWriter(sys.argv[1] + "/b") as frames:
        video.write(black)
        frames.write(black)
"""
    with (
        VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None) as video,
        FrameWriter(tmp_path / "b") as frames,
    ):
        for _ in range(5):
            video.write(flat())
            frames.write(flat())
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert probe(tmp_path / "a.mp4").frames == 1
        assert len(list((tmp_path / "b").iterdir())) == 1
        (tmp_path / "b" / "frame_000000.png").unlink()
    assert probe(tmp_path / "a.mp4").frames == 5
    assert len(list((tmp_path / "b").iterdir())) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b"}


def test_no_frame_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no frame"):
        write(tmp_path / "a.mp4", 0)
    assert list(tmp_path.iterdir()) == []


def test_sound_that_turns_out_bad_leaves_nothing(tmp_path: Path) -> None:
    recording = write_sound(tmp_path / "cut.wav", tone(2.0, 16000), 16000, "pcm_s16le")
    recording.write_bytes(recording.read_bytes()[:30_000])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="cut off"):
        write(tmp_path / "out" / "a.mp4", 60, Sound(recording))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing/a.mp4", "no folder"),
        ("a.avi", "MP4"),
        ("a", "MP4"),
        ("folder.mp4", "is a folder"),
        (".", "is a folder"),
        ("file.txt/a.mp4", "no folder"),
    ],
)
def test_output_that_cannot_be(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match=words):
        check_output(tmp_path / path)
    with pytest.raises(InputError, match=words):
        VideoWriter(tmp_path / path, 64, 48, 25, sound=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": 52}, "quality"),
        ({"quality": -1}, "quality"),
        ({"quality": 18.5}, "quality"),
        ({"preset": "quick"}, "ultrafast.*veryslow"),
        ({"width": 63}, "even"),
        ({"height": 0}, "even"),
        ({"fps": 0}, "frame rate"),
    ],
)
def test_options_that_do_not_exist(tmp_path: Path, options: dict[str, object], words: str) -> None:
    arguments = {"width": 64, "height": 48, "fps": 25, "sound": None, **options}
    with pytest.raises(InputError, match=words):
        VideoWriter(tmp_path / "a.mp4", **arguments)  # type: ignore[arg-type]


def test_frames_of_another_kind(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None)
    with pytest.raises(ValueError, match="context"):
        writer.write(flat())
    for bad in (flat(width=32), flat().astype(np.float32), flat()[..., 0]):
        with (
            pytest.raises(ValueError, match="uint8"),
            VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None) as w,
        ):
            w.write(bad)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_frames_of_any_memory_layout(tmp_path: Path) -> None:
    frame = np.zeros((48, 128, 3), np.uint8)
    frame[:, :64] = (200, 100, 50)
    with VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None, quality=8) as writer:
        writer.write(frame[:, :64])
        writer.write(np.asfortranarray(frame[:, :64]))
    for read in read_frames(tmp_path / "a.mp4"):
        assert np.abs(read.astype(int) - (200, 100, 50)).max() <= 3


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    code = """
import resource, sys, numpy as np
from stableavatar.media.video import VideoWriter
from stableavatar.media.audio import Sound
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
sound = Sound.from_array(np.random.default_rng(0).normal(size=16000 * 130).astype(np.float32) * 0.1, 16000)
frame = np.zeros((128, 128, 3), np.uint8)
with VideoWriter(sys.argv[1], 128, 128, 25, sound=sound, preset="ultrafast") as writer:
    for i in range(3000):
        frame[:] = i % 251
        writer.write(frame)
        if i == 300:
            before = rss()
    print(rss() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.mp4")], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 6  # 3000 such frames are 147 MB
    assert probe(tmp_path / "a.mp4").frames == 3000


def test_a_photograph_survives(tmp_path: Path) -> None:
    y, x = np.mgrid[:96, :128]
    photograph = np.stack([60 + x, 200 - y, 90 + (x + y) // 4], axis=-1).astype(np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 128, 96, 25, sound=None, quality=2) as writer:
        writer.write(photograph)
    difference = next(read_frames(tmp_path / "a.mp4")).astype(float) - photograph
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.3


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_videos_are_read_upright(tmp_path: Path, rotation: int) -> None:
    stored = flat((20, 20, 20), 96, 64)
    stored[:16, :16] = 255
    path = write_video(tmp_path / "a.mp4", [stored], rotation=rotation)
    frame = next(read_frames(path))
    wanted = np.rot90(stored, rotation // 90)
    assert frame.shape == wanted.shape
    assert np.abs(frame.astype(int) - wanted).mean() < 6
    assert (probe(path).height, probe(path).width) == wanted.shape[:2]


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [flat()], aspect=Fraction(3, 2))
    assert next(read_frames(path)).shape == (48, 96, 3)


def _empty(folder: Path) -> Path:
    (folder / "bad.mp4").touch()
    return folder / "bad.mp4"


def _picture(folder: Path) -> Path:
    Image.fromarray(flat()).save(folder / "bad.png")
    return folder / "bad.png"


def _recording(folder: Path) -> Path:
    return write_wav(folder / "bad.wav", tone(0.5, 16000), 16000)


def _cut(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
    with VideoWriter(folder / "bad.mp4", 64, 48, 25, sound=None) as writer:
        for frame in noise:
            writer.write(frame)
    data = (folder / "bad.mp4").read_bytes()
    (folder / "bad.mp4").write_bytes(data[: len(data) // 2])
    return folder / "bad.mp4"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "bad.mp4", "no such file"),
        (_empty, "empty"),
        (_picture, "no moving picture"),
        (_recording, "no moving picture"),
        (_cut, "damaged|cut off"),
    ],
)
def test_what_is_no_video(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(read_frames(make(tmp_path)))


def test_frames_as_pictures(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    folder = tmp_path / "帧 frames"
    with FrameWriter(folder) as writer:
        for frame in noise:
            writer.write(frame)
        assert not folder.exists()
        assert writer.frames == 3
    assert sorted(path.name for path in folder.iterdir()) == [f"frame_{index:06d}.png" for index in range(3)]
    for index, frame in enumerate(noise):
        assert np.array_equal(np.asarray(Image.open(folder / f"frame_{index:06d}.png")), frame)
    with pytest.raises(InputError, match="not empty"):
        FrameWriter(folder)
    with pytest.raises(InputError, match="no folder"):
        FrameWriter(tmp_path / "missing" / "frames")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file of this name"):
        FrameWriter(tmp_path / "file")


def test_what_lies_among_the_pictures_that_were_made_is_removed(tmp_path: Path) -> None:
    there = tmp_path / ".pictures"
    there.mkdir()
    for number in (0, 1, 2):
        Image.fromarray(flat()).save(there / f"frame_{number:06d}.png")
    (there / "frame_0.png").touch()
    with FrameWriter(tmp_path / "frames", partial=there, done=2):
        assert sorted(path.name for path in there.glob("frame*")) == ["frame_000000.png", "frame_000001.png"]
    (tmp_path / "frames").rename(there)
    with pytest.raises(InputError, match="are missing"), FrameWriter(tmp_path / "f", partial=there, done=3):
        pass


def test_pictures_whose_numbers_have_more_digits_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after frame_999999.png: names are not in the order of their numbers any more."""
    monkeypatch.setattr(video, "_picture_name", lambda number: f"frame_{number}.png")
    there = tmp_path / ".pictures"
    there.mkdir()
    for number in range(13):
        Image.fromarray(flat()).save(there / f"frame_{number}.png")
    with FrameWriter(tmp_path / "frames", partial=there, done=11) as writer:
        assert not (there / "frame_11.png").exists()
        writer.write(flat())
    assert len(list((tmp_path / "frames").iterdir())) == 12


def test_failed_frames_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        FrameWriter(tmp_path / "frames") as writer,
    ):
        writer.write(flat())
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [tmp_path / "frames"]
    assert list((tmp_path / "frames").iterdir()) == []
    with FrameWriter(tmp_path / "frames") as writer:
        writer.write(flat())
    assert len(list((tmp_path / "frames").iterdir())) == 1


def test_both_writers_are_sinks(tmp_path: Path) -> None:
    sinks: list[VideoWriter | FrameWriter] = [
        VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None),
        FrameWriter(tmp_path / "f"),
    ]
    for sink in sinks:
        with sink:
            sink.write(flat())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "f"]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample clips are not beside the checkout")
def test_sample_clips() -> None:
    for path in sorted((SHARED / "clips").iterdir()):
        info = probe(path)
        assert (info.width, info.height, info.fps) == (1080, 1920, 25)
        assert info.sound_seconds == pytest.approx(info.seconds, abs=0.1)
        assert next(read_frames(path)).std() > 20
