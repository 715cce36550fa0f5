"""Odd but whole files, and damaged ones: what users' recordings are like."""

from __future__ import annotations

import shutil
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clip_folders import write_clip
from command_line import run
from media_files import tone, write_video
from stableavatar.data.clips import FolderClip, clip_length
from stableavatar.data.extract import extract_audio, extract_frames
from stableavatar.data.landmarks import Network
from stableavatar.errors import CheckpointError, InputError
from stableavatar.media.audio import Speech
from stableavatar.media.reading import probe, read_frames, read_frames_at


def late_picture(path: Path, seconds: float, frames: int = 20) -> None:
    """A video whose sound begins before its picture; its tenth frame is white, and clicks."""
    rate = 48_000
    with av.open(str(path), "w") as container:
        picture: Any = container.add_stream("libx264", rate=25)
        picture.width = picture.height = 64
        picture.codec_context.time_base = Fraction(1, 25)
        sound: Any = container.add_stream("aac", rate=rate)
        sound.codec_context.layout = "mono"
        samples = np.zeros((1, round(rate * (seconds + frames / 25))), np.float32)
        samples[0, round(rate * (seconds + 0.4)) :][:200] = 0.9
        block = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = rate, 0, Fraction(1, rate)
        container.mux(sound.encode(block))
        container.mux(sound.encode(None))
        for k in range(frames):
            shown = np.full((64, 64, 3), 255 if k == 10 else 30, np.uint8)
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts, frame.time_base = k + round(seconds * 25), Fraction(1, 25)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))


@pytest.mark.parametrize("seconds", [0.0, 0.4])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_and_sound_that_are_extracted_are_in_step(tmp_path: Path, suffix: str, seconds: float) -> None:
    video = tmp_path / f"late{suffix}"
    late_picture(video, seconds)
    extract_audio(video, tmp_path / "late.wav")
    count = extract_frames(video, tmp_path / "frames")
    pictures = [np.asarray(Image.open(tmp_path / "frames" / f"frame_{k}.png")) for k in range(count)]
    (white,) = [k for k, picture in enumerate(pictures) if picture.mean() > 200]
    with Speech.open(tmp_path / "late.wav") as speech:
        click = int(np.argmax(np.abs(speech.samples(0, len(speech))))) / 16_000
    assert white == 10
    assert click == pytest.approx(0.4, abs=0.002)


