"""The pictures of docs/settings.md: what a setting does, by `tiny`, with the demo's portrait and recording.

python tests/settings_pictures.py [NAME ...]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stableavatar import load
from stableavatar.data.puppets import articulate
from stableavatar.evaluation.sheets import contact_sheet, telling_moments
from stableavatar.media.audio import SPEECH_RATE, Speech

ROOT = Path(__file__).parents[1]
FOLDER, DEMO = ROOT / "docs" / "settings", ROOT / "src" / "stableavatar" / "assets" / "demo"
SECONDS = 3.0
MOMENTS = 6
WOMAN = "A woman in front of a plain background"

SHEETS: dict[str, dict[str, dict[str, Any]]] = {
    "steps": {f"{steps} steps": {"steps": steps} for steps in (2, 4, 10, 30)},
    "speech": {f"speech {scale:g}": {"audio_scale": scale, "text_scale": 2.0} for scale in (0, 1, 2, 5)},
    "prompt": {
        f"prompt {scale:g}": {"prompt": f"{WOMAN}. She is smiling and talking.", "text_scale": scale}
        for scale in (0, 2, 4, 8)
    },
    "words": {
        word: {"prompt": f"{WOMAN}. She is {word} and talking.", "text_scale": 4.0}
        for word in ("smiling", "serious", "surprised", "nodding")
    },
    "seed": {f"seed {seed}": {"seed": seed} for seed in (1, 2, 3)},
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    portrait, recording = DEMO / "portrait.png", DEMO / "speech.flac"
    pipeline = load("tiny")
    with Speech.open(recording, duration=SECONDS) as speech:
        called = articulate(speech.samples(0, len(speech)), SPEECH_RATE, 25).opening
    moments = telling_moments(called, MOMENTS)
    for name in names or SHEETS:
        rows: dict[str, NDArray[np.uint8]] = {}
        for label, options in SHEETS[name].items():
            stream = pipeline.stream(portrait, recording, duration=SECONDS, **{"seed": 1, **options})
            rows[label] = np.stack(list(stream))
        contact_sheet(rows, moments).save(FOLDER / f"{name}.jpg", quality=85)
        print(FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main(sys.argv[1:])
