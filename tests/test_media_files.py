"""Files and folders that are complete under their name, or not there."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stableavatar.errors import InputError
from stableavatar.media.encoding import _repeatable
from stableavatar.media.files import cannot_write, refuse_source, replacing


def _file(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _folder(path: Path, text: str) -> None:
    (path / "deeper").mkdir(parents=True)
    _file(path / "deeper" / "file", text)


def _text(path: Path) -> str:
    return (path / "deeper" / "file" if path.is_dir() else path).read_text(encoding="utf-8")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("write", [_file, _folder])
@pytest.mark.parametrize("before", [None, _file, _folder])
def test_the_new_takes_the_place_of_the_old(
    tmp_path: Path, write: Callable[[Path, str], None], before: Callable[[Path, str], None] | None
) -> None:
    target = tmp_path / "target"
    if before is not None:
        before(target, "old")
    with replacing(target) as partial:
        write(partial, "new")
        assert (_text(target) if before else target.exists()) == ("old" if before else False)
    assert _text(target) == "new"
    assert _names(tmp_path) == {"target"}


@pytest.mark.parametrize("write", [_file, _folder])
def test_a_failure_leaves_the_old_one(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    target = tmp_path / "target"
    write(target, "old")
    with contextlib.suppress(ZeroDivisionError), replacing(target) as partial:
        write(partial, "half")
        _ = 1 / 0
    assert _text(target) == "old"
    assert _names(tmp_path) == {"target"}


def test_what_a_kill_left_is_put_right_by_the_next(tmp_path: Path) -> None:
    """Killed between the two renames: the old folder has no name, the new one is complete but unnamed."""
    target = tmp_path / "target"
    _folder(tmp_path / ".target.previous", "old")
    _folder(tmp_path / ".target.partial", "new")
    with contextlib.suppress(ZeroDivisionError), replacing(target, alone=True) as partial:
        assert _text(target) == "old"
        assert not partial.exists()
        _ = 1 / 0
    assert _text(target) == "old"
    assert _names(tmp_path) == {"target"}


def test_a_reader_that_has_ended_is_no_lack_of_room() -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError) as raised:
        os.write(write, b"x")
    os.close(write)
    assert str(cannot_write(Path("-"), raised.value)).endswith("its reader has ended.")
    assert "Make room" in str(cannot_write(Path("-"), OSError(errno.ENOSPC, "No space left on device")))


def test_what_is_the_source_itself(tmp_path: Path) -> None:
    source, link = tmp_path / "it", tmp_path / "link"
    source.touch()
    link.hardlink_to(source)
    with pytest.raises(InputError, match="link: is the recording itself"):
        refuse_source(link, source)
    for other in (tmp_path / "not there", tmp_path, tmp_path / ("long" * 99)):
        refuse_source(other, source)
        refuse_source(source, other)


def test_a_processor_without_anything_beyond_what_numpy_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy leaves the key out where the list would be empty."""
    _repeatable.cache_clear()
    monkeypatch.setattr("stableavatar.media.encoding.numpy_config", lambda mode: {"SIMD Extensions": {}})
    assert _repeatable() == ""
    _repeatable.cache_clear()
