"""Training of the embedded autoencoder and speech encoder, at sizes that take seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from PIL import Image

from stableavatar.errors import InputError
from stableavatar.training.tiny import autoencoder, meter, speech_encoder, text_encoder
from stableavatar.training.tiny.autoencoder import (
    AutoencoderSettings,
    AutoencoderTrainer,
    Batches,
    reconstruction_loss,
)
from stableavatar.training.tiny.autoencoder_model import (
    build_autoencoder,
    reconstruct,
    start_from,
)
from stableavatar.training.tiny.detail import detail
from stableavatar.training.tiny.feature_memory import (
    FeatureMemory,
    chunk_lengths,
    decode_chunk,
    encode_chunk,
    use_training_kernels,
)
from stableavatar.training.tiny.pictures import PictureClips, find_pictures, load_pictures, procedural_picture
from stableavatar.training.tiny.puppet_clips import PuppetClips

SMALL = AutoencoderSettings(
    minutes=60,
    base_channels=8,
    latent_channels=16,
    frames_a_step=2,
    image_steps=0,
    whole_frames=0.0,
    warmup_steps=1,
    processes=1,
)


@pytest.fixture
def small_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return build_autoencoder(8).eval()


def small_trainer(out: Path, start: Path | None = None, **changes: object) -> AutoencoderTrainer:
    settings = AutoencoderSettings(**{**SMALL.__dict__, **changes})
    return AutoencoderTrainer(
        settings, Batches(settings, PictureClips([]), None, frame_size=64), out, start=start
    )


def test_autoencoder_compresses_8_times_in_space_and_4_in_time() -> None:
    vae = build_autoencoder()
    assert 2_500_000 < sum(value.numel() for value in vae.parameters()) < 2_900_000
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 9, 64, 32)).latent_dist.mode()
        assert latents.shape == (1, 32, 3, 8, 4)
        assert vae.decode(latents).sample.shape == (1, 3, 9, 64, 32)


@pytest.mark.parametrize("chunks", [[17], [1, 16], [5, 4, 8], [13, 4]])
def test_chunks_give_what_the_library_gives(small_vae: AutoencoderKLWan, chunks: list[int]) -> None:
    frames = torch.rand(2, 3, 17, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = small_vae.encode(frames).latent_dist
        memory, means, start = FeatureMemory(small_vae), [], 0
        for length in chunks:
            mean, log_variance = encode_chunk(small_vae, frames[:, :, start : start + length], memory)
            means.append(mean)
            start += length
        latents = torch.cat(means, dim=2)
        torch.testing.assert_close(latents, expected.mode(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(log_variance[:, :, -1], expected.logvar[:, :, -1], atol=1e-5, rtol=1e-4)
        memory, made, start = FeatureMemory(small_vae), [], 0
        for length in (mean.shape[2] for mean in means):
            made.append(decode_chunk(small_vae, latents[:, :, start : start + length], memory))
            start += length
        decoded = small_vae.decode(latents).sample
    torch.testing.assert_close(torch.cat(made, dim=2).clamp(-1, 1), decoded, atol=1e-4, rtol=1e-3)


def test_detached_memory_passes_values_but_no_gradient(small_vae: AutoencoderKLWan) -> None:
    first = torch.rand(1, 3, 5, 32, 32, requires_grad=True)
    memory = FeatureMemory(small_vae)
    encode_chunk(small_vae, first, memory)
    memory.detach()
    mean, _ = encode_chunk(small_vae, torch.rand(1, 3, 4, 32, 32), memory)
    mean.sum().backward()
    assert first.grad is None


def test_quick_norms_change_nothing() -> None:
    norm = WanRMS_norm(8, images=False)
    torch.nn.init.uniform_(norm.gamma, 0.5, 2)
    x = torch.randn(2, 8, 3, 4, 4)
    expected = norm(x)
    use_training_kernels(torch.nn.ModuleList([norm]))
    assert "forward" in vars(norm)
    torch.testing.assert_close(norm(x), expected)


def test_a_chunk_off_the_latent_grid_is_refused(small_vae: AutoencoderKLWan) -> None:
    assert chunk_lengths(41, 20) == [21, 20]
    assert chunk_lengths(81, 20) == [21, 20, 20, 20]
    assert chunk_lengths(1, 20) == [1]
    with pytest.raises(ValueError, match="4n"):
        chunk_lengths(40, 20)
    with pytest.raises(ValueError, match="latent grid"):
        encode_chunk(small_vae, torch.zeros(1, 3, 4, 32, 32), FeatureMemory(small_vae))


def test_training_brings_the_error_down(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, clip_lengths=(1,), clip_weights=(1.0,), frames_a_step=4)
    frames = trainer.batches.draw(1_000).clips
    before = (reconstruct(trainer.vae, frames) - frames).square().mean()
    for _ in range(25):
        trainer.train_step()
    assert (reconstruct(trainer.vae, frames) - frames).square().mean() < 0.7 * before
    assert (reconstruct(trainer.average, frames) - frames).square().mean() < before


def test_long_clips_train_every_weight_but_the_variance(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, clip_lengths=(9,), clip_weights=(1.0,), longest_chunk=4)
    before = {name: value.clone() for name, value in trainer.vae.state_dict().items()}
    # Branches start silent: the weights before a silent one learn from the second step on.
    for _ in range(4):
        trainer.train_step()
    after = trainer.vae.state_dict()
    unchanged = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert unchanged == []


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = small_trainer(tmp_path / "a", clip_lengths=(1, 5), clip_weights=(0.5, 0.5))
    for _ in range(2):
        first.train_step()
    first.seconds = 30.0
    first.save()
    first.train_step()
    second = small_trainer(tmp_path / "a", clip_lengths=(1, 5), clip_weights=(0.5, 0.5))
    second.load()
    assert (second.step, second.seconds) == (2, 30.0)
    second.train_step()
    for name, value in first.average.state_dict().items():
        torch.testing.assert_close(second.average.state_dict()[name], value)
    other = small_trainer(tmp_path / "a", base_channels=16)
    with pytest.raises(ValueError, match="base_channels 8"):
        other.load()


def test_a_frozen_encoder_keeps_latents_while_the_decoder_learns(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, clip_lengths=(1,), clip_weights=(1.0,))
    trainer.train_step()
    trainer.freeze_encoder()
    frames = trainer.batches.draw(7).clips

    def encode(vae: AutoencoderKLWan) -> torch.Tensor:
        with torch.no_grad():
            return encode_chunk(vae, frames, FeatureMemory(vae))[0]

    latents, decoder = encode(trainer.average), trainer.average.decoder.conv_out.weight.clone()
    trainer.train_step()
    again, live = encode(trainer.average), encode(trainer.vae)
    assert torch.equal(latents, again)
    torch.testing.assert_close(live, latents, atol=1e-4, rtol=1e-4)
    assert not torch.equal(decoder, trainer.average.decoder.conv_out.weight)
    trainer.save()
    resumed = small_trainer(tmp_path, clip_lengths=(1,), clip_weights=(1.0,))
    resumed.load()
    assert resumed.encoder_frozen
    assert not resumed.vae.quant_conv.weight.requires_grad


def test_exported_latents_are_normalised_by_the_config(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, measured_clips=6)
    trainer.export(tmp_path / "model")
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    clips = [trainer.batches.measured_clip(index) for index in range(6)]
    with torch.no_grad():
        latents = torch.cat([loaded.encode(clip).latent_dist.mode() for clip in clips])
    mean = torch.tensor(loaded.config.latents_mean).view(1, 16, 1, 1, 1)
    deviation = torch.tensor(loaded.config.latents_std).view(1, 16, 1, 1, 1)
    normalised = (latents - mean) / deviation
    assert normalised.mean(dim=(0, 2, 3, 4)).abs().max() < 0.05
    assert (normalised.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 0.05


def test_statistics_stay_once_the_encoder_is_frozen(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, measured_clips=2)
    trainer.freeze_encoder()
    trainer.export(tmp_path / "model")
    trainer.save()
    resumed = small_trainer(tmp_path, measured_clips=4)
    resumed.load()
    resumed.export(tmp_path / "again")
    first, second = (AutoencoderKLWan.load_config(tmp_path / name) for name in ("model", "again"))
    assert first["latents_std"] == second["latents_std"]


def test_a_trained_encoder_that_stays_frozen_keeps_its_statistics(tmp_path: Path) -> None:
    trained = build_autoencoder(8, latent_channels=16)
    trained.register_to_config(latents_mean=[0.25] * 16, latents_std=[1.5] * 16)
    trained.save_pretrained(tmp_path / "trained")
    for name, kept in (("frozen", True), ("learns", False)):
        (tmp_path / name).mkdir()
        trainer = small_trainer(tmp_path / name, start=tmp_path / "trained", measured_clips=2)
        if kept:
            trainer.freeze_encoder()
        trainer.export(tmp_path / name / "model")
        config = AutoencoderKLWan.load_config(tmp_path / name / "model")
        assert (config["latents_mean"] == [0.25] * 16) is kept
        assert (config["latents_std"] == [1.5] * 16) is kept

    # An encoder that has learned since is measured, also where it is frozen only after a stop.
    (tmp_path / "moved").mkdir()
    trainer = small_trainer(tmp_path / "moved", start=tmp_path / "trained", measured_clips=2)
    trainer.train_step()
    trainer.save()
    resumed = small_trainer(tmp_path / "moved", start=tmp_path / "trained", measured_clips=2)
    resumed.load()
    resumed.freeze_encoder()
    resumed.export(tmp_path / "moved" / "model")
    assert AutoencoderKLWan.load_config(tmp_path / "moved" / "model")["latents_std"] != [1.5] * 16


def test_residual_branches_are_silent_at_the_start() -> None:
    vae = build_autoencoder(8).eval()
    frames = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        before = reconstruct(vae, frames)
        for name, value in vae.named_parameters():
            if name.endswith(("conv1.weight", "time_conv.weight", "to_qkv.weight")):
                value.normal_()
        assert torch.equal(before, reconstruct(vae, frames))
        spread = encode_chunk(vae, frames, FeatureMemory(vae))[0].std(dim=(0, 2, 3, 4))
    assert spread.min() > 0.05


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (autoencoder.main, ["--puppets", "nowhere"], "no clip store in nowhere"),
        (autoencoder.main, ["--start-from", "nowhere"], "nowhere: there is no such autoencoder"),
        (autoencoder.main, ["--pictures", "nowhere"], "no folder of pictures at nowhere"),
        (autoencoder.main, ["--minutes", "0"], "must be positive"),
        (meter.main, ["--autoencoder", "nowhere"], "no autoencoder in nowhere"),
        (speech_encoder.main, ["--puppets", "nowhere"], "no clip store in nowhere"),
        (text_encoder.main, ["--steps", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_used_is_said_without_a_traceback(
    main: Callable[[list[str]], int],
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_rate_warms_up_and_falls_at_the_end() -> None:
    settings = AutoencoderSettings(minutes=100, warmup_steps=10, cooldown=0.2)
    factors = [
        autoencoder.rate_factor(settings, step, at) for step, at in ((0, 0), (10, 50), (999, 90), (999, 100))
    ]
    assert factors == pytest.approx([0.1, 1.0, 0.5, 0.05])


def test_settings_refuse_what_cannot_run() -> None:
    with pytest.raises(ValueError, match="4n"):
        AutoencoderSettings(clip_lengths=(4,), clip_weights=(1.0,))
    with pytest.raises(ValueError, match="differ"):
        AutoencoderSettings(clip_lengths=(1, 5), clip_weights=(1.0,))
    with pytest.raises(ValueError, match="positive"):
        AutoencoderSettings(minutes=0)


def test_the_command_trains_in_processes_and_refuses_to_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder, "find_pictures", lambda folders: [])
    command = ["--out", str(tmp_path), "--minutes", "0.0001", "--base-channels", "8", "--processes", "2"]
    autoencoder.main([*command, "--frames-a-step", "2", "--measured-clips", "2"])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] >= 1
    assert AutoencoderKLWan.load_config(tmp_path / "model")["base_dim"] == 8
    with pytest.raises(SystemExit):
        autoencoder.main(command)


def test_free_pictures_leave_the_test_photograph_out(tmp_path: Path) -> None:
    Image.new("RGB", (200, 200), (10, 200, 30)).save(tmp_path / "green.png")
    Image.new("RGB", (200, 200), (10, 200, 30)).save(tmp_path / "same_green.png")
    Image.new("RGB", (200, 200), (1, 2, 3)).save(tmp_path / "astronaut.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "icon.png")
    paths = find_pictures([tmp_path])
    assert any(path.name == "coffee.png" for path in paths)
    assert all("astronaut" not in path.name for path in paths)
    own = [path for path in paths if path.parent == tmp_path]
    loaded = load_pictures(own)
    assert [tuple(picture.shape) for picture in loaded] == [(3, 200, 200)]
    with pytest.raises(InputError, match="nowhere"):
        find_pictures([tmp_path / "nowhere"])


def test_picture_clips_move_and_are_repeatable() -> None:
    picture = procedural_picture(np.random.default_rng(3))
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 256, 256)
    clips = PictureClips([picture], procedural=0.0)
    made = [clips.sample(np.random.default_rng(seed), 5, 32) for seed in range(8)]
    assert all(clip.shape == (3, 5, 32, 32) and clip.abs().max() <= 1 for clip in made)
    assert torch.equal(made[2], clips.sample(np.random.default_rng(2), 5, 32))
    moving = sum(not torch.equal(clip[:, 0], clip[:, 4]) for clip in made)
    assert 4 <= moving <= 8


def test_puppet_crops_keep_masks_on_the_mouth(store: Path) -> None:
    puppets = PuppetClips([store, store])
    seen = 0
    for seed in range(20):
        clip, face, lips = puppets.sample(np.random.default_rng(seed), 5, 16)
        assert clip.shape == (3, 5, 16, 16)
        assert face.shape == lips.shape == (5, 16, 16)
        inside = clip[:, lips > 0]
        seen += inside.shape[1] > 0
        # Red, even when tinted, stays far above green and blue.
        assert (inside[0] > inside[1] + 0.7).all()
        assert (inside[0] > inside[2] + 0.7).all()
        assert (face[lips > 0] == 1).all()
    assert seen >= 10


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished clip"):
        PuppetClips([tmp_path])


def test_a_trained_autoencoder_is_grown_without_a_change_to_its_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = build_autoencoder(8, latent_channels=4)
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(0.05 * torch.randn_like(value))
    trained.save_pretrained(tmp_path)
    grown = build_autoencoder(8, latent_channels=6)
    start_from(grown, tmp_path)
    frames = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(reconstruct(trained.eval(), frames), reconstruct(grown.eval(), frames))
    with torch.no_grad():
        mean, log_variance = encode_chunk(grown, frames, FeatureMemory(grown))
    assert mean.std(dim=(0, 2, 3, 4)).min() > 0.05  # the new channels say something, with little noise
    assert log_variance[:, 4:].max() == -6
    same = build_autoencoder(8, latent_channels=4)
    start_from(same, tmp_path)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in same.state_dict().items())
    with pytest.raises(ValueError, match="more than 2 latent channels"):
        start_from(build_autoencoder(8, latent_channels=2), tmp_path)


def test_detail_is_missed_where_pixels_are_smooth_and_not_told_by_its_place() -> None:
    generator = torch.Generator().manual_seed(0)
    true, other = torch.rand(2, 1, 3, 1, 32, 32, generator=generator) * 2 - 1
    smooth = torch.zeros_like(true)
    assert detail(smooth).max() < 0.01
    missed = (detail(smooth) - detail(true)).square().mean()
    assert (detail(other) - detail(true)).square().mean() < 0.05 * missed
    weight = torch.ones(1, 1, 1, 32, 32)
    alone = AutoencoderSettings(detail_weight=0.0)
    settings = AutoencoderSettings(detail_weight=1.0)
    added = reconstruction_loss(settings, smooth, true, weight) - reconstruction_loss(
        alone, smooth, true, weight
    )
    assert added == pytest.approx((detail(smooth) - detail(true)).square().mean().item(), rel=1e-4)


def test_a_weave_of_pixels_is_no_detail() -> None:
    """Patterns that a decoder of 2x2 pixels a place can draw with no knowledge, at whatever strength is best."""
    generator = torch.Generator().manual_seed(0)
    true, other = torch.rand(2, 1, 3, 1, 32, 32, generator=generator) * 2 - 1
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    # Chequered within each block, neighbouring blocks alike, or by chance alike or opposite.
    weaves = [sign.tile(16, 16), torch.kron(torch.randn(16, 16, generator=generator).sign(), sign)]
    # Detail of every band within each block, none between blocks: right in all but the other three ways.
    bands = ([[1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, 1.0]])
    blocks = sum(torch.kron(torch.randn(16, 16, generator=generator), torch.tensor(band)) for band in bands)

    def error(made: torch.Tensor) -> torch.Tensor:
        return (detail(made) - detail(true)).square().mean()

    def least(pattern: torch.Tensor) -> torch.Tensor:
        tried = torch.linspace(0.02, 1, 50)
        return min(error((strength * pattern).expand(1, 3, 1, 32, 32)) for strength in tried)

    assert all(least(weave) > 10 * error(other) for weave in weaves)
    assert least(blocks) > 1.5 * error(other)


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("size", [16, 64])
def test_the_training_kernels_give_right_gradients_on_any_processor(
    kernel: tuple[int, int, int], size: int
) -> None:
    torch.manual_seed(0)
    plain = WanCausalConv3d(32, 32, kernel, padding=tuple(reach // 2 for reach in kernel))
    ours = copy.deepcopy(plain)
    use_training_kernels(torch.nn.ModuleList([ours]))
    x = torch.randn(2, 32, 5, size, size)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = plain(inputs[0])
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    exact = ours(inputs[1])
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        made = ours(inputs[1])
    assert made.dtype == torch.bfloat16
    made.float().backward(upstream)
    for got, wanted in (
        (inputs[1].grad, inputs[0].grad),
        (ours.weight.grad, plain.weight.grad),
        (ours.bias.grad, plain.bias.grad),
    ):
        assert (got - wanted).norm() < 0.01 * wanted.norm()
