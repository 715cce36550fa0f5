"""Recordings in: lengths to the sample, places to the sample, and every way a file can be wrong."""

import logging
import struct
import subprocess
import sys
import tempfile
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from media_files import click, tone, write_sound, write_video, write_wav
from stableavatar.errors import InputError
from stableavatar.media import audio
from stableavatar.media.audio import Samples, Sound, SoundTape, Speech
from stableavatar.media.decoding import Resampler, mix_gains, stream_sound

BLACK = np.zeros((32, 32, 3), dtype=np.uint8)
SHARED = Path(__file__).parents[2] / "shared" / "samples"


def everything(speech: Speech) -> Samples:
    return speech.samples(0, len(speech))


def loudest(samples: Samples, rate: int) -> float:
    """Seconds at which the loudest of samples [n] is."""
    return float(np.abs(samples).argmax()) / rate


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 96000, 192000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_has_exact_length_and_place(tmp_path: Path, rate: int, channels: int) -> None:
    path = write_wav(tmp_path / "a.wav", click(1.0, rate, 0.5, channels), rate)
    with Speech.open(path) as speech:
        assert (len(speech), speech.sample_rate, speech.seconds) == (16000, 16000, 1.0)
        assert loudest(everything(speech), 16000) == pytest.approx(0.5, abs=1.01 / 16000)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.flac", "flac", 44100),
        ("a.mp3", "libmp3lame", 44100),
        ("a.m4a", "aac", 44100),
        ("a.opus", "libopus", 48000),
        ("a.webm", "libopus", 48000),
    ],
)
def test_priming_and_padding_of_codecs_are_not_sound(
    tmp_path: Path, name: str, codec: str, rate: int
) -> None:
    path = write_sound(tmp_path / name, click(1.3, rate, 0.7), rate, codec)
    speech = Speech.open(path)
    assert len(speech) == round(1.3 * 16000)
    assert loudest(everything(speech), 16000) == pytest.approx(0.7, abs=2 / 16000)


def test_the_last_samples_are_there(tmp_path: Path) -> None:
    samples = tone(0.5, 44100)
    samples[-60:] = 0.9
    speech = Speech.open(write_wav(tmp_path / "a.wav", samples, 44100))
    assert everything(speech)[-12:-2].min() > 0.7


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_handful_of_samples(tmp_path: Path, count: int) -> None:
    speech = Speech.open(write_wav(tmp_path / "a.wav", np.full(count, 0.5, np.float32), 8000))
    assert len(speech) == 2 * count


def test_no_samples_at_all(tmp_path: Path) -> None:
    assert len(Speech.open(write_wav(tmp_path / "a.wav", np.zeros(0, np.float32), 16000))) == 0


def test_pitch_is_kept(tmp_path: Path) -> None:
    speech = Speech.open(write_wav(tmp_path / "a.wav", tone(1.0, 44100, 1000.0), 44100))
    assert np.allclose(everything(speech)[100:-100], tone(1.0, 16000, 1000.0)[100:-100], atol=2e-3)


def test_stereo_is_averaged(tmp_path: Path) -> None:
    stereo = np.stack([tone(0.2, 16000), np.zeros(3200, np.float32)], axis=1)
    speech = Speech.open(write_wav(tmp_path / "a.wav", stereo, 16000))
    assert np.allclose(everything(speech), tone(0.2, 16000) / 2, atol=1e-4)


def test_opposite_phase_does_not_become_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stereo = np.stack([tone(0.2, 16000, level=0.3), -tone(0.2, 16000, level=0.31)], axis=1)
    path = write_wav(tmp_path / "a.wav", stereo, 16000)
    with caplog.at_level(
        logging.INFO, logger="stableavatar"
    ):  # a command line in this process may have set it
        speech = Speech.open(path)
    assert np.allclose(everything(speech), stereo[:, 1], atol=1e-4)
    assert "cancel" in caplog.text


