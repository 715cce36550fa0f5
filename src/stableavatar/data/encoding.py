"""What frozen encoders make of samples: the form in which the transformer is trained on them."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import nn
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel, Wav2Vec2Model

from stableavatar.conditioning.image import (
    encode_clips,
    picture_tensor,
    portrait_embeddings,
    reference_clips,
    reference_mask,
)
from stableavatar.conditioning.speech import speech_features
from stableavatar.conditioning.text import encode_prompts
from stableavatar.data.clips import normalized_speech
from stableavatar.data.dataset import ClipSample

# Prompts whose embeddings are kept: data sets have a few, or one a clip.
_KEPT_PROMPTS = 64


@dataclass(frozen=True)
class EncodedSample:
    """A sample after the encoders.

    Attributes:
        latents: normalised latents of the clip `[C, F, H, W]`.
        reference: normalised latents of the reference clip (the picture, then mid-grey), the same shape.
        portrait: the reference picture, uint8 `[8·H, 8·W, 3]`.
        speech: features of the clip's speech `[S, D]`, or, of longer clips, those of every window
            `[W, S, D]` (see `data.cache.CacheWriter`).
        face_mask, lip_mask: `[F, H, W]` in [0, 1]; None where the clips were read without.
        starts_clip: whether the first latent frame stands for a single frame, as a video's first one does.
        prompt_embeddings `[L, D]`, empty_prompt `[L, D]` (of no prompt), portrait_embeddings `[P, D]`: None
            where those encoders are trained.
    """

    latents: torch.Tensor
    reference: torch.Tensor
    portrait: torch.Tensor
    speech: torch.Tensor
    face_mask: torch.Tensor | None
    lip_mask: torch.Tensor | None
    prompt: str
    starts_clip: bool = True
    prompt_embeddings: torch.Tensor | None = None
    empty_prompt: torch.Tensor | None = None
    portrait_embeddings: torch.Tensor | None = None


@dataclass(frozen=True)
class EncodedBatch:
    """Samples stacked, float32: `condition` `[B, 4 + C, F, H, W]` has the mask channels; `portrait` is uint8;
    `starts_clip` has a flag a sample; `empty_prompt` is `[1, L, D]`.
    """

    latents: torch.Tensor
    condition: torch.Tensor
    portrait: torch.Tensor
    speech: torch.Tensor
    face_mask: torch.Tensor | None
    lip_mask: torch.Tensor | None
    prompts: tuple[str, ...]
    starts_clip: tuple[bool, ...]
    prompt_embeddings: torch.Tensor | None = None
    empty_prompt: torch.Tensor | None = None
    portrait_embeddings: torch.Tensor | None = None

    def to(self, device: torch.device) -> "EncodedBatch":
        """The same on a device."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        return EncodedBatch(**moved)


def stack_samples(samples: Sequence[EncodedSample]) -> EncodedBatch:
    """Put samples of one size into a batch. Where a frame is no whole number of samples, their speech can
    differ by a feature, which is left out."""

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([getattr(sample, name) for sample in samples]).float()

    def stacked_if_there(name: str) -> torch.Tensor | None:
        return None if getattr(samples[0], name) is None else stacked(name)

    reference = stacked("reference")
    length = min(len(sample.speech) for sample in samples)
    empty = samples[0].empty_prompt
    return EncodedBatch(
        latents=stacked("latents"),
        condition=torch.cat([reference_mask(reference), reference], dim=1),
        portrait=torch.stack([sample.portrait for sample in samples]),
        speech=torch.stack([sample.speech[:length] for sample in samples]).float(),
        face_mask=stacked_if_there("face_mask"),
        lip_mask=stacked_if_there("lip_mask"),
        prompts=tuple(sample.prompt for sample in samples),
        starts_clip=tuple(sample.starts_clip for sample in samples),
        prompt_embeddings=stacked_if_there("prompt_embeddings"),
        empty_prompt=None if empty is None else empty[None].float(),
        portrait_embeddings=stacked_if_there("portrait_embeddings"),
    )


def encode_videos(vae: AutoencoderKLWan, frames: NDArray[np.uint8]) -> torch.Tensor:
    """Normalised latents, float32 `[B, C, F, H/8, W/8]` on the CPU, of frames uint8 `[B, T, H, W, 3]`."""
    pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).to(vae.device).float() / 127.5 - 1
    return encode_clips(vae, pixels.contiguous()).cpu()


