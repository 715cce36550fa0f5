"""Several processes share the windows of one video; only overlaps travel between them.

Each window belongs to one process, which runs all its steps. After every front the processes send each other
what the next cells need (spec 2, "Three orders"): the last latents of a window to the one that blends with
them, what was blended back to the windows before, and what is final to the first process, which decodes it.
Every process knows the plan and who has which window, so that all of them know who sends what to whom.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from stableavatar.choices import Order
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.trajectory import Piece, Trajectory
from stableavatar.sampling.windows import Plan, Window

# How much of what was known of a process's pace stays with each new front.
_MEMORY = 0.8


class Wish(IntEnum):
    """What is to happen when a front has run."""

    GO_ON = 0
    SAVE = 1
    STOP = 2  # after saving


class Peers(Protocol):
    """The processes, as sharing needs them; `rank` 0 is the one that decodes."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Every process's values; each gives as many. Raises ProcessError where one is lost."""
        ...

    def exchange(self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]) -> None:
        """Send flat tensors to processes, and fill those that are to come from others."""
        ...


class Sharing(Protocol):
    """Which cells of a front this process runs, and what follows a front.

    Attributes:
        size: how many processes there are. leads: this one gives out what is final.
    """

    size: int
    leads: bool

    def adopt(self, windows: Iterable[int]) -> None:
        """Deal out windows that an earlier run has begun, the same way in every process."""
        ...

    def owns(self, window: int) -> bool:
        """Whether a window is this process's."""
        ...

    def take(self, front: Sequence[Cell]) -> list[Cell]:
        """The cells of the front that this process runs."""
        ...

    def agree(self, wish: Wish, pace: "Pace") -> Wish:
        """Wait for the others to have run theirs. The first process's wish is everyone's."""
        ...

    def exchange(self, front: Sequence[Cell], trajectory: Trajectory) -> None:
        """Give and get what the front has made."""
        ...


class Pace(NamedTuple):
    """What a front took a process: seconds for so many cells, and seconds for anything else before it."""

    cell_seconds: float
    cells: int
    other_seconds: float


class Alone:
    """One process runs every cell."""

    size = 1
    leads = True

    def adopt(self, windows: Iterable[int]) -> None:
        pass

    def owns(self, window: int) -> bool:
        return True

    def take(self, front: Sequence[Cell]) -> list[Cell]:
        return list(front)

    def agree(self, wish: Wish, pace: Pace) -> Wish:
        return wish

    def exchange(self, front: Sequence[Cell], trajectory: Trajectory) -> None:
        pass


class Parcel(NamedTuple):
    """Latent frames `[start, stop)` of a step's video, made by a window, from one process to another."""

    source: int
    target: int
    step: int
    window: int
    start: int
    stop: int


