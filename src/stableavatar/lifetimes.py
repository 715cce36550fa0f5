"""Processes that end with the one that started them."""

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """Let this process, which `multiprocessing` has started, end at once where its parent was killed: it has
    nobody to work for."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
