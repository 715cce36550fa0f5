"""Puts the trained parts of `tiny` together as one model folder, the one that ships with the package.

    python -m stableavatar.training.tiny.assemble --autoencoder A --speech-encoder S --avatar T --out FOLDER

The weights are stored in bfloat16, the folder is in diffusers' layout like every model of this project's.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import ByT5Tokenizer, CLIPVisionModel, UMT5EncoderModel, Wav2Vec2Model

from stableavatar.errors import InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.pipeline import TINY, AvatarPipeline

logger = logging.getLogger(__name__)

MAX_BYTES = 25 * 2**20  # what ships inside the package (spec 6)

# Of the training: windows of 33 frames at 128x128, prompts dropped to "", sigmas shifted by 3.
SHIFT = 3.0
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


def assemble(autoencoder: Path, speech_encoder: Path, avatar: Path, out: Path) -> int:
    """Write the model folder.

    Args:
        autoencoder, speech_encoder: folders of the two frozen parts.
        avatar: folder with `transformer`, `text_encoder`, `image_encoder`, which were trained together.
        out: the folder to write.

    Returns:
        its size in bytes.

    Raises:
        InputError: it is larger than what may ship.
    """
    pipeline = AvatarPipeline(
        transformer=StableAvatarTransformer3DModel.from_pretrained(avatar / "transformer"),
        vae=AutoencoderKLWan.from_pretrained(autoencoder),
        text_encoder=UMT5EncoderModel.from_pretrained(avatar / "text_encoder"),
        tokenizer=ByT5Tokenizer(),
        image_encoder=CLIPVisionModel.from_pretrained(avatar / "image_encoder"),
        speech_encoder=Wav2Vec2Model.from_pretrained(speech_encoder),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        sampling_defaults=SAMPLING_DEFAULTS,
    )
    pipeline.to(torch.bfloat16).save_pretrained(out)
    for config in out.rglob("config.json"):  # diffusers writes where it was loaded from
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise InputError(
            f"{out}: {size / 2**20:.1f} MiB is more than the {MAX_BYTES / 2**20:.0f} that may ship"
        )
    return size


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--speech-encoder", type=Path, required=True)
    parser.add_argument("--avatar", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=TINY)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = assemble(given.autoencoder, given.speech_encoder, given.avatar, given.out)
    logger.info("%s: %.1f MiB", given.out, size / 2**20)


if __name__ == "__main__":
    main()
