"""Where a process trains, and how it finds the others."""

import logging
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

from stableavatar.errors import InputError
from stableavatar.training.settings import TrainerSettings

logger = logging.getLogger(__name__)

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


def make_accelerator(settings: TrainerSettings, folder: Path) -> Accelerator:
    """Accelerate's part of a training, trackers in `folder`.

    Precision and accumulation are the settings', whatever `accelerate launch` says.

    Raises:
        InputError: it says another precision.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told != "no":
        raise InputError(
            f"mixed_precision {told} of accelerate launch would round otherwise than the recipe's "
            "trainer.precision says: set it to no in what it reads"
        )
    return Accelerator(
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulation),
        cpu=on_cpu(),
        log_with=list(settings.trackers) or None,
        project_dir=folder / "trackers",
        kwargs_handlers=[
            # A step in which no clip hears its speech leaves the adapter without a gradient. Gradients lie in
            # the buckets they are sent in, else they would lie there once more.
            DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(backend=backend(), timeout=timedelta(minutes=settings.wait_minutes)),
        ],
    )


def configure_deepspeed(
    accelerator: Accelerator, settings: TrainerSettings, *, pieces: int, spread: bool
) -> None:
    """The settings into what DeepSpeed was launched with.

    Args:
        pieces: micro-steps of a step on all processes. spread: whether parameters are (ZeRO-3).

    Raises:
        InputError: settings that it cannot carry out.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if settings.optimizer.kind == "adamw-8bit" and offload.get("device", "none") != "none":
        raise InputError("where DeepSpeed offloads the optimizer it takes an Adam of its own: use adamw")
    if settings.ema_decay and spread:
        raise InputError("averaged weights cannot be kept of parameters that ZeRO-3 spreads")
    # Weights and what the optimizer keeps stay float32, as everywhere.
    config["torch_autocast"] = {"enabled": settings.precision == "bf16", "dtype": "bfloat16"}
    config["train_micro_batch_size_per_gpu"] = settings.batch_size
    config["gradient_accumulation_steps"] = settings.accumulation
    config["train_batch_size"] = settings.batch_size * pieces
    config["gradient_clipping"] = settings.optimizer.clip.norm
    logger.info("DeepSpeed clips gradients to %g alone", settings.optimizer.clip.norm)
