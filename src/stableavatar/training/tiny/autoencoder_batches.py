"""What the small autoencoder is trained on, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

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
        self.pictures = pictures
        self.puppets = puppets
        self.frame_size = frame_size

    def draw(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """What process `rank` trains on in a step.

        Length and size are the same for all processes; everything follows from seed, step and rank.
        """
        settings = self.settings
        shared = np.random.default_rng([settings.seed, step])
        if self.made is not None and shared.random() < settings.made_share:
            lengths = [n for n in settings.clip_lengths if 1 < n <= settings.longest_whole_clip]
            frames = int(shared.choice(lengths))
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
