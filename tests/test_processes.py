"""Several processes that make one video: real ones, over gloo."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from command_line import Nursery, free_port, portrait, speech, toy_model
from stableavatar.errors import ProcessError
from stableavatar.media.reading import read_frames
from stableavatar.placement.processes import joined
from toy import toy_pipeline

OPTIONS = [
    "--steps",
    "4",
    "--size",
    "32x32",
    "--preset",
    "ultrafast",
    "--seed",
    "5",
    "--checkpoint-every",
    "0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    portrait(folder / "portrait.png")
    speech(folder / "speech.wav", 5.0)
    return folder


def command(folder: Path, output: Path, *more: str | Path) -> list[str | Path]:
    return [
        "generate", folder / "portrait.png", folder / "speech.wav", "-o", output, "--model", toy_model(), *OPTIONS,
        *more,
    ]  # fmt: skip


def decoded(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def of_one(nursery: Nursery, folder: Path) -> np.ndarray:
    """The frames that one process makes, of one thread as the others: with more, sums round otherwise."""
    nursery.start(*command(folder, folder / "one.mp4"))
    assert nursery.wait() == 0
    return decoded(folder / "one.mp4")


def test_torchrun_makes_the_video_of_one_process(folder: Path, of_one: np.ndarray) -> None:
    output = folder / "two.mp4"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "stableavatar", *map(str, command(folder, output)),
        ],
        check=False, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seed 5" in done.stdout
    assert done.stdout.count(str(output)) == 1
    assert np.array_equal(decoded(output), of_one)


def test_three_processes_in_causal_order(nursery: Nursery, folder: Path) -> None:
    nursery.start(*command(folder, folder / "causal1.mp4", "--order", "causal"))
    assert nursery.wait() == 0
    nursery.start_several([command(folder, folder / "causal3.mp4", "--order", "causal")] * 3)
    statuses, said = nursery.wait_for_all()
    assert statuses == [0, 0, 0], said
    assert np.array_equal(decoded(folder / "causal3.mp4"), decoded(folder / "causal1.mp4"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_and_nothing_is_lost(
    nursery: Nursery, folder: Path, of_one: np.ndarray, victim: int
) -> None:
    output = folder / f"lost{victim}.mp4"
    processes = nursery.start_several([command(folder, output)] * 2)
    until((folder / f".lost{victim}.journal" / "journal.json").exists)
    os.kill(processes[victim], signal.SIGKILL)
    killed = time.monotonic()
    statuses, said = nursery.wait_for_all()
    assert time.monotonic() - killed < 5
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 2
    assert "Error" in said[1 - victim]
    assert "lost" in said[1 - victim]
    assert "Traceback" not in said[1 - victim]
    assert ("--resume" in said[1 - victim]) == (victim == 1)
    assert not output.exists()
    nursery.start_several([command(folder, output, "--resume")] * (1 + victim))
    statuses, said = nursery.wait_for_all()
    assert set(statuses) == {0}, said
    assert np.array_equal(decoded(output), of_one)


def test_ctrl_c_saves_what_all_have(nursery: Nursery, folder: Path, of_one: np.ndarray) -> None:
    output = folder / "stopped.mp4"
    processes = nursery.start_several([command(folder, output, "--checkpoint-every", "1000")] * 2)
    until(lambda: any((folder / ".stopped.journal").glob("segment-*")))
    for process in processes:  # a terminal sends it to all of them, and so does torchrun
        os.kill(process, signal.SIGINT)
    statuses, said = nursery.wait_for_all()
    assert statuses == [130, 130], said
    assert "stopped.unfinished.mp4" in said[0]
    assert said[1] == ""
    unfinished = decoded(folder / "stopped.unfinished.mp4")
    assert 0 < len(unfinished) < len(of_one)
    nursery.start_several([command(folder, output, "--resume", "--checkpoint-every", "1000")] * 3)
    statuses, said = nursery.wait_for_all()
    assert statuses == [0, 0, 0], said
    assert np.array_equal(decoded(output), of_one)


def test_a_process_that_is_told_to_end_ends_the_others(nursery: Nursery, folder: Path) -> None:
    output = folder / "told.mp4"
    processes = nursery.start_several([command(folder, output)] * 3)
    until((folder / ".told.journal" / "journal.json").exists)
    os.kill(processes[1], signal.SIGTERM)
    told = time.monotonic()
    statuses, said = nursery.wait_for_all()
    assert time.monotonic() - told < 5
    assert statuses == [2, 143, 2], said
    assert "--resume" in said[0]
    assert "process 1 of 3" in said[2] or "lost" in said[2]
    assert not output.exists()


@pytest.fixture
def scripts() -> Iterator[Callable[[str], "list[subprocess.Popen[str]]"]]:
    """Starts two processes with one of the functions at the end of this file."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str) -> "list[subprocess.Popen[str]]":
        port = free_port()
        for rank in (0, 1):
            environment = {
                "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            started.append(
                subprocess.Popen(
                    [sys.executable, "-u", __file__, name],
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **environment},
                )
            )
        return started

    yield start
    for process in started:
        process.kill()


