"""One video being made: conditions, then cells, then frames."""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from stableavatar.conditioning.image import portrait_embeddings, reference_condition
from stableavatar.conditioning.speech import WindowSpeech
from stableavatar.conditioning.text import encode_prompts
from stableavatar.media.audio import Speech
from stableavatar.options import Settings
from stableavatar.sampling.decoding import stream_decode
from stableavatar.sampling.engine import Conditions, Denoiser, SamplingError, Schedule, sample_lockstep
from stableavatar.sampling.guidance import GUIDANCE_RULES
from stableavatar.sampling.noise import Noise
from stableavatar.sampling.windows import Window, WindowPlan

if TYPE_CHECKING:
    from stableavatar.pipeline import AvatarPipeline

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Progress:
    """How far a video is.

    Attributes:
        stage: "sampling" counts cells (a step of a window), "decoding" frames.
        done, total: how many of them. seconds_left: estimated from this stage's pace, None before the first.
        step, steps, window, windows: where the sampling is, counted from 1.
    """

    stage: Literal["sampling", "decoding"]
    done: int
    total: int
    seconds_left: float | None
    step: int
    steps: int
    window: int
    windows: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Run:
    """One video being made.

    Attributes:
        pipeline: whose parts are used.
        options: with every default filled in.
        plan: the windows. frame_count: frames of the video, at `frame_rate` frames a second.
        picture: the fitted portrait, float32 `[3, height, width]` in [-1, 1].
        speech: closed when the run ends; None for a video without speech.
        noise: what the latents start from.
        progress: called after every cell and every frame.
    """

    pipeline: "AvatarPipeline"
    options: Settings
    plan: WindowPlan
    frame_count: int
    frame_rate: Fraction
    picture: torch.Tensor
    speech: Speech | None
    noise: Noise
    progress: ProgressCallback | None

    def frames(self) -> Generator[Frame, None, None]:
        """The video's frames, uint8 `[height, width, 3]`: all latents first, then frame after frame.

        Raises:
            SamplingError: latents or a frame became NaN or infinite.
        """
        try:
            yield from self._frames()
        finally:
            if self.speech is not None:
                self.speech.close()
            self.pipeline.maybe_free_model_hooks()

    def _frames(self) -> Iterator[Frame]:
        latents = self._sample(self._conditions())
        started = time.monotonic()
        decoded = stream_decode(self.pipeline.vae, latents.unbind(1), self.pipeline._execution_device)
        for index in range(self.frame_count):
            frame = next(decoded)
            if not torch.isfinite(frame).all():
                raise SamplingError(
                    f"frame {index + 1} of {self.frame_count} came out of the autoencoder without finite "
                    "numbers: try --dtype float32"
                )
            pixels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            self._report("decoding", index + 1, self.frame_count, started, len(self.plan.windows) - 1)
            yield pixels.permute(1, 2, 0).cpu().numpy()

    def _conditions(self) -> Conditions:
        pipeline, options = self.pipeline, self.options
        device = pipeline._execution_device
        prompts = [options.prompt, options.negative_prompt]
        text_length = pipeline.transformer.config.text_length
        prompt, negative = encode_prompts(
            pipeline.tokenizer, pipeline.text_encoder, prompts, text_length, device
        )
        picture = self.picture.to(device)
        portrait = portrait_embeddings(pipeline.image_encoder, picture)
        reference = reference_condition(pipeline.vae, picture, options.window)
        return Conditions(prompt[None], negative[None], portrait, reference)

    def _sample(self, conditions: Conditions) -> torch.Tensor:
        pipeline, options = self.pipeline, self.options
        device = pipeline._execution_device
        rule = GUIDANCE_RULES[options.guidance]
        guidance = rule(options.text_scale, options.audio_scale, has_audio=self.speech is not None)
        schedule = Schedule.from_scheduler(pipeline.scheduler, options.steps)
        speech: Callable[[Window], torch.Tensor | None] = _no_speech
        if self.speech is not None:
            speech = WindowSpeech(
                pipeline.speech_encoder,
                self.speech,
                self.plan,
                self.frame_rate,
                normalisation=options.speech_normalisation,
                device=device,
            )
        denoiser = Denoiser(
            pipeline.transformer,
            schedule,
            guidance,
            conditions,
            speech,
            window_latents=self.plan.window_latents,
            no_audio=options.no_audio,
            device=device,
        )
        windows, started = len(self.plan.windows), time.monotonic()

        def report(step: int, window: Window) -> None:
            done = step * windows + window.index + 1
            self._report("sampling", done, windows * len(schedule), started, window.index, step)

        return sample_lockstep(
            self.plan,
            len(schedule),
            self.noise,
            denoiser,
            weights=options.overlap_weights,
            device=device,
            progress=report,
        )

    def _report(
        self,
        stage: Literal["sampling", "decoding"],
        done: int,
        total: int,
        started: float,
        window: int,
        step: int | None = None,
    ) -> None:
        if self.progress is None:
            return
        left = (time.monotonic() - started) / done * (total - done)
        steps = self.options.steps
        windows = len(self.plan.windows)
        current = steps if step is None else step + 1
        self.progress(Progress(stage, done, total, left, current, steps, window + 1, windows))


def _no_speech(_window: Window) -> None:
    return None
