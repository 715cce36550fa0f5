"""A recipe in two processes, killed as a machine ends it: all of them at once, while they start, train or save."""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from recipe_toys import SQUARE, toy, write_data
from stableavatar.training.checkpoints import list_checkpoints, load_checkpoint


def start(data: Path, out: Path, steps: int) -> subprocess.Popen[bytes]:
    """As a user starts it and goes on with it."""
    chosen = toy(
        data, out, f"trainer.steps={steps}", "trainer.checkpoint_every=1", "trainer.ema_decay=0.9",
        "trainer.accumulation=2", "trainer.workers=1",
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "stableavatar",
         "train", str(SQUARE), "--resume", "latest", *(word for it in chosen for word in ("--set", it))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def reached(folder: Path) -> int:
    found = list_checkpoints(folder)
    return int(load_checkpoint(found[-1]).counters["step"]) if found else 0


def test_ten_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    data, killed, whole = write_data(tmp_path), tmp_path / "killed", tmp_path / "whole"
    moments = random.Random(11)
    for number in range(10):
        before = list_checkpoints(killed)[-1:]
        process = start(data, killed, 10**6)
        if number % 4 == 1:  # while it starts, or a little later
            time.sleep(moments.uniform(0, 10))
        else:
            until = time.monotonic() + 120
            while list_checkpoints(killed)[-1:] == before:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 1.5))
        assert process.poll() is None
        everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in everyone:  # each has a session of its own
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        assert not psutil.wait_procs(everyone, timeout=20)[1]
    steps = reached(killed) + 2
    assert steps >= 9
    for out in (killed, whole):
        assert start(data, out, steps).wait(timeout=300) == 0
    found, wanted = (load_checkpoint(list_checkpoints(out)[-1]) for out in (killed, whole))
    for state in (found, wanted):
        state.counters["record"].pop("output")
    assert found.counters == wanted.counters
    assert found.ema is not None
    assert wanted.ema is not None
    for ours, theirs in ((found.model, wanted.model), (found.ema, wanted.ema)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert not list(killed.glob(".step-*"))
