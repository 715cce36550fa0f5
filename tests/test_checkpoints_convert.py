"""A whole published layout at toy size: found, loaded, converted and loaded again with the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import Wav2Vec2Model

import published_toy as toy
from stableavatar import AvatarPipeline
from stableavatar.checkpoints import loading
from stableavatar.checkpoints.convert import _complete_or_nothing, convert, export_transformer
from stableavatar.checkpoints.defaults import sampling_defaults
from stableavatar.checkpoints.files import read_state_dict
from stableavatar.checkpoints.layout import OWN_PARTS, find_published, is_own
from stableavatar.checkpoints.published import load_published
from stableavatar.errors import CheckpointError, InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.options import SamplingDefaults


@pytest.fixture(scope="module")
def own(published: Path) -> Path:
    return convert(published, published.parent / "own folder" / "square", max_shard_size="30KB")


def same(model: nn.Module, reference: nn.Module) -> bool:
    ours, theirs = model.state_dict(), reference.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_own_folder_is_complete(own: Path) -> None:
    assert names_in(own) == {*OWN_PARTS, "model_index.json"}
    assert names_in(own.parent) == {"square"}
    assert is_own(own)
    index = json.loads((own / "model_index.json").read_text())
    assert index["transformer"] == ["stableavatar.models.transformer", "StableAvatarTransformer3DModel"]
    assert {*OWN_PARTS} <= index.keys()
    assert (own / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    assert all(not path.name.endswith((".bin", ".pt")) for path in own.rglob("*"))


def test_every_part_comes_back_with_the_same_numbers(own: Path) -> None:
    assert same(loading.load_transformer(own / "transformer"), toy.toy_transformer(0))
    assert same(loading.load_vae(own / "vae"), toy.toy_vae())
    assert same(
        loading.load_text_encoder(own / "text_encoder", dtype=None), toy.toy_text_encoder().bfloat16()
    )
    assert same(loading.load_image_encoder(own / "image_encoder"), toy.toy_image_encoder())
    assert same(loading.load_speech_encoder(own / "speech_encoder"), toy.toy_speech_encoder().wav2vec2)
    assert loading.load_tokenizer(own / "tokenizer")("hello")["input_ids"] == [3]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(own / "scheduler")
    assert (scheduler.config["shift"], scheduler.config["num_train_timesteps"]) == (5.0, 1000)


def test_the_libraries_read_the_own_folder_too(own: Path) -> None:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionModel, UMT5EncoderModel, Wav2Vec2Model

    transformer = StableAvatarTransformer3DModel.from_pretrained(own / "transformer")
    assert same(transformer, toy.toy_transformer(0))
    assert same(AutoencoderKLWan.from_pretrained(own / "vae"), toy.toy_vae())
    assert same(CLIPVisionModel.from_pretrained(own / "image_encoder"), toy.toy_image_encoder())
    assert same(Wav2Vec2Model.from_pretrained(own / "speech_encoder"), toy.toy_speech_encoder().wav2vec2)
    text = UMT5EncoderModel.from_pretrained(own / "text_encoder", dtype=torch.float32)
    assert same(text, toy.toy_text_encoder().bfloat16().float())


def test_variant_parts_dtype_and_checkpoints_of_a_training(published: Path, tmp_path: Path) -> None:
    other = convert(
        published, tmp_path / "rec", variant="rec-vec", parts=["transformer"], dtype=torch.bfloat16
    )
    assert names_in(other) == {"transformer", "model_index.json"}
    stored = read_state_dict(other / "transformer")
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert torch.equal(
        stored["blocks.0.scale_shift_table"],
        toy.toy_transformer(20).state_dict()["blocks.0.scale_shift_table"],
    )
    checkpoint = tmp_path / "transformer3d-checkpoint-7.pt"
    export_transformer(toy.toy_transformer(7), checkpoint)
    trained = convert(published, tmp_path / "trained", overlay=checkpoint, parts=["transformer"])
    assert same(loading.load_transformer(trained / "transformer"), toy.toy_transformer(7))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_transformer_back_to_published_names(own: Path, published: Path, tmp_path: Path, suffix: str) -> None:
    file = export_transformer(own / "transformer", tmp_path / f"transformer3d-square{suffix}")
    original = read_state_dict(published / toy.OVERLAYS / "transformer3d-square.pt")
    exported = read_state_dict(file)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    with pytest.raises(InputError, match="exists already"):
        export_transformer(own / "transformer", file)
    export_transformer(own / "transformer", file, dtype=torch.bfloat16, overwrite=True)
    assert {tensor.dtype for tensor in read_state_dict(file).values()} == {torch.bfloat16}
    with pytest.raises(InputError, match=r"should end in \.pt or"):
        export_transformer(own / "transformer", tmp_path / "transformer.ckpt")


def test_failure_leaves_nothing_behind(published: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(published, broken)
    (broken / toy.BASE / toy.CLIP).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CheckpointError, match=toy.CLIP):
        convert(broken, tmp_path / "own")
    assert names_in(tmp_path) == {"broken"}


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_complete(
    published: Path, tmp_path: Path
) -> None:
    target = convert(published, tmp_path / "own", parts=["scheduler"])
    with pytest.raises(InputError, match="exists already"):
        convert(published, target, parts=["vae"])
    with pytest.raises(CheckpointError, match="nonsense"):
        convert(published, target, parts=["transformer"], overlay=tmp_path / "nonsense.pt", overwrite=True)
    assert names_in(target) == {"scheduler", "model_index.json"}
    convert(published, target, parts=["vae"], overwrite=True)
    assert names_in(target) == {"vae", "model_index.json"}
    assert names_in(tmp_path) == {"own"}


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(published: Path, tmp_path: Path) -> None:
    target = convert(published, tmp_path / "own", parts=["scheduler"])
    with pytest.raises(InputError, match="cannot be written"), _complete_or_nothing(target, overwrite=True):
        pass  # nothing was written, so there is nothing to rename
    assert names_in(target) == {"scheduler", "model_index.json"}
    assert names_in(tmp_path) == {"own"}


def test_pipeline_is_the_same_from_the_published_layout_and_from_the_own_folder(
    published: Path, own: Path
) -> None:
    first = AvatarPipeline.from_pretrained(published)
    second = AvatarPipeline.from_pretrained(own)
    assert first.components.keys() == second.components.keys()
    models = [name for name, part in first.components.items() if isinstance(part, nn.Module)]
    assert sorted(models) == ["image_encoder", "speech_encoder", "text_encoder", "transformer", "vae"]
    assert all(same(first.components[name], second.components[name]) for name in models)
    assert first.scheduler.config["shift"] == second.scheduler.config["shift"] == 5.0
    assert second.tokenizer("hello")["input_ids"] == first.tokenizer("hello")["input_ids"]


def test_sizes_are_those_that_the_variant_was_trained_at(published: Path, own: Path, tmp_path: Path) -> None:
    square = {"square": (512, 512)}
    assert AvatarPipeline.from_pretrained(published).defaults.sizes == square
    assert AvatarPipeline.from_pretrained(own).defaults.sizes == square
    both = {"tall": (480, 832), "wide": (832, 480)}
    assert AvatarPipeline.from_pretrained(published, variant="rec-vec").defaults.sizes == both
    converted = convert(published, tmp_path / "rec", variant="rec-vec", parts=["transformer"])
    index = json.loads((converted / "model_index.json").read_text())
    assert SamplingDefaults(**index["sampling_defaults"]).sizes == both
    # Nothing is known of what was trained elsewhere, and 14B was trained at all sizes.
    overlay = published / toy.OVERLAYS / "transformer3d-square.pt"
    trained = convert(published, tmp_path / "trained", overlay=overlay, parts=["transformer"])
    assert "sampling_defaults" not in json.loads((trained / "model_index.json").read_text())
    told = convert(published, tmp_path / "told", overlay=overlay, variant="rec-vec", parts=["transformer"])
    index = json.loads((told / "model_index.json").read_text())
    assert SamplingDefaults(**index["sampling_defaults"]).sizes == both
    assert sampling_defaults(None, "14b") == sampling_defaults("square", "14b")
    made = sampling_defaults("square", "14b")
    assert list(made) == ["step_cache_coefficients"]
    assert SamplingDefaults(**made).sizes == SamplingDefaults().sizes


def test_speech_is_heard_in_float32(published: Path, tmp_path: Path) -> None:
    parts = load_published(find_published(published), "square", "1.3b", torch.bfloat16)
    own = convert(published, tmp_path / "own", dtype=torch.bfloat16, parts=["speech_encoder"])
    stored = Wav2Vec2Model.from_pretrained(own / "speech_encoder", dtype="auto").state_dict()
    for name, value in parts["speech_encoder"].state_dict().items():
        assert torch.equal(stored[name], value), name
    assert {parameter.dtype for parameter in parts["speech_encoder"].parameters()} == {torch.float32}
    assert parts["transformer"].proj_out.weight.dtype == torch.bfloat16
    assert parts["text_encoder"].shared.weight.dtype == torch.bfloat16


def test_wrong_requests(published: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown parts turbo"):
        convert(published, tmp_path / "own", parts=["turbo"])
    with pytest.raises(InputError, match="unknown parts none"):
        convert(published, tmp_path / "own", parts=[])
    with pytest.raises(CheckpointError, match=r"the 1\.3b transformer 'round' not found"):
        convert(published, tmp_path / "own", variant="round")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        convert(published, tmp_path / "file" / "own", parts=["scheduler"])


def test_found_files_load(published: Path) -> None:
    found = find_published(published)
    found.require("rec-vec")
    assert same(loading.load_transformer(*found.transformer_files("rec-vec")), toy.toy_transformer(20))
