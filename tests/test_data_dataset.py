"""Training clips from the layout on disk, and the cache of what encoders make of them."""

import copy
import json
import shutil
import wave
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from transformers import Wav2Vec2Config, Wav2Vec2Model

from clip_folders import SIDE, write_clip
from media_files import write_video
from stableavatar.conditioning.image import picture_tensor, reference_condition
from stableavatar.conditioning.speech import speech_features
from stableavatar.data.cache import CachedWindows, CacheWriter, LatentCache, read_manifest
from stableavatar.data.clips import FolderClip, clip_frames, find_clips, normalized_speech, read_path_list
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings, Window, read_sample
from stableavatar.data.encoding import Encoders, stack_samples
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
    damage(good, "picture")
    with pytest.raises(InputError):
        ClipDataset.from_folders([bad, good], ClipDatasetSettings(frames=9, on_error="skip"))[0, 0]


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


@pytest.fixture(scope="module")
def encoders() -> tuple[AutoencoderKLWan, Wav2Vec2Model]:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, latents_mean=[0.1] * 16, latents_std=[0.5] * 16,
    )  # fmt: skip
    speech = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="group",
        )
    )  # fmt: skip
    return vae.eval(), speech.eval()


KEYS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def three_clips(root: Path) -> ClipDataset:
    folders = [write_clip(root / "speech" / f"{k:05d}", frames=12, prompt=f"clip {k}") for k in range(2)]
    folders.append(write_clip(root / "singing" / "00009", frames=12, fps=20))
    return ClipDataset.from_folders(
        folders, ClipDatasetSettings(frames=9, portrait=0.5, any_frame=0.2, seed=3)
    )


