"""Noise by position: the same latent frame gets the same noise whatever the length, order or processes (spec
2)."""

import hashlib
from typing import Protocol

import torch


class Noise(Protocol):
    """Where the starting noise of a video comes from."""

    def frames(self, start: int, stop: int) -> torch.Tensor:
        """Noise of latent frames `[start, stop)`: float32 `[C, stop - start, H, W]` on the CPU."""
        ...


class PositionalNoise:
    """Standard normal noise in which every latent frame has a generator of its own, seeded from seed and
    position.

    Args:
        seed: any integer.
        channels, height, width: size of a latent frame.
    """

    def __init__(self, seed: int, channels: int, height: int, width: int) -> None:
        self.seed = seed
        self.shape = (channels, 1, height, width)

    def frames(self, start: int, stop: int) -> torch.Tensor:
        return torch.cat([self._frame(index) for index in range(start, stop)], dim=1)

    def _frame(self, index: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(self.shape, generator=generator)


class GivenNoise:
    """Noise that the caller gives: `[C, L, H, W]`."""

    def __init__(self, latents: torch.Tensor) -> None:
        self.latents = latents

    def frames(self, start: int, stop: int) -> torch.Tensor:
        if stop > self.latents.shape[1]:
            raise ValueError(f"the given noise has {self.latents.shape[1]} latent frames, {stop} are needed")
        return self.latents[:, start:stop].float()
