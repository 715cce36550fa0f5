"""Puts the trained parts of `tiny` together as one model folder, of the kind that ships with the package."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import Wav2Vec2Model

from stableavatar.errors import InputError
from stableavatar.journal import tensor_hash
from stableavatar.media.files import replacing
from stableavatar.pipeline import AvatarPipeline
from stableavatar.training.tiny.avatar import TinyAvatar

# Of the training: windows of 33 frames at 128x128, prompts dropped to "".
SAMPLING_DEFAULTS: dict[str, Any] = {
    "steps": 10,
    "text_scale": 2.0,
    "audio_scale": 2.0,
    "window": 33,
    "overlap": 3,
    "negative_prompt": "",
    "sizes": {"square": (128, 128)},
    "step_cache_coefficients": (1.0, 0.0),
}


def embedded_pipeline(
    avatar: TinyAvatar, vae: AutoencoderKLWan, speech_encoder: Wav2Vec2Model
) -> AvatarPipeline:
    """What the parts make together; they are shared, not copied."""
    return AvatarPipeline(
        transformer=avatar.transformer,
        vae=vae,
        text_encoder=avatar.text_encoder,
        tokenizer=avatar.tokenizer,
        image_encoder=avatar.image_encoder,
        speech_encoder=speech_encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=avatar.objective.shift),
        sampling_defaults=SAMPLING_DEFAULTS,
    )


def assemble(avatar: TinyAvatar, vae: AutoencoderKLWan, speech_encoder: Wav2Vec2Model, folder: Path) -> int:
    """Write the model folder, in bfloat16, complete under its name or not there; its size in bytes.

    The parts are in bfloat16 afterwards.
    """
    pipeline = embedded_pipeline(avatar, vae, speech_encoder).to(torch.bfloat16)
    with replacing(folder, alone=True) as partial:
        pipeline.save_pretrained(partial)
        _forget_origin(partial)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def replace_autoencoder(model: Path, trained: Path) -> None:
    """Put a trained autoencoder into a model folder in place of its own, in bfloat16, whole or not at all.

    Its latents are to be those of the other: that is for a decoder trained behind a frozen encoder.

    Raises:
        InputError: the folder has no autoencoder, or one of other latents.
    """
    target = check_model(model)
    given = AutoencoderKLWan.from_pretrained(trained, torch_dtype=torch.bfloat16)
    own = AutoencoderKLWan.from_pretrained(target, torch_dtype=torch.bfloat16)
    if _of_latents(own) != _of_latents(given):
        raise InputError(
            f"{trained} encodes frames otherwise than {target}: its transformer knows no such latents."
        )
    with replacing(target, alone=True) as partial:
        given.save_pretrained(partial)
        _forget_origin(partial)


def check_model(model: Path) -> Path:
    """The folder of a model's autoencoder. Raises InputError: there is none."""
    folder = model / "vae"
    if not (folder / "config.json").is_file():
        raise InputError(f"{model} is no model folder: {folder / 'config.json'} is missing.")
    return folder


def _of_latents(vae: AutoencoderKLWan) -> list[object]:
    """All that decides what latents a clip has, to be compared."""
    weights = {**vae.encoder.state_dict(), **vae.quant_conv.state_dict(prefix="quant.")}
    return [
        *((name, tensor_hash(value)) for name, value in sorted(weights.items())),
        *(list(vae.config[name]) for name in ("latents_mean", "latents_std")),
    ]


def _forget_origin(folder: Path) -> None:
    """diffusers writes where a model was loaded from."""
    for config in folder.rglob("config.json"):
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
