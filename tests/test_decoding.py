"""Latents to frames: latent after latent, in tiles, and on another device than the rest.

There is one device here. `meta` stands for a second one where modules are moved (nothing can be computed on
it, nor taken from it), and a device of torch's fake tensors where it matters what is computed where: they have
a shape and a device, and torch refuses to mix devices.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import apply_group_offloading
from torch._subclasses.fake_tensor import FakeTensorMode

from stableavatar import generation
from stableavatar.errors import InputError, SamplingError
from stableavatar.generation import _Pace
from stableavatar.media.reading import read_metadata
from stableavatar.models.latents import denormalise_latents, normalise_latents
from stableavatar.options import GenerateOptions
from stableavatar.pipeline import AvatarPipeline
from stableavatar.placement.autoencoder import bring_autoencoder, decoder_device
from stableavatar.sampling.decoding import (
    StreamDecoder,
    stream_decode,
)
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.windows import Window
from toy import toy_pipeline, toy_vae

CPU, META = torch.device("cpu"), torch.device("meta")
# The one device that fake tensors can be moved to in a torch without it.
FAKE = torch.device("lazy:0")
PORTRAIT = np.random.default_rng(1).integers(0, 256, (48, 40, 3), dtype=np.uint8)
SPEECH = np.random.default_rng(0).uniform(-0.1, 0.1, 20 * 640).astype(np.float32)


def patched_vae() -> AutoencoderKLWan:
    """Residual and with patches, as tiny's."""
    torch.manual_seed(5)
    return AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2,
    ).eval()  # fmt: skip


VAES = pytest.mark.parametrize("build", [toy_vae, patched_vae])


def tiled(vae: AutoencoderKLWan, tile: int, stride: int) -> AutoencoderKLWan:
    """Tiles of so many pixels in width, and of a latent more in height."""
    vae.tile_sample_min_height, vae.tile_sample_min_width = tile + 8, tile
    vae.tile_sample_stride_height, vae.tile_sample_stride_width = stride + 8, stride
    return vae


def random_latents(frames: int, height: int = 4, width: int = 3) -> torch.Tensor:
    return torch.randn(16, frames, height, width, generator=torch.Generator().manual_seed(0))


def streamed(vae: AutoencoderKLWan, latents: torch.Tensor, **options: object) -> torch.Tensor:
    return torch.stack(list(stream_decode(vae, latents.unbind(1), **options)), dim=1)


@torch.no_grad()
def whole(
    decode: Callable[[torch.Tensor], object], vae: AutoencoderKLWan, latents: torch.Tensor
) -> torch.Tensor:
    return decode(denormalise_latents(vae, latents[None]).to(vae.dtype)).sample[0].float()


@VAES
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_latent_after_latent_equals_all_at_once(
    build: Callable[[], AutoencoderKLWan], frames: int, dtype: torch.dtype, rounding: float
) -> None:
    vae = build().to(dtype)
    made = streamed(vae, latents := random_latents(frames))
    assert made.shape == (3, 4 * frames - 3, 32, 24)
    assert made.dtype == torch.float32
    assert made.std() > 0.1
    torch.testing.assert_close(made, whole(vae.decode, vae, latents), atol=rounding, rtol=0)


@VAES
@pytest.mark.parametrize("tiling", [False, True])
def test_the_memory_does_not_grow(build: Callable[[], AutoencoderKLWan], tiling: bool) -> None:
    decoder, sizes = StreamDecoder(tiled(build(), 16, 8), tiling=tiling), []
    for latent in random_latents(7).unbind(1):
        decoder.decode(latent)
        tensors, _ = decoder.state()
        # What a tensor keeps alive counts: a view of something larger would keep all of that.
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
    assert 0 < sizes[0] < sizes[1]
    assert sizes[1:] == sizes[1:2] * 6


def test_given_noise_gives_the_same_latents_and_frames() -> None:
    pipeline = toy_pipeline()
    size = {"steps": 1, "width": 32, "height": 32}
    shape = pipeline.sample_latents(PORTRAIT, SPEECH, **size, seed=1).latents.shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made, again = (pipeline.sample_latents(PORTRAIT, SPEECH, latents=noise, **size, seed=n) for n in (1, 2))
    assert torch.equal(made.latents, again.latents)
    frames = np.stack(list(pipeline.decode_latents(made)))
    assert np.array_equal(frames, np.stack(list(pipeline.stream(PORTRAIT, SPEECH, latents=noise, **size))))
    assert not torch.equal(made.latents, pipeline.sample_latents(PORTRAIT, SPEECH, **size, seed=1).latents)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_frames_that_are_no_numbers_are_no_pictures(wrong: float) -> None:
    pipeline = toy_pipeline()
    latents = pipeline.sample_latents(PORTRAIT, SPEECH, steps=1, width=32, height=32)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(wrong)
    with pytest.raises(SamplingError, match="float32"):
        list(pipeline.decode_latents(latents))
    with pytest.raises(SamplingError, match="float32"):
        list(pipeline.stream(PORTRAIT, SPEECH, steps=1, width=32, height=32))


