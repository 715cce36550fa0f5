"""Recordings that are none, are damaged or cut off: named, or read as far as they go."""

import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import stableavatar
from media_files import click, tone, write_sound, write_video, write_wav
from stableavatar.errors import InputError
from stableavatar.media.audio import Sound, Speech
from stableavatar.media.decoding import ogg_ending

BLACK = np.zeros((32, 32, 3), dtype=np.uint8)
SHARED = Path(__file__).parents[2] / "shared" / "samples"


def _missing(folder: Path) -> Path:
    return folder / "bad"


def _folder(folder: Path) -> Path:
    (folder / "bad").mkdir()
    return folder / "bad"


def _empty(folder: Path) -> Path:
    (folder / "bad").touch()
    return folder / "bad"


def _text(folder: Path) -> Path:
    (folder / "bad.txt").write_text("Dear diary, today I recorded nothing.\n" * 100)
    return folder / "bad.txt"


def _random(folder: Path) -> Path:
    (folder / "bad.wav").write_bytes(np.random.default_rng(0).bytes(50_000))
    return folder / "bad.wav"


def _picture(folder: Path) -> Path:
    Image.new("RGB", (64, 64)).save(folder / "bad.png")
    return folder / "bad.png"


def _silent_film(folder: Path) -> Path:
    return write_video(folder / "bad.mp4", [BLACK] * 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_missing, "no such file"),
        (_folder, "folder"),
        (_empty, "empty"),
        (_text, "not a sound"),
        (_random, "not a sound"),
        (_picture, "not a sound"),
        (_silent_film, "no sound"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path)
    for read in (Speech.open, Sound):
        with pytest.raises(InputError, match=words) as caught:
            read(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(0.1, 16000), 16000)
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        Speech.open(path)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("cut.wav", "pcm_s16le"),
        ("cut.flac", "flac"),
        ("cut.mp3", "libmp3lame"),
        ("cut.mka", "libopus"),
        ("cut.m4a", "aac"),
        ("cut.aiff", "pcm_s16be"),
        ("cut.opus", "libopus"),
        ("cut.ogg", "flac"),
    ],
)
def test_a_file_that_was_cut_off(tmp_path: Path, name: str, codec: str) -> None:
    path = write_sound(tmp_path / name, click(2.0, 48000, 0.1), 48000, codec)
    assert len(Speech.open(path)) == pytest.approx(32000, abs=400)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\..*cut off") as caught:
        Speech.open(path)
    if "at most" in str(caught.value):  # what the message offers works
        there = float(str(caught.value).rsplit("at most ", 1)[1].split(" s.")[0])
        assert len(Speech.open(path, duration=there)) == round(there * 16000)


@pytest.mark.parametrize("left", [-1, 20, 30])
def test_ogg_cut_off_in_its_last_page(tmp_path: Path, left: int) -> None:
    path = write_sound(tmp_path / "cut.opus", click(2.0, 48000, 0.1), 48000, "libopus")
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS") + left] if left > 0 else data[:left])
    with pytest.raises(InputError, match="cut off"):
        Speech.open(path)


def test_ogg_without_a_mark_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Messengers on Android write such files: they are read, and it is said that something may be missing."""
    path = write_sound(tmp_path / "a.opus", click(2.0, 48000, 0.1), 48000, "libopus")
    data = path.read_bytes()
    assert ogg_ending(path) == "marked"
    assert "not marked" not in caplog.text
    path.write_bytes(data[: data.rindex(b"OggS")])
    assert ogg_ending(path) == "unmarked"
    assert 16000 < len(Speech.open(path)) < 32000
    assert "not marked as the end" in caplog.text


def test_the_recordings_of_the_evaluation_are_whole() -> None:
    recordings = sorted((Path(stableavatar.__file__).parent / "assets" / "evaluation").glob("*.opus"))
    assert recordings
    for path in recordings:
        assert ogg_ending(path) == "marked"
    assert len(Speech.open(recordings[0])) > 16000


def test_mp4_cut_off_behind_its_index(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    write_video(path, [BLACK] * 50, click(2.0, 48000, 0.1)[:, 0])
    from stableavatar.media.video import VideoWriter

    with VideoWriter(path, 32, 32, 25, sound=Sound.from_array(click(2.0, 48000, 0.1), 48000)) as writer:
        for _ in range(50):
            writer.write(BLACK)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut off"):
        Speech.open(path)


def test_wav_from_a_pipe_does_not_know_its_length(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(0.5, 16000), 16000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(Speech.open(path)) == 8000


def test_a_recording_that_has_changed_is_not_the_sound(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(0.5, 16000), 16000)
    sound, written = Sound(path), path.stat().st_mtime_ns
    for later in (0, 10**9):  # touched is not changed
        os.utime(path, ns=(written, written + later))
        assert len(np.concatenate(list(sound.blocks()))) == 8000
    write_wav(path, tone(0.5, 16000, 1500), 16000)
    with pytest.raises(InputError, match=r"a\.wav: the file has changed"):
        list(sound.blocks())
    write_wav(path, tone(0.6, 16000), 16000)
    os.utime(path, ns=(written, written))
    with pytest.raises(InputError, match=r"a\.wav: the file has changed"):
        list(sound.blocks())
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        list(sound.blocks())


def test_little_damage_is_silence_and_much_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_sound(tmp_path / "bad.mka", tone(5.0, 48000), 48000, "flac")
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux() if packet.size]
    data = bytearray(path.read_bytes())

    def spoil(place: int) -> None:
        data[place : place + 60] = data[place : place + 8] + b"\xff" * 52
        path.write_bytes(data)

    spoil(places[10])
    speech = Speech.open(path)
    samples = speech.samples(0, len(speech))
    assert len(samples) == 80000
    assert "1 of " in caplog.text
    silent = np.flatnonzero(samples == 0)
    assert len(silent) > 0.8 * 80000 / len(places)
    assert float(silent.mean()) == pytest.approx(10.5 * 80000 / len(places), abs=2000)
    for place in places[20:40]:
        spoil(place)
    with pytest.raises(InputError, match=r"bad\.mka: damaged, 21 of"):
        Speech.open(path)
