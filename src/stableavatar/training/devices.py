"""Where a process trains, and how it finds the others."""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from stableavatar.training.settings import TrainerSettings


def process_device(settings: TrainerSettings | None = None) -> torch.device:
    """Where this process trains, known before there is a trainer; of which `settings` are to be the
    trainer's."""
    wait = {} if settings is None else {"timeout": timedelta(minutes=settings.wait_minutes)}
    device: torch.device = PartialState(cpu=on_cpu(), backend=backend(), **wait).device
    return device


def on_cpu() -> bool:
    """Whether accelerate has to be told that there is nothing but a CPU."""
    # Unless told, processes on a CPU would not find each other; told, accelerate would not use DeepSpeed.
    return not torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def backend() -> str | None:
    """What processes talk by, where accelerate does not find it."""
    # DeepSpeed's processes on a CPU have to be told how to find each other.
    return None if torch.accelerator.is_available() or on_cpu() else "gloo"
