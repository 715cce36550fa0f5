"""What a metric looks at: one clip, what it is held against, and what was measured in it; and what a metric
is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""Pictures [frames, height, width, 3], RGB in 0..255."""
Track = NDArray[np.float32]
"""One number a frame, [frames]."""
Mask = NDArray[np.bool_]
"""Where to look, [height, width]."""

Variant = Literal["made", "true", "decoded", "redrawn", "still", "wrong"]
VARIANTS: tuple[Variant, ...] = ("made", "true", "decoded", "redrawn", "still", "wrong")
"""The result and its controls: the model's output; true frames; true frames through the autoencoder; true
frames with what nobody can know drawn anew; the portrait repeated; the model's output for another
recording."""


@dataclass(frozen=True)
class MouthTrack:
    """What :class:`~stableavatar.evaluation.meter.MouthMeter` reads from every frame.

    Attributes:
        opening: gap between the lips, 0 shut to 1 wide open, in the units of ``Articulation.opening``.
        width: width of the mouth against its width at rest (1), the smile's own stretch left out.
        smile: lift of the mouth's corners, -1 (serious) to 1 (smiling), in the units of ``Motion.smile``.
        centre: the mouth's place [frames, 2], x and y in shares of the picture's sides.
    """

    opening: Track
    width: Track
    smile: Track
    centre: NDArray[np.float32]

    def __len__(self) -> int:
        return int(self.opening.shape[0])


@dataclass(frozen=True)
class FaceTrack:
    """What :class:`~stableavatar.evaluation.faces.FaceReader` reads from every frame of a person's video.

    Attributes:
        likeness: of the face to the portrait's [F], -1 to 1; 0 where no face is found.
        opening: gap between the lips [F], in widths between the outer corners of the eyes.
    """

    likeness: Track
    opening: Track


@dataclass(frozen=True)
class Observation:
    """One clip under the metrics.

    Attributes:
        frames: the pictures to judge [F, H, W, 3].
        reference: what they are held against [F, H, W, 3]: the truth, or the portrait repeated.
        called: the opening that the speech calls for [F], 0 to 1.
        mouth: what the meter reads in `frames`.
        surroundings: pixels outside mouth and eyes [H, W].
        outside: pixels outside the face [H, W].
        expression: the expression that the prompt asked for, where it did.
        smile_at_rest: lift of the mouth's corners that the meter reads in the portrait, where it was read.
        fps: frames a second.
        faces: what was read by networks that know people's faces, where it was.
    """

    frames: Frames
    reference: Frames
    called: Track
    mouth: MouthTrack
    surroundings: Mask
    outside: Mask
    expression: str | None = None
    smile_at_rest: float | None = None
    fps: float = 25.0
    faces: FaceTrack | None = None

    def __post_init__(self) -> None:
        counts = {len(self.frames), len(self.reference), len(self.called), len(self.mouth)}
        if len(counts) != 1:
            raise ValueError(f"frames, reference, called and mouth differ in length: {sorted(counts)}")


@dataclass(frozen=True)
class Bar:
    """The values that pass: `low` to `high`, either end open."""

    low: float | None = None
    high: float | None = None

    def passes(self, value: float) -> bool:
        """Whether `value` lies inside; not a number never does."""
        above = self.low is None or value >= self.low
        below = self.high is None or value <= self.high
        return bool(np.isfinite(value)) and above and below

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f">= {self.low:g}" if self.low is not None else f"<= {self.high:g}"


@dataclass(frozen=True)
class Metric:
    """A figure of the table: a pure function of a clip, and how the clips' values become one.

    Attributes:
        name: what it is called in files.
        title: what it is called in the table.
        unit: "dB", "frames", ... or "" for a ratio.
        measure: the clip's value.
        gather: how values of several clips become the figure.
        bars: what the embedded model has to reach, by variant; exit status 1 where one is missed. They are
            spec/6's, and where it names no number ("the mouth stays shut", "no drift one can see") our own.
    """

    name: str
    title: str
    unit: str
    measure: Callable[[Observation], float]
    gather: Callable[[Sequence[float]], float]
    bars: Mapping[Variant, Bar] = field(default_factory=dict)


def median(values: Sequence[float]) -> float:
    """The middle value; not a number when there is none."""
    return float(np.median(values)) if len(values) else float("nan")


def mean(values: Sequence[float]) -> float:
    """The average; not a number when there is none."""
    return float(np.mean(values)) if len(values) else float("nan")


def worst_low(values: Sequence[float]) -> float:
    """The smallest value; not a number when there is none."""
    return float(np.min(values)) if len(values) else float("nan")
