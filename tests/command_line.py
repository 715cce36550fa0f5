"""Runs of the command line for the tests: in this process, or as a user starts it."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
import stableavatar.pipeline, stableavatar.placement.processes
from stableavatar.apps.cli import main
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1), os.dup2(said, 2)
            os.environ.update(job["environment"])
            sys.argv = ["stableavatar", *job["arguments"]]
            status = 1
            try:
                main()
            except SystemExit as end:
                status = end.code or 0
            finally:
                sys.stdout.flush()
                os._exit(status)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="stableavatar-nursery-"))
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments: str | Path) -> int:
        """Begin `stableavatar ARGUMENTS`; its process id. `wait` must follow before the next."""
        return self.start_several([arguments])[0]

    def start_several(self, commands: Sequence[Sequence[str | Path]]) -> list[int]:
        """Begin processes that make one video, as torchrun does, each with its arguments; their ids."""
        port = free_port()
        self._count = len(commands)
        several = self._count > 1
        jobs = [
            {
                "arguments": [str(argument) for argument in arguments],
                "said": str(self._said(rank)),
                "environment": {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._count),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                } if several else {},
            }
            for rank, arguments in enumerate(commands)
        ]  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        return self._answer()[0]

    def wait_for_all(self) -> tuple[list[int], list[str]]:
        """The exit status of each, and what it said."""
        statuses = self._answer()
        return statuses, [self._said(rank).read_text(encoding="utf-8") for rank in range(self._count)]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)

    def _said(self, rank: int) -> Path:
        return self._folder / f"said-{rank}"

    def _answer(self) -> list[int]:
        assert self._process.stdout is not None
        answer: list[int] = json.loads(self._process.stdout.readline())
        return answer


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
