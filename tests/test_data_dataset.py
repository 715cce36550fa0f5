"""Training clips from the layout on disk."""

import re
import shutil
import wave
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from clip_folders import SIDE, write_clip
from media_files import write_video
from stableavatar.data.clips import FolderClip, clip_frames, find_clips, read_path_list
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings, Window, read_sample
from stableavatar.data.masks import masks_to_latents
from stableavatar.data.sampler import GroupedSampler
from stableavatar.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "talking_face_data" / "square"


def samples_of(first: int, last: int) -> NDArray[np.float64]:
    values = np.arange(first, last, dtype=np.float64) / 2**15
    return (values - values.mean()) / np.sqrt(values.var() + 1e-7)


@pytest.mark.parametrize("images", [True, False])
def test_a_sample_holds_frames_speech_and_masks_of_one_instant(root: Path, images: bool) -> None:
    clip = FolderClip.open(write_clip(root / "speech" / "00001", images=images))
    sample = read_sample(clip, Window(3, "first", 3), ClipDatasetSettings(frames=9))
    levels = sample.frames.reshape(9, -1).astype(float).mean(1)
    np.testing.assert_allclose(levels, 10.0 * np.arange(3, 12), atol=3)
    np.testing.assert_array_equal(sample.reference, sample.frames[0])
    assert len(sample.speech) == 9 * 640
    np.testing.assert_allclose(sample.speech, samples_of(3 * 640, 12 * 640), atol=1e-3)
    assert abs(sample.speech.mean()) < 1e-4
    assert sample.speech.std() == pytest.approx(1, abs=1e-3)
    assert sample.prompt == "The protagonist is talking"
    assert sample.face_mask is not None
    assert sample.lip_mask is not None
    assert sample.face_mask.shape == sample.lip_mask.shape == (3, SIDE // 8, SIDE // 8)
    assert sample.face_mask[:, :2].min() == sample.lip_mask[:, :, :2].min() == 1
    assert sample.face_mask[:, 2:].max() == sample.lip_mask[:, :, 2:].max() == 0


@pytest.mark.parametrize("fps", [20, 25, 30, Fraction(30000, 1001)])
def test_speech_positions_are_exact_at_every_frame_rate(root: Path, fps: int | Fraction) -> None:
    clip = FolderClip.open(write_clip(root / "speech" / "00001", fps=fps, frames=18))
    assert clip.fps == fps
    for start in (0, 7, 13):
        first, last = (round(k * 16_000 / Fraction(fps)) for k in (start, start + 5))
        speech = clip.read_speech(start, 5) * 2**15
        assert len(speech) == last - first
        np.testing.assert_allclose(speech[:-2], np.arange(first, last)[:-2], atol=0.6)


def test_prompts_by_folder_and_by_file(root: Path) -> None:
    said = {
        "speech": "The protagonist is talking",
        "singing": "The protagonist is singing",
        "dancing": "The protagonist is simultaneously dancing and singing",
    }
    for word, prompt in said.items():
        assert FolderClip.open(write_clip(root / word / "00001", frames=5)).prompt == prompt
    own = write_clip(root / "speech" / "00002", frames=5, prompt=" A fox reads the news\n")
    assert FolderClip.open(own).prompt == "A fox reads the news"
    with pytest.raises(InputError, match=r"no prompt\.txt"):
        FolderClip.open(write_clip(root / "other" / "00001", frames=5))


def test_starts_and_references_vary_and_repeat(root: Path) -> None:
    clip = write_clip(root / "speech" / "00001", frames=24)
    settings = ClipDatasetSettings(frames=9, portrait=0.5, any_frame=0.2, masks=False)
    dataset = ClipDataset.from_folders([clip], settings)
    windows = [dataset[0, epoch].window for epoch in range(120)]
    assert {window.start for window in windows} == set(range(16))
    kinds = Counter(window.reference for window in windows)
    assert kinds["portrait"] / 120 == pytest.approx(0.5, abs=0.13)
    assert kinds["any"] / 120 == pytest.approx(0.2, abs=0.12)
    assert all(w.reference_frame == w.start for w in windows if w.reference == "first")
    anywhere = [w.reference_frame for w in windows if w.reference == "any"]
    assert max(anywhere) > 15
    again = ClipDataset.from_folders([clip], settings)
    assert [again[0, epoch].window for epoch in range(5)] == windows[:5]
    for epoch, window in enumerate(windows[:12]):
        level = dataset[0, epoch].reference.mean()
        expected = 250 if window.reference == "portrait" else 10 * window.reference_frame
        assert level == pytest.approx(expected, abs=1)


def damage(clip: Path, what: str) -> str:
    """Spoil one file; returns what the message must name."""
    if what == "mask":
        (clip / "lip_masks" / "frame_4.png").unlink()
        return "lip_masks/frame_4.png"
    if what == "picture":
        (clip / "images" / "frame_4.png").write_bytes(b"nothing")
        return "images/frame_4.png"
    if what == "sound":
        (clip / "audio.wav").write_bytes(b"nothing")
        return "audio.wav"
    if what == "video":
        (clip / "sub_clip.mp4").write_bytes(b"nothing")
        return "sub_clip.mp4"
    with wave.open(str(clip / "audio.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.ones(1000, np.int16).tobytes())
    return "audio.wav ends after"


@pytest.mark.parametrize("what", ["mask", "picture", "sound", "video", "short sound"])
def test_what_cannot_be_read_is_named_or_skipped_and_counted(root: Path, what: str) -> None:
    bad = write_clip(root / "speech" / "00001", frames=9)
    good = write_clip(root / "speech" / "00002", frames=9)
    named = damage(bad, what)
    with pytest.raises(InputError, match=named):
        ClipDataset.from_folders([bad, good], ClipDatasetSettings(frames=9))[0, 0]
    dataset = ClipDataset.from_folders([bad, good], ClipDatasetSettings(frames=9, on_error="skip"))
    for key in ((0, 0), (0, 1), (len(dataset) - 1, 2)):
        assert dataset[key].clip.name == str(good)
    assert list(dataset.skipped) == [str(bad)]
    assert named in dataset.skipped[str(bad)]
    beside = ClipDataset.from_folders(
        [bad],
        ClipDatasetSettings(frames=9, on_error="skip"),
        others=[(str(good), lambda: FolderClip.open(good))],
    )
    assert beside[len(beside) - 1, 0].clip.name == str(good)
    assert list(beside.skipped) == [str(bad)]
    damage(good, "picture")
    with pytest.raises(InputError):
        ClipDataset.from_folders([bad, good], ClipDatasetSettings(frames=9, on_error="skip"))[0, 0]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_clips_that_can_only_fail_are_left_out_when_they_are_opened(
    root: Path, on_error: Literal["raise", "skip"], caplog: pytest.LogCaptureFixture
) -> None:
    """Else another clip would be trained on in their place, pass after pass."""
    clips = [write_clip(root / "speech" / f"{k:05d}", frames=9) for k in range(5)]
    for path in (clips[0] / "images").glob("frame_[5-8].png"):  # an extraction that was stopped
        path.unlink()
    (clips[1] / "audio.wav").unlink()
    (clips[2] / "lip_masks" / "frame_4.png").unlink()
    words = ("holds 5 frames", "no speech", "make masks (stableavatar extract-lip-masks)", "training is of")
    settings = ClipDatasetSettings(frames=9, on_error=on_error)
    sizes = [(480, 832)], [(SIDE, SIDE), (480, 832)]
    if on_error == "raise":
        for clip, word, taken in zip(clips, words, (None, None, None, sizes[0]), strict=False):
            with pytest.raises(InputError, match=re.escape(word)):
                ClipDataset.from_folders([clip], settings, sizes=taken)
        return
    dataset = ClipDataset.from_folders(clips, settings, sizes=sizes[1])
    assert [clip.name for clip in dataset.clips] == [str(clip) for clip in clips[3:]]
    for clip, word in zip(clips, words[:3], strict=False):
        assert word in dataset.skipped[str(clip)]
    assert "3 of 5 clips cannot be used" in caplog.text
    with pytest.raises(InputError, match="no usable clip"):
        ClipDataset.from_folders(clips, settings, sizes=sizes[0])
    for portrait in (0.5, 0.0):  # prepare writes none
        settings = ClipDatasetSettings(frames=9, on_error="skip", portrait=portrait)
        (clips[3] / "portrait.png").unlink(missing_ok=True)
        left = ClipDataset.from_folders(clips[3:], settings)
        assert [clip.name for clip in left.clips] == [str(clip) for clip in clips[4 if portrait else 3 :]]


def test_a_clip_that_can_be_read_in_part_does_not_end_a_run(root: Path) -> None:
    """The only one of its size, whose sound ends before its pictures."""
    clip = write_clip(root / "speech" / "00000", frames=24)
    with wave.open(str(clip / "audio.wav"), "rb") as file:
        parameters, samples = file.getparams(), file.readframes(14 * 640)
    with wave.open(str(clip / "audio.wav"), "wb") as file:
        file.setparams(parameters)
        file.writeframes(samples)
    dataset = ClipDataset.from_folders([clip], ClipDatasetSettings(frames=9, on_error="skip"))
    starts = [dataset[0, epoch].frames.shape[0] for epoch in range(40)]
    assert starts == [9] * 40
    assert 5 < dataset.stand_ins < 39


def test_a_lost_frame_is_no_uneven_video(root: Path) -> None:
    clip = write_clip(root / "speech" / "00001", images=False)
    write_frames(clip / "sub_clip.mp4", [k + (k > 85) for k in range(99)])
    assert FolderClip.open(clip).length == 99


def write_frames(path: Path, places: Sequence[int]) -> None:
    """A video of frames at times in 1/25 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = SIDE
        for k, place in enumerate(places):
            frame = av.VideoFrame.from_ndarray(
                np.full((SIDE, SIDE, 3), (10 * k) % 256, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = place, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_what_is_drawn_does_not_depend_on_what_could_not_be_read_before(root: Path) -> None:
    """Of a clip whose end is damaged the other windows are read, in a run that goes on as in one that did not
    stop."""
    clips = [write_clip(root / "speech" / f"{k:05d}", frames=24) for k in range(1, 4)]
    (clips[0] / "face_masks" / "frame_20.png").unlink()
    settings = ClipDatasetSettings(frames=9, on_error="skip")

    def drawn(passes: range) -> list[tuple[str, int]]:
        dataset = ClipDataset.from_folders(clips, settings)
        samples = (dataset[0, epoch] for epoch in passes)
        return [(sample.clip.name, sample.window.start) for sample in samples]

    whole = drawn(range(12))
    assert drawn(range(6, 12)) == whole[6:]
    names = [name for name, _ in whole]
    bad = next(number for number, name in enumerate(names) if name != str(clips[0]))
    assert str(clips[0]) in names[bad + 1 :]


def test_no_clip_stands_in_for_all_that_cannot_be_read(root: Path) -> None:
    clips = [write_clip(root / "speech" / f"{k:05d}", frames=24) for k in range(1, 11)]
    for clip in clips[2:8]:
        damage(clip, "sound")
    settings = ClipDatasetSettings(frames=9, on_error="skip", masks=False)
    dataset = ClipDataset.from_folders(clips, settings)
    taken = [dataset[index, epoch] for epoch in range(10) for index in range(10)]
    counts = Counter(sample.clip.name for sample in taken)
    assert len(counts) == 4
    assert max(counts.values()) < 2 * min(counts.values())
    assert len({(sample.clip.name, sample.window.start) for sample in taken}) > 30
    assert dataset.stand_ins == 60
    again = ClipDataset.from_folders(clips, settings)
    assert [again[3, epoch].window for epoch in range(5)] == [
        taken[10 * epoch + 3].window for epoch in range(5)
    ]


def test_stand_ins_are_counted_in_readers_too(root: Path) -> None:
    clips = [write_clip(root / "speech" / f"{k:05d}", frames=24) for k in range(1, 3)]
    damage(clips[0], "sound")
    dataset = ClipDataset.from_folders(clips, ClipDatasetSettings(frames=9, on_error="skip", masks=False))
    reading = DataLoader(dataset, batch_sampler=[[(0, 0)], [(1, 0)], [(0, 1)]], collate_fn=len, num_workers=2)
    assert list(reading) == [1, 1, 1]
    assert dataset.stand_ins == 2


def test_clips_that_do_not_fit_are_refused(root: Path) -> None:
    short = write_clip(root / "speech" / "00001", frames=5)
    odd = write_clip(root / "speech" / "00002", frames=9, size=(40, 32))
    with pytest.raises(InputError, match="has 5 frames, fewer than the 9"):
        ClipDataset.from_folders([short], ClipDatasetSettings(frames=9))
    with pytest.raises(InputError, match="40x32 pixels: both must be multiples of 16"):
        ClipDataset.from_folders([odd], ClipDatasetSettings(frames=9))
    with pytest.raises(InputError, match="there is no clip folder"):
        ClipDataset.from_folders([root / "nowhere"], ClipDatasetSettings(frames=9))
    for values in ({"frames": 8}, {"portrait": 0.8, "any_frame": 0.3}, {"on_error": "ignore"}):
        with pytest.raises(InputError):
            ClipDatasetSettings(**values)  # type: ignore[arg-type]


def test_path_lists_and_folders(root: Path) -> None:
    clips = [write_clip(root / "speech" / name, frames=5) for name in ("00001", "00002")]
    path_list = root.parent / "video_square_path.txt"
    path_list.write_text(f"square/speech/00002\n\n{clips[0]}\n")
    assert [path.resolve() for path in read_path_list(path_list)] == [clips[1].resolve(), clips[0].resolve()]
    write_clip(root / ".prepare" / "0", frames=5)  # what a running `prepare` has
    assert find_clips(root) == clips
    path_list.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_path_list(path_list)
    with pytest.raises(InputError, match="cannot read"):
        read_path_list(root / "missing.txt")
    with pytest.raises(InputError, match="no clip"):
        find_clips(root / "speech" / "00001" / "images")


def test_masks_shrink_trilinearly_to_a_quarter_of_the_frames() -> None:
    mask = torch.zeros(9, 16, 16)
    mask[5:] = 1
    small = masks_to_latents(mask, 2, 2)
    assert small.shape == (3, 2, 2)
    # Latent frame f lies at frame 3·f + 1: frames 1, 4 and 7.
    assert small.amax((1, 2)).tolist() == small.amin((1, 2)).tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="4n"):
        masks_to_latents(mask[:8], 2, 2)


def test_every_clip_once_a_pass_and_one_size_a_step() -> None:
    groups = ["a"] * 7 + ["b"] * 4
    sampler = GroupedSampler(groups, 3, seed=1)
    count = sampler.steps_per_pass
    assert count == 5
    passes = []
    for epoch in range(3):
        steps = [sampler.step(epoch * count + k)[0] for k in range(count)]
        assert all(len({groups[index] for index, _ in step}) == 1 for step in steps)
        assert {seen for step in steps for _, seen in step} == {epoch}
        assert sorted(index for step in steps for index, _ in step) == list(range(11))
        passes.append(steps)
    assert [[i for i, _ in step] for step in passes[0]] != [[i for i, _ in step] for step in passes[1]]
    resumed = GroupedSampler(groups, 3, seed=1).from_step(8)
    assert [next(resumed) for _ in range(7)] == [sampler.step(8 + k)[0] for k in range(7)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_pieces_of_a_step_share_its_clips(world: int, accumulation: int) -> None:
    groups = ["a"] * 13 + ["b"] * 6
    ranks = [
        GroupedSampler(groups, 2, seed=4, accumulation=accumulation, rank=rank, world_size=world)
        for rank in range(world)
    ]
    together = GroupedSampler(groups, 2, seed=4, accumulation=world * accumulation)
    streams = [rank.from_step(0) for rank in ranks]
    seen: list[int] = []
    for number in range(together.steps_per_pass):
        taken = [next(stream) for _ in range(accumulation) for stream in streams]
        pieces = together.step(number)
        assert taken == [piece or pieces[0][:1] for piece in pieces]
        assert max(map(len, pieces)) <= 2
        assert len({groups[index] for piece in pieces for index, _ in piece}) == 1
        seen += [index for piece in pieces for index, _ in piece]
        weights = [rank.weight(number, micro) for micro in range(accumulation) for rank in ranks]
        clips = sum(len(piece) for piece in pieces)
        shares = [weight / len(weights) for weight in weights]
        assert shares == pytest.approx([len(piece) / clips for piece in pieces])
    assert sorted(seen) == list(range(19))


def test_where_a_step_has_too_few_clips_one_stands_in_and_counts_nothing() -> None:
    sampler = GroupedSampler(["a"] * 5 + ["b"], 1, seed=0, accumulation=3)
    assert sampler.steps_per_pass == 3
    taken = sampler.from_step(0)
    clips = []
    for number in range(3):
        pieces = sampler.step(number)
        for micro_step, piece in enumerate(pieces):
            found = next(taken)
            assert len(found) == 1
            if piece:
                clips.append(found[0])
            else:
                assert found == pieces[0]
                assert sampler.weight(number, micro_step) == 0
        assert sum(sampler.weight(number, micro_step) for micro_step in range(3)) == pytest.approx(3)
    assert sorted(clips) == [(clip, 0) for clip in range(6)]


def test_a_data_set_is_told_by_its_clips_and_settings(root: Path, tmp_path: Path) -> None:
    folders = [write_clip(root / "speech" / f"{k:05d}", frames=12) for k in range(2)]
    settings = ClipDatasetSettings(frames=9)
    told = ClipDataset.from_folders(folders, settings).fingerprint
    assert ClipDataset.from_folders(folders, settings).fingerprint == told
    moved = [shutil.copytree(folder, tmp_path / "elsewhere" / "speech" / folder.name) for folder in folders]
    assert ClipDataset.from_folders(moved, settings).fingerprint == told
    others = []
    for number, change in enumerate((_another_video, _another_sound, _another_mask, _another_prompt)):
        copies = [
            shutil.copytree(folder, tmp_path / str(number) / "speech" / folder.name) for folder in folders
        ]
        change(copies[0])
        others.append(ClipDataset.from_folders(copies, settings))
    others += [
        ClipDataset.from_folders(folders[::-1], settings),
        ClipDataset.from_folders(folders[:1], settings),
        ClipDataset.from_folders(folders, ClipDatasetSettings(frames=9, seed=1)),
    ]
    assert len({told, *(other.fingerprint for other in others)}) == 8


def _another_video(clip: Path) -> None:
    with (clip / "sub_clip.mp4").open("ab") as file:
        file.write(b"\0")


def _another_sound(clip: Path) -> None:
    """As long, as after its music was taken out."""
    content = (clip / "audio.wav").read_bytes()
    (clip / "audio.wav").write_bytes(content[:44] + bytes(len(content) - 44))


def _another_mask(clip: Path) -> None:
    Image.new("L", (SIDE, SIDE), 255).save(clip / "lip_masks" / "frame_6.png")


def _another_prompt(clip: Path) -> None:
    (clip / "prompt.txt").write_text("Somebody else talks")


def test_frames_that_are_not_evenly_spaced_are_refused(root: Path) -> None:
    """Else frame k would be taken for that of k/fps seconds, and the speech would be another instant's."""
    clip = write_clip(root / "speech" / "00001", images=False)
    for name, gap in (("steady", 0), ("jumping", 12)):
        write_frames(clip / "sub_clip.mp4", [k + (gap if k > 10 else 0) for k in range(20)])
        if name == "steady":
            assert FolderClip.open(clip).length == 20
    with pytest.raises(InputError, match="not evenly spaced"):
        FolderClip.open(clip)


def test_a_video_is_read_as_its_masks_were_made_from_it(tmp_path: Path) -> None:
    """By its own matrix, upright, with square pixels; where it says another shape, not at all."""
    rng = np.random.default_rng(0)
    picture = np.repeat(np.repeat(rng.integers(40, 200, (3, 3, 3)), 32, axis=0), 32, axis=1).astype(np.uint8)
    clip = write_clip(tmp_path / "speech" / "1", frames=6, size=(96, 96), images=False)
    write_video(clip / "sub_clip.mp4", [picture] * 6, rotation=90)
    read = FolderClip.open(clip).read_frames(2, 3)
    assert np.array_equal(read, np.stack(list(clip_frames(clip))[2:5]))
    assert (
        np.abs(read[0].astype(int) - np.rot90(picture)).mean()
        < np.abs(read[0].astype(int) - picture).mean() / 4
    )

    write_video(clip / "sub_clip.mp4", [picture[:64]] * 6, aspect=Fraction(2))
    wide = FolderClip.open(clip)
    assert wide.size == (192, 64)
    assert wide.read_frames(0, 1).shape == (1, 64, 192, 3)
    with pytest.raises(InputError, match=r"face_masks: masks of 96x96 pixels to frames of 192x64"):
        wide.read_masks("face_masks", 0, 1)

    write_video(clip / "sub_clip.mp4", [picture[:64]] * 6, rotation=90)
    with pytest.raises(
        InputError, match=r"64x96 pixels where 96x64 were expected \(it is to be shown turned"
    ):
        FolderClip.open(clip).read_frames(0, 1)


def test_speech_of_a_video_whose_sound_begins_before_its_picture(root: Path) -> None:
    folder = write_clip(root / "speech" / "00001", images=False)
    (folder / "audio.wav").unlink()
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    black = [np.zeros((SIDE, SIDE, 3), np.uint8)] * 13
    video = write_video(root / "a.mkv", black, samples, 16_000, sound_at=-0.08, sound_codec="flac")
    video.replace(folder / "sub_clip.mp4")
    heard = FolderClip.open(folder).read_speech(0, 10)
    np.testing.assert_allclose(heard, samples[1280 : 1280 + 6400], atol=1e-3)


def test_clips_of_nearly_one_rate_are_of_one_group(root: Path) -> None:
    folders = [
        write_clip(root / "speech" / f"{k:05d}", frames=12, fps=fps)
        for k, fps in enumerate((30, Fraction(30000, 1001), 25))
    ]
    groups = ClipDataset.from_folders(folders, ClipDatasetSettings(frames=9, masks=False)).groups
    assert groups[0] == groups[1] != groups[2]
