"""Writes the figures of the embedded model into a document: table, contact sheets, curves of mouths and of
losses."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stableavatar.errors import InputError
from stableavatar.evaluation.observation import Frames, Track
from stableavatar.evaluation.scores import Scores, markdown_table
from stableavatar.evaluation.sheets import (
    contact_sheet,
    line_plot,
    loss_curve,
    read_columns,
    read_log,
    telling_moments,
    thin,
    write_columns,
)
from stableavatar.media.files import write_file

logger = logging.getLogger(__name__)

START, END = "<!-- figures: written by stableavatar.evaluation.tiny -->", "<!-- end of figures -->"
TITLE = "What `tiny` shows"
_MOMENTS = 10
_SHOWN_SECONDS = 10
_FPS = 25


@dataclass(frozen=True)
class Exhibit:
    """A clip kept for the report's pictures: rows of frames by name, and the opening called for and, where a
    model spoke, measured."""

    rows: dict[str, Frames]
    called: Track
    measured: Track | None


@dataclass
class Exhibits:
    """What the report shows."""

    puppet: Exhibit | None = None
    moving: Exhibit | None = None
    photograph: Exhibit | None = None


def write_report(
    document: Path, scores: Scores, exhibits: Exhibits, title: str, curves: Path | None = None
) -> None:
    """Puts the figures between the document's markers (at its end, where it has none yet) and the pictures
    beside it.

    Args:
        document: a Markdown file, made when missing; pictures and CSV go to the folder of its name without
            ending.
        curves: a folder of training logs; each `NAME/*.jsonl` or `NAME.jsonl` becomes `curve_NAME.csv` beside
            the pictures. Curves that lie there already are drawn again without it.

    Raises:
        InputError: `curves` holds no log, or see :func:`check_document`.
    """
    folder = document.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"Measured: {title}.", "", markdown_table(scores), ""]
    if exhibits.puppet is not None:
        lines += _show(folder, "puppet", "An unseen puppet with unseen speech:", exhibits.puppet)
    if exhibits.moving is not None:
        lines += _show(folder, "moving", "A puppet whose prompt has it nod:", exhibits.moving)
    if exhibits.photograph is not None:
        lines += _show(folder, "astronaut", "A photograph, never trained on:", exhibits.photograph)
    if curves is not None:
        gather_curves(curves, folder)
    lines += _draw_curves(folder)
    put_between(document, "\n".join(lines), START, END, title=TITLE)
    logger.info("written to %s", document)


def _show(folder: Path, name: str, caption: str, exhibit: Exhibit) -> list[str]:
    moments = telling_moments(exhibit.called, _MOMENTS)
    contact_sheet(exhibit.rows, moments).save(folder / f"{name}.png")
    lines = [caption, "", f"![{name}]({folder.name}/{name}.png)", ""]
    if exhibit.measured is None:
        return lines
    count = min(len(exhibit.called), _SHOWN_SECONDS * _FPS)
    seconds = np.arange(count) / _FPS
    tracks = {
        "called for by the speech": (seconds, exhibit.called[:count].astype(np.float64)),
        "measured": (seconds, exhibit.measured[:count].astype(np.float64)),
    }
    line_plot(f"{name}: opening of the mouth", tracks, "seconds").save(folder / f"{name}_mouth.png")
    return [*lines, f"![opening of the mouth]({folder.name}/{name}_mouth.png)", ""]


def find_logs(logs: Path) -> list[Path]:
    """The training logs below a folder. Raises InputError: there are none."""
    found = sorted(logs.rglob("*.jsonl")) if logs.is_dir() else []
    if not found:
        raise InputError(f"There is no training log (*.jsonl) in {logs}.")
    return found


def gather_curves(logs: Path, folder: Path) -> None:
    """Copies the numbers of every training log below `logs` to `folder`, at most 300 rows each. Raises
    InputError as above."""
    for path in find_logs(logs):
        name = path.parent.name if path.parent != logs else path.stem
        columns = read_log(path)
        if columns:
            write_columns(thin(columns), folder / f"curve_{name}.csv")


def _draw_curves(folder: Path) -> list[str]:
    lines = []
    for path in sorted(folder.glob("curve_*.csv")):
        name = path.stem.removeprefix("curve_")
        curve = loss_curve(name.replace("_", " "), read_columns(path))
        if curve is not None:
            curve.save(folder / f"curve_{name}.png")
            lines += [f"![loss of the {name}]({folder.name}/curve_{name}.png)", ""]
    return ["Training:", "", *lines] if lines else []


def put_between(document: Path, text: str, start: str, end: str, *, title: str) -> None:
    """Puts `text` between two markers of a document, at its end where it has none yet; all else stays.

    Args:
        document: a Markdown file, made with the heading `title` when missing.

    Raises:
        InputError: see :func:`check_document`.
    """
    before, after = check_document(document, start, end, title=title)
    write_file(document, f"{before}{start}\n\n{text.strip()}\n\n{end}{after}".encode())


def check_document(
    document: Path, start: str = START, end: str = END, *, title: str = TITLE
) -> tuple[str, str]:
    """What stands before the two markers of a document and after them, or will; to be called before long work
    begins.

    Raises:
        InputError: the document has one marker without the other, or the second before the first.
    """
    if not document.exists():
        return f"# {title}\n\n", "\n"
    old = document.read_text(encoding="utf-8")
    before, begun, rest = old.partition(start)
    _, ended, after = rest.partition(end)
    if begun and ended:
        return before, after
    if begun or end in old:
        raise InputError(
            f"{document} has only one of the two markers around the figures, or the second before the first; "
            "put both back, or neither."
        )
    return old.rstrip("\n") + "\n\n", "\n"
