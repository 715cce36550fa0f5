"""The processes that make one video together, as torchrun starts them, and what they say to each other.

`torch.distributed` carries it: gloo between CPUs, and nccl for what lies on GPUs. A process that is killed
closes its connections, which the others see at once; one whose machine vanishes closes nothing, so that all
of them show a sign of life every second as well. One that ends with an error says so in the same place, and
waits for nobody.
"""

import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stableavatar.errors import InputError, ProcessError, StoppedError

T = TypeVar("T")

LOST_AFTER = 15
"""Seconds without a sign of life after which a process counts as lost."""

_MEETING = timedelta(minutes=5)
# Once they have met nothing waits this long: lost processes are found by their closed connections and missing
# signs of life.
_FOREVER = timedelta(days=30)


class Processes:
    """This process and the others of its group. Every method but `fail` is called by all of them, in the same
    order.

    Attributes:
        rank: which one this is, from 0. size: how many there are.

    Args:
        device: what is exchanged lies there.
        lost_after: see `LOST_AFTER`.

    Raises:
        ProcessError: (from every method) a process was lost, or has ended.
    """

    def __init__(self, device: torch.device | str = "cpu", *, lost_after: int = LOST_AFTER) -> None:
        """`torch.distributed` is initialised, with nccl as well where the device is a GPU."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = torch.device(device)
        self._broken = self._failed = False
        self._errors: list[Exception] = []
        self._messages: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()
        self._watch = _Watch(self.rank, self.size, lost_after)
        on_gpu = self._device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        self._group: Any = None
        self._do(lambda: setattr(self, "_group", dist.new_group(timeout=_FOREVER, backend=backend)))
        if on_gpu:  # the first message by nccl must be everyone's
            self._do(lambda: dist.all_reduce(torch.zeros(1, device=self._device), group=self._group))
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
        self._do(lambda: dist.all_gather(seen, mine, group=self._group))
        return [each.tolist() for each in seen]

    def exchange(self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]) -> None:
        """Send flat tensors to processes, and fill those that are to come from others."""

        def transfer() -> None:
            operations, arrived = [], []
            for target, tensor in sorted(outgoing.items()):
                operations.append(dist.P2POp(dist.isend, self._carried(tensor), target, self._group))
            for source, tensor in sorted(incoming.items()):
                arrived.append((tensor, self._carried(tensor)))
                operations.append(dist.P2POp(dist.irecv, arrived[-1][1], source, self._group))
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
            for tensor, there in arrived:
                if there is not tensor:
                    tensor.copy_(there)
            if self._device.type == "cuda":  # there, waiting only puts it before what is queued next
                torch.cuda.synchronize(self._device)

        self._do(transfer)

    def broadcast(self, value: T | None = None) -> T:
        """The first process's value, in all of them."""
        data = _packed(value) if self.leads else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._do(lambda: dist.broadcast(length, 0, group=self._group))
        if not self.leads:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._do(lambda: dist.broadcast(data, 0, group=self._group))
        received: T = _unpacked(data)
        return received

    def gather(self, value: T) -> list[T] | None:
        """Everyone's value in the first process. The others get None, and do not wait until it is taken."""
        if not self.leads:
            data = _packed(value)
            self._post(lambda: self._hand_over(data))
            return None
        others: list[torch.Tensor] = []
        self._do(lambda: others.extend(self._received(rank) for rank in range(1, self.size)))
        return [value, *map(_unpacked, others)]

    def _hand_over(self, data: torch.Tensor) -> None:
        dist.send(torch.tensor([len(data)]), 0, group=self._group)
        dist.send(data, 0, group=self._group)

    def _received(self, rank: int) -> torch.Tensor:
        length = torch.empty(1, dtype=torch.int64)
        dist.recv(length, rank, group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, rank, group=self._group)
        return data

    def fail(self, why: str) -> None:
        """This process ends before the work is done: the others end too, within seconds."""
        self._failed = True
        self._watch.fail(why)

    def leave(self) -> None:
        """Wait for the others, unless they were told to end, and part."""
        if not self._failed:
            self.numbers([0])
        self.close()

    def close(self) -> None:
        """Part without waiting for the others, but for what the first is still to take."""
        if not self._broken:
            self._messages.put(None)
            while self._carrier.is_alive() and self._watch.trouble() is None:
                self._carrier.join(0.2)
        self._watch.stop()

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a backend can carry of a tensor: gloo that of main memory, nccl that of a GPU."""
        return tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()

    def _post(self, message: Callable[[], None]) -> threading.Event:
        """Have a message sent by the thread that does so, after those before it; what goes wrong is said by
        the next that is waited for."""
        if self._broken:
            raise ProcessError("a process was lost before")
        over = threading.Event()

        def carry() -> None:
            try:
                message()
            except Exception as error:
                self._errors.append(error)
            over.set()

        self._messages.put(carry)
        return over

    def _do(self, message: Callable[[], None]) -> None:
        """Send a message, and wait until it is through, while listening for signals and signs of life."""
        over = self._post(message)
        try:
            while not over.wait(0.2):
                trouble = self._watch.trouble()
                if trouble is not None:
                    raise ProcessError(trouble)
        except BaseException:
            self._broken = True  # the message may still be on its way
            raise
        if self._errors:
            self._broken = True
            error = self._errors[0]
            trouble = self._watch.ask()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ProcessError(
                trouble or f"one of the {self.size} processes is lost: it was killed, or has ended ({reason})"
            ) from error

    def _carry(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (message := self._messages.get()) is not None:
            message()


class _Watch:
    """Signs of life by way of the store that the processes met in, over a connection of its own."""

    def __init__(self, rank: int, size: int, lost_after: int) -> None:
        self._rank = rank
        self._size = size
        self._names = [f"stableavatar/alive/{other}" for other in range(size)]
        self._lost_after = lost_after
        meeting_place: Any = dist.distributed_c10d._get_default_store()
        self._store = meeting_place.clone()
        self._store.set_timeout(timedelta(seconds=lost_after))
        self._store.set(self._names[rank], "0")
        self._silence = [0] * size  # rounds of this watch, not seconds: all may have been suspended
        self._failures: dict[int, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Begin, when every process has shown its first."""
        self._thread.start()

    def stop(self) -> None:
        """The others may go now."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def fail(self, why: str) -> None:
        """Show that this process ends."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(RuntimeError):
            self._store.set(self._names[self._rank], f"{_ENDED}{why}")

    def trouble(self) -> str | None:
        """What is wrong with another process."""
        for rank, why in self._failures.items():
            return f"process {rank} of {self._size} has ended: {why}"
        for rank, rounds in enumerate(self._silence):
            if rounds >= self._lost_after:
                return f"process {rank} of {self._size} is lost: it shows no sign of life"
        return None

    def ask(self) -> str | None:
        """What is wrong with another process that has closed its connection, if it can be known."""
        with suppress(RuntimeError):
            self._hear(self._store.multi_get(self._names))
        return self.trouble()

    def _look(self) -> None:
        before = [b""] * self._size
        count = 0
        while not self._over.wait(1.0):
            count += 1
            try:
                self._store.set(self._names[self._rank], str(count))
                now = self._store.multi_get(self._names)
            except RuntimeError:  # the store is gone with the process that keeps it, by default the first
                self._silence[0] += 1
                continue
            self._hear(now)
            for other in range(self._size):
                self._silence[other] = 0 if now[other] != before[other] else self._silence[other] + 1
            before = now

    def _hear(self, now: Sequence[bytes]) -> None:
        for rank, sign in enumerate(now):
            text = sign.decode("utf-8", "replace")
            if rank != self._rank and text.startswith(_ENDED):
                self._failures[rank] = text.removeprefix(_ENDED)


