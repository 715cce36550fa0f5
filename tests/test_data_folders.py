"""Folders are looked through as users have them: with links into other folders, and links that lead back."""

from pathlib import Path

import pytest

from clip_folders import looked_at_or_killed
from raw_videos import SHORT, needs_networks
from stableavatar.data.clips import find_clips
from stableavatar.data.prepare import prepare


def linked(root: Path, name: str) -> Path:
    """A folder with a file of this name in it, and one in a folder elsewhere that it links to, twice."""
    for folder in (root / "data" / "z" / "00001", root / "elsewhere" / "00002"):
        folder.mkdir(parents=True)
        (folder / name).write_text(folder.name)
    (root / "data" / "a").symlink_to(root / "data" / "z")  # it has a name of its own, which stays
    (root / "data" / "link").symlink_to(root / "elsewhere")
    (root / "data" / "z" / "other").symlink_to(root / "elsewhere")
    (root / "elsewhere" / "loop").symlink_to(root / "data")
    return root / "data"


def test_clips_behind_links_are_found_once(tmp_path: Path) -> None:
    data = linked(tmp_path, "sub_clip.mp4")
    hidden = data / ".being_made" / "00003"
    hidden.mkdir(parents=True)
    (hidden / "sub_clip.mp4").write_text("")
    assert find_clips(data) == [data / "link" / "00002", data / "z" / "00001"]
    (data / "shown").symlink_to(hidden.parent)
    assert find_clips(data) == [data / name for name in ("link/00002", "shown/00003", "z/00001")]


@needs_networks
def test_videos_behind_links_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, told = linked(tmp_path, "a.mp4"), list[str]()
    monkeypatch.setattr("stableavatar.data.prepare.prepare_video", looked_at_or_killed)
    prepare(raw, tmp_path / "prepared", SHORT, tell=told.append)
    assert sorted(line.split(" ", 1)[1] for line in told) == [
        f"{raw / name / 'a.mp4'}: 0 clips, 1 stretches dropped" for name in ("link/00002", "z/00001")
    ]
