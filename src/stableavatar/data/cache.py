"""Encoder results on disk, so that no encoder runs inside the training loop.

A cache is a folder of safetensors shards and a manifest, which names the finished shards, so that an
interrupted one is written on where it stopped; it can be trained on when it is complete. A sample is
kept by clip and pass, so that what is drawn anew for every pass (start, reference) is there as often as
passes were written. Several processes write one cache: each takes its share of the blocks and leaves a note
of every finished one, which the first process takes over into the manifest.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from stableavatar.data.dataset import ClipDataset
from stableavatar.data.encoding import EncodedSample, Encoders
from stableavatar.data.sampler import ClipKey
from stableavatar.errors import InputError, StorageError
from stableavatar.media.files import locked, reason_of, to_disk, unlock, write_file

logger = logging.getLogger(__name__)

FORMAT = 3
MANIFEST = "manifest.json"
NOTES = "block-*.json"
TENSORS = ("latents", "reference", "portrait", "speech", "face_mask", "lip_mask", "portrait_embeddings")
# Kept as they are: a picture of bytes.
_BYTES = ("portrait",)
# Passes of a clip that are read at once, to share the encoding of its portrait: their frames are in memory.
_TOGETHER = 4
_LOCK = ".lock"


@dataclass
class CacheWriter:
    """Encodes samples of a data set into a cache folder.

    Args:
        folder: made if it is not there; what it holds already is kept. Where it was made of the first clips
            of the data set, those that came after are added.
        encoders: on the device and in the dtype they shall run in.
        dtype: of latents, features and masks in the shards.
        shard_samples: samples a shard.
        window_frames: T of the windows that `CachedWindows` takes from the samples, which are longer: one
            encoding of a clip then serves many windows; see `Encoders.encode_samples`.
        process, processes: which of how many processes this is. The first has to be made before the others,
            all of them before the first writes, and when all have written they `finish`.
        encoder_files: what tells the encoders' files from others, for trainings that load no encoder.

    What the encoders make of a clip has to be finite: otherwise it is as one that cannot be read, which
    `on_error` of the data set's settings raises, or skips: the cache is then complete without it.

    Raises:
        InputError: the folder holds a cache of other encoders, of another data set or of other settings, or
            one that the first process has not begun, or that another run writes.
        StorageError: it cannot be written, now or later.
    """

    dataset: ClipDataset
    folder: Path
    encoders: Encoders
    dtype: torch.dtype = torch.float32
    shard_samples: int = 96
    window_frames: int | None = None
    process: int = 0
    processes: int = 1
    encoder_files: str | None = None
    manifest: dict[str, Any] = field(init=False)
    _before: int = field(default=0, init=False)
    _missing: int = field(default=0, init=False)
    _lock: IO[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        frames, window = self.dataset.settings.frames, self.window_frames
        if window is not None and (window % 4 != 1 or not 5 <= window <= frames):
            raise InputError(f"window_frames must be 4n+1, from 5 to the {frames} of a sample, not {window}")
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.process == 0:
                self._lock = self._locked()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Take up what the folder holds, or make a manifest."""
        origin = {
            "dataset": asdict(self.dataset.settings),
            "clips": self.dataset.clips_digest(),
            **{name: _weights_digest(part) for name, part in self.encoders.parts.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "shard_samples": self.shard_samples,
            "window_frames": self.window_frames,
        }
        self._origin_digest = _digest(json.dumps(origin, sort_keys=True).encode())
        groups = [[width, height, str(fps)] for width, height, fps in self.dataset.groups]
        leads = self.process == 0
        if leads and not (self.folder / MANIFEST).exists():
            self.manifest = {"format": FORMAT, "origin": origin, "groups": groups}
            self.manifest |= {"blocks": 0, "shards": [], "skipped": {}, "complete": False}
            self._write_manifest()
        self.manifest = read_manifest(self.folder)
        stored = self.manifest["origin"]
        if leads and stored["clips"] == self.dataset.clips_digest(len(self.manifest["groups"])):
            # Of the first of these clips, which others have joined.
            stored["clips"], self.manifest["groups"] = origin["clips"], groups
        different = [name for name in {**origin, **stored} if origin.get(name) != stored.get(name)]
        if different:
            raise InputError(
                f"{self.folder} holds a cache made with another {', '.join(different)}; "
                "choose another folder or remove it"
            )
        if leads:
            self.manifest["encoder files"] = self.encoder_files
            self._write_manifest()
            self._gather()

    def write(self, keys: Sequence[ClipKey]) -> None:
        """Encode the samples of `keys`, in blocks of `shard_samples`, of which every process takes its share;
        those that the manifest has are left out, so that the same call finishes an interrupted one, and
        another one adds passes. A few neighbouring keys of one clip share the encoding of its portrait."""
        there = {tuple(key) for shard in self.manifest["shards"] for key in shard["keys"]}
        missing = [key for key in keys if key not in there]
        first, self._before, self._missing = self.manifest["blocks"], len(there), len(missing)
        if missing and self.process == 0:
            self.manifest["complete"] = False
            self._write_manifest()
        for number, start in enumerate(range(0, len(missing), self.shard_samples)):
            if number % self.processes != self.process:
                continue
            samples: list[tuple[ClipKey, EncodedSample]] = []
            for _, same_clip in groupby(missing[start : start + self.shard_samples], key=lambda key: key[0]):
                for some in _parts(list(same_clip), _TOGETHER):
                    read = [self.dataset[key] for key in some]
                    encoded = self.encoders.encode_samples(read, self.window_frames)
                    for key, clip, sample in zip(some, (it.clip for it in read), encoded, strict=True):
                        check = partial(_finite, sample, clip.name, self.dtype)
                        if self.dataset.guarded(clip.name, check) is not None:
                            samples.append((key, sample))
            samples.sort(key=lambda pair: _shapes(pair[1]))
            block = first + number
            shards = [
                self._save(f"shard-{block:05d}-{part}", list(group))
                for part, (_, group) in enumerate(groupby(samples, key=lambda pair: _shapes(pair[1])))
            ]
            note = {
                "origin": self._origin_digest,
                "block": block,
                "shards": shards,
                "skipped": self.dataset.skipped,
            }
            self._write_file(NOTES.replace("*", f"{block:05d}"), note)
            if self.process == 0:
                self._gather()

    def finish(self, keys: Sequence[ClipKey]) -> None:
        """Take what the others have finished over into the manifest; for the first process, the others need
        do nothing.

        Raises:
            InputError: samples of `keys` are not there: the processes did not write into one folder.
        """
        if self.process != 0:
            return
        self._gather()
        there = {tuple(key) for shard in self.manifest["shards"] for key in shard["keys"]}
        skipped = {k for k, clip in enumerate(self.dataset.clips) if clip.name in self.manifest["skipped"]}
        lacking = sum(key not in there and key[0] not in skipped for key in keys)
        if lacking:
            raise InputError(
                f"{self.folder} lacks {lacking} of {len(keys)} samples, which another process was to write: "
                "do all processes see this folder? The same command writes what is lacking"
            )
        self.manifest["complete"] = True
        self._write_manifest()
        self.close()

    def _locked(self) -> IO[bytes]:
        try:
            return locked(self.folder / _LOCK)
        except BlockingIOError as error:
            raise InputError(f"{self.folder}: another run writes this cache: wait for its end") from error

    def close(self) -> None:
        """Let other runs write into the folder; `finish` does so at its end."""
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def _gather(self) -> None:
        """Notes become entries of the manifest. Those of another cache, which was interrupted in this folder
        before it had a manifest, are thrown away."""
        notes = sorted(self.folder.glob(NOTES))
        known = {shard["file"] for shard in self.manifest["shards"]}
        for note in notes:
            content = json.loads(note.read_text(encoding="utf-8"))
            if content["origin"] != self._origin_digest:
                logger.warning("%s: of another cache, not used", note)
                continue
            self.manifest["shards"] += [shard for shard in content["shards"] if shard["file"] not in known]
            self.manifest["blocks"] = max(self.manifest["blocks"], content["block"] + 1)
            self.manifest["skipped"] |= content["skipped"]
        if notes:
            self._write_manifest()
            done = sum(len(shard["keys"]) for shard in self.manifest["shards"]) - self._before
            logger.info("%d of %d samples encoded", done, self._missing or done)
        for note in notes:
            note.unlink()

    def _write_manifest(self) -> None:
        self._write_file(MANIFEST, self.manifest, indent=1)

    def _save(self, name: str, pairs: list[tuple[ClipKey, EncodedSample]]) -> dict[str, Any]:
        samples = [sample for _, sample in pairs]
        tensors = {}
        for key in TENSORS:
            if getattr(samples[0], key) is not None:
                stacked = torch.stack([getattr(sample, key) for sample in samples])
                tensors[key] = stacked if key in _BYTES else stacked.to(self.dtype)
        keys = [list(key) for key, _ in pairs]
        # Named by what it holds too: two runs at once cannot put other samples under a name that is known.
        name = f"{name}-{_digest(json.dumps(keys).encode())[:8]}.safetensors"
        self._write(name, tensors)
        for prompt in {sample.prompt for sample in samples} | {""}:
            embeddings = self.encoders.prompt(prompt)
            if embeddings is not None and not (self.folder / _prompt_file(prompt)).exists():
                self._write(_prompt_file(prompt), {"embeddings": embeddings.to(self.dtype)})
        prompts = [sample.prompt for sample in samples]
        return {"file": name, "keys": keys, "prompts": prompts}

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        # Two processes may come upon one prompt.
        partial = self.folder / f".{name}.{self.process}.partial"
        with self._errors():
            try:
                save_file(tensors, partial)
                to_disk(partial)
                partial.replace(self.folder / name)
            finally:
                partial.unlink(missing_ok=True)

    def _write_file(self, name: str, content: Any, indent: int | None = None) -> None:
        with self._errors():
            write_file(self.folder / name, json.dumps(content, indent=indent).encode())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises StorageError where the disk is full or the folder cannot be written."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"the cache {self.folder} cannot be written ({reason_of(error)}). Make room; the same "
                "command goes on"
            ) from error


