"""Leaving out steps that change little (TeaCache; spec 2, "Step caches").

Between two steps the transformer's blocks add much the same to their input as long as the timestep's
embedding has moved little. At such a step they are left out, and what they added last is added again. What is
kept belongs to one window and one branch: another window's residual would be noise.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch

from stableavatar.models.transformer import Residual, StableAvatarTransformer3DModel
from stableavatar.sampling.orders import Cell


def steps_to_run(
    embeddings: torch.Tensor, threshold: float, coefficients: Sequence[float]
) -> tuple[bool, ...]:
    """Which steps run in full: the first, the last, and each at which the estimated changes since the last
    full one come to `threshold`.

    Args:
        embeddings: modulated timestep embeddings of all steps, `[steps, ...]`.
        coefficients: of the polynomial, highest power first, that makes of the embedding's relative change an
            estimate of the output's.
    """
    runs, changed = [True], 0.0
    for before, after in itertools.pairwise(embeddings):
        relative = ((after - before).abs().mean() / before.abs().mean()).item()
        estimate = 0.0
        for coefficient in coefficients:
            estimate = estimate * relative + coefficient
        changed += estimate
        runs.append(changed >= threshold)
        if runs[-1]:
            changed = 0.0
    runs[-1] = True
    return tuple(runs)


class StepCache:
    """Which steps run, and what the blocks added at the last one that did, for every window that is alive.

    Args:
        transformer: whose timestep embeddings decide. timesteps: of all steps `[steps]`.
        threshold, coefficients: see `steps_to_run`; at a threshold of 0 every step runs.
        device: where the embeddings are computed of weights that lie nowhere until then (sequential
            offloading); others are computed where they lie, which hooks may change at the first call.
    """

    def __init__(
        self,
        transformer: StableAvatarTransformer3DModel,
        timesteps: torch.Tensor,
        threshold: float,
        coefficients: Sequence[float],
        device: torch.device | None = None,
    ) -> None:
        place = transformer.device
        if place.type == "meta" and device is not None:
            place = device
        with torch.no_grad():
            _, modulation = transformer.condition_embedder.embed_timestep(timesteps.to(place))
        self.runs = steps_to_run(modulation, threshold, coefficients)
        self._residuals: dict[int, torch.Tensor] = {}

    def residual(self, cells: Sequence[Cell]) -> Residual:
        """For a call with these cells, which all run in full or are all left out."""
        if self.runs[cells[0].step]:
            return Residual()
        return Residual(torch.cat([self._residuals[cell.window.index] for cell in cells]))

    def keep(self, cells: Sequence[Cell], residual: Residual) -> None:
        """After the call: keep what each window's blocks have added until its last step."""
        if residual.value is None:
            raise ValueError("the transformer was not called with this residual")
        for cell, value in zip(cells, residual.value.chunk(len(cells)), strict=True):
            if cell.step == len(self.runs) - 1:
                self._residuals.pop(cell.window.index, None)
            elif self.runs[cell.step]:
                # In main memory: some hundred megabytes a window at the published sizes.
                self._residuals[cell.window.index] = value.to("cpu", copy=len(cells) > 1)

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` goes on from."""
        return {str(index): residual for index, residual in self._residuals.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on where `state` was taken."""
        self._residuals = {int(index): tensor for index, tensor in tensors.items()}
