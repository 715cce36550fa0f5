"""Latents to frames, one latent frame at a time (spec 2, "Decoding").

The autoencoder's decoder is causal: with the feature memory of its convolutions kept, latent after latent
gives the same frames as decoding all at once, so nothing grows with the length of the video. A large picture
can be decoded in tiles, each with a feature memory of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from stableavatar.errors import InputError
from stableavatar.models.latents import denormalise_latents
from stableavatar.placement.autoencoder import bring_autoencoder


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, and the steps from one to the next, in latents; what tiles share is blended.

    Raises:
        InputError: a step that is 0, or leaves gaps between tiles.
    """

    height: int
    width: int
    stride_height: int
    stride_width: int

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size, stride = getattr(self, name), getattr(self, f"stride_{name}")
            if not 0 < stride <= size:
                raise InputError(
                    f"the autoencoder's tiles of {size} latents in {name} cannot follow each other after "
                    f"{stride}: set its tile_sample_stride_{name} to a latent or more (in pixels), and to "
                    f"tile_sample_min_{name} at most"
                )

    @classmethod
    def of(cls, vae: AutoencoderKLWan) -> "Tiles":
        """Those that diffusers keeps on the autoencoder in pixels: `tile_sample_min_height`,
        `tile_sample_stride_height`, and the same of the width."""
        ratio = vae.spatial_compression_ratio
        return cls(
            vae.tile_sample_min_height // ratio,
            vae.tile_sample_min_width // ratio,
            vae.tile_sample_stride_height // ratio,
            vae.tile_sample_stride_width // ratio,
        )


# Of each convolution the last frames that it saw; before it has seen enough None, or a mark.
_Memory = list[torch.Tensor | str | None]


class StreamDecoder:
    """Decodes normalised latents one latent frame at a time, keeping the decoder's feature memory.

    Tiles are those of diffusers' `AutoencoderKLWan.tiled_decode`, here one latent frame at a time. What is
    alive while the decoder computes is then that of one tile. The feature memory is not smaller but larger,
    since it is kept twice where tiles overlap: that of a tile rests in main memory until it is the tile's
    turn again, so on another device only one tile's takes room. A picture no larger than a tile is decoded as
    without tiles. The encoder knows nothing of all this.

    Args:
        device: where the autoencoder computes, by default where its weights lie; it is brought there, also
            where another video has sent it away meanwhile.
        tiling: decode in overlapping tiles, see `Tiles.of`, with blended seams.

    Raises:
        InputError: tiles that do not cover the picture.
    """

    def __init__(
        self, vae: AutoencoderKLWan, device: torch.device | None = None, *, tiling: bool = False
    ) -> None:
        self.vae = vae
        self.device = device or vae.device
        self.tiles = Tiles.of(vae) if tiling else None
        self.taken = 0  # latent frames decoded
        self._memories: dict[int, _Memory] = {}  # of each tile, counted row by row

    @torch.no_grad()
    def decode(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The frames `[3, 8·H, 8·W]` of the next latent frame `[C, H, W]`, float32 in [-1, 1] on the device:
        one of the first, four of every other; not a number where it came out NaN or infinite."""
        vae = self.vae
        bring_autoencoder(vae, self.device)
        raw = denormalise_latents(vae, latent.to(self.device, torch.float32)[None, :, None])
        frames = self._decode_tiles(vae.post_quant_conv(raw.to(vae.dtype)))
        self.taken += 1
        if vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=vae.config.patch_size)
        bounded = torch.where(frames.isfinite(), frames.clamp(-1, 1), torch.nan)  # infinity is no white
        return bounded[0].unbind(1)

    def _decode_tiles(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of `[1, C, 1, H, W]`: float32 `[1, 3·p², frames, 8·H/p, 8·W/p]`, p being the
        side of the autoencoder's patches."""
        height, width = hidden.shape[-2:]
        tiles = self.tiles
        if tiles is None or (height <= tiles.height and width <= tiles.width):
            return self._decode_tile(0, hidden)
        number = 0
        strips: list[torch.Tensor] = []
        above: list[torch.Tensor] = []
        for top in range(0, height, tiles.stride_height):
            row: list[torch.Tensor] = []
            for left in range(0, width, tiles.stride_width):
                part = hidden[..., top : top + tiles.height, left : left + tiles.width]
                tile = self._decode_tile(number, part)
                self._rest(number)
                scale = tile.shape[-1] // part.shape[-1]
                if above:
                    shared = (tiles.height - tiles.stride_height) * scale
                    _blend(above[len(row)], tile, shared, dim=-2)
                if row:
                    _blend(row[-1], tile, (tiles.width - tiles.stride_width) * scale, dim=-1)
                row.append(tile)
                number += 1
            kept = [tile[..., : tiles.stride_height * scale, : tiles.stride_width * scale] for tile in row]
            strips.append(torch.cat(kept, dim=-1))
            above = row
        return torch.cat(strips, dim=-2)

    def _decode_tile(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        frames = self.vae.decoder(
            hidden, feat_cache=self._memory(number), feat_idx=[0], first_chunk=self.taken == 0
        )
        return frames.float()

    def _rest(self, number: int) -> None:
        """Put a tile's memory into main memory; the decoder fetches of it what it needs, layer by layer."""
        memory = self._memory(number)
        memory[:] = [part.cpu() if isinstance(part, torch.Tensor) else part for part in memory]

    def _memory(self, number: int) -> _Memory:
        return self._memories.setdefault(number, [None] * self.vae._cached_conv_counts["decoder"])

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `restore` goes on from: tensors, and the rest as JSON."""
        parts = {
            f"{number}.{index}": part
            for number, memory in self._memories.items()
            for index, part in enumerate(memory)
        }
        tensors = {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}
        marks = {name: part for name, part in parts.items() if isinstance(part, str)}
        tiles = None if self.tiles is None else list(astuple(self.tiles))
        return tensors, {"taken": self.taken, "marks": marks, "tiles": tiles}

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: the tiles were others.
        """
        tiles = None if rest["tiles"] is None else Tiles(*rest["tiles"])
        if tiles != self.tiles:
            raise InputError(
                f"what was begun was decoded with other tiles (then {tiles}, now {self.tiles}): set the "
                "autoencoder's tile_sample sizes to what they were, or begin anew"
            )
        self.taken = rest["taken"]
        self._memories = {}
        for name, part in {**tensors, **rest["marks"]}.items():
            number, index = map(int, name.split("."))
            self._memory(number)[index] = part


def _blend(before: torch.Tensor, tile: torch.Tensor, shared: int, *, dim: int) -> None:
    """Let a tile begin as the tile before it ends, and turn into itself over `shared` pixels along `dim`, in
    place. At the edge of the picture, where tiles are cut, they share less."""
    shared = min(shared, before.shape[dim], tile.shape[dim])
    shape = [1] * tile.ndim
    shape[dim] = shared
    own = torch.arange(shared, device=tile.device).view(shape) / max(shared, 1)
    seam = tile.narrow(dim, 0, shared)
    seam.copy_(torch.lerp(before.narrow(dim, before.shape[dim] - shared, shared), seam, own))


def stream_decode(
    vae: AutoencoderKLWan,
    latents: Iterable[torch.Tensor],
    device: torch.device | None = None,
    *,
    tiling: bool = False,
) -> Iterator[torch.Tensor]:
    """Frames of latents as they come; see `StreamDecoder`.

    Args:
        latents: latent frames `[C, H, W]` in order.
    """
    decoder = StreamDecoder(vae, device, tiling=tiling)
    for latent in latents:
        yield from decoder.decode(latent)