def test_the_cache_gives_what_the_encoders_give(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    vae, speech_encoder = encoders
    dataset = three_clips(root)
    CacheWriter(dataset, root / "cache", Encoders(vae, speech_encoder), shard_samples=4).write(KEYS)
    cache = LatentCache(root / "cache")
    assert len(cache) == 3
    assert cache.groups == [(SIDE, SIDE, "25"), (SIDE, SIDE, "25"), (SIDE, SIDE, "20")]
    assert torch.equal(cache[0, 4].latents, cache[0, 1].latents)  # of three passes
    for key in KEYS:
        sample = dataset[key]
        cached = cache[key]
        with torch.no_grad():
            pixels = torch.from_numpy(sample.frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
            latents = (vae.encode(pixels).latent_dist.mode() - 0.1) / 0.5
        torch.testing.assert_close(cached.latents, latents[0], rtol=1e-4, atol=1e-5)
        condition = reference_condition(vae, picture_tensor(sample.reference), 9)
        torch.testing.assert_close(stack_samples([cached]).condition, condition, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            cached.speech, speech_features(speech_encoder, sample.speech)[0], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(cached.portrait.numpy(), sample.reference)
        assert sample.face_mask is not None
        torch.testing.assert_close(cached.face_mask, sample.face_mask)


def test_processes_share_a_cache_and_a_note_left_behind_is_not_lost(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    """Two of two writers in turn, the second of which ends first; then the first is begun anew."""
    parts, dataset, folder = Encoders(*encoders), three_clips(root), root / "cache"
    CacheWriter(dataset, root / "alone", parts, shard_samples=2).write(KEYS)

    def writers() -> list[CacheWriter]:
        return [
            CacheWriter(dataset, folder, parts, shard_samples=2, process=number, processes=2)
            for number in (0, 1)
        ]

    first, second = writers()
    second.write(KEYS)
    second.finish(KEYS)  # not for it to do
    assert sorted(path.name for path in folder.glob("block-*")) == ["block-00001.json", "block-00003.json"]
    with pytest.raises(InputError, match="no samples yet"):
        LatentCache(folder)
    del first
    first, second = writers()  # takes over what the interrupted ones had finished
    assert len(read_manifest(folder)["shards"]) == 2
    second.write(KEYS)
    with pytest.raises(InputError, match="lacks 2 of 7 samples"):
        first.finish(KEYS)
    first.write(KEYS)
    first.finish(KEYS)
    assert not list(folder.glob("block-*"))
    note = {
        "origin": "of another cache",
        "block": 9,
        "shards": [{"file": "x", "keys": [[0, 7]], "prompts": []}],
        "skipped": {},
    }
    (folder / "block-00009.json").write_text(json.dumps(note))
    first = writers()[0]  # killed before it had a manifest, another one has left a note
    assert first.manifest["blocks"] < 9
    assert not list(folder.glob("block-*"))
    alone, shared = LatentCache(root / "alone"), LatentCache(folder)
    assert shared.fingerprint == alone.fingerprint
    for key in KEYS:
        assert torch.equal(shared[key].latents, alone[key].latents)
        assert torch.equal(shared[key].speech, alone[key].speech)


def test_an_interrupted_cache_is_finished_and_another_ones_refused(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    vae, speech_encoder = encoders
    dataset = three_clips(root)
    folder = root / "cache"
    CacheWriter(dataset, folder, Encoders(vae, speech_encoder), shard_samples=3).write(KEYS[:3])
    (shard,) = folder.glob("shard-00000-*")
    first = shard.stat().st_mtime_ns
    assert len(LatentCache(folder)) == 1  # three passes of a clip
    CacheWriter(dataset, folder, Encoders(vae, speech_encoder), shard_samples=3).write(KEYS)
    assert shard.stat().st_mtime_ns == first
    assert len(LatentCache(folder)) == 3

    with pytest.raises(InputError, match="another dtype"):
        CacheWriter(dataset, folder, Encoders(vae, speech_encoder), torch.bfloat16, shard_samples=3)
    other = AutoencoderKLWan.from_config(vae.config)
    with pytest.raises(InputError, match="another vae"):
        CacheWriter(dataset, folder, Encoders(other, speech_encoder), shard_samples=3)

    (shard,) = folder.glob("shard-00001-*")
    shard.write_bytes(b"cut off")
    with pytest.raises(InputError, match="shard-00001-0"):
        LatentCache(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        LatentCache(folder)
    with pytest.raises(InputError, match="no readable cache"):
        LatentCache(root / "nothing")


def test_a_cache_grows_with_its_data_set(
    root: Path, tmp_path: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    folders = [write_clip(root / "speech" / f"{k:05d}", frames=12 + k) for k in range(3)]
    settings = ClipDatasetSettings(frames=9)
    two = ClipDataset.from_folders(folders[:2], settings)
    CacheWriter(two, tmp_path / "cache", Encoders(*encoders)).write([(0, 0), (1, 0)])
    first = LatentCache(tmp_path / "cache")[0, 0]

    moved = [shutil.copytree(folder, tmp_path / "elsewhere" / "speech" / folder.name) for folder in folders]
    three = ClipDataset.from_folders(moved, settings)
    writer = CacheWriter(three, tmp_path / "cache", Encoders(*encoders))
    writer.write([(0, 0), (1, 0), (2, 0)])
    assert [len(shard["keys"]) for shard in writer.manifest["shards"]] == [2, 1]
    grown = LatentCache(tmp_path / "cache")
    assert len(grown) == len(grown.groups) == 3
    assert torch.equal(grown[0, 0].latents, first.latents)
    assert grown[2, 0].latents.shape == first.latents.shape

    for other in (folders[:2], folders[::-1]):
        with pytest.raises(InputError, match="another clips"):
            CacheWriter(ClipDataset.from_folders(other, settings), tmp_path / "cache", Encoders(*encoders))


def test_training_from_the_cache_in_half_precision_is_close(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    vae, speech_encoder = encoders
    dataset = three_clips(root)
    CacheWriter(dataset, root / "full", Encoders(vae, speech_encoder)).write(KEYS[:2])
    CacheWriter(dataset, root / "half", Encoders(vae, speech_encoder), torch.bfloat16).write(KEYS[:2])
    full, half = (
        stack_samples([LatentCache(root / name)[0, k] for k in range(2)]) for name in ("full", "half")
    )
    assert half.latents.dtype == torch.float32
    torch.testing.assert_close(half.latents, full.latents, rtol=1e-2, atol=1e-2)
    assert full.condition.shape == (2, 20, 3, SIDE // 8, SIDE // 8)
    assert full.condition[:, :4, 0].min() == 1
    assert full.condition[:, :4, 1:].abs().max() == 0


def test_windows_of_a_cache_of_longer_clips(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    vae, speech_encoder = encoders
    clip = write_clip(root / "speech" / "00000", frames=17, fps=30)
    dataset = ClipDataset.from_folders([clip], ClipDatasetSettings(frames=17, portrait=1.0))
    CacheWriter(dataset, root / "cache", Encoders(vae, speech_encoder), window_frames=9).write([(0, 0)])
    whole = LatentCache(root / "cache")[0, 0]
    assert whole.latents.shape[1] == 5
    assert whole.reference.shape[1] == 3
    windows = CachedWindows(LatentCache(root / "cache"))
    starts = set()
    for epoch in range(12):
        window = windows[0, epoch]
        assert torch.equal(window.latents, windows[0, epoch].latents)
        (start,) = (k for k in range(3) if torch.equal(whole.latents[:, k : k + 3], window.latents))
        starts.add(start)
        assert window.starts_clip == (start == 0)
        assert torch.equal(window.lip_mask, whole.lip_mask[start : start + 3])
        assert torch.equal(window.face_mask, whole.face_mask[start : start + 3])
        speech = normalized_speech(dataset.clips[0], 4 * start, 9)
        own = speech_features(speech_encoder, speech)[0]
        torch.testing.assert_close(window.speech, own, rtol=1e-3, atol=1e-4)
    assert starts == {0, 1, 2}
    condition = reference_condition(vae, picture_tensor(whole.portrait.numpy()), 9)
    torch.testing.assert_close(stack_samples([windows[0, 0]]).condition, condition, rtol=1e-4, atol=1e-5)

    CacheWriter(dataset, root / "plain", Encoders(vae, speech_encoder)).write([(0, 0)])
    with pytest.raises(InputError, match="holds no windows"):
        CachedWindows(LatentCache(root / "plain"))
    for frames in (8, 21):
        with pytest.raises(InputError, match="window_frames must be"):
            CacheWriter(dataset, root / "bad", Encoders(vae, speech_encoder), window_frames=frames)


def test_a_data_set_is_told_by_its_clips_and_settings(root: Path, tmp_path: Path) -> None:
    folders = [write_clip(root / "speech" / f"{k:05d}", frames=12) for k in range(2)]
    settings = ClipDatasetSettings(frames=9)
    told = ClipDataset.from_folders(folders, settings).fingerprint
    assert ClipDataset.from_folders(folders, settings).fingerprint == told
    moved = [shutil.copytree(folder, tmp_path / "elsewhere" / "speech" / folder.name) for folder in folders]
    assert ClipDataset.from_folders(moved, settings).fingerprint == told
    with (moved[0] / "sub_clip.mp4").open("ab") as file:  # of the same name and length, and another one
        file.write(b"\0")
    others = [
        ClipDataset.from_folders(moved, settings),
        ClipDataset.from_folders(folders[::-1], settings),
        ClipDataset.from_folders(folders[:1], settings),
        ClipDataset.from_folders(folders, ClipDatasetSettings(frames=9, seed=1)),
    ]
    assert len({told, *(other.fingerprint for other in others)}) == 5


def test_a_cache_is_told_by_what_it_holds_and_knows_its_encoders(
    root: Path, tmp_path: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    dataset = three_clips(root)
    told = []
    for count in (3, 3, 7):
        folder = tmp_path / str(len(told))
        CacheWriter(dataset, folder, Encoders(*encoders)).write(KEYS[:count])
        told.append(LatentCache(folder).fingerprint)
    assert told[0] == told[1] != told[2]
    LatentCache(folder).check_encoders(Encoders(*encoders))
    other = copy.deepcopy(encoders[0])
    with torch.no_grad():
        other.quant_conv.bias += 1
    with pytest.raises(InputError, match="another vae"):
        LatentCache(folder).check_encoders(Encoders(other, encoders[1]))


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
