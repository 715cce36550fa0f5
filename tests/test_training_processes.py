"""The trainer in several processes: the same run as one process that sees all of their clips."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from stableavatar.training.checkpoints import list_checkpoints, load_checkpoint
from stableavatar.training.log import read_log
from stableavatar.training.objective import StepLoss
from stableavatar.training.trainer import Trainer, TrainerSettings

CLIPS = 8


class Points:
    """Clips that are numbers."""

    groups = ("one size",) * CLIPS

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return torch.tensor([key[0] / CLIPS + 0.01 * key[1]])


class Fit(nn.Module):
    """A network that draws nothing, so that it does not matter which process sees a clip. One layer gets a
    gradient from some clips only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
        self.seldom = nn.Linear(1, 1)

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> StepLoss:
        made = self.layers(batch)[:, 0]
        if batch.max() > 0.5:
            made = made + self.seldom(batch)[:, 0] * (batch[:, 0] > 0.5)
        error = (made - torch.sin(5 * batch[:, 0])) ** 2
        return StepLoss(error.mean(), error.detach(), batch[:, 0].clamp(0, 1))


def train(folder: Path, batch: int, steps: int, resume: bool = False) -> None:
    settings = TrainerSettings(
        steps=steps, batch_size=batch, accumulation=2, learning_rate=1e-2, clip_norm=1.0, warmup_steps=3, ema_decay=0.9,
        precision="no", checkpoint_every=4, log_every=2, callback_every=3, seed=3,
    )  # fmt: skip

    def callback(step: int) -> None:
        with (folder / "calls").open("a") as file:
            file.write(f"{step}\n")

    trainer = Trainer(Fit(), Points(), torch.stack, settings, folder, callbacks=[callback])
    if resume:
        trainer.resume("latest")
    trainer.train()
    trainer.close()


def train_in_two_processes(folder: Path, *options: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__,
         str(folder), *options],
        check=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_two_processes_are_the_run_of_one(tmp_path: Path) -> None:
    train(tmp_path / "one", batch=4, steps=9)
    train_in_two_processes(tmp_path / "two", "5")
    train_in_two_processes(tmp_path / "two", "9", "resume")
    one, two = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("one", "two"))
    assert one.counters["step"] == two.counters["step"] == 9
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=1e-4, atol=1e-6)
    first, second = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
    assert (tmp_path / "two" / "calls").read_text().split() == ["3", "6", "9"]


if __name__ == "__main__":
    train(Path(sys.argv[1]), batch=2, steps=int(sys.argv[2]), resume="resume" in sys.argv)
