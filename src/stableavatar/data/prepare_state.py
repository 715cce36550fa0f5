"""What became of every video, kept beside the clips, so that a run that was stopped goes on."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stableavatar.data.clips import SHAPES, Shape
from stableavatar.data.stretches import PrepareSettings
from stableavatar.errors import InputError
from stableavatar.media.files import write_file

STATE = "prepare.json"


class PrepareState:
    """What became of every video, on disk after each of them."""

    def __init__(self, data: Path, settings: PrepareSettings, videos: dict[str, Any]) -> None:
        self.data, self.settings, self.videos = data, settings, videos

    @classmethod
    def open(cls, data: Path, settings: PrepareSettings) -> "PrepareState":
        """That of a data folder, or a new one. Raises InputError: damaged, or of other settings."""
        file = data / STATE
        if not file.exists():
            return cls(data, settings, {})
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}): remove it, and the clips beside it") from error
        if stored["settings"] != asdict(settings):
            raise InputError(f"{data} was prepared with other settings: give those, or choose another folder")
        state = cls(data, settings, stored["videos"])
        for entry in state.videos.values():
            state._move(entry["stretches"])  # a run may have been stopped in the middle of it
        return state

    def has(self, video: Path, raw: Path) -> bool:
        """Whether this very video was prepared."""
        entry = self.videos.get(str(video.relative_to(raw)))
        return entry is not None and entry["file"] == _file(video)

    def add(self, video: Path, raw: Path, stretches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give a video's clips their places. They are written down before they are taken."""
        taken: dict[str, int] = {}
        for it in stretches:
            if it["reason"] is None:
                shape = it["shape"]
                taken[shape] = taken.get(shape, self._last(shape)) + 1
                it["clip"] = f"{shape}/{self.settings.kind}/{taken[shape]:05d}"
        name = str(video.relative_to(raw))
        before = self.videos.get(name)
        self.videos[name] = {"file": _file(video), "stretches": stretches}
        self._write()
        if before is not None:  # the file was another one then
            for it in before["stretches"]:
                if it["reason"] is None:
                    shutil.rmtree(self.data / it["clip"], ignore_errors=True)
        self._move(stretches)
        return stretches

    def _move(self, stretches: Sequence[dict[str, Any]]) -> None:
        waiting = [it for it in stretches if "work" in it]
        for it in waiting:
            target = self.data / it["clip"]
            if Path(it["work"]).exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                Path(it["work"]).replace(target)
            del it["work"]  # another run may use that place
        if waiting:
            self._write()

    def _last(self, shape: Shape) -> int:
        """The highest number of a clip, also of those on disk that are in no state."""
        folder = self.data / shape / self.settings.kind
        on_disk = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        known = [int(clip.rsplit("/", 1)[1]) for clip in self._clips() if clip.startswith(f"{shape}/")]
        return max([*on_disk, *known], default=0)

    def _clips(self) -> list[str]:
        return [
            it["clip"] for entry in self.videos.values() for it in entry["stretches"] if it["reason"] is None
        ]

    def write_lists(self) -> None:
        """A path list a shape, with the clips of every run."""
        for shape in SHAPES:
            clips = sorted(clip for clip in self._clips() if clip.startswith(f"{shape}/"))
            if clips:
                write_file(self.data / f"video_{shape}_path.txt", "".join(f"{it}\n" for it in clips).encode())

    def counts(self) -> dict[str, int]:
        """Clips that are there, stretches that are not kept, videos."""
        stretches = [it for entry in self.videos.values() for it in entry["stretches"]]
        kept = sum(it["reason"] is None for it in stretches)
        return {"kept": kept, "dropped": len(stretches) - kept, "videos": len(self.videos)}

    def _write(self) -> None:
        content = {"settings": asdict(self.settings), "videos": self.videos}
        write_file(self.data / STATE, json.dumps(content, indent=1, ensure_ascii=False).encode())


def _file(video: Path) -> list[int]:
    """By which a file is known to be the same: size, and time of its last change."""
    found = video.stat()
    return [found.st_size, found.st_mtime_ns]
