"""What the small autoencoder is trained on, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stableavatar.errors import InputError
from stableavatar.training.tiny.autoencoder_settings import AutoencoderSettings
from stableavatar.training.tiny.made_latents import MadeLatents
from stableavatar.training.tiny.pictures import PictureClips
from stableavatar.training.tiny.puppet_clips import PuppetClips


@dataclass(frozen=True)
class Batch:
    """What one process trains on in a step.

    Attributes:
        clips: [B, 3, F, S, S] in [-1, 1]. weights: of their pixels [B, 1, F, S, S].
        latents: [B, C, f, S/8, S/8], which a transformer has made for them; else the clips' own are taken.
    """

    clips: torch.Tensor
    weights: torch.Tensor
    latents: torch.Tensor | None = None


class Batches:
    """Draws batches from pictures and puppets (when there are any), by the settings' shares and lengths."""

    def __init__(
        self,
        settings: AutoencoderSettings,
        pictures: PictureClips,
        puppets: PuppetClips | None,
        frame_size: int = 128,
        made: MadeLatents | None = None,
    ) -> None:
        self.settings = settings
        self.made = made
        if made is not None:
            self.made_lengths, self.made_weights = self._lengths_of(made)
        self.pictures = pictures
        self.puppets = puppets
        self.frame_size = frame_size

    def _lengths_of(self, made: MadeLatents) -> tuple[list[int], NDArray[np.float64]]:
        """Of the settings' lengths those that are made too and of more than a picture, and how often each is
        drawn. Raises InputError: there is none."""
        settings = self.settings
        if made.channels != settings.latent_channels:
            raise InputError(f"the latents have {made.channels} channels, not {settings.latent_channels}")
        longest = min(settings.longest_whole_clip, made.frames)
        chosen = {
            length: weight
            for length, weight in zip(settings.clip_lengths, settings.clip_weights, strict=True)
            if 1 < length <= longest and weight > 0
        }
        if not chosen:
            raise InputError(f"no length of clips lies between 5 frames and the {longest} of made latents")
        weights = np.array(list(chosen.values()))
        return list(chosen), weights / weights.sum()

    def draw(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """What process `rank` trains on in a step.

        Length and size are the same for all processes (of made latents as far as their clips are of one
        size); everything follows from seed, step and rank.
        """
        settings = self.settings
        shared = np.random.default_rng([settings.seed, step])
        if self.made is not None and shared.random() < settings.made_share:
            frames = int(shared.choice(self.made_lengths, p=self.made_weights))
            rng = np.random.default_rng([settings.seed, step, rank + 1])
            latents, clip, face, lips = self.made.sample(rng, frames)
            weight = 1 + settings.face_weight * face + settings.lip_weight * lips
            return Batch(clip[None], weight[None, None], latents[None])
        weights = np.array(settings.clip_weights)
        if step < settings.image_steps:
            weights = weights * (np.array(settings.clip_lengths) <= 5)
        frames = int(shared.choice(settings.clip_lengths, p=weights / weights.sum()))
        whole = shared.random() < settings.whole_frames and frames <= settings.longest_whole_clip
        size = self.frame_size if whole else self.frame_size // 2
        batch = max(1, round(settings.frames_a_step * (64 / size) ** 2 / frames / ranks))
        rng = np.random.default_rng([settings.seed, step, rank + 1])
        clips, masks = [], []
        for _ in range(batch):
            weight = torch.ones(frames, size, size)
            if self.puppets is None or rng.random() < settings.picture_share:
                clips.append(self.pictures.sample(rng, frames, size))
            else:
                clip, face, lips = self.puppets.sample(rng, frames, size)
                clips.append(clip)
                weight += settings.face_weight * face + settings.lip_weight * lips
            masks.append(weight)
        return Batch(torch.stack(clips), torch.stack(masks)[:, None])

    def measured_clip(self, index: int) -> torch.Tensor:
        """Clip `index` of those that latents are measured over: puppets, else pictures, [1, 3, 21, S, S]."""
        rng = np.random.default_rng([self.settings.seed, index])
        if self.puppets is None:
            return self.pictures.sample(rng, 21, self.frame_size)[None]
        return self.puppets.sample(rng, 21, self.frame_size)[0][None]
