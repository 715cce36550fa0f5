"""A run that is interrupted, killed or refused: what it goes on from, and that the video is the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import QUICK, Nursery, portrait, run, speech, start, toy_model
from media_files import tone, write_wav
from stableavatar.apps.command_options import stored_settings
from stableavatar.errors import InputError, StoppedError
from stableavatar.generation import Progress
from stableavatar.journal import Journal, SavedState, refuse_unfinished
from stableavatar.media.image import read_picture
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.media.segments import SegmentWriter
from stableavatar.options import OutputOptions
from stableavatar.pipeline import AvatarPipeline
from stableavatar.unfinished import journal_index
from stableavatar.writing import GeneratedVideo
from toy import toy_folder, toy_pipeline

PICTURE = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
SAMPLES = np.random.default_rng(0).uniform(-0.5, 0.5, 70 * 640).astype(np.float32)
EVERY = OutputOptions(checkpoint_every=0, preset="ultrafast")


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    made = toy_pipeline()
    made.vae.tile_sample_min_height = made.vae.tile_sample_min_width = 16
    made.vae.tile_sample_stride_height = made.vae.tile_sample_stride_width = 8
    return made


class Stop:
    """Says so when it has been asked so many times."""

    def __init__(self, cells: int) -> None:
        self.left = cells

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def make(pipeline: AvatarPipeline, output: Path, **more: object) -> GeneratedVideo:
    options = {"steps": 3, "seed": 3, "width": 32, "height": 32, "output_options": EVERY, **more}
    return pipeline.generate(PICTURE, SAMPLES, output, **options)


def decoded(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "causal"},
        {"order": "lockstep"},
        {"batch_windows": 3},
        {"step_cache": 0.5},
        {"decoder_tiling": True},
        {"compat": "upstream"},
        {"overlap": 3, "overlap_weights": "log"},
    ],
    ids=lambda options: str(next(iter(options), "plain")),
)
def test_a_run_stopped_again_and_again_gives_the_same_file(
    pipeline: AvatarPipeline, tmp_path: Path, options: dict[str, object]
) -> None:
    whole = decoded(make(pipeline, tmp_path / "whole.mp4", **options).path)
    output, stops = tmp_path / "out.mp4", 0
    while True:
        try:
            made = make(pipeline, output, resume=True, stop=Stop(3), **options)
            break
        except StoppedError:
            stops += 1
            assert not output.exists()
    assert stops >= 2
    assert made.frame_count == len(whole)
    assert np.array_equal(decoded(output), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "whole.mp4"]


def test_what_is_finished_plays_after_an_interruption(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    whole = decoded(make(pipeline, tmp_path / "whole.mp4").path)
    with pytest.raises(StoppedError, match=r"out\.unfinished\.mp4 plays the .* --resume goes on"):
        make(pipeline, tmp_path / "out.mp4", stop=Stop(12))
    part = decoded(tmp_path / "out.unfinished.mp4")
    assert 9 <= len(part) < len(whole)
    assert np.array_equal(part, whole[: len(part)])
    info = probe(tmp_path / "out.unfinished.mp4")
    assert info.sound_seconds == pytest.approx(len(part) / 25, abs=0.001)
    make(pipeline, tmp_path / "out.mp4", resume=True)
    assert not (tmp_path / "out.unfinished.mp4").exists()
    with pytest.raises(StoppedError, match="before the first frame"):
        make(pipeline, tmp_path / "other.mp4", stop=Stop(0))


def test_pictures_go_on_too(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    def encoding(name: str) -> OutputOptions:
        return OutputOptions(checkpoint_every=0, frames=tmp_path / name)

    make(pipeline, tmp_path / "whole.mp4", output_options=encoding("whole"))
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", output_options=encoding("out"), stop=Stop(12))
    assert not (tmp_path / "out").exists()
    make(pipeline, tmp_path / "out.mp4", output_options=encoding("out"), resume=True)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert np.array_equal(read_picture(tmp_path / "out" / name), read_picture(tmp_path / "whole" / name))


def test_pictures_are_not_begun_in_the_middle(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    frames = OutputOptions(checkpoint_every=0, preset="ultrafast", frames=tmp_path / "out")
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", stop=Stop(12))
    with pytest.raises(InputError, match="frames folder"):
        make(pipeline, tmp_path / "out.mp4", output_options=frames, resume=True)
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", output_options=frames, resume=False, stop=Stop(12))
    next(tmp_path.glob(".out.*.pictures/frame_*")).unlink()
    with pytest.raises(InputError, match="are missing"):
        make(pipeline, tmp_path / "out.mp4", output_options=frames, resume=True)
    assert not (tmp_path / "out").exists()


def test_two_videos_meant_for_one_folder_of_pictures(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    """The one that is complete first gets it; the other's pictures stay, and it goes on when there is room."""
    frames = OutputOptions(checkpoint_every=0, preset="ultrafast", frames=tmp_path / "frames")
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", output_options=frames, stop=Stop(12))
    (tmp_path / "another").mkdir()
    made = make(pipeline, tmp_path / "another" / "out.mp4", output_options=frames, seed=4)
    with pytest.raises(InputError, match="not empty"):
        make(pipeline, tmp_path / "out.mp4", output_options=frames, resume=True)
    (tmp_path / "frames").rename(tmp_path / "others")
    make(pipeline, tmp_path / "out.mp4", output_options=frames, resume=True)
    for number in range(made.frame_count):
        mine, others = (
            read_picture(tmp_path / name / f"frame_{number:06d}.png") for name in ("frames", "others")
        )
        assert not np.array_equal(mine, others)


