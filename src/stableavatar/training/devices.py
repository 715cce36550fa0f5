"""Where a process trains, and how it finds the others."""

import logging
import time
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from stableavatar.training.settings import TrainerSettings

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

SLOW = 1.5
"""From here on bfloat16 is said to be slow."""


def process_device(settings: TrainerSettings | None = None) -> torch.device:
    """Where this process trains, known before there is a trainer; of which `settings` are to be the
    trainer's."""
    wait = {} if settings is None else {"timeout": timedelta(minutes=settings.wait_minutes)}
    state = PartialState(cpu=on_cpu(), backend=backend(), **wait)
    device: torch.device = state.device
    if settings is not None and settings.precision == "bf16" and state.is_main_process:
        times = bfloat16_slowness(device)
        if times > SLOW:
            logger.warning(
                "bfloat16 takes %.1f times as long as float32 on this processor: "
                "--set trainer.precision=fp32 is faster",
                times,
            )
    return device


def bfloat16_slowness(device: torch.device) -> float:
    """The time of matrix products in bfloat16, against float32: processors without instructions for it
    take several times as long. 0 where `device` is no processor: not measured."""
    if device.type != "cpu":
        return 0.0
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        tries = []
        for _ in range(4):  # the first also prepares
            start = time.perf_counter()
            matrix @ matrix
            tries.append(time.perf_counter() - start)
        seconds[dtype] = min(tries)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def on_cpu() -> bool:
    """Whether accelerate has to be told that there is nothing but a CPU."""
    # Unless told, processes on a CPU would not find each other; told, accelerate would not use DeepSpeed.
    return not torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def backend() -> str | None:
    """What processes talk by, where accelerate does not find it."""
    # DeepSpeed's processes on a CPU have to be told how to find each other.
    return None if torch.accelerator.is_available() or on_cpu() else "gloo"


def everywhere(value: Value) -> list[Value]:
    """Every process's value, by rank; called on all of them."""
    if PartialState().num_processes == 1:
        return [value]
    each: list[Value] = gather_object([value])
    return each


def anywhere(value: bool) -> bool:
    """Whether it is so on any process; called on all of them."""
    return any(everywhere(value))
