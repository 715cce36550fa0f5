"""Sessions as tests begin them."""

import base64
import threading
from typing import Any


def spoken(files: dict[str, bytes]) -> dict[str, Any]:
    """How a session of the toy model begins."""
    options = {"steps": 1, "text_scale": 1.0, "audio_scale": 1.0, "size": "48x48"}
    return {"type": "start", "portrait": base64.b64encode(files["portrait"]).decode(), "options": options}


class StalledSession:
    """Whose worker says nothing."""

    answered = True

    def __init__(self) -> None:
        self.closed = threading.Event()

    def say(self, _samples: bytes) -> None:
        pass

    def end_speech(self) -> None:
        pass

    def wait(self, _patience: float) -> bool:
        return True

    def receive(self) -> None:
        self.closed.wait(60)

    def close(self) -> None:
        self.closed.set()
