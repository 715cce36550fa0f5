"""What the package says of what cannot be used, in Chinese: sentences as they are raised, not as they were."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

from command_line import portrait, speech
from media_files import write_video, write_wav
from stableavatar.apps.web.sentences import _SENTENCES, in_words
from stableavatar.checkpoints import hub_files
from stableavatar.data.extract import extract_audio
from stableavatar.errors import StableAvatarError
from stableavatar.jobs.intake import FileChecker, Found, Limits, _Turns, check_options, look_at_files
from stableavatar.jobs.quotas import Quotas
from stableavatar.jobs.store import MOST_CRASHES, JobStore
from stableavatar.jobs.worker import FAULT, TOO_LITTLE_MEMORY
from stableavatar.options import GenerateOptions, SamplingDefaults
from stored_jobs import add, found

CHINESE = re.compile("[\u4e00-\u9fff]")


def raised(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(StableAvatarError) as caught:
        call(*arguments, **named)
    return str(caught.value)


def of_options() -> Iterator[str]:
    for values in (
        {"width": 50, "height": 64},
        {"width": 64},
        {"width": 2048, "height": 2048},
        {"steps": 10_000},
        {"steps": 0},
        {"duration": 0.0},
        {"text_scale": float("nan")},
    ):
        yield raised(check_options, values, Limits())


def of_files(folder: Path) -> Iterator[str]:
    picture, sound = portrait(folder / "picture.png"), speech(folder / "speech", 1.0)
    text = folder / "portrait"
    text.write_bytes(b"This is no picture. " * 20)
    options, limits = GenerateOptions(), Limits()
    yield raised(look_at_files, text, sound, options, limits)
    text.write_bytes(b"")
    yield raised(look_at_files, text, sound, options, limits)
    text.write_bytes(picture.read_bytes()[: -picture.stat().st_size // 3])
    yield raised(look_at_files, text, sound, options, limits)
    text.write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    yield raised(look_at_files, text, sound, options, limits)
    yield raised(look_at_files, picture, sound, options, Limits(portrait_pixels=100))
    Image.new("RGB", (4, 4)).save(folder / "small.png")
    yield raised(look_at_files, folder / "small.png", sound, options, limits)
    yield raised(look_at_files, picture, sound, options, Limits(seconds=0.5))
    yield raised(look_at_files, picture, write_wav(folder / "slow", np.zeros(5000), 100), options, limits)
    (folder / "no sound").write_bytes(b"This is no sound. " * 20)
    yield raised(look_at_files, picture, folder / "no sound", options, limits)
    yield raised(look_at_files, picture, write_wav(folder / "short", np.zeros(160), 16000), options, limits)
    yield raised(look_at_files, picture, None, GenerateOptions(duration=1.0, start=2.0), limits)
    yield raised(look_at_files, picture, sound, GenerateOptions(start=20.0), limits)
    write_video(folder / "silent.mp4", [np.zeros((16, 16, 3), np.uint8)] * 5)
    yield raised(look_at_files, picture, folder / "silent.mp4", options, limits)
    whole = sound.read_bytes()
    (folder / "half").write_bytes(whole[: len(whole) // 2])
    yield raised(look_at_files, picture, folder / "half", options, limits)
    large = FileChecker(Limits(video_pixels=1000), SamplingDefaults(window=33, sizes={"square": (128, 128)}))
    yield raised(large.check_options, options, Found(1.0, 9, 9))
    large.close()
    yield raised(large.check, "ann", picture, None, GenerateOptions(duration=1.0))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("stableavatar.media.image.read_picture", _without_memory)
        yield raised(look_at_files, picture, sound, options, limits)
    checker = FileChecker(limits, SamplingDefaults(window=33, sizes={"square": (128, 128)}))
    for chosen in ({"overlap": 9}, {"aspect": "tall"}):
        yield raised(checker.check_options, GenerateOptions(**chosen), Found(1.0, 9, 9))
    yield raised(extract_audio, sound, folder / "out.wav", most_seconds=0.2)


def _without_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


def of_the_hub() -> Iterator[str]:
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    for error in (
        GatedRepoError("", response=response),
        RepositoryNotFoundError("", response=response),
        RevisionNotFoundError("", response=response),
        OfflineModeIsEnabled(),
        LocalEntryNotFoundError(""),
        EntryNotFoundError(""),
        HfHubHTTPError("", response=response),
        OSError(28, "No space left on device", "/checkpoints/file"),
    ):
        yield raised(_in_the_hub, error)


def _in_the_hub(error: Exception) -> None:
    with hub_files.translated("someone/model", "main"):
        raise error


def of_queues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    checker = FileChecker(Limits(quotas=Quotas(waiting_each=1), check_seconds=1e-6))
    picture = portrait(folder / "picture.png")
    yield raised(checker.check, "ann", picture, None, GenerateOptions(duration=1.0))
    checker.close()
    monkeypatch.setattr("stableavatar.jobs.intake.look_at_files", 0)  # which no process can call
    broken = FileChecker(Limits())
    monkeypatch.setattr(broken, "_processes", _lost)
    yield raised(broken.check, "ann", picture, None, GenerateOptions(duration=1.0))
    with checker.asking("ann"):
        yield raised(lambda: checker.asking("ann").__enter__())
    yield raised(lambda: _Turns(0).turn("ann").__enter__())
    for most in ("waiting_each", "waiting", "kept_each", "bytes_each"):
        store = JobStore(folder / most, Quotas(**{most: 1}))
        job = add(store)
        if most == "kept_each":
            store.finish(job.id, "completed")
        yield raised(store.check_room, "bob" if most == "waiting" else "ann")
    store = JobStore(folder / "crashes")
    job = add(store)
    for _ in range(MOST_CRASHES):
        store.take("worker-0")
        store.worker_lost("worker-0", crashed=True)
    yield found(store, job).error or ""
    yield FAULT
    yield TOO_LITTLE_MEMORY


def _lost() -> Any:
    from concurrent.futures.process import BrokenProcessPool

    raise BrokenProcessPool


def test_every_sentence_has_its_chinese_and_every_chinese_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [*of_options(), *of_files(tmp_path), *of_the_hub(), *of_queues(tmp_path, monkeypatch)]
    for sentence in said:
        assert CHINESE.search(in_words(sentence, "zh")), sentence
        assert in_words(sentence, "en") == sentence
    assert in_words("text scale 99 is too large: 10 at most", "zh").startswith("描述强度 99 ")
    assert in_words("duration 0 is too small: more than 0", "zh") == "长度 [秒] 0 太小，须大于 0"
    late = next(it for it in said if "lies after its end" in it)
    assert in_words(late, "zh") == "起点 20 秒超过了录音的结尾，录音只有 1.00 秒。请填写更早的起点。"
    assert "最多 0.4 秒" in in_words(next(it for it in said if "cut off, " in it and "recording" in it), "zh")
    unused = [
        pattern for pattern, _ in _SENTENCES if not any(re.fullmatch(pattern, it, re.DOTALL) for it in said)
    ]
    assert unused == []


def test_what_is_not_known_stays_as_it_is() -> None:
    assert in_words("the moon is full", "zh") == "the moon is full"
