"""Pictures for the documents: contact sheets of clips, and lines over time, drawn with Pillow alone."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stableavatar.evaluation.observation import Frames, Track

logger = logging.getLogger(__name__)

_INK = (40, 40, 40)
_PALETTE = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14))
_MARGIN = 44
_CURVE_ROWS = 300


def telling_moments(called: Track, count: int) -> list[int]:
    """Frame numbers, one from each of `count` equal stretches: in turn its widest opening and its
    narrowest."""
    edges = np.linspace(0, len(called), count + 1).astype(int)
    moments = []
    for index, (start, stop) in enumerate(pairwise(edges)):
        part = called[start : max(stop, start + 1)]
        moments.append(int(start + (part.argmax() if index % 2 == 0 else part.argmin())))
    return moments


def contact_sheet(rows: Mapping[str, Frames], moments: Sequence[int], scale: int = 1) -> Image.Image:
    """A row of labelled pictures for each clip, its frames at `moments`, enlarged by a whole number."""
    height, width = next(iter(rows.values())).shape[1:3]
    label = 96
    sheet = Image.new(
        "RGB", (label + len(moments) * width * scale, len(rows) * height * scale), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for row, (name, frames) in enumerate(rows.items()):
        draw.text((6, row * height * scale + 6), name, fill=_INK, font=font)
        for column, moment in enumerate(moments):
            picture = Image.fromarray(frames[min(moment, len(frames) - 1)])
            if scale > 1:
                picture = picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
            sheet.paste(picture, (label + column * width * scale, row * height * scale))
    return sheet


def line_plot(
    title: str,
    lines: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    x_label: str,
    size: tuple[int, int] = (900, 260),
) -> Image.Image:
    """Lines (x, y) with a legend, axes from the data; values that are not finite are left out.

    Raises:
        ValueError: there is nothing to draw.
    """
    points = {
        name: (x[np.isfinite(x) & np.isfinite(y)], y[np.isfinite(x) & np.isfinite(y)])
        for name, (x, y) in lines.items()
    }
    points = {name: (x, y) for name, (x, y) in points.items() if len(x)}
    if not points:
        raise ValueError(f"the plot {title!r} has no points")
    width, height = size
    low_x = min(x.min() for x, _ in points.values())
    high_x = max(x.max() for x, _ in points.values())
    low_y = min(y.min() for _, y in points.values())
    high_y = max(y.max() for _, y in points.values())
    spread_x, spread_y = max(high_x - low_x, 1e-9), max(high_y - low_y, 1e-9)
    plot = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(plot)
    font = ImageFont.load_default(12)
    left, right, top, bottom = _MARGIN + 10, width - 10, 26, height - 34
    draw.text((left, 6), title, fill=_INK, font=font)
    for tick in np.linspace(0, 1, 5):
        y = bottom - tick * (bottom - top)
        draw.line((left, y, right, y), fill=(225, 225, 225))
        draw.text((4, y - 7), f"{low_y + tick * spread_y:.3g}", fill=_INK, font=font)
        x = left + tick * (right - left)
        draw.text((min(x, right - 30), bottom + 4), f"{low_x + tick * spread_x:.4g}", fill=_INK, font=font)
    draw.text((left, height - 16), x_label, fill=_INK, font=font)
    legend = right
    for index, (name, (x, y)) in enumerate(points.items()):
        colour = _PALETTE[index % len(_PALETTE)]
        across = left + (x - low_x) / spread_x * (right - left)
        down = bottom - (y - low_y) / spread_y * (bottom - top)
        draw.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=colour, width=2)
        legend -= int(font.getlength(name)) + 16
        draw.text((legend, 6), name, fill=colour, font=font)
    return plot


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of numbers of a log of JSON lines; a line without a column's number gives NaN there.

    A line that was cut off, as by a kill, is left out, and said so.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            logger.warning("%s: line %d cannot be read and is left out", path, number)
    names = dict.fromkeys(
        name
        for entry in entries
        for name, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    return {
        name: np.array(
            [float(entry[name]) if isinstance(entry.get(name), int | float) else np.nan for entry in entries]
        )
        for name in names
    }


def thin(
    columns: Mapping[str, NDArray[np.float64]], rows: int = _CURVE_ROWS
) -> dict[str, NDArray[np.float64]]:
    """At most `rows` rows, each the mean of a stretch."""
    count = len(next(iter(columns.values()), np.empty(0)))
    parts = np.array_split(np.arange(count), min(rows, count)) if count else []

    def average(values: NDArray[np.float64]) -> float:
        known = values[np.isfinite(values)]
        return float(known.mean()) if len(known) else float("nan")

    return {name: np.array([average(values[part]) for part in parts]) for name, values in columns.items()}


def write_columns(columns: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    """Columns as CSV with a heading, six digits; NaN as an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow(["" if np.isnan(value) else f"{value:.6g}" for value in row])


def read_columns(path: Path) -> dict[str, NDArray[np.float64]]:
    """What :func:`write_columns` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    values = np.array([[float(value) if value else np.nan for value in row] for row in rows[1:]])
    return {name: values[:, index] for index, name in enumerate(rows[0])}


def loss_curve(name: str, columns: Mapping[str, NDArray[np.float64]]) -> Image.Image | None:
    """A training's loss (and PSNR, where logged) over its time or steps; None where no loss was logged."""
    shown = [column for column in columns if column == "loss" or column.endswith("_loss")] or (
        ["psnr"] if "psnr" in columns else []
    )
    if not shown:
        return None
    if "seconds" in columns:
        x, label = columns["seconds"] / 60, "minutes"
    else:
        x, label = columns.get("step", np.arange(len(columns[shown[0]]), dtype=np.float64)), "steps"
    panels = [line_plot(f"{name}: loss", {column: (x, columns[column]) for column in shown}, label)]
    if "psnr" in columns and shown != ["psnr"]:
        panels.append(line_plot(f"{name}: PSNR [dB]", {"psnr": (x, columns["psnr"])}, label))
    width = max(panel.width for panel in panels)
    whole = Image.new("RGB", (width, sum(panel.height for panel in panels)), (255, 255, 255))
    top = 0
    for panel in panels:
        whole.paste(panel, (0, top))
        top += panel.height
    return whole
