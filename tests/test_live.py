"""Speech that is still arriving: the same video as of the whole recording, and frames before its end."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from command_line import QUICK, portrait, run, toy_model
from media_files import write_wav
from stableavatar.errors import InputError, StoppedError
from stableavatar.generation import Progress
from stableavatar.media.audio import Sound, Speech
from stableavatar.media.decoding import BLOCK, stream_sound
from stableavatar.media.image import read_picture
from stableavatar.media.live import LiveRecording, follow_speech, read_live
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.options import OutputOptions
from stableavatar.pipeline import AvatarPipeline
from toy import toy_pipeline

PICTURE = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
SMALL = {"steps": 2, "seed": 3, "width": 32, "height": 32}


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


def pieces(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return toy_pipeline()


@pytest.mark.parametrize("rate", [16000, 44100, 8000])
@pytest.mark.parametrize("size", [1, 999, 50_000])
def test_arriving_samples_are_those_of_the_whole(rate: int, size: int) -> None:
    samples = noise(rate // 10 if size == 1 else rate)
    whole = Speech.from_array(samples, rate)
    live = LiveRecording(pieces(samples, size), rate)
    assert np.array_equal(live.speech.samples(0, 700), whole.samples(0, 700))
    assert np.array_equal(live.speech.samples(300, 20_000), whole.samples(300, 20_000))
    assert live.speech.length == len(whole)
    sound = np.concatenate(list(live.sound.blocks()))
    assert live.sound.sample_rate == Sound.from_array(samples, rate).sample_rate
    assert np.array_equal(sound, np.concatenate(list(Sound.from_array(samples, rate).blocks())))


def test_no_more_is_read_than_is_needed_and_the_past_is_let_go() -> None:
    taken: list[int] = []

    def source() -> Iterator[np.ndarray]:
        for index in range(10_000):
            taken.append(index)
            yield noise(160)

    live = LiveRecording(source(), 16000)
    sound = live.sound.blocks()
    most = 0
    for second in range(20):
        live.speech.samples(16000 * second, 16000 * (second + 1))
        assert len(taken) == 100 * (second + 1)
        while sum(len(block) for block in live.sound._waiting):
            next(sound)
        most = max(most, sum(len(part) for part in live.speech._parts))
    assert most <= 16000 + 160
    with pytest.raises(ValueError, match="the first that is kept"):
        live.speech.samples(0, 100)


def test_a_duration_cuts_or_is_filled_with_silence() -> None:
    live = LiveRecording(pieces(noise(16000), 700), 16000, duration=0.5)
    assert not live.speech.wait(8001)
    assert live.speech.length == 8000
    live = LiveRecording(pieces(noise(1000), 700), 16000, duration=1.5)
    assert not live.speech.samples(1000, 30_000).any()
    assert live.speech.length == 24_000


@pytest.mark.parametrize(
    ("block", "what"),
    [
        (np.array([0.1, np.nan], np.float32), "no numbers"),
        (np.zeros((2, 3), np.float32), "blocks must be"),
        (np.zeros(4, np.int16), "blocks must be"),
    ],
)
def test_blocks_that_cannot_be_used(block: np.ndarray, what: str) -> None:
    with pytest.raises(InputError, match=what):
        LiveRecording([block]).speech.wait(1)


@pytest.mark.parametrize("order", ["wavefront", "causal"])
@pytest.mark.parametrize("count", [1, 16, 17, 18, 25, 26, 29, 30, 37, 70])
def test_the_video_is_that_of_the_whole_recording(pipeline: AvatarPipeline, order: str, count: int) -> None:
    samples = noise(count * 640 + 123)
    whole = np.stack(list(pipeline.stream(PICTURE, samples, order=order, **SMALL)))
    stream = pipeline.stream(PICTURE, pieces(samples, 777), order=order, **SMALL)
    assert stream.frame_count is None
    assert np.array_equal(np.stack(list(stream)), whole)


def test_frames_come_before_the_end_of_the_speech(pipeline: AvatarPipeline) -> None:
    """In causal order a window's frames need no more speech than its own: 17 frames, of which the last 8 are
    shown after the next one."""
    taken: list[int] = []

    def source() -> Iterator[np.ndarray]:
        while True:  # without end
            taken.append(640)
            yield noise(640)

    stream = pipeline.stream(PICTURE, source(), order="causal", **SMALL)
    seen = []
    for _ in range(60):
        next(stream)
        seen.append(sum(taken) // 640)
    stream.close()
    assert seen[0] == 17
    assert max(have - shown for shown, have in enumerate(seen, 1)) < 17 + 8


class TestFollowedFiles:
    """In causal order a file whose video is watched while it is made is read as it is needed."""

    @pytest.mark.parametrize(
        "options", [{}, {"start": 0.3}, {"duration": 1.3}, {"duration": 0.34}, {"start": 1, "duration": 3}]
    )
    @pytest.mark.parametrize("channels", [1, 2])
    def test_the_video_is_that_of_the_file_read_before(
        self, pipeline: AvatarPipeline, tmp_path: Path, options: dict[str, float], channels: int
    ) -> None:
        path = write_wav(tmp_path / "a.wav", noise(2 * 44_100 * channels).reshape(-1, channels), 44_100)
        followed = pipeline.stream(PICTURE, path, order="causal", **SMALL, **options)
        assert followed.frame_count is None
        with Speech.open(path, **options) as speech:
            samples = speech.samples(0, len(speech))
        if "duration" in options:
            samples = np.concatenate(
                [samples, np.zeros(round(16_000 * options["duration"]) - len(samples), np.float32)]
            )
        whole = pipeline.stream(PICTURE, samples, order="causal", **SMALL)
        assert np.array_equal(np.stack(list(followed)), np.stack(list(whole)))
        written = pipeline.generate(PICTURE, path, tmp_path / "a.mp4", order="causal", **SMALL, **options)
        assert written.frame_count == whole.frame_count

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Samples of every block that was read of a followed file."""
        read: list[int] = []

        def counted(*arguments: Any) -> Iterator[np.ndarray]:
            for block in stream_sound(*arguments):
                read.append(len(block))
                yield block

        monkeypatch.setattr("stableavatar.media.live.stream_sound", counted)
        return read

    def test_the_first_frame_needs_its_window_of_the_file(
        self, pipeline: AvatarPipeline, tmp_path: Path, read: list[int]
    ) -> None:
        path = write_wav(tmp_path / "a.wav", noise(60 * 16_000), 16_000)
        stream = pipeline.stream(PICTURE, path, order="causal", **SMALL)
        assert not read
        next(stream)
        stream.close()
        assert 17 * 640 <= sum(read) < 17 * 640 + 2 * BLOCK

    def test_a_live_video_follows_its_file(
        self, pipeline: AvatarPipeline, tmp_path: Path, read: list[int]
    ) -> None:
        path = write_wav(tmp_path / "a.wav", noise(6 * 16_000), 16_000)
        at_first: list[int] = []

        def watch(progress: Progress) -> None:
            if progress.frame == 1:
                at_first.append(sum(read))

        options = {"order": "causal", "progress": watch, **SMALL}
        made = {}
        for name in ("watched", "whole"):
            encoding = OutputOptions(live=name == "watched", frames=tmp_path / name)
            video = tmp_path / f"{name}.mp4"
            pipeline.generate(PICTURE, path, video, output_options=encoding, **options)
            pictures = [read_picture(file) for file in sorted((tmp_path / name).iterdir())]
            made[name] = (np.stack(pictures), probe(video).sound_samples)
            assert sum(read) == 6 * 16_000
        assert at_first[0] < 17 * 640 + 2 * BLOCK
        assert np.array_equal(made["watched"][0], made["whole"][0])
        # A file that grows cannot say where within its last packet of sound the end is.
        assert 0 <= made["watched"][1] - made["whole"][1] < 1024

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"order": "lockstep"},
            {"order": "causal", "batch_windows": 2},
            {"order": "causal", "compat": "upstream"},
            {"order": "causal", "speech_normalisation": "recording"},
        ],
    )
    def test_what_needs_the_end_reads_the_file_before(
        self, pipeline: AvatarPipeline, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        path = write_wav(tmp_path / "a.wav", noise(16_000), 16_000)
        stream = pipeline.stream(PICTURE, path, **SMALL, **options)
        assert stream.frame_count is not None
        stream.close()

    def test_opposite_phase_is_heard(self, pipeline: AvatarPipeline, tmp_path: Path) -> None:
        samples = noise(40_000)
        path = write_wav(tmp_path / "a.wav", np.stack([samples, -samples], axis=1), 16_000)
        followed = follow_speech(path)
        with Speech.open(path) as speech:
            assert np.array_equal(followed.samples(0, 40_000), speech.samples(0, 40_000))
        assert followed.length is None or followed.length == 40_000

    def test_opposite_phase_is_heard_as_it_arrives(self) -> None:
        samples = noise(40_000)
        both = np.stack([samples, -samples], axis=1)
        recording = LiveRecording(pieces(both, 999), channels=2)
        assert np.array_equal(recording.speech.samples(0, 40_000), samples)
        usual = LiveRecording(pieces(np.stack([samples, noise(40_000, 1)], axis=1), 999), channels=2)
        mean = (samples + noise(40_000, 1)) / 2
        np.testing.assert_allclose(usual.speech.samples(0, 40_000), mean, atol=1e-6)

    def test_a_file_that_is_cut_off_is_said_where_it_ends(
        self, pipeline: AvatarPipeline, tmp_path: Path
    ) -> None:
        path = write_wav(tmp_path / "a.wav", noise(32_000), 16_000)
        path.write_bytes(path.read_bytes()[:40_000])
        stream = pipeline.stream(PICTURE, path, order="causal", **SMALL)
        with pytest.raises(InputError, match="cut off"):
            for _ in stream:
                pass


def test_sound_that_nobody_takes_is_not_kept(
    pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LiveRecording] = []
    begin = LiveRecording.__init__

    def remember(self: LiveRecording, *arguments: object, **options: object) -> None:
        begin(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(LiveRecording, "__init__", remember)
    list(pipeline.stream(PICTURE, pieces(noise(60_000), 500), **SMALL))
    assert not made[0].sound._waiting
    assert sum(len(part) for part in made[0].speech._parts) < 30_000


def test_a_duration_belongs_to_the_recording(pipeline: AvatarPipeline) -> None:
    recording = LiveRecording(pieces(noise(60_000), 500), duration=0.5)
    with pytest.raises(InputError, match="LiveRecording"):
        pipeline.stream(PICTURE, recording, duration=1.0, **SMALL)
    assert len(list(pipeline.stream(PICTURE, recording, **SMALL))) == 12
    assert len(list(pipeline.stream(PICTURE, pieces(noise(60_000), 500), duration=1.0, **SMALL))) == 25


@pytest.mark.parametrize("live", [True, False])
def test_a_live_run_that_is_stopped_leaves_a_file_that_plays(
    pipeline: AvatarPipeline, tmp_path: Path, live: bool
) -> None:
    def source() -> Iterator[np.ndarray]:
        for _ in range(400):
            yield noise(640)

    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 8

    output = tmp_path / "out.mp4"
    with pytest.raises(StoppedError, match=r"out\.mp4 plays the"):
        pipeline.generate(
            PICTURE, source(), output, output_options=OutputOptions(live=live), order="causal", stop=stop,
            **SMALL,
        )  # fmt: skip
    assert len(list(read_frames(output))) > 30


def test_a_live_run_without_a_frame_leaves_nothing(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    output.write_bytes(b"an older video")
    with pytest.raises(InputError, match="shorter than a frame"):
        pipeline.generate(
            PICTURE, iter([noise(100)]), output, output_options=OutputOptions(live=True), **SMALL
        )
    assert output.read_bytes() == b"an older video"


def test_what_arriving_speech_cannot_have(pipeline: AvatarPipeline) -> None:
    for options, what in (
        ({"order": "lockstep"}, "wavefront or causal"),
        ({"compat": "upstream"}, "without compat"),
        ({"order": "causal", "batch_windows": 2}, "batch-windows"),
        ({"start": 1.0}, "start"),
        ({"speech_normalisation": "recording"}, "loudness"),
    ):
        with pytest.raises(InputError, match=what):
            next(pipeline.stream(PICTURE, pieces(noise(20_000), 500), **SMALL, **options))
    with pytest.raises(InputError, match="shorter than a frame"):
        next(pipeline.stream(PICTURE, iter([noise(100)]), **SMALL))


def wav(samples: np.ndarray, path: Path) -> bytes:
    write_wav(path, samples, 16000)
    return path.read_bytes()


class Trickle(io.RawIOBase):
    """A pipe without a descriptor that gives little at a time and cannot seek."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self.data.read(min(size, 100))


def test_a_pipe_is_read_as_wav_or_raw(tmp_path: Path) -> None:
    samples = noise(5000)
    data = wav(samples, tmp_path / "speech.wav")
    raw = (samples * 32768).astype("<i2").tobytes()
    whole = Speech.open(tmp_path / "speech.wav")
    for live in (read_live(Trickle(data)), read_live(Trickle(raw), raw_rate=16000)):
        np.testing.assert_allclose(live.speech.samples(0, 5000), whole.samples(0, 5000), atol=1e-4)
        assert not live.speech.wait(5001)
        assert live.speech.length == 5000
        assert (live.sound.sample_rate, live.sound.channels) == (16000, 1)
    with pytest.raises(InputError, match="raw-rate"):
        read_live(Trickle(b"no sound at all" * 50))


def command(*arguments: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "stableavatar", "generate", *map(str, arguments), "--model",
         str(toy_model()), *QUICK],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_command_plays_while_speech_arrives(tmp_path: Path) -> None:
    """The file has playable frames while the speaker is still speaking, and all of them at the end."""
    picture, output = portrait(tmp_path / "portrait.png"), tmp_path / "out.mp4"
    options = ("--live", "--order", "causal", "--raw-rate", "16000", "--seed", "1")
    process = command(picture, "-", "-o", output, *options)
    assert process.stdin is not None
    raw = (noise(4 * 16000) * 32768).astype("<i2").tobytes()
    process.stdin.write(raw[: 3 * 32000])
    process.stdin.flush()
    deadline = time.monotonic() + 120
    early = 0
    while early < 25 and time.monotonic() < deadline:
        time.sleep(0.2)
        if output.exists() and output.stat().st_size > 2000:
            with av.open(str(output)) as container:
                early = sum(1 for _ in container.decode(video=0))
    assert process.poll() is None
    assert 25 <= early < 100
    process.stdin.write(raw[3 * 32000 :])
    process.stdin.close()
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    assert process.wait(120) == 0
    assert "100 frames" in printed
    assert "the first frame after" in printed
    assert len(list(read_frames(output))) == 100
    info = probe(output)
    assert info.sound_seconds == pytest.approx(4, abs=0.05)
    assert read_metadata(output)["stableavatar"]


def test_from_pipe_to_pipe(tmp_path: Path) -> None:
    picture = portrait(tmp_path / "portrait.png")
    process = command(picture, "-", "-o", "-")
    data = wav(noise(25 * 640), tmp_path / "speech.wav")
    assert process.stdin is not None
    writer = threading.Thread(target=lambda: (process.stdin.write(data), process.stdin.close()))
    writer.start()
    assert process.stdout is not None
    video = process.stdout.read()
    assert process.wait(120) == 0
    writer.join()
    with av.open(io.BytesIO(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 25
        assert container.streams.audio[0].codec_context.sample_rate == 16000
    assert process.stderr is not None
    assert b"25 frames" in process.stderr.read()


def test_a_live_file_stays_when_the_run_fails(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    def source() -> Iterator[np.ndarray]:
        yield noise(60 * 640)
        raise InputError("the microphone is gone")

    with pytest.raises(InputError, match="microphone"):
        pipeline.generate(
            PICTURE, source(), tmp_path / "out.mp4", output_options=OutputOptions(live=True), order="causal",
            **SMALL,
        )  # fmt: skip
    assert len(list(read_frames(tmp_path / "out.mp4"))) >= 25
    assert list(tmp_path.iterdir()) == [tmp_path / "out.mp4"]
    with pytest.raises(InputError, match="microphone"):
        pipeline.generate(PICTURE, source(), tmp_path / "whole.mp4", order="causal", **SMALL)
    assert not (tmp_path / "whole.mp4").exists()


def test_raw_rate_is_for_standard_input(tmp_path: Path) -> None:
    picture = portrait(tmp_path / "portrait.png")
    (tmp_path / "speech.wav").write_bytes(wav(noise(9000), tmp_path / "other.wav"))
    result = run(
        "generate", picture, tmp_path / "speech.wav", "-o", tmp_path / "o.mp4", "--raw-rate", "16000"
    )
    assert result.exit_code == 2
    assert "standard input" in result.output


def test_frame_rates_with_a_rest(pipeline: AvatarPipeline) -> None:
    samples = noise(40_000)
    for fps in (24.0, 29.97):
        whole = np.stack(list(pipeline.stream(PICTURE, samples, fps=fps, **SMALL)))
        live = np.stack(list(pipeline.stream(PICTURE, pieces(samples, 1000), fps=fps, **SMALL)))
        assert np.array_equal(live, whole)
        assert len(whole) == round(
            Fraction(40_000, 16000) * pipeline.stream(PICTURE, samples, fps=fps, **SMALL).frame_rate
        )
