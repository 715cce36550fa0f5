"""Processes of one training look into the clips together: each into its part, and all have the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from accelerate import PartialState

from clip_folders import write_clip
from stableavatar.data.clips import FolderClip
from stableavatar.data.dataset import ClipDatasetSettings, OnError
from stableavatar.errors import InputError
from stableavatar.training.recipes import DataChoice
from stableavatar.training.start import open_clips


def look_into(folder: Path, on_error: OnError) -> dict[str, object]:
    """What this process has of the clips of a folder, and which of them it has looked into itself."""
    opened: list[str] = []
    real = FolderClip.open

    def counted(clip: Path) -> FolderClip:
        opened.append(clip.name)
        return real(clip)

    settings = ClipDatasetSettings(frames=9, on_error=on_error, portrait=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderClip, "open", counted)
        try:
            dataset = open_clips(DataChoice(folders=(folder,), clips=settings))
        except InputError as error:
            return {"error": str(error), "opened": opened}
    return {
        "fingerprint": dataset.fingerprint,
        "names": [Path(clip.name).name for clip in dataset.clips],
        "skipped": dataset.skipped,
        "groups": [str(group) for group in dataset.groups],
        "opened": opened,
    }


def in_two_processes(folder: Path, on_error: OnError) -> list[dict[str, object]]:
    out = folder.parent / "found"
    out.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__,
         str(folder), on_error, str(out)],
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    for number in range(5):
        write_clip(folder / f"{number:05d}", frames=9)
    return folder


def test_all_have_what_one_has_and_look_once(clips: Path) -> None:
    (clips / "00003" / "sub_clip.mp4").write_bytes(b"nothing")
    alone = look_into(clips, "skip")
    assert alone.pop("opened") == [f"{number:05d}" for number in range(5)]
    found = in_two_processes(clips, "skip")
    assert [one.pop("opened") for one in found] == [["00000", "00002", "00004"], ["00001", "00003"]]
    assert found == [alone, alone]


def test_what_one_cannot_read_ends_all_alike(clips: Path) -> None:
    (clips / "00001" / "sub_clip.mp4").write_bytes(b"nothing")
    first, second = in_two_processes(clips, "raise")
    assert "00001" in str(first["error"])
    assert first["error"] == second["error"]
    assert second["opened"] == ["00001"]


if __name__ == "__main__":
    (chosen,) = (one for one in get_args(OnError) if one == sys.argv[2])
    told = look_into(Path(sys.argv[1]), chosen)
    (Path(sys.argv[3]) / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
    PartialState().destroy_process_group()
