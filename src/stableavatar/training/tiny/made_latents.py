"""Latents as a transformer makes them, of puppets whose true frames are known: what a decoder meets in use.

    python -m stableavatar.training.tiny.made_latents --model MODEL --puppets STORE --out FOLDER --clips 400

A transformer's latents are not quite those of true frames: places waver, and what it cannot tell it leaves
smooth. A decoder that has seen the true ones alone turns that into mottled walls and soft eyes. These are of
true frames, noised so far that only the rough places of things are left, and denoised by the transformer,
with portrait, speech and prompt of the clip (as an edit by noise does, Meng et al., arXiv 2108.01073): the
errors are the transformer's, the frames still those that it should have come to. Latents that the folder has
already are left as they are, unless they are another model's.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

from stableavatar.conditioning.image import encode_clips
from stableavatar.data.puppets import ClipStore
from stableavatar.data.puppets.clip import FPS
from stableavatar.data.puppets.store import StoredClip
from stableavatar.errors import InputError, with_status
from stableavatar.journal import tensor_hash
from stableavatar.media.files import replacing
from stableavatar.models.latents import denormalise_latents
from stableavatar.pipeline import AvatarPipeline, load
from stableavatar.sampling.denoiser import Schedule

logger = logging.getLogger(__name__)

SKIPPED = 4
"""Of the model's steps (10): the noise that is left then hides all but the rough places of things."""


class LastSteps(FlowMatchEulerDiscreteScheduler):
    """The same steps, the first :data:`SKIPPED` left out."""

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """As the scheduler does it, then the first steps are taken away."""
        super().set_timesteps(*arguments, **options)
        for name in ("timesteps", "sigmas"):
            setattr(self, name, getattr(self, name)[SKIPPED:])


def make_latents(pipeline: AvatarPipeline, clip: StoredClip) -> torch.Tensor:
    """The latents [C, f, H/8, W/8] (not normalised) of a clip's first window as the transformer has them.

    Args:
        pipeline: on the CPU, its scheduler a :class:`LastSteps`. clip: at least as long as its window.
    """
    width, height = clip.size
    steps, frames = pipeline.defaults.steps, pipeline.defaults.window
    pixels = torch.from_numpy(clip.read_frames(0, frames)).permute(3, 0, 1, 2)[None]
    true = encode_clips(pipeline.vae, pixels.float() / 127.5 - 1)[0]
    sigma = Schedule.from_scheduler(pipeline.scheduler, steps).sigmas[0]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(clip.seed))
    made = pipeline.sample_latents(
        clip.portrait,
        clip.read_speech(0, frames),
        latents=(1 - sigma) * true + sigma * noise,
        prompt=clip.prompt,
        seed=clip.seed,
        width=width,
        height=height,
        fps=FPS,
        steps=steps,
    )
    return denormalise_latents(pipeline.vae, made.latents.float()[None])[0]


def origin_of(pipeline: AvatarPipeline) -> str:
    """A hash of what latents are made with: the transformer, the encoder, how many steps of how many."""
    digest = hashlib.blake2b(f"{SKIPPED} of {pipeline.defaults.steps}".encode(), digest_size=16)
    for part in (pipeline.transformer, pipeline.vae.encoder, pipeline.vae.quant_conv):
        for name, value in sorted(part.state_dict().items()):
            digest.update(f"{name} {tensor_hash(value)}".encode())
    return digest.hexdigest()


