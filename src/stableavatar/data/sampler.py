"""Which clips make up which batch: a pure function of the step, so that resuming needs nothing but the step's
number.

Clips of different sizes never share a batch (spec 5, fault 13: the published code mixed two loaders and lost
its place on resume).
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from stableavatar.errors import InputError

ClipKey = tuple[int, int]  # index of the clip, number of the pass over the data


class GroupedSampler:
    """Batches of clips of one size, in an order drawn anew for every pass; every clip once a pass.

    A group's last batch of a pass may be smaller. With several processes, each takes its share of every
    batch; a rest that would leave a process without a clip joins the batch before it.

    Args:
        groups: for each clip what it may be batched with (its size).
        batch_size: clips a batch on one process.
        seed: of the order.
        rank, world_size: this process among all.

    Raises:
        InputError: no clips, or a group with fewer clips than processes.
    """

    def __init__(
        self, groups: Sequence[Hashable], batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if not groups:
            raise InputError("there are no clips to train on")
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        for group, indices in members.items():
            if len(indices) < world_size:
                raise InputError(
                    f"{len(indices)} clips of size {group} are too few for {world_size} processes"
                )
        self._members = list(members.values())
        self._batch_size = batch_size * world_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._pass: tuple[int, list[list[int]]] = (0, self._batches(0))

    @property
    def batches_per_pass(self) -> int:
        """The same for every pass."""
        return len(self._pass[1])

    def batch(self, number: int) -> list[ClipKey]:
        """The clips of batch `number` (counted from 0 over all passes) that this process takes."""
        epoch, place = divmod(number, self.batches_per_pass)
        if epoch != self._pass[0]:
            self._pass = (epoch, self._batches(epoch))
        return [(index, epoch) for index in self._pass[1][place][self._rank :: self._world_size]]

    def from_batch(self, number: int) -> Iterator[list[ClipKey]]:
        """All batches from `number` on, without end."""
        while True:
            yield self.batch(number)
            number += 1

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, epoch))
        batches = []
        for members in self._members:
            order = [members[i] for i in rng.permutation(len(members))]
            cut = [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]
            if len(cut) > 1 and len(cut[-1]) < self._world_size:
                rest = cut.pop()
                cut[-1] += rest
            batches += cut
        return [batches[i] for i in rng.permutation(len(batches))]
