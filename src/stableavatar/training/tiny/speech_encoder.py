"""Trains the speech encoder of the embedded model: a small wav2vec 2.0 that hears what the mouth does.

    python -m stableavatar.training.tiny.speech_encoder --out FOLDER --puppets STORE --minutes 4

From scratch, on windows of puppets' speech normalised one by one as the sampler does, a linear head on the
last hidden state predicts opening, width, rounding, jaw, teeth and tongue 50 times a second. Only the
encoder is kept: `FOLDER/final` in transformers' layout (spec/6-embedded-model.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from stableavatar.conditioning.speech import Normalisation
from stableavatar.data.puppets import ClipStore, articulate
from stableavatar.data.puppets.speech import unseen_speech
from stableavatar.errors import InputError, with_status
from stableavatar.training.muon import Muon
from stableavatar.training.tiny.arguments import add_settings, chosen_settings

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
FPS = 25
TRACKS = ("opening", "width", "rounding", "jaw", "teeth", "tongue")
FEATURE_STRIDE = 320  # samples between features
FEATURE_REACH = 400  # samples a feature's convolutions see

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class SpeechEncoderSettings:
    """Everything a run depends on besides its speech. `minutes` is wall clock."""

    minutes: float = 4.0
    # Of AdamW (vectors, head, first layer) and of Muon (all other kernels and matrices).
    learning_rate: float = 1.5e-3
    kernel_learning_rate: float = 3e-3
    warmup_steps: int = 50
    batch: int = 16
    shortest: float = 1.3
    longest: float = 3.0
    hidden_size: int = 192
    convolution_channels: int = 64
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or not 0.2 <= self.shortest <= self.longest:
            raise InputError("minutes must be positive and windows at least 0.2 s, shortest <= longest")


def build_speech_encoder(hidden_size: int = 192, convolution_channels: int = 64) -> Wav2Vec2Model:
    """The untrained encoder: two layers, about a million parameters, 50 features a second."""
    config = Wav2Vec2Config(
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=2 * hidden_size,
        conv_dim=[convolution_channels] * 7,
        # Layer norms would take the loudness out of every instant; the group norm only sets the scale.
        feat_extract_norm="group",
        do_stable_layer_norm=False,
        num_conv_pos_embeddings=33,
        num_conv_pos_embedding_groups=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    return Wav2Vec2Model(config)


def tracks_at_features(tracks: NDArray[np.float32], features: int, start: float) -> NDArray[np.float32]:
    """Tracks [frames, 6] of a clip at 25 a second, read at the middles of `features` features.

    The window starts `start` seconds into the clip; the result is [features, 6].
    """
    middles = start + (np.arange(features) * FEATURE_STRIDE + FEATURE_REACH / 2) / SAMPLE_RATE
    frames = (np.arange(len(tracks)) + 0.5) / FPS
    columns = [np.interp(middles, frames, tracks[:, i]) for i in range(tracks.shape[1])]
    return np.stack(columns, axis=-1).astype(np.float32)


def augment(rng: np.random.Generator, samples: Samples) -> Samples:
    """A recording's circumstances.

    Equaliser, band limit, a small room, noise. The mouth's tracks stay as they are.
    """
    spectrum = np.fft.rfft(samples)
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    if rng.random() < 0.6:
        knots = np.log(np.array([50.0, 200.0, 800.0, 2500.0, 8000.0]))
        decibels = np.interp(np.log(np.maximum(frequencies, 1)), knots, rng.normal(0, 3, len(knots)))
        spectrum = spectrum * 10 ** (decibels / 20)
    if rng.random() < 0.3:
        limit = rng.uniform(3400, 7500)
        spectrum = spectrum / (1 + (frequencies / limit) ** 16)
    if rng.random() < 0.2:
        spectrum = spectrum / (1 + (rng.uniform(60, 200) / np.maximum(frequencies, 1)) ** 4)
    if rng.random() < 0.25:
        length = round(rng.uniform(0.05, 0.25) * SAMPLE_RATE)
        room = rng.normal(0, 1, length) * np.exp(-6 * np.arange(length) / length)
        room *= rng.uniform(0.1, 0.4) / np.sqrt((room**2).sum())
        room[0] = 1.0
        spectrum = spectrum * np.fft.rfft(room, len(samples))
    result = np.fft.irfft(spectrum, len(samples))
    if rng.random() < 0.5:
        noise = rng.normal(0, 1, len(samples))
        if rng.random() < 0.5:
            noise = np.cumsum(noise)
            noise -= np.convolve(noise, np.full(401, 1 / 401), mode="same")
        level = result.std() * 10 ** (-rng.uniform(22, 50) / 20)
        result = result + noise * level / (noise.std() + 1e-9)
    return result.astype(np.float32)


class SpeechWindows:
    """Random windows of recordings with the tracks of the whole recording; see `SpeechEncoderSettings`."""

    def __init__(self, recordings: Sequence[Samples]) -> None:
        if not recordings:
            raise InputError("no recordings to train on")
        self.recordings = list(recordings)
        self.tracks = [articulate(samples, SAMPLE_RATE, FPS).as_array() for samples in self.recordings]

    def batch(
        self, rng: np.random.Generator, settings: SpeechEncoderSettings, encoder: Wav2Vec2Model
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised samples [B, n] and tracks [B, features, 6]; one length a batch."""
        length = round(rng.uniform(settings.shortest, settings.longest) * SAMPLE_RATE)
        features = int(encoder._get_feat_extract_output_lengths(length))
        sounds, targets = [], []
        for _ in range(settings.batch):
            index = int(rng.integers(len(self.recordings)))
            samples = self.recordings[index]
            first = int(rng.integers(0, max(1, len(samples) - length + 1)))
            window = samples[first : first + length]
            window = np.pad(window, (0, length - len(window)))
            if rng.random() < 0.8:
                window = augment(rng, window)
            sounds.append(Normalisation.of(window).normalise(window))
            targets.append(tracks_at_features(self.tracks[index], features, first / SAMPLE_RATE))
        return torch.from_numpy(np.stack(sounds)), torch.from_numpy(np.stack(targets))