def test_two_videos_decoded_in_turn_do_not_mix() -> None:
    vae = toy_vae()
    first, second = torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    alone = torch.stack(list(stream_decode(vae, first.unbind(1))))
    a, b = stream_decode(vae, first.unbind(1)), stream_decode(vae, second.unbind(1))
    frames = [frame for pair in zip(a, b, strict=True) for frame in pair][::2]
    assert torch.equal(torch.stack(frames), alone)


def test_latents_are_taken_as_frames_are_asked_for() -> None:
    vae, taken = toy_vae(), []

    def latents() -> object:
        for index in range(1000):
            taken.append(index)
            yield torch.zeros(16, 2, 2)

    frames = stream_decode(vae, latents())
    for _ in range(6):
        next(frames)
    assert taken == [0, 1, 2]


def test_normalisation() -> None:
    vae = toy_vae()
    raw = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    normal = normalise_latents(vae, raw)
    mean, std = vae.config.latents_mean[3], vae.config.latents_std[3]
    torch.testing.assert_close(normal[:, 3], (raw[:, 3] - mean) / std)
    torch.testing.assert_close(denormalise_latents(vae, normal), raw)


@VAES
@pytest.mark.parametrize(
    ("tile", "stride", "height", "width"),
    [
        (24, 16, 7, 10),
        (32, 24, 10, 7),
        (32, 8, 6, 7),  # three tiles over each other
        (24, 24, 8, 6),  # side by side
        (48, 16, 4, 9),  # one row; diffusers makes two
        (24, 16, 4, 4),
    ],
)
def test_tiles_are_those_of_diffusers(
    build: Callable[[], AutoencoderKLWan], tile: int, stride: int, height: int, width: int
) -> None:
    vae = tiled(build(), tile, stride)
    latents = random_latents(3, height, width)
    made = streamed(vae, latents, tiling=True)
    assert made.shape == (3, 9, 8 * height, 8 * width)
    torch.testing.assert_close(made, whole(vae.tiled_decode, vae, latents), atol=1e-5, rtol=0)
    assert (made - streamed(vae, latents)).abs().max() > 1e-3


@VAES
def test_a_picture_of_one_tile_is_as_without_tiles(build: Callable[[], AutoencoderKLWan]) -> None:
    latents, vae = random_latents(3), tiled(build(), 24, 16)
    assert torch.equal(streamed(vae, latents, tiling=True), streamed(vae, latents))


def test_the_seams_are_blended() -> None:
    """Where tiles lie side by side their edges are steps; where they overlap the steps are gone."""
    latents = random_latents(2, 8, 8)

    def step(stride: int, edge: int) -> float:
        made = streamed(tiled(toy_vae(), 32, stride), latents, tiling=True)
        error = made - streamed(toy_vae(), latents)
        return float((error[..., edge] - error[..., edge - 1]).abs().mean())

    assert step(16, 16) < 0.25 * step(32, 32)


@pytest.mark.parametrize(("tile", "stride"), [(24, 32), (24, 4)])
def test_tiles_that_cannot_be_are_refused(tile: int, stride: int) -> None:
    with pytest.raises(InputError, match="tile_sample_stride_"):
        StreamDecoder(tiled(toy_vae(), tile, stride), tiling=True)


@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_going_on_from_a_state(taken: int, tiling: bool) -> None:
    vae, latents = tiled(toy_vae(), 16, 8), random_latents(4).unbind(1)
    first = StreamDecoder(vae, tiling=tiling)
    for latent in latents[:taken]:
        first.decode(latent)
    tensors, rest = first.state()
    second = StreamDecoder(vae, tiling=tiling)
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(rest)))
    for latent in latents[taken:]:
        for one, other in zip(first.decode(latent), second.decode(latent), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("stride", "tiling"), [(16, True), (8, False)])
