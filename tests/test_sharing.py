"""Windows shared by several processes: the latents of one, whoever runs which cell. The processes are threads
here; test_processes.py has real ones."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plans import NOISE, drift, plans, upstream_plans
from stableavatar.errors import ProcessError, StoppedError
from stableavatar.sampling.engine import Sampler, one_by_one, sample_all
from stableavatar.sampling.orders import Cell, wavefront
from stableavatar.sampling.sharing import Pace, SharedWindows, Wish
from stableavatar.sampling.windows import Plan, plan_windows

T = TypeVar("T")

orders = st.sampled_from(["wavefront", "causal"])


class Threads:
    """What threads know of each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.boards: list[Any] = [None] * size
        self.sent = 0  # latents that have travelled

    def show(self, rank: int, mine: T) -> list[T]:
        """What every thread shows at this moment."""
        try:
            self.boards[rank] = mine
            self.barrier.wait(20)
            seen = list(self.boards)
            self.barrier.wait(20)
        except threading.BrokenBarrierError as error:
            raise ProcessError("a thread is lost") from error
        return seen


class ThreadPeers:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = threads, rank, threads.size

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        return self.threads.show(self.rank, list(values))

    def exchange(self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]) -> None:
        seen = self.threads.show(self.rank, outgoing)
        for source, target in incoming.items():
            target.copy_(seen[source][self.rank])
        expected = {source for source, sent in enumerate(seen) if self.rank in sent}
        assert expected == set(incoming)
        self.threads.sent += sum(tensor.numel() for tensor in outgoing.values())


def in_threads(size: int, work: Callable[[ThreadPeers], T]) -> tuple[list[Any], Threads]:
    threads = Threads(size)

    def one(rank: int) -> T | Exception:
        try:
            return work(ThreadPeers(threads, rank))
        except Exception as error:
            threads.barrier.abort()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size))), threads


def shared(plan: Plan, steps: int, size: int, order: str, batch: int = 1) -> tuple[list[Any], Threads]:
    def work(peers: ThreadPeers) -> torch.Tensor:
        sharing = SharedWindows(peers, plan, steps, order)
        sampler = Sampler(
            plan, steps, NOISE, one_by_one(drift), order=order, batch_windows=batch, sharing=sharing
        )
        parts = list(sampler)
        if peers.rank:
            assert parts == []
            return torch.empty(0)
        return torch.cat(parts, dim=1)

    return in_threads(size, work)


@settings(max_examples=120, deadline=None)
@given(st.one_of(plans, upstream_plans), st.integers(1, 6), st.integers(2, 4), orders, st.integers(1, 2))
def test_several_processes_make_what_one_makes(
    plan: Plan, steps: int, size: int, order: str, batch: int
) -> None:
    results, _ = shared(plan, steps, size, order, batch)
    assert not any(isinstance(result, Exception) for result in results), results
    expected = sample_all(plan, steps, NOISE, one_by_one(drift), order=order)
    assert torch.equal(results[0], expected)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(plans, upstream_plans), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), orders,
    st.integers(0, 40),
)  # fmt: skip
def test_what_some_began_others_go_on_with(
    plan: Plan, steps: int, size: int, others: int, order: str, turns: int
) -> None:
    """The state after some fronts, put together of all processes, goes on in any number of them."""

    def begin(peers: ThreadPeers) -> tuple[Any, list[torch.Tensor]]:
        left = turns
        made: list[torch.Tensor] = []

        def wish() -> Wish:
            nonlocal left
            left -= 1
            return Wish.STOP if left < 0 else Wish.GO_ON

        def boundary(wish: Wish) -> None:
            if wish == Wish.STOP:
                raise StoppedError

        sharing = SharedWindows(peers, plan, steps, order) if size > 1 else None
        sampler = Sampler(
            plan, steps, NOISE, one_by_one(drift), order=order, sharing=sharing, wish=wish, boundary=boundary
        )
        try:
            for part in sampler:
                made.append(part)
        except StoppedError:
            return sampler.trajectory.state(), made
        return None, made

    begun, _ = in_threads(size, begin)
    assert not any(isinstance(result, Exception) for result in begun), begun
    if begun[0][0] is None:
        return  # it was over before
    rest, made = begun[0][0][1], begun[0][1]
    tensors: dict[str, torch.Tensor] = {}
    for (state, _), _ in begun:
        assert not set(state) & set(tensors)
        tensors |= state

    def go_on(peers: ThreadPeers) -> list[torch.Tensor]:
        sharing = SharedWindows(peers, plan, steps, order) if others > 1 else None
        sampler = Sampler(plan, steps, NOISE, one_by_one(drift), order=order, sharing=sharing)
        sampler.restore(tensors, rest)
        return list(sampler)

    finished, _ = in_threads(others, go_on)
    assert not any(isinstance(result, Exception) for result in finished), finished
    whole = torch.cat([*made, *finished[0]], dim=1)
    assert torch.equal(whole, sample_all(plan, steps, NOISE, one_by_one(drift), order=order))


def test_the_work_is_shared_and_only_overlaps_travel() -> None:
    plan, steps, size = plan_windows(603, 9, 3), 6, 3
    ran, most = [0] * size, [0] * size  # cells, and pieces in memory

    def work(peers: ThreadPeers) -> None:
        def denoise(cell: Cell, latents: torch.Tensor) -> torch.Tensor:
            ran[peers.rank] += 1
            time.sleep(0.002)
            return latents

        def boundary(_wish: Wish) -> None:
            most[peers.rank] = max(most[peers.rank], sum(map(len, sampler.trajectory.videos)))

        sharing = SharedWindows(peers, plan, steps, "wavefront")
        sampler = Sampler(plan, steps, NOISE, one_by_one(denoise), sharing=sharing, boundary=boundary)
        for _ in sampler:
            pass
        assert len(sharing.owners) <= plan.reach + 2

    results, threads = in_threads(size, work)
    assert results == [None] * size
    assert sum(ran) == steps * len(plan)
    assert min(ran) > sum(ran) / size / 2
    assert max(most) <= 3 * 2 * steps  # of a hundred windows, those that are alive
    windows = len(plan)
    # An overlap forth and back for every step but the first and the last, and what is final once.
    bound = windows * (2 * plan.overlap * (steps - 1) + 6) * 4
    assert threads.sent <= bound


def test_who_is_slow_or_decodes_gets_fewer_windows() -> None:
    plan, steps = plan_windows(1203, 9, 3), 8

    class Known:
        """Two processes, of which the first needs half of a front's time for decoding."""

        rank, size = 0, 2

        def numbers(self, values: Sequence[float]) -> list[list[float]]:
            return [
                [Wish.GO_ON, counts[0] * 1.0, counts[0], 2.0],
                [Wish.GO_ON, counts[1] * 1.0, counts[1], 0.0],
            ]

        def exchange(self, outgoing: Any, incoming: Any) -> None: ...

    counts = [0, 0]
    total = [0, 0]
    sharing = SharedWindows(Known(), plan, steps, "wavefront")
    for front in wavefront(plan, steps, 2):
        sharing.take(front)
        counts = [sum(sharing.owners[cell.window.index] == rank for cell in front) for rank in (0, 1)]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        sharing.agree(Wish.GO_ON, Pace(0, 0, 0))
    # 3 cells and decoding take as long as 5 cells.
    assert total[0] / sum(total) == pytest.approx(3 / 8, abs=0.02)
