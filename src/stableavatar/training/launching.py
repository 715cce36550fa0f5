"""What `accelerate launch` and DeepSpeed were told, brought in line with the settings of a training."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from stableavatar.errors import InputError
from stableavatar.training.devices import backend, on_cpu
from stableavatar.training.optimizers import ClipSettings
from stableavatar.training.settings import TrainerSettings


def make_accelerator(settings: TrainerSettings, folder: Path) -> Accelerator:
    """Accelerate's part of a training, trackers in `folder`.

    Precision and accumulation are the settings', whatever `accelerate launch` says.

    Raises:
        InputError: it says another precision, or spreads the model as well as the settings do.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told != "no":
        raise InputError(
            f"mixed_precision {told} of accelerate launch would round otherwise than the recipe's "
            "trainer.precision says: set it to no in what it reads"
        )
    accelerator = Accelerator(
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
    both = settings.sharding == "fsdp2" and accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
    )
    if both:
        raise InputError("with what accelerate launch was told, give --set trainer.sharding=none")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            "accelerate launch says version 1 of FSDP, whose parts of gradients would be clipped each by its "
            "own norm: give fsdp_version 2, or leave it out and give --set trainer.sharding=fsdp2"
        )
    return accelerator


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
    # Of modules that it calls safe it would sum gradients, and with ZeRO-3 send weights, in bfloat16.
    config["torch_autocast"] = {
        "enabled": settings.precision == "bf16",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    config["train_micro_batch_size_per_gpu"] = settings.batch_size
    config["gradient_accumulation_steps"] = settings.accumulation
    config["train_batch_size"] = settings.batch_size * pieces
    config["gradient_clipping"] = settings.optimizer.clip.norm  # until `follow_clip_rules`


def follow_clip_rules(engine: Any, clip: ClipSettings, step: Callable[[], int]) -> None:
    """Have DeepSpeed's ZeRO optimizer clip by the settings' rules for the start and for abnormal norms.

    It clips within its own step, to a fixed limit: that limit is set from the norm once this is known.

    Args:
        engine: what DeepSpeed made of the module. step: the number of the step that is running.

    Raises:
        InputError: DeepSpeed's optimizer has no such place (no ZeRO stage, or another version).
    """
    if not (clip.start_steps or clip.abnormal_ratio is not None):
        return  # its own limit is the only one
    optimizer = engine.optimizer
    clip_gradients = getattr(optimizer, "unscale_and_clip_grads", None)
    if clip_gradients is None or not hasattr(optimizer, "clip_grad"):
        raise InputError(
            f"{type(optimizer).__name__} of this DeepSpeed does not clip gradients by the recipe's rules: "
            "launch with a ZeRO stage of 1 to 3"
        )

    def clip_by_rules(gradients: Any, norm: Any) -> None:
        optimizer.clip_grad = clip.limit(step(), float(norm) / optimizer.loss_scale)
        clip_gradients(gradients, norm)

    optimizer.unscale_and_clip_grads = clip_by_rules
