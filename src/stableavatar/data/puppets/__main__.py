"""Contact sheets, stores: `python -m stableavatar.data.puppets preview --seed 0 --out sheet.png`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from stableavatar.data.puppets.clip import iter_clips, make_clip
from stableavatar.data.puppets.identity import Identity
from stableavatar.data.puppets.layout import write_dataset
from stableavatar.data.puppets.render import Renderer
from stableavatar.data.puppets.store import build_store
from stableavatar.errors import with_status

logger = logging.getLogger("stableavatar.data.puppets")


def _preview(options: argparse.Namespace) -> None:
    columns: int = options.columns
    person = Identity.varied if options.varied else Identity.from_seed
    rows = []
    if options.portraits:
        for row in range(options.rows):
            seeds = range(options.seed + row * columns, options.seed + (row + 1) * columns)
            rows.append(np.concatenate([Renderer(person(s), options.size).portrait() for s in seeds], axis=1))
    else:
        for seed in range(options.seed, options.seed + options.rows):
            clip = make_clip(
                seed, 4.0, size=options.size, expression=options.expression, identity=person(seed)
            )
            chosen = np.linspace(0, len(clip.frames) - 1, columns).astype(int)
            rows.append(np.concatenate([clip.frames[k] for k in chosen], axis=1))
            logger.info("%d: %s", seed, clip.prompt)
    Image.fromarray(np.concatenate(rows, axis=0)).save(options.out)
    logger.info("wrote %s", options.out)


@with_status
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m stableavatar.data.puppets", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preview = commands.add_parser("preview", help="a picture of several puppets, a row of moments each")
    preview.add_argument("--seed", type=int, default=0, help="first seed")
    preview.add_argument("--rows", type=int, default=6)
    preview.add_argument("--columns", type=int, default=8)
    preview.add_argument("--size", type=int, default=128)
    preview.add_argument("--expression", default=None, help="in place of each seed's own")
    preview.add_argument(
        "--portraits", action="store_true", help="one portrait a cell instead of moments of a clip"
    )
    preview.add_argument("--varied", action="store_true", help="as in a store")
    preview.add_argument("--out", type=Path, required=True)
    store = commands.add_parser("store", help="render many clips into a folder for training")
    store.add_argument("--folder", type=Path, required=True)
    store.add_argument("--seed", type=int, default=0, help="first seed")
    store.add_argument("--clips", type=int, default=1500)
    store.add_argument("--seconds", type=float, default=4.0)
    store.add_argument("--size", type=int, default=128)
    store.add_argument(
        "--expressions", nargs="+", default=(), metavar="NAME",
        help="a clip of every person for each of these, in place of one with the seed's own expression",
    )  # fmt: skip
    store.add_argument("--varied", action="store_true", help="persons less alike, and lit as photographs are")
    store.add_argument("--processes", type=int, default=2)
    dataset = commands.add_parser("dataset", help="clips as MP4, WAV and PNG in the trainer's folders")
    dataset.add_argument("--folder", type=Path, required=True)
    dataset.add_argument("--seed", type=int, default=0, help="first seed")
    dataset.add_argument("--clips", type=int, default=10)
    dataset.add_argument("--seconds", type=float, default=4.0)
    dataset.add_argument("--size", type=int, default=128)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "preview":
        _preview(options)
        return 0
    seeds = range(options.seed, options.seed + options.clips)
    if options.command == "dataset":
        listing = write_dataset(options.folder, iter_clips(seeds, options.seconds, size=options.size))
        logger.info("wrote %s", listing)
    else:
        build_store(
            options.folder,
            seeds,
            seconds=options.seconds,
            size=options.size,
            expressions=options.expressions,
            varied=options.varied,
            processes=options.processes,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
