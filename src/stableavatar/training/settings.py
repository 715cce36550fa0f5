"""How the training loop runs."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from stableavatar.errors import InputError
from stableavatar.training.optimizers import OptimizerSettings

Precision = Literal["fp32", "bf16"]
Sharding = Literal["none", "fsdp2"]
Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class TrainerSettings:
    """How the loop runs. The defaults are the published recipe's (spec 4, "Objective").

    Attributes:
        steps: optimizer steps at which the run is over.
        seed: of the order of the clips, of the noise and of what is dropped.
        batch_size: clips a process and micro-step.
        accumulation: micro-steps that make an optimizer step.
        optimizer: which one, its rate and its limits.
        ema_decay: of the moving average of the weights, which is then the result; 0 keeps none.
        precision: `bf16` runs the forward pass in autocast, and Muon multiplies in it; weights and what an
            optimizer keeps stay float32. `fp32` is for processors that have no instructions for bfloat16.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        compile: compile the model's repeated blocks (torch.compile); the first steps take minutes, and on a
            CPU a C++ compiler is needed.
        sharding: `fsdp2` spreads parameters, gradients and optimizer over the processes; `none` leaves that
            to what `accelerate launch` was told.
        minutes: stop (with a checkpoint) after so much time in this call; None: no limit.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: so many of the last ones stay, the others are removed.
        log_every: steps between lines of the log.
        trackers: who gets the log's lines beside the file, in the folder `trackers`.
        callback_every: steps between validation videos (from Python: between calls of the callbacks).
        max_bad_steps: so many steps in a row with a loss or gradient that is not finite end the run; each is
            skipped and counted.
        workers: processes that read samples; 0 reads in the loop.
        wait_minutes: how long a process waits for another before it gives up: longer than the validation
            videos take, which the first makes alone where every process has the whole model.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    steps: int
    seed: int = 0
    batch_size: int = 1
    accumulation: int = 1
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ema_decay: float = 0.0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    sharding: Sharding = "none"
    minutes: float | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    log_every: int = 10
    trackers: tuple[Tracker, ...] = ()
    callback_every: int = 500
    max_bad_steps: int = 10
    workers: int = 0
    wait_minutes: float = 120.0

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1, "seed": 0, "batch_size": 1, "accumulation": 1, "checkpoint_every": 1,
            "keep_checkpoints": 1, "log_every": 1, "callback_every": 1, "max_bad_steps": 1, "workers": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2**63, not {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        for name, choices in (("precision", get_args(Precision)), ("sharding", get_args(Sharding))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for tracker in self.trackers:
            if tracker not in get_args(Tracker):
                raise InputError(f"trackers are {', '.join(get_args(Tracker))}; {tracker!r} is none")
        for name in ("minutes", "wait_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}")
