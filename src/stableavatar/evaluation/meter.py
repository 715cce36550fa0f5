"""The meter of the mouth: a small network that reads opening, width, smile and place of a mouth from a
picture of a face.

`stableavatar.training.tiny.meter` trains it on puppets, on puppets through the autoencoder and on pictures
bent towards photographs (spec/6: "the meter must be trained on decoded frames and photographs too"); its
weights ship with the package.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

from stableavatar.errors import CheckpointError
from stableavatar.evaluation.observation import Frames, MouthTrack
from stableavatar.media.files import write_file

SIZE = 64
"""Side in pixels of the picture that the network sees: a tenth of the widest opening is a pixel of it."""
METER_FILE = Path(__file__).resolve().parents[1] / "assets" / "evaluation" / "mouth_meter.safetensors"
"""The weights that come with the package."""
_HEADS = 4
_OUTPUTS = 3
_BATCH = 64


class MouthMeter(nn.Module):
    """Convolutions to a grid of 16x16, attention that finds the mouth there, and a small perceptron on what
    it found."""

    def __init__(self, channels: tuple[int, int, int] = (32, 48, 64)) -> None:
        super().__init__()
        first, second, third = channels
        # 2x2 pixels are channels from the start: most of the work at full size would find edges only.
        self.stages = nn.ModuleList(
            [
                nn.Conv2d(12, first, 3, padding=1),
                nn.Conv2d(first, first, 3, stride=2, padding=1),
                nn.Conv2d(first, second, 3, padding=1),
                nn.Conv2d(second, third, 3, padding=1),
                nn.Conv2d(third, third, 3, padding=2, dilation=2),
            ]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(4, width) for width in (first, first, second, third, third)])
        self.where = nn.Conv2d(third, _HEADS, 1)
        self.hidden = nn.Linear(_HEADS * third, 64)
        self.out = nn.Linear(64, _OUTPUTS)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [B, 3, 64, 64] in -1..1 to (opening, width - 1, smile) [B, 3] and the mouth's place [B,
        2] in 0..1."""
        x = F.pixel_unshuffle(pictures, 2)
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = F.silu(norm(stage(x)))
        batch, _, height, width = x.shape
        attention = self.where(x).flatten(2).float().softmax(dim=-1)  # [B, heads, cells]
        found = attention @ x.flatten(2).float().transpose(1, 2)
        values = self.out(F.silu(self.hidden(found.flatten(1))))
        rows = (torch.arange(height, device=x.device) + 0.5) / height
        columns = (torch.arange(width, device=x.device) + 0.5) / width
        grid = attention[:, 0].view(batch, height, width)
        centre = torch.stack([(grid.sum(1) * columns).sum(-1), (grid.sum(2) * rows).sum(-1)], dim=-1)
        return values, centre

    def save(self, path: Path) -> None:
        """Writes the weights as float16 safetensors, complete under their name or not there."""
        write_file(path, save({name: value.half().contiguous() for name, value in self.state_dict().items()}))

    @torch.inference_mode()
    def measure(self, frames: Frames) -> MouthTrack:
        """Reads every frame of a clip [F, H, W, 3]; a picture of another size is scaled to 64x64.

        The face should fill the picture as a puppet's does: half to nine tenths of its height.

        Raises:
            ValueError: `frames` has another shape, or no frame.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
            raise ValueError(f"a clip of shape {frames.shape}: the meter reads [frames, height, width, 3]")
        read, places = [], []
        for start in range(0, len(frames), _BATCH):
            part = torch.from_numpy(np.array(frames[start : start + _BATCH]))
            pictures = part.permute(0, 3, 1, 2).float() / 127.5 - 1
            if pictures.shape[-2:] != (SIZE, SIZE):
                pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
            values, centre = self(pictures)
            read.append(values.numpy())
            places.append(centre.numpy())
        values_array = np.concatenate(read).astype(np.float32)
        return MouthTrack(
            opening=values_array[:, 0],
            width=1 + values_array[:, 1],
            smile=values_array[:, 2],
            centre=np.concatenate(places).astype(np.float32),
        )


def read_meter(path: Path) -> MouthMeter:
    """A meter from the file that :meth:`MouthMeter.save` wrote.

    Raises:
        CheckpointError: the file is missing or holds another network.
    """
    if not path.is_file():
        raise CheckpointError(
            f"No mouth meter at {path}. Make one: python -m stableavatar.training.tiny.meter"
        )
    meter = MouthMeter()
    try:
        meter.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not the mouth meter of this version: {error}") from error
    return meter.eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def shipped_meter() -> MouthMeter:
    """The meter that comes with the package. Raises CheckpointError when it is missing."""
    return read_meter(METER_FILE)