def test_a_recording_that_changes_during_a_run_is_not_its_sound(
    pipeline: AvatarPipeline, tmp_path: Path
) -> None:
    recording, output = speech(tmp_path / "speech.wav", 2.0), tmp_path / "out.mp4"
    former = recording.rename(tmp_path / "former.wav")
    options = {"steps": 1, "seed": 3, "width": 32, "height": 32, "output_options": EVERY}
    whole = decoded(pipeline.generate(PICTURE, former, tmp_path / "whole.mp4", **options).path)
    shutil.copy(former, recording)

    def export_again(progress: Progress) -> None:
        if progress.frame == 1:
            write_wav(recording, tone(2.0, 16000, 1500), 16000)

    with pytest.raises(InputError, match=r"has changed since this run began\. .* --resume goes on"):
        pipeline.generate(PICTURE, recording, output, progress=export_again, **options)
    assert not output.exists()
    with pytest.raises(InputError, match="the speech"):
        pipeline.generate(PICTURE, recording, output, resume=True, **options)
    shutil.copy(former, recording)
    pipeline.generate(PICTURE, recording, output, resume=True, **options)
    assert np.array_equal(decoded(output), whole)


def test_a_video_that_was_to_be_replaced_is_gone_on_with(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    old = decoded(make(pipeline, tmp_path / "out.mp4", seed=9).path)
    with pytest.raises(InputError, match="no unfinished run of it"):
        make(pipeline, tmp_path / "out.mp4", resume=True)
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", resume=False, stop=Stop(5))
    assert np.array_equal(decoded(tmp_path / "out.mp4"), old)
    make(pipeline, tmp_path / "out.mp4", resume=True)
    assert not np.array_equal(decoded(tmp_path / "out.mp4"), old)


def test_the_seed_is_the_first_runs(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", seed=None, stop=Stop(5))
    made = make(pipeline, tmp_path / "out.mp4", seed=None, resume=True)
    again = make(pipeline, tmp_path / "again.mp4", seed=made.options.seed)
    assert np.array_equal(decoded(made.path), decoded(again.path))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prompt": "someone sings"}, r"prompt \(was .* is 'someone sings'\)"),
        ({"seed": 4}, r"seed \(was 3, is 4\)"),
        ({"decoder_tiling": True}, r"decoder-tiling \(was False, is True\)"),
        ({"output_options": OutputOptions(quality=30)}, "quality"),
    ],
)
def test_other_settings_are_refused(
    pipeline: AvatarPipeline, tmp_path: Path, change: dict[str, object], what: str
) -> None:
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", stop=Stop(5))
    with pytest.raises(InputError, match=what):
        make(pipeline, tmp_path / "out.mp4", resume=True, **change)
    make(pipeline, tmp_path / "out.mp4", resume=True)  # and it is still there


