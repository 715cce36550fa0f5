"""The training loop: batches in, checkpoints and a log out. It knows nothing of video.

What is trained is a module whose `forward(batch, generator)` returns a `StepLoss`; every random number of a
step comes from the generator, which is made from the seed, the step's number and the piece of it. So a run
that is killed and resumed gives the same weights as one that was left alone, to the bit where the arithmetic
is deterministic (CPU), and two processes train what one does with twice the accumulation.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn

from stableavatar.data.sampler import GroupedSampler
from stableavatar.errors import CheckpointError, InputError
from stableavatar.placement.sharding import shard_module
from stableavatar.training.checkpoints import (
    CheckpointWriter,
    checkpoint_step,
    list_checkpoints,
    load_counters,
    load_random,
    random_file,
    random_state,
    set_random_state,
)
from stableavatar.training.devices import anywhere, everywhere
from stableavatar.training.efficiency import compile_blocks, enable_gradient_checkpointing
from stableavatar.training.ema import MovingAverage
from stableavatar.training.launching import configure_deepspeed, follow_clip_rules, make_accelerator
from stableavatar.training.loader import SampleSource, check_same_clips, open_batches
from stableavatar.training.log import (
    JsonLog,
    LossMeter,
    check_trackers,
    finite,
    flat,
    plain,
    setting_changes,
    tracker_arguments,
)
from stableavatar.training.objective import StepLoss
from stableavatar.training.optimizers import clip_gradients, make_optimizer, set_constants, set_rate
from stableavatar.training.parameters import frozen_state, is_finite, trained_parameters
from stableavatar.training.run_folder import RunFolder
from stableavatar.training.run_state import DeepSpeedState, RunState, ShardedState, WholeState
from stableavatar.training.settings import TrainerSettings

logger = logging.getLogger(__name__)

Sample = TypeVar("Sample")
Callback = Callable[[int], None]

PROJECT = "stableavatar"


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: steps done, bad steps skipped, the last checkpoint."""

    step: int
    skipped_steps: int
    checkpoint: Path


