"""The sampler: runs the cells of a plan in an order, and gives out latents as they become final (spec 2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from stableavatar.choices import Order, OverlapWeights
from stableavatar.errors import SamplingError
from stableavatar.sampling.noise import Noise
from stableavatar.sampling.orders import ORDERS, Cell
from stableavatar.sampling.sharing import Alone, Pace, Sharing, Stopwatch, Wish
from stableavatar.sampling.trajectory import Trajectory, piece_of
from stableavatar.sampling.windows import Plan

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
        progress: called after each cell, those of other processes too.
        sharing: this process's part, where several share the windows; only the first gives out latents.
        wish: asked when cells have run: what is to happen at the next boundary?
        boundary: told what was wished (in the first process, if there are several) when everything that has
            become final has been taken: the state can be saved then, or an exception raised.
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
        sharing: Sharing | None = None,
        wish: Callable[[], Wish] = lambda: Wish.GO_ON,
        boundary: Callable[[Wish], None] = lambda _wish: None,
    ) -> None:
        self.plan = plan
        self.steps = steps
        self.denoise = denoise
        self.order: Order = order
        self.batch_windows = batch_windows
        self.progress = progress
        self.sharing = sharing or Alone()
        self.wish = wish
        self.boundary = boundary
        self.trajectory = Trajectory(plan, steps, noise, weights=weights, device=device)

    @property
    def cells(self) -> int:
        """How many have run."""
        return sum(self.trajectory.done)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Latents `[C, n, H, W]` in order, float32 (rounded to bfloat16 values under `compat="upstream"`).

        Raises:
            SamplingError: a cell returned NaN or infinite latents.
            ProcessError: another process was lost, or has ended.
        """
        watch = Stopwatch()
        for cells in self._turns():
            other_seconds = watch.lap()
            mine = self.sharing.take(cells)
            for batch in _parts(mine, self.batch_windows):
                self._run(batch)
            wish = self.sharing.agree(self.wish(), Pace(watch.lap(), len(mine), other_seconds))
            self.sharing.exchange(cells, self.trajectory)
            for cell in cells:
                self.trajectory.mark(cell)
                if self.progress is not None:
                    self.progress(cell)
            watch.lap()
            yield from self._finished()
            self.boundary(wish)
        yield from self._finished(end=True)

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Go on where `trajectory.state()` was taken, of all processes if there were several."""
        windows = {window for _, window, _ in map(piece_of, tensors)}
        windows.update(range(rest["done"][-1], rest["done"][0]))
        self.sharing.adopt(windows)
        self.trajectory.restore(tensors, rest, owns=self.sharing.owns)

    def _turns(self) -> Iterator[list[Cell]]:
        """What runs between two boundaries, without what an earlier run has done: of one process a batch, of
        several a front."""
        at_once = self.sharing.size * self.batch_windows
        for front in ORDERS[self.order](self.plan, self.steps, at_once):
            left = [cell for cell in front if not self.trajectory.has_run(cell)]
            yield from _parts(left, self.batch_windows if self.sharing.size == 1 else max(len(left), 1))

    def _run(self, cells: list[Cell]) -> None:
        results = self.denoise(cells, [self.trajectory.before(cell) for cell in cells])
        for cell, after in zip(cells, results, strict=True):
            _check_finite(cell, self.steps, after)
            self.trajectory.write(cell, after)

    def _finished(self, *, end: bool = False) -> Iterator[torch.Tensor]:
        if self.sharing.leads:
            yield from self.trajectory.finished(end=end)
        else:
            self.trajectory.forget()


def sample_all(*arguments: Any, **options: Any) -> torch.Tensor:
    """All latents `[C, L, H, W]` of a video at once; see `Sampler`."""
    return torch.cat(list(Sampler(*arguments, **options)), dim=1)


def one_by_one(denoise: Callable[[Cell, torch.Tensor], torch.Tensor]) -> Denoise:
    """A function of a single cell as one of several."""

    def each(cells: Sequence[Cell], latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [denoise(cell, before) for cell, before in zip(cells, latents, strict=True)]

    return each


def _parts(cells: list[Cell], size: int) -> Iterator[list[Cell]]:
    for first in range(0, len(cells), size):
        yield cells[first : first + size]


def _check_finite(cell: Cell, steps: int, latents: torch.Tensor) -> None:
    if not torch.isfinite(latents).all():
        raise SamplingError(
            f"the latents are no longer finite numbers after step {cell.step + 1} of {steps} in window "
            f"{cell.window.index + 1}: try --dtype float32, or smaller guidance scales"
        )
