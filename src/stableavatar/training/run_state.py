"""Weights and optimizer of a run into a checkpoint and back: whole, spread over processes, or DeepSpeed's."""

import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from stableavatar.errors import CheckpointError
from stableavatar.training.checkpoints import (
    EMA_FILE,
    CheckpointWriter,
    load_average,
    load_checkpoint,
    load_counters,
)
from stableavatar.training.ema import MovingAverage


class RunState(Protocol):
    """Called on every process, at the same time."""

    def save(self, writer: CheckpointWriter) -> None:
        """Write into the checkpoint that is begun."""
        ...

    def load(self, path: Path) -> None:
        """Read a checkpoint into model, average and optimizer.

        Raises:
            CheckpointError: it is damaged, or belongs to another model.
        """
        ...

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        """A weight of the module or of the average, put together of its parts on all processes."""
        ...


class WholeState:
    """Every process has everything; the first one writes.

    Args:
        parameters: trained ones, by name. ema: their average, if one is kept.
        leads: whether this is the first process.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        ema: MovingAverage | None,
        optimizer: torch.optim.Optimizer,
        *,
        leads: bool,
    ) -> None:
        self.parameters, self.ema, self.optimizer, self.leads = parameters, ema, optimizer, leads

    def save(self, writer: CheckpointWriter) -> None:
        if not self.leads:
            return
        writer.write_tensors("model.safetensors", self.parameters)
        if self.ema is not None:
            writer.write_tensors(EMA_FILE, self.ema.state)
        writer.write_object("optimizer.pt", self.optimizer.state_dict())

    def load(self, path: Path) -> None:
        state = load_checkpoint(path, average=False)
        expected = {name: tuple(value.shape) for name, value in self.parameters.items()}
        found = {name: tuple(value.shape) for name, value in state.model.items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise CheckpointError(f"{path} belongs to another model: see {wrong[0]} {wrong[1]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.model[name])
        if self.ema is not None:
            self.ema.load(load_average(path), state.counters["ema_updates"])
        try:
            self.optimizer.load_state_dict(state.optimizer)
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} is of another optimizer: {error}") from error

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        return value


class ShardedState:
    """Every process writes its part; another number of them can read it."""

    FOLDER = "shards"

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        ema: MovingAverage | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.module, self.parameters, self.ema, self.optimizer = module, parameters, ema, optimizer

    def save(self, writer: CheckpointWriter) -> None:
        with writer.errors():
            state_dict_saver.save(self._state(), checkpoint_id=writer.partial / self.FOLDER)

    def load(self, path: Path) -> None:
        state = self._state()
        try:
            state_dict_loader.load(state, checkpoint_id=path / self.FOLDER)
        except (OSError, RuntimeError, ValueError, CheckpointException) as error:
            raise CheckpointError(
                f"{path} is damaged, or belongs to another model or way of sharding: {error}"
            ) from error
        set_optimizer_state_dict(self.module, self.optimizer, optim_state_dict=state["optimizer"])
        if self.ema is not None:
            self.ema.updates = load_counters(path)["ema_updates"]

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": get_optimizer_state_dict(self.module, self.optimizer),
        }
        if self.ema is not None:
            state["ema"] = dict(self.ema.state)
        return state


class DeepSpeedState:
    """DeepSpeed's engine keeps model and optimizer, and knows how they are spread."""

    TAG = "deepspeed"

    def __init__(self, engine: Any, ema: MovingAverage | None, *, leads: bool) -> None:
        self.engine, self.ema, self.leads = engine, ema, leads

    def save(self, writer: CheckpointWriter) -> None:
        with writer.errors():
            self.engine.save_checkpoint(
                str(writer.partial), tag=self.TAG, save_latest=False, exclude_frozen_parameters=True
            )
        if self.ema is not None and self.leads:
            writer.write_tensors(EMA_FILE, self.ema.state)

    def load(self, path: Path) -> None:
        try:
            found, _ = self.engine.load_checkpoint(str(path), tag=self.TAG, load_module_strict=False)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            if isinstance(error, torch.OutOfMemoryError | torch.distributed.DistError):
                raise  # the file is not to blame
            raise CheckpointError(f"{path} is damaged, or belongs to another model: {error}") from error
        if found is None:
            raise CheckpointError(f"{path} is damaged, or no checkpoint of DeepSpeed")
        if self.ema is not None:
            self.ema.load(load_average(path), load_counters(path)["ema_updates"])

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, nn.Parameter) and value.requires_grad:
            trained: torch.Tensor = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param(value)
            return trained
        if not hasattr(value, "ds_id"):  # averages, buffers, and what ZeRO-2 does not spread
            return value
        with importlib.import_module("deepspeed").zero.GatheredParameters([value]):
            return value.detach().clone()