_ENDED = "ended: "


def local_device(device: str) -> str:
    """Of several GPUs on a machine, each process takes one; other devices stay as they are.

    Raises:
        InputError: there are fewer GPUs than processes here, or one of them was named for all.
    """
    if device.startswith("cuda:"):
        raise InputError(f"device {device!r} would be every process's: give cuda, and each takes its own")
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    here = int(os.environ.get("LOCAL_RANK", "0"))
    if here >= torch.cuda.device_count():
        raise InputError(
            f"there are {torch.cuda.device_count()} GPUs here, and more processes: start as many, or give "
            "--device cpu"
        )
    return f"cuda:{here}"


@contextmanager
def joined(device: str = "auto", *, lost_after: int = LOST_AFTER) -> Iterator[Processes]:
    """Join the processes that torchrun has started, and part from them at the end.

    An error that leaves the block ends the others too, and then nothing more can be said to them.

    Args:
        device: what this process computes on; see `local_device`.
    """
    chosen = local_device(device)
    gpu = chosen.startswith("cuda")
    if gpu:
        torch.cuda.set_device(torch.device(chosen))
    try:
        with _default_signals():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_MEETING)
        processes = Processes(chosen if gpu else "cpu", lost_after=lost_after)
    except RuntimeError as error:
        raise ProcessError(f"the processes did not meet: {str(error).splitlines()[0]}") from error
    try:
        yield processes
        processes.leave()
    except StoppedError:  # of which all know
        processes.close()
        raise
    except BaseException as error:
        processes.fail(str(error) or type(error).__name__)
        raise
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
