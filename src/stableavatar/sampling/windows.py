"""The plan of overlapping windows over a video's latents: data, made before anything is computed (spec 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from math import e, log
from typing import Protocol

import torch

from stableavatar.choices import Compat, OverlapWeights
from stableavatar.errors import InputError


def latent_frames_for(frames: int) -> int:
    """Latent frames that `frames` frames of video need: ceil((frames - 1) / 4) + 1 (fault 18)."""
    return (frames + 2) // 4 + 1


@dataclass(frozen=True)
class Window:
    """One window, in latent frames of the video.

    It reads `[start, stop)` and writes `[write_start, stop)`; the first latents that it writes are blended
    with its predecessor's.
    """

    index: int
    start: int
    stop: int
    write_start: int

    @property
    def length(self) -> int:
        """Latent frames that the window reads."""
        return self.stop - self.start


class Plan(Protocol):
    """Windows in order, of a video whose length may not be known yet.

    Attributes:
        window_latents: F, the length of a full window in latent frames.
        overlap: o, the latents that two windows share.
        compat: "upstream" if planned as the published code does.
        reach: m, so many windows after a window may write what it reads at the next step.
        count: the number of windows, None while it is not known.
    """

    @property
    def window_latents(self) -> int: ...
    @property
    def overlap(self) -> int: ...
    @property
    def compat(self) -> Compat | None: ...
    @property
    def reach(self) -> int: ...
    @property
    def count(self) -> int | None: ...

    def window(self, index: int) -> Window | None:
        """Window `index`, counted from 0, or None after the last; may wait for speech to arrive."""
        ...


@dataclass(frozen=True)
class WindowPlan:
    """Windows in order, over `latent_frames` latents; see `Plan`.

    Under `compat="upstream"` the last window may be shorter than F.
    """

    latent_frames: int
    window_latents: int
    overlap: int
    compat: Compat | None = None

    @property
    def stride(self) -> int:
        """Latent frames from a window's start to the next one's."""
        return self.window_latents - self.overlap

    @property
    def reach(self) -> int:
        """m = ceil(F / stride) - 1."""
        return -(-self.window_latents // self.stride) - 1

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows."""
        return tuple(self._window(index) for index in range(len(self)))

    @property
    def count(self) -> int:
        return len(self)

    def __len__(self) -> int:
        longer = max(self.latent_frames - self.window_latents, 0)
        return -(-longer // self.stride) + 1

    def window(self, index: int) -> Window | None:
        return self._window(index) if 0 <= index < len(self) else None

    def _window(self, index: int) -> Window:
        start = index * self.stride
        if self.compat == "upstream":
            return Window(index, start, min(start + self.window_latents, self.latent_frames), start)
        moved = min(start, self.latent_frames - self.window_latents)
        return Window(index, moved, moved + self.window_latents, start)


class GrowingPlan:
    """Windows of a video whose speech is still arriving; the same ones as `plan_windows` makes of its whole
    length.

    Args:
        window_latents: F. overlap: o, 2 <= o < F.
        length: given a number of latent frames, waits until there is speech for so many (None), or until the
            speech has ended before: the latent frames that the video then has.
    """

    compat: Compat | None = None

    def __init__(self, window_latents: int, overlap: int, length: Callable[[int], int | None]) -> None:
        self._regular = plan_windows(window_latents, window_latents, overlap)
        self._length = length
        self._known: WindowPlan | None = None
        self._there = 0

    @property
    def window_latents(self) -> int:
        return self._regular.window_latents

    @property
    def overlap(self) -> int:
        return self._regular.overlap

    @property
    def reach(self) -> int:
        return self._regular.reach

    @property
    def count(self) -> int | None:
        return None if self._known is None else len(self._known)

    def window(self, index: int) -> Window | None:
        """Waits for the speech of the whole window, or for the end."""
        start = index * self._regular.stride
        stop = start + self.window_latents
        if self._known is None and stop > self._there:
            total = self._length(stop)
            if total is None:
                self._there = stop
            else:
                self._known = plan_windows(total, self.window_latents, self.overlap)
        if self._known is None:
            return Window(index, start, stop, start)
        return self._known.window(index)


def plan_windows(
    latent_frames: int, window_latents: int, overlap: int, *, compat: Compat | None = None
) -> WindowPlan:
    """Lay windows over a video.

    Args:
        latent_frames: L, latents that the video's frames need. A video shorter than a window is given a full
            one.
        window_latents: F. overlap: o, 2 <= o < F.
        compat: "upstream" plans as the published code does: the last window ends with the video and is short.

    Returns:
        The plan. By default every window has F latents; the last is moved back to end with the video, and
        writes only from the end of its predecessor minus o on, so that every ramp has o latents.

    Raises:
        InputError: the overlap does not fit the window, or `compat` cannot do this length.
    """
    if not 2 <= overlap < window_latents:
        raise InputError(
            f"an overlap of {overlap} latent frames does not fit a window of {window_latents}: "
            f"choose 2 to {window_latents - 1}"
        )
    if compat == "upstream":
        if latent_frames <= window_latents:
            raise InputError(
                f"compat='upstream' cannot make a video of {latent_frames} latent frames: the published code "
                f"needs more than one window of {window_latents}; give it longer speech, or leave compat out"
            )
        return WindowPlan(latent_frames, window_latents, overlap, compat)
    return WindowPlan(max(latent_frames, window_latents), window_latents, overlap)


def overlap_ramp(overlap: int, weights: OverlapWeights) -> torch.Tensor:
    """Weights of the later window over the shared latents, float32 `[overlap]`, from 0 to 1 (overlap >=
    2)."""
    position = [j / (overlap - 1) for j in range(overlap)]
    if weights == "log":
        position = [log(1 + (e - 1) * p) for p in position]
    return torch.tensor(position, dtype=torch.float32)
