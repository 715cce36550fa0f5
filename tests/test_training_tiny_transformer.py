"""The training of `tiny`'s transformer: from clips to an exported model, and its parts."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import CLIPVisionModel, UMT5EncoderModel, Wav2Vec2Config, Wav2Vec2Model

from clip_folders import write_clip
from stableavatar.conditioning.image import picture_tensor, portrait_embeddings
from stableavatar.conditioning.text import encode_prompts
from stableavatar.data.cache import CachedWindows, CacheWriter, LatentCache
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings
from stableavatar.data.encoding import Encoders, stack_samples
from stableavatar.data.puppets import make_clip
from stableavatar.data.puppets.store import build_store
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.checkpoints import list_checkpoints, load_checkpoint
from stableavatar.training.log import read_log
from stableavatar.training.muon import MuonAdamW
from stableavatar.training.objective import ObjectiveSettings, draw_step
from stableavatar.training.tiny import latents, transformer
from stableavatar.training.tiny.avatar import TinyAvatar
from stableavatar.training.tiny.preview import Preview


def toy_encoders(folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip
    speech = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="group",
        )
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    speech.save_pretrained(folder / "speech")
    return folder / "vae", folder / "speech"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of five frames of six small clips of nine."""
    folder = tmp_path_factory.mktemp("tiny")
    vae, speech = toy_encoders(folder)
    clips = [
        write_clip(folder / "speech" / str(k), frames=10, prompt=f"A person {k} talks") for k in range(6)
    ]
    dataset = ClipDataset.from_folders(clips, ClipDatasetSettings(frames=9, portrait=0.5))
    CacheWriter(
        dataset,
        folder / "cache",
        Encoders(AutoencoderKLWan.from_pretrained(vae), Wav2Vec2Model.from_pretrained(speech)),
        torch.bfloat16,
        window_frames=5,
    ).write([(k, 0) for k in range(6)])
    return folder / "cache"


def run(cache: Path, out: Path, *options: str) -> None:
    AcceleratorState._reset_state(True)
    transformer.main(
        ["--cache", str(cache), "--out", str(out), "--heads", "1", "--layers", "1", "--piece", "2", "--threads", "1",
         *options]
    )  # fmt: skip
    AcceleratorState._reset_state(True)


def test_from_a_cache_to_an_exported_model(cache: Path, tmp_path: Path) -> None:
    run(cache, tmp_path / "whole", "--steps", "3")
    run(cache, tmp_path / "parts", "--steps", "2")
    run(cache, tmp_path / "parts", "--steps", "3", "--resume")
    whole, parts = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert whole.counters["step"] == parts.counters["step"] == 3
    for name, value in whole.model.items():
        assert torch.equal(value, parts.model[name]), name
    assert read_log(tmp_path / "whole" / "log.jsonl") == []  # a line every ten steps

    export = tmp_path / "whole" / "export"
    model = StableAvatarTransformer3DModel.from_pretrained(export / "transformer")
    assert whole.ema is not None
    torch.testing.assert_close(model.proj_out.weight, whole.ema["transformer.proj_out.weight"])
    UMT5EncoderModel.from_pretrained(export / "text_encoder")
    CLIPVisionModel.from_pretrained(export / "image_encoder")
    (export / "transformer" / "config.json").unlink()
    run(cache, tmp_path / "whole", "--export-only")
    assert json.loads((export / "transformer" / "config.json").read_text())["num_layers"] == 1


def avatar() -> TinyAvatar:
    torch.manual_seed(1)
    made = TinyAvatar(ObjectiveSettings(prompt_dropping=0.3), heads=1, layers=2, audio_dim=16)
    with torch.no_grad():
        made.transformer.proj_out.weight.normal_()
    return made


def test_every_trained_parameter_learns_and_explicit_attention_is_exact(cache: Path) -> None:
    samples = CachedWindows(LatentCache(cache))
    batch = stack_samples([samples[k, 0] for k in range(3)])
    model = avatar()
    draws = draw_step(batch.latents.shape, model.objective, model.sigmas, torch.Generator().manual_seed(0))
    loss = model.loss(batch, draws).loss
    loss.backward()
    idle = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert idle == []
    gradient = model.transformer.blocks[0].attn1.to_q.weight.grad.clone()
    model.zero_grad()
    model.use_explicit_attention()
    again = model.loss(batch, draws).loss
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.transformer.blocks[0].attn1.to_q.weight.grad, gradient, rtol=1e-3, atol=1e-6
    )