@pytest.mark.parametrize(("layout", "channels"), [("5.1", 6), ("7.1", 8)])
def test_surround_is_mixed_down(tmp_path: Path, layout: str, channels: int) -> None:
    def mean_of(channel: int, level: float = 0.5) -> float:
        samples = np.zeros((8000, channels), np.float32)
        samples[:, channel] = tone(0.5, 16000, level=level)
        speech = Speech.open(write_sound(tmp_path / "a.flac", samples, 16000, "flac", layout))
        assert len(speech) == 8000
        return float(np.sqrt(np.square(everything(speech)).mean()))

    left, right, centre, low, back = (mean_of(channel) for channel in range(5))
    assert left == pytest.approx(right, rel=1e-3)
    assert centre == pytest.approx(left * 2**0.5, rel=1e-3)  # in both sides at -3 dB
    assert back == pytest.approx(left / 2**0.5, rel=1e-3)
    assert low < 1e-4


def test_eight_planes_of_samples(tmp_path: Path) -> None:
    samples = np.zeros((16000, 8), np.float32)
    samples[:, 7] = tone(1.0, 16000)
    speech = Speech.open(write_sound(tmp_path / "a.m4a", samples, 16000, "aac", "7.1"))
    assert len(speech) == 16000
    assert 0.02 < np.abs(everything(speech)).max() < 0.2


@given(st.sampled_from(["mono", "stereo", "2.1", "quad", "5.0", "5.1", "6.1", "7.1", "downmix", "unknown"]))
def test_no_mix_can_clip(layout: str) -> None:
    names = ("NONE",) * 5 if layout == "unknown" else tuple(c.name for c in av.AudioLayout(layout).channels)
    for mix in ("mono", "stereo", "left", "right"):
        gains = mix_gains(names, mix)
        assert gains.shape == (len(names), 2 if mix == "stereo" else 1)
        assert gains.min() >= 0
        assert 0.4 < gains.sum(axis=0).max() <= 1.0001


def test_six_channels_without_a_mask_are_surround(tmp_path: Path) -> None:
    samples = np.zeros((1600, 6), np.float32)
    samples[:, 3] = 0.5
    assert np.abs(everything(Speech.open(write_wav(tmp_path / "a.wav", samples, 16000)))).max() == 0


def test_the_sound_of_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [BLACK] * 25, click(1.0, 48000, 0.5)[:, 0])
    speech = Speech.open(path)
    assert len(speech) == 16000
    assert loudest(everything(speech), 16000) == pytest.approx(0.5, abs=2 / 16000)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "flac"), ("a.mp4", "aac")])
def test_sound_that_starts_after_the_picture_keeps_its_place(tmp_path: Path, name: str, codec: str) -> None:
    sound = click(1.0, 48000, 0.5)[:, 0]
    path = write_video(tmp_path / name, [BLACK] * 50, sound, sound_at=0.4, sound_codec=codec)
    for samples, rate in (
        (everything(Speech.open(path)), 16000),
        (np.concatenate(list(Sound(path).blocks()))[:, 0], 48000),
    ):
        assert loudest(samples, rate) == pytest.approx(0.9, abs=0.0015)
        assert len(samples) == pytest.approx(1.4 * rate, abs=0.0015 * rate)
        assert np.abs(samples[: round(0.37 * rate)]).max() == 0


def test_a_hole_in_the_sound_becomes_silence(tmp_path: Path) -> None:
    sound = click(2.0, 48000, 1.5)
    path = write_sound(
        tmp_path / "a.mka", sound, 48000, "pcm_s16le", pieces=[(0, 48000, 0.0), (48000, 96000, 1.5)]
    )
    samples = everything(Speech.open(path))
    assert len(samples) == pytest.approx(2.5 * 16000, abs=24)  # Matroska keeps milliseconds
    assert loudest(samples, 16000) == pytest.approx(2.0, abs=0.0015)
    assert np.abs(samples[16100:23900]).max() == 0


