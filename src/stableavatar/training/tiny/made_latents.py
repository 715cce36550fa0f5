"""Latents as a transformer makes them, of puppets whose true frames are known: what a decoder meets in use.

    python -m stableavatar.training.tiny.made_latents --model MODEL --puppets STORE --out FOLDER --clips 400

A transformer's latents are not quite those of true frames: places waver, and what it cannot tell it leaves
smooth. A decoder that has seen the true ones alone turns that into mottled walls and soft eyes. These are of
true frames, noised so far that only the rough places of things are left, and denoised by the transformer,
with portrait, speech and prompt of the clip (as an edit by noise does, Meng et al., arXiv 2108.01073): the
errors are the transformer's, the frames still those that it should have come to. Clips that the folder has
already are left as they are.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

from stableavatar.conditioning.image import encode_clips
from stableavatar.data.puppets import ClipStore
from stableavatar.data.puppets.clip import FPS
from stableavatar.data.puppets.store import StoredClip
from stableavatar.errors import InputError, with_status
from stableavatar.media.files import replacing
from stableavatar.models.latents import denormalise_latents
from stableavatar.pipeline import AvatarPipeline, load

logger = logging.getLogger(__name__)

FRAMES = 33
"""Of a clip, from its first: nine latent frames."""


class LastSteps(FlowMatchEulerDiscreteScheduler):
    """The same steps, the first `skipped` left out."""

    skipped = 4

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """As the scheduler does it, then the first steps are taken away."""
        super().set_timesteps(*arguments, **options)
        for name in ("timesteps", "sigmas"):
            setattr(self, name, getattr(self, name)[self.skipped :])


def make_latents(pipeline: AvatarPipeline, clip: StoredClip) -> torch.Tensor:
    """The latents [C, 9, H/8, W/8] (not normalised) of a clip's first :data:`FRAMES`, as the transformer has
    them. The pipeline's scheduler is to be a :class:`LastSteps`."""
    width, height = clip.size
    frames = torch.from_numpy(clip.read_frames(0, FRAMES)).permute(3, 0, 1, 2)[None]
    true = encode_clips(pipeline.vae, frames.float() / 127.5 - 1)[0]
    steps = pipeline.defaults.steps
    pipeline.scheduler.set_timesteps(steps)
    sigma = pipeline.scheduler.sigmas[0]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(clip.seed))
    made = pipeline.sample_latents(
        clip.portrait,
        clip.read_speech(0, FRAMES),
        latents=(1 - sigma) * true + sigma * noise,
        prompt=clip.prompt,
        seed=clip.seed,
        width=width,
        height=height,
        fps=FPS,
        steps=steps,
    )
    return denormalise_latents(pipeline.vae, made.latents.float()[None])[0]


class MadeLatents:
    """The latents of a folder, each with the frames of its clip, which is one of `stores`.

    Raises InputError: the folder has none, or of a clip that no store has.
    """

    def __init__(self, folder: Path, stores: Sequence[ClipStore]) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise InputError(f"There are no latents in {folder}; make some (training.tiny.made_latents).")
        self.clips: Mapping[str, StoredClip] = {
            path.name: store[index] for store in stores for index, path in enumerate(store.folders)
        }
        for file in self.files:
            if file.stem not in self.clips:
                raise InputError(f"{file} is of a clip that none of the given stores of puppets has.")

    def sample(
        self, rng: np.random.Generator, frames: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents float32 [C, (frames+3)/4, H/8, W/8], and the clip's first 4n+1 `frames`, [3, frames, H, W]
        in [-1, 1], with face and lip masks [frames, H, W] in 0..1."""
        file = self.files[int(rng.integers(len(self.files)))]
        clip = self.clips[file.stem]
        latents = load_file(file)["latents"][:, : (frames + 3) // 4].float()
        pixels = torch.from_numpy(clip.read_frames(0, frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
        face, lips = (
            torch.from_numpy(clip.read_masks(kind, 0, frames)) for kind in ("face_masks", "lip_masks")
        )
        return latents, pixels, face, lips


def _run_process(rank: int, options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    pipeline = load(options.model)
    pipeline.scheduler = LastSteps.from_config(pipeline.scheduler.config)
    # Of every store as many, as far as there are.
    rounds = itertools.zip_longest(*(ClipStore(folder) for folder in options.puppets))
    clips = [clip for each in rounds for clip in each if clip is not None][: options.clips]
    for number, clip in enumerate(clips):
        target = options.out / f"{clip.folder.name}.safetensors"
        if number % options.processes != rank or target.exists():
            continue
        latents = make_latents(pipeline, clip).to(torch.bfloat16).contiguous()
        with replacing(target) as partial:
            save_file({"latents": latents}, partial)
        if number % 50 == 0:
            logger.info("%d of %d clips", number + 1, len(clips))


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Makes latents of puppets by a transformer.")
    parser.add_argument("--model", default="tiny", help="a folder, or `tiny`")
    parser.add_argument(
        "--puppets", type=Path, action="append", required=True, help="a store of clips (may be repeated)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the latents")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    for folder in options.puppets:
        ClipStore(folder)  # what is missing is said here: of processes one gets tracebacks
    options.out.mkdir(parents=True, exist_ok=True)
    spawn(_run_process, args=(options,), nprocs=options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
