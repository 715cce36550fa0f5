"""A running mean of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """Exponential moving average of a module's trained parameters, in float32.

    The decay of update k (from 0) is min(decay, (1 + k) / (10 + k)), so that the first weights are soon
    forgotten.

    Args:
        parameters: names and trained parameters.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters)
        self.state = {name: value.detach().float().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the mean towards the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = [value.detach().float() for value in self._parameters.values()]
        torch._foreach_lerp_(list(self.state.values()), values, 1 - decay)
        self.updates += 1

    def load(self, state: Mapping[str, torch.Tensor], updates: int) -> None:
        """Go on from a saved state."""
        for name, value in self.state.items():
            value.copy_(state[name])
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the mean's within the block, and their own again after it."""
        own = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._write(self.state)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
