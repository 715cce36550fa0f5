"""Errors whose text is for the user: what was wrong, in which file, and what to do."""

import errno
import functools
import sys
from collections.abc import Callable
from typing import Any

# What torch and its devices say; only some of them raise `torch.OutOfMemoryError`.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

GO_ON = " Then the same command with --resume goes on."
"""At the end of errors that left a state behind; of those who have no command it is left out."""


class StableAvatarError(Exception):
    """The base of every error that the package raises on purpose; its text is shown without a traceback."""


class InputError(StableAvatarError, ValueError):
    """A file or an option that was given cannot be used as it is."""


class StorageError(InputError):
    """Something cannot be written: no room, no right. What was read is not to blame."""


class CheckpointError(StableAvatarError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class SamplingError(StableAvatarError):
    """Latents or frames became NaN or infinite."""


class StoppedError(StableAvatarError):
    """A run was asked to stop, and has saved what it goes on from."""


class ProcessError(StableAvatarError):
    """Another of the processes that make a video together was lost, or has ended."""


def extra_missing(what: str, extra: str) -> InputError:
    """That something needs packages of an extra of this project's."""
    return InputError(f"{what}. In a clone of the repository: pip install '.[{extra}]'")


def with_status(main: Callable[..., int | None]) -> Callable[..., int]:
    """A module's command that gives its exit status: 2, and why on standard error, where it was given what
    cannot be used."""

    @functools.wraps(main)
    def run(*arguments: Any, **options: Any) -> int:
        try:
            return main(*arguments, **options) or 0
        except StableAvatarError as error:
            print(error, file=sys.stderr)
            return 2

    return run


def is_out_of_room(error: BaseException) -> bool:
    """Whether an error says that a disk is full, of Python's or of the libraries that write for it."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error).lower()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a device, did not suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)