def test_start_and_duration(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", click(2.0, 44100, 1.2), 44100)
    speech = Speech.open(path, start=0.7, duration=0.6)
    assert len(speech) == 9600
    assert loudest(everything(speech), 16000) == pytest.approx(0.5, abs=1.01 / 16000)
    assert len(Speech.open(path, start=1.5, duration=9.0)) == 8000
    sound = np.concatenate(list(Sound(path, start=0.7, duration=0.6).blocks()))
    assert len(sound) == round(0.6 * 44100)
    assert loudest(sound[:, 0], 44100) == pytest.approx(0.5, abs=1.01 / 44100)


def test_a_tape_gives_stretches_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples as one decoding a stretch, which reads all that lies before it again."""
    path = write_wav(tmp_path / "a.wav", tone(3.0, 32_000, 300), 32_000)
    spans = [(0.0, 0.5), (0.5, 0.25), (1.3, 0.4), (2.8, 0.5), (3.5, 0.1)]
    wanted = [Sound(path, start, seconds) for start, seconds in spans[:-1]]
    wholes = [np.concatenate(list(sound.blocks())) for sound in wanted]
    opened = []
    monkeypatch.setattr(audio, "stream_sound", lambda *given: opened.append(given) or stream_sound(*given))
    tape = SoundTape(path, 32_000, "mono")
    parts = [list(tape.stretch(start, seconds)) for start, seconds in spans]
    assert len(opened) == 1
    for whole, part in zip(wholes, parts[:-1], strict=True):
        np.testing.assert_array_equal(np.concatenate(part), whole)
    assert sum(map(len, parts[-2])) == 6400
    assert parts[-1] == []
    with pytest.raises(ValueError, match="the tape is at"):
        next(tape.stretch(1.0, 0.1))


def test_a_tape_of_speech_is_mixed_as_speech(tmp_path: Path) -> None:
    left = tone(1.0, 16_000, 300)
    path = write_wav(tmp_path / "a.wav", np.stack([left, -left], axis=1), 16_000)
    (heard,) = SoundTape(path, 16_000).stretch(0.0, 1.0)
    with Speech.open(path) as speech:
        np.testing.assert_array_equal(heard[:, 0], speech.samples(0, 16_000))
    assert np.abs(heard).max() > 0.1


def test_a_tape_of_a_file_that_is_cut_off_gives_what_lies_before(tmp_path: Path) -> None:
    sound = np.stack([tone(4.0, 48_000, 300)] * 2, axis=1)
    whole = write_sound(tmp_path / "whole.mka", sound, 48_000, "pcm_s16le")
    cut = tmp_path / "cut.mka"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    with pytest.raises(InputError):
        Speech.open(cut)
    tape = SoundTape(cut, 16_000)
    assert sum(map(len, tape.stretch(0.0, 1.0))) == 16_000
    with pytest.raises(InputError):
        list(tape.stretch(2.0, 2.0))


def test_a_tape_that_cannot_be_read_says_so_every_time(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no sound")
    tape = SoundTape(tmp_path / "a.wav", 16_000)
    for start in (0.0, 1.0):
        with pytest.raises(InputError, match="not a sound or video file"):
            list(tape.stretch(start, 0.5))


@pytest.mark.parametrize(
    ("start", "duration", "words"),
    [
        (-1.0, None, "start"),
        (float("nan"), None, "start"),
        (0.0, 0.0, "duration"),
        (0.0, float("inf"), "duration"),
        (2.5, None, "after its end"),
    ],
)
def test_impossible_stretches(tmp_path: Path, start: float, duration: float | None, words: str) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    with pytest.raises(InputError, match=words):
        Speech.open(path, start=start, duration=duration)


def test_names_with_spaces_and_chinese(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "我的 录音 100%d:x.wav", tone(0.1, 16000), 16000)
    assert len(Speech.open(path)) == 1600
    assert len(Speech.open(str(path))) == 1600


def _float_wav(path: Path, value: float) -> Path:
    samples = tone(0.5, 16000)
    samples[4000] = value
    data = samples.astype("<f4").tobytes()
    head = (
        b"fmt "
        + struct.pack("<IHHIIHH", 16, 3, 1, 16000, 64000, 4, 32)
        + b"data"
        + struct.pack("<I", len(data))
    )
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(head) + len(data)) + b"WAVE" + head + data)
    return path


def test_float_wav(tmp_path: Path) -> None:
    assert np.abs(everything(Speech.open(_float_wav(tmp_path / "a.wav", 1.5)))).max() == 1.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_samples_that_are_no_sound(tmp_path: Path, value: float) -> None:
    path = _float_wav(tmp_path / "bad.wav", value)
    with pytest.raises(InputError, match=r"bad\.wav.*no numbers"):
        Speech.open(path)
    with pytest.raises(InputError, match=r"bad\.wav.*no numbers"):
        list(Sound(path).blocks())


@settings(max_examples=30, deadline=None)
@given(st.integers(-50, 150), st.integers(0, 200))
def test_any_stretch_with_zeros_outside(start: int, length: int) -> None:
    values = np.random.default_rng(1).normal(size=100).astype(np.float32)
    padded = np.concatenate([np.zeros(50, np.float32), values, np.zeros(300, np.float32)])
    with Speech.from_array(values, 16000) as speech:
        stretch = speech.samples(start, start + length)
        assert stretch.dtype == np.float32
        assert np.array_equal(stretch, padded[start + 50 : start + 50 + length])


def test_blocks_are_the_whole() -> None:
    values = tone(0.1, 16000)
    speech = Speech.from_array(values, 16000)
    blocks = list(speech.blocks(700))
    assert [len(block) for block in blocks] == [700, 700, 200]
    assert np.array_equal(np.concatenate(blocks), values)
    with pytest.raises(ValueError, match="stop"):
        speech.samples(5, 4)
    with pytest.raises(ValueError, match="block"):
        next(speech.blocks(0))


def test_speech_from_an_array() -> None:
    speech = Speech.from_array(np.stack([tone(1.0, 44100)] * 2, axis=1), 44100)
    assert (len(speech), speech.sample_rate) == (16000, 16000)
    assert np.allclose(everything(speech)[100:-100], tone(1.0, 16000)[100:-100], atol=2e-3)


@pytest.mark.parametrize(
    "gains", [(1, -1), (1, 0), (1, 0.2, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 0, 0), (1, 1, 1)]
)
def test_channels_of_an_array_are_mixed_as_those_of_a_file(tmp_path: Path, gains: tuple[float, ...]) -> None:
    """Of opposite phase, of one side alone, 5.1, the low frequencies of 7.1, three microphones."""
    samples = tone(1.0, 16000)[:, None] * np.float32(gains)
    with (
        Speech.from_array(samples, 16000) as heard,
        Speech.open(write_wav(tmp_path / "a.wav", samples, 16000)) as read,
    ):
        assert np.allclose(everything(heard), everything(read), atol=1e-4)
        assert (np.abs(everything(heard)).max() > 0.1) == (len(gains) < 8)


@pytest.mark.parametrize(
    "bad", [np.array([0.0, np.nan]), np.array([np.inf]), np.zeros((2, 2, 2)), np.zeros(10, dtype=np.int16)]
)
def test_arrays_that_are_no_sound(bad: np.ndarray) -> None:
    for make in (Speech.from_array, Sound.from_array):
        with pytest.raises(InputError, match="sound"):
            make(bad, 16000)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    st.sampled_from([8000, 11025, 22050, 44100, 48000, 192000]),
    st.sampled_from([16000, 48000]),
    st.integers(1, 2),
)
def test_resampling_in_blocks_is_resampling_at_once(
    sizes: list[int], rate_in: int, rate_out: int, channels: int
) -> None:
    values = np.random.default_rng(2).normal(size=(sum(sizes), channels)).astype(np.float32)
    pieces, position = Resampler(rate_in, rate_out, channels), 0
    parts = []
    for size in sizes:
        parts.append(pieces.push(values[position : position + size]))
        position += size
    parts.append(pieces.finish())
    whole = Resampler(rate_in, rate_out, channels)
    at_once = np.concatenate([whole.push(values), whole.finish()])
    assert len(at_once) == round(Fraction(sum(sizes) * rate_out, rate_in))
    assert np.allclose(np.concatenate(parts), at_once, atol=1e-5)


def test_no_room_for_the_decoded_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wav(tmp_path / "a.wav", tone(0.5, 16000), 16000)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: Path("/dev/full").open("r+b"))  # noqa: SIM115
    with pytest.raises(InputError, match="TMPDIR"):
        Speech.open(path)


def test_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wav(tmp_path / "a.wav", tone(0.5, 16000), 16000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"\(No such file.*TMPDIR"):
        Speech.open(path)

    def unusable() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", unusable)
    with pytest.raises(InputError, match=r"\(No usable.*TMPDIR"):
        Speech.open(path)


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    """Twenty minutes need no more memory than a second: 77 MB of float32 would show."""
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        for _ in range(20):
            file.writeframes(bytes(2 * 8000 * 60))
    code = (
        "import resource, sys\n"
        "from stableavatar.media.audio import Speech\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "Speech.open(sys.argv[1], duration=1.0).close()\n"
        "before = peak()\n"
        "speech = Speech.open(sys.argv[1])\n"
        "assert len(speech) == 1200 * 16000, len(speech)\n"
        "for block in speech.blocks(16000): pass\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 15


@pytest.mark.parametrize(
    ("rate", "channels", "rate_out", "channels_out"),
    [
        (44100, 2, 44100, 2),
        (8000, 1, 8000, 1),
        (96000, 2, 48000, 2),
        (37800, 1, 44100, 1),
        (48000, 6, 48000, 2),
    ],
)
def test_sound_is_the_recording_itself(
    tmp_path: Path, rate: int, channels: int, rate_out: int, channels_out: int
) -> None:
    sound = Sound(write_wav(tmp_path / "a.wav", click(1.0, rate, 0.5, channels), rate))
    assert (sound.sample_rate, sound.channels) == (rate_out, channels_out)
    for _ in range(2):  # it can be read again
        samples = np.concatenate(list(sound.blocks()))
        assert samples.shape == (rate_out, channels_out)
        assert loudest(samples[:, 0], rate_out) == pytest.approx(0.5, abs=1.01 / rate_out)


def test_sound_keeps_its_two_sides(tmp_path: Path) -> None:
    stereo = np.stack([tone(0.2, 16000), -tone(0.2, 16000, level=0.2)], axis=1)
    path = write_wav(tmp_path / "a.wav", stereo, 16000)
    assert np.allclose(np.concatenate(list(Sound(path).blocks())), stereo, atol=1e-4)


def test_sound_from_an_array_is_clipped() -> None:
    sound = Sound.from_array(np.full((100, 2), 3.0), 22050)
    assert (sound.sample_rate, sound.channels) == (22050, 2)
    assert np.concatenate(list(sound.blocks())).max() == 1.0
    with pytest.raises(InputError, match="one or two"):
        Sound.from_array(np.zeros((10, 3)), 16000)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample recordings are not beside the checkout")
def test_sample_recordings() -> None:
    for path in sorted((SHARED / "speech").iterdir()):
        speech, sound = Speech.open(path), Sound(path)
        length = sum(len(block) for block in sound.blocks())
        assert len(speech) / 16000 == pytest.approx(length / sound.sample_rate, abs=1e-4)
        assert np.abs(everything(speech)).max() > 0.05
