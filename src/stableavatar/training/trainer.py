"""The training loop: batches in, checkpoints and a log out. It knows nothing of video.

What is trained is a module whose `forward(batch, generator)` returns a `StepLoss`; every random number of a
step comes from the generator, which is made from the seed and the step's number. So a run that is killed and
resumed gives the same weights as one that was left alone, to the bit where the arithmetic is deterministic
(CPU).
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.data import DataLoader

from stableavatar.data.sampler import ClipKey, GroupedSampler
from stableavatar.errors import CheckpointError, InputError
from stableavatar.training.checkpoints import (
    TrainingState,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from stableavatar.training.ema import MovingAverage
from stableavatar.training.log import JsonLog, LossMeter
from stableavatar.training.objective import StepLoss
from stableavatar.training.parameters import trained_parameters

logger = logging.getLogger(__name__)

Sample = TypeVar("Sample")
SampleOut = TypeVar("SampleOut", covariant=True)
Precision = Literal["no", "bf16"]
Callback = Callable[[int], None]
OptimizerFactory = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainerSettings:
    """How the loop runs. The defaults are the published recipe's (spec 4, "Objective").

    Attributes:
        steps: optimizer steps at which the run is over.
        batch_size: clips a process and micro-step; `accumulation` micro-steps make an optimizer step.
        learning_rate: reached after `warmup_steps`, constant from then on; over the last `decay_steps` before
            `steps` it falls linearly towards 0.
        clip_norm: the gradient's norm is cut to it.
        ema_decay: of the moving average of the weights; 0 keeps none.
        precision: `bf16` runs the forward pass in autocast; weights and optimizer stay float32.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        minutes: stop (with a checkpoint) after so much time in this call; None: no limit.
        checkpoint_every: steps between checkpoints, of which the last `keep_checkpoints` stay.
        log_every: steps between lines of the log.
        callback_every: steps between calls of the callbacks.
        max_bad_steps: so many steps in a row with a loss or gradient that is not finite end the run; each is
            skipped and counted.
        workers: processes that read samples; 0 reads in the loop.
    """

    steps: int
    seed: int = 0
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 3e-2
    epsilon: float = 1e-10
    clip_norm: float = 0.05
    warmup_steps: int = 100
    decay_steps: int = 0
    ema_decay: float = 0.0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    minutes: float | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    log_every: int = 10
    callback_every: int = 500
    max_bad_steps: int = 10
    workers: int = 0

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1, "seed": 0, "batch_size": 1, "accumulation": 1, "warmup_steps": 0, "checkpoint_every":
            1, "keep_checkpoints": 1, "log_every": 1, "callback_every": 1, "max_bad_steps": 1, "workers": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "epsilon", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if self.precision not in get_args(Precision):
            raise InputError(
                f"precision must be one of {', '.join(get_args(Precision))}, not {self.precision!r}"
            )
        if self.minutes is not None and self.minutes <= 0:
            raise InputError(f"minutes must be above 0, not {self.minutes}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainerSettings":
        """Settings from names and values.

        Raises:
            InputError: an unknown or missing name, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"unknown training settings: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        if "steps" not in values:
            raise InputError("the training settings need steps")
        return cls(**values)


