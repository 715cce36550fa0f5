"""What a pipeline gives where no file is written: frames as they are made or all at once, or latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from diffusers.utils import BaseOutput
from PIL import Image

from stableavatar.generation import Run
from stableavatar.media.reading import Frame
from stableavatar.options import Settings


class AvatarStream(Iterator[Frame]):
    """Frames of a video, uint8 `[height, width, 3]`, made as they are asked for.

    Attributes:
        frame_count: of the video; None where the speech is still arriving, and in causal order, where a file
            is read as it is needed.
        frame_rate: frames a second.
        width: of a frame, in pixels.
        height: of a frame, in pixels.
        options: the options with every default filled in; with them the video can be repeated.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._frames = run.frames()
        self.frame_count = run.frame_count
        self.frame_rate = run.frame_rate
        self.options = run.options
        self.width = run.options.width
        self.height = run.options.height

    def __next__(self) -> Frame:
        return next(self._frames)

    def close(self) -> None:
        """Stop, and give up the decoded recording; needed only where the frames are not taken to the end."""
        self._frames.close()
        self._run.close()


@dataclass
class AvatarVideo(BaseOutput):
    """All frames of a video.

    Attributes:
        frames: one video, as diffusers counts them: `frames[0]` is the list of its pictures.
        frame_rate: frames a second.
        options: with every default filled in; with them the video can be repeated.
    """

    frames: list[list[Image.Image]]
    frame_rate: Fraction
    options: Settings


@dataclass(frozen=True)
class AvatarLatents:
    """A video before it is decoded.

    Attributes:
        latents: normalised, `[C, latent frames, height/8, width/8]`.
        frame_count: of the video.
        frame_rate: frames a second.
        options: with every default filled in.
    """

    latents: torch.Tensor
    frame_count: int
    frame_rate: Fraction
    options: Settings
