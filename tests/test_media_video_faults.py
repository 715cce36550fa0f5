"""Disks that fill up, folders without rights, names that are taken: an error, and nothing half-written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stableavatar.errors import InputError
from stableavatar.media import video
from stableavatar.media.files import check_output
from stableavatar.media.video import FrameWriter, VideoWriter


def _limited(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` where no file can grow beyond 80 kB: a write fails as it does on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))

    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


@pytest.mark.parametrize("frames", [12, 200])
def test_a_disk_that_fills_up(tmp_path: Path, frames: int) -> None:
    """12 frames are still in the encoder when the body ends; 200 fail while they are written."""
    preset = "medium" if frames == 12 else "ultrafast"
    code = f"""
import sys, numpy as np
from pathlib import Path
from stableavatar.errors import InputError
from stableavatar.media import video
from stableavatar.media.video import VideoWriter, FrameWriter
from stableavatar.media.audio import Sound
noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
folder = Path(sys.argv[1])
sound = Sound.from_array(np.zeros(16000, np.float32), 16000)
try:
    with VideoWriter(folder / "a.mp4", 160, 160, 25, sound=sound, quality=5, preset="{preset}") as writer:
        for i in range({frames}):
            writer.write(np.roll(noise, 7 * i, axis=1) ^ np.uint8(i))
except InputError as error:
    print(error, sorted(p.name for p in folder.iterdir()))
big = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
try:
    with FrameWriter(folder / "frames") as writer:
        writer.write(big)
except InputError as error:
    print(error, sorted(p.name for p in folder.iterdir()))
"""
    result = _limited(code, tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert len(lines) == 2
    for line in lines:
        assert "cannot be written (File too large)" in line
        assert line.endswith("[]")
    assert result.stderr == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
    try:
        with (  # noqa: PT012
            pytest.raises(InputError, match="No space left on device"),
            VideoWriter(disk / "a.mp4", 64, 48, 25, sound=None, quality=5) as writer,
        ):
            for frame in noise:
                writer.write(frame)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for make in (check_output, FrameWriter):
        with pytest.raises(InputError, match="cannot be written"):
            make(tmp_path / "a.mp4")


def test_pictures_have_their_name_when_they_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, (tmp_path / "frames").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with FrameWriter(tmp_path / "frames", partial=tmp_path / ".partial") as writer:
        for _ in range(2):
            writer.write(np.zeros((48, 64, 3), np.uint8))
    pictures = [("frame_000000.png", False), ("frame_000001.png", False)]
    assert synced == [*pictures, (".partial", False), (tmp_path.name, True)]

    monkeypatch.setattr(video, "_SYNC_EVERY", 2)  # else those of hours would wait for the end
    with FrameWriter(tmp_path / "more") as writer:
        for written in range(5):
            synced.clear()
            writer.write(np.zeros((48, 64, 3), np.uint8))
            assert len(synced) == 3 * (written % 2)


def test_pictures_that_do_not_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with (  # noqa: PT012
        pytest.raises(InputError, match="cannot be written"),
        FrameWriter(tmp_path / "frames") as writer,
    ):
        writer.write(np.zeros((48, 64, 3), np.uint8))
        monkeypatch.setattr(os, "fsync", fail)
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_makes_the_pictures_of_a_folder(tmp_path: Path) -> None:
    there = tmp_path / ".partial"
    with FrameWriter(tmp_path / "frames", partial=there) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        for done in (0, 1):
            with (
                pytest.raises(InputError, match="another process"),
                FrameWriter(tmp_path / "frames", partial=there, done=done),
            ):
                pass
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["frame_000000.png"]


def test_a_partial_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / f".a.{os.getpid()}.partial.mp4").mkdir()
    with (
        pytest.raises(InputError, match="cannot be written"),
        VideoWriter(tmp_path / "a.mp4", 64, 48, 25, sound=None) as writer,
    ):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    assert not (tmp_path / "a.mp4").exists()