class SampleSource(Protocol[SampleOut]):
    """A data set whose samples are asked for by clip and pass, and which says what may share a batch."""

    @property
    def groups(self) -> Sequence[Any]:
        """For each clip, what it may be batched with."""
        ...

    def __getitem__(self, key: ClipKey) -> SampleOut:
        """Sample of clip `key[0]` in pass `key[1]`."""
        ...


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: steps done, bad steps skipped, the last checkpoint."""

    step: int
    skipped_steps: int
    checkpoint: Path


def learning_rate(settings: TrainerSettings, step: int) -> float:
    """The rate of step `step`, counted from 0."""
    rising = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    falling = min(1.0, (settings.steps - step) / (settings.decay_steps + 1))
    return settings.learning_rate * min(rising, falling)


class Trainer(Generic[Sample]):
    """Trains a module on a data set, in a folder of its own.

    Args:
        module: `forward(batch, generator) -> StepLoss`. Parameters that do not need gradients stay as they
            are and are not saved.
        source: the data set; `collate` makes a batch of a list of its samples.
        folder: for checkpoints and `log.jsonl`.
        optimizer: makes the optimizer from the trained parameters by name; its rate is set at every step. By
            default AdamW as the settings say.
        callbacks: called with the number of steps done every `settings.callback_every` steps, with the
            averaged weights in place where there are any; they cannot disturb the run's random numbers.

    Started by `torchrun` or `accelerate launch`, several processes share every step's clips and its gradient;
    the first of them writes.

    Raises:
        InputError: gradient checkpointing without a model that knows it, no clips, or fewer than processes.
    """

    def __init__(
        self,
        module: nn.Module,
        source: SampleSource[Sample],
        collate: Callable[[list[Sample]], Any],
        settings: TrainerSettings,
        folder: Path,
        *,
        optimizer: OptimizerFactory | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.source = source
        self.collate = collate
        self.callbacks = tuple(callbacks)
        self.step = 0
        self.skipped_steps = 0
        self._bad_in_a_row = 0
        self._stop = False
        self._meter = LossMeter()
        self.accelerator = Accelerator(
            mixed_precision=settings.precision,
            gradient_accumulation_steps=settings.accumulation,
            cpu=not torch.accelerator.is_available(),  # else processes on a CPU would not find each other
            # A step in which no clip hears its speech leaves the adapter without a gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if settings.gradient_checkpointing:
            _enable_gradient_checkpointing(module)
        self.sampler = GroupedSampler(
            source.groups,
            settings.batch_size,
            settings.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.parameters = trained_parameters(module)
        made = (optimizer or self._adamw)(self.parameters)
        self.module, self.optimizer = self.accelerator.prepare(module, made)
        self.ema = MovingAverage(self.parameters, settings.ema_decay) if settings.ema_decay else None

    def _adamw(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.AdamW(
            parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def request_stop(self) -> None:
        """End after the step that is running, with a checkpoint; may be called from a signal handler."""
        self._stop = True

    def resume(self, checkpoint: Path | Literal["latest"], *, new_data: bool = False) -> None:
        """Go on from a checkpoint of this run's folder, or from a given one.

        Args:
            new_data: the data set, the batch and the number of processes may be others; the order begins anew
                at the step's number.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another model.
            InputError: the seed, the batch or the data set are not the checkpoint's.
        """
        if checkpoint == "latest":
            found = list_checkpoints(self.folder)
            if not found:
                raise CheckpointError(f"{self.folder} holds no complete checkpoint to resume from")
            checkpoint = found[-1]
        state = load_checkpoint(checkpoint)
        counters = state.counters
        different = [
            name for name, value in self._identity().items() if counters["identity"].get(name) != value
        ]
        if different and not (new_data and "seed" not in different):
            raise InputError(
                f"{checkpoint} was trained with another {', '.join(different)}; it cannot be resumed exactly"
            )
        self._load_parameters(state, checkpoint)
        self.optimizer.load_state_dict(state.optimizer)
        set_random_state(state.random)
        self.step = counters["step"]
        self.skipped_steps = counters["skipped_steps"]
        self._bad_in_a_row = counters["bad_in_a_row"]
        self._meter = LossMeter(counters["meter"])
        logger.info("resumed from %s at step %d", checkpoint, self.step)

    def train(self) -> TrainingResult:
        """Run until `settings.steps`, `settings.minutes` or `request_stop`.

        Raises:
            InputError: a sample cannot be read; `max_bad_steps` steps in a row were not finite (the last
                checkpoint is from before them); the folder holds checkpoints of later steps than this run's.
        """
        settings = self.settings
        later = [path for path in list_checkpoints(self.folder) if checkpoint_step(path) > self.step]
        if later:
            raise InputError(
                f"{self.folder} holds checkpoints up to {later[-1].name}, and this run stands at step "
                f"{self.step}: resume from the latest, remove the later ones, or choose another folder"
            )
        log = JsonLog(self.folder / "log.jsonl", self.step) if self.accelerator.is_main_process else None
        deadline = time.monotonic() + 60 * settings.minutes if settings.minutes is not None else None
        batches = self._batches()
        self.module.train()
        saved, log_step, log_time = -1, self.step, time.monotonic()
        while self.step < settings.steps:
            late = deadline is not None and time.monotonic() >= deadline
            if self._anywhere(self._stop or late):
                break
            norm, rate, clips = self._optimizer_step(batches)
            if self.step % settings.log_every == 0:
                seconds = time.monotonic() - log_time
                if log is not None:
                    log.write(
                        {
                            "step": self.step,
                            **self._meter.means(),
                            "learning_rate": rate,
                            "gradient_norm": norm,
                            "skipped_steps": self.skipped_steps,
                            "clips_per_second": round(clips * (self.step - log_step) / seconds, 3),
                        }
                    )
                self._meter, log_step, log_time = LossMeter(), self.step, time.monotonic()
            aside = time.monotonic()
            # Only the first process may have callbacks; the others wait for it all the same.
            several = self.accelerator.num_processes > 1
            if (self.callbacks or several) and self.step % settings.callback_every == 0:
                self._call_back()
            if self.step % settings.checkpoint_every == 0 and not self._bad_in_a_row:
                self.save()
                saved = self.step
            log_time += time.monotonic() - aside
        if saved != self.step:
            self.save()
        return TrainingResult(self.step, self.skipped_steps, list_checkpoints(self.folder)[-1])

    def close(self) -> None:
        """Leave the group of processes; the module can be used on, the trainer cannot.

        What wraps the module goes first. Were it the last to hold the group, it would end the group's threads
        while it holds Python's lock, and a thread that wants the lock to let go of a tensor would never end
        (pytorch issue 56297): seen as a process that hangs at its end, in one run of ten on a busy machine.
        """
        self.module = self.accelerator.unwrap_model(self.module)
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def save(self) -> Path:
        """Write a checkpoint of the state as it is; the first process does, the others wait for it."""
        path = self._write_checkpoint() if self.accelerator.is_main_process else self.folder
        self.accelerator.wait_for_everyone()
        return path

    def _write_checkpoint(self) -> Path:
        state = TrainingState(
            model=self.parameters,
            ema=self.ema.state if self.ema else None,
            optimizer=self.optimizer.state_dict(),
            random=random_state(),
            counters={
                "step": self.step,
                "skipped_steps": self.skipped_steps,
                "bad_in_a_row": self._bad_in_a_row,
                "ema_updates": self.ema.updates if self.ema else 0,
                "meter": self._meter.state,
                "identity": self._identity(),
                "settings": dataclasses.asdict(self.settings),
            },
        )
        return save_checkpoint(self.folder, self.step, state, self.settings.keep_checkpoints)

    def _optimizer_step(self, batches: Iterator[Any]) -> tuple[float, float, int]:
        """One optimizer step; its gradient norm, learning rate and number of clips."""
        settings = self.settings
        rate = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        results: list[StepLoss] = []
        norm = torch.tensor(0.0)
        for micro_step in range(settings.accumulation):
            batch = next(batches)
            with self.accelerator.accumulate(self.module):
                result: StepLoss = self.module(batch, self._generator(micro_step))
                self.accelerator.backward(result.loss)
                results.append(result)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.parameters.values(), settings.clip_norm)
        self.step += 1
        errors, sigmas = self._gathered(results)
        if torch.isfinite(norm) and torch.isfinite(errors).all():
            self.optimizer.step()
            if self.ema:
                self.ema.update()
            self._meter.add(errors.tolist(), sigmas.tolist())
            self._bad_in_a_row = 0
        else:
            self.skipped_steps += 1
            self._bad_in_a_row += 1
            logger.warning("step %d skipped: its loss or gradient is not finite", self.step)
        self.optimizer.zero_grad()
        if self._bad_in_a_row >= settings.max_bad_steps:
            raise InputError(
                f"{self._bad_in_a_row} steps in a row up to step {self.step} were not finite; lower "
                f"the learning rate, or look at the data. Good checkpoints are in {self.folder}"
            )
        return float(norm), rate, len(errors)

    def _gathered(self, results: Sequence[StepLoss]) -> tuple[torch.Tensor, torch.Tensor]:
        """Error and sigma of every clip of a step, of all processes."""
        errors = torch.cat([result.per_clip for result in results])
        sigmas = torch.cat([result.sigma for result in results])
        if self.accelerator.num_processes == 1:
            return errors, sigmas
        everyone: list[tuple[torch.Tensor, torch.Tensor]] = gather_object([(errors.cpu(), sigmas.cpu())])
        return torch.cat([pair[0] for pair in everyone]), torch.cat([pair[1] for pair in everyone])

    def _anywhere(self, value: bool) -> bool:
        """Whether it is so on any process: all of them must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return value
        return any(gather_object([value]))

    def _generator(self, micro_step: int) -> torch.Generator:
        place = (self.settings.seed, self.step, micro_step)
        rank = self.accelerator.process_index
        words = np.random.SeedSequence((*place, rank) if rank else place).generate_state(2)
        return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))

    def _batches(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.source,  # type: ignore[arg-type]
            batch_sampler=_Batches(self.sampler, self.step * self.settings.accumulation),
            collate_fn=self.collate,
            num_workers=self.settings.workers,
            # The loader seeds its workers from here, not from the generators that a checkpoint keeps.
            generator=torch.Generator().manual_seed(self.settings.seed),
        )
        return iter(loader)

    def _call_back(self) -> None:
        kept = random_state()
        self.module.eval()
        try:
            if self.ema:
                with self.ema.applied():
                    self._run_callbacks()
            else:
                self._run_callbacks()
        finally:
            self.module.train()
            set_random_state(kept)

    def _run_callbacks(self) -> None:
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                callback(self.step)
        self.accelerator.wait_for_everyone()

    def _load_parameters(self, state: TrainingState, checkpoint: Path) -> None:
        expected = {name: tuple(value.shape) for name, value in self.parameters.items()}
        found = {name: tuple(value.shape) for name, value in state.model.items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise CheckpointError(f"{checkpoint} belongs to another model: see {wrong[0]} {wrong[1]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.model[name])
        if self.ema:
            if state.ema is None:
                raise CheckpointError(f"{checkpoint} has no averaged weights; train with ema_decay=0")
            self.ema.load(state.ema, state.counters["ema_updates"])

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "accumulation": settings.accumulation,
            "clips": len(self.source.groups),
            "processes": self.accelerator.num_processes,
        }


class _Batches:
    """The sampler's batches from one on, as DataLoader wants them."""

    def __init__(self, sampler: GroupedSampler, first: int) -> None:
        self.sampler = sampler
        self.first = first

    def __iter__(self) -> Iterator[list[ClipKey]]:
        return self.sampler.from_batch(self.first)


def _enable_gradient_checkpointing(module: nn.Module) -> None:
    # Only diffusers' models: transformers' encoders are frozen or small.
    models = [part for part in module.modules() if isinstance(part, ModelMixin)]
    if not models:
        raise InputError("gradient_checkpointing was asked for, but no part of the model supports it")
    for model in models:
        model.enable_gradient_checkpointing()
