"""The cache of what encoders make of training clips."""

import copy
import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import Wav2Vec2Model

from clip_folders import SIDE, write_clip
from stableavatar.conditioning.image import picture_tensor, reference_condition
from stableavatar.conditioning.speech import speech_features
from stableavatar.data import cache as cache_module
from stableavatar.data.cache import CachedWindows, CacheWriter, LatentCache, read_manifest
from stableavatar.data.clips import normalized_speech
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings, ClipSample, OnError
from stableavatar.data.encoding import EncodedSample, Encoders, stack_samples
from stableavatar.errors import InputError, StorageError
from toy_encoders import toy_encoder_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "talking_face_data" / "square"


@pytest.fixture(scope="module")
def encoders() -> tuple[AutoencoderKLWan, Wav2Vec2Model]:
    return toy_encoder_pair(mean=0.1, deviation=0.5)


KEYS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def fill(writer: CacheWriter, keys: list[tuple[int, int]]) -> None:
    writer.write(keys)
    writer.finish(keys)


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
    fill(CacheWriter(dataset, root / "cache", Encoders(vae, speech_encoder), shard_samples=4), KEYS)
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


def test_passes_of_a_clip_are_read_a_few_at_a_time(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are asked for: their frames are in memory."""
    together: list[int] = []
    encode = Encoders.encode_samples

    def counted(self: Encoders, samples: Sequence[ClipSample], window: int | None = None) -> object:
        together.append(len(samples))
        return encode(self, samples, window)

    monkeypatch.setattr(Encoders, "encode_samples", counted)
    keys = [(0, number) for number in range(9)]
    fill(CacheWriter(three_clips(root), root / "cache", Encoders(*encoders), shard_samples=9), keys)
    assert together == [4, 4, 1]
    assert sum(len(shard["keys"]) for shard in read_manifest(root / "cache")["shards"]) == 9


def test_processes_share_a_cache_and_a_note_left_behind_is_not_lost(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    """Two of two writers in turn, the second of which ends first; then the first is begun anew."""
    parts, dataset, folder = Encoders(*encoders), three_clips(root), root / "cache"
    fill(CacheWriter(dataset, root / "alone", parts, shard_samples=2), KEYS)

    def writers() -> list[CacheWriter]:
        return [
            CacheWriter(dataset, folder, parts, shard_samples=2, process=number, processes=2)
            for number in (0, 1)
        ]

    first, second = writers()
    second.write(KEYS)
    second.finish(KEYS)  # not for it to do
    assert sorted(path.name for path in folder.glob("block-*")) == ["block-00001.json", "block-00003.json"]
    with pytest.raises(InputError, match="is not complete"):
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
    fill(CacheWriter(dataset, folder, Encoders(vae, speech_encoder), shard_samples=3), KEYS[:3])
    (shard,) = folder.glob("shard-00000-*")
    first = shard.stat().st_mtime_ns
    assert len(LatentCache(folder)) == 1  # three passes of a clip
    fill(CacheWriter(dataset, folder, Encoders(vae, speech_encoder), shard_samples=3), KEYS)
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


def test_a_full_disk_leaves_a_cache_that_goes_on(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = three_clips(root)
    folder = root / "cache"

    def full_disk(_tensors: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    writer = CacheWriter(dataset, folder, Encoders(*encoders), shard_samples=3)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "save_file", full_disk)
        with pytest.raises(StorageError, match="No space left"):
            writer.write(KEYS)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "manifest.json"]
    del writer
    fill(CacheWriter(dataset, folder, Encoders(*encoders), shard_samples=3), KEYS)
    assert len(LatentCache(folder)) == 3


def test_a_cache_is_read_by_processes_that_are_not_forked(
    root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    fill(CacheWriter(three_clips(root), root / "cache", Encoders(*encoders), shard_samples=4), KEYS)
    cache = LatentCache(root / "cache")
    sent = pickle.loads(pickle.dumps(cache))
    assert torch.equal(sent[1, 0].latents, cache[1, 0].latents)


def test_a_cache_grows_with_its_data_set(
    root: Path, tmp_path: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    folders = [write_clip(root / "speech" / f"{k:05d}", frames=12 + k) for k in range(3)]
    settings = ClipDatasetSettings(frames=9)
    two = ClipDataset.from_folders(folders[:2], settings)
    fill(CacheWriter(two, tmp_path / "cache", Encoders(*encoders)), [(0, 0), (1, 0)])
    first = LatentCache(tmp_path / "cache")[0, 0]

    moved = [shutil.copytree(folder, tmp_path / "elsewhere" / "speech" / folder.name) for folder in folders]
    three = ClipDataset.from_folders(moved, settings)
    writer = CacheWriter(three, tmp_path / "cache", Encoders(*encoders))
    fill(writer, [(0, 0), (1, 0), (2, 0)])
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
    fill(CacheWriter(dataset, root / "full", Encoders(vae, speech_encoder)), KEYS[:2])
    fill(CacheWriter(dataset, root / "half", Encoders(vae, speech_encoder), torch.bfloat16), KEYS[:2])
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
    fill(CacheWriter(dataset, root / "cache", Encoders(vae, speech_encoder), window_frames=9), [(0, 0)])
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

    fill(CacheWriter(dataset, root / "plain", Encoders(vae, speech_encoder)), [(0, 0)])
    with pytest.raises(InputError, match="holds no windows"):
        CachedWindows(LatentCache(root / "plain"))
    for frames in (8, 21):
        with pytest.raises(InputError, match="window_frames must be"):
            CacheWriter(dataset, root / "bad", Encoders(vae, speech_encoder), window_frames=frames)


def test_a_cache_is_told_by_what_it_holds_and_knows_its_encoders(
    root: Path, tmp_path: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]
) -> None:
    dataset = three_clips(root)
    told = []
    for count in (3, 3, 7):
        folder = tmp_path / str(len(told))
        fill(CacheWriter(dataset, folder, Encoders(*encoders)), KEYS[:count])
        told.append(LatentCache(folder).fingerprint)
    assert told[0] == told[1] != told[2]
    LatentCache(folder).check_encoders(Encoders(*encoders))
    other = copy.deepcopy(encoders[0])
    with torch.no_grad():
        other.quant_conv.bias += 1
    with pytest.raises(InputError, match="another vae"):
        LatentCache(folder).check_encoders(Encoders(other, encoders[1]))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_is_not_finite_is_not_kept(
    root: Path,
    encoders: tuple[AutoencoderKLWan, Wav2Vec2Model],
    monkeypatch: pytest.MonkeyPatch,
    on_error: OnError,
) -> None:
    folders = [write_clip(root / "speech" / f"{k:05d}", frames=12) for k in range(2)]
    dataset = ClipDataset.from_folders(folders, ClipDatasetSettings(frames=9, on_error=on_error))
    encode = Encoders.encode_samples

    def overflowing(
        self: Encoders, samples: Sequence[ClipSample], window: int | None = None
    ) -> list[EncodedSample]:
        made = encode(self, samples, window)
        if samples[0].clip.name == str(folders[0]):
            made[1] = replace(made[1], speech=made[1].speech + 1e5)  # of float16 too large
        return made

    monkeypatch.setattr(Encoders, "encode_samples", overflowing)
    keys = [(0, 0), (0, 1), (1, 0)]
    writer = CacheWriter(dataset, root / "cache", Encoders(*encoders), torch.float16)
    if on_error == "raise":
        with pytest.raises(InputError, match="00000: values of its speech are not finite in float16"):
            writer.write(keys)
        return
    fill(writer, keys)
    assert list(writer.manifest["skipped"]) == [str(folders[0])]
    cache = LatentCache(root / "cache")
    assert torch.equal(cache[0, 1].latents, cache[0, 0].latents)  # of the pass that is there
    assert len(cache) == 2
    for key in keys:
        assert cache[key].speech.isfinite().all()


def test_a_cache_is_one_run_s_at_a_time(root: Path, encoders: tuple[AutoencoderKLWan, Wav2Vec2Model]) -> None:
    dataset, folder = three_clips(root), root / "cache"
    first = CacheWriter(dataset, folder, Encoders(*encoders))
    with pytest.raises(InputError, match="another run writes this cache"):
        CacheWriter(dataset, folder, Encoders(*encoders))
    fill(first, KEYS)
    fill(CacheWriter(dataset, folder, Encoders(*encoders)), KEYS)
