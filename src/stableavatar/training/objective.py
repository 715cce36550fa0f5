"""The objective: flow matching with mask losses, dropped conditions and an optional motion term (spec 4,
"Objective").

Everything random about a step is drawn first (`draw_step`) and handed on as data (`StepDraws`); the rest is
pure functions of tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.config import TRAINING_STEPS
from stableavatar.errors import InputError

Timesteps = Literal["uniform", "logit-normal", "mode"]
MaskLoss = Literal["drawn", "expected", "none"]


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the loss is made of. The defaults are the published recipe.

    Attributes:
        shift: shift of the training sigmas (1: not shifted, towards clean video; larger: towards noise).
        timesteps: how the place among the 1000 shifted sigmas is drawn: `uniform`; `logit-normal` and `mode`
            as in Stable Diffusion 3 (arXiv 2403.03206, section 3.1).
        logit_mean: of `logit-normal`.
        logit_std: of `logit-normal`, its standard deviation.
        mode_scale: of `mode`.
        mask_loss: `drawn`: one draw a batch (of each process, and each piece of accumulation) chooses between
            the three weights of `mask_weight`; `expected`: their expectation in every batch, the same
            gradient on average with less noise; `none`: every latent counts the same.
        motion_ratio: part of the loss that the motion term takes (published runs: 0.25); 0 leaves it out.
        audio_dropping: probability that a clip's speech features are zeros at the adapter's input.
        audio_output_dropping: probability that a clip gets zeros in place of the adapter's output, which is
            what guidance without audio does by default when sampling (spec 5, fault 16).
        clip_level_audio: probability that in this batch all tokens hear the audio of all latent frames.
        prompt_dropping: probability that a clip's prompt is the empty one.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    shift: float = 5.0
    timesteps: Timesteps = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    mask_loss: MaskLoss = "drawn"
    motion_ratio: float = 0.0
    audio_dropping: float = 0.1
    audio_output_dropping: float = 0.0
    clip_level_audio: float = 0.3
    prompt_dropping: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shift", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        for name in ("logit_mean", "mode_scale"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be finite, not {getattr(self, name)}")
        for name, choices in (("timesteps", get_args(Timesteps)), ("mask_loss", get_args(MaskLoss))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in (
            "motion_ratio",
            "audio_dropping",
            "audio_output_dropping",
            "clip_level_audio",
            "prompt_dropping",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name, way in (
            ("logit_mean", "logit-normal"),
            ("logit_std", "logit-normal"),
            ("mode_scale", "mode"),
        ):
            if getattr(self, name) != getattr(type(self), name) and self.timesteps != way:
                raise InputError(f"{name} is of timesteps {way}, not of {self.timesteps}: leave it out")
        if self.audio_dropping + self.audio_output_dropping > 1:
            raise InputError("audio_dropping and audio_output_dropping together must be at most 1")


def training_sigmas(shift: float) -> torch.Tensor:
    """The scheduler's 1000 sigmas after the shift: float32 `[1000]`, from 1 down to nearly 0. A timestep is
    1000 times its sigma.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAINING_STEPS, shift=shift).sigmas.float()


