"""Where a process trains: processors that are slow in bfloat16 are told of."""

import logging

import pytest
import torch

from stableavatar.training import devices
from stableavatar.training.devices import bfloat16_slowness, process_device
from stableavatar.training.settings import TrainerSettings


@pytest.mark.parametrize(
    ("precision", "slowness", "told"), [("bf16", 7.5, True), ("bf16", 0.5, False), ("fp32", 7.5, False)]
)
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_processor_that_is_slow_in_bfloat16_is_told_of(
    precision: str,
    slowness: float,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(devices, "bfloat16_slowness", lambda device: slowness)
    with caplog.at_level(logging.WARNING):
        process_device(TrainerSettings(steps=1, precision=precision))
    assert ("bfloat16 takes 7.5 times as long" in caplog.text) == told
    assert ("trainer.precision=fp32" in caplog.text) == told


def test_slowness_is_measured_on_processors_alone() -> None:
    assert 0.01 < bfloat16_slowness(torch.device("cpu")) < 1000
    assert bfloat16_slowness(torch.device("cuda", 0)) == 0