def cut_by_copying(source: Path, target: Path, seconds: Fraction) -> None:
    """As `ffmpeg -ss SECONDS -c copy` does: what lies before is there, and an edit list hides it."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        streams = {stream.index: container.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            if packet.dts is None or packet.pts is None:
                continue
            shift = round(seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            if packet.stream.type == "video" or packet.pts >= 0:
                packet.stream = streams[packet.stream.index]
                container.mux(packet)


def test_what_an_edit_list_hides_is_not_missing(tmp_path: Path) -> None:
    frames = [np.full((64, 64, 3), 2 * k, np.uint8) for k in range(100)]
    write_video(tmp_path / "whole.mp4", frames, tone(4.0, 48_000))
    clip = tmp_path / "speech" / "00001"
    clip.mkdir(parents=True)
    cut_by_copying(tmp_path / "whole.mp4", clip / "sub_clip.mp4", Fraction(1, 2))
    shown = len(list(read_frames(clip / "sub_clip.mp4")))
    with av.open(str(clip / "sub_clip.mp4")) as container:
        assert container.streams.video[0].frames == 100 > shown > 80
    assert clip_length(clip) == shown == probe(clip / "sub_clip.mp4").frames
    assert len(FolderClip.open(clip).read_frames(shown - 9, 9)) == 9


def test_what_an_edit_list_leaves_out_far_from_a_key_frame_is_not_missing(tmp_path: Path) -> None:
    """Packets that it leaves out are not even read, and the header still counts them."""
    path = tmp_path / "trimmed.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "10", "bf": "0"})
        stream.width = stream.height = 64
        for k in range(100):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 2 * k, np.uint8))))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    place = content.index(b"elst")
    length, start, _ = struct.unpack(">III", content[place + 12 : place + 24])
    ticks = 12_800 // 25  # of the track's clock, a frame
    content[place + 12 : place + 20] = struct.pack(">II", length * 40 // 100, start + 60 * ticks)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 100
    shown = [int(frame.mean()) for _, frame in read_frames_at(path, Fraction(25))]
    assert len(shown) == 40
    assert shown[0] == pytest.approx(120, abs=3)


def test_a_file_that_is_cut_off_is_still_told(tmp_path: Path) -> None:
    frames = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8) for k in range(50)]
    write_video(tmp_path / "whole.mp4", frames, tone(2.0, 48_000))
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match=r"cut\.mp4"):
        list(read_frames(tmp_path / "cut.mp4"))


def test_a_video_is_not_replaced_by_its_own_sound(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [np.zeros((64, 64, 3), np.uint8)] * 10, tone(0.4, 48_000))
    before = (tmp_path / "a.mp4").read_bytes()
    done = run("extract-audio", "--video", tmp_path / "a.mp4", "-o", tmp_path / "a.mp4")
    assert done.exit_code == 2
    assert "is the recording itself" in " ".join(done.output.split())
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_picture_with_a_changed_byte_is_named(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "speech" / "00001", frames=9)
    clip = FolderClip.open(folder)
    file = folder / "images" / "frame_4.png"
    content = bytearray(file.read_bytes())
    content[29] ^= 0xFF  # a check sum
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"images/frame_4\.png"):
        clip.read_frames(0, 9)


def test_a_clip_without_a_frame_is_named(tmp_path: Path) -> None:
    from stableavatar.data.extract import extract_masks

    folder = write_clip(tmp_path / "speech" / "00001", frames=9)
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    unused: Any = None
    with pytest.raises(InputError, match="holds no frame"):
        extract_masks(unused, folder)


def test_a_damaged_network_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="in the extra prepare")
    (tmp_path / "face.tflite").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"face\.tflite is damaged"):
        Network(tmp_path / "face.tflite")


@pytest.mark.parametrize(
    ("transfer", "flags", "what"),
    [("arib-std-b67", 0, r"HDR \(HLG\)"), ("smpte2084", 0, r"HDR \(PQ\)"), ("bt709", 1 << 18, "interlaced")],
)
def test_pictures_that_are_not_to_be_learned_as_they_are(
    tmp_path: Path, transfer: str, flags: int, what: str
) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        options = {"x264-params": f"transfer={transfer}{':tff=1' if flags else ''}"}
        stream: Any = container.add_stream("libx264", rate=25, options=options)
        stream.width = stream.height = 64
        stream.codec_context.flags |= flags
        for k in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 9 * k, np.uint8))))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match=what):
        next(read_frames_at(path, Fraction(25)))
    assert len(list(read_frames(path))) == 5  # a portrait may be taken out of it


def test_of_two_sounds_picture_and_sound_count_from_the_same(tmp_path: Path) -> None:
    """The better one begins with the picture; the other one began half a second before."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        sounds: list[Any] = [container.add_stream("pcm_s16le", rate=rate) for rate in (8000, 48_000)]
        picture: Any = container.add_stream("libx264", rate=25)
        picture.width = picture.height = 64
        for sound in sounds:
            sound.codec_context.layout = "mono"
        for sound, begin in zip(sounds, (0.0, 0.5), strict=True):
            block = av.AudioFrame.from_ndarray(np.zeros((1, sound.rate), np.int16), "s16", "mono")
            block.sample_rate, block.time_base = sound.rate, Fraction(1, sound.rate)
            block.pts = round(begin * sound.rate)
            container.mux(sound.encode(block))
        for k in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 9 * k, np.uint8))
            frame.pts, frame.time_base = 500 + 40 * k, Fraction(1, 1000)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
    with Speech.open(path) as speech:
        assert speech.seconds == pytest.approx(1, abs=0.03)
    assert next(read_frames_at(path, Fraction(25)))[0] <= 1  # and not 12 frames later than its sound
