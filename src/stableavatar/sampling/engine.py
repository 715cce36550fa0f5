"""The sampler: cells, and the order in which they run (spec 2).

A cell (window, step) is one call: the window's latents as they stood after the last step go in, its latents
after this step come out. An order decides which cell runs when, and moves latents between windows. `Denoiser`
is the cell of the real model; an order takes any callable of that kind.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.choices import OverlapWeights
from stableavatar.errors import StableAvatarError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.sampling.guidance import Guidance
from stableavatar.sampling.noise import Noise
from stableavatar.sampling.windows import Window, WindowPlan, overlap_ramp


class SamplingError(StableAvatarError):
    """The latents became NaN or infinite."""


@dataclass(frozen=True)
class Schedule:
    """Timesteps `[steps]` (0 to 1000) and sigmas `[steps + 1]`, as the scheduler sets them."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    @classmethod
    def from_scheduler(cls, scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> "Schedule":
        """The scheduler's own `set_timesteps(steps)`, its double shift of the last sigma included."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        scheduler.set_timesteps(steps)
        return cls(scheduler.timesteps, scheduler.sigmas)

    def __len__(self) -> int:
        return len(self.timesteps)

    def euler_step(self, latents: torch.Tensor, velocity: torch.Tensor, step: int) -> torch.Tensor:
        """Latents after step `step`, in float32."""
        delta = (self.sigmas[step + 1] - self.sigmas[step]).to(latents.device)
        return latents.float() + delta * velocity.float()


# One step of one window: latents `[C, F, H, W]` before the step to latents after it, float32.
Cell = Callable[[Window, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Conditions:
    """What all windows share.

    Attributes:
        prompt, negative_prompt: embeddings `[1, text_length, text_dim]`, zeros after the prompt.
        portrait: embeddings `[1, P, image_dim]`.
        reference: mask and encoded reference clip of a full window `[1, 20, F, H, W]`.
    """

    prompt: torch.Tensor
    negative_prompt: torch.Tensor
    portrait: torch.Tensor
    reference: torch.Tensor


class Denoiser:
    """The cell of the real model: predicts the branches of the guidance as one batch, combines them, takes
    the Euler step.

    Args:
        speech: speech features `[1, S, audio_dim]` of a window, or None where the video has no speech.
        window_latents: F of a full window; a shorter one is padded as the published code does.
        no_audio: what a branch without audio hears: zeros after the adapter ("output", as published) or
            silence before it ("input", as in training; fault 16).
        device: where the transformer computes, by default where its weights lie.
    """

    def __init__(
        self,
        transformer: StableAvatarTransformer3DModel,
        schedule: Schedule,
        guidance: Guidance,
        conditions: Conditions,
        speech: Callable[[Window], torch.Tensor | None],
        *,
        window_latents: int,
        no_audio: str = "output",
        device: torch.device | None = None,
    ) -> None:
        self.transformer = transformer
        self.schedule = schedule
        self.guidance = guidance
        self.conditions = conditions
        self.speech = speech
        self.window_latents = window_latents
        self.no_audio = no_audio
        self.device = device
        self._prompts = torch.cat(
            [
                conditions.prompt if branch.prompt else conditions.negative_prompt
                for branch in guidance.branches
            ]
        )

    @torch.no_grad()
    def __call__(self, window: Window, step: int, latents: torch.Tensor) -> torch.Tensor:
        velocity = self.predict(window, step, latents)
        return self.schedule.euler_step(latents, velocity, step)

    def predict(self, window: Window, step: int, latents: torch.Tensor) -> torch.Tensor:
        """The guided velocity `[C, F, H, W]`, float32."""
        branches = self.guidance.branches
        velocity = self.predict_branches(window, step, latents)
        return self.guidance.combine(dict(zip(branches, velocity, strict=True)))

    def predict_branches(self, window: Window, step: int, latents: torch.Tensor) -> torch.Tensor:
        """The velocity of every branch `[branches, C, F, H, W]`, float32."""
        dtype, device = self.transformer.dtype, self.device or self.transformer.device
        branches = self.guidance.branches
        features = self.speech(window)
        rows: list[int | None] = [None] * len(branches)
        if features is not None:
            features = features.to(device, dtype)
            silent_row = None
            if self.no_audio == "input" and not all(branch.audio for branch in branches):
                features = torch.cat([features, torch.zeros_like(features)])
                silent_row = 1
            rows = [0 if branch.audio else silent_row for branch in branches]
        velocity = self.transformer(
            latents.to(device, dtype).expand(len(branches), -1, -1, -1, -1),
            self.conditions.reference[:, :, : window.length].to(device, dtype),
            self.schedule.timesteps[step].to(device).expand(len(branches)),
            self._prompts.to(device, dtype),
            self.conditions.portrait.to(device, dtype),
            features,
            rows,
            padded_latent_frames=self.window_latents if window.length < self.window_latents else None,
            return_dict=False,
        )[0]
        return velocity.float()


Progress = Callable[[int, Window], None]


def sample_lockstep(
    plan: WindowPlan,
    steps: int,
    noise: Noise,
    cell: Cell,
    *,
    weights: OverlapWeights = "uniform",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> torch.Tensor:
    """All windows take a step before any takes the next (the published order).

    A window reads the video as it stood at the end of the step before, not what its predecessor has just
    written; what it writes is blended over the shared latents with what its predecessor has just written,
    except at the first step, where it overwrites.

    Args:
        steps: number of steps; `cell` is called for each with every window.
        progress: called with (step, window) after each cell.

    Returns:
        latents `[C, L, H, W]`, float32 (rounded to bfloat16 values under `compat="upstream"`).

    Raises:
        SamplingError: a cell returned NaN or infinite latents.
    """
    ramp = overlap_ramp(plan.overlap, weights).to(device).view(1, -1, 1, 1)
    video = noise.frames(0, plan.latent_frames).to(device)
    for step in range(steps):
        before = video
        video = before.clone()
        for window in plan.windows:
            after = cell(window, step, before[:, window.start : window.stop]).to(device)
            if not torch.isfinite(after).all():
                raise SamplingError(
                    f"the latents are no longer finite numbers after step {step + 1} of {steps} in "
                    f"window {window.index + 1} of {len(plan.windows)}: try --dtype float32, or smaller "
                    "guidance scales"
                )
            written = after[:, window.write_start - window.start :]
            if step > 0 and window.index > 0:
                shared = slice(window.write_start, window.write_start + plan.overlap)
                blended = written[:, : plan.overlap] * ramp + video[:, shared] * (1 - ramp)
                written = torch.cat([blended, written[:, plan.overlap :]], dim=1)
            if plan.compat == "upstream":
                written = written.bfloat16().float()
            video[:, window.write_start : window.stop] = written
            if progress is not None:
                progress(step, window)
    return video
