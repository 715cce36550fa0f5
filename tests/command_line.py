"""Runs of the command line for the tests: in this process, or as a user starts it."""

import functools
import json
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


class Nursery:
    """Starts commands as processes of their own without importing everything anew: a process that has imported
    it forks them."""

    SCRIPT = """
import os, sys, json
import stableavatar.pipeline
from stableavatar.apps.cli import app
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        sys.argv = json.loads(line)
        status = 1
        try:
            app()
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments: str | Path) -> int:
        """Begin `stableavatar ARGUMENTS`; its process id. `wait` must follow before the next."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(["stableavatar", *map(str, arguments)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
