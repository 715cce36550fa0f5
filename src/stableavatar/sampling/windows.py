"""The plan of overlapping windows over a video's latents: data, made before anything is computed (spec 2)."""

from dataclasses import dataclass
from math import e, log

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


@dataclass(frozen=True)
class WindowPlan:
    """Windows in order, over `latent_frames` latents.

    `window_latents` is F, the length of a full window, and `overlap` the latents o that two windows share.
    Under `compat="upstream"` the last window may be shorter than F.
    """

    latent_frames: int
    window_latents: int
    overlap: int
    windows: tuple[Window, ...]
    compat: Compat | None = None


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
        return _plan_upstream(latent_frames, window_latents, overlap)
    latent_frames = max(latent_frames, window_latents)
    stride = window_latents - overlap
    starts = [*range(0, latent_frames - window_latents, stride), latent_frames - window_latents]
    windows: list[Window] = []
    for index, start in enumerate(starts):
        write_start = windows[-1].stop - overlap if windows else 0
        windows.append(Window(index, start, start + window_latents, write_start))
    return WindowPlan(latent_frames, window_latents, overlap, tuple(windows))


def _plan_upstream(latent_frames: int, window_latents: int, overlap: int) -> WindowPlan:
    if latent_frames <= window_latents:
        raise InputError(
            f"compat='upstream' cannot make a video of {latent_frames} latent frames: the published code "
            f"needs more than one window of {window_latents}; give it longer speech, or leave compat out"
        )
    starts = range(
        0, latent_frames - overlap, window_latents - overlap
    )  # so every tail is longer than the overlap
    windows = tuple(
        Window(index, start, min(start + window_latents, latent_frames), start)
        for index, start in enumerate(starts)
    )
    return WindowPlan(latent_frames, window_latents, overlap, windows, compat="upstream")


def overlap_ramp(overlap: int, weights: OverlapWeights) -> torch.Tensor:
    """Weights of the later window over the shared latents, float32 `[overlap]`, from 0 to 1 (overlap >=
    2)."""
    position = [j / (overlap - 1) for j in range(overlap)]
    if weights == "log":
        position = [log(1 + (e - 1) * p) for p in position]
    return torch.tensor(position, dtype=torch.float32)