def test_other_tiles_cannot_be_gone_on_with(stride: int, tiling: bool) -> None:
    state = StreamDecoder(tiled(toy_vae(), 16, 8), tiling=True).state()
    with pytest.raises(InputError, match="other tiles"):
        StreamDecoder(tiled(toy_vae(), 16, stride), tiling=tiling).restore(*state)


@pytest.fixture
def fake() -> Iterator[AutoencoderKLWan]:
    """An autoencoder without numbers whose weights lie on the fake device."""
    with FakeTensorMode():
        vae = tiled(toy_vae(), 16, 8)
        for module in vae.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(value.to(FAKE), requires_grad=False)
        yield vae


@pytest.mark.parametrize("tiling", [False, True])
def test_latents_are_brought_to_the_decoder(fake: AutoencoderKLWan, tiling: bool) -> None:
    decoder = StreamDecoder(fake, tiling=tiling)
    assert [frame.device for frame in decoder.decode(torch.zeros(16, 4, 3))] == [FAKE]
    other = StreamDecoder(tiled(toy_vae(), 16, 8), tiling=tiling)
    assert [frame.device for frame in other.decode(torch.zeros(16, 4, 3, device=FAKE))] == [CPU]


def test_the_memory_of_tiles_rests_in_main_memory(fake: AutoencoderKLWan) -> None:
    for tiling, place in ((False, FAKE), (True, CPU)):
        decoder = StreamDecoder(fake, tiling=tiling)
        for count in (1, 4, 4):
            frames = decoder.decode(torch.zeros(16, 4, 3, device=FAKE))
            assert [frame.device for frame in frames] == [FAKE] * count
            tensors, _ = decoder.state()
            assert {tensor.device for tensor in tensors.values()} == {place}


def test_a_state_is_gone_on_with_on_a_device(fake: AutoencoderKLWan) -> None:
    for tiling in (False, True):
        first, second = (StreamDecoder(fake, tiling=tiling) for _ in range(2))
        first.decode(torch.zeros(16, 4, 3))
        tensors, rest = first.state()
        second.restore({name: tensor.cpu() for name, tensor in tensors.items()}, rest)
        assert second.decode(torch.zeros(16, 4, 3))[3].device == FAKE


def test_the_autoencoder_goes_where_it_is_to_decode() -> None:
    vae = toy_vae()
    bring_autoencoder(vae, META)
    assert {parameter.device for parameter in vae.parameters()} == {META}


def test_an_autoencoder_that_was_sent_away_comes_back() -> None:
    """As when another video of the same pipeline ends: diffusers then sends all parts to the CPU."""
    vae = toy_vae()
    accelerate.cpu_offload_with_hook(vae, META)
    decoder = StreamDecoder(vae, META)
    assert vae.device == CPU
    assert decoder.decode(random_latents(1)[:, 0])[0].device == META
    assert vae.device == META


def test_the_hook_of_offloading_is_told_of_the_device() -> None:
    """By itself it would take the autoencoder to its own device, and the picture's latents with it."""
    clip = torch.rand(1, 3, 1, 16, 16)
    vae = toy_vae()
    expected = vae.encode(clip).latent_dist.mode()
    accelerate.cpu_offload_with_hook(vae, META)
    bring_autoencoder(vae, CPU)
    assert torch.equal(vae.encode(clip).latent_dist.mode(), expected)
    bring_autoencoder(vae, META)
    assert vae.device == vae.encode(clip.to(META)).latent_dist.mode().device == META


def in_sequence(vae: AutoencoderKLWan) -> None:
    accelerate.cpu_offload(vae, CPU, offload_buffers=True)


def in_groups(vae: AutoencoderKLWan) -> None:
    apply_group_offloading(vae, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [in_sequence, in_groups])
def test_what_is_offloaded_piece_by_piece_is_left_alone(offload: Callable[[AutoencoderKLWan], None]) -> None:
    latents, vae = random_latents(3), toy_vae()
    expected = streamed(vae, latents)
    offload(vae)
    with pytest.raises(InputError, match="piece by piece"):
        decoder_device(vae, "cpu")
    assert decoder_device(vae, None) is None
    before = vae.device
    bring_autoencoder(vae, META)
    assert vae.device == before
    assert torch.equal(streamed(vae, latents, device=CPU), expected)


def frames(pipeline: AvatarPipeline, **options: object) -> np.ndarray:
    settings = {"steps": 1, "seed": 3, "width": 32, "height": 32, **options}
    return np.stack(list(pipeline.stream(PORTRAIT, SPEECH, **settings)))


