"""The trainer beside a bare loop of the same forward and backward passes and optimizer, with tiny's model."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from benchmarks.measuring import BenchmarkError, interleaved, table
from benchmarks.sizes import FULL, Sizes
from stableavatar.data.encoding import EncodedSample, stack_samples
from stableavatar.data.sampler import ClipKey
from stableavatar.training.efficiency import use_explicit_attention
from stableavatar.training.objective import ObjectiveSettings
from stableavatar.training.optimizers import OptimizerSettings, make_optimizer
from stableavatar.training.parameters import trained_parameters
from stableavatar.training.settings import TrainerSettings
from stableavatar.training.tiny.avatar import TinyAvatar
from stableavatar.training.trainer import Trainer

_BAR = 0.95
_CLIPS = 64
_AUDIO_DIM = 192
_CHANNELS = 32
_FRAMES, _SIDE = 9, 16  # latent frames, and rows and columns, of tiny's windows
_FEATURES = 65  # of their speech


class _Drawn:
    """Samples of noise, on whose values the time does not depend."""

    groups = ("one size",) * _CLIPS
    fingerprint = "noise"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(_CHANNELS, _FRAMES, _SIDE, _SIDE, generator=generator)
        self.sample = EncodedSample(
            latents=latents,
            reference=latents,
            portrait=torch.zeros(8 * _SIDE, 8 * _SIDE, 3, dtype=torch.uint8),
            speech=torch.randn(_FEATURES, _AUDIO_DIM, generator=generator),
            face_mask=torch.ones(_FRAMES, _SIDE, _SIDE),
            lip_mask=torch.ones(_FRAMES, _SIDE, _SIDE),
            prompt="A person is talking",
        )

    def __getitem__(self, key: ClipKey) -> EncodedSample:
        return self.sample


def _model() -> TinyAvatar:
    torch.manual_seed(0)
    avatar = TinyAvatar(ObjectiveSettings(), audio_dim=_AUDIO_DIM, latent_channels=_CHANNELS)
    use_explicit_attention(avatar)
    return avatar


def _settings(sizes: Sizes) -> TrainerSettings:
    return TrainerSettings(
        steps=sizes.training_steps, batch_size=4, accumulation=4, precision="bf16", checkpoint_every=10**6
    )


def _with_trainer(sizes: Sizes) -> None:
    AcceleratorState._reset_state(True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_model(), _Drawn(), stack_samples, _settings(sizes), Path(folder))
        trainer.train()
        trainer.close()


def _bare(sizes: Sizes) -> None:
    settings, data, avatar = _settings(sizes), _Drawn(), _model()
    parameters = trained_parameters(avatar)
    optimizer = make_optimizer(OptimizerSettings(), parameters)
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.steps):
        for _ in range(settings.accumulation):
            batch = stack_samples([data[0, 0]] * settings.batch_size)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = avatar(batch, generator).loss
            (loss / settings.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.optimizer.clip.norm)
        optimizer.step()
        optimizer.zero_grad()


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the table."""
    calls = {"bare loop": partial(_bare, sizes), "the trainer": partial(_with_trainer, sizes)}
    times = interleaved(calls, sizes.rounds)
    bare = times["bare loop"]
    reached = bare.ratio(times["the trainer"])
    if reached < _BAR and sizes.training_steps >= FULL.training_steps:  # of few steps the start is the most
        raise BenchmarkError(f"the trainer reaches {reached:.3f} of the bare loop, less than {_BAR}")
    rows = [
        [name, f"{taken.median / sizes.training_steps:.3f}", f"{bare.ratio(taken):.3f}"]
        for name, taken in times.items()
    ]
    return "\n\n".join(
        [
            f"tiny's model, {sizes.training_steps} steps of 16 clips in pieces of 4, from the building of "
            "the model to the last step; the trainer's checkpoint and log included; median of "
            f"{sizes.rounds} rounds, in which the two take turns.",
            table(["", "seconds a step", "clips a second / bare loop"], rows),
        ]
    )
