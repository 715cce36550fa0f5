"""What a process says: the package's own log, and quiet libraries."""

import logging
import os
import sys
import warnings
from typing import TextIO


def log_to_stderr(verbosity: int) -> None:
    """Show the package's own log: warnings; with `verbosity` 1 what is being done, with 2 everything."""
    logger = logging.getLogger("stableavatar")
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        logger.addHandler(_StandardError())


def quieten_libraries(verbosity: int, *, downloads: bool = True) -> None:
    """Keep diffusers' and transformers' bars and warnings to themselves; all of them speak at verbosity 2.

    Args:
        downloads: show the bars of the hub's downloads, where there is a terminal.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if verbosity < 2:
        # The libraries read these when they are imported.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|diffusers|transformers)\b")
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    if downloads and sys.stderr.isatty():
        enable_progress_bars()
    else:
        disable_progress_bars()


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what the standard error stream is at the time: a progress bar puts itself in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to it."""
        self.stream = sys.stderr
        super().emit(record)
