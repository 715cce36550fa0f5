"""Raw videos into clips: what is kept, what is not and why, and that nothing is lost or done twice."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_folders import looked_at_or_killed
from command_line import run
from media_files import tone, write_video
from raw_videos import SHORT, SIZE, empty, needs_networks, puppet, video
from stableavatar.data.clips import FolderClip, read_path_list
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings
from stableavatar.data.landmarks import FaceLandmarker
from stableavatar.data.prepare import prepare, prepare_video, shape_of
from stableavatar.data.prepare_state import PrepareState
from stableavatar.data.stretches import PrepareSettings, Stretch
from stableavatar.errors import InputError, StorageError
from stableavatar.media.audio import Sound, Speech
from stableavatar.media.reading import probe, read_frames
from stableavatar.media.video import VideoWriter

pytestmark = needs_networks


@pytest.fixture(scope="module")
def landmarker() -> FaceLandmarker:
    return FaceLandmarker()


@pytest.mark.parametrize(
    ("size", "shape"),
    [((1920, 1080), "rec"), ((1080, 1920), "vec"), ((700, 700), "square"), ((600, 500), "square")],
)
def test_shapes(size: tuple[int, int], shape: str) -> None:
    assert shape_of(*size) == shape


class TestFolder:
    @pytest.fixture
    def raw(self, tmp_path: Path) -> Path:
        raw = tmp_path / "raw"
        video(raw / "one.mp4", [puppet(951_000, 1.0), puppet(951_001, 0.8)])
        video(raw / "deeper" / "two.mp4", [puppet(951_002, 0.8)])
        (raw / "broken.mp4").write_bytes(b"no video")
        (raw / "notes.txt").write_text("no video")
        return raw

    def test_clips_lists_and_report(self, raw: Path, tmp_path: Path) -> None:
        data = tmp_path / "data"
        counts = prepare(raw, data, SHORT, tell=lambda _: None)
        assert counts == {"kept": 3, "dropped": 1, "videos": 3}
        folders = read_path_list(data / "video_square_path.txt")
        assert [folder.relative_to(data).as_posix() for folder in folders] == [
            f"square/speech/0000{k}" for k in (1, 2, 3)
        ]
        dataset = ClipDataset.from_folders(folders, ClipDatasetSettings(frames=17))
        sample = dataset[0, 0]
        assert sample.frames.shape == (17, 512, 512, 3)
        assert sample.face_mask is not None
        assert sample.lip_mask is not None
        assert 0.1 < sample.face_mask.mean() < 0.7
        assert 0.003 < sample.lip_mask.mean() < 0.06
        assert sample.prompt == "The protagonist is talking"
        lengths = sorted(FolderClip.open(folder).length for folder in folders)
        assert lengths == [20, 20, 25]
        for folder in folders:
            found = probe(folder / "sub_clip.mp4")
            assert (found.width, found.height, found.fps) == (512, 512, 25)
            assert found.sound_seconds == pytest.approx(found.seconds, abs=0.05)
            with Speech.open(folder / "audio.wav") as speech:
                assert speech.seconds == pytest.approx(found.seconds, abs=0.002)
        page = (data / "report.html").read_text()
        assert "3 clips of 3 videos" in page
        assert "broken.mp4" in page
        assert page.count("<img") == 9  # nothing can be shown of the broken one
        assert not (data / ".prepare").exists()

    def test_the_report_shows_what_was_dropped_too(self, tmp_path: Path) -> None:
        video(tmp_path / "raw" / "a.mp4", [puppet(951_000, 0.8), empty(0.8), puppet(951_001, 0.8)])
        assert prepare(tmp_path / "raw", tmp_path / "data", SHORT, tell=lambda _: None)["dropped"] == 1
        (entry,) = states(tmp_path / "data").values()
        wall, person = [], []
        for stretch in entry["stretches"]:
            assert len(stretch["thumbnails"]) == (3 if stretch["reason"] is None else 1)
            for picture in stretch["thumbnails"]:
                pixels = np.asarray(Image.open(tmp_path / "data" / "report_pictures" / picture))
                (person if stretch["reason"] is None else wall).append(float(pixels.std()))
        assert max(wall) < 5 < min(person)

    def test_the_sound_is_that_of_the_pictures(self, tmp_path: Path) -> None:
        raw = tmp_path / "raw"
        samples = np.concatenate([tone(1.0, 48_000, 300), tone(0.8, 48_000, 900)])
        raw.mkdir()
        frames = np.concatenate([puppet(951_000, 1.0), puppet(951_001, 0.8)])
        write_video(raw / "a.mp4", list(frames), samples)
        prepare(raw, tmp_path / "data", SHORT, tell=lambda _: None)
        for number, hertz in ((1, 300), (2, 900)):
            with Speech.open(
                tmp_path / "data" / "square" / "speech" / f"0000{number}" / "audio.wav"
            ) as speech:
                spectrum = np.abs(np.fft.rfft(speech.samples(1600, 9600)))
            assert np.argmax(spectrum) * 16_000 / 8000 == pytest.approx(hertz, abs=3)

    def test_another_run_does_what_is_new(self, raw: Path, tmp_path: Path) -> None:
        data = tmp_path / "data"
        prepare(raw, data, SHORT, tell=lambda _: None)
        before = {path: path.stat().st_mtime_ns for path in data.rglob("frame_*.png")}
        said: list[str] = []
        video(raw / "three.mp4", [puppet(951_003, 0.8)])
        counts = prepare(raw, data, SHORT, tell=said.append)
        assert counts["kept"] == 4
        assert said[:2] == [
            "left out, no videos by their names: 1 (.txt)",
            "3 of 4 videos were prepared before, or are copies",
        ]
        assert len(said) == 3
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert len(read_path_list(data / "video_square_path.txt")) == 4
        with pytest.raises(InputError, match="other settings"):
            prepare(raw, data, PrepareSettings(), tell=lambda _: None)

    def test_a_run_that_was_killed_between_writing_and_moving(self, raw: Path, tmp_path: Path) -> None:
        """The state names the clips' places before they are taken."""
        data = tmp_path / "data"
        prepare(raw, data, SHORT, tell=lambda _: None)
        entry = states(data)[str(raw / "one.mp4")]
        kept = [it for it in entry["stretches"] if it["reason"] is None]
        work = data / ".prepare" / "somewhere"
        work.parent.mkdir(parents=True)
        kept[1]["work"] = str(work)
        with (data / "prepare.jsonl").open("a") as journal:
            journal.write(f'{json.dumps(entry)}\n{{"video": "torn')
        (data / kept[1]["clip"]).replace(work)
        counts = prepare(raw, data, SHORT, tell=lambda _: None)
        assert counts["kept"] == 3
        assert FolderClip.open(data / kept[1]["clip"]).length == 20

    def test_a_video_that_has_changed_is_prepared_anew(self, raw: Path, tmp_path: Path) -> None:
        data = tmp_path / "data"
        prepare(raw, data, SHORT, tell=lambda _: None)
        video(raw / "deeper" / "two.mp4", [puppet(951_004, 0.6)])
        counts = prepare(raw, data, SHORT, tell=lambda _: None)
        assert counts["kept"] == 3
        folders = read_path_list(data / "video_square_path.txt")
        assert sorted(FolderClip.open(folder).length for folder in folders) == [15, 20, 25]
        assert len(list((data / "square" / "speech").iterdir())) == 3

    def test_two_workers_and_the_command(self, raw: Path, tmp_path: Path) -> None:
        done = run(
            "prepare", raw, tmp_path / "data", "--kind", "singing", "--least-seconds", "0.5", "--workers", "2",
            "--prompt", "A puppet sings",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "3 clips of 3 videos, 1 stretches dropped" in done.output.replace("\n", " ")
        clips = sorted((tmp_path / "data" / "square" / "singing").iterdir())
        assert [clip.name for clip in clips] == ["00001", "00002", "00003"]
        assert FolderClip.open(clips[0]).prompt == "A puppet sings"
        assert len(list(read_frames(clips[0] / "sub_clip.mp4"))) in (20, 25)

    def test_nothing_to_prepare(self, tmp_path: Path) -> None:
        done = run("prepare", tmp_path, tmp_path / "data")
        assert done.exit_code == 2
        assert "holds no video" in done.output
        assert not (tmp_path / "data").exists()

    def test_another_raw_folder_adds_its_clips(self, tmp_path: Path) -> None:
        for name, seed in (("first", 951_010), ("second", 951_011)):
            video(tmp_path / name / "a.mp4", [puppet(seed, 0.8)])
        for name in ("first", "second"):
            counts = prepare(tmp_path / name, tmp_path / "data", SHORT, tell=lambda _: None)
        assert counts == {"kept": 2, "dropped": 0, "videos": 2}
        assert len(read_path_list(tmp_path / "data" / "video_square_path.txt")) == 2
        said: list[str] = []
        (tmp_path / "first").rename(tmp_path / "moved")
        prepare(tmp_path / "moved", tmp_path / "data", SHORT, tell=said.append)
        assert said == ["1 of 1 videos were prepared before, or are copies"]

    def test_lists_keep_what_others_wrote_and_took_out(self, raw: Path, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        file = data / "video_square_path.txt"
        file.write_text("square/speech/90001\n/elsewhere/7\n")
        prepare(raw, data, SHORT, tell=lambda _: None)
        lines = file.read_text().splitlines()
        assert lines[:2] == ["square/speech/90001", "/elsewhere/7"]
        assert len(lines) == 5
        file.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
        shutil.rmtree(data / lines[3])
        video(raw / "three.mp4", [puppet(951_003, 0.8)])
        prepare(raw, data, SHORT, tell=lambda _: None)
        after = file.read_text().splitlines()
        assert after[:3] == [*lines[:2], lines[4]]
        assert len(after) == 4
        assert after[3] not in lines

    def test_kinds_share_a_folder_as_the_layout_has_it(self, tmp_path: Path) -> None:
        for kind, seed in (("speech", 951_032), ("singing", 951_031)):
            video(tmp_path / kind / "a.mp4", [puppet(seed, 0.8)])
            settings = replace(SHORT, kind=kind)
            prepare(tmp_path / kind, tmp_path / "data", settings, tell=lambda _: None)
        folders = read_path_list(tmp_path / "data" / "video_square_path.txt")
        assert [folder.parent.name for folder in folders] == ["singing", "speech"]
        assert {folder.name for folder in folders} == {"00001"}
        assert FolderClip.open(folders[0]).prompt == "The protagonist is singing"

    def test_two_runs_at_once_are_refused(self, raw: Path, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        with (tmp_path / "data" / ".prepare.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(InputError, match="another run prepares"):
                prepare(raw, tmp_path / "data", SHORT, tell=lambda _: None)

    def test_a_list_that_becomes_empty_goes(self, tmp_path: Path) -> None:
        raw, data = tmp_path / "raw", tmp_path / "data"
        video(raw / "a.mp4", [puppet(951_000, 0.8)])
        prepare(raw, data, SHORT, tell=lambda _: None)
        video(raw / "a.mp4", [empty(0.8)])
        assert prepare(raw, data, SHORT, tell=lambda _: None)["kept"] == 0
        assert not (data / "video_square_path.txt").exists()

    def test_its_own_clips_are_no_raw_videos(self, tmp_path: Path) -> None:
        video(tmp_path / "raw" / "a.mp4", [puppet(951_000, 0.8)])
        for _ in range(2):
            counts = prepare(tmp_path / "raw", tmp_path / "raw" / "data", SHORT, tell=lambda _: None)
        assert counts["videos"] == 1

    def test_a_full_disk_is_no_verdict_on_a_video(
        self, raw: Path, tmp_path: Path, landmarker: FaceLandmarker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise StorageError("no room")

        monkeypatch.setattr("stableavatar.data.prepare.write_clip", full)
        with pytest.raises(StorageError):
            prepare_video(raw / "one.mp4", tmp_path / "work", SHORT)

    def test_what_is_not_the_videos_doing_is_tried_again(self, raw: Path, tmp_path: Path) -> None:
        one = raw / "one.mp4"
        state = PrepareState.open(tmp_path, SHORT)
        assert state.take([one]) == [one]
        state.add(one, [asdict(Stretch(0, 0, "MemoryError"))], settled=False)
        again = PrepareState.open(tmp_path, SHORT)
        assert again.videos[str(one)]["stretches"][0]["reason"] == "MemoryError"
        assert again.take([one]) == [one]
        again.add(one, [asdict(Stretch(0, 9, "silent"))])
        assert again.take([one]) == []

    def test_a_video_that_got_another_name_keeps_its_clips(self, tmp_path: Path) -> None:
        """Also where another one has the old name now."""
        raw, data = tmp_path / "raw", tmp_path / "data"
        video(raw / "a.mp4", [puppet(951_040, 0.8)])
        prepare(raw, data, SHORT, tell=lambda _: None)
        (first,) = read_path_list(data / "video_square_path.txt")
        (raw / "a.mp4").rename(raw / "b.mp4")
        video(raw / "a.mp4", [puppet(951_041, 0.8)])
        said: list[str] = []
        assert prepare(raw, data, SHORT, tell=said.append)["kept"] == 2
        assert said[0] == "1 of 2 videos were prepared before, or are copies"
        assert first.is_dir()
        assert len(read_path_list(data / "video_square_path.txt")) == 2

    def test_a_video_that_may_not_be_read_is_told_and_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(path: Path) -> str:
            raise PermissionError(13, "Permission denied", str(path))

        one = tmp_path / "one.mp4"
        one.write_bytes(b"something")
        state = PrepareState.open(tmp_path, SHORT)
        monkeypatch.setattr("stableavatar.data.prepare_state.file_fingerprint", refused)  # root may read all
        assert state.take([one]) == [one]
        state.add(one, [asdict(Stretch(0, 0, "cannot be read"))])
        assert state.take([one]) == [one]

    def test_an_error_ends_the_workers_at_once(
        self, raw: Path, tmp_path: Path, landmarker: FaceLandmarker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        video(raw / "a_long.mp4", [puppet(951_050, 4.0)] * 8)  # begun first, while another one is broken
        others = set(multiprocessing.active_children())

        def full(*_: object, **__: object) -> None:
            raise StorageError("no room")

        monkeypatch.setattr(PrepareState, "add", full)
        with pytest.raises(StorageError) as raised:
            prepare(raw, tmp_path / "data", SHORT, workers=2, tell=lambda _: None)
        assert raised.traceback  # which holds on to the frames that the error passed through
        assert not set(multiprocessing.active_children()) - others
        assert not list((tmp_path / "data").rglob("prompt.txt")), "the long one was not waited for"

    def test_a_clip_ends_with_its_sound(self, tmp_path: Path) -> None:
        raw, data = tmp_path / "raw", tmp_path / "data"
        raw.mkdir()
        write_video(raw / "a.mp4", list(puppet(951_000, 2.0)), tone(1.0, 48_000, 300))
        write_video(raw / "b.mp4", list(puppet(951_001, 1.0)), tone(0.2, 48_000, 300))
        assert prepare(raw, data, SHORT, tell=lambda _: None) == {"kept": 1, "dropped": 1, "videos": 2}
        (folder,) = read_path_list(data / "video_square_path.txt")
        clip = FolderClip.open(folder)
        assert clip.length == pytest.approx(25, abs=1)
        clip.read_speech(0, clip.length)
        assert "s of sound" in (data / "prepare.jsonl").read_text()

    @pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
    def test_a_run_that_is_ended_leaves_no_worker_and_goes_on(
        self, raw: Path, tmp_path: Path, how: str
    ) -> None:
        for number in range(3):
            video(raw / f"more{number}.mp4", [puppet(951_020 + number, 2.0)])
        command = [
            sys.executable, "-m", "stableavatar", "prepare", str(raw), str(tmp_path / "data"), "--workers", "2",
            "--least-seconds", "0.5",
        ]  # fmt: skip
        # A test run in the background has SIGINT ignored, and so would what it starts.
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        state = tmp_path / "data" / "prepare.jsonl"
        while not state.exists() or state.read_text().count("\n") < 2:
            assert started.poll() is None
            time.sleep(0.02)
        workers = set(children(started.pid))
        assert len(workers) >= 2
        started.send_signal(getattr(signal, how))
        assert started.wait(20) != 0
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{worker}/fd").exists() and alive(worker) for worker in workers):
            assert time.monotonic() < deadline, "workers go on"
            time.sleep(0.05)
        assert 0 < len(states(state.parent)) < 6
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len(states(state.parent)) == 6

    def test_a_video_that_kills_its_worker_is_left_out_and_the_others_are_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw, data = tmp_path / "raw", tmp_path / "data"
        raw.mkdir()
        for name in ("a", "b", "deadly", "e", "f"):
            (raw / f"{name}.mp4").write_text(name)
        monkeypatch.setattr("stableavatar.data.prepare.prepare_video", looked_at_or_killed)
        for _ in range(2):  # it is tried again, and stops nobody then either
            assert prepare(raw, data, SHORT, workers=3, tell=lambda _: None)["videos"] == 5
        reasons = {Path(name).stem: entry["stretches"][0]["reason"] for name, entry in states(data).items()}
        assert "worker was killed" in reasons.pop("deadly")
        assert set(reasons.values()) == {"looked at"}

    def test_where_every_worker_is_killed_no_video_is_to_blame(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw = tmp_path / "raw"
        raw.mkdir()
        for number in range(5):
            (raw / f"deadly{number}.mp4").write_text(str(number))
        monkeypatch.setattr("stableavatar.data.prepare.prepare_video", looked_at_or_killed)
        with pytest.raises(InputError, match="every process"):
            prepare(raw, tmp_path / "data", SHORT, workers=2, tell=lambda _: None)

    def test_many_names_that_are_no_videos_are_told_in_short(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw, told = tmp_path / "raw", list[str]()
        raw.mkdir()
        for number in range(40):
            (raw / f"log.{number}").write_text("")
        (raw / "a.mp4").write_text("a")
        monkeypatch.setattr("stableavatar.data.prepare.prepare_video", looked_at_or_killed)
        prepare(raw, tmp_path / "data", SHORT, tell=told.append)
        assert told[0].startswith("left out, no videos by their names: 40 (")
        assert told[0].count(",") == 11

    def test_of_copies_one_is_prepared(self, tmp_path: Path) -> None:
        raw = tmp_path / "raw"
        first = video(raw / "a.mp4", [puppet(951_000, 0.8)])
        shutil.copy(first, raw / "b.mp4")
        for _ in range(2):
            counts = prepare(raw, tmp_path / "data", SHORT, tell=lambda _: None)
            assert counts == {"kept": 1, "dropped": 0, "videos": 1}

    def test_a_name_that_is_no_utf8(self, tmp_path: Path) -> None:
        raw, data = tmp_path / "raw", tmp_path / "data"
        video(raw / "a.mp4", [puppet(951_000, 0.8)]).rename(raw / os.fsdecode(b"Jos\xe9.mp4"))
        for _ in range(2):
            done = run("prepare", raw, data, "--least-seconds", "0.5")
            assert done.exit_code == 0, done.output
            assert "1 clips of 1 videos" in done.output.replace("\n", " ")
        assert "Jos" in (data / "report.html").read_text()

    def test_its_own_clips_are_none_either_where_a_folder_has_two_names(self, tmp_path: Path) -> None:
        raw, other = tmp_path / "raw", tmp_path / "other"
        video(raw / "a.mp4", [puppet(951_000, 0.8)])
        other.symlink_to(raw)
        for _ in range(2):
            assert prepare(raw, other / "data", SHORT, tell=lambda _: None)["videos"] == 1

    def test_of_a_file_that_is_cut_off_what_comes_before_is_kept(self, tmp_path: Path) -> None:
        """As of a long recording whose copy was broken off: its header promises more."""
        path = tmp_path / "a.mp4"
        frames = np.concatenate([puppet(951_000, 0.8), puppet(951_001, 1.6)])
        sound = Sound.from_array(tone(2.4, 48_000), 48_000)
        with VideoWriter(path, SIZE, SIZE, 25, sound=sound) as writer:
            for frame in frames:
                writer.write(frame)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 4 // 5])
        found = prepare_video(path, tmp_path / "work", SHORT)
        assert [(it["start"], it["reason"]) for it in found][:2] == [(0, None), (20, None)]
        assert "cut off" in found[2]["reason"] or "damaged" in found[2]["reason"]
        assert 35 < found[1]["stop"] < 60
        for number, it in enumerate(found[:2]):
            clip = FolderClip.open(move_to_layout(tmp_path / "work" / str(number), tmp_path / str(number)))
            assert clip.length == it["stop"] - it["start"]
            clip.read_speech(0, clip.length)


def move_to_layout(work: Path, root: Path) -> Path:
    """A clip of `prepare_video` where its folder says what it shows."""
    (root / "speech").mkdir(parents=True)
    return work.rename(root / "speech" / "00001")


def states(data: Path) -> dict[str, dict[str, Any]]:
    """What the journal says of every video."""
    lines = (data / "prepare.jsonl").read_bytes().rpartition(b"\n")[0].split(b"\n")[1:]
    return {entry["video"]: entry for entry in map(json.loads, lines)}


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(process: int) -> bool:
    """Whether it runs, and does not only wait for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_no_clip_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "broken.mp4").write_bytes(b"no video")
    done = run("prepare", tmp_path / "raw", tmp_path / "data")
    assert done.exit_code == 2
    assert "no clip of 1 videos" in done.stderr
    assert "broken.mp4" in (tmp_path / "data" / "report.html").read_text()


def test_folders_that_are_not_there_or_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        prepare(tmp_path / "nowhere", tmp_path / "data", SHORT)
    (tmp_path / "raw").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        prepare(tmp_path / "raw", tmp_path / "file", SHORT)


CLIPS = Path(__file__).parents[2] / "shared" / "samples" / "clips"


@pytest.mark.shared
@pytest.mark.skipif(not CLIPS.is_dir(), reason="the samples are not beside the checkout")
def test_clips_of_real_people(tmp_path: Path) -> None:
    talks = sorted(CLIPS.glob("*.mp4"))
    counts = prepare(CLIPS, tmp_path, PrepareSettings(), tell=lambda _: None)
    assert counts["videos"] == len(talks)
    clips = [FolderClip.open(folder) for folder in read_path_list(tmp_path / "video_vec_path.txt")]
    seconds = sum(probe(talk).seconds for talk in talks)
    assert sum(clip.length for clip in clips) / 25 == pytest.approx(seconds, abs=0.2 * len(talks))
    for clip in clips:
        assert clip.size == (480, 832)
        for start in range(0, clip.length - 4, clip.length // 5):
            faces, lips = (clip.read_masks(kind, start, 4) > 0 for kind in ("face_masks", "lip_masks"))
            assert 0.02 < faces.mean() < 0.4
            assert 0.02 < lips.sum() / faces.sum() < 0.2
            assert (lips & faces).sum() / lips.sum() > 0.99