def draw_sigmas(
    count: int, settings: ObjectiveSettings, sigmas: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """`count` of the scheduler's sigmas, float32 `[count]`, at places drawn as `settings.timesteps` says."""
    if settings.timesteps == "logit-normal":
        normal = torch.randn(count, generator=generator) * settings.logit_std + settings.logit_mean
        place = normal.sigmoid()
    else:
        place = torch.rand(count, generator=generator)
        if settings.timesteps == "mode":
            bend = torch.cos(torch.pi / 2 * place) ** 2 - 1 + place
            place = 1 - place - settings.mode_scale * bend
    index = (place * len(sigmas)).long().clamp(0, len(sigmas) - 1)
    return sigmas[index]


@dataclass(frozen=True)
class StepDraws:
    """Everything random about one pass, for a batch of B clips.

    `noise` has the latents' shape, `sigma` is `[B]`, `mask_draw` lies in [0, 1) and decides for the whole
    batch, as does `clip_level_audio`; the three others say for each clip what is dropped.
    """

    sigma: torch.Tensor
    noise: torch.Tensor
    mask_draw: float
    clip_level_audio: bool
    audio_dropped: tuple[bool, ...]
    audio_output_dropped: tuple[bool, ...]
    prompt_dropped: tuple[bool, ...]


def draw_step(
    latents_shape: torch.Size, settings: ObjectiveSettings, sigmas: torch.Tensor, generator: torch.Generator
) -> StepDraws:
    """Draw a step for latents `[B, C, F, H, W]` on the CPU; the same generator state gives the same step."""
    batch = latents_shape[0]
    sigma = draw_sigmas(batch, settings, sigmas, generator)
    noise = torch.randn(latents_shape, generator=generator)
    mask_draw, clip_draw = torch.rand(2, generator=generator).tolist()
    audio = torch.rand(batch, generator=generator)
    prompt = torch.rand(batch, generator=generator)
    either = settings.audio_dropping + settings.audio_output_dropping
    at_input = audio < settings.audio_dropping
    return StepDraws(
        sigma=sigma,
        noise=noise,
        mask_draw=mask_draw,
        clip_level_audio=clip_draw < settings.clip_level_audio,
        audio_dropped=tuple(at_input.tolist()),
        audio_output_dropped=tuple(((audio < either) & ~at_input).tolist()),
        prompt_dropped=tuple((prompt < settings.prompt_dropping).tolist()),
    )


def noised(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """z_s = (1 - s)·z + s·noise, for latents `[B, ...]` and sigma `[B]`."""
    s = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - s) * latents + s * noise


def mask_weight(
    mode: MaskLoss, draw: float, face_mask: torch.Tensor | None, lip_mask: torch.Tensor | None
) -> torch.Tensor | float:
    """What the squared error is multiplied by, of the masks' shape.

    `drawn`: 1 + face + lip if draw < 0.4, face if draw < 0.5, else lip. `expected`: the mean of that over the
    draw, 0.4·(1 + face + lip) + 0.1·face + 0.5·lip = 0.4 + 0.5·face + 0.9·lip. `none`: 1.

    Raises:
        InputError: another mode than `none`, and no masks.
    """
    if mode == "none":
        return 1.0
    if face_mask is None or lip_mask is None:
        raise InputError(f"mask_loss {mode} needs masks: read the clips with masks")
    face_mask, lip_mask = face_mask.float(), lip_mask.float()
    if mode == "expected":
        return 0.4 + 0.5 * face_mask + 0.9 * lip_mask
    if draw < 0.4:
        return 1 + face_mask + lip_mask
    return face_mask if draw < 0.5 else lip_mask


def flow_matching_error(
    velocity: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | float
) -> torch.Tensor:
    """Mean weighted squared error of each clip: `[B]` from `[B, C, F, H, W]` and a weight `[B, F, H, W]` (for
    all channels) or 1.
    """
    squared = (velocity.float() - target.float()) ** 2
    if isinstance(weight, torch.Tensor):
        weight = weight[:, None]
    return (weight * squared).flatten(1).mean(1)


def motion_error(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error between the differences of neighbouring latent frames: `[B]` from `[B, C, F, H, W]`,
    F >= 2.
    """
    predicted = velocity.float().diff(dim=2)
    wanted = target.float().diff(dim=2)
    return ((predicted - wanted) ** 2).flatten(1).mean(1)


@dataclass(frozen=True)
class ModelInputs:
    """A batch of B clips as the transformer takes it.

    Attributes:
        latents: clean, normalised `[B, C, F, H, W]`.
        condition: mask and encoded reference clip `[B, C + 4, F, H, W]`.
        prompt: `[B, L, C]`, zeros after the prompt; `empty_prompt`: `[1, L, C]`, what a dropped one becomes.
        portrait: `[B, P, C]`.
        speech: features of the clips' speech `[B, S, C]`.
        face_mask, lip_mask: in [0, 1], at latent size, `[B, F, H, W]`; None: with mask_loss `none` alone.
        judged: latent frames whose error counts, 0 or 1, `[B, F]`; None: all. The motion term counts all.
    """

    latents: torch.Tensor
    condition: torch.Tensor
    prompt: torch.Tensor
    empty_prompt: torch.Tensor
    portrait: torch.Tensor
    speech: torch.Tensor
    face_mask: torch.Tensor | None
    lip_mask: torch.Tensor | None
    judged: torch.Tensor | None = None


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step (a scalar with gradients), and what the log splits it by: `per_clip` and `sigma`,
    both `[B]`.
    """

    loss: torch.Tensor
    per_clip: torch.Tensor
    sigma: torch.Tensor


def step_loss(
    transformer: Callable[..., tuple[torch.Tensor]],
    inputs: ModelInputs,
    draws: StepDraws,
    settings: ObjectiveSettings,
) -> StepLoss:
    """Loss of one step.

    With a motion ratio m above 0 a clip's loss is (1 - m)·error + m·motion error; the loss is the mean over
    clips.

    Args:
        transformer: `StableAvatarTransformer3DModel`, or what takes its arguments and returns `(velocity,)`
            with `return_dict=False`.
        draws: on any device; moved to the latents'.
    """
    latents = inputs.latents.float()
    sigma = draws.sigma.to(latents.device)
    noise = draws.noise.to(latents.device)
    dropped = torch.tensor(draws.prompt_dropped, device=latents.device)[:, None, None]
    silenced = torch.tensor(draws.audio_dropped, device=latents.device)[:, None, None]
    prompt = torch.where(dropped, inputs.empty_prompt, inputs.prompt)
    speech = torch.where(silenced, 0.0, inputs.speech)

    (velocity,) = transformer(
        noised(latents, noise, sigma),
        inputs.condition,
        sigma * TRAINING_STEPS,
        prompt,
        inputs.portrait,
        speech,
        [None if silent else row for row, silent in enumerate(draws.audio_output_dropped)],
        clip_level_audio=draws.clip_level_audio,
        return_dict=False,
    )
    target = noise - latents
    weight = mask_weight(settings.mask_loss, draws.mask_draw, inputs.face_mask, inputs.lip_mask)
    if inputs.judged is not None:
        weight = weight * inputs.judged[:, :, None, None]
    error = flow_matching_error(velocity, target, weight)
    if settings.motion_ratio > 0:
        error = (1 - settings.motion_ratio) * error + settings.motion_ratio * motion_error(velocity, target)
    return StepLoss(error.mean(), error.detach(), sigma)