class ArticulationModel(nn.Module):
    """The encoder with the linear head that is dropped after training."""

    def __init__(self, encoder: Wav2Vec2Model) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(TRACKS))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Normalised samples [B, n] to tracks [B, features, 6]."""
        hidden = self.encoder(samples).last_hidden_state
        tracks: torch.Tensor = self.head(hidden)
        return tracks


def train(settings: SpeechEncoderSettings, windows: SpeechWindows, out: Path) -> ArticulationModel:
    """Trains for the settings' minutes with a rate that falls to zero; writes `out/curve.jsonl`."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    encoder = build_speech_encoder(settings.hidden_size, settings.convolution_channels)
    model = ArticulationModel(encoder).train()
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        outer = any(
            part in name for part in ("head", "conv_layers.0.", "parametrizations", "masked_spec_embed")
        )
        (others if outer or parameter.ndim < 2 else kernels).append(parameter)
    optimizers = (
        (Muon(kernels, lr=settings.kernel_learning_rate), settings.kernel_learning_rate),
        (torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.98)), settings.learning_rate),
    )
    begun = time.monotonic()
    step, recent = 0, []
    while (spent := (time.monotonic() - begun) / 60 / settings.minutes) < 1:
        factor = min(1.0, (step + 1) / settings.warmup_steps) * min(1.0, 2 * (1 - spent))
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        samples, targets = windows.batch(rng, settings, encoder)
        with torch.autocast("cpu", torch.bfloat16):
            tracks = model(samples)
        loss = F.smooth_l1_loss(tracks.float(), targets, beta=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        step += 1
        if step % 20 == 0:
            line = {
                "step": step,
                "seconds": round(time.monotonic() - begun, 1),
                "loss": float(np.mean(recent)),
            }
            with (out / "curve.jsonl").open("a", encoding="utf-8") as curve:
                curve.write(json.dumps(line) + "\n")
            if step % 100 == 0:
                logger.info("step %d, loss %.5f", step, line["loss"])
            recent = []
    return model.eval()


@torch.no_grad()
def correlations(
    model: ArticulationModel, recordings: Sequence[Samples], seconds: float = 1.32
) -> dict[str, float]:
    """Correlation of each predicted track with the true one over recordings cut into windows of `seconds`."""
    made, true = [], []
    length = round(seconds * SAMPLE_RATE)
    for samples in recordings:
        tracks = articulate(samples, SAMPLE_RATE, FPS).as_array()
        for first in range(0, len(samples) - length + 1, length):
            window = samples[first : first + length]
            window = Normalisation.of(window).normalise(window)
            predicted = model(torch.from_numpy(window)[None])[0].float().numpy()
            made.append(predicted)
            true.append(tracks_at_features(tracks, len(predicted), first / SAMPLE_RATE))
    predicted_all, true_all = np.concatenate(made), np.concatenate(true)
    return {
        name: float(np.corrcoef(predicted_all[:, i], true_all[:, i])[0, 1]) for i, name in enumerate(TRACKS)
    }


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Trains the speech encoder of the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve, figures and model")
    parser.add_argument(
        "--puppets", type=Path, required=True, action="append", help="a store of puppet clips"
    )
    add_settings(parser, SpeechEncoderSettings)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = chosen_settings(SpeechEncoderSettings, options)
    torch.set_num_threads(settings.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    recordings = {clip.seed: clip.samples for folder in options.puppets for clip in ClipStore(folder)}
    logger.info("%d recordings", len(recordings))
    model = train(settings, SpeechWindows(list(recordings.values())), options.out)
    unseen = [unseen_speech(seed, 8.0, "woman" if seed % 2 else "man") for seed in range(12)]
    figures = correlations(model, unseen)
    logger.info("on unseen voices: %s", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    model.encoder.save_pretrained(options.out / "final")
    return 0


if __name__ == "__main__":
    sys.exit(main())
