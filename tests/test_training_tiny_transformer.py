"""The training of `tiny`'s transformer: from clips to an exported model, and its parts."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import UMT5EncoderModel, Wav2Vec2Model

from clip_folders import write_clip
from command_line import portrait, speech
from stableavatar.checkpoints import layout
from stableavatar.checkpoints.layout import TINY
from stableavatar.conditioning.image import picture_tensor, portrait_embeddings
from stableavatar.conditioning.text import encode_prompts
from stableavatar.data.cache import CachedWindows, CacheWriter, LatentCache
from stableavatar.data.dataset import ClipDataset, ClipDatasetSettings
from stableavatar.data.encoding import Encoders, stack_samples
from stableavatar.data.puppets import make_clip
from stableavatar.data.puppets.store import build_store
from stableavatar.errors import CheckpointError, InputError
from stableavatar.media.reading import probe
from stableavatar.models.attention import KernelProcessor
from stableavatar.pipeline import AvatarPipeline
from stableavatar.training.avatar import Avatar
from stableavatar.training.checkpoints import list_checkpoints, load_checkpoint
from stableavatar.training.efficiency import use_explicit_attention
from stableavatar.training.log import read_log
from stableavatar.training.muon import MuonAdamW
from stableavatar.training.objective import ObjectiveSettings, draw_step
from stableavatar.training.recipes import load_recipe
from stableavatar.training.result import export_checkpoint
from stableavatar.training.run import Training, cache_latents, prepare_training
from stableavatar.training.tiny import avatar as tiny_avatar
from stableavatar.training.tiny.assemble import SAMPLING_DEFAULTS
from stableavatar.training.tiny.avatar import TinyAvatar, build_text_encoder, grow_transformer
from toy_encoders import toy_encoder_pair

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for name, part in zip(("vae", "speech_encoder"), toy_encoder_pair(), strict=True):
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def cache(encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of five frames of six small clips of nine."""
    folder = tmp_path_factory.mktemp("tiny")
    clips = [
        write_clip(folder / "speech" / str(k), frames=10, prompt=f"A person {k} talks") for k in range(6)
    ]
    dataset = ClipDataset.from_folders(clips, ClipDatasetSettings(frames=9, portrait=0.9, any_frame=0.1))
    parts = Encoders(
        AutoencoderKLWan.from_pretrained(encoders / "vae"),
        Wav2Vec2Model.from_pretrained(encoders / "speech_encoder"),
    )
    writer = CacheWriter(dataset, folder / "cache", parts, torch.bfloat16, window_frames=5)
    keys = [(k, 0) for k in range(6)]
    writer.write(keys)
    writer.finish(keys)
    return folder / "cache"


def prepared(encoders: Path, out: Path, *more: str, resume: Literal["latest"] | None = None) -> Training:
    """The recipe at toy size."""
    AcceleratorState._reset_state(True)
    return prepare_training(load_recipe(RECIPE, toy(encoders, out, *more)), resume=resume)


def toy(encoders: Path, out: Path, *more: str) -> list[str]:
    """What brings the recipe to toy size."""
    return [
        f"output={out}", f"model.source={encoders}", "model.encoder_dtype=float32", "model.embedded.heads=1", "model.embedded.layers=1",
        "trainer.compile=false", "trainer.optimizer.schedule=constant",
        "trainer.optimizer.decay_steps=null", "data.window_frames=5", "data.clips.frames=9",
        "trainer.batch_size=2", *more,
    ]  # fmt: skip


def test_the_recipe_makes_a_model_that_generates(encoders: Path, cache: Path, tmp_path: Path) -> None:
    at = f"data.cache={cache}"
    _, made = prepared(encoders, tmp_path / "whole", at, "trainer.steps=3").run()
    prepared(encoders, tmp_path / "parts", at, "trainer.steps=2").run()
    prepared(encoders, tmp_path / "parts", at, "trainer.steps=3", resume="latest").run()
    whole, parts = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert whole.counters["step"] == parts.counters["step"] == 3
    for name, value in whole.model.items():
        assert torch.equal(value, parts.model[name]), name

    assert made == tmp_path / "whole" / "model"
    pipeline = AvatarPipeline.from_pretrained(made)
    assert whole.ema is not None
    torch.testing.assert_close(
        pipeline.transformer.proj_out.weight, whole.ema["transformer.proj_out.weight"], rtol=1e-2, atol=1e-4
    )
    assert pipeline.defaults.window == SAMPLING_DEFAULTS["window"]
    assert pipeline.scheduler.config.shift == load_recipe(RECIPE).objective.shift
    puppet = make_clip(1, 0.4, size=32)
    frames = list(pipeline.stream(puppet.portrait, puppet.samples, steps=1, width=32, height=32))
    assert len(frames) == len(puppet.frames)
    config = json.loads((made / "transformer" / "config.json").read_text())
    assert "_name_or_path" not in config


