"""Vocals, sound and frames out of recordings and videos, and their commands."""

import os
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_folders import write_clip
from command_line import run
from media_files import tone, write_video, write_wav
from networks import BINS, FRAMES, N_FFT, network
from stableavatar.data.extract import extract_audio, extract_frames, extract_masks
from stableavatar.data.vocals import HOP, SAMPLE_RATE, VocalSeparator, separate_vocals
from stableavatar.errors import CheckpointError, InputError
from stableavatar.media.audio import Sound, Speech
from stableavatar.media.image import read_picture
from stableavatar.media.reading import read_frames
from stableavatar.media.wav import write_wav as write_wav_file


def separator(path: Path, cut: int | None = None) -> VocalSeparator:
    return VocalSeparator(network(path, cut), n_fft=N_FFT, compensation=1.0)


def stereo(seconds: float) -> np.ndarray:
    """Two different tones within what the network sees."""
    return np.stack([tone(seconds, SAMPLE_RATE, 700, 0.4), tone(seconds, SAMPLE_RATE, 1900, 0.3)], axis=1)


def pieces(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


@pytest.mark.parametrize("count", [1, 100, HOP * (FRAMES - 1), HOP * (FRAMES - 1) + 1, 50_000, 123_457])
@pytest.mark.parametrize("size", [777, 40_000])
def test_what_keeps_everything_gives_back_what_comes_in(tmp_path: Path, count: int, size: int) -> None:
    """Any length, both channels in their places, no seam where pieces meet."""
    samples = stereo(3.0)[:count]
    made = np.concatenate(list(separator(tmp_path / "all.onnx").stream(pieces(samples, size))))
    assert made.shape == samples.shape
    inner = slice(N_FFT, -N_FFT if count > 3 * N_FFT else None)
    np.testing.assert_allclose(made[inner], samples[inner], atol=2e-3)


def test_nothing_of_the_past_is_kept(tmp_path: Path) -> None:
    network = separator(tmp_path / "all.onnx")
    taken, given, most = 0, 0, 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(200):
            taken += 5000
            yield np.zeros((5000, 2), np.float32)

    for block in network.stream(source()):
        given += len(block)
        most = max(most, taken - given)
    assert given == taken == 10**6
    assert most <= 2 * network.piece + 5000


def test_other_frequencies_are_taken_out(tmp_path: Path) -> None:
    """The bin of a tone is its frequency · n_fft / rate."""
    samples = stereo(2.0)
    cut = round(1300 * N_FFT / SAMPLE_RATE)
    made = np.concatenate(list(separator(tmp_path / "low.onnx", cut).stream([samples])))
    inner = slice(N_FFT, -N_FFT)
    np.testing.assert_allclose(made[inner, 0], samples[inner, 0], atol=2e-3)
    assert np.abs(made[inner, 1]).max() < 2e-3


def made_of(samples: np.ndarray, file: Path, compensation: float = 1.0) -> np.ndarray:
    """What a network gives for stereo sound, the ends left out."""
    voice = VocalSeparator(file, n_fft=N_FFT, compensation=compensation).stream([samples])
    return np.concatenate(list(voice))[N_FFT:-N_FFT]


def test_what_a_network_gives_is_compensated(tmp_path: Path) -> None:
    samples = stereo(1.0)
    made = made_of(samples, network(tmp_path / "n.onnx"), compensation=2.0)
    np.testing.assert_allclose(made, 2 * samples[N_FFT:-N_FFT], atol=4e-3)


def test_what_lies_below_every_voice_is_not_heard(tmp_path: Path) -> None:
    assert (
        np.abs(made_of(np.full((SAMPLE_RATE, 2), 0.5, np.float32), network(tmp_path / "n.onnx"))).max() < 1e-3
    )


@pytest.mark.parametrize("channel", range(4))
def test_channels_are_real_and_imaginary_of_left_then_of_right(tmp_path: Path, channel: int) -> None:
    """Of a spectrum's real part alone sound is what is even about the middle of every window."""
    samples = stereo(1.0)[: HOP * (FRAMES - 1)]  # one piece
    file = network(tmp_path / "n.onnx", kept=np.eye(4)[channel])
    made = made_of(samples, file)
    spectra = torch.stft(
        torch.from_numpy(samples.T.copy()), N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True
    )
    parts = torch.view_as_real(spectra)
    alone = torch.zeros_like(parts)
    side, part = divmod(channel, 2)
    alone[side, ..., part] = parts[side, ..., part]
    expected = torch.istft(
        torch.view_as_complex(alone), N_FFT, HOP, window=torch.hann_window(N_FFT), length=len(samples)
    )
    np.testing.assert_allclose(made, expected.T.numpy()[N_FFT:-N_FFT], atol=2e-3)


def test_a_recording_is_not_replaced_by_its_voice(tmp_path: Path) -> None:
    recording = tmp_path / "song.wav"
    recording.write_bytes(b"whatever it is")
    with pytest.raises(InputError, match="is the recording itself"):
        separate_vocals(separator(tmp_path / "n.onnx"), recording, recording)
    assert recording.read_bytes() == b"whatever it is"


def test_a_file_of_another_rate_and_one_channel(tmp_path: Path) -> None:
    recording = write_wav(tmp_path / "a.wav", tone(1.5, 16_000, 500), 16_000)
    assert separate_vocals(separator(tmp_path / "n.onnx"), recording, tmp_path / "v.wav") == pytest.approx(
        1.5
    )
    sound = Sound(tmp_path / "v.wav")
    assert (sound.sample_rate, sound.channels) == (SAMPLE_RATE, 2)
    with Speech.open(tmp_path / "v.wav") as voice, Speech.open(recording) as before:
        assert len(voice) == len(before) == 24_000
        inner = slice(2000, -2000)
        np.testing.assert_allclose(
            voice.samples(0, 24_000)[inner], before.samples(0, 24_000)[inner], atol=5e-3
        )


@pytest.mark.parametrize("channels", [1, 2])
def test_beyond_what_a_wav_can_tell_of_it_is_an_rf64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    samples = stereo(0.5)[:, :channels]
    usual, large = tmp_path / "usual.wav", tmp_path / "large.wav"
    write_wav_file(usual, pieces(samples, 999), SAMPLE_RATE, channels)
    assert write_wav_file(large, [samples], SAMPLE_RATE, channels) == 0.5
    assert usual.read_bytes() == large.read_bytes()
    with wave.open(str(usual)) as file:
        assert (file.getparams().nframes, file.getnchannels()) == (len(samples), channels)
    monkeypatch.setattr("stableavatar.media.wav._LARGEST_RIFF", usual.stat().st_size - 8)
    write_wav_file(usual, [samples], SAMPLE_RATE, channels)
    assert usual.read_bytes() == large.read_bytes()
    monkeypatch.setattr("stableavatar.media.wav._LARGEST_RIFF", usual.stat().st_size - 9)
    write_wav_file(large, pieces(samples, 999), SAMPLE_RATE, channels)
    assert large.read_bytes()[:4] == b"RF64"
    sounds = [Sound(path) for path in (usual, large)]
    assert [(it.sample_rate, it.channels) for it in sounds] == [(SAMPLE_RATE, channels)] * 2
    before, after = (np.concatenate(list(sound.blocks())) for sound in sounds)
    assert np.array_equal(before, after)
    np.testing.assert_allclose(after, samples, atol=1e-4)


def test_a_recording_without_samples_is_refused(tmp_path: Path) -> None:
    empty = write_wav(tmp_path / "empty.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    with pytest.raises(InputError, match="holds no sound"):
        extract_audio(empty, tmp_path / "audio.wav")
    with pytest.raises(InputError, match="holds no sound"):
        separate_vocals(separator(tmp_path / "n.onnx"), empty, tmp_path / "voice.wav")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.wav", "n.onnx"]


def test_networks_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        VocalSeparator(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(CheckpointError, match="no network that onnxruntime can read"):
        VocalSeparator(tmp_path / "bad.onnx")
    with pytest.raises(CheckpointError, match=r"not \[batch, 4, frequencies, frames\]"):
        VocalSeparator(network(tmp_path / "odd.onnx", shape=(1, 2, BINS, FRAMES)))
    with pytest.raises(InputError, match="fewer frequencies"):
        VocalSeparator(network(tmp_path / "n.onnx"), n_fft=1024)


class TestExtract:
    @pytest.fixture
    def video(self, tmp_path: Path) -> Path:
        frames = [np.full((32, 48, 3), 20 * k, np.uint8) for k in range(10)]
        return write_video(tmp_path / "clip.mp4", frames, tone(0.4, 44_100), 44_100)

    def test_sound(self, video: Path, tmp_path: Path) -> None:
        assert extract_audio(video, tmp_path / "audio.wav") == pytest.approx(0.4, abs=0.001)
        with pytest.raises(InputError, match=r"longer than 0.3 s"):
            extract_audio(video, tmp_path / "long.wav", most_seconds=0.3)
        assert not (tmp_path / "long.wav").exists()
        with Speech.open(tmp_path / "audio.wav") as found, Speech.open(video) as wanted:
            np.testing.assert_allclose(found.samples(0, 6000), wanted.samples(0, 6000), atol=1e-4)

    def test_frames(self, video: Path, tmp_path: Path) -> None:
        assert extract_frames(video, tmp_path / "images") == 10
        for number, frame in enumerate(read_frames(video)):
            assert np.array_equal(read_picture(tmp_path / "images" / f"frame_{number}.png"), frame)
        with pytest.raises(InputError, match="not empty"):
            extract_frames(video, tmp_path / "images")

    def test_a_damaged_video_leaves_nothing(self, video: Path, tmp_path: Path) -> None:
        video.write_bytes(video.read_bytes()[:700])
        for make, output in ((extract_frames, tmp_path / "images"), (extract_audio, tmp_path / "a.wav")):
            with pytest.raises(InputError):
                make(video, output)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]

    @pytest.mark.parametrize("images", [True, False])
    def test_masks_that_are_older_than_the_frames_are_kept_and_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, images: bool
    ) -> None:
        clip = write_clip(tmp_path / "00001", frames=9, images=images)
        unused: Any = None
        assert extract_masks(unused, clip) == 9
        assert not caplog.records
        newer = clip / ("images/frame_4.png" if images else "sub_clip.mp4")
        written = (clip / "lip_masks" / "frame_8.png").stat().st_mtime
        os.utime(newer, (written + 60, written + 60))  # as of a folder that was copied
        assert extract_masks(unused, clip, ["lip_masks"]) == 9
        assert not caplog.records
        os.utime(newer, (written + 86400, written + 86400))
        assert extract_masks(unused, clip, ["lip_masks"]) == 9
        (record,) = caplog.records
        assert f"{clip / 'lip_masks'}: kept, but older than the frames" in record.getMessage()

    def test_commands_with_the_names_that_users_know(self, video: Path, tmp_path: Path) -> None:
        audio, vocals = tmp_path / "audio.wav", tmp_path / "vocals.wav"
        done = run("extract-audio", "--video_path", video, "--saved_audio_path", audio)
        assert (done.exit_code, done.output.replace("\n", "")) == (0, f"{audio}: 0.40 s")
        done = run("extract-frames", "--video", video, "-o", tmp_path / "images")
        assert done.exit_code == 0
        assert "10 frames" in done.output
        file = network(tmp_path / "n.onnx")
        done = run(
            "separate-vocals", "--audio_separator_model_file", file, "--audio_file_path", audio, "--saved_vocal_path",
            vocals, "--n-fft", str(N_FFT),
        )  # fmt: skip
        assert (done.exit_code, done.output.replace("\n", "")) == (0, f"{vocals}: 0.40 s")
        done = run(
            "separate-vocals",
            "--recording",
            audio,
            "-o",
            tmp_path / "v.mp3",
            "--network",
            file,
            "--n-fft",
            "2048",
        )
        assert done.exit_code == 2
        assert "only WAV" in done.output
