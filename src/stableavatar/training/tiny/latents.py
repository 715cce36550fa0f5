"""Caches what the frozen autoencoder and speech encoder make of a store of puppets.

python -m stableavatar.training.tiny.latents --store FOLDER --autoencoder FOLDER --speech-encoder FOLDER --out
FOLDER
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from transformers import Wav2Vec2Model

from stableavatar.data.cache import CacheWriter
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings
from stableavatar.data.puppets import ClipStore
from stableavatar.data.sampler import ClipKey
from stableavatar.training.tiny.feature_memory import use_quick_norms

logger = logging.getLogger(__name__)

FRAMES = 33
WINDOWS_A_VISIT = 3  # of one clip in a row, which share the encoding of its portrait


def puppet_dataset(store: Path, seed: int, clips: int | None = None) -> ClipDataset:
    """The puppets of a store, the first `clips` of them: windows of 33 frames.

    Half of the samples have the portrait at rest as their reference, a quarter any frame of the clip and a
    quarter the window's first frame.
    """
    settings = ClipDatasetSettings(frames=FRAMES, portrait=0.5, any_frame=0.25, seed=seed)
    opened = ClipStore(store)
    count = len(opened) if clips is None else min(clips, len(opened))
    return ClipDataset([opened[index] for index in range(count)], settings)


def visit_order(clips: int, visits: int, seed: int) -> list[ClipKey]:
    """Keys of `visits` rounds over all clips, each in an order of its own, `WINDOWS_A_VISIT` windows a clip
    and round.
    """

    def keys() -> Iterator[ClipKey]:
        for visit in range(visits):
            for index in np.random.default_rng((seed, visit)).permutation(clips):
                yield from ((int(index), visit * WINDOWS_A_VISIT + k) for k in range(WINDOWS_A_VISIT))

    return list(keys())


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
        "--visits", type=int, default=1, help=f"rounds over the clips, {WINDOWS_A_VISIT} windows each"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    dataset = puppet_dataset(options.store, options.seed, options.clips)
    vae = AutoencoderKLWan.from_pretrained(options.autoencoder, torch_dtype=torch.bfloat16).eval()
    use_quick_norms(vae)
    speech_encoder = Wav2Vec2Model.from_pretrained(options.speech_encoder).eval()
    writer = CacheWriter(dataset, options.out, vae, speech_encoder, torch.bfloat16)
    writer.write(visit_order(len(dataset), options.visits, options.seed))


if __name__ == "__main__":
    main()