def test_the_recipe_builds_at_its_own_size_what_ships() -> None:
    embedded = load_recipe(RECIPE).model.embedded
    assert embedded is not None
    with torch.device("meta"):
        avatar = TinyAvatar(ObjectiveSettings(), heads=embedded.heads, layers=embedded.layers)
    for name, file in (
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("image_encoder", "model.safetensors"),
    ):
        with safe_open(TINY / name / file, framework="pt") as shipped:
            shapes = {key: shipped.get_slice(key).get_shape() for key in shipped.offset_keys()}
        built = {key: list(value.shape) for key, value in getattr(avatar, name).state_dict().items()}
        assert {key: built.get(key) for key in shapes} == shapes, name


def test_it_goes_on_from_a_model_with_fewer_latent_channels(
    encoders: Path, cache: Path, tmp_path: Path
) -> None:
    at = f"data.cache={cache}"
    _, made = prepared(encoders, tmp_path / "first", at, "trainer.steps=1").run()
    start = f"model.embedded.start={made}"
    again = prepared(encoders, tmp_path / "second", at, start).avatar
    assert isinstance(again, TinyAvatar)
    exported = AvatarPipeline.from_pretrained(made)
    for part in ("transformer", "text_encoder", "image_encoder"):
        given = getattr(exported, part).state_dict()
        for name, value in getattr(again, part).state_dict().items():
            torch.testing.assert_close(value, given[name].float(), rtol=0, atol=0)

    grown = TinyAvatar(ObjectiveSettings(), heads=1, layers=1, audio_dim=16, latent_channels=18)
    grown.start_from(made)
    batch = stack_samples([CachedWindows(LatentCache(cache))[0, 0]])
    inputs = again.inputs(batch)
    more = torch.zeros(1, 2, *batch.latents.shape[2:])
    condition = torch.cat([batch.condition, more], dim=1)
    others = (torch.tensor([500.0]), inputs.prompt, inputs.portrait, inputs.speech, [0])
    with torch.no_grad():
        plain = again.transformer(batch.latents, batch.condition, *others).sample
        wider = grown.transformer(torch.cat([batch.latents, more], dim=1), condition, *others).sample
    torch.testing.assert_close(wider[:, :16], plain, rtol=1e-4, atol=1e-5)
    assert not wider[:, 16:].any()
    loss = (
        grown.transformer(torch.cat([batch.latents, more + 1], dim=1), condition, *others)
        .sample.square()
        .sum()
    )
    loss.backward()
    assert grown.transformer.patch_embedding.weight.grad[:, 16:18].any()

    with pytest.raises(InputError, match="has num_layers 1, the model 2"):
        TinyAvatar(ObjectiveSettings(), heads=1, layers=2, audio_dim=16, latent_channels=16).start_from(made)
    with pytest.raises(InputError, match="has 18 latent channels, the model 16"):
        grow_transformer(again.transformer, grown.transformer)
    (made / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="text_encoder cannot be started from"):
        prepared(encoders, tmp_path / "third", at, start)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.window_frames=9", "data.window_frames 5, and the recipe has 9"),
        ("data.window_frames=null", "data.window_frames 5, and the recipe has None"),
        ("data.clips.frames=13", "data.clips.frames 9, and the recipe has 13"),
        ("model.embedded.heads=0", "at least 1"),
        ("model.variant=square", "embedded.start"),
        ("lora.rank=2", "leave embedded out"),
    ],
)
def test_what_the_embedded_model_cannot_be(
    encoders: Path, cache: Path, tmp_path: Path, override: str, what: str
) -> None:
    with pytest.raises(InputError, match=what):
        prepared(encoders, tmp_path, f"data.cache={cache}", override)


def test_windows_need_a_cache(encoders: Path, tmp_path: Path) -> None:
    build_store(tmp_path / "store", [3], seconds=0.6, size=32, processes=1)
    puppets = f"data.puppets=[{tmp_path / 'store'}]"
    with pytest.raises(InputError, match="of a cache"):
        prepared(encoders, tmp_path / "run", "data.cache=null", puppets, "data.clips.frames=9")