def test_another_decoder_device_may_go_on(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    """Where memory did not suffice for decoding, the CPU's may."""
    whole = decoded(make(pipeline, tmp_path / "whole.mp4").path)
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", stop=Stop(5))
    make(pipeline, tmp_path / "out.mp4", resume=True, decoder_device="cpu")
    assert np.array_equal(decoded(tmp_path / "out.mp4"), whole)


def test_other_inputs_and_weights_are_refused(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    with pytest.raises(StoppedError):
        make(pipeline, output, stop=Stop(5))
    options = {"steps": 3, "seed": 3, "width": 32, "height": 32, "output_options": EVERY, "resume": True}
    with pytest.raises(InputError, match="the portrait"):
        pipeline.generate(255 - PICTURE, SAMPLES, output, **options)
    with pytest.raises(InputError, match="the speech"):
        pipeline.generate(PICTURE, SAMPLES * 0.5, output, **options)
    other = toy_pipeline()
    with torch.no_grad():
        other.transformer.blocks[1].ffn.net[2].weight.mul_(1.01)
    with pytest.raises(InputError, match="the weights"):
        other.generate(PICTURE, SAMPLES, output, **options)
    other = toy_pipeline()
    other.tokenizer.add_tokens(["protagonist"])
    with pytest.raises(InputError, match="these differ: the tokens of the prompts"):
        other.generate(PICTURE, SAMPLES, output, **options)


@pytest.mark.parametrize("part", ["vae", "image_encoder"])
def test_another_configuration_of_the_same_weights_is_refused(
    pipeline: AvatarPipeline, tmp_path: Path, part: str
) -> None:
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", stop=Stop(5))
    file = toy_folder(tmp_path / "model") / part / "config.json"
    again = AvatarPipeline.from_pretrained(tmp_path / "model")  # of another place, and saved meanwhile
    again.vae.tile_sample_min_height = again.vae.tile_sample_min_width = 16
    config = json.loads(file.read_text())
    if part == "vae":
        config["latents_std"][0] *= 1.5
    else:
        config["layer_norm_eps"] = 1e-3
    file.write_text(json.dumps(config))
    other = AvatarPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="these differ: the model's configuration"):
        make(other, tmp_path / "out.mp4", resume=True)
    make(again, tmp_path / "out.mp4", resume=True)


def test_what_was_begun_is_not_lost_by_accident(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", stop=Stop(5))
    with pytest.raises(InputError, match="--resume to go on with it, or --overwrite"):
        make(pipeline, tmp_path / "out.mp4")
    with pytest.raises(InputError, match="overlap"):  # refused before it has begun
        make(pipeline, tmp_path / "out.mp4", resume=False, overlap=1000)
    assert journal_index(tmp_path / "out.mp4").exists()
    make(pipeline, tmp_path / "out.mp4", resume=True)
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", resume=False, stop=Stop(12))
    quick = OutputOptions(checkpoint_every=1e6)  # it ends before its first state
    make(pipeline, tmp_path / "out.mp4", resume=False, output_options=quick)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.mp4"]


def test_a_live_video_takes_the_place_of_what_was_begun(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        make(pipeline, tmp_path / "out.mp4", stop=Stop(12))
    live = OutputOptions(live=True)
    with pytest.raises(InputError, match="--resume to go on with it, or --overwrite"):
        make(pipeline, tmp_path / "out.mp4", output_options=live)
    make(pipeline, tmp_path / "out.mp4", output_options=live, resume=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.mp4"]


def test_two_runs_of_one_video(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(_state: Progress) -> None:
        if not seen:
            with pytest.raises(InputError, match="another process") as caught:
                make(pipeline, tmp_path / "out.mp4")
            seen.append(str(caught.value))

    make(pipeline, tmp_path / "out.mp4", progress=progress)
    assert seen
    assert list(tmp_path.iterdir()) == [tmp_path / "out.mp4"]


def test_the_state_is_saved_now_and_then(
    pipeline: AvatarPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = Journal.save

    def count(self: Journal, state: SavedState) -> None:
        save(self, state)
        saved.append(len([path for path in self.folder.iterdir() if path.name.startswith("state-")]))

    monkeypatch.setattr(Journal, "save", count)
    make(pipeline, tmp_path / "out.mp4", output_options=OutputOptions(checkpoint_every=3600))
    assert saved == []
    make(pipeline, tmp_path / "out.mp4")
    assert saved == [1] * (3 * 6)


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: int) -> None:
    original = getattr(owner, name)
    calls: list[int] = []

    def fail(self: object, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == after:
            raise OSError(28, "No space left on device")
        return original(self, *arguments, **options)

    monkeypatch.setattr(owner, name, fail)


def test_a_full_disk_leaves_what_can_be_gone_on_with(
    pipeline: AvatarPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decoded(make(pipeline, tmp_path / "whole.mp4").path)
    for owner, name, after in ((Path, "replace", 21), (Path, "write_text", 4), (SegmentWriter, "_join", 1)):
        with monkeypatch.context() as patch:
            failing(patch, owner, name, after)
            with pytest.raises(InputError, match="No space left"):
                make(pipeline, tmp_path / "out.mp4")
        assert not (tmp_path / "out.mp4").exists()
        make(pipeline, tmp_path / "out.mp4", resume=True)
        assert np.array_equal(decoded(tmp_path / "out.mp4"), whole)
        (tmp_path / "out.mp4").unlink()


def without(file: Path, *keys: str) -> None:
    """Take a value out of JSON."""
    whole = json.loads(file.read_text())
    part = whole
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    file.write_text(json.dumps(whole))


def test_a_damaged_journal_is_named(pipeline: AvatarPipeline, tmp_path: Path) -> None:
    folder = tmp_path / ".out.journal"
    for damage, what in (
        (lambda: next(folder.glob("state-*")).write_bytes(b"no"), "--overwrite"),
        (lambda: next(folder.glob("segment-*")).unlink(), "--overwrite"),
        (lambda: (folder / "journal.json").write_text("{"), "remove that folder"),
        (lambda: (folder / "journal.json").write_text("[]"), "remove that folder"),
        (lambda: (folder / "journal.json").write_text('{"format": 4}'), "remove that folder"),
        (lambda: without(folder / "journal.json", "rest", "segments"), "remove that folder"),
        (lambda: without(folder / "journal.json", "rest", "trajectory", "done"), "remove that folder"),
        (lambda: without(folder / "journal.json", "identity", "settings"), "remove that folder"),
        (lambda: (folder / "journal.json").write_text('{"format": 0}'), "another release"),
    ):
        with pytest.raises(StoppedError):
            make(pipeline, tmp_path / "out.mp4", stop=Stop(12), resume=False)
        damage()
        with pytest.raises(InputError, match=what):
            make(pipeline, tmp_path / "out.mp4", resume=True)


def test_killed_as_the_journal_of_a_finished_video_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "out.mp4")
    journal.begin({"settings": {}})
    (journal.folder / "segment-000000.mp4").write_bytes(b"a segment")
    journal.save(SavedState({"a": torch.zeros(1)}, {"segments": 1}))
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(("segment", "state")):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.finish()
    journal._lock.close()
    assert (journal.folder / "segment-000000.mp4").exists()
    refuse_unfinished(tmp_path / "out.mp4")  # nothing is unfinished
    again = Journal(tmp_path / "out.mp4")
    assert not again.has_state
    again.close()
    assert not journal.folder.exists()


def test_a_name_as_long_as_file_systems_allow(tmp_path: Path) -> None:
    journal = Journal(tmp_path / ("很" * 83 + ".mp4"))
    journal.begin({"settings": {}})
    journal.save(SavedState({"a": torch.zeros(1)}, {"segments": 0}))
    journal.unfinished.touch()
    journal.finish()
    journal.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def test_killed_at_any_moment(nursery: Nursery, tmp_path: Path) -> None:
    """`kill -9` at 20 random moments of one video; each time it goes on, and the frames are the same."""
    picture, recording = portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav", 24.0)
    output, whole, journal = tmp_path / "out.mp4", tmp_path / "whole.mp4", tmp_path / ".out.journal"

    def begin(path: Path, *more: str) -> int:
        return nursery.start(
            "generate", picture, recording, "-o", path, "--model", toy_model(), *QUICK, "--steps", "4",
            "--seed", "5", "--checkpoint-every", "0", *more,
        )  # fmt: skip

    def saved() -> int:
        try:
            return int(json.loads((journal / "journal.json").read_text())["count"])
        except (OSError, ValueError):
            return 0

    begin(whole)
    assert nursery.wait() == 0
    rng, counts = random.Random(0), [0]
    for _ in range(20):
        process = begin(output, "--resume")
        deadline = time.monotonic() + 120
        while saved() == counts[-1] and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
        counts.append(saved())
        assert counts[-1] > counts[-2]
        assert not output.exists()
    begin(output, "--resume")
    assert nursery.wait() == 0
    assert np.array_equal(decoded(output), decoded(whole))
    assert read_metadata(output) == read_metadata(whole)
    assert not journal.exists()


def wait_for(process: "subprocess.Popen[str]", found: Callable[[str], bool]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if found(line):
            return
    raise AssertionError("the process ended early")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    picture, recording = portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav", 30.0)
    output = tmp_path / "out.mp4"
    arguments = ["generate", picture, recording, "-o", output, "--model", toy_model(), *QUICK, "--steps", "4"]
    process = start(*arguments)
    wait_for(process, lambda line: "frame 1/" in line)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "out.unfinished.mp4 plays the" in said
    assert len(decoded(tmp_path / "out.unfinished.mp4")) > 0
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "--resume" in refused.output
    output.write_bytes(b"an older video, which was to be replaced")
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert len(decoded(output)) == 750
    assert run(*arguments, "--resume").exit_code == 2  # nothing to go on with
    process = start(*arguments, "--resume", "--overwrite", "--seed", "8")  # anew
    wait_for(process, lambda line: "frame 1/" in line)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert run(*arguments, "--resume", "--overwrite").exit_code == 0  # goes on, with that run's seed
    assert stored_settings(output)["seed"] == 8
