"""Work on strangers' files in processes of their own."""

import os
import time

import pytest

from stableavatar.errors import InputError, StoppedError
from stableavatar.jobs.apart import BrokenFileError, run_apart


def twice(value: int) -> int:
    return 2 * value


def refused() -> None:
    raise InputError("no sound")


def lost() -> None:
    os._exit(3)


def greedy() -> int:
    return len(bytearray(8 * 2**30))


def test_what_it_gives_and_raises_is_given_and_raised_here() -> None:
    assert run_apart(twice, 4, seconds=60) == 8
    with pytest.raises(InputError, match="no sound"):
        run_apart(refused, seconds=60)


def test_what_breaks_it_or_keeps_it_busy_ends_it_alone() -> None:
    with pytest.raises(BrokenFileError, match="broke off"):
        run_apart(lost, seconds=60)
    began = time.monotonic()
    with pytest.raises(BrokenFileError, match="more than 1 s"):
        run_apart(time.sleep, 600, seconds=1)
    assert time.monotonic() - began < 60


def test_it_is_given_up_where_somebody_says_so() -> None:
    began = time.monotonic()
    with pytest.raises(StoppedError):
        run_apart(time.sleep, 600, seconds=600, stop=lambda: time.monotonic() - began > 1)
    assert time.monotonic() - began < 60


def test_its_memory_is_bounded() -> None:
    with pytest.raises(MemoryError):
        run_apart(greedy, seconds=60)
