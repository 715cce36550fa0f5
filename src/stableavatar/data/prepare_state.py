"""What became of every video, kept beside the clips, so that a run that was stopped goes on."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stableavatar.data.clips import SHAPES, Shape
from stableavatar.data.stretches import PrepareSettings
from stableavatar.errors import InputError
from stableavatar.media.files import file_fingerprint, write_file

STATE = "prepare.jsonl"
THUMBNAILS = "report_pictures"
_EARLIER = "prepare.json"


class PrepareState:
    """What became of every video, on disk after each of them.

    The file is a journal: a line of settings, and a line a video, of which the last counts; so that a video
    costs the same however many there were before. `write_lists` puts it in order.

    Args:
        videos: by their place; each entry has the file's fingerprint, by which it is known again elsewhere.
        listed: clips that were put into a list.
    """

    def __init__(
        self, data: Path, settings: PrepareSettings, videos: dict[str, Any], listed: Sequence[str] = ()
    ) -> None:
        self.data, self.settings, self.videos = data, settings, videos
        self.listed = set(listed)
        self._prints: dict[str, str] = {}
        self._numbers: dict[Shape, int] = {}

    @classmethod
    def open(cls, data: Path, settings: PrepareSettings) -> "PrepareState":
        """That of a data folder, or a new one. Raises InputError: damaged, or of other settings."""
        file = data / STATE
        if not file.exists():
            if (data / _EARLIER).exists():
                raise InputError(
                    f"{data / _EARLIER} is of an earlier version: choose another folder, or remove it "
                    "and the clips beside it"
                )
            state = cls(data, settings, {})
            state._write()
            return state
        try:
            whole, _, torn = file.read_bytes().rpartition(b"\n")  # what was being written by a killed run
            first, *lines = map(json.loads, whole.split(b"\n"))
            before = {**first["settings"]}
            videos = {it["video"]: {"file": it["file"], "stretches": it["stretches"]} for it in lines}
            state = cls(data, settings, videos, first["listed"])
            left = {clip for it in lines for clip in _clips_of(it)} - set(state._clips())
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error}): remove it, and the clips beside it") from error
        different = [
            name
            for name, value in asdict(settings).items()
            if before.get(name) != value and name not in ("kind", "prompt")  # of each video
        ]
        if different and videos:
            told = ", ".join(f"{name} {before.get(name)}" for name in different)
            raise InputError(
                f"{data} was prepared with other settings ({told}): give those, or choose another folder"
            )
        if torn or different:
            state._write()
        for clip in left:  # of a file that another one has replaced
            shutil.rmtree(data / clip, ignore_errors=True)
        for place in state.videos:
            state._move(place)  # a run may have been stopped in the middle of it
        return state

    def take(self, videos: Sequence[Path]) -> list[Path]:
        """Those of some videos that were not prepared yet, of copies the first. Entries go along with files
        that were moved."""
        self._prints = {_place(video): _fingerprint(video) for video in videos}
        places: dict[str, list[str]] = {}
        for place, fingerprint in self._prints.items():
            if fingerprint:
                places.setdefault(fingerprint, []).append(place)
        before = list(self.videos.items())
        for place, entry in before:
            found = places.get(entry["file"], [])
            if found and place not in found and found[0] not in self.videos:
                self.videos[found[0]] = self.videos.pop(place)
        if list(self.videos) != [place for place, _ in before]:
            self._write()  # another video may take that place
        known = {entry["file"] for entry in self.videos.values()} - {""}
        waiting = []
        for video in videos:
            fingerprint = self._prints[_place(video)]
            if fingerprint not in known:
                waiting.append(video)
                known |= {fingerprint} - {""}
        return waiting

    def add(
        self, video: Path, stretches: list[dict[str, Any]], *, settled: bool = True
    ) -> list[dict[str, Any]]:
        """Give a video's clips their places. They are written down before they are taken.

        What a file became that cannot be read just now stays: clips of it are not made worse by that.

        Args:
            stretches: what `prepare_video` gave; thumbnails become names of files.
            video: of those that `take` gave. settled: False: what became of it is not its own doing, and
                another run tries again.
        """
        place = _place(video)
        before = self.videos.get(place)
        if before is not None and not self._prints[place]:
            kept: list[dict[str, Any]] = before["stretches"]
            return kept
        for it in stretches:
            if it["reason"] is None:
                it["clip"] = f"{it['shape']}/{self.settings.kind}/{self._next(it['shape']):05d}"
            it["thumbnails"] = [self._keep_picture(picture) for picture in it.get("thumbnails", [])]
        self.videos[place] = {"file": self._prints[place] if settled else "", "stretches": stretches}
        self._append(place)
        if before is not None:  # the file was another one then
            for clip in _clips_of(before):
                shutil.rmtree(self.data / clip, ignore_errors=True)
        self._move(place)
        return stretches

    def _move(self, place: str) -> None:
        waiting = [it for it in self.videos[place]["stretches"] if "work" in it]
        for it in waiting:
            target = self.data / it["clip"]
            if Path(it["work"]).exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                Path(it["work"]).replace(target)
            del it["work"]  # another run may use that place
        if waiting:
            self._append(place)

    def _next(self, shape: Shape) -> int:
        """A number that no clip ever had, also none of those on disk that are in no state."""
        self._numbers[shape] = self._numbers.get(shape, self._last(shape)) + 1
        return self._numbers[shape]

    def _last(self, shape: Shape) -> int:
        folder = self.data / shape / self.settings.kind
        on_disk = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        clips = {*self._clips(), *self.listed}
        beginning = f"{shape}/{self.settings.kind}/"
        known = [int(clip.removeprefix(beginning)) for clip in clips if clip.startswith(beginning)]
        return max([*on_disk, *known], default=0)

    def _clips(self) -> list[str]:
        return [clip for entry in self.videos.values() for clip in _clips_of(entry)]

    def write_lists(self) -> None:
        """A path list a shape, with the clips of every run.

        Lines that are not of these clips stay, and clips whose line or folder was taken out stay out.
        """
        for shape in SHAPES:
            file = self.data / f"video_{shape}_path.txt"
            before = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            own = {clip for clip in self._clips() if clip.startswith(f"{shape}/")}
            ours = own | self.listed
            foreign = [line for line in before if line.strip() and line not in ours]
            wanted = own - (self.listed - set(before))
            lines = [*foreign, *sorted(clip for clip in wanted if (self.data / clip).is_dir())]
            if not lines:
                file.unlink(missing_ok=True)
            elif lines != before:
                write_file(file, "".join(f"{line}\n" for line in lines).encode())
        self.listed.update(self._clips())
        self._write()
        shown = {
            name
            for entry in self.videos.values()
            for it in entry["stretches"]
            for name in it.get("thumbnails", [])
        }
        for picture in (self.data / THUMBNAILS).glob("*.jpg"):
            if picture.name not in shown:
                picture.unlink()

    def counts(self) -> dict[str, int]:
        """Clips that are there, stretches that are not kept, videos."""
        stretches = [it for entry in self.videos.values() for it in entry["stretches"]]
        kept = sum(it["reason"] is None for it in stretches)
        return {"kept": kept, "dropped": len(stretches) - kept, "videos": len(self.videos)}

    def _keep_picture(self, picture: bytes) -> str:
        """A thumbnail's name: those that look the same are one."""
        name = f"{hashlib.sha256(picture).hexdigest()[:16]}.jpg"
        (self.data / THUMBNAILS).mkdir(exist_ok=True)
        write_file(self.data / THUMBNAILS / name, picture)
        return name

    def _append(self, place: str) -> None:
        with (self.data / STATE).open("ab") as file:
            file.write(_line({"video": place, **self.videos[place]}))
            file.flush()
            os.fsync(file.fileno())

    def _write(self) -> None:
        first = {"settings": asdict(self.settings), "listed": sorted(self.listed)}
        lines = [first, *({"video": place, **entry} for place, entry in self.videos.items())]
        write_file(self.data / STATE, b"".join(map(_line, lines)))


def _clips_of(entry: dict[str, Any]) -> list[str]:
    return [it["clip"] for it in entry["stretches"] if it["reason"] is None]


def _line(content: dict[str, Any]) -> bytes:
    # As `json.loads` decodes: names of files may be no UTF-8.
    return json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def _place(video: Path) -> str:
    return str(video.absolute())


def _fingerprint(video: Path) -> str:
    """Empty where the file cannot be read: it is known by nothing, and tried again."""
    try:
        return file_fingerprint(video)
    except OSError:
        return ""
