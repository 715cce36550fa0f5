"""A network so small that a run of the trainer takes a moment, and what its folder then holds."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stableavatar.training.checkpoints import list_checkpoints, load_checkpoint
from stableavatar.training.log import read_log
from stableavatar.training.objective import StepLoss
from stableavatar.training.optimizers import ClipSettings, OptimizerSettings
from stableavatar.training.settings import TrainerSettings
from stableavatar.training.trainer import Trainer

SAMPLES = 7


class Points:
    """Samples of two sizes, each telling which clip in which pass it is."""

    groups = ("small", "large", "small", "small", "large", "small", "large")
    fingerprint = "seven points"

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        index, epoch = key
        width = 2 if self.groups[index] == "small" else 3
        return torch.full((width,), float(index) / SAMPLES + 0.01 * epoch)


class Fit(nn.Module):
    """A small network whose loss uses the step's generator and, by its dropout, the global one."""

    def __init__(self, poison: tuple[int, ...] = (), kind: str = "nan") -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(1, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))
        self.poison = poison
        self.calls = 0

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> StepLoss:
        self.calls += 1
        sigma = torch.rand(len(batch), generator=generator)
        wanted = torch.sin(5 * batch.mean(1)) + sigma
        error = (self.layers(batch.mean(1, keepdim=True))[:, 0] - wanted) ** 2
        if self.calls in self.poison:
            zero = error - error.detach()
            error = {
                "nan": error * math.nan,
                "infinite loss, finite gradient": error + math.inf,
                "finite loss, infinite gradient": error.detach() + zero.sqrt(),
            }[self.kind]
        return StepLoss(error.mean(), error.detach(), sigma)


class Wide(Fit):
    """With matrices that are large enough for an optimizer of 8 bits, and named as blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 256), nn.Tanh(), nn.Linear(256, 256), nn.Linear(256, 1))


def settings(**values: Any) -> TrainerSettings:
    """`values` may hold fields of the trainer, of the optimizer and of the clipping."""
    usual = {
        "steps": 12, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "norm": 1.0, "start_ratio": 1.0,
        "start_steps": 0, "abnormal_ratio": None, "warmup_steps": 4, "ema_decay": 0.9, "precision": "fp32",
        "checkpoint_every": 5, "log_every": 3, "seed": 11,
    }  # fmt: skip
    values = {**usual, **values}

    def taken(kind: type[Any]) -> dict[str, Any]:
        return {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}

    clip = ClipSettings(**taken(ClipSettings))
    return TrainerSettings(optimizer=OptimizerSettings(clip=clip, **taken(OptimizerSettings)), **values)


def make(folder: Path, module: nn.Module | None = None, **values: Any) -> Trainer[torch.Tensor]:
    return Trainer(module or Fit(), Points(), torch.stack, settings(**values), folder)


def final(folder: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(list_checkpoints(folder)[-1])
    assert state.ema is not None
    moments = {f"adam.{k}.{n}": v for k, s in state.optimizer["state"].items() for n, v in s.items()}
    return {**state.model, **{f"ema.{k}": v for k, v in state.ema.items()}, **moments}


def losses(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "clips_per_second"}
        for line in read_log(folder / "log.jsonl")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = final(one), final(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert losses(one) == losses(other)
