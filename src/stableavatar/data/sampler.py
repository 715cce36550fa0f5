"""Which clips make up which step: a pure function of the step's number, so that resuming needs nothing but
that number.

Clips of different sizes never share a step (spec 5, fault 13: the published code mixed two loaders and lost
its place on resume).
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from stableavatar.errors import InputError

ClipKey = tuple[int, int]  # index of the clip, number of the pass over the data


class GroupedSampler:
    """Steps of clips of one size, in an order drawn anew for every pass; every clip once a pass.

    A step's clips are dealt into pieces, one for every process and micro-step, so that two processes train
    what one process does with twice the accumulation. The last step of a size may have fewer clips, and even
    pieces with none: their process then goes over another clip of the step, which counts nothing
    (`weight`), since all processes have to do the same work. So a piece never has more than `batch_size`
    clips, and a pass has every clip once.

    Args:
        groups: for each clip what it may share a step with (its size).
        batch_size: clips a piece.
        seed: of the order.
        accumulation: micro-steps a step. rank, world_size: this process among all.

    Raises:
        InputError: no clips, or a batch size below 1.
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        batch_size: int,
        seed: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not groups:
            raise InputError("there are no clips to train on")
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self.pieces = accumulation * world_size
        self._members = list(members.values())
        self._step_size = batch_size * self.pieces
        self._accumulation, self._rank, self._world_size = accumulation, rank, world_size
        self._seed = seed
        self._pass: tuple[int, list[list[ClipKey]]] = (0, self._steps(0))

    @property
    def steps_per_pass(self) -> int:
        """The same for every pass."""
        return len(self._pass[1])

    def step(self, number: int) -> list[list[ClipKey]]:
        """The pieces of step `number` (counted from 0 over all passes), by micro-step and then by process;
        those that have no clip are empty."""
        epoch, within = divmod(number, self.steps_per_pass)
        if epoch != self._pass[0]:
            self._pass = (epoch, self._steps(epoch))
        keys = self._pass[1][within]
        return [keys[piece :: self.pieces] for piece in range(self.pieces)]

    def piece(self, micro_step: int) -> int:
        """Which piece of a step this process takes at a micro-step."""
        return micro_step * self._world_size + self._rank

    def weight(self, number: int, micro_step: int) -> float:
        """How much the mean over this process's clips at a micro-step counts, for the mean over the pieces to
        be that over the step's clips: 1 where all pieces are of one size, 0 where a clip only stands in."""
        pieces = self.step(number)
        return len(pieces[self.piece(micro_step)]) * self.pieces / sum(map(len, pieces))

    def from_step(self, number: int) -> Iterator[list[ClipKey]]:
        """The clips that this process takes at every micro-step from step `number` on, without end; where it
        has none, one that stands in."""
        while True:
            pieces = self.step(number)
            stand_in = pieces[0][:1]
            yield from (
                pieces[self.piece(micro_step)] or stand_in for micro_step in range(self._accumulation)
            )
            number += 1

    def _steps(self, epoch: int) -> list[list[ClipKey]]:
        rng = np.random.default_rng((self._seed, epoch))
        steps = []
        for members in self._members:
            keys = [(members[i], epoch) for i in rng.permutation(len(members))]
            steps += [keys[i : i + self._step_size] for i in range(0, len(keys), self._step_size)]
        return [steps[i] for i in rng.permutation(len(steps))]
