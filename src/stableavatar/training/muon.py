"""Muon: momentum whose update is made orthogonal, for matrices and kernels; alone, or with AdamW beside it.

Every direction of a kernel then learns at one pace. After Jordan et al., "Muon: An optimizer for hidden
layers in neural networks" (2024); a kernel [out, in, t, h, w] counts as a matrix [out, in*t*h*w]. The step
is scaled to AdamW's usual size (Liu et al., arXiv 2502.16982), so rates compare.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

# Coefficients of the quintic iteration of the paper: they drive singular values to about 0.7 to 1.2 in five
# rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrix: torch.Tensor, rounds: int = 5, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The matrix [m, n] with its singular values driven near 1, in the type of the input.

    Args:
        dtype: of the products. The iteration goes by far coarser steps than bfloat16's.
    """
    a, b, c = QUINTIC
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = (x / x.norm().clamp_min(1e-7)).to(dtype).contiguous()
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: torch.Tensor = (x.mT if tall else x).to(matrix.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """Orthogonal momentum for matrices and kernels; raises ValueError for vectors, which need AdamW."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if any(parameter.ndim < 2 for parameter in group["params"]):
                raise ValueError("Muon takes matrices and kernels; give vectors to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients; parameters without one stay."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                update = orthogonalize(direction) * (0.2 * max(direction.shape) ** 0.5)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"])
        return result


class MuonAdamW(torch.optim.Optimizer):
    """Orthogonal momentum for matrices within blocks, AdamW for vectors, embeddings and the layers at both
    ends.

    Both take steps of AdamW's usual size, so that one learning rate serves both (see above).

    Args:
        parameters: trained parameters by name; those with two dimensions and `blocks.` or `layers.` in their
            name get Muon.
        dtype: of the products that make an update orthogonal.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        matrices = [p for name, p in parameters.items() if p.ndim == 2 and _within_block(name)]
        chosen = {id(parameter) for parameter in matrices}
        others = [p for p in parameters.values() if id(p) not in chosen]
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients; parameters without one stay."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)
        return result

    def _muon(
        self, parameter: nn.Parameter, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalize(gradient.lerp(momentum, group["momentum"]), dtype=self.dtype)
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)

    @staticmethod
    def _adamw(
        parameter: nn.Parameter, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state.update(steps=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        first, second = group["betas"]
        state["steps"] += 1
        mean = state["mean"].lerp_(gradient, 1 - first)
        square = state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (square / (1 - second ** state["steps"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, size, value=-group["lr"] / (1 - first ** state["steps"]))


def _within_block(name: str) -> bool:
    return "blocks." in name or "layers." in name
