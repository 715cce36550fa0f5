"""The table of the embedded model: what it shows on puppets and a photograph it has never seen, beside its
controls.

    python -m stableavatar.evaluation.tiny [--quick | --development] [--model tiny] [--out docs/tiny.md]

Clips are made, measured and let go; nothing is kept from run to run. Exit status 1 where a bar is
missed (spec/6-embedded-model.md). `--gate FOLDER` measures an autoencoder alone, before a transformer is
trained.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from rich.console import Console

from stableavatar.errors import InputError, StableAvatarError, with_status
from stableavatar.evaluation.cases import DEVELOPMENT, FULL, QUICK, Plan
from stableavatar.evaluation.embedded import Evaluation, Part, Task, code, find_people, pipeline_speaker
from stableavatar.evaluation.faces import FaceReader
from stableavatar.evaluation.meter import shipped_meter
from stableavatar.evaluation.report import check_document, find_logs, write_report
from stableavatar.evaluation.scores import rich_table
from stableavatar.pipeline import load

logger = logging.getLogger(__name__)

_MORE_PHOTOGRAPHS = 4  # beside the astronaut


@dataclass(frozen=True)
class Setup:
    """What is measured, so that every process can make it anew.

    Attributes:
        model: as :func:`stableavatar.pipeline.load` takes it.
        gate: an autoencoder's folder, which is measured alone.
        options: fields of ``GenerateOptions`` in place of the model's own.
        portraits: files of photographs.
    """

    plan: Plan
    model: str = "tiny"
    dtype: str = "auto"
    gate: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    portraits: Sequence[Path] = ()

    def evaluation(self) -> Evaluation:
        """Raises InputError, CheckpointError: for what is missing or cannot be read."""
        meter = shipped_meter()
        if self.gate is not None:
            if self.portraits:
                raise InputError("--gate measures an autoencoder alone: leave --portrait out")
            if not (self.gate / "config.json").is_file():
                raise InputError(f"There is no autoencoder in {self.gate}: config.json is missing.")
            vae = AutoencoderKLWan.from_pretrained(self.gate).eval()
            return Evaluation(self.plan, lambda frames: code(vae, frames), None, meter)
        pipeline = load(self.model, dtype=self.dtype)
        faces = _face_reader(required=bool(self.portraits))
        people = [] if faces is None else find_people(self.portraits, faces)
        speaker = pipeline_speaker(pipeline, self.options)
        return Evaluation(self.plan, lambda frames: code(pipeline.vae, frames), speaker, meter, faces, people)


_evaluation: Evaluation | None = None
"""That of a process of several."""


def _begin(setup: Setup, threads: int) -> None:
    global _evaluation
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    _evaluation = setup.evaluation()


def _do(task: Task) -> Part:
    assert _evaluation is not None
    return _evaluation.do(task)


def measure(setup: Setup, processes: int = 1) -> Part:
    """All tasks, shared by processes that each have a model of their own and a part of the cores.

    Raises:
        InputError: `processes` below 1, one of them was killed, or see :meth:`Setup.evaluation`.
    """
    if processes < 1:
        raise InputError(f"An evaluation takes at least one process, not {processes}.")
    evaluation = setup.evaluation()  # of several processes' too: what is missing is said once, and at once
    if processes == 1:
        return evaluation.run()
    tasks = evaluation.tasks()
    del evaluation
    whole = Part()
    for part in _spread(setup, tasks, processes):
        whole.merge(part)
    return whole


def _spread(setup: Setup, tasks: Sequence[Task], processes: int) -> Iterator[Part]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(setup, threads)
    ) as pool:
        try:
            yield from pool.map(_do, tasks)
        except BrokenProcessPool as error:
            raise InputError(
                "a process of the evaluation was killed, perhaps for want of memory: use fewer --processes"
            ) from error


def _face_reader(*, required: bool) -> FaceReader | None:
    """Where its networks are missing and not required, what they would read is left out, and said so."""
    try:
        return FaceReader()
    except StableAvatarError as error:
        if required:
            raise
        logger.warning("left out, face identity and lips by landmarks: %s", error)
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stableavatar.evaluation.tiny", description="The table of the embedded model."
    )
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument("--quick", action="store_true", help="a subset, some minutes on two cores")
    plans.add_argument(
        "--development", action="store_true", help="other puppets, to choose settings on; no photographs"
    )
    parser.add_argument("--model", default="tiny", help="tiny, or a folder in this project's layout")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--gate", type=Path, help="measure the autoencoder in this folder alone")
    parser.add_argument(
        "--out", type=Path, help="a document to write the table and pictures into, such as docs/tiny.md"
    )
    parser.add_argument(
        "--portrait",
        type=Path,
        action="append",
        default=[],
        help="a further photograph of a face to animate (may be repeated)",
    )
    parser.add_argument(
        "--curves", type=Path, help="a folder of training logs (*.jsonl) to draw the loss curves from"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="share the clips, each with a model of its own"
    )
    parser.add_argument("--steps", type=int, help="denoising steps in place of the model's own")
    parser.add_argument("--text-scale", type=float, help="strength of the prompt in place of the model's own")
    parser.add_argument(
        "--audio-scale", type=float, help="strength of the speech in place of the model's own"
    )
    return parser


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines. Returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.development and (options.out is not None or options.portrait):
        logger.error("--development is for choosing settings: leave --out and --portrait out")
        return 2
    if options.curves is not None and options.out is None:
        logger.error("--curves are drawn into a document: give --out too")
        return 2
    given = {"steps": options.steps, "text_scale": options.text_scale, "audio_scale": options.audio_scale}
    if options.gate is not None and (
        any(value is not None for value in given.values())
        or (options.model, options.dtype) != ("tiny", "auto")
    ):
        logger.error("--gate measures an autoencoder alone: leave --model, --dtype, --steps and scales out")
        return 2
    console = Console(width=None if sys.stdout.isatty() else 200)
    started = time.monotonic()
    plan = QUICK if options.quick else DEVELOPMENT if options.development else FULL
    setup = Setup(
        plan=plan,
        model=options.model,
        dtype=options.dtype,
        gate=options.gate,
        options={name: value for name, value in given.items() if value is not None},
        portraits=options.portrait,
    )
    if options.curves is not None:  # not after an hour's work
        find_logs(options.curves)
    if options.out is not None:
        check_document(options.out)
    measured = measure(setup, options.processes)
    minutes = (time.monotonic() - started) / 60
    title = (
        f"{options.gate or options.model}, {plan.puppets} puppets x {plan.seconds:g} s, "
        f"seeds from {plan.seed}, {minutes:.1f} min"
    )
    console.print(rich_table(measured.scores, title))
    if options.out is not None:
        write_report(options.out, measured.scores, measured.exhibits, title, options.curves)
    missed = measured.scores.missed()
    if plan is FULL and options.gate is None:
        missed += measured.scores.unmeasured()
        if len(options.portrait) < _MORE_PHOTOGRAPHS:
            missed.append(
                f"photographs: the bars are for {1 + _MORE_PHOTOGRAPHS}, give {_MORE_PHOTOGRAPHS} beside the "
                "astronaut with --portrait"
            )
    for line in missed:
        console.print(f"[bold red]missed[/] {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