def encode_references(vae: AutoencoderKLWan, pictures: NDArray[np.uint8], frames: int) -> torch.Tensor:
    """Normalised latents of reference clips, float32 `[B, C, F, H/8, W/8]` on the CPU, of pictures uint8
    `[B, H, W, 3]`."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device).float() / 127.5 - 1
    return encode_clips(vae, reference_clips(pixels, frames)).cpu()


@dataclass
class Encoders:
    """The frozen encoders of a model, and where they compute.

    Args:
        text_encoder, tokenizer, image_encoder: None where these are trained.
        text_length: of prompt embeddings.
        device: where they compute; `offload`: they lie in main memory between uses.
    """

    vae: AutoencoderKLWan
    speech_encoder: Wav2Vec2Model
    text_encoder: UMT5EncoderModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    image_encoder: CLIPVisionModel | None = None
    text_length: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False

    def __post_init__(self) -> None:
        self._prompts: OrderedDict[str, torch.Tensor] = OrderedDict()
        for part in self.parts.values():
            part.requires_grad_(False)
            part.eval()
            if not self.offload:
                part.to(self.device)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by name."""
        names = ("vae", "speech_encoder", "text_encoder", "image_encoder")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def encode(self, samples: Sequence[ClipSample]) -> EncodedBatch:
        """A batch of samples of one size, on the device."""
        return stack_samples(self.encode_samples(samples)).to(self.device)

    def encode_samples(
        self, samples: Sequence[ClipSample], window_frames: int | None = None
    ) -> list[EncodedSample]:
        """Samples of one size, on the CPU.

        Args:
            window_frames: T of the windows that are taken from the samples, which are longer: the speech of
                every window that starts at a latent frame is encoded on its own, as when sampling, and
                references have the length of a window.
        """
        frames = window_frames or len(samples[0].frames)
        pictures = {_reference_key(sample): sample.reference for sample in samples}
        with self._on_device("vae"):
            # One at a time: the memory of a video is the largest there is.
            latents = [encode_videos(self.vae, sample.frames[None])[0] for sample in samples]
            encoded = [encode_references(self.vae, it[None], frames)[0] for it in pictures.values()]
        references = dict(zip(pictures, encoded, strict=True))
        portraits = dict(zip(pictures, self._portraits(list(pictures.values())), strict=True))
        with self._on_device("speech_encoder"):
            speech = [self._speech(sample, window_frames) for sample in samples]
        result = []
        for sample, latent, features in zip(samples, latents, speech, strict=True):
            result.append(
                EncodedSample(
                    latents=latent,
                    reference=references[_reference_key(sample)],
                    portrait=torch.from_numpy(sample.reference.copy()),
                    speech=features,
                    face_mask=sample.face_mask,
                    lip_mask=sample.lip_mask,
                    prompt=sample.prompt,
                    prompt_embeddings=self.prompt(sample.prompt),
                    empty_prompt=self.prompt(""),
                    portrait_embeddings=portraits[_reference_key(sample)],
                )
            )
        return result

    def prompt(self, text: str) -> torch.Tensor | None:
        """Embeddings `[L, D]` on the CPU; None where the text encoder is trained."""
        if self.text_encoder is None or self.tokenizer is None:
            return None
        if text not in self._prompts:
            with self._on_device("text_encoder"):
                made = encode_prompts(
                    self.tokenizer, self.text_encoder, [text], self.text_length, self.device
                )
            self._prompts[text] = made[0].float().cpu()
            if len(self._prompts) > _KEPT_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(text)
        return self._prompts[text]

    def _portraits(self, pictures: list[NDArray[np.uint8]]) -> list[torch.Tensor | None]:
        encoder = self.image_encoder
        if encoder is None:
            return [None] * len(pictures)
        with self._on_device("image_encoder"):
            return [
                portrait_embeddings(encoder, picture_tensor(picture).to(self.device))[0].float().cpu()
                for picture in pictures
            ]

    def _speech(self, sample: ClipSample, window_frames: int | None) -> torch.Tensor:
        if window_frames is None:
            return speech_features(self.speech_encoder, sample.speech, device=self.device)[0].float().cpu()
        starts = range(0, len(sample.frames) - window_frames + 1, 4)
        pieces = [
            normalized_speech(sample.clip, sample.window.start + start, window_frames) for start in starts
        ]
        # Where a frame is no whole number of samples, windows differ by one.
        length = min(len(piece) for piece in pieces)
        values = torch.from_numpy(np.stack([piece[:length] for piece in pieces]))
        encoder = self.speech_encoder
        with torch.no_grad():
            features: torch.Tensor = encoder(values.to(self.device, encoder.dtype)).last_hidden_state
        return features.float().cpu()

    @contextmanager
    def _on_device(self, name: str) -> Iterator[None]:
        part = self.parts[name]
        if self.offload:
            part.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                part.to("cpu")


def _reference_key(sample: ClipSample) -> tuple[str, str, int]:
    return (sample.clip.name, sample.window.reference, sample.window.reference_frame)
