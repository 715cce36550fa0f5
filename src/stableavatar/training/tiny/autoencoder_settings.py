"""What a training of the small autoencoder depends on besides its data."""

from __future__ import annotations

from dataclasses import dataclass

from stableavatar.errors import InputError
from stableavatar.training.tiny.feature_memory import chunk_lengths


@dataclass(frozen=True)
class AutoencoderSettings:
    """Everything a training run depends on besides its data.

    `minutes` counts all runs of one folder together.
    """

    minutes: float = 60.0
    base_channels: int = 32
    residual_blocks: int = 1
    latent_channels: int = 32
    # Of AdamW (biases and gains) and of Muon (kernels).
    learning_rate: float = 5e-4
    kernel_learning_rate: float = 1.2e-3
    warmup_steps: int = 20
    # The share of the minutes, at their end, in which the rate falls to zero.
    cooldown: float = 0.7
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    average_decay: float = 0.99
    # A step's size in frames of 64x64; the batch follows from it, the clips' length and the crop.
    frames_a_step: int = 40
    clip_lengths: tuple[int, ...] = (1, 5, 9, 21, 41)
    clip_weights: tuple[float, ...] = (0.15, 0.15, 0.25, 0.3, 0.15)
    longest_chunk: int = 20
    # Steps at the start in which clips have 1 or 5 frames.
    image_steps: int = 150
    whole_frames: float = 0.3
    longest_whole_clip: int = 21
    picture_share: float = 0.25
    squared_weight: float = 2.0
    edge_weight: float = 0.25
    coarse_weight: float = 0.5
    detail_weight: float = 4.0
    # What the critic's part is of the rest of the gradient by the pixels (0: no critic), and its rate.
    critic_share: float = 0.0
    critic_learning_rate: float = 1e-3
    # The critic's own first steps, in which it learns and nobody heeds it yet.
    critic_start: int = 100
    # The share of steps on latents that a transformer made, where there are any (`made_latents.py`).
    made_share: float = 0.5
    kl_weight: float = 1e-5
    face_weight: float = 0.5
    lip_weight: float = 1.5
    measured_clips: int = 64
    # Processes of one thread each; they split a step's clips and share its gradient.
    processes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.frames_a_step < 1:
            raise InputError("minutes and frames_a_step must be positive")
        if self.critic_share < 0 or not 0 <= self.made_share <= 1:
            raise InputError("critic_share must not be negative, and made_share lie between 0 and 1")
        if len(self.clip_lengths) != len(self.clip_weights):
            raise InputError("clip_lengths and clip_weights differ in length")
        for length in self.clip_lengths:
            chunk_lengths(length, self.longest_chunk)


def rate_factor(settings: AutoencoderSettings, step: int, minutes: float) -> float:
    """What the learning rates are multiplied by at a step and after `minutes` of training.

    It warms up by steps, stays, and falls linearly to a twentieth over the last `cooldown` of the minutes.
    """
    left = 1 - minutes / settings.minutes
    fall = min(1.0, max(0.05, left / settings.cooldown)) if settings.cooldown else 1.0
    return min(1.0, (step + 1) / settings.warmup_steps) * fall
