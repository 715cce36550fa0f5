"""Runs of the command line for the tests: in this process, or as a user starts it."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from media_files import tone, write_wav
from stableavatar.apps.cli import app
from toy import toy_folder

# One step of one branch: the least that a video needs.
QUICK = [
    "--steps",
    "1",
    "--text-scale",
    "1",
    "--audio-scale",
    "1",
    "--size",
    "32x32",
    "--preset",
    "ultrafast",
]


@functools.cache
def toy_model() -> Path:
    """A folder with the toy model, made once in a process."""
    return toy_folder(Path(tempfile.mkdtemp(prefix="stableavatar-toy-")))


def run(*arguments: str | Path) -> Result:
    """`stableavatar ARGUMENTS` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    """`python -m stableavatar ARGUMENTS` as a process of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "stableavatar", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def portrait(path: Path) -> Path:
    """A picture with colours and no symmetry."""
    y, x = np.mgrid[0:48, 0:40]
    Image.fromarray(np.stack([x * 6, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)).save(path)
    return path


def speech(path: Path, seconds: float = 0.6, rate: int = 16000) -> Path:
    """A tone."""
    return write_wav(path, tone(seconds, rate), rate)
