"""The processes that make one video together, as torchrun starts them, and what they say to each other.

`torch.distributed` carries it: gloo between CPUs, and nccl for what lies on GPUs. A process that is killed
closes its connections, which the others see at once; one whose machine vanishes closes nothing, so that all
of them show a sign of life every second as well.
"""

import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stableavatar.errors import ProcessError

T = TypeVar("T")

LOST_AFTER = 15.0
"""Seconds without a sign of life after which a process counts as lost."""

# Nothing waits this long: lost processes are found by their closed connections and missing signs of life.
_FOREVER = timedelta(days=30)


class Processes:
    """This process and the others of its group. Every method but `rank` and the like is called by all of
    them, in the same order.

    Attributes:
        rank: which one this is, from 0. size: how many there are.
        broken: one was lost, so that nothing more can be said.

    Raises:
        ProcessError: (from every method) a process was lost.
    """

    def __init__(self, *, lost_after: float = LOST_AFTER) -> None:
        """The default group of `torch.distributed`, which must be there."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.broken = False
        self._messages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._carry, daemon=True).start()
        self._watch = _Watch(self.rank, self.size, lost_after)
        self.numbers([0])
        self._watch.start()

    @property
    def leads(self) -> bool:
        """Whether this one decodes, and writes the file."""
        return self.rank == 0

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Every process's values; each gives as many."""
        mine = torch.tensor([float(value) for value in values], dtype=torch.float64)
        seen = [torch.empty_like(mine) for _ in range(self.size)]
        self._do(lambda: dist.all_gather(seen, mine))
        return [each.tolist() for each in seen]

    def exchange(self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]) -> None:
        """Send flat tensors to processes, and fill those that are to come from others; all on one device."""
        operations = [dist.P2POp(dist.isend, tensor, target) for target, tensor in sorted(outgoing.items())]
        operations += [dist.P2POp(dist.irecv, tensor, source) for source, tensor in sorted(incoming.items())]

        def transfer() -> None:
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
            devices = {operation.tensor.device for operation in operations}
            for device in devices:
                if device.type == "cuda":  # there, waiting only puts the transfer before what is queued next
                    torch.cuda.synchronize(device)

        self._do(transfer)

    def broadcast(self, value: T | None = None) -> T:
        """The first process's value, in all of them."""
        data = _packed(value) if self.leads else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._do(lambda: dist.broadcast(length, 0))
        if not self.leads:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._do(lambda: dist.broadcast(data, 0))
        received: T = _unpacked(data)
        return received

    def gather(self, value: T) -> list[T] | None:
        """Everyone's value in the first process, None in the others."""
        data = _packed(value)
        lengths = self.numbers([len(data)])
        if not self.leads:
            self.exchange({0: data}, {})
            return None
        others = {
            rank: torch.empty(int(length), dtype=torch.uint8)
            for rank, (length,) in enumerate(lengths)
            if rank > 0
        }
        self.exchange({}, others)
        return [value, *(_unpacked(others[rank]) for rank in range(1, self.size))]

    def leave(self) -> None:
        """Wait for the others, and part."""
        self._watch.stop()
        self.numbers([0])

    def _do(self, message: Callable[[], None]) -> None:
        """Send a message from the thread that does so, while this one listens for signals and signs of
        life."""
        if self.broken:
            raise ProcessError("a process was lost before")
        over = threading.Event()
        errors: list[Exception] = []

        def carry() -> None:
            try:
                message()
            except Exception as error:
                errors.append(error)
            over.set()

        self._messages.put(carry)
        while not over.wait(0.5):
            silent = self._watch.silent()
            if silent is not None:
                self.broken = True
                raise ProcessError(f"process {silent} of {self.size} is lost: it shows no sign of life")
        if errors:
            self.broken = True
            raise ProcessError(
                f"one of the {self.size} processes is lost: it was killed, or ended; see what it says"
            ) from errors[0]

    def _carry(self) -> None:
        while True:
            self._messages.get()()


class _Watch:
    """Signs of life by way of the store that the processes met in, over a connection of its own."""

    def __init__(self, rank: int, size: int, lost_after: float) -> None:
        self._rank = rank
        self._names = [f"stableavatar/alive/{other}" for other in range(size)]
        self._lost_after = lost_after
        meeting_place: Any = dist.distributed_c10d._get_default_store()
        self._store = meeting_place.clone()
        self._store.set_timeout(timedelta(seconds=lost_after))
        self._store.set(self._names[rank], "0")
        self._heard = [time.monotonic()] * size
        self._over = threading.Event()

    def start(self) -> None:
        """Begin, when every process has shown its first."""
        self._heard = [time.monotonic()] * len(self._heard)
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        """The others may go now."""
        self._over.set()

    def silent(self) -> int | None:
        """A process that has shown no sign of life for too long."""
        if self._over.is_set():
            return None
        oldest = min(range(len(self._heard)), key=lambda other: self._heard[other])
        late = time.monotonic() - self._heard[oldest] > self._lost_after
        return oldest if late else None

    def _look(self) -> None:
        before = [b""] * len(self._names)
        count = 0
        while not self._over.wait(1.0):
            count += 1
            try:
                self._store.set(self._names[self._rank], str(count))
                now = self._store.multi_get(self._names)
            except RuntimeError:  # the store is gone with the process that keeps it
                continue
            for other, (old, new) in enumerate(zip(before, now, strict=True)):
                if new != old:
                    self._heard[other] = time.monotonic()
            before = now


def local_device(device: str) -> str:
    """Of several GPUs on a machine, each process takes one; other devices stay as they are."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


@contextmanager
def joined(device: str = "auto", *, lost_after: float = LOST_AFTER) -> Iterator[Processes]:
    """Join the processes that torchrun has started, and part from them at the end.

    Args:
        device: what this process computes on; see `local_device`.
    """
    gpu = torch.cuda.is_available() and local_device(device).startswith("cuda")
    if gpu:
        torch.cuda.set_device(torch.device(local_device(device)))
    with _default_signals():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_FOREVER)
    processes = Processes(lost_after=lost_after)
    yield processes
    processes.leave()
    dist.destroy_process_group()


@contextmanager
def _default_signals() -> Iterator[None]:
    """Waiting for the others to come, torch does not let Python hear a signal: let it end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _packed(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())