def test_puppets_are_trained_on_without_a_cache_too(encoders: Path, tmp_path: Path) -> None:
    build_store(tmp_path / "store", [3, 4], seconds=0.6, size=32, processes=1)
    training = prepared(
        encoders, tmp_path / "run", "data.cache=null", f"data.puppets=[{tmp_path / 'store'}]",
        "data.clips.frames=9", "data.window_frames=null", "trainer.steps=1",
    )  # fmt: skip
    assert training.run()[0].step == 1


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_muon_multiplies_in_the_precision_of_the_run(
    encoders: Path, cache: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    training = prepared(encoders, tmp_path, f"data.cache={cache}", f"trainer.precision={precision}")
    optimizer = getattr(training.trainer.optimizer, "optimizer", None)
    assert isinstance(optimizer, MuonAdamW)
    assert optimizer.dtype == dtype


def avatar() -> TinyAvatar:
    torch.manual_seed(1)
    made = TinyAvatar(
        ObjectiveSettings(prompt_dropping=0.3), heads=1, layers=2, audio_dim=16, latent_channels=16
    )
    with torch.no_grad():
        made.transformer.proj_out.weight.normal_()
    return made


def test_every_trained_parameter_learns_and_explicit_attention_is_exact(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    use_explicit_attention(model)
    monkeypatch.setattr(KernelProcessor, "__call__", None)  # not called any more
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


def test_so_it_is_by_the_published_models_training(cache: Path) -> None:
    samples = CachedWindows(LatentCache(cache))
    windows = [samples[0, epoch] for epoch in range(6)]
    parts = {name: torch.zeros(1, 1) for name in ("prompt_embeddings", "empty_prompt", "portrait_embeddings")}
    model = Avatar(avatar().transformer, ObjectiveSettings())
    mixed = model.inputs(replace(stack_samples(windows), **parts)).judged
    assert mixed is not None
    assert mixed[:, 0].bool().tolist() == [window.starts_clip for window in windows]
    first = [window for window in windows if window.starts_clip]
    assert model.inputs(replace(stack_samples(first), **parts)).judged is None


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


def test_what_has_two_names_is_exported_as_one(encoders: Path, cache: Path, tmp_path: Path) -> None:
    more = ["trainer.steps=2", "trainer.optimizer.learning_rate=1.0e-2", "trainer.optimizer.warmup_steps=0"]
    _, made = prepared(encoders, tmp_path, f"data.cache={cache}", *more).run()
    average = load_checkpoint(list_checkpoints(tmp_path)[-1]).ema
    assert average is not None
    text_encoder = AvatarPipeline.from_pretrained(made).text_encoder
    for weight in (text_encoder.shared.weight, text_encoder.encoder.embed_tokens.weight):
        torch.testing.assert_close(
            weight, average["text_encoder.shared.weight"].to(weight), rtol=1e-2, atol=1e-4
        )


def test_a_prompt_encoder_that_was_trained_before_stays_as_it_is(
    encoders: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(encoders, tmp_path / "encoders")
    torch.manual_seed(3)
    given = build_text_encoder()
    given.save_pretrained(source / "text_encoder")
    _, made = prepared(source, tmp_path / "run", f"data.cache={cache}", "trainer.steps=2").run()
    kept = UMT5EncoderModel.from_pretrained(made / "text_encoder", dtype=torch.float32).state_dict()
    for name, value in given.state_dict().items():
        torch.testing.assert_close(kept[name], value.bfloat16().float())
    monkeypatch.setattr(layout, "TINY", source)
    embedded = prepared(Path("tiny"), tmp_path / "tiny", f"data.cache={cache}", "trainer.steps=2").avatar
    assert isinstance(embedded, TinyAvatar)
    for name, value in given.state_dict().items():
        assert torch.equal(embedded.text_encoder.state_dict()[name], value)
    (source / "text_encoder" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="text_encoder cannot be started from"):
        prepared(source, tmp_path / "other", f"data.cache={cache}", "trainer.steps=2")


def test_two_processes_make_the_cache_of_one(encoders: Path, tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / "data" / "speech" / str(k), frames=10, prompt=f"clip {k}") for k in (0, 1)]
    settings = [
        f"model.source={encoders}", "model.encoder_dtype=float32", f"data.folders=[{tmp_path / 'data'}]", "data.puppets=[]",
        "data.window_frames=5", "data.clips.frames=9",
    ]  # fmt: skip
    passes = 110  # three blocks of 96 samples
    assert cache_latents(
        load_recipe(RECIPE, settings), tmp_path / "one", passes=passes, dtype=torch.float32
    ) == passes * len(clips)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "stableavatar",
         "cache-latents", str(RECIPE), "-o", str(tmp_path / "two"), "--passes", str(passes), "--dtype", "float32",
         *(word for setting in settings for word in ("--set", setting))],
        check=True, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.count(f"{passes * len(clips)} samples") == 1
    one, two = (LatentCache(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    for key in ((0, 0), (0, 100), (1, 50), (1, 109)):
        torch.testing.assert_close(one[key].latents, two[key].latents)
        torch.testing.assert_close(one[key].speech, two[key].speech)


def test_a_store_of_puppets_becomes_a_cache_and_validation_videos(encoders: Path, tmp_path: Path) -> None:
    build_store(tmp_path / "store", [3, 4], seconds=1.7, size=32, processes=1)
    recipe = load_recipe(
        RECIPE,
        [
            f"model.source={encoders}",
            "model.encoder_dtype=float32",
            f"data.puppets=[{tmp_path / 'store'}]",
            "data.clips.frames=41",
        ],
    )
    assert cache_latents(recipe, tmp_path / "cache", passes=1, dtype=torch.bfloat16) == 2
    cached = LatentCache(tmp_path / "cache")
    assert len(cached) == 2
    assert cached[0, 0].latents.shape == (16, 11, 4, 4)
    assert cached[0, 0].speech.shape == (3, 65, 16)
    assert cached[0, 0].reference.shape == (16, 9, 4, 4)
    assert cached[0, 0].prompt == make_clip(3, 0.1, size=32).prompt

    case = {
        "portrait": str(portrait(tmp_path / "face.png")),
        "speech": str(speech(tmp_path / "speech.wav", 2.0)),
        "seconds": 0.6,
    }
    validation = {"cases": [case], "options": {"steps": 1, "width": 32, "height": 32}}
    prepared(
        encoders, tmp_path / "run", f"data.cache={tmp_path / 'cache'}", "data.window_frames=33", "data.clips.frames=41", "trainer.steps=1",
        "trainer.callback_every=1", f"validation={json.dumps(validation)}",
    ).run()  # fmt: skip
    (video,) = (tmp_path / "run" / "validation").rglob("*.mp4")
    assert probe(video).frames == 15


SPREADABLE = ("trainer.optimizer.kind=adamw", "objective.audio_output_dropping=0.0")


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_two_processes_have_the_curve_of_one(encoders: Path, cache: Path, tmp_path: Path, way: str) -> None:
    deepspeed = way.startswith("zero")
    if deepspeed:
        pytest.importorskip("deepspeed", reason="in the extra large; see make test-large")
    usual = [
        f"data.cache={cache}", "trainer.batch_size=1", "trainer.log_every=1", "trainer.precision=fp32",
        "trainer.steps=4", "trainer.optimizer.epsilon=1.0e-3", "trainer.optimizer.learning_rate=1.0e-2",
        "trainer.optimizer.warmup_steps=0",
        *(() if way == "ddp" else SPREADABLE), *(("trainer.ema_decay=0.0",) if way.startswith("zero3") else ()),
    ]  # fmt: skip
    alone = prepared(encoders, tmp_path / "one", *usual, "trainer.accumulation=4")
    untrained = copy.deepcopy(alone.avatar)
    _, made = alone.run()
    more = ["trainer.accumulation=2", f"trainer.sharding={'fsdp2' if way == 'fsdp2' else 'none'}"]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    if deepspeed:
        shipped = RECIPE.parent / "accelerate" / f"{way}.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(shipped), "--num_processes", "2"]
    subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "stableavatar", "train", str(RECIPE),
         *(word for it in toy(encoders, tmp_path / "two", *usual, *more) for word in ("--set", it))],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    curves = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == 4
    for one, two in zip(*curves, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    one, two = (AvatarPipeline.from_pretrained(folder) for folder in (made, tmp_path / "two" / "model"))
    for part in ("transformer", "text_encoder", "image_encoder"):
        found, before = getattr(two, part).state_dict(), getattr(untrained, part).state_dict()
        for name, value in getattr(one, part).state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=2e-2, atol=1e-3)  # kept in bfloat16
        moved = [(value - before[name]).abs().max() for name, value in found.items()]
        assert max(moved) > 4e-3
    exported = export_checkpoint(list_checkpoints(tmp_path / "two")[-1], tmp_path / "exported")
    for file in (tmp_path / "two" / "model").rglob("*.safetensors"):
        wanted, found = (
            load_file(it / file.relative_to(tmp_path / "two" / "model")) for it in (file.parents[1], exported)
        )
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), file


def test_what_it_is_given_is_made_where_the_batch_lies(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    avatar = TinyAvatar(ObjectiveSettings(), heads=1, layers=1, audio_dim=16, latent_channels=16)
    asked: list[torch.device] = []
    monkeypatch.setattr(
        tiny_avatar,
        "encode_tokens",
        lambda _encoder, ids, mask, length: (
            asked.extend([ids.device, mask.device]) or torch.zeros(len(ids), length, 8, device=ids.device)
        ),
    )
    batch = stack_samples([CachedWindows(LatentCache(cache))[k, 0] for k in range(2)])
    elsewhere = avatar.to("meta").inputs(batch.to(torch.device("meta")))
    assert set(map(str, asked)) == {"meta"}
    assert elsewhere.judged is not None
    assert str(elsewhere.judged.device) == "meta"
