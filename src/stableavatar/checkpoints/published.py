"""The parts of a pipeline out of the published checkpoints as they lie on disk."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.checkpoints import loading
from stableavatar.checkpoints.defaults import sampling_defaults
from stableavatar.checkpoints.layout import PublishedLayout
from stableavatar.config import SHIFT, TRAINING_STEPS
from stableavatar.errors import CheckpointError


def load_published(found: PublishedLayout, variant: str, size: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every part that `AvatarPipeline` is made of, by name, on the CPU, and its `sampling_defaults`.

    The speech encoder is in float32 whatever the dtype: it is small, and every window hears through it.

    Raises:
        CheckpointError: parts are missing, damaged, or of another model.
    """
    found.require(variant, size)
    base, overlay = found.transformer_files(variant, size)
    return {
        "transformer": loading.load_transformer(base, overlay, dtype=dtype),
        "vae": loading.load_vae(_part(found.vae), dtype=dtype),
        "text_encoder": loading.load_text_encoder(_part(found.text_encoder), dtype=dtype),
        "tokenizer": loading.load_tokenizer(_part(found.tokenizer)),
        "image_encoder": loading.load_image_encoder(_part(found.image_encoder), dtype=dtype),
        "speech_encoder": loading.load_speech_encoder(_part(found.speech_encoder), dtype=torch.float32),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT, num_train_timesteps=TRAINING_STEPS),
        "sampling_defaults": sampling_defaults(variant, size),
    }


def _part(path: Path | None) -> Path:
    if path is None:
        raise CheckpointError("a part of the model disappeared while it was being loaded")
    return path
