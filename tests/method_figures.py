"""The figures of docs/method.md, drawn from the code that they explain.

python tests/method_figures.py
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from stableavatar.choices import Order
from stableavatar.models.audio_adapter import slot_bounds
from stableavatar.sampling.orders import ORDERS, Cell
from stableavatar.sampling.windows import overlap_ramp, plan_windows

FOLDER = Path(__file__).parents[1] / "docs" / "method"

# Legible on a light page and on a dark one.
_INK, _FAINT, _BLUE, _RED = "#7d8590", "#7d859055", "#4c8dd6", "#d6604d"
_ROW, _LEFT, _TOP = 26, 96, 34


def _text(
    x: float, y: float, words: str, *, anchor: str = "middle", size: int = 12, colour: str = _INK
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
        f'font-family="sans-serif">{words}</text>'
    )


def _box(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
        f'fill-opacity="{opacity:.2f}" rx="2"/>'
    )


def _line(points: Iterable[tuple[float, float]], colour: str) -> str:
    places = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">\n'
        f"{body}\n</svg>\n"
    )


def windows() -> str:
    """Which latents each window of a video reads, and how much of each it writes."""
    plan = plan_windows(60, 21, 5)
    ramp = overlap_ramp(plan.overlap, "linear").tolist()
    cell = 11.0
    parts = []
    for row, window in enumerate(plan.windows):
        y = _TOP + row * _ROW
        parts.append(_text(_LEFT - 10, y + 14, f"window {window.index}", anchor="end"))
        for latent in range(window.start, window.stop):
            written = latent - window.write_start
            first = window.index == 0
            weight = 0.0 if written < 0 else 1.0 if first or written >= len(ramp) else ramp[written]
            parts.append(_box(_LEFT + latent * cell, y, cell - 1.5, 18, _BLUE, 0.15 + 0.85 * weight))
    bottom = _TOP + len(plan) * _ROW
    for latent in range(0, plan.latent_frames + 1, 10):
        parts.append(_text(_LEFT + latent * cell, bottom + 16, str(latent)))
    parts.append(_text(_LEFT + plan.latent_frames * cell / 2, bottom + 36, "latent frames of the video"))
    return _svg(_LEFT + plan.latent_frames * cell + 20, bottom + 46, parts)


def orders() -> str:
    """When each cell (window, step) runs, in the three orders."""
    plan, steps = plan_windows(69, 21, 5), 4
    cell, gap = 32.0, 44.0
    width = len(plan) * cell
    parts = []
    for column, order in enumerate(ORDERS):
        x = _LEFT + column * (width + gap)
        parts.append(_text(x + width / 2, _TOP - 14, order, size=14))
        ran = _sequence(order, len(plan), steps)
        for when, (window, step) in enumerate(ran):
            place = (x + window.index * cell, _TOP + step * cell)
            shade = 1 - 0.85 * when / len(ran)
            parts.append(_box(*place, cell - 2, cell - 2, _BLUE, shade))
            middle = (place[0] + cell / 2 - 1, place[1] + cell / 2 + 4)
            parts.append(_text(*middle, str(when + 1), size=11, colour="#fff" if shade > 0.5 else _INK))
        parts.append(_text(x + width / 2, _TOP + steps * cell + 16, "windows"))
    for step in range(steps):
        parts.append(_text(_LEFT - 10, _TOP + (step + 0.6) * cell, f"step {step + 1}", anchor="end"))
    return _svg(_LEFT + 3 * width + 2 * gap + 10, _TOP + steps * cell + 26, parts)


def alive() -> str:
    """The most windows that are on their way at once, by the number of windows of the video."""
    steps, most = 10, 40
    counts = list(range(1, most + 1))
    scale_x, scale_y, height = 14.0, 5.0, 40 * 5.0
    parts = [_box(_LEFT, _TOP + height, most * scale_x, 1, _FAINT), _box(_LEFT, _TOP, 1, height, _FAINT)]
    for order, colour in zip(ORDERS, (_RED, _BLUE, _INK), strict=True):
        points = [
            (_LEFT + count * scale_x, _TOP + height - _alive(_sequence(order, count, steps)) * scale_y)
            for count in counts
        ]
        parts += [_line(points, colour), _text(points[-1][0] + 8, points[-1][1] + 4, order, anchor="start")]
    for value in (10, 20, 30, 40):
        parts.append(_text(_LEFT + value * scale_x, _TOP + height + 18, str(value)))
        parts.append(_text(_LEFT - 8, _TOP + height - value * scale_y + 4, str(value), anchor="end"))
    parts.append(_text(_LEFT + most * scale_x / 2, _TOP + height + 38, "windows of the video"))
    parts.append(_text(_LEFT, _TOP - 14, "windows on their way at once, 10 steps", anchor="start"))
    return _svg(_LEFT + most * scale_x + 100, _TOP + height + 48, parts)


def slots() -> str:
    """Which speech each latent frame hears directly: 33 frames, 25 a second, 50 speech features a second."""
    latents, tokens = 9, 66
    cell = 9.0
    origin = _LEFT - slot_bounds(tokens, latents)[0][0] * cell
    parts = []
    for row, (first, last) in enumerate(slot_bounds(tokens, latents)):
        y = _TOP + row * (_ROW - 6)
        parts.append(_text(_LEFT - 10, y + 12, f"latent {row}", anchor="end"))
        for token in range(first, last + 1):
            inside = 0 <= token < tokens
            parts.append(_box(origin + token * cell, y, cell - 1.5, 14, _BLUE if inside else _FAINT))
    bottom = _TOP + latents * (_ROW - 6)
    for token in range(0, tokens + 1, 10):
        parts.append(_text(origin + token * cell, bottom + 16, str(token)))
    parts.append(_text(origin + tokens * cell / 2, bottom + 36, "speech features of the window"))
    right = origin + (slot_bounds(tokens, latents)[-1][1] + 1) * cell
    return _svg(right + 20, bottom + 46, parts)


FIGURES = {"windows": windows, "orders": orders, "alive": alive, "slots": slots}


def _sequence(order: Order, count: int, steps: int) -> list[Cell]:
    plan = plan_windows(21 + 16 * (count - 1), 21, 5)
    assert len(plan) == count
    return [cell for front in ORDERS[order](plan, steps, 1) for cell in front]


def _alive(ran: Sequence[Cell]) -> int:
    """The most windows between their first cell and their last."""
    first = {cell.window.index: when for when, cell in reversed(list(enumerate(ran)))}
    last = {cell.window.index: when for when, cell in enumerate(ran)}
    return max(sum(first[k] <= when <= last[k] for k in first) for when in range(len(ran)))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