def _finite(sample: EncodedSample, name: str, dtype: torch.dtype) -> EncodedSample:
    """A sample as it is. Raises InputError: in this dtype not all of its values are finite."""
    for key in (*TENSORS, "prompt_embeddings"):
        values = getattr(sample, key)
        if values is not None and key not in _BYTES and not values.to(dtype).isfinite().all():
            raise InputError(
                f"{name}: values of its {key} are not finite in {str(dtype).removeprefix('torch.')}: look at "
                "it; float16 holds no large values, other dtypes do"
            )
    return sample


def _parts(keys: Sequence[ClipKey], size: int) -> Iterator[Sequence[ClipKey]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _shapes(sample: EncodedSample) -> tuple[int, ...]:
    return (*sample.latents.shape, *sample.speech.shape)


class LatentCache(Dataset[EncodedSample]):
    """A cache folder as it stands; keys are `(index, pass)` as for the `ClipDataset` that it was made of, and
    passes beyond those that were written begin with the first again.

    Raises:
        InputError: there is no cache, or a shard is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        if not self.manifest.get("complete", True):
            raise InputError(
                f"the cache {folder} is not complete: the command that began it (cache-latents) goes on"
            )
        self._open_shards: list[Any] | None = []
        places: dict[int, dict[int, tuple[int, int]]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            self._open_shards.append(self._open(shard["file"]))
            for row, (clip, epoch) in enumerate(shard["keys"]):
                places.setdefault(clip, {})[epoch] = (number, row)
        if not places:
            raise InputError(f"the cache {folder} holds no samples yet")
        self._places = [[passes[epoch] for epoch in sorted(passes)] for _, passes in sorted(places.items())]
        self.groups = [tuple(self.manifest["groups"][clip]) for clip in sorted(places)]
        told = [self.manifest["origin"], sorted((clip, *sorted(passes)) for clip, passes in places.items())]
        self.fingerprint = _digest(json.dumps(told, sort_keys=True).encode())
        self._has_prompts = "text_encoder" in self.manifest["origin"]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: ClipKey) -> EncodedSample:
        passes = self._places[key[0]]
        number, row = passes[key[1] % len(passes)]
        shard = self._shards()[number]
        there = set(shard.keys())
        tensors: dict[str, Any] = {
            name: shard.get_slice(name)[row] if name in there else None for name in TENSORS
        }
        prompt = self.manifest["shards"][number]["prompts"][row]
        return EncodedSample(
            **tensors,
            prompt=prompt,
            prompt_embeddings=self._prompt(prompt),
            empty_prompt=self._prompt(""),
        )

    def __getstate__(self) -> dict[str, Any]:
        """For processes that read ahead, where they are not forked: open files stay behind."""
        return {**self.__dict__, "_open_shards": None}

    def _shards(self) -> list[Any]:
        if self._open_shards is None:
            self._open_shards = [self._open(shard["file"]) for shard in self.manifest["shards"]]
        return self._open_shards

    def check_files(self, encoder_files: str | None) -> None:
        """Raises InputError: the cache was made with encoders in other files than these; None: not known."""
        stored = self.manifest.get("encoder files")
        if None not in (stored, encoder_files) and stored != encoder_files:
            raise InputError(
                f"{self.folder} was made with other encoders than those of model.source; make it again"
            )

    def check_encoders(self, encoders: Encoders) -> None:
        """Raises InputError: the cache was made with other weights than these."""
        for name, part in encoders.parts.items():
            if self.manifest["origin"].get(name) != _weights_digest(part):
                raise InputError(
                    f"{self.folder} was made with another {name}, or in another dtype; make it again"
                )

    def _prompt(self, text: str) -> torch.Tensor | None:
        """Read each time: there may be a prompt a clip."""
        return self._open(_prompt_file(text)).get_tensor("embeddings") if self._has_prompts else None

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the shard {self.folder / name} cannot be read ({error}); make the cache again"
            ) from error


class CachedWindows(Dataset[EncodedSample]):
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
        self.fingerprint = cache.fingerprint

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, key: ClipKey) -> EncodedSample:
        sample = self.cache[key]
        rng = np.random.default_rng((self.seed, *key))
        start = 0 if rng.random() < 0.25 else int(rng.integers(len(sample.speech)))
        stretch = slice(start, start + self.window)
        return replace(
            sample,
            latents=sample.latents[:, stretch],
            speech=sample.speech[start],
            face_mask=None if sample.face_mask is None else sample.face_mask[stretch],
            lip_mask=None if sample.lip_mask is None else sample.lip_mask[stretch],
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
        raise InputError(
            f"{folder} holds no readable cache ({error}); stableavatar cache-latents makes one"
        ) from error
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is of format {manifest.get('format')}, not {FORMAT}; make the cache again")
    return manifest


def _prompt_file(text: str) -> str:
    return f"prompt-{_digest(text.encode())[:32]}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _weights_digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
