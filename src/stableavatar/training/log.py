"""The training log: one JSON object a line, the loss also split by how noisy the latents were."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stableavatar.media.files import write_file

RANGES = 4  # of sigma, equally wide


class LossMeter:
    """Means of the loss since the last reset, whole and for each quarter of sigma; its state goes into
    checkpoints.
    """

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self.sums = list(state["sums"]) if state else [0.0] * RANGES
        self.counts = list(state["counts"]) if state else [0.0] * RANGES

    def add(self, per_clip: list[float], sigma: list[float]) -> None:
        """Add clips; `sigma` in [0, 1]."""
        for loss, noise in zip(per_clip, sigma, strict=True):
            place = min(int(noise * RANGES), RANGES - 1)
            self.sums[place] += loss
            self.counts[place] += 1

    @property
    def state(self) -> dict[str, list[float]]:
        """For `LossMeter(state)`."""
        return {"sums": self.sums, "counts": self.counts}

    def means(self) -> dict[str, float | None]:
        """`loss`, and `loss_0.00_0.25` and so on by sigma; None where there was no clip."""
        whole = sum(self.counts)
        result: dict[str, float | None] = {"loss": sum(self.sums) / whole if whole else None}
        for place, (total, count) in enumerate(zip(self.sums, self.counts, strict=True)):
            name = f"loss_{place / RANGES:.2f}_{(place + 1) / RANGES:.2f}"
            result[name] = total / count if count else None
        return result


class JsonLog:
    """Appends lines to a file. Opened at a step, it drops what an interrupted run had written after that
    step.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; a last one that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            lines.append(json.loads(text))
    return lines


def finite(line: dict[str, Any]) -> dict[str, Any]:
    """What a tracker can draw."""
    return {name: value for name, value in line.items() if value is not None and math.isfinite(value)}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings for trackers, which know words and numbers alone."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, bool | int | float) else str(value)
    return result
