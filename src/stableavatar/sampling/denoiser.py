"""The cell of the real model: one step of one window, or of several as one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.errors import InputError
from stableavatar.models.attention import ContextCache
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.sampling.guidance import Guidance
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.step_cache import StepCache
from stableavatar.sampling.windows import Window


@dataclass(frozen=True)
class Schedule:
    """Timesteps `[steps]` (0 to 1000) and sigmas `[steps + 1]`, as the scheduler sets them."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    @classmethod
    def from_scheduler(cls, scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> "Schedule":
        """The scheduler's own `set_timesteps(steps)`, its double shift of the last sigma included.

        Raises:
            InputError: a scheduler whose steps are not Euler's, or that is told more than the steps.
        """
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(
                f"the scheduler {type(scheduler).__name__} is not followed here, where steps are Euler's: "
                "give a FlowMatchEulerDiscreteScheduler"
            )
        for name in ("stochastic_sampling", "use_dynamic_shifting"):
            if scheduler.config.get(name):
                raise InputError(f"the scheduler's {name} is not followed here: set it to False")
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(steps)
        return cls(scheduler.timesteps, scheduler.sigmas)

    def __len__(self) -> int:
        return len(self.timesteps)

    def euler_step(self, latents: torch.Tensor, velocity: torch.Tensor, step: int) -> torch.Tensor:
        """Latents after step `step`, in float32."""
        delta = (self.sigmas[step + 1] - self.sigmas[step]).to(latents.device)
        return latents.float() + delta * velocity.float()


@dataclass(frozen=True)
class Conditions:
    """What all windows share.

    Attributes:
        prompt, negative_prompt: embeddings `[1, text_length, text_dim]`, zeros after the prompt.
        portrait: embeddings `[1, P, image_dim]`.
        reference: mask and encoded reference clip of a full window `[1, C + 4, F, H, W]`.
    """

    prompt: torch.Tensor
    negative_prompt: torch.Tensor
    portrait: torch.Tensor
    reference: torch.Tensor


class Denoiser:
    """The cell of the real model: predicts the branches of the guidance, of all cells given, as one batch,
    combines them, takes the Euler step.

    Args:
        speech: speech features `[1, S, audio_dim]` of a window, or None where the video has no speech.
        window_latents: F of a full window; a shorter one is padded as the published code does.
        no_audio: what a branch without audio hears: zeros after the adapter ("output", as published) or
            silence before it ("input", as in training; fault 16).
        step_cache: leaves out steps that change little; None runs all of them.
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
        step_cache: StepCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.transformer = transformer
        self.schedule = schedule
        self.guidance = guidance
        self.conditions = conditions
        self.speech = speech
        self.window_latents = window_latents
        self.no_audio = no_audio
        self.step_cache = step_cache
        self.device = device
        self._context_cache = ContextCache()
        # Prompt and negative prompt, portrait, reference, as the transformer takes them.
        self._shared: tuple[torch.Tensor, ...] | None = None

    @torch.no_grad()
    def __call__(self, cells: Sequence[Cell], latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Latents `[C, F, H, W]` of every cell before its step to those after it, float32; the cells must not
        depend on each other."""
        velocities = self.predict(cells, latents)
        return [
            self.schedule.euler_step(before, velocity, cell.step)
            for cell, before, velocity in zip(cells, latents, velocities, strict=True)
        ]

    def predict(self, cells: Sequence[Cell], latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The guided velocity of every cell, `[C, F, H, W]`, float32."""
        branches = self.guidance.branches
        return [
            self.guidance.combine(dict(zip(branches, velocity, strict=True)))
            for velocity in self.predict_branches(cells, latents)
        ]

    def predict_branches(self, cells: Sequence[Cell], latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The velocity of every cell's branches, `[branches, C, F, H, W]` each, float32."""
        features = [self.speech(cell.window) for cell in cells]
        inputs = list(zip(cells, latents, features, strict=True))
        # They differ at odd frame rates, in a short last window, and where the cache leaves a step out.
        kinds = {
            (
                before.shape,
                None if heard is None else heard.shape,
                self.step_cache is None or self.step_cache.runs[cell.step],
            )
            for cell, before, heard in inputs
        }
        if len(kinds) > 1:
            return [self._predict([cell], [before], [heard])[0] for cell, before, heard in inputs]
        return self._predict(cells, latents, features)

    def _predict(
        self,
        cells: Sequence[Cell],
        latents: Sequence[torch.Tensor],
        features: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        dtype, device = self.transformer.dtype, self.device or self.transformer.device
        if self._shared is None:
            prompts = torch.cat([self.conditions.prompt, self.conditions.negative_prompt])
            shared = prompts, self.conditions.portrait, self.conditions.reference
            self._shared = tuple(tensor.to(device, dtype) for tensor in shared)
        prompts, portrait, reference = self._shared
        branches, count = self.guidance.branches, len(cells)
        rows: list[int | None] = [None] * (count * len(branches))
        heard = None
        given = [one for one in features if one is not None]
        if given:
            heard = torch.cat(given).to(device, dtype)
            hears_silence = self.no_audio == "input" and not all(branch.audio for branch in branches)
            if hears_silence:  # a row of silence for every cell, since the adapter looks at the latents
                heard = torch.cat([heard, torch.zeros_like(heard)])
            rows = [
                row if branch.audio else (count + row if hears_silence else None)
                for row in range(count)
                for branch in branches
            ]
        window = cells[0].window
        timesteps = self.schedule.timesteps[[cell.step for cell in cells]].to(device)
        residual = None if self.step_cache is None else self.step_cache.residual(cells)
        velocity = self.transformer(
            torch.stack(list(latents)).to(device, dtype).repeat_interleave(len(branches), dim=0),
            reference[:, :, : window.length],
            timesteps.repeat_interleave(len(branches)),
            prompts,
            portrait,
            heard,
            rows,
            prompt_rows=[0 if branch.prompt else 1 for branch in branches] * count,
            context_cache=self._context_cache,
            residual=residual,
            padded_latent_frames=self.window_latents if window.length < self.window_latents else None,
            return_dict=False,
        )[0]
        if self.step_cache is not None and residual is not None:
            self.step_cache.keep(cells, residual)
        return list(velocity.float().unflatten(0, (count, len(branches))))
