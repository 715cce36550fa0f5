"""The training log: one JSON object a line, the loss also split by how noisy the latents were."""

import json
import logging
import math
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import is_tensorboard_available, is_wandb_available

from stableavatar.errors import InputError
from stableavatar.media.files import write_file

logger = logging.getLogger(__name__)

RANGES = 4  # of sigma, equally wide


class LossMeter:
    """Means of the loss since the last reset, whole and for each quarter of sigma, and the largest gradient
    norm of these steps; its state goes into checkpoints.
    """

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self.sums = list(state["sums"]) if state else [0.0] * RANGES
        self.counts = list(state["counts"]) if state else [0.0] * RANGES
        self.norms = list(state.get("norms", [])) if state else []  # the largest one

    def add(self, per_clip: list[float], sigma: list[float], norm: float) -> None:
        """Add a step's clips, `sigma` in [0, 1], and the norm of its gradient."""
        self.norms = [max([*self.norms, norm])]
        for loss, noise in zip(per_clip, sigma, strict=True):
            place = min(int(noise * RANGES), RANGES - 1)
            self.sums[place] += loss
            self.counts[place] += 1

    @property
    def state(self) -> dict[str, list[float]]:
        """For `LossMeter(state)`."""
        return {"sums": self.sums, "counts": self.counts, "norms": self.norms}

    def means(self) -> dict[str, float | None]:
        """`loss`, and `loss_0.00_0.25` and so on by sigma, and `gradient_norm`, the largest; None where there
        was no clip."""
        whole = sum(self.counts)
        result: dict[str, float | None] = {"loss": sum(self.sums) / whole if whole else None}
        for place, (total, count) in enumerate(zip(self.sums, self.counts, strict=True)):
            name = f"loss_{place / RANGES:.2f}_{(place + 1) / RANGES:.2f}"
            result[name] = total / count if count else None
        result["gradient_norm"] = self.norms[0] if self.norms else None
        return result


class JsonLog:
    """Appends lines to a file, and says them. Opened at a step, it drops what an interrupted run had written
    after that step.

    Args:
        step: where the run stands. steps: where it ends. deadline: of `time.monotonic`, when it ends earlier.
    """

    def __init__(self, path: Path, step: int, steps: int, deadline: float | None = None) -> None:
        self.path, self.steps, self.deadline = path, steps, deadline
        self._last = (step, time.monotonic())
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(path) if line["step"] <= step] if path.exists() else []
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; numbers that are not finite become null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        step, now = line["step"], time.monotonic()
        (before, then), self._last = self._last, (step, now)
        left = (self.steps - step) * (now - then) / (step - before)
        if self.deadline is not None:
            left = min(left, max(self.deadline - now, 0.0))
        logger.info("step %d of %d: %s", step, self.steps, _in_words(clean, left))


def _in_words(line: Mapping[str, Any], seconds_left: float) -> str:
    loss = "no loss, all were skipped" if line.get("loss") is None else f"loss {line['loss']:.4f}"
    hours, minutes = divmod(round(seconds_left / 60), 60)
    left = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
    return f"{loss}, {line['clips_per_second']:.2g} clips/s, {left} left"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; one that was cut off, or damaged as by a power cut, is left out, and said so."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            line["step"] + 0
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: line %d cannot be read and is left out", path, number)
        else:
            lines.append(line)
    return lines


def check_trackers(trackers: Iterable[str]) -> None:
    """Raises InputError where one is not installed."""
    there = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    for tracker in trackers:
        if not there[tracker]:
            raise InputError(f"the tracker {tracker} is not installed: pip install {tracker}")


def tracker_arguments(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """How trackers go on in `folder` with a run that stands at `step`: what TensorBoard had of later steps
    gives way, and W&B goes on with the run whose name is kept there. For the first process alone."""
    name = folder / "wandb-run"
    if not name.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(name, secrets.token_hex(8).encode())
    run = name.read_text(encoding="utf-8")
    return {
        "tensorboard": {"purge_step": step + 1},
        # W&B would write where the command was given.
        "wandb": {"dir": str(folder), "id": run, "resume": "allow"},
    }


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them, paths and the like as text."""
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return result


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, with both values."""
    then, later = flat(before), flat(now)
    return [
        f"{name} {later.get(name)} (was {then.get(name)})"
        for name in sorted({*then, *later})
        if then.get(name) != later.get(name)
    ]


def finite(line: dict[str, Any]) -> dict[str, Any]:
    """What a tracker can draw."""
    return {name: value for name, value in line.items() if value is not None and math.isfinite(value)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings for trackers, which know words and numbers alone."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, bool | int | float) else str(value)
    return result
