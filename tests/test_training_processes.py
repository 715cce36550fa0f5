"""The trainer in several processes: the same run as one process that sees all of their clips."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from stableavatar.errors import InputError
from stableavatar.training import run_folder
from stableavatar.training.log import read_log
from stableavatar.training.objective import StepLoss
from stableavatar.training.optimizers import ClipSettings, OptimizerSettings
from stableavatar.training.settings import TrainerSettings
from stableavatar.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CLIPS = 8
FAR = 99.0
# Both rules change the steps of this run: the start's three of them, and all norms after these are abnormal.
CLIP = ClipSettings(norm=0.4, start_ratio=3.0, start_steps=3, abnormal_ratio=3.0)


class Points:
    """Clips that are numbers; `poisoned`: one of them is none in the first pass, and one in the second has an
    infinite loss, but a finite gradient."""

    groups = ("one size",) * CLIPS
    fingerprint = "eight points"

    def __init__(self, *, poisoned: bool = False) -> None:
        self.poisoned = poisoned

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        if self.poisoned and key == (3, 0):
            return torch.tensor([torch.nan])
        if self.poisoned and key == (5, 1):
            return torch.tensor([FAR])
        return torch.tensor([key[0] / CLIPS + 0.01 * key[1]])


class Fit(nn.Module):
    """A network that draws nothing, so that it does not matter which process sees a clip. One layer gets a
    gradient from some clips only; `skips`: without them it does not run."""

    _repeated_blocks = ("Linear",)

    def __init__(self, *, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
        self.seldom = nn.Linear(1, 1)
        self.fixed = nn.Parameter(torch.linspace(-1, 1, 5), requires_grad=False)

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> StepLoss:
        made = self.layers(batch)[:, 0]
        if not self.skips or batch.max() > 0.5:
            made = made + self.seldom(batch)[:, 0] * (batch[:, 0] > 0.5)
        error = (made - torch.sin(5 * batch[:, 0])) ** 2
        error = torch.where(batch[:, 0] == FAR, error + torch.inf, error)
        return StepLoss(error.mean(), error.detach(), batch[:, 0].clamp(0, 1))


def train(
    folder: Path,
    batch: int,
    steps: int,
    resume: bool = False,
    empty: bool = False,
    poisoned: bool = False,
    **given: Any,
) -> None:
    usual = {
        "steps": steps, "batch_size": batch, "accumulation": 2, "ema_decay": 0.9, "precision": "fp32", "checkpoint_every": 4,
        "log_every": 2, "callback_every": 3, "seed": 3,
        "optimizer": OptimizerSettings(learning_rate=1e-2, warmup_steps=3, clip=CLIP),
    }  # fmt: skip
    settings = TrainerSettings(**{**usual, **given})

    def callback(step: int) -> None:
        with (folder / "calls").open("a") as file:
            file.write(f"{step}\n")

    spread = settings.sharding != "none" or "ACCELERATE_USE_DEEPSPEED" in os.environ
    module = Fit(skips=not spread)
    if empty and os.environ["RANK"] != "0":
        module.to("meta")
    trainer = Trainer(module, Points(poisoned=poisoned), torch.stack, settings, folder, callbacks=[callback])
    if resume:
        trainer.resume("latest")
    trainer.train()
    final = {name: trainer.final_parameters(average=name == "average") for name in ("average", "weights")}
    final["frozen"] = trainer.frozen_state()
    if trainer.accelerator.is_main_process:
        for name, parameters in final.items():
            save_file(parameters, folder / f"{name}.safetensors")
    else:
        assert not any(final.values())
    trainer.close()


def train_in_two_processes(folder: Path, *options: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__,
         str(folder), *options],
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    sys.stderr.write(run.stderr)
    run.check_returncode()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, whose accumulation is that of two."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, batch=2, steps=9, accumulation=4)
    AcceleratorState._reset_state(True)
    return folder


def assert_same_curve(one: Path, two: Path, average: bool = True) -> None:
    first, second = (read_log(folder / "log.jsonl") for folder in (one, two))
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        if b["loss"] is None:  # all steps before it were skipped
            assert (a["loss"], a["gradient_norm"], b["gradient_norm"]) == (None, None, None)
            continue
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    for kind in ("average", "weights", "frozen") if average else ("weights", "frozen"):
        wanted, found = (load_file(folder / f"{kind}.safetensors") for folder in (one, two))
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_are_the_run_of_one(one: Path, tmp_path: Path) -> None:
    train_in_two_processes(tmp_path, "none", "5")
    train_in_two_processes(tmp_path, "none", "9", "resume")
    assert_same_curve(one, tmp_path)
    assert (tmp_path / "calls").read_text().split() == ["3", "6", "9"]


def test_spread_over_two_processes_it_is_the_run_of_one(one: Path, tmp_path: Path) -> None:
    train_in_two_processes(tmp_path, "fsdp2", "5")
    train_in_two_processes(tmp_path, "fsdp2", "9", "resume")
    assert_same_curve(one, tmp_path)
    calls = (tmp_path / "calls").read_text().split()
    assert calls == [step for step in ("3", "6", "9") for _ in range(2)]  # both processes look


def test_spread_weights_may_be_the_first_process_s_alone(one: Path, tmp_path: Path) -> None:
    train_in_two_processes(tmp_path, "fsdp2", "9", "empty")
    assert_same_curve(one, tmp_path)


def deepspeed(folder: Path, stage: str) -> dict[str, str]:
    """What tells processes to use DeepSpeed."""
    # Parameters below the threshold are left whole: as small as these, all of them.
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto"}
    (folder / "deepspeed.json").write_text(json.dumps(config))
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "deepspeed.json"),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "DS_ACCELERATOR": "cpu",
    }


@pytest.fixture(scope="module")
def poisoned_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `one`, and a step that is not finite."""
    folder = tmp_path_factory.mktemp("poisoned")
    train(folder, batch=2, steps=9, accumulation=4, poisoned=True)
    AcceleratorState._reset_state(True)
    return folder


