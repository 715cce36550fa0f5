"""Latents that a transformer makes of puppets, and a decoder that learns from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stableavatar
from stableavatar.conditioning.image import encode_clips
from stableavatar.data.puppets import ClipStore, build_store
from stableavatar.errors import InputError
from stableavatar.models.latents import normalise_latents
from stableavatar.pipeline import load
from stableavatar.sampling.denoiser import Schedule
from stableavatar.training.tiny import autoencoder, made_latents
from stableavatar.training.tiny.assemble import replace_autoencoder
from stableavatar.training.tiny.autoencoder import AutoencoderTrainer
from stableavatar.training.tiny.autoencoder_batches import Batches
from stableavatar.training.tiny.autoencoder_settings import AutoencoderSettings
from stableavatar.training.tiny.made_latents import LastSteps, MadeLatents
from stableavatar.training.tiny.pictures import PictureClips

ASSETS = Path(stableavatar.__file__).parent / "assets"


FRAMES = 33
"""Of a window of tiny."""
SMALL: dict[str, object] = {
    "base_channels": 8,
    "latent_channels": 32,
    "image_steps": 0,
    "clip_lengths": (1, 5),
    "clip_weights": (0.5, 0.5),
    "warmup_steps": 1,
    "processes": 1,
    "made_share": 1.0,
}


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    build_store(folder, seeds=(960_000, 960_001), seconds=FRAMES / 25, size=64, processes=1)
    return folder


def make(puppets: Path, out: Path, *more: str) -> int:
    arguments = ["--puppets", str(puppets), "--out", str(out), "--clips", "2", "--processes", "1", *more]
    return made_latents.main(arguments)


@pytest.fixture(scope="module")
def made(puppets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert make(puppets, folder) == 0
    return folder


def test_they_are_near_those_of_the_true_frames_and_are_not_these(puppets: Path, made: Path) -> None:
    """Nearer than what the transformer makes of the same clip from noise alone."""
    pipeline = load("tiny")
    clip = ClipStore(puppets)[0]
    pixels = torch.from_numpy(clip.read_frames(0, FRAMES)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    true = encode_clips(pipeline.vae, pixels)
    latents = load_file(made / f"{clip.folder.name}.safetensors")["latents"]
    found = normalise_latents(pipeline.vae, latents.float()[None])
    assert found.shape == true.shape == (1, pipeline.vae.config.z_dim, 9, 8, 8)
    alone = pipeline.sample_latents(
        clip.portrait, clip.samples, prompt=clip.prompt, seed=clip.seed, width=64, height=64, fps=25
    ).latents
    assert 0.02 < (found - true).std() < 0.8 * (alone - true).std()


def test_the_first_steps_are_left_out() -> None:
    given, last = load("tiny").scheduler, LastSteps.from_config(load("tiny").scheduler.config)
    whole, rest = Schedule.from_scheduler(given, 10), Schedule.from_scheduler(last, 10)
    assert torch.equal(rest.timesteps, whole.timesteps[4:])
    assert torch.equal(rest.sigmas, whole.sigmas[4:])


def test_only_another_models_are_made_anew(puppets: Path, made: Path, tmp_path: Path) -> None:
    own, other = sorted(made.iterdir())
    with safe_open(own, "pt") as opened:
        origin = opened.metadata()
    save_file({"latents": torch.zeros(1, 2)}, tmp_path / own.name, metadata=origin)
    save_file({"latents": torch.zeros(1, 2)}, tmp_path / other.name, metadata={"origin": "another"})
    with pytest.raises(InputError, match="was made by another model"):
        MadeLatents(tmp_path, [ClipStore(puppets)])
    assert make(puppets, tmp_path) == 0
    assert load_file(tmp_path / own.name)["latents"].shape == (1, 2)
    assert torch.equal(load_file(tmp_path / other.name)["latents"], load_file(other)["latents"])


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


def trainer(out: Path, folder: Path, puppets: Path, **changes: object) -> AutoencoderTrainer:
    settings = AutoencoderSettings(**{**SMALL, **changes})  # type: ignore[arg-type]
    pairs = MadeLatents(folder, [ClipStore(puppets)])
    batches = Batches(settings, PictureClips([]), None, made=pairs)
    begun = AutoencoderTrainer(settings, batches, out)
    begun.freeze_encoder()
    return begun


def test_the_decoder_learns_from_them(puppets: Path, made: Path, tmp_path: Path) -> None:
    learner = trainer(tmp_path, made, puppets)
    errors = [learner.train_step()["squared"] for _ in range(30)]
    assert np.mean(errors[-5:]) < 0.7 * np.mean(errors[:5])


def test_a_long_clip_in_chunks_is_the_same_clip(puppets: Path, made: Path, tmp_path: Path) -> None:
    long = {"clip_lengths": (21,), "clip_weights": (1.0,)}
    whole, chunks = (trainer(tmp_path, made, puppets, **long, longest_chunk=most) for most in (20, 4))
    for one in (whole, chunks):  # branches are silent at the start
        with torch.no_grad():
            for parameter in one.vae.parameters():
                parameter.add_(
                    0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                )
    found, expected = chunks.train_step(), whole.train_step()
    assert found["squared"] == pytest.approx(expected["squared"], rel=2e-2)
    assert MadeLatents(made, [ClipStore(puppets)]).frames == FRAMES


def test_two_processes_put_what_they_have_learned_into_the_model(
    puppets: Path, made: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny", model)
    before = AutoencoderKLWan.from_pretrained(model / "vae")
    arguments = {
        "--out": tmp_path / "run", "--puppets": puppets, "--made": made, "--into": model,
        "--start-from": model / "vae", "--latent-channels": before.config.z_dim, "--minutes": 0.05,
        "--frames-a-step": 2, "--longest-whole-clip": 5, "--made-share": 1.0, "--critic-share": 0.1,
        "--critic-start": 0, "--processes": 2,
    }  # fmt: skip
    command = ["--freeze-encoder", *(str(word) for pair in arguments.items() for word in pair)]
    assert autoencoder.main(command) == 0
    after = AutoencoderKLWan.from_pretrained(model / "vae")
    assert torch.equal(after.encoder.conv_in.weight, before.encoder.conv_in.weight)
    assert not torch.equal(after.decoder.conv_out.weight, before.decoder.conv_out.weight)
    assert after.config.latents_std == before.config.latents_std


def test_processes_share_the_critics_gradient(
    puppets: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = trainer(tmp_path, made, puppets, critic_share=0.1, critic_start=0)
    assert learner.critic is not None
    shared: list[int] = []
    monkeypatch.setattr(autoencoder.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(autoencoder.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(autoencoder.dist, "all_reduce", lambda flat: shared.append(flat.numel()))
    learner.train_step()
    trained = [*learner.vae.decoder.parameters(), *learner.vae.post_quant_conv.parameters()]
    trained += learner.critic.parameters()
    assert shared == [sum(parameter.numel() for parameter in trained) + 2]


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
    shift = [value + 0.1 for value in trained.config.latents_mean]
    changes: list[Callable[[AutoencoderKLWan], object]] = [
        lambda vae: vae.encoder.conv_in.weight.data.mul_(1.1),
        lambda vae: vae.quant_conv.weight.data.mul_(1.1),
        lambda vae: vae.register_to_config(latents_mean=shift),
    ]
    for number, change in enumerate(changes):
        other = AutoencoderKLWan.from_pretrained(tmp_path / "decoder")
        change(other)
        other.save_pretrained(tmp_path / str(number))
        with pytest.raises(InputError, match="encodes frames otherwise"):
            replace_autoencoder(tmp_path / "model", tmp_path / str(number))
    with pytest.raises(InputError, match="is no model folder"):
        replace_autoencoder(tmp_path, tmp_path / "decoder")


def test_what_cannot_be_used_is_said(made: Path, tmp_path: Path, puppets: Path) -> None:
    store = ClipStore(puppets)
    with pytest.raises(InputError, match="There are no latents in"):
        MadeLatents(tmp_path, [store])
    with pytest.raises(InputError, match="none of the given stores"):
        MadeLatents(made, [])
    with pytest.raises(InputError, match="both have 0000960000"):
        MadeLatents(made, [store, store])
    with pytest.raises(InputError, match="no length of clips"):
        trainer(tmp_path, made, puppets, clip_lengths=(1, 41))
    with pytest.raises(InputError, match=r"have \d+ channels, not 3"):
        trainer(tmp_path, made, puppets, latent_channels=3)
    assert make(tmp_path / "none", tmp_path / "out") == 2
    assert make(puppets, tmp_path / "out", "--model", str(tmp_path / "none")) == 2
    assert make(puppets, tmp_path / "out", "--processes", "0") == 2
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / next(made.iterdir()).name).write_bytes(b"no latents")
    with pytest.raises(InputError, match="cannot be read"):
        MadeLatents(broken, [store])


@pytest.mark.parametrize("option", ["--made", "--into"])
def test_a_training_that_could_not_use_it_is_refused_at_once(
    option: str, puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path / "vae"), "--puppets", str(puppets), option, str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="2"):
        autoencoder.main(command)
    assert "--freeze-encoder" in capsys.readouterr().err
    assert autoencoder.main([*command, "--freeze-encoder"]) == 2
