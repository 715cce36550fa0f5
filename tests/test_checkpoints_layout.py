"""The published files found wherever the user points; what is missing is named with its command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import published_toy as toy
from stableavatar.checkpoints.layout import find_published, is_own
from stableavatar.errors import CheckpointError, InputError

ENCODERS = ["vae", "text_encoder", "tokenizer", "image_encoder", "speech_encoder"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The published layout as empty files: finding reads no weights."""
    root = tmp_path / "a folder" / "checkpoints"
    base = root / toy.BASE
    for file in (
        base / "config.json",
        base / "diffusion_pytorch_model.safetensors",
        base / "Wan2.1_VAE.pth",
        base / toy.T5,
        base / toy.CLIP,
        base / "google/umt5-xxl/tokenizer.json",
        root / "StableAvatar-1.3B/transformer3d-square.pt",
        root / "StableAvatar-1.3B/transformer3d-rec-vec.pt",
        root / "wav2vec2-base-960h/config.json",
        root / "Kim_Vocal_2.onnx",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


@pytest.mark.parametrize("place", [".", "..", toy.BASE, "StableAvatar-1.3B"])
def test_everything_is_found_from_the_root_around_it_and_inside_it(checkpoints: Path, place: str) -> None:
    found = find_published(checkpoints / place)
    base = checkpoints / toy.BASE
    assert found.root.resolve() == checkpoints
    assert found.bases["1.3b"].resolve() == base
    assert {size: sorted(files) for size, files in found.overlays.items()} == {"1.3b": ["rec-vec", "square"]}
    paths = [found.vae, found.text_encoder, found.tokenizer, found.image_encoder, found.speech_encoder]
    assert [path.resolve() for path in paths if path] == [
        base / "Wan2.1_VAE.pth",
        base / toy.T5,
        base / "google/umt5-xxl",
        base / toy.CLIP,
        checkpoints / "wav2vec2-base-960h",
    ]
    assert found.vocal_separator is not None
    assert found.missing("square") == found.missing("rec-vec") == []
    found.require("square")
    assert not is_own(checkpoints / place)
    files = found.transformer_files("rec-vec")
    assert [file.name for file in files if file] == [toy.BASE, "transformer3d-rec-vec.pt"]


def test_relative_paths(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoints / toy.BASE)
    assert find_published(".").missing() == []
    monkeypatch.chdir(checkpoints.parent)
    assert find_published("checkpoints").missing() == []


def test_a_folder_beside_the_weights_does_not_find_them(checkpoints: Path) -> None:
    (checkpoints / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"other: holds no published weights"):
        find_published(checkpoints / "other")


@pytest.mark.parametrize(
    ("removed", "part", "what"),
    [
        (f"{toy.BASE}/diffusion_pytorch_model.safetensors", "transformer", "the Wan base transformer"),
        ("StableAvatar-1.3B/transformer3d-square.pt", "transformer", "the 1.3b transformer 'square'"),
        (f"{toy.BASE}/Wan2.1_VAE.pth", "vae", "the video autoencoder"),
        (f"{toy.BASE}/google/umt5-xxl/tokenizer.json", "tokenizer", "the tokenizer"),
        ("wav2vec2-base-960h/config.json", "speech_encoder", "the speech encoder"),
    ],
)
def test_what_is_missing_is_named_with_the_command(
    checkpoints: Path, removed: str, part: str, what: str
) -> None:
    (checkpoints / removed).unlink()
    found = find_published(checkpoints)
    (missing,) = found.missing("square")
    assert (missing.part, missing.what) == (part, what)
    assert missing.command == f"stableavatar download --variant square --output '{checkpoints}'"
    with pytest.raises(CheckpointError, match=what) as caught:
        found.require("square")
    assert missing.command in str(caught.value)
    assert found.missing("square", parts={"scheduler"}) == []
    if part == "transformer":
        with pytest.raises(CheckpointError, match=what):
            found.transformer_files("square")


def test_14b_base_and_own_trainings(checkpoints: Path) -> None:
    found = find_published(checkpoints)
    whats = [part.what for part in found.missing("square", "14b")]
    assert whats == ["the Wan base transformer", "the 14b transformer 'square'"]
    assert "--variant square --model-size 14b --output" in found.missing("square", "14b")[0].command
    base = checkpoints / "Wan2.1-I2V-14B-480P"
    base.mkdir()
    (base / "diffusion_pytorch_model.safetensors.index.json").touch()
    (checkpoints / "StableAvatar-14B").mkdir()
    (checkpoints / "StableAvatar-14B/transformer3d-checkpoint-1000.pt").touch()
    found = find_published(checkpoints)
    files = found.transformer_files("checkpoint-1000", "14b")
    assert [file.name for file in files if file] == [
        "Wan2.1-I2V-14B-480P",
        "transformer3d-checkpoint-1000.pt",
    ]
    assert found.transformer_files(None, "14b") == (base, None)
    with pytest.raises(
        CheckpointError, match=r"transformers there: checkpoint-1000\); .*training of your own"
    ):
        found.transformer_files("square", "14b")
    with pytest.raises(InputError, match="70b"):
        found.missing("square", "70b")


def test_base_in_diffusers_layout_serves_as_base_and_for_the_encoders(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / toy.BASE)
    base = checkpoints / "Wan2.1-I2V-14B-480P-Diffusers"
    for part, file in (
        ("transformer", "diffusion_pytorch_model-00001-of-00001.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("image_encoder", "model.safetensors"),
        ("tokenizer", "tokenizer.json"),
    ):
        (base / part).mkdir(parents=True)
        (base / part / file).touch()
    found = find_published(checkpoints)
    assert found.bases == {"14b": base / "transformer"}
    assert [getattr(found, part) for part in ENCODERS[:-1]] == [base / part for part in ENCODERS[:-1]]
    (base / "transformer/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    assert not is_own(base)


def test_own_layout_and_foreign_ones(tmp_path: Path) -> None:
    config = tmp_path / "transformer" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"_class_name": "StableAvatarTransformer3DModel"}))
    assert is_own(tmp_path)
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="FluxTransformer2DModel"):
        is_own(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"nowhere: is no folder; get the weights with: stableavatar download"
    ):
        is_own(tmp_path / "nowhere")


def test_a_single_transformer_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "my transformer3d-checkpoint-500.pt"
    file.write_bytes(b"weights")
    for find in (find_published, is_own):
        with pytest.raises(CheckpointError, match="is a file, and a model is a folder") as caught:
            find(file)
        assert f"stableavatar convert CHECKPOINTS FOLDER --transformer '{file}'" in str(caught.value)
        assert "download" not in str(caught.value)
