"""Encoder results on disk, so that no encoder runs inside the training loop.

A cache is a folder of safetensors shards and a manifest, which names the finished shards: a cache that is
still being written can be trained on, and an interrupted one is written on where it stopped.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import Wav2Vec2Model

from stableavatar.conditioning.image import reference_mask
from stableavatar.conditioning.speech import speech_features
from stableavatar.data.clips import normalized_speech
from stableavatar.data.dataset import ClipDataset, ClipSample
from stableavatar.data.sampler import ClipKey
from stableavatar.errors import InputError
from stableavatar.sampling.decoding import normalise_latents

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CachedSample:
    """A sample as it is in a shard.

    Attributes:
        latents: normalised latents of the clip `[C, F, H, W]`.
        reference: normalised latents of the reference clip (the picture, then mid-grey), the same shape.
        portrait: the reference picture, uint8 `[8·H, 8·W, 3]`.
        speech: features of the clip's speech `[S, D]`, or, in a cache of longer clips, those of every window
            `[W, S, D]` (see `CacheWriter`).
        face_mask, lip_mask: `[F, H, W]` in [0, 1].
        starts_clip: whether the first latent frame stands for a single frame, as a video's first one does.
    """

    latents: torch.Tensor
    reference: torch.Tensor
    portrait: torch.Tensor
    speech: torch.Tensor
    face_mask: torch.Tensor
    lip_mask: torch.Tensor
    prompt: str
    starts_clip: bool = True


@dataclass(frozen=True)
class CachedBatch:
    """Samples stacked, float32: `condition` `[B, 20, F, H, W]` has the mask channels; `portrait` is uint8;
    `starts_clip` has a flag a sample, False where the first latent frame stands for four frames of video.
    """

    latents: torch.Tensor
    condition: torch.Tensor
    portrait: torch.Tensor
    speech: torch.Tensor
    face_mask: torch.Tensor
    lip_mask: torch.Tensor
    prompts: tuple[str, ...]
    starts_clip: tuple[bool, ...]


TENSORS = ("latents", "reference", "portrait", "speech", "face_mask", "lip_mask")


def stack_samples(samples: Sequence[CachedSample]) -> CachedBatch:
    """Put samples of one size into a batch."""
    stacked = {name: torch.stack([getattr(sample, name) for sample in samples]) for name in TENSORS}
    reference = stacked["reference"].float()
    return CachedBatch(
        latents=stacked["latents"].float(),
        condition=torch.cat([reference_mask(reference), reference], dim=1),
        portrait=stacked["portrait"],
        speech=stacked["speech"].float(),
        face_mask=stacked["face_mask"].float(),
        lip_mask=stacked["lip_mask"].float(),
        prompts=tuple(sample.prompt for sample in samples),
        starts_clip=tuple(sample.starts_clip for sample in samples),
    )


@torch.no_grad()
def encode_videos(vae: AutoencoderKLWan, frames: NDArray[np.uint8]) -> torch.Tensor:
    """Normalised latents, float32 `[B, 16, F, H/8, W/8]` on the CPU, of frames uint8 `[B, T, H, W, 3]`."""
    pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).to(vae.device, vae.dtype) / 127.5 - 1
    return _encode(vae, pixels)


@torch.no_grad()
def encode_references(vae: AutoencoderKLWan, pictures: NDArray[np.uint8], frames: int) -> torch.Tensor:
    """Normalised latents of reference clips, float32 `[B, 16, F, H/8, W/8]`: each picture, uint8
    `[B, H, W, 3]`, then mid-grey up to `frames` frames."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    clips = pixels.new_zeros(len(pixels), 3, frames, *pixels.shape[2:])
    clips[:, :, 0] = pixels
    return _encode(vae, clips)


