"""Streaming decode beside diffusers' decode of the whole, with tiny's autoencoder: time and memory.

Both are measured with torch's own kernels and with those of `placement.slow_kernels`, so that the two
effects are told apart.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from benchmarks.measuring import (
    BenchmarkError,
    answer,
    forget_peak,
    fresh_process,
    interleaved,
    megabytes,
    memory,
    table,
)
from benchmarks.sizes import Sizes
from stableavatar import load
from stableavatar.models.latents import denormalise_latents
from stableavatar.placement.slow_kernels import avoid_slow_kernels
from stableavatar.sampling.decoding import stream_decode

PEER = "diffusers"
_SHAPE = (16, 16)  # height and width of the latents of tiny's pictures
_TOLERANCE = 1e-4  # of pixel values in [-1, 1], for rounding

Decode = Callable[[AutoencoderKLWan, torch.Tensor], Iterable[torch.Tensor]]


def stream(vae: AutoencoderKLWan, latents: torch.Tensor) -> Iterable[torch.Tensor]:
    """Frame after frame of normalised latents `[C, F, H, W]`."""
    return stream_decode(vae, latents.unbind(1))


@torch.no_grad()
def whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> Iterable[torch.Tensor]:
    """The frames of normalised latents `[C, F, H, W]`, all at once, as diffusers' Wan pipelines decode."""
    return vae.decode(denormalise_latents(vae, latents[None]), return_dict=False)[0][0].unbind(1)


# Each variant's decoding, and whether its autoencoder avoids torch's slow kernels.
VARIANTS: dict[str, tuple[Decode, bool]] = {
    PEER: (whole, False),
    "diffusers, kernels as ours": (whole, True),
    "ours, kernels of torch": (stream, False),
    "ours": (stream, True),
}


def autoencoder(own_kernels: bool) -> AutoencoderKLWan:
    """A new autoencoder of diffusers with the weights of tiny's."""
    shipped = load("tiny", device="cpu", dtype="float32").vae
    vae = AutoencoderKLWan.from_config(shipped.config).eval()
    vae.load_state_dict(shipped.state_dict())
    if own_kernels:
        avoid_slow_kernels(vae)
    return vae


def drawn_latents(vae: AutoencoderKLWan, latent_frames: int) -> torch.Tensor:
    """Normalised latents `[C, F, H, W]`; of noise, on whose values the time does not depend."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(vae.config.z_dim, latent_frames, *_SHAPE, generator=generator)


def _decode(decode: Decode, vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Decode, and take the frames as a writer does, that keeps none."""
    for _ in decode(vae, latents):
        pass


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the table."""
    models = {own: autoencoder(own) for own in (False, True)}
    difference = _difference(models, min(sizes.decoded))
    rows = []
    for place, length in enumerate(sizes.decoded):
        latents = drawn_latents(models[True], length)
        frames = 4 * (length - 1) + 1
        calls = {
            name: partial(_decode, decode, models[own], latents) for name, (decode, own) in VARIANTS.items()
        }
        times = interleaved(calls, sizes.rounds, warm_up=place == 0)
        for name, taken in times.items():
            memories = fresh_process(__name__, {"variant": name, "latent_frames": length}, threads)
            rows.append(
                [
                    name,
                    str(length),
                    f"{1000 * taken.median / frames:.1f}",
                    f"{taken.ratio(times[PEER]):.3f}",
                    megabytes(memories["peak"]),
                    megabytes(memories["peak"] - memories["before"]),
                ]
            )
    headings = [
        "decoding", "latent frames", "ms a frame", "ours / diffusers", "peak, MB", "of it for decoding, MB",
    ]  # fmt: skip
    height, width = (8 * side for side in _SHAPE)
    return "\n\n".join(
        [
            f"Video of {width}x{height} with tiny's autoencoder; median of {sizes.rounds} rounds, every peak "
            "in a process of its own. The frames are the same; the largest difference of a pixel in [-1, 1] "
            f"is {difference:.1g}.",
            table(headings, rows),
        ]
    )


def _difference(models: dict[bool, AutoencoderKLWan], length: int) -> float:
    """The largest difference of a variant's pixels from the peer's."""
    latents = drawn_latents(models[True], length)
    made = {name: torch.stack(list(decode(models[own], latents))) for name, (decode, own) in VARIANTS.items()}
    largest = max(float((frames - made[PEER]).abs().max()) for frames in made.values())
    if not largest <= _TOLERANCE:
        raise BenchmarkError(f"decoded pixels differ from diffusers' by {largest:.2g}: not the same work")
    return largest


def _child(settings: dict[str, Any]) -> dict[str, Any]:
    """Memory before decoding and at its peak, in bytes."""
    decode, own = VARIANTS[settings["variant"]]
    vae = autoencoder(own)
    latents = drawn_latents(vae, settings["latent_frames"])
    _decode(decode, vae, latents[:, :2])  # what torch sets up at its first calls is not the decoding's
    forget_peak()
    before = memory(peak=False)
    _decode(decode, vae, latents)
    return {"before": before, "peak": memory(peak=True)}


if __name__ == "__main__":
    answer(_child)