@pytest.mark.parametrize("way", ["copies", "fsdp2", "2", "3"])
def test_a_step_that_is_not_finite_is_skipped_by_all(poisoned_one: Path, tmp_path: Path, way: str) -> None:
    settings = {}
    if way in ("2", "3"):
        pytest.importorskip("deepspeed", reason="in the extra large; see make test-large")
        settings = deepspeed(tmp_path, way)
    train_in_two_processes(tmp_path, "fsdp2" if way == "fsdp2" else "none", "9", "poisoned", **settings)
    assert_same_curve(poisoned_one, tmp_path, average=way != "3")
    assert [line["skipped_steps"] for line in read_log(tmp_path / "log.jsonl")] == [2] * 4


@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_is_the_run_of_one(one: Path, tmp_path: Path, stage: str) -> None:
    pytest.importorskip("deepspeed", reason="in the extra large; see make test-large")
    settings = deepspeed(tmp_path, stage)
    train_in_two_processes(tmp_path, "none", "5", **settings)
    train_in_two_processes(tmp_path, "none", "9", "resume", **settings)
    assert_same_curve(one, tmp_path, average=stage == "2")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_as_shipped_keeps_whole_weights_and_computes_in_half(tmp_path: Path, name: str) -> None:
    pytest.importorskip("deepspeed", reason="in the extra large; see make test-large")
    file = Path(__file__).parents[1] / "recipes" / "accelerate" / f"{name}.yaml"
    folders = [tmp_path / precision for precision in ("fp32", "bf16")]
    for folder in folders:
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2",
             __file__, str(folder), "none", "5", f"precision={folder.name}"],
            check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
    whole, half = (load_file(folder / "weights.safetensors") for folder in folders)
    assert any(not torch.equal(whole[key], half[key]) for key in whole)
    for key, value in half.items():
        assert not torch.equal(value, value.bfloat16().float()), key  # not rounded
        torch.testing.assert_close(value, whole[key], rtol=0.05, atol=0.02)
    for folder in folders:
        assert torch.equal(load_file(folder / "frozen.safetensors")["fixed"], Fit().fixed)


def test_processes_that_do_not_share_the_folder_say_so_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        train_in_two_processes(tmp_path, "none", "5", "apart")
    assert "process 1 does not see what the first one writes" in failed.value.stderr
    assert not list(tmp_path.rglob("step-*"))


def test_sharding_needs_processes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several processes"):
        train(tmp_path, batch=2, steps=1, sharding="fsdp2")


if __name__ == "__main__":
    precision = [word.removeprefix("precision=") for word in sys.argv if word.startswith("precision=")]
    folder = Path(sys.argv[1])
    if "apart" in sys.argv:
        folder /= os.environ["RANK"]
        run_folder._PATIENCE_SECONDS = 1.0
    zero_3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    train(
        folder, batch=2, sharding=sys.argv[2], steps=int(sys.argv[3]), resume="resume" in sys.argv,
        empty="empty" in sys.argv, poisoned="poisoned" in sys.argv,
        **({"ema_decay": 0.0} if zero_3 else {}), **({"precision": precision[0]} if precision else {}),
    )  # fmt: skip
