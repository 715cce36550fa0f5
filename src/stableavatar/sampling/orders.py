"""Orders: which cell runs when (spec 2, "Three orders, one algorithm").

A cell (window k, step i) reads the video as it stood at the end of step i-1, where windows k to k+m have
written it, and blends with what window k-1 has written at step i; m is `WindowPlan.reach`. Every order yields
fronts: cells that do not read what another one of them writes (they may blend with it, and are written in
turn), all in an order in which what a cell needs has run before.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from stableavatar.choices import Order
from stableavatar.sampling.windows import Plan, Window


class Cell(NamedTuple):
    """One step of one window; steps are counted from 0."""

    window: Window
    step: int


Fronts = Iterator[list[Cell]]


def lockstep(plan: Plan, steps: int, _at_once: int = 1) -> Fronts:
    """All windows take a step before any takes the next: the published order. The first latents are final
    after the last step has begun."""
    for step in range(steps):
        yield [Cell(window, step) for window in _windows(plan)]


def wavefront(plan: Plan, steps: int, at_once: int = 1) -> Fronts:
    """The same result from the beginning of the video on.

    One cell after the other, sorted by (m·i + k, i, k): with m = 1 at most `steps` windows are alive at once,
    and the first latents are final after steps·(steps + 1)/2 cells. Where several can run at once, all cells
    with the same (m + 1)·i + k, which are independent, are a front: at most 2·steps - 1 windows are alive.
    """
    if at_once > 1:
        yield from _diagonals(plan, steps, plan.reach + 1)
    else:
        for cells in _diagonals(plan, steps, plan.reach):
            yield from ([cell] for cell in cells)


def causal(plan: Plan, steps: int, at_once: int = 1) -> Fronts:
    """A window takes all its steps before the next begins: the first latents are final after one window, and
    no window hears from its successor. Other numbers than the orders above, unless there is but one window.

    Where several can run at once, so many windows are on their way, each a step behind its predecessor: the
    same result, and the first latents as soon.
    """
    ways = min(at_once, steps)
    for time in itertools.count():
        places = ((*divmod(time - way, steps), way) for way in range(ways) if time >= way)
        found = sorted((ways * turn + way, step) for turn, step, way in places)
        cells = [Cell(window, step) for k, step in found if (window := plan.window(k)) is not None]
        if not cells:
            return
        yield cells


ORDERS: Mapping[Order, Callable[[Plan, int, int], Fronts]] = {
    "lockstep": lockstep,
    "wavefront": wavefront,
    "causal": causal,
}


def _windows(plan: Plan) -> Iterator[Window]:
    for index in itertools.count():
        window = plan.window(index)
        if window is None:
            return
        yield window


def _diagonals(plan: Plan, steps: int, slope: int) -> Fronts:
    """Cells (k, i) with slope·i + k = 0, 1, ..., each diagonal by rising i; empty ones are left out."""
    for diagonal in itertools.count():
        last = diagonal - slope * (steps - 1)
        if last >= 0 and plan.window(last) is None:
            return
        places = ((diagonal - slope * step, step) for step in range(steps))
        found = [(plan.window(index), step) for index, step in places if index >= 0]
        cells = [Cell(window, step) for window, step in found if window is not None]
        if cells:
            yield cells
