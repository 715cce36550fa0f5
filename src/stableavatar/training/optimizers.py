"""The optimizer, its rate at every step, and how its gradients are clipped (spec 4, "Objective")."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from stableavatar.errors import InputError, extra_missing
from stableavatar.training.muon import MuonAdamW

OptimizerKind = Literal["adamw", "adamw-8bit", "muon"]
RateSchedule = Literal["constant", "linear", "cosine"]

# A limit is lowered to this share of itself at most.
_LOWEST_SHARE = 0.1


@dataclass(frozen=True)
class ClipSettings:
    """To which norm gradients are cut. The defaults are the published recipe's.

    Attributes:
        norm: the limit.
        start_ratio: at the first step the limit is so many times as high, and falls linearly.
        start_steps: after which it has come down to `norm`.
        abnormal_ratio: after that, a norm of more than so many times the limit lowers the limit for its step
            by as much as it lies above, to a tenth at most; None: never.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    norm: float = 0.05
    start_ratio: float = 5.0
    start_steps: int = 1000
    abnormal_ratio: float | None = 5.0

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise InputError(f"clip norm must be above 0, not {self.norm}")
        if self.start_ratio < 1 or self.start_steps < 0:
            raise InputError(
                f"clip start_ratio must be at least 1 and start_steps at least 0, not {self.start_ratio} and "
                f"{self.start_steps}"
            )
        if self.abnormal_ratio is not None and self.abnormal_ratio < 1:
            raise InputError(f"clip abnormal_ratio must be at least 1, not {self.abnormal_ratio}")

    def limit(self, step: int, norm: float) -> float:
        """For the gradient of step `step` (from 0), which has this norm."""
        if step < self.start_steps:
            return self.norm * (self.start_ratio + (1 - self.start_ratio) * step / self.start_steps)
        if self.abnormal_ratio is not None and norm > self.abnormal_ratio * self.norm:
            return self.norm * max(self.norm / norm, _LOWEST_SHARE)
        return self.norm


@dataclass(frozen=True)
class OptimizerSettings:
    """The defaults are the published recipe's.

    Attributes:
        kind: `adamw`; `adamw-8bit`, whose moments take a quarter of the memory (torchao); or `muon`,
            orthogonal momentum for the matrices of blocks and AdamW for the rest.
        learning_rate: reached after `warmup_steps`.
        betas: of AdamW, for the means of the gradient and of its square.
        weight_decay: of AdamW.
        epsilon: of AdamW.
        warmup_steps: over which the rate rises from 0.
        schedule: what becomes of the rate then: `constant`, or `linear` or `cosine` towards 0.
        decay_steps: the last ones of the run, over which it falls; None: all that follow the warm-up.
        clip: to which norm gradients are cut.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: OptimizerKind = "adamw"
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 3e-2
    epsilon: float = 1e-10
    warmup_steps: int = 100
    schedule: RateSchedule = "constant"
    decay_steps: int | None = None
    clip: ClipSettings = field(default_factory=ClipSettings)

    def __post_init__(self) -> None:
        for name, choices in (("kind", get_args(OptimizerKind)), ("schedule", get_args(RateSchedule))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be at least 0 and below 1, not {self.betas}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be at least 0 and finite, not {self.weight_decay}")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps must be at least 0, not {self.warmup_steps}")
        if self.decay_steps is not None and (self.schedule == "constant" or self.decay_steps < 1):
            raise InputError(
                f"decay_steps {self.decay_steps} needs the schedule linear or cosine, and to be at least 1"
            )

    def rate(self, step: int, steps: int) -> float:
        """The rate of step `step`, counted from 0, of a run of `steps`."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))
        if self.schedule == "constant":
            return rate
        over = self.decay_steps or max(steps - self.warmup_steps, 1)
        left = min(1.0, (steps - step) / (over + 1))
        return rate * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def make_optimizer(
    settings: OptimizerSettings,
    parameters: Mapping[str, nn.Parameter],
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """The optimizer of trained parameters by name.

    Args:
        dtype: in which Muon multiplies matrices; what it and AdamW keep is of the parameters' type.

    Raises:
        InputError: a package that it needs is not installed.
    """
    if settings.kind == "muon":
        return MuonAdamW(
            parameters,
            settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            dtype=dtype,
        )
    if settings.kind == "adamw-8bit":
        try:
            library = importlib.import_module("torchao.optim")
        except ImportError as error:
            raise extra_missing("adamw-8bit needs torchao", "large") from error
        made: torch.optim.Optimizer = library.AdamW8bit(
            parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        return made
    return torch.optim.AdamW(
        parameters.values(),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def set_constants(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> None:
    """What a resumed optimizer has of the checkpoint and shall have of the settings."""
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = settings.betas, settings.epsilon
        group["weight_decay"] = settings.weight_decay


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For its next step. A rate that is a tensor (torchao's, so that it can be compiled) stays one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def clip_gradients(parameters: Mapping[str, nn.Parameter], clip: ClipSettings, step: int) -> torch.Tensor:
    """Cut the gradients to the limit; their norm before that, a scalar."""
    with_gradient = [parameter for parameter in parameters.values() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # of gradients that lie on several processes
        norm = norm.full_tensor()
    if torch.isfinite(norm):
        nn.utils.clip_grads_with_norm_(with_gradient, clip.limit(step, float(norm)), norm)
    return norm
