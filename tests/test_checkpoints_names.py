"""Names of published tensors and ours, both ways: against the manifests and diffusers' own conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stableavatar.checkpoints import names
from stableavatar.errors import CheckpointError

MANIFESTS = Path(__file__).parents[2] / "shared" / "spec" / "manifests"

needs_manifests = [
    pytest.mark.shared,
    pytest.mark.skipif(not MANIFESTS.is_dir(), reason="the specification folder is not beside the checkout"),
]


def shared(function: Any) -> Any:
    for mark in needs_manifests:
        function = mark(function)
    return function


def manifest(name: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f"{name}.json").read_text())


def empty_state(shapes: dict[str, list[int]]) -> names.StateDict:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state: names.StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@shared
@pytest.mark.parametrize(
    ("table", "file", "count"),
    [
        (names.TRANSFORMER, "transformer_rename_to_diffusers", 1143),
        (names.VAE, "vae_rename_to_diffusers", 194),
        (names.TEXT_ENCODER, "t5_rename_to_transformers", 242),
    ],
)
def test_rules_give_the_published_rename_tables_both_ways(
    table: names.NameTable, file: str, count: int
) -> None:
    expected = manifest(file)
    assert len(expected) == count
    assert {name: table.to_ours(name) for name in expected} == expected
    assert {ours: table.to_published(ours) for ours in expected.values()} == {
        v: k for k, v in expected.items()
    }


@shared
@pytest.mark.parametrize(
    ("part", "file", "count"),
    [
        ("transformer", "transformer_1_3B", 1143),
        ("transformer", "transformer_14B", 1506),
        ("vae", "vae_wan2_1", 194),
        ("text_encoder", "t5_umt5_xxl_encoder", 242),
    ],
)
def test_round_trip_of_a_whole_manifest(part: names.Part, file: str, count: int) -> None:
    shapes = manifest(file)["shapes"]
    published = empty_state(shapes)
    ours = names.to_ours(part, published)
    assert len(published) == count
    assert names.is_published(part, published)
    assert not names.is_published(part, ours)
    assert shapes_of(names.to_published(part, ours)) == {name: tuple(shape) for name, shape in shapes.items()}


@shared
@pytest.mark.parametrize("file", ["clip_xlm_roberta_vit_h_14", "clip_visual_used"])
def test_image_encoder_manifest_splits_and_drops_only_what_is_unused(file: str) -> None:
    shapes = manifest(file)["shapes"]
    visual = {
        name.removeprefix("visual."): tuple(shape) for name, shape in shapes.items() if "textual" not in name
    }
    visual.pop("log_scale", None)
    ours = names.to_ours("image_encoder", empty_state(shapes))
    # 32 blocks, each with a fused weight and bias that become three; the head has no place.
    assert len(ours) == len(visual) - 1 + 32 * 2 * 2
    back = shapes_of(names.to_published("image_encoder", ours))
    visual.pop("head")
    assert back == {f"visual.{name}": shape for name, shape in visual.items()}


@shared
def test_audio_names_are_the_160_that_the_video_model_lacks() -> None:
    ours = names.to_ours("transformer", empty_state(manifest("transformer_1_3B")["shapes"]))
    audio = [name for name in ours if names.is_audio_name(name)]
    assert (len(audio), len(ours) - len(audio)) == (160, 983)


def test_autoencoder_rules_agree_with_the_conversion_of_diffusers() -> None:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    ours = AutoencoderKLWan(base_dim=8).state_dict()
    published = names.to_published("vae", ours)
    assert len(published) == 194
    converted = convert_wan_vae_to_diffusers(dict(published))
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], ours[name]) for name in ours)


def test_transformer_rules_agree_with_the_conversion_of_diffusers_for_the_video_part() -> None:
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        image_dim=20,
        added_kv_proj_dim=24,
    )
    ours = model.state_dict()
    published = names.to_published("transformer", ours)
    assert names.is_published("transformer", published)
    assert convert_wan_transformer_to_diffusers(dict(published)).keys() == ours.keys()
    assert names.to_ours("transformer", published).keys() == ours.keys()


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("blocks.7.self_attn.o.weight", "blocks.7.attn1.to_out.0.weight"),
        ("blocks.39.cross_attn.norm_k_img.weight", "blocks.39.attn2.norm_added_k.weight"),
        ("blocks.12.cross_attn.v_vocal.bias", "blocks.12.attn2.v_vocal.bias"),
        ("blocks.0.norm3.bias", "blocks.0.norm2.bias"),
        ("blocks.3.modulation", "blocks.3.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("vocal_projector.blocks.1.cross_attn.q.weight", "vocal_projector.blocks.1.attn2.to_q.weight"),
        ("vocal_projector.final_head.modulation", "vocal_projector.final_scale_shift_table"),
        ("vocal_projector.proj_model.norm_2.bias", "vocal_projector.proj_model.norm_2.bias"),
        ("blocks.5.cross_attn.k", "blocks.5.attn2.to_k"),  # a module, as in LoRA files
    ],
)
def test_transformer_names(published: str, ours: str) -> None:
    assert names.TRANSFORMER.to_ours(published) == ours
    assert names.TRANSFORMER.to_published(ours) == published


@pytest.mark.parametrize(
    "name", ["blocks.x.modulation", "blocks.1.self_attn.k_img.weight", "xblocks.1.norm3.bias", ""]
)
def test_unknown_names_are_unknown_and_kept_for_the_report(name: str) -> None:
    assert names.TRANSFORMER.to_ours(name) is None
    state = {"head.head.bias": torch.zeros(1), name: torch.zeros(1)}
    assert set(names.to_ours("transformer", state)) == {"proj_out.bias", name}


def test_no_published_name_for_a_foreign_tensor() -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mystery"):
        names.to_published("transformer", {"blocks.0.mystery": torch.zeros(1)})


def test_text_encoder_token_table_has_both_names() -> None:
    table = torch.randn(5, 4)
    ours = names.to_ours("text_encoder", {"token_embedding.weight": table, "norm.weight": torch.ones(4)})
    assert ours["shared.weight"] is table
    assert ours["encoder.embed_tokens.weight"] is table
    assert set(names.to_published("text_encoder", ours)) == {"token_embedding.weight", "norm.weight"}


def test_image_encoder_values_survive_the_round_trip() -> None:
    width = 6
    generator = torch.Generator().manual_seed(0)
    published = {
        "visual.cls_embedding": torch.randn(1, 1, width, generator=generator),
        "visual.pos_embedding": torch.randn(1, 5, width, generator=generator),
        "visual.pre_norm.weight": torch.randn(width, generator=generator),
        "visual.transformer.0.attn.to_qkv.weight": torch.randn(3 * width, width, generator=generator),
        "visual.transformer.0.attn.to_qkv.bias": torch.randn(3 * width, generator=generator),
        "visual.transformer.0.mlp.2.bias": torch.randn(width, generator=generator),
    }
    ours = names.to_ours("image_encoder", published)
    assert ours["embeddings.class_embedding"].shape == (width,)
    fused = published["visual.transformer.0.attn.to_qkv.weight"]
    assert torch.equal(ours["encoder.layers.0.self_attn.k_proj.weight"], fused[width : 2 * width])
    back = names.to_published("image_encoder", ours)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], published[name]) for name in published)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model.diffusion_model."])
def test_wrappers_are_taken_off_only_where_every_name_has_them(prefix: str) -> None:
    state = {f"{prefix}a": torch.zeros(1), f"{prefix}b": torch.zeros(1)}
    assert set(names.strip_wrappers(state)) == {"a", "b"}
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert set(names.strip_wrappers(mixed)) == {"module.a", "b"}


def test_published_settings_become_ours() -> None:
    published = {
        "dim": 5120,
        "num_heads": 40,
        "num_layers": 40,
        "text_len": 512,
        "in_dim": 36,
        "model_type": "i2v",
    }
    assert names.transformer_config_to_ours(published) == {
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "num_layers": 40,
        "text_length": 512,
        "in_channels": 36,
    }
    with pytest.raises(CheckpointError, match="qk_norm"):
        names.transformer_config_to_ours({"qk_norm": False})
    with pytest.raises(CheckpointError, match="num_heads = 7"):
        names.transformer_config_to_ours({"dim": 100, "num_heads": 7})


def test_a_portrait_encoder_as_transformers_4_saved_it() -> None:
    ours = {
        name: torch.full((2,), float(k))
        for k, name in enumerate(("post_layernorm.bias", "pre_layrnorm.bias"))
    }
    saved = {f"vision_model.{name}": tensor for name, tensor in ours.items()}
    for more in ({}, {"visual_projection.weight": torch.zeros(2, 2)}):
        renamed = names.to_ours("image_encoder", {**saved, **more})
        assert renamed.keys() == ours.keys()
        assert all(torch.equal(renamed[name], ours[name]) for name in ours)
