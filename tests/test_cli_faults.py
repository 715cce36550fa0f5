"""What the command line does not take: a line or two, exit status 2, and nothing left behind."""

import errno
import json
import os
import re
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from command_line import QUICK, portrait, run, speech, start, toy_model
from stableavatar import pipeline
from stableavatar.apps.console import plain_errors
from stableavatar.errors import is_out_of_memory
from stableavatar.journal import Journal

ASSETS = Path(pipeline.__file__).parent / "assets" / "demo"


class Scene:
    """A folder with a good portrait and a good recording, and a command that can be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.picture = portrait(folder / "portrait.png")
        self.recording = speech(folder / "speech.wav")
        self.output = folder / "out.mp4"
        self.model: Path | str = toy_model()
        self.more: list[str] = []

    def refused(self) -> str:
        """Run it; check that it is refused as it should be, and return what is said."""
        before = sorted(self.folder.rglob("*"))
        result = run(
            *["generate", self.picture, self.recording, "-o", self.output, "--model", self.model],
            *QUICK,
            *self.more,
        )
        assert result.exit_code == 2, result.output
        said = result.stderr[result.stderr.index("Error: ") :].strip()
        assert said.count("\n") <= 1
        assert "Traceback" not in result.output
        assert result.stdout == ""
        assert sorted(self.folder.rglob("*")) == before
        return said


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def cut(source: Path, target: Path) -> Path:
    """The first half of a file."""
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    return target


def write_nan(path: Path) -> Path:
    """A WAV of float32 with one sample that is no number."""
    samples = np.zeros(8000, "<f4")
    samples[4000] = np.nan
    data = samples.tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, 16000, 64000, 4, 32)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    path.write_bytes(struct.pack("<4sI", b"RIFF", len(body)) + body)
    return path


def change_config(folder: Path, part: str, **settings: object) -> None:
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


RECORDINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "there is no such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "truncated": (lambda path: cut(ASSETS / "speech.flac", path), "cut off"),
    "not media": (lambda path: path.write_text("To whom it may concern\n" * 50), "not a sound or video"),
    "without sound": (lambda path: Image.new("RGB", (64, 64)).save(path, "PNG"), "sound"),
    "shorter than a frame": (lambda path: speech(path, 0.01), "shorter than a frame"),
    "not numbers": (write_nan, "NaN"),
}


@pytest.mark.parametrize("kind", RECORDINGS)
def test_recordings(scene: Scene, kind: str) -> None:
    spoil, words = RECORDINGS[kind]
    spoil(scene.recording)
    said = scene.refused()
    assert words in said
    assert "speech" in said


PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "there is no such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "truncated": (lambda path: cut(ASSETS / "portrait.png", path), "cut off"),
    "not a picture": (lambda path: path.write_text("To whom it may concern\n" * 50), "picture"),
    "1x1": (lambda path: Image.new("RGB", (1, 1)).save(path), "1x1"),
    "20000x20000": (
        lambda path: Image.new("1", (20000, 20000)).save(path, compress_level=1),
        "400 megapixels",
    ),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(scene: Scene, kind: str) -> None:
    spoil, words = PICTURES[kind]
    spoil(scene.picture)
    said = scene.refused()
    assert words in said
    assert "portrait.png" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--size 100x96", "width 100 is not a multiple of 16; the nearest is 96"),
        ("--size 96x1000", "height 1000 is not a multiple of 16; the nearest is 992"),
        ("--size 96", "such as 512x512"),
        ("--aspect wide", "not both"),
        ("--width 64 --height 64", "not both"),
        ("--width 64", "both width and height"),
        ("--window 18", "the nearest are 17 and 21"),
        ("--window 17 --overlap 5", "choose 2 to 4"),
        ("--overlap 5", "choose 2 to 4"),  # the model's window has 5 latent frames
        ("--steps 0", "steps 0 is too small"),
        ("--quality 52", "quality 52 is too large"),
        ("--fps nan", "fps nan is not a number"),
        ("--duration 0", "duration 0.0 is too small"),
        ("--start 99", "starts"),
        ("--device cuda:99", "choose cpu"),
        ("--device toaster", "choose cpu"),
        ("--frames-folder .", "not empty"),
        ("--variant square", "is one model"),
        ("--model-size 14b", "is one model"),
    ],
)
def test_options(scene: Scene, more: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scene.folder)
    scene.more = more.split()
    assert words in scene.refused()


@pytest.mark.parametrize(
    "more", ["--colour red", "--fit squeeze", "--dtype int3", "--steps many", "--variant wide"]
)
def test_what_is_no_option_is_refused_at_once(scene: Scene, more: str) -> None:
    result = run("generate", scene.picture, scene.recording, "-o", scene.output, *more.split())
    assert result.exit_code == 2
    assert more.split()[0] in result.stderr
    assert "Traceback" not in result.output
    assert not scene.output.exists()


@pytest.mark.parametrize(
    ("name", "words"), [("out.avi", ".mp4"), (".", "folder"), ("no/out.mp4", "there is no folder")]
)
def test_outputs(scene: Scene, name: str, words: str) -> None:
    scene.output = scene.folder / name
    assert words in scene.refused()


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a folder that not even root can write"
)
def test_an_output_folder_that_cannot_be_written(scene: Scene) -> None:
    scene.output = Path("/proc/out.mp4")
    assert "cannot be written" in scene.refused()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_rights(scene: Scene) -> None:
    closed = scene.folder / "closed"
    closed.mkdir(mode=0o500)
    scene.output = closed / "out.mp4"
    assert "cannot be written" in scene.refused()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Journal.begin

    def begin_on_a_full_disk(self: Journal, identity: dict[str, object]) -> None:
        begin(self, identity)
        (self.folder / "unfinished.mp4").symlink_to("/dev/full")

    monkeypatch.setattr(Journal, "begin", begin_on_a_full_disk)
    before = sorted(scene.folder.iterdir())
    result = run(
        *["generate", scene.picture, scene.recording, "-o", scene.output, "--model", scene.model, *QUICK]
    )
    assert result.exit_code == 2, result.output
    assert "No space left" in result.stderr
    assert "Traceback" not in result.output
    assert sorted(scene.folder.iterdir()) == before


def other_width(folder: Path) -> None:
    change_config(folder, "transformer", ffn_dim=128)


def more_layers(folder: Path) -> None:
    change_config(folder, "transformer", num_layers=3)


def no_autoencoder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def cut_weights(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    cut(file, file)


def other_transformer(folder: Path) -> None:
    change_config(folder, "transformer", _class_name="FluxTransformer2DModel")


def no_model(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_width, "have another shape: blocks.0.ffn"),
        (more_layers, "tensors are missing: blocks.2."),
        (no_autoencoder, "its vae"),
        (cut_weights, "damaged or incomplete"),
        (other_transformer, "FluxTransformer2DModel"),
        (no_model, "stableavatar download"),
    ],
)
def test_a_checkpoint_of_another_model(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory, spoil: Callable[[Path], None], words: str
) -> None:
    scene.model = tmp_path_factory.mktemp("model") / "other"
    shutil.copytree(toy_model(), scene.model)
    spoil(scene.model)
    assert words in scene.refused()


def test_a_model_that_is_nowhere(scene: Scene) -> None:
    scene.model = "no such model"
    assert "no such file or folder" in scene.refused()


def test_latents_that_are_no_numbers(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    scene.model = tmp_path_factory.mktemp("model") / "broken"
    shutil.copytree(toy_model(), scene.model)
    file = scene.model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] = torch.full_like(tensors["proj_out.bias"], float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    assert "after step 1 of 1 in window 1" in scene.refused()


def test_too_little_memory(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *_args, **_kwargs: torch.empty(1 << 45))
    assert "--dtype bfloat16" in scene.refused()


def test_what_means_too_little_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_fault_of_ours_shows_where_it_is(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(pipeline, "load", fail)
    result = run("generate", scene.picture, scene.recording, "-o", scene.output)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = run("download", "--output", tmp_path / "checkpoints")
    assert result.exit_code == 2
    assert "HF_ENDPOINT" in result.stderr
    assert result.stderr.strip().count("\n") <= 1
    assert not (tmp_path / "checkpoints").exists()


def test_terminated(scene: Scene) -> None:
    """SIGTERM while frames are written and before a state was saved: nothing is left, and no traceback is
    shown. (Ctrl-C: see test_journal.)"""
    before = sorted(scene.folder.iterdir())
    speech(scene.recording, 40.0)
    frames = scene.folder / "frames"
    process = start(
        *["generate", scene.picture, scene.recording, "-o", scene.output, "--model", scene.model, *QUICK],
        *["--window", "81", "--frames-folder", frames],
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if re.search(r"frame [1-9]", line):
            break
    assert any(scene.folder.glob(".frames.*.pictures"))
    process.send_signal(signal.SIGTERM)
    printed, rest = process.communicate(timeout=300)
    assert process.returncode == 143, "".join(said) + rest
    assert "Traceback" not in rest
    assert printed == ""
    assert sorted(scene.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/log.jsonl"),
            "runs/log.jsonl: there is no room",
        ),
        (
            SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
            "the disk: there is",
        ),
    ],
)
def test_a_disk_that_is_full_wherever_something_is_written(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, plain_errors():
        raise error
    assert ended.value.exit_code == 2
    assert words in capsys.readouterr().err
    with pytest.raises(OSError, match="another"), plain_errors():
        raise OSError(errno.EIO, "another fault")


def test_too_little_memory_names_options_that_the_command_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("stableavatar.media.image.read_picture", fail)
    monkeypatch.setattr("stableavatar.data.extract.extract_frames", fail)
    picture, sound = portrait(tmp_path / "a.png"), speech(tmp_path / "a.wav")
    made = run("generate", picture, sound, "-o", tmp_path / "a.mp4")
    extracted = run("extract-frames", "--video", sound, "-o", tmp_path / "images")
    for done in (made, extracted):
        assert done.exit_code == 2
        assert "too little memory" in done.output
    assert "--offload encoders" in made.output
    assert "--" not in extracted.output
