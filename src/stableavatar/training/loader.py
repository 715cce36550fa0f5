"""The batches of a run, and the processes that read them."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from stableavatar.data.sampler import ClipKey, GroupedSampler
from stableavatar.errors import InputError, StableAvatarError
from stableavatar.lifetimes import end_with_parent
from stableavatar.training.devices import everywhere

SampleOut = TypeVar("SampleOut", covariant=True)

# What torch says of a reader that was killed, or that found no room in shared memory.
_LOST = ("killed by signal", "exited unexpectedly", "shared memory")


class SampleSource(Protocol[SampleOut]):
    """A data set whose samples are asked for by clip and pass, and which says what may share a step."""

    @property
    def fingerprint(self) -> str:
        """Another one for other clips, in another order, or drawn otherwise."""
        ...

    @property
    def groups(self) -> Sequence[Any]:
        """For each clip, what it may share a step with."""
        ...

    def __getitem__(self, key: ClipKey) -> SampleOut:
        """Sample of clip `key[0]` in pass `key[1]`."""
        ...


def check_same_clips(source: SampleSource[Any]) -> None:
    """A clip that one process alone could not open would shift all others there. Raises InputError."""
    each = everywhere(source.fingerprint)
    other = next((rank for rank, theirs in enumerate(each) if theirs != each[0]), None)
    if other is not None:
        raise InputError(
            f"process {other} has other clips than the first: all need the same files, and clips that "
            "cannot be opened have to be out of the lists"
        )


@contextlib.contextmanager
def open_batches(
    source: SampleSource[Any],
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

    Raises:
        InputError: a reader was killed; torch says so wherever the block then is.
    """
    others = set(multiprocessing.active_children())
    reading = _Reading(source, collate)
    loader: DataLoader[Any] = DataLoader(
        reading,
        batch_sampler=_Batches(sampler, step),
        collate_fn=reading.collate,
        num_workers=readers,
        worker_init_fn=_begin_reader,
        # The loader seeds its workers from here, not from the generators that a checkpoint keeps.
        generator=torch.Generator().manual_seed(seed),
    )
    batches = iter(loader)
    started = set(multiprocessing.active_children()) - others
    try:
        yield _readable(batches)
    except RuntimeError as error:
        said = str(error).strip()
        if "DataLoader worker" not in said or not any(words in said for words in _LOST):
            raise
        raise InputError(
            f"a process that reads clips was lost, as where memory runs short: {said.splitlines()[-1]}\n"
            f"Have fewer of them (trainer.workers, now {readers}) or, in a container, more shared memory "
            "(docker run --shm-size 8g). --resume latest goes on from the last checkpoint"
        ) from error
    finally:
        # The loader ends its workers when nothing refers to it, but an error's traceback does, and at its end
        # Python would wait for them for ever, having sent a SIGTERM. There is no public way to end them.
        if started:
            batches._shutdown_workers()  # type: ignore[attr-defined]
        for reader in started:
            if reader.is_alive():  # stuck in a read
                reader.kill()


class _Reading(Dataset[Any]):
    """A data set whose errors for users come back as values: raised in a reader they would arrive with its
    traceback in their text."""

    def __init__(self, source: SampleSource[Any], collate: Callable[[list[Any]], Any]) -> None:
        self._source, self._collate = source, collate

    def __getitem__(self, key: ClipKey) -> Any:
        try:
            return self._source[key]
        except StableAvatarError as error:
            return error

    def collate(self, samples: list[Any]) -> Any:
        """A batch, or the first error."""
        error = next((it for it in samples if isinstance(it, StableAvatarError)), None)
        return error or self._collate(samples)


def _readable(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, StableAvatarError):
            raise batch
        yield batch


def _begin_reader(_worker: int) -> None:
    # Else one that waits to hand on its samples would do so for ever.
    end_with_parent()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class _Batches:
    """The clips of this process's micro-steps from a step on, as DataLoader wants them."""

    def __init__(self, sampler: GroupedSampler, first: int) -> None:
        self.sampler = sampler
        self.first = first

    def __iter__(self) -> Iterator[list[ClipKey]]:
        return self.sampler.from_step(self.first)
