"""Rotary position embedding in three parts: latent frame, row, column (spec 1, "Blocks")."""

import torch

RotaryTable = tuple[torch.Tensor, torch.Tensor]


def float64_device(device: torch.device | str | None) -> torch.device:
    """The device itself, or the CPU where it has no float64 (Apple's MPS)."""
    wanted = torch.device(device or "cpu")
    return torch.device("cpu") if wanted.type == "mps" else wanted


def rotary_table(
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    padded_tokens: int | None = None,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> RotaryTable:
    """Cosines and sines for the tokens of a video in frame, row, column order.

    Args:
        frames, height, width: size of the token grid.
        head_dim: width d of a head; d - 4·(d//6) channels turn with the frame, 2·(d//6) with the row and the
            column.
        padded_tokens: length of the sequence when tokens follow the grid's; those are not rotated.

    Returns:
        `(cos, sin)`, float32 `[tokens, head_dim / 2]`, one angle for each pair of adjacent channels.
    """
    side = 2 * (head_dim // 6)
    wide = float64_device(device)
    parts = []
    for axis, (length, channels) in enumerate(
        ((frames, head_dim - 2 * side), (height, side), (width, side)),
    ):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=wide) / channels
        angle = torch.outer(
            torch.arange(length, dtype=torch.float64, device=wide), theta**-exponent
        )  # [length, channels / 2]
        shape = [1, 1, 1, channels // 2]
        shape[axis] = length
        parts.append(angle.view(shape).expand(frames, height, width, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, 2)  # [tokens, head_dim / 2]
    if padded_tokens is not None and padded_tokens > angles.shape[0]:
        angles = torch.cat([angles, angles.new_zeros(padded_tokens - angles.shape[0], angles.shape[1])])
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x_BNHd: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Turn adjacent channel pairs of queries or keys `[B, N, heads, d]` by their position, in float32."""
    cos, sin = (part[None, :, None, :] for part in table)
    pairs = x_BNHd.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # complex numbers would be left to eager kernels; these become one
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # the same products and sums in one pass over memory instead of eight
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x_BNHd.dtype)