def test_options_reach_the_decoder() -> None:
    pipeline = toy_pipeline()
    plain = frames(pipeline)
    assert np.array_equal(frames(pipeline, decoder_device="cpu"), plain)
    assert np.array_equal(frames(pipeline, decoder_tiling=True), plain)  # tiles of 256 pixels
    tiled(pipeline.vae, 16, 8)
    assert np.array_equal(frames(pipeline), plain)
    in_tiles = frames(pipeline, decoder_tiling=True).astype(int)
    assert 0 < np.abs(in_tiles - plain).mean() < 30


def test_tiles_that_are_set_in_diffusers_way_are_the_options(tmp_path: Path) -> None:
    """The whole video is as with the option, its settings say so, and the portrait is encoded as ever."""
    pipeline = toy_pipeline()
    tiled(pipeline.vae, 16, 8)
    in_tiles = frames(pipeline, decoder_tiling=True)
    latents = pipeline.sample_latents(PORTRAIT, SPEECH, steps=1, seed=3, width=32, height=32)
    pipeline.vae.use_tiling = True
    assert np.array_equal(frames(pipeline), in_tiles)
    assert np.array_equal(np.stack(list(pipeline.decode_latents(latents))), in_tiles)
    made = pipeline.generate(PORTRAIT, SPEECH, tmp_path / "out.mp4", steps=1, width=32, height=32)
    assert made.options.decoder_tiling
    assert json.loads(read_metadata(made.path)["stableavatar"])["decoder_tiling"] is True
    assert pipeline.vae.use_tiling


@pytest.mark.parametrize("name", ["cuda:7", "toaster", "meta"])
def test_a_device_that_is_not_there_is_refused_at_once(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' cannot be used here"):
        toy_pipeline().stream(PORTRAIT, SPEECH, decoder_device=name)


@pytest.mark.parametrize("options", [{"decoder_device": 0}, {"decoder_tiling": "yes"}, {"decoder_tiling": 1}])
def test_values_of_another_type(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="is not of type"):
        GenerateOptions(**options)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> AvatarPipeline:
    """A pipeline whose transformer and encoders are on another device than its autoencoder."""
    # The text encoder looks at the numbers in its mask.
    prompts = torch.zeros(2, 48, 16, device=META)
    monkeypatch.setattr(generation, "encode_prompts", lambda *_args, **_more: prompts)
    pipeline = toy_pipeline()
    for part in (
        pipeline.transformer,
        pipeline.text_encoder,
        pipeline.image_encoder,
        pipeline.speech_encoder,
    ):
        part.to(META)
    return pipeline


def test_only_the_autoencoder_computes_on_the_decoders_device(elsewhere: AvatarPipeline) -> None:
    pipeline = elsewhere
    assert pipeline._execution_device == META
    seen: list[torch.device] = []
    pipeline.vae.encoder.register_forward_pre_hook(lambda _module, args: seen.append(args[0].device))
    run = pipeline.stream(PORTRAIT, SPEECH, steps=1, width=32, height=32, decoder_device="cpu")._run
    conditions = run._conditions()
    assert set(seen) == {CPU}
    for part in (conditions.reference, conditions.portrait, conditions.prompt):
        assert part.device == META
    parts = run._parts(_Pace(), None)
    assert parts.sampler.trajectory.device == META
    assert parts.decoder.device == pipeline.vae.device == CPU
    assert torch.isfinite(parts.decoder.decode(random_latents(1, 4, 4)[:, 0])[0]).all()


def test_by_default_it_is_with_the_transformer(elsewhere: AvatarPipeline) -> None:
    """Also after a video for which it was elsewhere."""
    pipeline = elsewhere
    run = pipeline.stream(PORTRAIT, SPEECH, steps=1, width=32, height=32)._run
    assert run._parts(_Pace(), None).decoder.device == META
    assert pipeline.vae.device == META


def test_the_pipeline_is_where_its_transformer_is() -> None:
    pipeline = toy_pipeline()
    pipeline.vae.to(META)
    pipeline.image_encoder.to(META)
    assert pipeline.device == pipeline._execution_device == CPU


def test_what_an_earlier_run_did_counts_as_done() -> None:
    pace = _Pace()
    pace.go_on(480, 100)
    pace.begin()
    assert pace.share(600, 150) == 0.8
    pace.cell(Cell(Window(0, 0, 9, 0), 0))
    assert pace.share(600, 150) == pytest.approx(481 / 600)
    pace.frame()
    share = pace.share(600, 150)
    assert share is not None
    assert share >= 481 / 600  # it does not fall