class SharedWindows:
    """The part of one of several processes.

    In wavefront order a window goes to the process that is likely to be ready first, by what cells, decoding
    and writing have taken each so far; all processes see the same figures and come to the same choice. In
    causal order there is no choice, since each has one window at a time (or a batch). Who has a window
    changes nothing in its latents.

    Args:
        plan: of a known length.
        order: wavefront or causal.
    """

    def __init__(self, peers: Peers, plan: Plan, steps: int, order: Order) -> None:
        self.peers = peers
        self.size = peers.size
        self.plan = plan
        self.steps = steps
        self.order = order
        self.leads = peers.rank == 0
        self.owners: dict[int, int] = {}  # in wavefront order, of every window that is alive or still read
        self._cell_seconds: list[float | None] = [None] * peers.size
        self._other_seconds = [0.0] * peers.size
        self._latent_shape: tuple[int, int, int, int] | None = None

    def take(self, front: Sequence[Cell]) -> list[Cell]:
        if self.order == "wavefront":
            self._deal([cell.window.index for cell in front])
        return [cell for cell in front if self.owns(cell.window.index)]

    def owns(self, window: int) -> bool:
        return self.owner(window) == self.peers.rank

    def owner(self, window: int) -> int:
        """The process that a window has been dealt to."""
        return window % self.size if self.order == "causal" else self.owners[window]

    def adopt(self, windows: Iterable[int]) -> None:
        if self.order == "wavefront":
            self.owners = {window: window // (self.plan.reach + 1) % self.size for window in windows}

    def _deal(self, windows: Sequence[int]) -> None:
        """Give those windows of a front to processes that have not been given yet."""
        loads = Counter(self.owners[window] for window in windows if window in self.owners)
        for window in windows:
            if window not in self.owners:
                self.owners[window] = self._ready_first(loads)
                loads[self.owners[window]] += 1

    def agree(self, wish: Wish, pace: Pace) -> Wish:
        figures = self.peers.numbers([wish, *pace])
        for rank, (_, cell_seconds, cells, other_seconds) in enumerate(figures):
            if cells:
                self._cell_seconds[rank] = _smoothed(self._cell_seconds[rank], cell_seconds / cells)
            self._other_seconds[rank] = _smoothed(self._other_seconds[rank], other_seconds)
        return Wish(int(figures[0][0]))

    def exchange(self, front: Sequence[Cell], trajectory: Trajectory) -> None:
        rank = self.peers.rank
        outgoing, incoming = defaultdict(list), defaultdict(list)
        for parcel in self.parcels(front):
            if parcel.source == parcel.target:
                continue
            if parcel.source == rank:
                outgoing[parcel.target].append(parcel)
            elif parcel.target == rank:
                incoming[parcel.source].append(parcel)
        sent = {
            target: torch.cat([trajectory.read(p.step, p.start, p.stop).flatten() for p in parcels])
            for target, parcels in outgoing.items()
        }
        channels, _, height, width = self._shape(trajectory)
        sizes = {
            source: [channels * (p.stop - p.start) * height * width for p in parcels]
            for source, parcels in incoming.items()
        }
        got = {source: torch.empty(sum(each), device=trajectory.device) for source, each in sizes.items()}
        self.peers.exchange(sent, got)
        for source, parcels in incoming.items():
            for parcel, values in zip(parcels, got[source].split(sizes[source]), strict=True):
                latents = values.view(channels, parcel.stop - parcel.start, height, width)
                trajectory.put(parcel.step, Piece(parcel.window, parcel.start, latents, copy=True))
        for cell in front:
            if cell.step == self.steps - 1:
                self.owners.pop(cell.window.index - self.plan.reach - 1, None)

    def parcels(self, front: Sequence[Cell]) -> Iterator[Parcel]:
        """Everything that is sent after a front, in the same order in every process."""
        for cell in front:
            window, step = cell
            owner = self.owner(window.index)
            successor = self.plan.window(window.index + 1)
            end = window.stop if successor is None else successor.write_start
            if step == self.steps - 1:
                yield Parcel(owner, 0, step, window.index, window.write_start, end)
            elif self.order == "wavefront":
                for target, stop in self._earlier_readers(window).items():
                    yield Parcel(owner, target, step, window.index, window.write_start, min(stop, end))
            if step < self.steps - 1 and window.start < window.write_start:  # the last one, moved back
                source = self.owner(window.index - 1)
                yield Parcel(source, owner, step, window.index - 1, window.start, window.write_start)
            if step > 0 and successor is not None:
                stop = end + self.plan.overlap
                yield Parcel(owner, self.owner(successor.index), step, window.index, end, stop)

    def _shape(self, trajectory: Trajectory) -> tuple[int, int, int, int]:
        """Of a latent frame, `[C, 1, H, W]`."""
        if self._latent_shape is None:
            channels, frames, height, width = trajectory.noise.frames(0, 1).shape
            self._latent_shape = channels, frames, height, width
        return self._latent_shape

    def _earlier_readers(self, window: Window) -> dict[int, int]:
        """Processes whose windows before this one read what it writes, and up to where."""
        readers: dict[int, int] = {}
        for index in range(max(window.index - self.plan.reach, 0), window.index):
            earlier = self.plan.window(index)
            if earlier is not None and earlier.stop > window.write_start:
                owner = self.owner(index)
                readers[owner] = max(readers.get(owner, 0), earlier.stop)
        return readers

    def _ready_first(self, loads: Mapping[int, int]) -> int:
        """The process that would have run its cells of a front first if it took one more."""
        known = [seconds for seconds in self._cell_seconds if seconds is not None]
        usual = sum(known) / len(known) if known else 1.0

        def ready(rank: int) -> tuple[float, int]:
            seconds = self._cell_seconds[rank]
            each = usual if seconds is None else seconds
            return (loads[rank] + 1) * each + self._other_seconds[rank], -rank

        return min(range(self.size), key=ready)


class Stopwatch:
    """Seconds since it was made, or asked last."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        return passed


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now