def _encode(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    raw = vae.encode(pixels.contiguous()).latent_dist.mode()
    return normalise_latents(vae, raw.float()).cpu()


@dataclass
class CacheWriter:
    """Encodes samples of a data set into a cache folder.

    Args:
        folder: made if it is not there; what it holds already is kept.
        vae, speech_encoder: on the device and in the dtype they shall run in.
        dtype: of latents, features and masks in the shards.
        shard_samples: samples a shard.
        window_frames: T of the windows that `CachedWindows` takes from the samples, which are longer: one
            encoding of a clip then serves many windows. The speech of every window that starts at a latent
            frame is encoded on its own, as when sampling; references have the length of a window.

    Raises:
        InputError: the folder holds a cache of other encoders, of another data set or of other settings.
    """

    dataset: ClipDataset
    folder: Path
    vae: AutoencoderKLWan
    speech_encoder: Wav2Vec2Model
    dtype: torch.dtype = torch.float32
    shard_samples: int = 96
    window_frames: int | None = None

    def __post_init__(self) -> None:
        frames, window = self.dataset.settings.frames, self.window_frames
        if window is not None and (window % 4 != 1 or not 5 <= window <= frames):
            raise InputError(f"window_frames must be 4n+1, from 5 to the {frames} of a sample, not {window}")
        if not self.dataset.settings.masks:
            raise InputError("a cache holds masks: read the clips with masks=True")
        self.folder.mkdir(parents=True, exist_ok=True)
        origin = {
            "dataset": asdict(self.dataset.settings),
            "clips": _digest("\n".join(clip.name for clip in self.dataset.clips).encode()),
            "vae": _weights_digest(self.vae),
            "speech_encoder": _weights_digest(self.speech_encoder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "shard_samples": self.shard_samples,
            "window_frames": self.window_frames,
        }
        if (self.folder / MANIFEST).exists():
            self.manifest = read_manifest(self.folder)
            different = [name for name, value in origin.items() if self.manifest["origin"].get(name) != value]
            if different:
                raise InputError(
                    f"{self.folder} holds a cache made with another {', '.join(different)}; "
                    "choose another folder or remove it"
                )
        else:
            self.manifest = {"format": FORMAT, "origin": origin, "blocks": 0, "shards": [], "skipped": {}}

    def write(self, keys: Sequence[ClipKey]) -> None:
        """Encode the samples of `keys`, in blocks of `shard_samples`; blocks that the manifest has are
        skipped, so that the same call finishes an interrupted one. Neighbouring keys of one clip share the
        encoding of its portrait."""
        for start in range(self.manifest["blocks"] * self.shard_samples, len(keys), self.shard_samples):
            block = start // self.shard_samples
            samples: list[tuple[tuple[int, ...], CachedSample]] = []
            for _, same_clip in groupby(keys[start : start + self.shard_samples], key=lambda key: key[0]):
                samples += self._encode([self.dataset[key] for key in same_clip])
            samples.sort(key=lambda pair: pair[0])
            for part, (_, group) in enumerate(groupby(samples, key=lambda pair: pair[0])):
                self._save(f"shard-{block:05d}-{part}.safetensors", [sample for _, sample in group])
            self.manifest["blocks"] = block + 1
            self.manifest["skipped"] = self.dataset.skipped
            _write_atomically(self.folder / MANIFEST, json.dumps(self.manifest, indent=1).encode())
            logger.info("%d of %d samples encoded", min(start + self.shard_samples, len(keys)), len(keys))

    def _encode(self, samples: list[ClipSample]) -> list[tuple[tuple[int, ...], CachedSample]]:
        frames = self.window_frames or self.dataset.settings.frames
        latents = encode_videos(self.vae, np.stack([sample.frames for sample in samples]))
        pictures = {_reference_key(sample): sample.reference for sample in samples}
        encoded = encode_references(self.vae, np.stack(list(pictures.values())), frames)
        references = dict(zip(pictures, encoded, strict=True))
        result = []
        for sample, latent in zip(samples, latents, strict=True):
            if sample.face_mask is None or sample.lip_mask is None:
                raise ValueError("samples are read with masks")
            speech = self._encode_speech(sample)
            cached = CachedSample(
                latents=latent.to(self.dtype),
                reference=references[_reference_key(sample)].to(self.dtype),
                portrait=torch.from_numpy(sample.reference.copy()),
                speech=speech.to(self.dtype),
                face_mask=sample.face_mask.to(self.dtype),
                lip_mask=sample.lip_mask.to(self.dtype),
                prompt=sample.prompt,
            )
            result.append(((*latent.shape, *speech.shape), cached))
        return result

    @torch.no_grad()
    def _encode_speech(self, sample: ClipSample) -> torch.Tensor:
        if self.window_frames is None:
            return speech_features(self.speech_encoder, sample.speech)[0].float().cpu()
        starts = range(0, len(sample.frames) - self.window_frames + 1, 4)
        pieces = [
            normalized_speech(sample.clip, sample.window.start + start, self.window_frames)
            for start in starts
        ]
        # Where a frame is no whole number of samples, windows differ by one.
        length = min(len(piece) for piece in pieces)
        values = torch.from_numpy(np.stack([piece[:length] for piece in pieces]))
        encoder = self.speech_encoder
        return encoder(values.to(encoder.device, encoder.dtype)).last_hidden_state.float().cpu()

    def _save(self, name: str, samples: list[CachedSample]) -> None:
        tensors = {key: torch.stack([getattr(sample, key) for sample in samples]) for key in TENSORS}
        partial = self.folder / f".{name}.partial"
        save_file(tensors, partial)
        partial.replace(self.folder / name)
        self.manifest["shards"].append(
            {
                "file": name,
                "size": [*tensors["latents"].shape[2:], *tensors["speech"].shape[1:-1]],
                "prompts": [sample.prompt for sample in samples],
            }
        )


def _reference_key(sample: ClipSample) -> tuple[str, str, int]:
    return (sample.clip.name, sample.window.reference, sample.window.reference_frame)


class LatentCache(Dataset[CachedSample]):
    """A cache folder as it stands; keys are `(index, pass)` as for `ClipDataset`, and the pass changes
    nothing.

    Raises:
        InputError: there is no cache, or a shard is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._shards: list[Any] = []
        self._places: list[tuple[int, int]] = []
        self.groups: list[tuple[int, ...]] = []
        for number, shard in enumerate(self.manifest["shards"]):
            self._shards.append(self._open(shard["file"]))
            self._places += [(number, row) for row in range(len(shard["prompts"]))]
            self.groups += [tuple(shard["size"])] * len(shard["prompts"])
        if not self._places:
            raise InputError(f"the cache {folder} holds no samples yet")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: ClipKey) -> CachedSample:
        number, row = self._places[key[0]]
        shard = self._shards[number]
        tensors = {name: shard.get_slice(name)[row] for name in TENSORS}
        return CachedSample(**tensors, prompt=self.manifest["shards"][number]["prompts"][row])

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the shard {self.folder / name} cannot be read ({error}); make the cache again"
            ) from error


class CachedWindows(Dataset[CachedSample]):
    """Windows of a cache of longer clips: the same key `(index, pass)` gives the same window, another pass
    another.

    A window that does not start with its clip has latents as they stand in the middle of a video, which is
    what all windows but the first meet when sampling. One in four starts with the clip.

    Raises:
        InputError: the cache was made without `window_frames`.
    """

    def __init__(self, cache: LatentCache, seed: int = 0) -> None:
        frames = cache.manifest["origin"].get("window_frames")
        if frames is None:
            raise InputError(f"{cache.folder} holds no windows: make the cache with window_frames")
        self.cache = cache
        self.seed = seed
        self.window = (int(frames) - 1) // 4 + 1
        self.groups = cache.groups

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, key: ClipKey) -> CachedSample:
        sample = self.cache[key]
        rng = np.random.default_rng((self.seed, *key))
        start = 0 if rng.random() < 0.25 else int(rng.integers(len(sample.speech)))
        stretch = slice(start, start + self.window)
        return replace(
            sample,
            latents=sample.latents[:, stretch],
            speech=sample.speech[start],
            face_mask=sample.face_mask[stretch],
            lip_mask=sample.lip_mask[stretch],
            starts_clip=start == 0,
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache folder.

    Raises:
        InputError: it is missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no readable cache: {error}") from error
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is of format {manifest.get('format')}, not {FORMAT}; make the cache again")
    return manifest


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _weights_digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
