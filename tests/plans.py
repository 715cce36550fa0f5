"""Plans of every kind, and a step of a cell that shows where and when it ran: what the tests of the sampler
share."""

import torch
from hypothesis import strategies as st

from stableavatar.sampling.noise import PositionalNoise
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.windows import plan_windows

NOISE = PositionalNoise(1, 2, 1, 2)

plans = st.tuples(st.integers(1, 60), st.integers(3, 21)).flatmap(
    lambda lf: st.builds(plan_windows, st.just(lf[0]), st.just(lf[1]), st.integers(2, lf[1] - 1))
)
upstream_plans = st.tuples(st.integers(1, 40), st.integers(3, 21)).flatmap(
    lambda mf: st.builds(
        lambda overlap: plan_windows(sum(mf), mf[1], overlap, compat="upstream"), st.integers(2, mf[1] - 1)
    )
)
weights = st.sampled_from(["uniform", "log"])


def drift(cell: Cell, latents: torch.Tensor) -> torch.Tensor:
    """A step whose result depends on the whole window, its place and the step."""
    window, step = cell
    mixed = latents + 0.1 * latents.mean(dim=1, keepdim=True) + 0.01 * (window.index + 1) * (step + 1)
    return mixed + 0.05 * torch.arange(window.length).view(1, -1, 1, 1).sin()
