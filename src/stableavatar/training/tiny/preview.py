"""Looks at a training of `tiny` while it runs: losses on unseen puppets, and sheets of generated frames."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from PIL import Image
from transformers import Wav2Vec2Model

from stableavatar.conditioning.image import reference_mask
from stableavatar.conditioning.speech import speech_features
from stableavatar.data.encoding import EncodedBatch, encode_references, encode_videos
from stableavatar.data.masks import masks_to_latents
from stableavatar.data.puppets import make_clip
from stableavatar.evaluation.lips import correlate
from stableavatar.evaluation.meter import MouthMeter
from stableavatar.sampling.decoding import stream_decode
from stableavatar.sampling.denoiser import Conditions, Denoiser, Schedule
from stableavatar.sampling.engine import sample_all
from stableavatar.sampling.guidance import three_branch
from stableavatar.sampling.noise import PositionalNoise
from stableavatar.sampling.windows import plan_windows
from stableavatar.training.objective import StepDraws, step_loss
from stableavatar.training.tiny.avatar import TinyAvatar

logger = logging.getLogger(__name__)

FIRST_SEED = 900_000  # training voices, people that no training has seen
SIGMAS = (0.3, 0.6, 0.9)


class Preview:
    """Called with the number of steps, it writes losses, and every `sheet_every`th time a sheet.

    The losses on unseen puppets come with the right speech and with another puppet's: their difference in the
    lips says how much the model listens, long before a picture shows it.

    Args:
        folder: gets `preview.jsonl` and `sheet-N.png`.
        meter: reads the mouths of the sheets, where one is given.
        steps, text_scale, audio_scale, shift: of the sampling.
    """

    def __init__(
        self,
        avatar: TinyAvatar,
        vae: AutoencoderKLWan,
        speech_encoder: Wav2Vec2Model,
        folder: Path,
        *,
        clips: int = 8,
        frames: int = 33,
        sheet_every: int = 1,
        meter: MouthMeter | None = None,
        steps: int = 10,
        text_scale: float = 1.5,
        audio_scale: float = 3.0,
        shift: float = 3.0,
    ) -> None:
        self.avatar, self.vae, self.folder, self.meter = avatar, vae, folder, meter
        self.sheet_every = sheet_every
        self.guidance = three_branch(text_scale, audio_scale)
        self.schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), steps)
        self._calls = 0
        folder.mkdir(parents=True, exist_ok=True)
        puppets = [make_clip(FIRST_SEED + k, frames / 25) for k in range(clips)]
        pictures = np.stack([puppet.frames for puppet in puppets])
        portraits = np.stack([puppet.portrait for puppet in puppets])
        latents = encode_videos(vae, pictures)
        reference = encode_references(vae, portraits, frames)
        size = latents.shape[-2:]

        def masks(series: list[NDArray[np.uint8]]) -> torch.Tensor:
            return torch.stack([masks_to_latents(torch.from_numpy(mask) / 255, *size) for mask in series])

        self.openings = [np.asarray(puppet.articulation.opening) for puppet in puppets]
        self.batch = EncodedBatch(
            latents=latents,
            condition=torch.cat([reference_mask(reference), reference], dim=1),
            portrait=torch.from_numpy(portraits),
            speech=torch.cat([speech_features(speech_encoder, puppet.samples) for puppet in puppets]).float(),
            face_mask=masks([puppet.face_masks for puppet in puppets]),
            lip_mask=masks([puppet.lip_masks for puppet in puppets]),
            prompts=tuple(puppet.prompt for puppet in puppets),
            starts_clip=(True,) * clips,
        )
        self.truth = [self._decode(latent) for latent in latents]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other batches than the training's, and too few to compile for
    def __call__(self, step: int) -> None:
        """Measure, and perhaps draw."""
        self._calls += 1
        line: dict[str, float | int | None] = {"step": step, **self._losses()}
        if self._calls % self.sheet_every == 0:
            made = [self._decode(self._sample(row)) for row in range(len(self.truth))]
            self._write_sheet(made, self.folder / f"sheet-{step:06d}.png")
            if self.meter is not None:
                for name, clips in (("lips", made), ("lips_true", self.truth)):
                    line[name] = round(float(np.median(self._lip_correlations(clips))), 4)
        with (self.folder / "preview.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("preview: %s", line)

    def _losses(self) -> dict[str, float]:
        batch = self.batch
        count = len(batch.latents)
        inputs = self.avatar.inputs(batch)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
        result = {}
        for sigma in SIGMAS:
            for name, speech in (("right", batch.speech), ("wrong", batch.speech.roll(1, 0))):
                draws = StepDraws(
                    torch.full((count,), sigma), noise, 0.9, False, *[(False,) * count for _ in range(3)]
                )
                for mask, mode in (("lips", "drawn"), ("all", "none")):
                    if (name, mask) == ("wrong", "all"):
                        continue
                    settings = type(self.avatar.objective)(mask_loss=mode)  # type: ignore[arg-type]
                    given = type(inputs)(**{**vars(inputs), "speech": speech})
                    loss = step_loss(self.avatar.transformer, given, draws, settings).loss.item()
                    if mask == "lips":
                        loss /= batch.lip_mask.mean().item()
                    result[f"{mask}_{name}_{sigma}"] = round(loss, 5)
        return result

    def _sample(self, row: int) -> torch.Tensor:
        """Latents `[16, F, H, W]` of one window."""
        batch = self.batch
        prompts = self.avatar.encode_prompts((batch.prompts[row], ""))
        conditions = Conditions(
            prompt=prompts[:1],
            negative_prompt=prompts[1:],
            portrait=self.avatar.encode_portraits(batch.portrait[row : row + 1]),
            reference=batch.condition[row : row + 1],
        )
        channels, frames, height, width = batch.latents.shape[1:]
        denoiser = Denoiser(
            self.avatar.transformer,
            self.schedule,
            self.guidance,
            conditions,
            lambda _: batch.speech[row : row + 1],
            window_latents=frames,
        )
        return sample_all(
            plan_windows(frames, frames, 2),
            len(self.schedule),
            PositionalNoise(row, channels, height, width),
            denoiser,
        )

    def _decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Frames uint8 `[T, H, W, 3]`."""
        frames = torch.stack(list(stream_decode(self.vae, latents.unbind(1))))
        return ((frames + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()

    def _lip_correlations(self, clips: list[NDArray[np.uint8]]) -> list[float]:
        if self.meter is None:
            return []
        return [
            correlate(self.meter.measure(frames).opening, opening)
            for frames, opening in zip(clips, self.openings, strict=True)
        ]

    def _write_sheet(self, made: list[NDArray[np.uint8]], path: Path) -> None:
        """A pair of rows a puppet: true frames through the autoencoder, and generated ones, every third
        frame.
        """
        rows = []
        for true, generated in zip(self.truth, made, strict=True):
            rows += [np.concatenate(list(frames[::3]), axis=1) for frames in (true, generated)]
        Image.fromarray(np.concatenate(rows)).save(path)