def test_a_process_that_shows_no_sign_of_life_is_lost(
    scripts: Callable[[str], "list[subprocess.Popen[str]]"],
) -> None:
    """One that is stopped closes no connection, as one whose machine has lost its power."""
    processes = scripts("wait")
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "together\n"
    processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    said = processes[0].communicate(timeout=30)[0]
    assert said.endswith("process 1 of 2 is lost: it shows no sign of life\n")
    assert 2 < time.monotonic() - stopped < 10


def test_who_takes_no_more_frames_ends_the_others(
    scripts: Callable[[str], "list[subprocess.Popen[str]]"],
) -> None:
    said = [process.communicate(timeout=60)[0] for process in scripts("take_one")]
    assert said == ["(32, 32, 3)\n", "process 0 of 2 has ended: no more frames are taken\n"]


def test_what_the_first_takes_is_handed_over_without_waiting_for_it(
    scripts: Callable[[str], "list[subprocess.Popen[str]]"],
) -> None:
    said = [process.communicate(timeout=60)[0] for process in scripts("hand_over")]
    assert said == ["['first', 'second']\n['first again', 'second again']\n", "None\nNone\n"]


@pytest.mark.parametrize(
    ("count", "more", "says"),
    [
        (2, ["--order", "lockstep"], "wavefront"),
        (3, ["--steps", "2"], "2 processes at most"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    nursery: Nursery, folder: Path, count: int, more: list[str], says: str
) -> None:
    nursery.start_several([command(folder, folder / "refused.mp4", *more)] * count)
    statuses, said = nursery.wait_for_all()
    assert statuses == [2] * count, said
    assert says in said[0]
    assert "Traceback" not in "".join(said)
    assert not (folder / "refused.mp4").exists()


def test_other_files_in_one_process_are_refused(nursery: Nursery, folder: Path) -> None:
    other = speech(folder / "other.wav", 4.9)
    output = folder / "different.mp4"
    given = command(folder, output)
    with_other = [other if part == folder / "speech.wav" else part for part in given]
    nursery.start_several([given, with_other])
    statuses, said = nursery.wait_for_all()
    assert statuses == [2, 2]
    assert all("process 1 of 2 has others: the speech" in text for text in said)
    assert not output.exists()


def wait() -> None:
    with joined(lost_after=3) as processes:
        print("together", flush=True)
        try:
            while True:
                time.sleep(0.2)
                processes.numbers([0])
        except ProcessError as error:
            print(error, flush=True)
            os._exit(0)


def take_one() -> None:
    pipeline = toy_pipeline()
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    with joined() as processes:
        if processes.leads:
            stream = pipeline.stream(picture, None, duration=4.0, seed=1, processes=processes)
            print(next(stream).shape, flush=True)
            stream.close()
        else:
            try:
                pipeline.assist(picture, None, processes)
            except ProcessError as error:
                print(error, flush=True)
                os._exit(0)


def hand_over() -> None:
    """The first does not begin to take before the second has handed over and gone on."""
    with joined() as processes:
        store = dist.distributed_c10d._get_default_store()
        for turn in ("", " again"):
            if processes.leads:
                store.wait([f"gone on{turn}"], timedelta(seconds=20))
            print(processes.gather(("first" if processes.leads else "second") + turn), flush=True)
            if not processes.leads:
                store.set(f"gone on{turn}", "yes")


if __name__ == "__main__":
    {"wait": wait, "take_one": take_one, "hand_over": hand_over}[sys.argv[1]]()
