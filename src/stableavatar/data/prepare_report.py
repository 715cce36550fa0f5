"""The page that `data.prepare` leaves: every stretch of every video, and what became of it."""

import html
import io
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_THUMBNAILS = 3


def places(count: int) -> list[int]:
    """Which of the frames of a clip are shown."""
    return np.linspace(0, count - 1, _THUMBNAILS).round().astype(int).tolist()


def thumbnail(frame: NDArray[np.uint8], size: int = 160) -> bytes:
    """A small picture, a JPEG file; kept beside the state, as clips may be moved."""
    picture = Image.fromarray(frame)
    picture.thumbnail((size, size))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


def report(videos: Mapping[str, Any], fps: Fraction, pictures: str) -> str:
    """A page that says of every stretch of every video what became of it; `pictures` is the thumbnails'
    folder, as the page names it."""
    rows = []
    for video, entry in sorted(videos.items()):
        for it in entry["stretches"]:
            start, stop = float(it["start"] / fps), float(it["stop"] / fps)
            shown = "".join(
                f'<img alt="" loading="lazy" src="{pictures}/{name}">' for name in it.get("thumbnails", [])
            )
            fate = html.escape(it.get("clip") or f"dropped: {it['reason']}")
            kind = "kept" if it["reason"] is None else "dropped"
            rows.append(
                f'<tr class="{kind}"><td>{html.escape(video)}</td><td>{start:.2f} to {stop:.2f} s</td>'
                f"<td>{fate}</td><td>{shown}</td></tr>"
            )
    kept = sum(row.startswith('<tr class="kept"') for row in rows)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Prepared clips</title>',
            "<style>body{font-family:sans-serif}td{padding:.3em .8em;vertical-align:top}"
            ".dropped{color:#777}img{height:90px;margin-right:4px}</style>",
            f"<h1>{kept} clips of {len(videos)} videos</h1>",
            f"<p>{len(rows) - kept} stretches were dropped.</p>",
            "<table><tr><th>video</th><th>stretch</th><th>clip</th><th></th></tr>",
            *rows,
            "</table></html>\n",
        ]
    )
