"""What became of raw videos is kept, whatever happens to the run, at the same cost a video."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from stableavatar.data.prepare_state import PrepareState
from stableavatar.data.stretches import PrepareSettings
from stableavatar.errors import InputError

SHORT = PrepareSettings(least_seconds=0.5, most_seconds=2.0)


def test_a_video_costs_the_same_however_many_there_were(tmp_path: Path) -> None:
    """Its lines are added to the state; nothing that was there is written again."""
    videos = [tmp_path / f"{number}.mp4" for number in range(40)]
    for number, path in enumerate(videos):
        path.write_bytes(bytes([number]))
    state = PrepareState.open(tmp_path, SHORT)
    assert state.take(videos) == videos
    file, sizes = tmp_path / "prepare.jsonl", []
    before = file.stat()
    for number, path in enumerate(videos):
        state.add(path, [{"start": 0, "stop": 30, "reason": "no face", "thumbnails": [bytes([number])]}])
        sizes.append(file.stat().st_size)
    assert file.stat().st_ino == before.st_ino
    assert max(np.diff(sizes)) <= min(np.diff(sizes)) + 2  # digits of the number
    assert len(PrepareState.open(tmp_path, SHORT).videos) == 40


def test_a_renamed_video_keeps_its_clips_across_a_kill(tmp_path: Path) -> None:
    """Also where another one has its old name, and is written down first."""
    old, new = tmp_path / "a.mp4", tmp_path / "b.mp4"
    old.write_bytes(b"first")
    state = PrepareState.open(tmp_path, SHORT)
    state.take([old])
    state.add(old, [{"start": 0, "stop": 30, "reason": None, "shape": "square"}])
    old.rename(new)
    old.write_bytes(b"second")
    state = PrepareState.open(tmp_path, SHORT)
    assert state.take([old, new]) == [old]
    state.add(old, [{"start": 0, "stop": 30, "reason": "no face"}])
    after = PrepareState.open(tmp_path, SHORT)
    assert after.take([old, new]) == []
    assert after.videos[str(new)]["stretches"][0]["clip"] == "square/speech/00001"


def test_a_kill_while_a_line_is_written_costs_that_line(tmp_path: Path) -> None:
    videos = [tmp_path / f"{number}.mp4" for number in range(2)]
    for number, path in enumerate(videos):
        path.write_bytes(bytes([number]))
    state = PrepareState.open(tmp_path, SHORT)
    state.take(videos)
    state.add(videos[0], [{"start": 0, "stop": 30, "reason": "no face"}])
    with (tmp_path / "prepare.jsonl").open("a") as journal:
        journal.write('{"video": "torn')
    state = PrepareState.open(tmp_path, SHORT)
    assert state.take(videos) == [videos[1]]
    state.add(videos[1], [{"start": 0, "stop": 30, "reason": "silent"}])
    assert PrepareState.open(tmp_path, SHORT).take(videos) == []


def test_clips_of_a_file_that_changed_go_also_after_a_kill(tmp_path: Path) -> None:
    path, clip = tmp_path / "a.mp4", tmp_path / "square" / "speech" / "00001"
    path.write_bytes(b"first")
    state = PrepareState.open(tmp_path, SHORT)
    state.take([path])
    state.add(path, [{"start": 0, "stop": 30, "reason": None, "shape": "square"}])
    clip.mkdir(parents=True)
    entry = {"video": str(path), "file": "another", "stretches": []}
    with (tmp_path / "prepare.jsonl").open("a") as journal:
        journal.write(f"{json.dumps(entry)}\n")
    PrepareState.open(tmp_path, SHORT)
    assert not clip.exists()


def test_settings_count_from_the_first_video_on(tmp_path: Path) -> None:
    """Who mistyped them and stopped at once may give others."""
    PrepareState.open(tmp_path, PrepareSettings(least_seconds=9))
    path = tmp_path / "a.mp4"
    path.write_bytes(b"first")
    state = PrepareState.open(tmp_path, SHORT)
    state.take([path])
    state.add(path, [{"start": 0, "stop": 30, "reason": "silent"}])
    assert len(PrepareState.open(tmp_path, SHORT).videos) == 1
    with pytest.raises(InputError, match="other settings"):
        PrepareState.open(tmp_path, PrepareSettings(least_seconds=9))


def test_a_state_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "prepare.json").write_text("{}")
    with pytest.raises(InputError, match="earlier version"):
        PrepareState.open(tmp_path, SHORT)


def test_pictures_of_what_is_no_longer_there_go(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for content in (b"first", b"second"):
        path.write_bytes(content)
        state = PrepareState.open(tmp_path, SHORT)
        (again,) = state.take([path])
        state.add(again, [{"start": 0, "stop": 30, "reason": "no face", "thumbnails": [content]}])
        state.write_lists()
        (picture,) = (tmp_path / "report_pictures").iterdir()
        assert picture.read_bytes() == content


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"settings": 3}'])
def test_a_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "prepare.jsonl").write_text(f"{content}\n")
    with pytest.raises(InputError, match=r"prepare\.jsonl is damaged"):
        PrepareState.open(tmp_path, SHORT)


def test_what_cannot_be_read_just_now_keeps_its_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clip = tmp_path / "a.mp4", tmp_path / "square" / "speech" / "00001"
    path.write_bytes(b"first")
    state = PrepareState.open(tmp_path, SHORT)
    state.take([path])
    state.add(path, [{"start": 0, "stop": 30, "reason": None, "shape": "square"}])
    clip.mkdir(parents=True)

    def gone(_: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    again = PrepareState.open(tmp_path, SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("stableavatar.data.prepare_state.file_fingerprint", gone)
        assert again.take([path]) == [path]
    again.add(path, [{"start": 0, "stop": 0, "reason": "cannot be read"}], settled=False)
    assert clip.exists()
    after = PrepareState.open(tmp_path, SHORT)
    assert after.take([path]) == []
    assert after.counts() == {"kept": 1, "dropped": 0, "videos": 1}
