"""Errors whose text is for the user: what was wrong, in which file, and what to do."""


class StableAvatarError(Exception):
    """The base of every error that the package raises on purpose; its text is shown without a traceback."""


class InputError(StableAvatarError, ValueError):
    """A file or an option that was given cannot be used as it is."""


class StorageError(InputError):
    """Something cannot be written: no room, no right. What was read is not to blame."""


class CheckpointError(StableAvatarError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class StoppedError(StableAvatarError):
    """A run was asked to stop, and has saved what it goes on from."""


class ProcessError(StableAvatarError):
    """Another of the processes that make a video together was lost, or has ended."""
