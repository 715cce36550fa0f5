"""Optimizers as the trainer uses them: a step, its rate, its clipping, what resuming keeps."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fitting import Fit, Points, Wide, losses, make
from stableavatar.training.checkpoints import list_checkpoints, load_checkpoint
from stableavatar.training.muon import Muon, orthogonalize
from stableavatar.training.optimizers import ClipSettings, OptimizerSettings, clip_gradients

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_step_is_adamw_on_the_mean_of_its_micro_steps(tmp_path: Path) -> None:
    """One optimizer step against PyTorch's AdamW on the average gradient, clipped, at the warm-up's first
    rate.
    """
    trainer = make(tmp_path, steps=1, ema_decay=0.0, norm=0.01)
    reference = Fit()
    torch.manual_seed(42)
    trainer.train()

    torch.manual_seed(42)
    trainer.step = 0
    pieces = trainer.sampler.step(0)
    for micro_step, keys in enumerate(pieces):
        batch = torch.stack([Points()[key] for key in keys])
        share = len(keys) / sum(map(len, pieces))
        (reference(batch, trainer._generator(micro_step)).loss * share).backward()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2 / 4, weight_decay=3e-2, eps=1e-10)
    nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    optimizer.step()
    for name, value in reference.named_parameters():
        torch.testing.assert_close(trainer.parameters[name], value, rtol=1e-6, atol=1e-7)


def test_warm_up_then_constant(tmp_path: Path) -> None:
    make(tmp_path, steps=6, log_every=1).train()
    rates = [line["learning_rate"] for line in losses(tmp_path)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_the_rate_falls_over_the_last_steps(tmp_path: Path) -> None:
    make(tmp_path, steps=8, log_every=1, schedule="linear", decay_steps=3).train()
    rates = [line["learning_rate"] for line in losses(tmp_path)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_the_rate_falls_over_all_that_follows_the_warm_up() -> None:
    linear = OptimizerSettings(learning_rate=1.0, warmup_steps=2, schedule="linear")
    assert [linear.rate(step, 6) for step in range(6)] == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])
    cosine = replace(linear, schedule="cosine")
    wanted = [(1 - math.cos(math.pi * left)) / 2 for left in (0.8, 0.6, 0.4, 0.2)]
    assert [cosine.rate(step, 6) for step in range(2, 6)] == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit", "muon"])
def test_every_optimizer_trains_and_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    if kind == "adamw-8bit":
        pytest.importorskip("torchao", reason="in the extra large; see make test-large")
    make(tmp_path / "whole", Wide(), kind=kind, steps=4).train()
    make(tmp_path / "parts", Wide(), kind=kind, steps=2).train()
    rest = make(tmp_path / "parts", Wide(), kind=kind, steps=4)
    rest.resume("latest")
    rest.train()
    whole, parts = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts"))
    start = dict(Wide().named_parameters())
    for name, value in whole.model.items():
        assert torch.equal(value, parts.model[name]), name
        assert not torch.equal(value, start[name]), name


def test_a_resumed_optimizer_obeys_the_settings(tmp_path: Path) -> None:
    make(tmp_path, steps=1).train()
    rest = make(tmp_path, weight_decay=0.25, epsilon=1e-5, betas=(0.5, 0.6))
    rest.resume("latest")
    (group,) = rest.optimizer.param_groups
    assert (group["weight_decay"], group["eps"], group["betas"]) == (0.25, 1e-5, (0.5, 0.6))


def test_eight_bits_take_a_quarter_of_the_memory(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="in the extra large; see make test-large")
    sizes = {}
    for kind in ("adamw", "adamw-8bit"):
        make(tmp_path / kind, Wide(), kind=kind, steps=1).train()
        sizes[kind] = (list_checkpoints(tmp_path / kind)[-1] / "optimizer.pt").stat().st_size
    assert sizes["adamw-8bit"] < 0.3 * sizes["adamw"]


class TestClipping:
    def test_the_limit_starts_high_and_falls(self) -> None:
        clip = ClipSettings(norm=0.1, start_ratio=5.0, start_steps=10)
        assert [clip.limit(step, 1.0) for step in (0, 5)] == pytest.approx([0.5, 0.3])

    def test_an_abnormal_norm_lowers_it(self) -> None:
        clip = ClipSettings(norm=0.1, start_steps=10, abnormal_ratio=5.0)
        assert [clip.limit(10, norm) for norm in (0.4, 0.8, 100.0)] == pytest.approx([0.1, 0.0125, 0.01])
        assert replace(clip, abnormal_ratio=None).limit(10, 100.0) == 0.1

    def test_gradients_are_cut_to_it(self) -> None:
        weights = {name: nn.Parameter(torch.zeros(2)) for name in "abc"}
        weights["a"].grad, weights["b"].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        clip = ClipSettings(norm=1.0, start_steps=0, abnormal_ratio=None)
        assert clip_gradients(weights, clip, 0) == 5
        torch.testing.assert_close(weights["a"].grad, torch.tensor([0.6, 0.0]))
        assert clip_gradients(weights, replace(clip, norm=2.0), 0) == pytest.approx(1.0)
        torch.testing.assert_close(weights["b"].grad, torch.tensor([0.0, 0.8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 54), (54, 16)])
def test_muon_makes_singular_values_equal(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.linspace(0.01, 1, 54).view(-1, 1 if shape[0] == 54 else 54)
    made = orthogonalize(matrix, dtype=dtype)
    assert made.dtype == torch.float32
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.5
    assert values.max() < 1.3
    if dtype == torch.bfloat16:  # it does multiply in that
        assert 1e-4 < (made - orthogonalize(matrix)).norm() / made.norm() < 0.05


def test_muon_takes_steps_of_adamws_size_and_refuses_vectors() -> None:
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.ones(4, 2, 3, 3))
    optimizer = Muon([kernel], lr=0.1, weight_decay=0.5)
    kernel.grad = torch.randn(4, 2, 3, 3)
    optimizer.step()
    # An update's root mean square is 0.2 of the rate, after the decay of 5 %.
    change = kernel.detach() - 0.95
    assert change.square().mean().sqrt() == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.nn.Parameter(torch.ones(4))], lr=0.1)
