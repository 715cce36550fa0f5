"""Caches what the frozen autoencoder and speech encoder make of a store of puppets.

python -m stableavatar.training.tiny.latents --store FOLDER --autoencoder FOLDER --speech-encoder FOLDER --out
FOLDER
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import Wav2Vec2Model

from stableavatar.data.cache import CacheWriter
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings
from stableavatar.data.encoding import Encoders
from stableavatar.data.puppets import ClipStore
from stableavatar.training.tiny.feature_memory import use_quick_norms

logger = logging.getLogger(__name__)

WINDOW_FRAMES = 33
CLIP_FRAMES = 97  # encoded of each clip, for 17 windows


def puppet_dataset(store: Path, seed: int, frames: int, clips: int | None = None) -> ClipDataset:
    """The puppets of a store, the first `clips` of them: `frames` frames of each.

    Six in ten have the portrait at rest as their reference, the others any frame of the clip.
    """
    settings = ClipDatasetSettings(frames=frames, portrait=0.6, any_frame=0.4, seed=seed)
    opened = ClipStore(store)
    count = len(opened) if clips is None else min(clips, len(opened))
    return ClipDataset([opened[index] for index in range(count)], settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m stableavatar.training.tiny.latents", description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="puppets, as `data.puppets` stores them")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--speech-encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--clips", type=int, default=None, help="the first so many of the store (default: all)"
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=CLIP_FRAMES,
        help=f"encoded of a clip, 4n+1, at least a window's {WINDOW_FRAMES}",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    dataset = puppet_dataset(options.store, options.seed, options.frames, options.clips)
    vae = AutoencoderKLWan.from_pretrained(options.autoencoder, torch_dtype=torch.bfloat16).eval()
    use_quick_norms(vae)
    speech_encoder = Wav2Vec2Model.from_pretrained(options.speech_encoder).eval()
    encoders = Encoders(vae, speech_encoder)
    writer = CacheWriter(dataset, options.out, encoders, torch.bfloat16, window_frames=WINDOW_FRAMES)
    writer.write([(index, 0) for index in range(len(dataset))])


if __name__ == "__main__":
    main()
