"""Latents that a transformer makes of puppets, and a decoder that learns from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

import stableavatar
from stableavatar.conditioning.image import encode_clips
from stableavatar.data.puppets import ClipStore, build_store
from stableavatar.errors import InputError
from stableavatar.models.latents import normalise_latents
from stableavatar.pipeline import load
from stableavatar.training.tiny import autoencoder, made_latents
from stableavatar.training.tiny.assemble import replace_autoencoder
from stableavatar.training.tiny.autoencoder import AutoencoderTrainer
from stableavatar.training.tiny.autoencoder_batches import Batches
from stableavatar.training.tiny.autoencoder_settings import AutoencoderSettings
from stableavatar.training.tiny.made_latents import FRAMES, LastSteps, MadeLatents
from stableavatar.training.tiny.pictures import PictureClips

ASSETS = Path(stableavatar.__file__).parent / "assets"


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    build_store(folder, seeds=(960_000, 960_001), seconds=FRAMES / 25, size=64, processes=1)
    return folder


@pytest.fixture(scope="module")
def made(puppets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    arguments = ["--puppets", str(puppets), "--out", str(folder), "--clips", "2", "--processes", "1"]
    assert made_latents.main(arguments) == 0
    return folder


def test_they_are_near_those_of_the_true_frames_and_are_not_these(puppets: Path, made: Path) -> None:
    vae = load("tiny").vae
    store = ClipStore(puppets)
    true, other = (
        encode_clips(
            vae, torch.from_numpy(clip.read_frames(0, FRAMES)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        )
        for clip in store
    )
    latents = load_file(made / f"{store.folders[0].name}.safetensors")["latents"]
    found = normalise_latents(vae, latents.float()[None])
    assert found.shape == true.shape == (1, vae.config.z_dim, 9, 8, 8)
    error = (found - true).std()
    assert 0.02 < error < 0.6 * (other - true).std()


def test_the_first_steps_are_left_out() -> None:
    given, last = load("tiny").scheduler, LastSteps.from_config(load("tiny").scheduler.config)
    given.set_timesteps(10)
    last.set_timesteps(10)
    assert torch.equal(last.timesteps, given.timesteps[4:])
    assert torch.equal(last.sigmas, given.sigmas[4:])


def test_clips_that_are_there_are_left_as_they_are(puppets: Path, made: Path, tmp_path: Path) -> None:
    for file in made.iterdir():
        save_file({"latents": torch.zeros(1)}, tmp_path / file.name)
    arguments = ["--puppets", str(puppets), "--out", str(tmp_path), "--clips", "2", "--processes", "1"]
    assert made_latents.main(arguments) == 0
    assert all(load_file(file)["latents"].shape == (1,) for file in tmp_path.iterdir())


def test_each_comes_with_its_own_clip(puppets: Path, made: Path) -> None:
    store = ClipStore(puppets)
    samples = MadeLatents(made, [store])
    seen = set()
    for seed in range(8):
        latents, clip, face, lips = samples.sample(np.random.default_rng(seed), 21)
        assert (latents.shape[1:], clip.shape) == ((6, 8, 8), (3, 21, 64, 64))
        names = [
            one.folder.name
            for one in store
            if np.array_equal(one.read_frames(0, 21), ((clip + 1) * 127.5).round().permute(1, 2, 3, 0).byte())
        ]
        assert torch.equal(latents, load_file(made / f"{names[0]}.safetensors")["latents"][:, :6].float()), (
            names
        )
        assert 0 < lips.sum() < face.sum() < face.numel()
        seen.add(names[0])
    assert len(seen) == 2


def trainer(out: Path, folder: Path, puppets: Path) -> AutoencoderTrainer:
    settings = AutoencoderSettings(
        base_channels=8,
        image_steps=0,
        clip_lengths=(1, 5),
        clip_weights=(0.5, 0.5),
        warmup_steps=1,
        processes=1,
        made_share=1.0,
    )
    pairs = MadeLatents(folder, [ClipStore(puppets)])
    batches = Batches(settings, PictureClips([]), None, made=pairs)
    begun = AutoencoderTrainer(settings, batches, out)
    begun.freeze_encoder()
    return begun


def test_the_decoder_learns_from_them(puppets: Path, made: Path, tmp_path: Path) -> None:
    learner = trainer(tmp_path, made, puppets)
    errors = [learner.train_step()["squared"] for _ in range(30)]
    assert np.mean(errors[-5:]) < 0.7 * np.mean(errors[:5])
    silent = tmp_path / "silent"
    silent.mkdir()
    for file in made.iterdir():
        save_file({"latents": torch.zeros_like(load_file(file)["latents"])}, silent / file.name)
    deaf = trainer(tmp_path, silent, puppets)
    assert deaf.train_step()["squared"] != errors[0]


def test_a_trained_decoder_takes_the_place_of_a_models(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    trained = AutoencoderKLWan.from_pretrained(ASSETS / "tiny" / "vae")
    with torch.no_grad():
        trained.decoder.conv_out.bias += 1
    trained.save_pretrained(tmp_path / "decoder")
    replace_autoencoder(tmp_path / "model", tmp_path / "decoder")
    pipeline = load(str(tmp_path / "model"), dtype="bfloat16")
    torch.testing.assert_close(pipeline.vae.decoder.conv_out.bias, trained.decoder.conv_out.bias.bfloat16())
    config = (tmp_path / "model" / "vae" / "config.json").read_text()
    assert "_name_or_path" not in config
    with torch.no_grad():
        trained.encoder.conv_in.weight *= 1.1
    trained.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="encodes frames otherwise"):
        replace_autoencoder(tmp_path / "model", tmp_path / "other")
    with pytest.raises(InputError, match="is no model folder"):
        replace_autoencoder(tmp_path, tmp_path / "decoder")


def test_what_cannot_be_used_is_said(made: Path, tmp_path: Path, puppets: Path) -> None:
    with pytest.raises(InputError, match="There are no latents in"):
        MadeLatents(tmp_path, [ClipStore(puppets)])
    with pytest.raises(InputError, match="none of the given stores"):
        MadeLatents(made, [])
    assert made_latents.main(["--puppets", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    command = ["--out", str(tmp_path / "vae"), "--puppets", str(puppets), "--made", str(tmp_path / "none")]
    assert autoencoder.main(command) == 2