class Trainer(Generic[Sample]):
    """Trains a module on a data set, in a folder of its own.

    Args:
        module: `forward(batch, generator) -> StepLoss`. Parameters that do not need gradients stay as they
            are and are not saved.
        source: the data set; `collate` makes a batch of a list of its samples.
        folder: for checkpoints and `log.jsonl`.
        prepare: makes of a batch, in the loop's own process, what the module takes on a device.
        identity: what of the module no checkpoint holds, in names and values: a run resumes only with the
            same.
        callbacks: called with the number of steps done every `settings.callback_every` steps, with the
            averaged weights in place where there are any; they cannot disturb the run's random numbers. Where
            the model is spread over processes all of them call, else the first.
        record: all settings of the training, for trackers and checkpoints: a run that goes on with others
            says so. The trainer's alone, if None.

    Started by `torchrun` or `accelerate launch`, several processes share every step's clips and its gradient;
    the first of them writes.

    Raises:
        InputError: settings that cannot be together, a package that is missing, or no clips.
    """

    def __init__(
        self,
        module: nn.Module,
        source: SampleSource[Sample],
        collate: Callable[[list[Sample]], Any],
        settings: TrainerSettings,
        folder: Path,
        *,
        prepare: Callable[[Any, torch.device], Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        callbacks: Iterable[Callback] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.source = source
        self.collate = collate
        self.prepare = prepare
        self.identity = dict(identity or {})
        self.callbacks = tuple(callbacks)
        self._record = plain(record or {"trainer": dataclasses.asdict(settings)})
        self.step = self.skipped_steps = self._bad_in_a_row = 0
        self._stop = False
        self._meter = LossMeter()
        check_trackers(settings.trackers)
        self.accelerator = make_accelerator(settings, folder)
        self.run_folder = RunFolder(folder, leads=self.accelerator.is_main_process)
        check_same_clips(source)
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(module)
        if settings.compile:
            compile_blocks(module)
        self.sampler = GroupedSampler(
            source.groups,
            settings.batch_size,
            settings.seed,
            accumulation=settings.accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.module, self.optimizer = self._prepare(module)
        self.parameters = trained_parameters(self.accelerator.unwrap_model(self.module))
        self.ema = MovingAverage(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self._state = self._run_state()

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed reduces gradients and takes the optimizer's steps."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def spread(self) -> bool:
        """Whether a process has only its part of the parameters."""
        if self.deepspeed:
            return self.accelerator.deepspeed_plugin.zero_stage == 3
        return self.settings.sharding == "fsdp2" or self.accelerator.distributed_type == DistributedType.FSDP

    def _prepare(self, module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Module and optimizer as this number of processes needs them."""
        settings, accelerator = self.settings, self.accelerator
        if settings.optimizer.kind == "muon" and (self.spread or self.deepspeed):
            raise InputError("muon needs whole matrices: use adamw with DeepSpeed, and with sharding")
        if settings.sharding == "fsdp2":
            shard_module(module, accelerator.device)
            return module, make_optimizer(settings.optimizer, trained_parameters(module))
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        optimizer = make_optimizer(settings.optimizer, trained_parameters(module), dtype)
        if self.deepspeed:
            configure_deepspeed(accelerator, settings, pieces=self.sampler.pieces, spread=self.spread)
        module, optimizer = accelerator.prepare(module, optimizer)
        if self.deepspeed:
            follow_clip_rules(module, settings.optimizer.clip, lambda: self.step)
        return module, optimizer

    def _run_state(self) -> RunState:
        leads = self.accelerator.is_main_process
        if self.deepspeed:
            return DeepSpeedState(self.module, self.ema, leads=leads)
        if self.spread:
            module = self.accelerator.unwrap_model(self.module)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            return ShardedState(module, self.parameters, self.ema, optimizer)
        return WholeState(self.parameters, self.ema, self.optimizer, leads=leads)

    def request_stop(self) -> None:
        """End after the step that is running, with a checkpoint; may be called from a signal handler."""
        self._stop = True

    def resume(self, checkpoint: Path | Literal["latest"], *, new_data: bool = False) -> None:
        """Go on from a checkpoint of this run's folder, or from a given one.

        Args:
            new_data: the data set, the batch and the number of processes may be others (the seed, the kind of
                optimizer and the `identity` may not, nor with DeepSpeed the number of processes); the order
                begins anew at the step's number.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another model.
            InputError: the seed, the optimizer, the batch or the data set are not the checkpoint's.
        """
        if checkpoint == "latest":
            found = self.checkpoints()
            if not found:
                raise CheckpointError(f"{self.folder} holds no complete checkpoint to resume from")
            checkpoint = found[-1]
        counters = load_counters(checkpoint, ("identity", "step", "skipped_steps", "bad_in_a_row", "meter"))
        changes = setting_changes(counters.get("record", self._record), self._record)
        if changes:
            logger.warning("goes on from %s with other settings: %s", checkpoint, "; ".join(changes))
        stored = counters["identity"]
        different = [name for name, value in self._identity().items() if stored.get(name, value) != value]
        never = bool({"seed", "optimizer", *self.identity} & set(different))
        if different and (never or not new_data):
            raise InputError(
                f"{checkpoint} was trained with another {', '.join(different)}; it cannot be resumed exactly "
                + ("" if never else "(--new-data goes on all the same)")
            )
        if self.deepspeed and stored["processes"] != self.accelerator.num_processes:
            raise InputError(f"{checkpoint} is of {stored['processes']} processes: DeepSpeed needs as many")
        self._state.load(checkpoint)
        set_constants(self.optimizer, self.settings.optimizer)
        generators = load_random(checkpoint, self.accelerator.process_index)
        if generators is not None:
            set_random_state(generators)
        self.step = counters["step"]
        self.skipped_steps = counters["skipped_steps"]
        self._bad_in_a_row = counters["bad_in_a_row"]
        self._meter = LossMeter(counters["meter"])
        steps = everywhere(self.step)
        if len(set(steps)) > 1:
            raise InputError(
                f"{checkpoint} is of other steps on other processes ({steps}): they need one storage"
            )
        logger.info("resumed from %s at step %d", checkpoint, self.step)

    def checkpoints(self) -> list[Path]:
        """Complete ones of the folder, oldest first, as the first process sees them: storage that machines
        share may show them to one sooner than to another."""
        found: list[list[Path]] = broadcast_object_list([list_checkpoints(self.folder)])
        return found[0]

    def train(self) -> TrainingResult:
        """Run until `settings.steps`, `settings.minutes` or `request_stop`.

        Raises:
            InputError: a sample cannot be read; `max_bad_steps` steps in a row, or all there were, were not
                finite; weights are not; the folder holds checkpoints of later steps than this run's, another
                run is in it, or processes do not share it.
        """
        with self.run_folder.held():
            return self._train_in_folder()

    def _train_in_folder(self) -> TrainingResult:
        settings = self.settings
        later = [path for path in self.checkpoints() if checkpoint_step(path) > self.step]
        if later:
            raise InputError(
                f"{self.folder} holds checkpoints up to {later[-1].name}, and this run stands at step "
                f"{self.step}: resume from the latest, remove the later ones, or choose another folder"
            )
        leads = self.accelerator.is_main_process
        deadline = time.monotonic() + 60 * settings.minutes if settings.minutes is not None else None
        log = JsonLog(self.folder / "log.jsonl", self.step, settings.steps, deadline) if leads else None
        if settings.trackers:
            start = tracker_arguments(self.folder / "trackers", self.step) if leads else {}
            self.accelerator.init_trackers(PROJECT, flat(self._record), init_kwargs=start)
        with open_batches(
            self.source,
            self.collate,
            self.sampler,
            step=self.step,
            seed=settings.seed,
            readers=settings.workers,
        ) as batches:
            self._train(batches, log, deadline)
        if self.step and self.skipped_steps == self.step:
            raise InputError(
                f"none of {self.step} steps was taken: no loss or gradient was finite. Look at the data, or "
                "lower the learning rate"
            )
        return TrainingResult(self.step, self.skipped_steps, self.checkpoints()[-1])

    def _train(self, batches: Iterator[Any], log: JsonLog | None, deadline: float | None) -> None:
        """The loop, and a checkpoint at its end."""
        settings = self.settings
        self.module.train()
        # A run that stands at its checkpoint need not write that again.
        saved = self.step if self.step in map(checkpoint_step, self.checkpoints()) else -1
        begun = self.step
        trained, log_time = 0, time.monotonic()
        while self.step < settings.steps:
            late = deadline is not None and time.monotonic() >= deadline
            if anywhere(self._stop or late):
                break
            rate, clips = self._optimizer_step(batches)
            trained += clips
            if self.step % settings.log_every == 0:
                seconds = time.monotonic() - log_time
                line = {
                    **self._meter.means(),
                    "learning_rate": rate,
                    "skipped_steps": self.skipped_steps,
                    "clips_per_second": round(trained / seconds, 3),
                    "stand_ins": sum(everywhere(getattr(self.source, "stand_ins", 0))),
                }
                if log is not None:
                    log.write({"step": self.step, **line})
                self.accelerator.log(finite(line), step=self.step)
                self._meter, trained, log_time = LossMeter(), 0, time.monotonic()
            aside = time.monotonic()
            # Before the callbacks: one that fails must not take the steps since the last checkpoint with it.
            # What falls on a bad step comes after the next good one.
            every = settings.checkpoint_every
            if self.step // every > max(saved, begun) // every and not self._bad_in_a_row:
                self.save()
                saved = self.step
            # Only the first process may have callbacks; the others wait for it all the same.
            several = self.accelerator.num_processes > 1
            if (self.callbacks or several) and self.step % settings.callback_every == 0:
                self._call_back()
            log_time += time.monotonic() - aside
        if saved != self.step:
            self.save()

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
        """Write a checkpoint of the state as it is; called on every process.

        Raises:
            InputError: a weight is not finite; what was saved before stays.
        """
        accelerator = self.accelerator
        kept = [*self.parameters.values(), *(self.ema.state.values() if self.ema else ())]
        if anywhere(not all(map(is_finite, kept))):
            raise InputError(
                f"weights are no longer finite at step {self.step}, which is not saved: go on from a "
                f"checkpoint in {self.folder} with a lower learning rate"
            )
        writer = CheckpointWriter(self.folder, self.step)
        if accelerator.is_main_process:
            writer.begin()
        accelerator.wait_for_everyone()
        self._state.save(writer)
        writer.write_object(random_file(accelerator.process_index), random_state())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            counters = {
                "step": self.step,
                "skipped_steps": self.skipped_steps,
                "bad_in_a_row": self._bad_in_a_row,
                "ema_updates": self.ema.updates if self.ema else 0,
                "meter": self._meter.state,
                "identity": self._identity(),
                "record": self._record,
            }
            writer.finish(counters, self.settings.keep_checkpoints)
        accelerator.wait_for_everyone()
        return writer.final

    def final_parameters(self, *, average: bool = True) -> dict[str, torch.Tensor]:
        """Trained parameters by name, whole, float32 and on the CPU: their average, where one is kept and
        wanted. Called on every process; all but the first get none."""
        values = self.ema.state if self.ema and average else self.parameters
        return self._kept(values, torch.float32)

    def frozen_state(self) -> dict[str, torch.Tensor]:
        """Everything of the module's state that is not trained, by name, whole and on the CPU; a trained
        parameter's second name is left out. Called on every process; all but the first get nothing."""
        return self._kept(frozen_state(self.accelerator.unwrap_model(self.module), self.parameters))

    def _kept(
        self, values: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """All processes put a tensor together, one after the other, and only the first keeps them."""
        kept = {}
        for name, value in values.items():
            whole = self._state.whole(value)
            if self.accelerator.is_main_process:
                kept[name] = whole.detach().to("cpu", dtype)
        return kept

    def _optimizer_step(self, batches: Iterator[Any]) -> tuple[float, int]:
        """One optimizer step; its learning rate and number of clips."""
        settings = self.settings
        rate = settings.optimizer.rate(self.step, settings.steps)
        set_rate(self.optimizer, rate)
        results: list[StepLoss] = []
        for micro_step in range(settings.accumulation):
            batch = next(batches)
            if self.prepare is not None:
                batch = self.prepare(batch, self.accelerator.device)
            with self.accelerator.accumulate(self.module):
                with self._autocast():
                    result: StepLoss = self.module(batch, self._generator(micro_step))
                weight = self.sampler.weight(self.step, micro_step)
                if weight:
                    results.append(result)
                if self.deepspeed and micro_step == settings.accumulation - 1:
                    # It takes its step in this pass, unless a gradient is not finite.
                    bad = anywhere(not all(one.per_clip.isfinite().all() for one in results))
                    weight = math.nan if bad else weight
                self.accelerator.backward(result.loss * weight)
        engine: Any = self.module if self.deepspeed else None
        taken = engine is not None and engine.was_step_applied()  # by its backward pass, or left out
        if engine is not None:
            norm = torch.tensor(float(engine.get_global_grad_norm() or 0.0) if taken else torch.inf)
        else:
            norm = clip_gradients(self.parameters, settings.optimizer.clip, self.step)
        self.step += 1
        errors, sigmas = self._gathered(results)
        if torch.isfinite(norm) and torch.isfinite(errors).all():
            self.optimizer.step()  # does nothing where DeepSpeed has done it
            if self.ema:
                self.ema.update()
            self._meter.add(errors.tolist(), sigmas.tolist(), float(norm))
            self._bad_in_a_row = 0
        elif taken:
            raise InputError(
                f"step {self.step} was not finite, and DeepSpeed has taken it: go on from the last "
                f"checkpoint in {self.folder} with a lower learning rate, or look at the data"
            )
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
        return rate, len(errors)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        enabled = self.settings.precision == "bf16"
        # Without its cache, which would keep a second copy of all weights until the end of the pass.
        return torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False
        )

    def _gathered(self, results: Sequence[StepLoss]) -> tuple[torch.Tensor, torch.Tensor]:
        """Error and sigma of every clip of a step, of all processes."""
        nothing = torch.zeros(0, device=self.accelerator.device)
        errors = torch.cat([nothing, *(result.per_clip for result in results)])
        sigmas = torch.cat([nothing, *(result.sigma for result in results)])
        if self.accelerator.num_processes == 1:
            return errors, sigmas
        everyone = everywhere((errors.cpu(), sigmas.cpu()))
        return torch.cat([pair[0] for pair in everyone]), torch.cat([pair[1] for pair in everyone])

    def _generator(self, micro_step: int) -> torch.Generator:
        piece = self.sampler.piece(micro_step)
        words = np.random.SeedSequence((self.settings.seed, self.step, piece)).generate_state(2)
        return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))

    def _call_back(self) -> None:
        kept = random_state()
        self.module.eval()
        try:
            with self.ema.applied() if self.ema else contextlib.nullcontext():
                if self.accelerator.is_main_process or self.spread:
                    for callback in self.callbacks:
                        callback(self.step)
                self.accelerator.wait_for_everyone()
        finally:
            self.module.train()
            set_random_state(kept)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "optimizer": settings.optimizer.kind,
            "batch_size": settings.batch_size,
            "accumulation": settings.accumulation,
            "clips": self.source.fingerprint,
            "processes": self.accelerator.num_processes,
            **self.identity,
        }
