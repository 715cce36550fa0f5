"""The latents of a video as they stand after every step, kept for as long as a cell still needs them.

Overlaps exist in two versions at once: a window reads what the step before has left, while its predecessor
may have written this step's already (spec 2). So every step has a video of its own; of each, only the stretch
between what is no longer read and what is not yet written is in memory, and where several processes share
the windows, only what the windows of this process have to do with.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from stableavatar.choices import OverlapWeights
from stableavatar.sampling.noise import Noise
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.windows import Plan, overlap_ramp


@dataclass(frozen=True)
class Piece:
    """What one window has written of a step's video.

    Attributes:
        window: its index. start: the first latent frame.
        latents: `[C, n, H, W]`, float32.
        copy: another process computed it, and keeps it too.
    """

    window: int
    start: int
    latents: torch.Tensor
    copy: bool = False

    @property
    def stop(self) -> int:
        """One after the last latent frame."""
        return self.start + self.latents.shape[1]

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Its latents of frames `[start, stop)`, as far as it has them."""
        return self.latents[:, max(start - self.start, 0) : max(stop - self.start, 0)]


class Trajectory:
    """The video after each of `steps` steps; step -1 is the noise.

    Attributes:
        done: so many windows have taken each step, here or in other processes; windows come in order.

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
        self.videos: list[list[Piece]] = [[] for _ in range(steps)]
        self.done = [0] * steps
        self._final = 0  # latent frames that no later cell changes
        self._end = 0  # one after the last latent frame that has taken every step
        self._given = 0  # latent frames that `finished` has given out

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
            video.pop(0)
        return self.read(cell.step - 1, window.start, window.stop)

    def read(self, step: int, start: int, stop: int) -> torch.Tensor:
        """Latents `[C, stop - start, H, W]` as they stand after step `step`.

        Raises:
            LookupError: they are not all there.
        """
        parts, reached = [], start
        for piece in self.videos[step]:
            if piece.start >= stop:
                break
            if piece.start <= reached < min(piece.stop, stop):
                parts.append(piece.part(reached, stop))
                reached = min(piece.stop, stop)
        if reached < stop:
            raise LookupError(f"latent frames {start} to {stop} are read before step {step} has made them")
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
        window, overlap = cell.window, self.plan.overlap
        written = after.to(self.device)[:, window.write_start - window.start :]
        if cell.step > 0 and window.index > 0:
            shared = self._tail(cell)
            blended = written[:, :overlap] * self.ramp + shared * (1 - self.ramp)
            written = torch.cat([blended, written[:, overlap:]], dim=1)
        if self.plan.compat == "upstream":
            written = written.bfloat16().float()
        self.put(cell.step, Piece(window.index, window.write_start, written))

    def put(self, step: int, piece: Piece) -> None:
        """Lay a piece over a step's video: of what begins earlier, the rest is let go from its start on.

        Pieces lie in order and do not overlap, so what changes is at the end; in lockstep a video has as many
        as there are windows."""
        video = self.videos[step]
        later = []
        while video and video[-1].start >= piece.start:
            old = video.pop()
            if old.start >= piece.stop:
                later.append(old)
        if video and video[-1].stop > piece.start:
            old = video.pop()
            video.append(replace(old, latents=old.part(old.start, piece.start)))
        video.extend([piece, *reversed(later)])

    def mark(self, cell: Cell) -> None:
        """The cell has run, here or in another process.

        Raises:
            LookupError: its predecessor's has not.
        """
        if self.done[cell.step] != cell.window.index:
            raise LookupError(f"window {cell.window.index} is written before its predecessor")
        self.done[cell.step] += 1
        if cell.step == self.steps - 1:
            self._end = cell.window.stop
            self._final = cell.window.stop - self.plan.overlap

    def has_run(self, cell: Cell) -> bool:
        """Whether the cell has run."""
        return cell.window.index < self.done[cell.step]

    def finished(self, *, end: bool = False) -> Iterator[torch.Tensor]:
        """Latents `[C, n, H, W]` that no later cell changes and that have not been given out, in order; they
        are let go.

        Args:
            end: every cell has run, so that the last window's end is final too.

        Raises:
            LookupError: they are not there.
        """
        final = self._end if end else self._final
        while self._given < final:
            video = self.videos[-1]
            while video and video[0].stop <= self._given:
                video.pop(0)
            if not video or video[0].start > self._given:
                raise LookupError(f"latent frame {self._given} is final and not there")
            part = video[0].part(self._given, final)
            self._given += part.shape[1]
            yield part

    def forget(self) -> None:
        """Let go of what `finished` would give out, in a process that gives out nothing."""
        self._given = self._final
        self.videos[-1] = [piece for piece in self.videos[-1] if piece.stop > self._given]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `restore` goes on from: tensors, without copies of what other processes have, and the rest as
        JSON."""
        tensors = {
            f"{step}.{piece.window}.{piece.start}": piece.latents
            for step, video in enumerate(self.videos)
            for piece in video
            if piece.latents.shape[1] and not piece.copy
        }
        return tensors, {"given": self._given, "final": self._final, "end": self._end, "done": self.done}

    def restore(
        self,
        tensors: Mapping[str, torch.Tensor],
        rest: Mapping[str, Any],
        *,
        owns: Callable[[int], bool] = lambda _window: True,
    ) -> None:
        """Go on where `state` was taken.

        Args:
            owns: whether this process keeps a window's pieces for the next state.
        """
        self._given, self._final, self._end = rest["given"], rest["final"], rest["end"]
        self.done = list(rest["done"])
        self.videos = [[] for _ in range(self.steps)]
        for name in sorted(tensors, key=piece_of):
            step, window, start = piece_of(name)
            self.put(step, Piece(window, start, tensors[name].to(self.device), copy=not owns(window)))

    def _tail(self, cell: Cell) -> torch.Tensor:
        """What the predecessor of the cell's window has written of the latents that both write."""
        start = cell.window.write_start
        stop = start + self.plan.overlap
        for piece in reversed(self.videos[cell.step]):
            if piece.stop < stop:
                break
            if piece.window == cell.window.index - 1 and piece.start <= start and piece.stop >= stop:
                return piece.part(start, stop)
        raise LookupError(f"window {cell.window.index} is written before its predecessor")


def piece_of(name: str) -> tuple[int, int, int]:
    """Step, window and first latent frame of a tensor in a state."""
    step, window, start = map(int, name.split("."))
    return step, window, start