class MadeLatents:
    """The latents of a folder, each with the frames of its clip, which is one of `stores`.

    Attributes:
        frames: that all clips have latents of, from their first. channels: of all latents.

    Raises:
        InputError: the folder has none, some are of different models, or of a clip that no store has or that
            two have.
    """

    def __init__(self, folder: Path, stores: Sequence[ClipStore]) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise InputError(f"There are no latents in {folder}; make some (training.tiny.made_latents).")
        self.places = _places(stores)
        origin, (self.channels, *_) = _read_origin(self.files[0])
        self.frames = min(self._check(file, origin) for file in self.files)

    def _check(self, file: Path, origin: str) -> int:
        if file.stem not in self.places:
            raise InputError(f"{file} is of a clip that none of the given stores of puppets has.")
        own, shape = _read_origin(file)
        if own != origin:
            raise InputError(f"{file} was made by another model than {self.files[0]}: make them anew.")
        return 4 * shape[1] - 3

    def sample(
        self, rng: np.random.Generator, frames: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents float32 [C, (frames+3)/4, H/8, W/8], and the clip's first 4n+1 `frames`, [3, frames, H, W]
        in [-1, 1], with face and lip masks [frames, H, W] in 0..1."""
        file = self.files[int(rng.integers(len(self.files)))]
        store, index = self.places[file.stem]
        clip = store[index]
        latents = load_file(file)["latents"][:, : (frames + 3) // 4].float()
        pixels = torch.from_numpy(clip.read_frames(0, frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
        face, lips = (
            torch.from_numpy(clip.read_masks(kind, 0, frames)) for kind in ("face_masks", "lip_masks")
        )
        return latents, pixels, face, lips


def _places(stores: Sequence[ClipStore]) -> dict[str, tuple[ClipStore, int]]:
    """Where each clip is, by its name."""
    places: dict[str, tuple[ClipStore, int]] = {}
    for store in stores:
        for index, folder in enumerate(store.folders):
            if folder.name in places:
                raise InputError(
                    f"{places[folder.name][0].folder} and {store.folder} both have {folder.name}."
                )
            places[folder.name] = (store, index)
    return places


def _read_origin(file: Path) -> tuple[str, tuple[int, ...]]:
    """What a file's latents were made with, and their shape."""
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("origin", ""), tuple(opened.get_slice("latents").get_shape())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}); remove it and make it anew.") from error


def _load(model: str) -> AvatarPipeline:
    pipeline = load(model, device="cpu")
    pipeline.scheduler = LastSteps.from_config(pipeline.scheduler.config)
    return pipeline


def _run_process(rank: int, options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    pipeline = _load(options.model)
    origin = origin_of(pipeline)
    # Of every store as many, as far as there are.
    rounds = itertools.zip_longest(*(ClipStore(folder) for folder in options.puppets))
    clips = (clip for each in rounds for clip in each if clip is not None)
    for number, clip in enumerate(itertools.islice(clips, options.clips)):
        target = options.out / f"{clip.folder.name}.safetensors"
        if number % options.processes != rank or (target.exists() and _read_origin(target)[0] == origin):
            continue
        latents = make_latents(pipeline, clip).to(torch.bfloat16).contiguous()
        with replacing(target) as partial:
            save_file({"latents": latents}, partial, metadata={"origin": origin})
        if number % 50 == 0:
            logger.info("%d of %d clips", number + 1, options.clips)


def command_parser() -> argparse.ArgumentParser:
    """The options of :func:`main`."""
    parser = argparse.ArgumentParser(description="Makes latents of puppets by a transformer.")
    parser.add_argument("--model", default="tiny", help="a folder, or `tiny`")
    parser.add_argument(
        "--puppets", type=Path, action="append", required=True, help="a store of clips (may be repeated)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the latents")
    parser.add_argument("--clips", type=int, default=400, help="how many, of every store as many")
    parser.add_argument("--processes", type=int, default=2, help="of one thread and one model each")
    return parser


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    options = command_parser().parse_args(arguments)
    if min(options.clips, options.processes) < 1:
        raise InputError("--clips and --processes must be at least 1")
    # What is missing is said here: of processes one gets tracebacks.
    stores = [ClipStore(folder) for folder in options.puppets]
    _places(stores)
    window = _load(options.model).defaults.window
    for store in stores:
        if not len(store) or store[0].length < window:
            raise InputError(
                f"{store.folder}: it has no clips, or shorter ones than a window of {window} frames"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    spawn(_run_process, args=(options,), nprocs=options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
