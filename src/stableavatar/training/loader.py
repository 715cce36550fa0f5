"""The batches of a run, and the processes that read them."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from stableavatar.data.sampler import ClipKey, GroupedSampler


@contextlib.contextmanager
def open_batches(
    source: Any,
    collate: Callable[[list[Any]], Any],
    sampler: GroupedSampler,
    *,
    step: int,
    seed: int,
    readers: int,
) -> Iterator[Iterator[Any]]:
    """This process's batches, one a micro-step, from a step on; `readers` processes read them ahead, 0: none.

    Readers take no notice of SIGTERM and Ctrl-C, which whoever ends a run may send to all of its processes:
    they read on until the block is left, however it is left.
    """
    others = set(multiprocessing.active_children())
    loader: DataLoader[Any] = DataLoader(
        source,
        batch_sampler=_Batches(sampler, step),
        collate_fn=collate,
        num_workers=readers,
        worker_init_fn=_ignore_signals,
        # The loader seeds its workers from here, not from the generators that a checkpoint keeps.
        generator=torch.Generator().manual_seed(seed),
    )
    batches = iter(loader)
    started = set(multiprocessing.active_children()) - others
    try:
        yield batches
    finally:
        # The loader ends its workers when nothing refers to it, but an error's traceback does, and at its end
        # Python would wait for them for ever, having sent a SIGTERM. There is no public way to end them.
        if started:
            batches._shutdown_workers()  # type: ignore[attr-defined]
        for reader in started:
            if reader.is_alive():  # stuck in a read
                reader.kill()


def _ignore_signals(_worker: int) -> None:
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class _Batches:
    """The clips of this process's micro-steps from a step on, as DataLoader wants them."""

    def __init__(self, sampler: GroupedSampler, first: int) -> None:
        self.sampler = sampler
        self.first = first

    def __iter__(self) -> Iterator[list[ClipKey]]:
        return self.sampler.from_step(self.first)
