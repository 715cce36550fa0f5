"""Training checkpoints on disk: a folder a step, complete or not there at all.

    step-00001000/
        model.safetensors      trained parameters
        ema.safetensors        their moving average, where one is kept
        optimizer.pt           the optimizer's state
        random-0.pt            random number generators, one file a process
        state.json             step, place in the data, counters, settings

A run whose model is spread over processes has a folder `shards` (`torch.distributed.checkpoint`) or
`deepspeed` (DeepSpeed's own) in place of the first three.

A checkpoint is written beside its final name, flushed to the disk and then renamed: killed at any moment, the
last complete one is what there is.
"""

import json
import logging
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from stableavatar.errors import CheckpointError
from stableavatar.media.files import to_disk

logger = logging.getLogger(__name__)

PREFIX = "step-"
EMA_FILE = "ema.safetensors"
# Of files that are cut off; torch's and DeepSpeed's own, of shards.
_DAMAGE = (pickle.UnpicklingError, EOFError, KeyError, CheckpointException, AssertionError)


@dataclass(frozen=True)
class TrainingState:
    """What a training run goes on from, beside the generators of its processes (`load_random`).

    `model` and `ema` are parameters by name, `ema` is None where no mean is kept; `optimizer` is its state
    dict; `counters` whatever JSON can hold.
    """

    model: Mapping[str, torch.Tensor]
    ema: Mapping[str, torch.Tensor] | None
    optimizer: dict[str, Any]
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


class CheckpointWriter:
    """A checkpoint that is being written, into `partial`; `finish` gives it its name.

    With several processes the first begins and finishes, and all write between; they wait for each other
    before and after.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.final = folder / f"{PREFIX}{step:08d}"
        self.partial = folder / f".{self.final.name}.partial"

    def begin(self) -> None:
        """Make the folder; what a killed run left is removed."""
        with self.errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f".{PREFIX}*.partial"):
                shutil.rmtree(leftover)
            self.partial.mkdir()

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """As safetensors."""
        with self.errors():
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, self.partial / name
            )

    def write_object(self, name: str, content: Any) -> None:
        """Tensors and plain containers, with `torch.save`."""
        with self.errors():
            torch.save(content, self.partial / name)

    def finish(self, counters: Mapping[str, Any], keep: int) -> Path:
        """Write `state.json`, flush everything to the disk, rename, and remove all but the newest `keep`."""
        with self.errors():
            (self.partial / "state.json").write_text(json.dumps(counters, indent=1), encoding="utf-8")
            for path in (*self.partial.rglob("*"), self.partial):
                to_disk(path)
            if self.final.exists():
                _remove(self.final)
            self.partial.rename(self.final)
            to_disk(self.folder)
            for old in list_checkpoints(self.folder)[:-keep]:
                _remove(old)
        logger.info("saved %s", self.final)
        return self.final

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raises CheckpointError where the disk is full or the folder cannot be written."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(f"cannot write the checkpoint {self.final}: {error}") from error


def random_file(rank: int) -> str:
    """Where process `rank` keeps its generators."""
    return f"random-{rank}.pt"


def load_counters(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Step, place in the data, counters and settings of a checkpoint. Raises CheckpointError as below, and
    where one of those `needed` is missing."""
    with readable(path):
        counters: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        missing = [name for name in needed if name not in counters]
        if missing:
            raise ValueError(f"state.json says nothing of {', '.join(missing)}")
    return counters


def load_random(path: Path, rank: int) -> dict[str, Any] | None:
    """The generators of process `rank`; None where the checkpoint is of fewer processes. Raises
    CheckpointError as below."""
    if not (path / random_file(rank)).exists() and (path / random_file(0)).exists():
        return None
    with readable(path):
        state: dict[str, Any] = torch.load(path / random_file(rank), map_location="cpu", weights_only=True)
    return state


def load_average(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint. Raises CheckpointError as below, and where it has none."""
    if not (path / EMA_FILE).exists():
        raise CheckpointError(f"{path} has no averaged weights; train with ema_decay=0")
    with readable(path):
        return load_file(path / EMA_FILE, device=str(device))


def load_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint of a run whose model was whole. Raises CheckpointError as below."""
    with readable(path):
        return load_file(path / "model.safetensors", device=str(device))


def load_checkpoint(path: Path, device: torch.device | str = "cpu", *, average: bool = True) -> TrainingState:
    """Read back a checkpoint of a run whose model was whole, as its first process has it; on request without
    its averaged weights.

    Raises:
        CheckpointError: it is missing, damaged or incomplete.
    """
    with readable(path):
        return TrainingState(
            model=load_weights(path, device),
            ema=load_average(path, device) if average and (path / EMA_FILE).exists() else None,
            optimizer=torch.load(path / "optimizer.pt", map_location=device, weights_only=True),
            counters=load_counters(path),
        )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises CheckpointError for what reading a checkpoint comes upon."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError, *_DAMAGE) as error:
        raise CheckpointError(f"{path} is not a readable training checkpoint: {error}") from error


def _remove(checkpoint: Path) -> None:
    """A checkpoint that is half removed does not bear the name of a whole one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)
