"""Training checkpoints on disk: a folder a step, complete or not there at all.

    step-00001000/
        model.safetensors      trained parameters
        ema.safetensors        their moving average, where one is kept
        optimizer.pt           the optimizer's state
        random-0.pt            random number generators, one file a process
        state.json             step, place in the data, counters, settings

A checkpoint is written beside its final name, flushed to the disk and then renamed: killed at any moment, the
last complete one is what there is.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stableavatar.errors import CheckpointError

logger = logging.getLogger(__name__)

PREFIX = "step-"


@dataclass(frozen=True)
class TrainingState:
    """All that a training run needs to go on as if it had not stopped.

    `model` and `ema` are parameters by name, `ema` is None where no mean is kept; `optimizer` is its state
    dict; `random` holds this process's generators (`random_state`); `counters` whatever JSON can hold.
    """

    model: Mapping[str, torch.Tensor]
    ema: Mapping[str, torch.Tensor] | None
    optimizer: dict[str, Any]
    random: dict[str, Any]
    counters: dict[str, Any]


def random_state() -> dict[str, Any]:
    """State of the global generators of Python, NumPy and PyTorch, as `torch.load(weights_only=True)` can
    read it.
    """
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, words, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "python": [version, list(words), next_gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the global generators to what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def save_checkpoint(folder: Path, step: int, state: TrainingState, keep: int) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep` checkpoints.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{PREFIX}*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir()
        save_file(_contiguous(state.model), partial / "model.safetensors")
        if state.ema is not None:
            save_file(_contiguous(state.ema), partial / "ema.safetensors")
        torch.save(state.optimizer, partial / "optimizer.pt")
        torch.save(state.random, partial / "random-0.pt")
        (partial / "state.json").write_text(json.dumps(state.counters, indent=1), encoding="utf-8")
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error
    logger.info("saved %s", final)
    return final


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> TrainingState:
    """Read a checkpoint back.

    Raises:
        CheckpointError: it is missing, damaged or incomplete.
    """
    try:
        ema = path / "ema.safetensors"
        return TrainingState(
            model=load_file(path / "model.safetensors", device=str(device)),
            ema=load_file(ema, device=str(device)) if ema.exists() else None,
            optimizer=torch.load(path / "optimizer.pt", map_location=device, weights_only=True),
            random=torch.load(path / "random-0.pt", map_location="cpu", weights_only=True),
            counters=json.loads((path / "state.json").read_text(encoding="utf-8")),
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable training checkpoint: {error}") from error


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
