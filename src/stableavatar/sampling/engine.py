"""The sampler: runs the cells of a plan in an order, and gives out latents as they become final (spec 2)."""

import itertools
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


class Sampler:
    """Runs the cells of a plan, and gives out latents from the video's beginning on as they become final.

    Args:
        steps: number of steps; `denoise` is called for each with every window.
        order: "wavefront" and "lockstep" give the same latents, bit for bit; "causal" others, but the first
            ones after a single window.
        batch_windows: so many independent cells go to `denoise` at once; the result is the same but for
            rounding.
        device: where latents are kept between cells.
        progress: called after each cell.
        between: called when a batch of cells has run and what it made final has been taken: the state can be
            saved then, or an exception raised.

    Raises:
        ValueError: several windows at once in an order that has none that are independent.
    """

    def __init__(
        self,
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
        between: Callable[[], None] | None = None,
    ) -> None:
        if batch_windows > 1 and order == "causal":
            raise ValueError(f"in causal order {batch_windows} windows cannot run at once")
        self.plan = plan
        self.steps = steps
        self.denoise = denoise
        self.order: Order = order
        self.batch_windows = batch_windows
        self.progress = progress
        self.between = between
        self.trajectory = Trajectory(plan, steps, noise, weights=weights, device=device)
        self.batches = self.cells = 0  # that have run

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Latents `[C, n, H, W]` in order, float32 (rounded to bfloat16 values under `compat="upstream"`).

        Raises:
            SamplingError: a cell returned NaN or infinite latents.
        """
        for cells in itertools.islice(self._order(), self.batches, None):
            results = self.denoise(cells, [self.trajectory.before(cell) for cell in cells])
            for cell, after in zip(cells, results, strict=True):
                _check_finite(cell, self.steps, after)
                self.trajectory.write(cell, after)
                if self.progress is not None:
                    self.progress(cell)
            self.batches += 1
            self.cells += len(cells)
            yield from self.trajectory.finished()
            if self.between is not None:
                self.between()
        yield from self.trajectory.finished(end=True)

    def _order(self) -> Iterator[list[Cell]]:
        in_fronts = self.batch_windows > 1 and self.order == "wavefront"
        for front in (fronts if in_fronts else ORDERS[self.order])(self.plan, self.steps):
            for first in range(0, len(front), self.batch_windows):
                yield front[first : first + self.batch_windows]


def sample_all(*arguments: Any, **options: Any) -> torch.Tensor:
    """All latents `[C, L, H, W]` of a video at once; see `Sampler`."""
    return torch.cat(list(Sampler(*arguments, **options)), dim=1)


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