def test_conditions_are_those_of_sampling(cache: Path) -> None:
    samples = CachedWindows(LatentCache(cache))
    batch = stack_samples([samples[k, 0] for k in range(2)])
    model = avatar()
    inputs = model.inputs(batch)
    prompts = encode_prompts(model.tokenizer, model.text_encoder, [*batch.prompts, ""], 96)
    torch.testing.assert_close(inputs.prompt, prompts[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs.empty_prompt, prompts[2:], rtol=1e-4, atol=1e-5)
    portrait = portrait_embeddings(model.image_encoder, picture_tensor(batch.portrait[1].numpy()))
    torch.testing.assert_close(inputs.portrait[1:], portrait, rtol=1e-4, atol=1e-5)


def test_the_first_latent_frame_is_judged_where_the_clip_starts(cache: Path) -> None:
    samples = CachedWindows(LatentCache(cache))
    windows = [samples[0, epoch] for epoch in range(6)]
    assert {window.starts_clip for window in windows} == {False, True}
    judged = avatar().inputs(stack_samples(windows)).judged
    assert judged is not None
    assert judged[:, 0].bool().tolist() == [window.starts_clip for window in windows]
    assert judged[:, 1:].all()


def test_the_optimizer_is_adamw_outside_of_blocks_and_orthogonal_within() -> None:
    torch.manual_seed(0)
    ours = nn.ParameterDict({"head": nn.Parameter(torch.randn(5, 4)), "gain": nn.Parameter(torch.randn(5))})
    theirs = nn.ParameterDict({name: nn.Parameter(value.detach().clone()) for name, value in ours.items()})
    matrix = nn.Parameter(torch.randn(6, 4))
    start = matrix.detach().clone()
    one = MuonAdamW({**ours, "blocks.0.weight": matrix}, 1e-2, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for step in range(4):
        for name in ours:
            theirs[name].grad = torch.randn(theirs[name].shape)
            ours[name].grad = theirs[name].grad.clone()
        matrix.grad = torch.randn(matrix.shape) * 10**step
        one.step()
        other.step()
        if step == 0:
            moved = (start * (1 - 1e-2 * 0.1) - matrix.detach()) / (1e-2 * 0.2 * 6**0.5)
            assert all(0.6 < value < 1.3 for value in torch.linalg.svdvals(moved))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    copy = MuonAdamW({**ours, "blocks.0.weight": matrix}, 1e-2)
    copy.load_state_dict(one.state_dict())
    assert torch.equal(copy.state[matrix]["momentum"], one.state[matrix]["momentum"])


def test_a_store_of_puppets_becomes_a_cache_and_a_preview(tmp_path: Path) -> None:
    vae, speech = toy_encoders(tmp_path)
    build_store(tmp_path / "store", [3, 4], seconds=1.7, size=32, processes=1)
    latents.main(
        ["--store", str(tmp_path / "store"), "--autoencoder", str(vae), "--speech-encoder", str(speech), "--out",
         str(tmp_path / "cache"), "--frames", "41"]
    )  # fmt: skip
    cached = LatentCache(tmp_path / "cache")
    assert len(cached) == 2
    assert cached[0, 0].latents.shape == (16, 11, 4, 4)
    assert cached[0, 0].speech.shape == (3, 65, 16)
    assert cached[0, 0].reference.shape == (16, 9, 4, 4)
    assert cached[0, 0].prompt == make_clip(3, 0.1, size=32).prompt

    run(
        tmp_path / "cache", tmp_path / "run", "--steps", "1", "--autoencoder", str(vae), "--speech-encoder",
        str(speech), "--preview-every", "1", "--preview-clips", "2",
    )  # fmt: skip
    (line,) = read_log(tmp_path / "run" / "preview" / "preview.jsonl")
    assert line["step"] == 1
    assert (tmp_path / "run" / "preview" / "sheet-000001.png").stat().st_size > 1000


def test_a_preview_tells_right_speech_from_wrong(tmp_path: Path) -> None:
    vae, speech = toy_encoders(tmp_path)
    preview = Preview(
        avatar(),
        AutoencoderKLWan.from_pretrained(vae),
        Wav2Vec2Model.from_pretrained(speech),
        tmp_path,
        clips=2,
        frames=9,
        sheet_every=2,
        steps=2,
    )
    preview(1)
    preview(2)
    first, second = read_log(tmp_path / "preview.jsonl")
    assert first["lips_right_0.6"] != first["lips_wrong_0.6"]
    assert {**first, "step": 2} == second
    assert [path.name for path in tmp_path.glob("sheet-*")] == ["sheet-000002.png"]
