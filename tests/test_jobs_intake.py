"""What strangers send is looked at before it is taken."""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import portrait, speech
from media_files import write_wav
from stableavatar.errors import InputError
from stableavatar.jobs.intake import (
    BusyError,
    FileChecker,
    Limits,
    _Turns,
    check_options,
    look_at_files,
    without_folder,
)
from stableavatar.jobs.quotas import Quotas
from stableavatar.options import GenerateOptions, SamplingDefaults


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 101}, "steps 101 is too large: 100 at most"),
        ({"duration": 601.0}, "duration 601 is too large"),
        ({"fps": 61.0}, "fps 61 is too large"),
        ({"width": 1024, "height": 1024}, "1048576 pixels"),
        ({"order": "lockstep"}, "wavefront, causal"),
        ({"prompt": "x" * 4001}, "4000 characters"),
        ({"decoder_device": "cuda"}, "there is no option decoder_device"),
        ({"steps": 0}, "too small"),
    ],
)
def test_options_above_a_limit_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_options(values, Limits())


def test_files_are_looked_at(tmp_path: Path) -> None:
    picture, sound = portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav", 1.5)
    checker = FileChecker(Limits(seconds=2.0, portrait_pixels=4000))
    try:
        found = checker.check("ann", picture, sound, GenerateOptions())
        assert (found.seconds, found.width, found.height) == (1.5, 40, 48)
        assert checker.check("ann", picture, sound, GenerateOptions(duration=1.0)).seconds == 1.0
        assert checker.check("ann", picture, None, GenerateOptions(duration=1.0)).seconds == 1.0
        with pytest.raises(InputError, match="needs a duration"):
            checker.check("ann", picture, None, GenerateOptions())
        with pytest.raises(InputError, match="longer than 2 s"):
            checker.check("ann", picture, speech(tmp_path / "long.wav", 2.1), GenerateOptions())
        with pytest.raises(InputError, match="shorter than a frame"):
            checker.check("ann", picture, speech(tmp_path / "short.wav", 0.03), GenerateOptions())
        with pytest.raises(InputError, match=r"0\.00192 .*at most 0\.001 megapixels"):
            FileChecker(Limits(portrait_pixels=1000)).check("ann", picture, sound, GenerateOptions())
    finally:
        checker.close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"aspect": "tall"}, "no tall size"),
        ({"overlap": 9}, "does not fit a window of 33"),
        ({"overlap": 8}, ""),
    ],
)
def test_what_the_model_cannot_make_is_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    picture = portrait(tmp_path / "portrait.png")
    checker = FileChecker(Limits(), SamplingDefaults(window=33, sizes={"square": (128, 128)}))
    try:
        refused = pytest.raises(InputError, match=words) if words else contextlib.nullcontext()
        options = GenerateOptions(duration=1.0, **values)
        found = checker.check("ann", picture, None, options)
        assert found.width == 40
        with refused:
            checker.check_options(options, found)
        with pytest.raises(InputError, match="start 2 is a place in the speech"):
            checker.check("ann", picture, None, GenerateOptions(duration=1.0, start=2.0))
    finally:
        checker.close()


def test_what_breaks_or_delays_the_reader_is_refused_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, sound = portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav")
    checker = FileChecker(Limits(check_seconds=20))
    try:
        monkeypatch.setattr("stableavatar.jobs.intake.look_at_files", _die)
        with pytest.raises(InputError, match="one of the files cannot be read"):
            checker.check("ann", picture, sound, GenerateOptions())
        monkeypatch.undo()
        assert checker.check("ann", picture, sound, GenerateOptions()).seconds == pytest.approx(0.6)
        assert checker._pool is not None
        for process in checker._pool._processes.values():  # lost while nothing is looked at
            process.kill()
            process.join()
        assert checker.check("ann", picture, sound, GenerateOptions()).seconds == pytest.approx(0.6)
        impatient = FileChecker(Limits(check_seconds=0.001))
        with pytest.raises(InputError, match="could not be read within"):
            impatient.check("ann", picture, sound, GenerateOptions())
        impatient.close()
    finally:
        checker.close()


def test_owners_take_turns_at_being_looked_at_too() -> None:
    turns, order = _Turns(4), list[str]()
    begun, go_on = threading.Event(), threading.Event()

    def wait(owner: str, number: int) -> None:
        with turns.turn(owner):
            order.append(f"{owner}{number}")
            begun.set()
            go_on.wait(10)

    threads = []
    for owner, number in (("ann", 0), ("ann", 1), ("ann", 2), ("bob", 0), ("ann", 3)):
        threads.append(threading.Thread(target=wait, args=(owner, number)))
        threads[-1].start()
        begun.wait(10)
        while len(turns._waiting) < len(threads) - 1:
            time.sleep(0.001)
    with pytest.raises(BusyError), turns.turn("cid"):
        pass
    go_on.set()
    for thread in threads:
        thread.join()
    assert order == ["ann0", "bob0", "ann1", "ann2", "ann3"]


def test_one_owner_has_so_many_files_looked_at_and_leaves_room_for_others() -> None:
    checker = FileChecker(Limits(quotas=Quotas(waiting_each=2)))
    with checker.asking("ann"), checker.asking("ann"):
        with pytest.raises(BusyError, match="of yours"), checker.asking("ann"):
            pass
        with checker.asking("bob"):
            pass
    with checker.asking("ann"):
        assert list(checker._asking) == ["ann"]


def test_sound_of_too_few_samples_is_refused(tmp_path: Path) -> None:
    picture, sound = portrait(tmp_path / "portrait.png"), write_wav(tmp_path / "speech", np.zeros(5000), 100)
    with pytest.raises(InputError, match="100 samples a second"):
        look_at_files(picture, sound, GenerateOptions(start=19_000), Limits())


def _die(*_: Any) -> None:
    os._exit(1)


def test_errors_do_not_tell_where_files_lie() -> None:
    folder = Path("/data/jobs/video_1")
    assert without_folder(f"recording {folder / 'speech'}: cut off", folder) == "speech: cut off"
    assert without_folder(f"portrait {folder / 'portrait'}: no picture", folder) == "portrait: no picture"
    assert str(folder) not in without_folder(f"output {folder / 'video.mp4'}: no room", folder)
