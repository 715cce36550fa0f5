"""The latents of a video as they stand after every step, kept for as long as a cell still needs them.

Overlaps exist in two versions at once: a window reads what the step before has left, while its predecessor
may have written this step's already (spec 2). So every step has a video of its own; of each, only the stretch
between what is no longer read and what is not yet written is in memory.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stableavatar.choices import OverlapWeights
from stableavatar.sampling.noise import Noise
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.windows import Plan, overlap_ramp


@dataclass
class Piece:
    """What one window has written of a step's video: latents `[C, n, H, W]` of frames from `start` on."""

    start: int
    latents: torch.Tensor

    @property
    def stop(self) -> int:
        """One after the last latent frame."""
        return self.start + self.latents.shape[1]


class Trajectory:
    """The video after each of `steps` steps; step -1 is the noise.

    Args:
        weights: of the ramp over the latents that two windows share.
        device: where the latents lie.
    """

    def __init__(
        self,
        plan: Plan,
        steps: int,
        noise: Noise,
        *,
        weights: OverlapWeights = "uniform",
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan = plan
        self.steps = steps
        self.noise = noise
        self.device = torch.device(device)
        self.ramp = overlap_ramp(plan.overlap, weights).to(device).view(1, -1, 1, 1)
        self.videos: list[deque[Piece]] = [deque() for _ in range(steps)]
        self.given = 0  # latent frames that `finished` has given out

    def before(self, cell: Cell) -> torch.Tensor:
        """What the cell reads: `[C, F, H, W]`, float32. What lies before it is let go: windows come in order.

        Raises:
            LookupError: a cell that it depends on has not run.
        """
        window = cell.window
        if cell.step == 0:
            return self.noise.frames(window.start, window.stop).to(self.device)
        video = self.videos[cell.step - 1]
        while video and video[0].stop <= window.start:
            video.popleft()
        if not video or video[0].start > window.start or video[-1].stop < window.stop:
            raise LookupError(f"window {window.index} reads step {cell.step - 1} before it is there")
        parts = [
            piece.latents[:, max(window.start - piece.start, 0) : window.stop - piece.start]
            for piece in video
            if piece.start < window.stop
        ]
        return torch.cat(parts, dim=1)

    def write(self, cell: Cell, after: torch.Tensor) -> None:
        """Take the window's latents after its step.

        Over the first `overlap` latents that it writes they are blended with what its predecessor has written
        at this step; at the first step the later window overwrites.

        Args:
            after: `[C, F, H, W]`.

        Raises:
            LookupError: its predecessor's cell has not run.
        """
        window, video = cell.window, self.videos[cell.step]
        written = after.to(self.device)[:, window.write_start - window.start :]
        if window.index > 0:
            if not video or video[-1].stop != window.write_start + self.plan.overlap:
                raise LookupError(f"window {window.index} is written before its predecessor")
            last = video[-1]
            kept = window.write_start - last.start
            if cell.step > 0:
                shared = last.latents[:, kept:]
                blended = written[:, : self.plan.overlap] * self.ramp + shared * (1 - self.ramp)
                written = torch.cat([blended, written[:, self.plan.overlap :]], dim=1)
            last.latents = last.latents[:, :kept]
        if self.plan.compat == "upstream":
            written = written.bfloat16().float()
        video.append(Piece(window.write_start, written))

    def finished(self, *, end: bool = False) -> Iterator[torch.Tensor]:
        """Latents `[C, n, H, W]` that no later cell changes and that have not been given out, in order.

        Args:
            end: every cell has run, so that the last window's end is final too.
        """
        video = self.videos[-1]
        while video:
            piece = video[0]
            last = len(video) == 1
            stop = piece.stop - (self.plan.overlap if last and not end else 0)
            if stop > self.given:
                yield piece.latents[:, self.given - piece.start : stop - piece.start]
                self.given = stop
            if last:
                return
            video.popleft()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `restore` goes on from: tensors, and the rest as JSON."""
        tensors = {
            f"{step}.{piece.start}": piece.latents
            for step, video in enumerate(self.videos)
            for piece in video
            if piece.latents.shape[1]
        }
        return tensors, {"given": self.given}

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.given = rest["given"]
        self.videos = [deque() for _ in range(self.steps)]
        for step, start in sorted(tuple(map(int, name.split("."))) for name in tensors):
            latents = tensors[f"{step}.{start}"].to(self.device)
            self.videos[step].append(Piece(start, latents))
