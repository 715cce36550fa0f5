"""Weights out of files into models: every tensor in its place, nothing executed, every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import published_toy as toy
from stableavatar.checkpoints import loading, names
from stableavatar.checkpoints.files import read_state_dict
from stableavatar.config import SIZES
from stableavatar.errors import CheckpointError
from stableavatar.models.transformer import StableAvatarTransformer3DModel

SHARED = Path(__file__).parents[2] / "shared"
MANIFESTS, PARITY = SHARED / "spec" / "manifests", SHARED / "parity"


def same(model: nn.Module, reference: nn.Module) -> bool:
    ours, theirs = model.state_dict(), reference.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Full size, on the meta device


def empty(make: Any) -> dict[str, tuple[int, ...]]:
    with init_empty_weights():
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def full_size(part: str, size: str) -> dict[str, tuple[int, ...]]:
    sizes = SIZES[size]
    makers: dict[str, Any] = {
        "transformer": lambda: StableAvatarTransformer3DModel(**sizes.transformer),
        "vae": lambda: AutoencoderKLWan(**sizes.vae),
        "text_encoder": lambda: UMT5EncoderModel(UMT5Config(**sizes.text_encoder)),
        "image_encoder": lambda: CLIPVisionModel(CLIPVisionConfig(**sizes.image_encoder)),
        "speech_encoder": lambda: Wav2Vec2Model(Wav2Vec2Config(**sizes.speech_encoder)),
    }
    return empty(makers[part])


FULL_SIZES = [
    # part, size, manifest, published tensors that are used, numbers in them
    ("transformer", "1.3b", "transformer_1_3B", 1143, 1747426112),
    ("transformer", "14b", "transformer_14B", 1506, 18950347584),
    ("vae", "1.3b", "vae_wan2_1", 194, 126892531),
    ("text_encoder", "1.3b", "t5_umt5_xxl_encoder", 242, 5680910336),
    ("image_encoder", "1.3b", "clip_xlm_roberta_vit_h_14", 391, 630766080),
]


@pytest.mark.shared
@pytest.mark.skipif(not MANIFESTS.is_dir(), reason="the specification folder is not beside the checkout")
@pytest.mark.parametrize(("part", "size", "file", "count", "numbers"), FULL_SIZES)
def test_every_tensor_of_the_manifest_lands_in_a_parameter(
    part: Any, size: str, file: str, count: int, numbers: int
) -> None:
    shapes = json.loads((MANIFESTS / f"{file}.json").read_text())["shapes"]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    landed = {name: tuple(tensor.shape) for name, tensor in names.to_ours(part, state).items()}
    assert landed == full_size(part, size)


@pytest.mark.parametrize(("part", "size", "file", "count", "numbers"), FULL_SIZES)
def test_full_size_models_have_the_published_count_of_tensors_and_numbers(
    part: Any, size: str, file: str, count: int, numbers: int
) -> None:
    ours = {name: torch.empty(shape, device="meta") for name, shape in full_size(part, size).items()}
    published = names.to_published(part, ours)
    assert len(published) == count
    assert sum(tensor.numel() for tensor in published.values()) == numbers
    assert set(names.to_ours(part, published)) == set(ours)
    if part == "transformer" and size == "1.3b":
        assert len([name for name in ours if not names.is_audio_name(name)]) == 983


def test_published_sizes() -> None:
    assert list(SIZES) == ["1.3b", "14b"]
    defaults = full_size("transformer", "1.3b")
    assert empty(StableAvatarTransformer3DModel) == defaults


# The published files


def test_transformer_is_the_base_with_the_overlay_over_it(published: Path) -> None:
    square = published / toy.OVERLAYS / "transformer3d-square.pt"
    model = loading.load_transformer(published / toy.BASE, square)
    assert same(model, toy.toy_transformer(0))
    assert not model.training
    assert (model.config["num_attention_heads"], model.config["text_length"]) == (2, 32)  # from config.json
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_only_what_the_overlay_holds_is_replaced(published: Path, tmp_path: Path) -> None:
    overlay = {
        n: t for n, t in toy.published_transformer(0).items() if "vocal" in n or n.startswith("blocks.1.ffn")
    }
    torch.save({"state_dict": {f"module.{name}": t for name, t in overlay.items()}}, tmp_path / "overlay.pt")
    model = loading.load_transformer(published / toy.BASE, tmp_path / "overlay.pt")
    state, base, over = (m.state_dict() for m in (model, toy.toy_transformer(10), toy.toy_transformer(0)))
    for name in state:
        expected = over if names.is_audio_name(name) or name.startswith("blocks.1.ffn") else base
        assert torch.equal(state[name], expected[name]), name


def test_a_transformer_that_is_complete_needs_no_base(published: Path, tmp_path: Path) -> None:
    overlay = published / toy.OVERLAYS / "transformer3d-rec-vec.pt"
    model = loading.load_transformer(overlay, config={"num_attention_heads": 2, "text_length": 32})
    assert same(model, toy.toy_transformer(20))
    with pytest.raises(CheckpointError, match=r"width 24 is no multiple of 128.*num_heads"):
        loading.load_transformer(overlay)


def test_two_layer_speech_projection_is_seen_from_shapes(tmp_path: Path) -> None:
    save_file(
        toy.published_transformer(5, audio_hidden_dim=20, audio_ffn_dim=40), tmp_path / "14b.safetensors"
    )
    model = loading.load_transformer(tmp_path / "14b.safetensors", config={"dim": 24, "num_heads": 2})
    assert (model.config["audio_hidden_dim"], model.config["audio_ffn_dim"]) == (20, 40)
    assert same(model, toy.toy_transformer(5, audio_hidden_dim=20, audio_ffn_dim=40))


def test_bare_base_is_refused_unless_the_audio_side_is_to_be_trained(published: Path) -> None:
    with pytest.raises(CheckpointError, match="plain video model without the audio tensors"):
        loading.load_transformer(published / toy.BASE)
    config = {"audio_dim": 32}
    before = torch.random.get_rng_state()
    first = loading.load_transformer(published / toy.BASE, config=config, allow_missing_audio=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    second = loading.load_transformer(published / toy.BASE, config=config, allow_missing_audio=True)
    assert same(first, second)
    state = first.state_dict()
    assert all(not tensor.any() for name, tensor in state.items() if "k_vocal" in name or "v_vocal" in name)
    assert state["vocal_projector.proj_model.proj.weight"].std() > 0
    assert torch.equal(
        state["blocks.0.attn1.to_q.weight"],
        toy.toy_transformer(10).state_dict()["blocks.0.attn1.to_q.weight"],
    )


def test_half_of_the_audio_side_is_never_filled_in(published: Path, tmp_path: Path) -> None:
    overlay = {name: t for name, t in toy.published_transformer(0).items() if "vocal_projector" in name}
    save_file(overlay, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"8 tensors are missing: blocks\.0\.attn2\.k_vocal"):
        loading.load_transformer(
            published / toy.BASE, tmp_path / "half.safetensors", allow_missing_audio=True
        )


def test_base_in_diffusers_layout_in_shards(tmp_path: Path) -> None:
    reference = toy.toy_transformer(0)
    own_names = toy.copies(reference.state_dict())
    video = {name: tensor for name, tensor in own_names.items() if not names.is_audio_name(name)}
    folder = tmp_path / "transformer"
    folder.mkdir()
    first, stem = dict(list(video.items())[:30]), "diffusion_pytorch_model"
    second = {name: tensor for name, tensor in video.items() if name not in first}
    files = [f"{stem}-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    save_file(first, folder / files[0])
    save_file(second, folder / files[1])
    weight_map = {name: files[name not in first] for name in video}
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(toy.published_transformer(0), tmp_path / "overlay.pt")

    for state in (read_state_dict(folder), read_state_dict(index)):
        assert state.keys() == video.keys()
    assert same(loading.load_transformer(folder, tmp_path / "overlay.pt"), reference)
    index.unlink()
    assert read_state_dict(folder).keys() == video.keys()
    (folder / files[1]).unlink()
    with pytest.raises(
        CheckpointError, match=r"1 of 2 shards are missing \(diffusion_pytorch_model-00002-of"
    ):
        read_state_dict(folder)


def test_encoders(published: Path) -> None:
    base = published / toy.BASE
    assert same(loading.load_vae(base / "Wan2.1_VAE.pth"), toy.toy_vae())
    assert same(loading.load_image_encoder(base / toy.CLIP), toy.toy_image_encoder())
    text = loading.load_text_encoder(base / toy.T5)
    assert same(text, toy.toy_text_encoder().bfloat16().float())
    assert text.shared.weight is text.encoder.embed_tokens.weight
    speech = loading.load_speech_encoder(published / "wav2vec2-base-960h")
    assert same(speech, toy.toy_speech_encoder().wav2vec2)
    tokenizer = loading.load_tokenizer(base / "google" / "umt5-xxl")
    assert tokenizer("hello world")["input_ids"] == [3, 2]
    assert tokenizer.pad_token == "<pad>"


def test_speech_encoder_of_the_published_spelling(tmp_path: Path) -> None:
    """The published file has the older names of the weight norm and lacks a tensor of pre-training."""
    folder = tmp_path / "wav2vec2-base-960h"
    reference = toy.toy_speech_encoder()
    reference.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    convolution = "wav2vec2.encoder.pos_conv_embed.conv"
    for letter, number in (("g", 0), ("v", 1)):
        state[f"{convolution}.weight_{letter}"] = state.pop(
            f"{convolution}.parametrizations.weight.original{number}"
        )
    del state["wav2vec2.masked_spec_embed"]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    samples = torch.randn(1, 4000)
    with torch.no_grad():
        ours = loading.load_speech_encoder(folder)(samples).last_hidden_state
        library = Wav2Vec2Model.from_pretrained(folder).eval()(samples).last_hidden_state
    assert torch.equal(ours, library)


def test_explicit_settings_win_over_shapes_and_are_checked(published: Path) -> None:
    vae = published / toy.BASE / "Wan2.1_VAE.pth"
    assert same(loading.load_vae(vae, {"base_dim": 4, "z_dim": 16}), toy.toy_vae())
    with pytest.raises(CheckpointError, match=r"have another shape: .*is \(.*should be \("):
        loading.load_vae(vae, {"base_dim": 8, "z_dim": 16})
    with pytest.raises(CheckpointError, match="no_such_setting"):
        loading.load_transformer(published / toy.BASE, config={"no_such_setting": 1})


# Dtypes


def test_dtype_and_what_stays_in_float32(published: Path) -> None:
    square = published / toy.OVERLAYS / "transformer3d-square.pt"
    model = loading.load_transformer(published / toy.BASE, square, dtype=torch.bfloat16)
    state = model.state_dict()
    assert state["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    for name in ("condition_embedder.time_proj.weight", "blocks.0.scale_shift_table", "blocks.1.norm2.bias"):
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], toy.toy_transformer(0).state_dict()[name])
    assert model.dtype == torch.bfloat16


def test_as_stored(published: Path) -> None:
    base = published / toy.BASE
    assert loading.load_text_encoder(base / toy.T5, dtype=None).shared.weight.dtype == torch.bfloat16
    assert loading.load_vae(base / "Wan2.1_VAE.pth", dtype=None).dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_are_converted(stored: torch.dtype, tmp_path: Path) -> None:
    state = {
        name: tensor.to(stored) if tensor.dim() == 2 else tensor
        for name, tensor in toy.published_transformer(0).items()
    }
    save_file({f"model.diffusion_model.{n}": t for n, t in state.items()}, tmp_path / "fp8.safetensors")
    config = {"num_attention_heads": 2}
    model = loading.load_transformer(tmp_path / "fp8.safetensors", config=config, dtype=torch.bfloat16)
    weight = model.state_dict()["blocks.1.ffn.net.2.weight"]
    assert torch.equal(weight, state["blocks.1.ffn.2.weight"].to(torch.bfloat16))
    as_stored = loading.load_transformer(tmp_path / "fp8.safetensors", config=config, dtype=None)
    assert as_stored.dtype == torch.bfloat16


def test_scaled_float8_weights_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    state = toy.published_transformer(0)
    name = "blocks.0.self_attn.q"
    scaled = dict(state)
    scale = state[f"{name}.weight"].abs().max() / 448
    scaled[f"{name}.weight"] = (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    scaled |= {f"{name}.scale_weight": scale.reshape(1), f"{name}.scale_input": torch.ones(1)}
    scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(scaled, tmp_path / "scaled.safetensors")
    model = loading.load_transformer(tmp_path / "scaled.safetensors", config={"num_attention_heads": 2})
    weight = model.state_dict()["blocks.0.attn1.to_q.weight"]
    torch.testing.assert_close(weight, state[f"{name}.weight"], rtol=0.07, atol=1e-3)
    scaled[f"{name}.scale_weight"] = torch.ones(7)
    save_file(scaled, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="neither as a whole nor row by row"):
        read_state_dict(tmp_path / "wrong.safetensors")


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    width = {"attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32}
    state = toy.published_transformer(0, **width)
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    quantised = 0
    for name, tensor in state.items():
        values = tensor.numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            quantised += 1
        elif tensor.dim() > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            writer.add_tensor(name, values.reshape(tensor.shape[0], -1))
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = loading.load_transformer(tmp_path / "wan.gguf", config={"num_attention_heads": 2})
    assert quantised > 20
    loaded = names.to_published("transformer", model.state_dict())
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0.003)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "wan.gguf").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: damaged"):
        read_state_dict(tmp_path / "cut.gguf")


# Against the published code's numbers


@pytest.mark.shared
@pytest.mark.skipif(not PARITY.is_dir(), reason="the parity folder is not beside the checkout")
@pytest.mark.parametrize("with_settings", [True, False])
@torch.no_grad()
def test_encoders_give_the_published_numbers(with_settings: bool) -> None:
    def folder_of(kind: str) -> tuple[Path, dict[str, Any] | None, dict[str, torch.Tensor]]:
        folder = PARITY / kind
        settings = json.loads((folder / "config.json").read_text())[kind] if with_settings else None
        return folder / "state.safetensors", settings, load_file(folder / "case.safetensors")

    path, settings, case = folder_of("image_encoder")
    image_encoder = loading.load_image_encoder(path, settings)
    out = image_encoder(case["mid.pixels"], output_hidden_states=True).hidden_states[-2]
    assert (out - case["out.embeddings"]).abs().max() < 1e-5

    path, settings, case = folder_of("text_encoder")
    mask = case["in.mask"]
    out = loading.load_text_encoder(path, settings)(
        case["in.ids"].long(), attention_mask=mask
    ).last_hidden_state
    assert ((out - case["out.embeddings"]) * mask[..., None]).abs().max() < 2e-5

    path, settings, case = folder_of("vae")
    vae = loading.load_vae(path, settings)
    mean, std = (
        torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    latents = (vae.encode(case["in.picture"]).latent_dist.mode() - mean) / std
    assert (latents - case["out.picture_latents"]).abs().max() < 1e-5
