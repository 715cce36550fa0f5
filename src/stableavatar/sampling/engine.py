"""The sampler: runs the cells of a plan in an order, and gives out latents as they become final (spec 2)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from stableavatar.choices import Order, OverlapWeights
from stableavatar.errors import StableAvatarError
from stableavatar.sampling.noise import Noise
from stableavatar.sampling.orders import ORDERS, Cell, fronts
from stableavatar.sampling.trajectory import Trajectory
from stableavatar.sampling.windows import Plan


class SamplingError(StableAvatarError):
    """The latents became NaN or infinite."""


# One step of each of some windows: latents `[C, F, H, W]` before the step to latents after it, float32.
Denoise = Callable[[Sequence[Cell], Sequence[torch.Tensor]], Sequence[torch.Tensor]]
CellCallback = Callable[[Cell], None]


def sample(
    plan: Plan,
    steps: int,
    noise: Noise,
    denoise: Denoise,
    *,
    order: Order = "wavefront",
    batch_windows: int = 1,
    weights: OverlapWeights = "uniform",
    device: torch.device | str = "cpu",
    progress: CellCallback | None = None,
) -> Iterator[torch.Tensor]:
    """Latents of a video, from its beginning on, each stretch as soon as it is final.

    Args:
        steps: number of steps; `denoise` is called for each with every window.
        order: "wavefront" and "lockstep" give the same latents, bit for bit; "causal" others, but the first
            ones after a single window.
        batch_windows: so many independent cells go to `denoise` at once; the result is the same but for
            rounding.
        device: where latents are kept between cells.
        progress: called after each cell.

    Yields:
        latents `[C, n, H, W]` in order, float32 (rounded to bfloat16 values under `compat="upstream"`).

    Raises:
        SamplingError: a cell returned NaN or infinite latents.
        ValueError: several windows at once in an order that has none that are independent.
    """
    trajectory = Trajectory(plan, steps, noise, weights=weights, device=device)
    if batch_windows > 1 and order == "causal":
        raise ValueError(f"in causal order {batch_windows} windows cannot run at once")
    in_fronts = batch_windows > 1 and order == "wavefront"
    batches = fronts(plan, steps) if in_fronts else ORDERS[order](plan, steps)
    for front in batches:
        for first in range(0, len(front), batch_windows):
            cells = front[first : first + batch_windows]
            results = denoise(cells, [trajectory.before(cell) for cell in cells])
            for cell, after in zip(cells, results, strict=True):
                _check_finite(cell, steps, after)
                trajectory.write(cell, after)
                if progress is not None:
                    progress(cell)
            yield from trajectory.finished()
    yield from trajectory.finished(end=True)


def sample_all(*arguments: Any, **options: Any) -> torch.Tensor:
    """All latents `[C, L, H, W]` of a video at once; see `sample`."""
    return torch.cat(list(sample(*arguments, **options)), dim=1)


def one_by_one(denoise: Callable[[Cell, torch.Tensor], torch.Tensor]) -> Denoise:
    """A function of a single cell as one of several."""

    def each(cells: Sequence[Cell], latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [denoise(cell, before) for cell, before in zip(cells, latents, strict=True)]

    return each


def _check_finite(cell: Cell, steps: int, latents: torch.Tensor) -> None:
    if not torch.isfinite(latents).all():
        raise SamplingError(
            f"the latents are no longer finite numbers after step {cell.step + 1} of {steps} in window "
            f"{cell.window.index + 1}: try --dtype float32, or smaller guidance scales"
        )
