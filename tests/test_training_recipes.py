"""Recipes: every one is read and run at toy size; what they refuse; caches; validation; the commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from clip_folders import write_clip
from command_line import portrait, run, speech
from recipe_toys import RECIPES, SQUARE, toy, write_data
from stableavatar.checkpoints.lora import read_lora
from stableavatar.config import SIZES
from stableavatar.errors import InputError
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training import run as training_run
from stableavatar.training.avatar import Avatar
from stableavatar.training.checkpoints import list_checkpoints
from stableavatar.training.log import read_log
from stableavatar.training.parameters import freeze_others, trained_by_recipe
from stableavatar.training.recipes import load_recipe
from stableavatar.training.run import cache_latents, prepare_training
from stableavatar.training.start import load_encoders
from stableavatar.training.validation import ValidationVideos, _by_aspect
from toy import toy_transformer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_its_model_and_runs(path: Path, data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    with torch.device("meta"):
        model = StableAvatarTransformer3DModel(**SIZES[recipe.model.size].transformer)
    assert path.stem.startswith(recipe.model.size)
    freeze_others(model, trained_by_recipe)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert 0.8 < billions / float(recipe.model.size.removesuffix("b")) < 1.6

    more = ["lora.rank=2"] if recipe.lora else []
    training = prepare_training(load_recipe(path, toy(data, tmp_path, "trainer.precision=bf16", *more)))
    before = {name: value.clone() for name, value in training.avatar.transformer.state_dict().items()}
    result, made = training.run()
    assert (result.step, result.skipped_steps) == (2, 0)
    if recipe.lora:
        found = read_lora(made, toy_transformer())
        assert {layer.down.shape[0] for layer in found.layers.values()} == {2}
        assert any(layer.up.any() for layer in found.layers.values())
    else:
        after = StableAvatarTransformer3DModel.from_pretrained(made).state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if trained_by_recipe(name)}


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if "lora" not in path.stem], ids=lambda path: path.stem
)
def test_full_recipes_have_the_published_values(path: Path) -> None:
    """Spec 4, "Objective"."""
    recipe = load_recipe(path)
    optimizer, clip = recipe.trainer.optimizer, recipe.trainer.optimizer.clip
    assert (optimizer.kind, optimizer.betas, optimizer.weight_decay) == ("adamw", (0.9, 0.999), 3e-2)
    assert (optimizer.epsilon, optimizer.warmup_steps, optimizer.schedule) == (1e-10, 100, "constant")
    assert optimizer.learning_rate in (2e-5, 1e-4)
    assert clip.norm == 0.05
    assert clip.start_ratio > 1
    assert clip.abnormal_ratio is not None
    assert (recipe.trainer.precision, recipe.trainer.gradient_checkpointing) == ("bf16", True)
    assert (recipe.trainer.batch_size, recipe.data.clips.frames) == (1, 81)
    objective = recipe.objective
    assert (objective.timesteps, objective.mask_loss, objective.motion_ratio) == ("uniform", "drawn", 0.25)
    assert (objective.audio_dropping, objective.clip_level_audio, objective.prompt_dropping) == (
        0.1,
        0.3,
        0.0,
    )


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("trainer.batchsize=2", r"trainer\.batchsize: there is no such setting"),
        ("speed=2", "speed: there is no such setting"),
        ("objective.mask_los=none", r"objective\.mask_los: there is no such setting"),
        ("trainer.optimizer.clip.maximum=1", r"trainer\.optimizer\.clip\.maximum: there is no such setting"),
        ("trainer.steps=many", r"trainer\.steps: .*'many'"),
        ("trainer.batch_size=0", "batch_size must be at least 1"),
        ("model.size=2b", r"model\.size"),
        ("data.lists=[]", "name lists, folders, puppets or a cache"),
        ("data.clips.frames=10", "4n"),
        ("data.clips.masks=false", r"mask_loss drawn needs masks: set data\.clips\.masks"),
        ("model.dtype=bfloat16", "need dtype float32"),
        ("lora.rank=0", "rank must be at least 1"),
        ("trainer.steps", "sets nothing"),
        ("trainer.steps=[1", "not valid YAML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(override: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        load_recipe(SQUARE, [override])


def test_half_weights_need_half_precision() -> None:
    with pytest.raises(InputError, match=r"needs trainer\.precision bf16"):
        load_recipe(SQUARE.with_name("1.3b-square-lora.yaml"), ["trainer.precision=fp32"])


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    one, other, empty = (tmp_path / f"{name}.yaml" for name in ("one", "other", "empty"))
    one.write_text("extends: other.yaml")
    other.write_text("extends: one.yaml")
    with pytest.raises(InputError, match="which extends it"):
        load_recipe(one)
    empty.write_text("")
    with pytest.raises(InputError, match="holds no settings"):
        load_recipe(empty)
    empty.write_text("output: here")
    with pytest.raises(InputError, match=r"trainer: is not given \(and 1 more\)"):
        load_recipe(empty)


def test_settings_lie_over_what_is_extended(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"extends: {SQUARE}\ntrainer: {{optimizer: {{learning_rate: 1.0e-3}}}}"
    )
    mine, base = load_recipe(tmp_path / "mine.yaml", ["trainer.seed=3"]), load_recipe(SQUARE)
    assert (mine.trainer.seed, mine.trainer.optimizer.learning_rate) == (3, 1e-3)
    assert mine.trainer.optimizer.weight_decay == base.trainer.optimizer.weight_decay


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = read_log(folder / "log.jsonl")
    return [{name: value for name, value in line.items() if name != "clips_per_second"} for line in lines]


def test_training_from_a_cache_has_the_losses_of_training_without(data: Path, tmp_path: Path) -> None:
    """Over more steps than a pass has, so that passes with other starts are asked for."""
    draws = ["data.clips.portrait=0.3", "data.clips.any_frame=0.3", "objective.prompt_dropping=0.3"]
    steps = [*draws, "trainer.steps=6", "trainer.batch_size=2"]
    count = cache_latents(
        load_recipe(SQUARE, toy(data, tmp_path, *draws)), tmp_path / "cache", passes=3, dtype=torch.float32
    )
    assert count == 12
    for name, more in (("with", [f"data.cache={tmp_path / 'cache'}"]), ("without", [])):
        AcceleratorState._reset_state(True)
        prepare_training(load_recipe(SQUARE, toy(data, tmp_path / name, *steps, *more))).run()
    cached, read = curve(tmp_path / "with"), curve(tmp_path / "without")
    assert len(cached) == len(read) == 6
    for one, other in zip(cached, read, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_interrupted_and_resumed_a_recipe_gives_the_same_weights(data: Path, tmp_path: Path) -> None:
    prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "whole", "trainer.steps=4"))).run()
    AcceleratorState._reset_state(True)
    prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "parts", "trainer.steps=2"))).run()
    AcceleratorState._reset_state(True)
    prepare_training(
        load_recipe(SQUARE, toy(data, tmp_path / "parts", "trainer.steps=4")), resume="latest"
    ).run()
    weights = [
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


@pytest.mark.parametrize(("cached", "offload"), [(False, False), (False, True), (True, True)])
def test_validation_videos_have_sound_and_change_nothing(
    data: Path, tmp_path: Path, cached: bool, offload: bool
) -> None:
    case = {
        "portrait": str(portrait(tmp_path / "face.png")),
        "speech": str(speech(tmp_path / "speech.wav", 2.0)),
        "seconds": 0.6,
    }
    validation = {
        "cases": [case],
        "options": {"steps": 1, "width": 32, "height": 32},
    }
    more = [
        f"validation={json.dumps(validation)}", "trainer.callback_every=1", f"model.offload_encoders={offload}".lower(),
    ]  # fmt: skip
    if cached:
        cache_latents(
            load_recipe(SQUARE, toy(data, tmp_path)), tmp_path / "cache", passes=1, dtype=torch.float32
        )
        more.append(f"data.cache={tmp_path / 'cache'}")
    prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "looked", *more))).run()
    videos = sorted((tmp_path / "looked" / "validation").rglob("*.mp4"))
    assert [video.parent.name for video in videos] == ["step-00000001", "step-00000002"]
    found = probe(videos[0])
    assert (found.frames, found.width) == (15, 32)
    settings = json.loads(read_metadata(videos[0])["stableavatar"])
    assert settings["window"] == 17  # the model's own
    assert found.sound_seconds == pytest.approx(0.6, abs=0.05)
    AcceleratorState._reset_state(True)
    prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "alone", *more[2:]))).run()
    assert curve(tmp_path / "looked") == curve(tmp_path / "alone")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"cases": [{"portrait": "nowhere.png", "speech": "nowhere.wav"}]}, "no file nowhere.png"),
        ({"cases": [], "options": {"stepz": 3}}, "no option stepz; did you mean steps"),
        ({"cases": [], "options": {"steps": 0}}, "steps"),
        ({"cases": [], "options": {"duration": 2}}, "duration belongs to a case, as its seconds"),
    ],
)
def test_validation_that_could_not_be_made_is_refused_at_once(
    data: Path, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=what):
        prepare_training(load_recipe(SQUARE, toy(data, tmp_path, f"validation={json.dumps(change)}")))


def test_validation_where_accelerate_spreads_the_model_is_refused_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = load_recipe(SQUARE, toy(data, tmp_path, 'validation={"cases": []}'))
    with pytest.raises(InputError, match=r"validation: .*--set trainer.sharding=fsdp2"):
        prepare_training(recipe)


def test_validation_as_the_documentation_asks_for_it(data: Path, tmp_path: Path) -> None:
    document = RECIPES[0].parents[1] / "docs" / "training.md"
    asked = yaml.safe_load(document.read_text().split("```yaml\n")[1].split("```")[0])
    trainer = [f"trainer.{name}={value}" for name, value in asked["trainer"].items()]
    recipe = load_recipe(
        SQUARE, toy(data, tmp_path, f"validation={json.dumps(asked['validation'])}", *trainer)
    )
    assert recipe.validation is not None
    assert recipe.validation.cases[0].seconds == 5
    assert recipe.trainer.callback_every == 500
    with pytest.raises(InputError, match=r"no file faces.anna.png"):
        prepare_training(recipe)


def test_validation_videos_have_the_sizes_of_the_clips() -> None:
    sizes = [(512, 512), (832, 480), (832, 480), (640, 640), (512, 512)]
    assert _by_aspect(sizes) == {"square": (512, 512), "wide": (832, 480)}


@pytest.mark.parametrize(
    ("variant", "sizes"), [(None, {"wide": (832, 480)}), ("square", {"square": (512, 512)})]
)
def test_they_are_the_variants_where_the_training_goes_on_from_one(
    data: Path, tmp_path: Path, published: Path, variant: str | None, sizes: dict[str, tuple[int, int]]
) -> None:
    recipe = load_recipe(SQUARE, toy(data, tmp_path))
    recipe = replace(recipe, model=replace(recipe.model, source=published, variant=variant))
    encoders = load_encoders(recipe.model, torch.device("cpu"))
    videos = ValidationVideos(recipe, Avatar(toy_transformer(), recipe.objective), encoders, [(832, 480)])
    assert videos._pipeline(encoders).defaults.sizes == sizes


def test_a_cache_that_was_drawn_otherwise_is_refused(data: Path, tmp_path: Path) -> None:
    cache_latents(load_recipe(SQUARE, toy(data, tmp_path)), tmp_path / "cache", passes=1, dtype=torch.float32)
    AcceleratorState._reset_state(True)
    more = [f"data.cache={tmp_path / 'cache'}", "data.clips.portrait=0.25"]
    with pytest.raises(InputError, match=r"made with data.clips.portrait 0.0, and the recipe has 0.25"):
        prepare_training(load_recipe(SQUARE, toy(data, tmp_path, *more)))
    AcceleratorState._reset_state(True)
    more = [f"data.cache={tmp_path / 'cache'}", "data.sizes=[512x512]"]
    with pytest.raises(InputError, match=r"holds clips of 32x32 pixels, .*data.sizes"):
        prepare_training(load_recipe(SQUARE, toy(data, tmp_path, *more)))


@pytest.mark.parametrize("cached", [False, True])
def test_without_masks_where_the_loss_asks_for_none(data: Path, tmp_path: Path, cached: bool) -> None:
    for kind in ("face_masks", "lip_masks"):
        for folder in data.parent.glob(f"speech/*/{kind}"):
            folder.rename(folder.with_name(f".{kind}"))
    try:
        given = toy(data, tmp_path, "objective.mask_loss=none", "data.clips.masks=false")
        if cached:
            cache = tmp_path / "cache"
            cache_latents(load_recipe(SQUARE, given), cache, passes=1, dtype=torch.float32)
            with pytest.raises(InputError, match=r"was made without masks, which .* drawn needs"):
                prepare_training(load_recipe(SQUARE, toy(data, tmp_path, f"data.cache={cache}")))
            AcceleratorState._reset_state(True)
            given.append(f"data.cache={cache}")
        assert prepare_training(load_recipe(SQUARE, given)).run()[0].step == 2
    finally:
        for folder in data.parent.glob("speech/*/.*_masks"):
            folder.rename(folder.with_name(folder.name.removeprefix(".")))


def test_a_training_resumes_beside_the_same_frozen_weights_alone(data: Path, tmp_path: Path) -> None:
    path = SQUARE.with_name("1.3b-square-lora.yaml")
    more = ["model.dtype=float32", "lora.rank=2", "lora.alpha=2"]
    prepare_training(load_recipe(path, toy(data, tmp_path / "run", *more))).run()
    AcceleratorState._reset_state(True)
    training = prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "other", "trainer.steps=1")))
    other = training.run()[1]
    for change, what in (("lora.alpha=4", "lora"), (f"model.transformer={other}", "frozen weights")):
        AcceleratorState._reset_state(True)
        with pytest.raises(InputError, match=f"another {what}"):
            prepare_training(
                load_recipe(path, toy(data, tmp_path / "run", *more, change)), resume="latest", new_data=True
            )
    AcceleratorState._reset_state(True)  # without alpha, which is the rank
    prepare_training(load_recipe(path, toy(data, tmp_path / "run", *more[:2])), resume="latest")


@pytest.mark.parametrize("path", sorted(SQUARE.parent.glob("*-lora.yaml")), ids=lambda path: path.stem)
def test_a_lora_of_another_rank_acts_at_the_same_strength(path: Path) -> None:
    lora = load_recipe(path, ["lora.rank=2"]).lora
    assert lora is not None
    assert lora.alpha is None


def train_whole_and_spread(recipe: Path, data: Path, folder: Path, *more: str, way: str = "fsdp2") -> None:
    """A recipe in one process, into `one`, and spread over two, into `two`, of the same clips a step."""
    one = toy(data, folder / "one", *more, "trainer.accumulation=2")
    prepare_training(load_recipe(recipe, one)).run()
    two = toy(data, folder / "two", *more, "trainer.accumulation=1")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if way == "fsdp2":
        two.append("trainer.sharding=fsdp2")
    else:
        config = SQUARE.parent / "accelerate" / f"{way}.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "stableavatar", "train", str(recipe),
         *(word for it in two for word in ("--set", it))],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_spread_over_two_processes_a_recipe_is_that_of_one_and_makes_its_videos(
    data: Path, tmp_path: Path, way: str
) -> None:
    if way == "zero3":
        pytest.importorskip("deepspeed", reason="in the extra large; see make test-large")
    case = {
        "portrait": str(portrait(tmp_path / "face.png")),
        "speech": str(speech(tmp_path / "speech.wav", 2.0)),
        "seconds": 0.6,
    }
    validation = {"cases": [case], "options": {"steps": 1, "width": 32, "height": 32}}
    more = [
        f"validation={json.dumps(validation)}", "trainer.callback_every=2", "trainer.batch_size=1",
        # A smaller one makes steps of full size of gradients that are nothing but rounding.
        "trainer.optimizer.epsilon=1.0e-3", "trainer.optimizer.learning_rate=1.0e-2",
    ]  # fmt: skip
    train_whole_and_spread(SQUARE, data, tmp_path, *more, way=way)
    for alone, spread in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert spread["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert spread["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)
    models, videos = [], []
    for name in ("one", "two"):
        models.append(StableAvatarTransformer3DModel.from_pretrained(tmp_path / name / "transformer"))
        (video,) = (tmp_path / name / "validation").rglob("*.mp4")
        assert probe(video).sound_seconds == pytest.approx(0.6, abs=0.05)
        videos.append(np.stack(list(read_frames(video))).astype(int))
    spread_state = models[1].state_dict()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(spread_state[name], value, rtol=1e-4, atol=1e-5)
    assert len(videos[0]) == 15
    assert np.abs(videos[0] - videos[1]).mean() < 1


def test_a_lora_beside_a_spread_model_is_that_of_one_process(data: Path, tmp_path: Path) -> None:
    more = [
        "trainer.batch_size=1", "trainer.precision=bf16", "lora.rank=2", "trainer.optimizer.epsilon=1.0e-3",
        "trainer.optimizer.learning_rate=1.0e-1",
    ]  # fmt: skip
    train_whole_and_spread(SQUARE.with_name("1.3b-square-lora.yaml"), data, tmp_path, *more)
    for alone, spread in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert spread["loss"] == pytest.approx(alone["loss"], rel=1e-2)
    layers = [read_lora(tmp_path / name / "lora", toy_transformer()).layers for name in ("one", "two")]
    assert layers[0].keys() == layers[1].keys()
    for name, layer in layers[0].items():
        assert layer.up.norm() > 0, name  # it starts at zero
        for mine, wanted in ((layers[1][name].up, layer.up), (layers[1][name].down, layer.down)):
            assert (mine - wanted).norm() < 0.1 * wanted.norm(), name


class TestCommands:
    def test_train_cache_and_resume(self, data: Path, tmp_path: Path) -> None:
        def arguments(*more: str) -> list[str]:
            return [word for one in toy(data, tmp_path / "run", *more) for word in ("--set", one)]

        done = run("cache-latents", SQUARE, "-o", tmp_path / "cache", "--passes", "2", *arguments())
        assert done.exit_code == 0, done.output
        assert f"{tmp_path / 'cache'}: 8 samples" in done.output
        AcceleratorState._reset_state(True)
        cached = f"data.cache={tmp_path / 'cache'}"
        done = run("train", SQUARE, *arguments(cached))
        assert done.exit_code == 0, done.output
        assert "run/transformer: after 2 of 2 steps" in done.output.replace("\n", "")
        AcceleratorState._reset_state(True)
        done = run("train", SQUARE, *arguments(cached))
        assert done.exit_code == 2
        assert "resume from the latest" in done.output.replace("\n", " ")
        AcceleratorState._reset_state(True)
        done = run("train", SQUARE, "--resume", "latest", *arguments(cached, "trainer.steps=3"))
        assert done.exit_code == 0, done.output
        assert "after 3 of 3 steps" in done.output

    def test_errors_are_a_line(self, data: Path, tmp_path: Path) -> None:
        for arguments, what in (
            ([tmp_path / "none.yaml"], "cannot be read"),
            ([SQUARE, "--set", "trainer.stepps=1"], "there is no such setting"),
            ([SQUARE, "--new-data"], "--resume"),
            ([SQUARE, "--set", f"model.source={tmp_path}"], "holds no published weights"),
        ):
            done = run("train", *arguments)
            assert done.exit_code == 2
            assert what in done.output.replace("\n", " ")

    @pytest.mark.parametrize("command", ["train", "cache-latents"])
    def test_too_little_memory_names_keys_that_there_are(
        self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training_run, "check_folder", lambda _: torch.empty(1 << 45))
        done = run(command, SQUARE, *(["-o", tmp_path] if command == "cache-latents" else []))
        assert done.exit_code == 2
        assert "too little memory" in done.output
        assert "--dtype" not in done.output
        keys = re.findall(r"((?:trainer|model|data)(?:\.[a-z_]+)+)(?:=([\w-]+))?", done.output)
        assert ("model.offload_encoders", "true") in keys
        load_recipe(SQUARE, [f"{name}={value or repr('9')}" for name, value in keys])

    def test_a_signal_to_all_processes_ends_it_with_a_checkpoint(self, data: Path, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        endless = toy(
            data, folder, "trainer.steps=1000000", "trainer.checkpoint_every=1000000", "trainer.workers=2"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "stableavatar", "train", str(SQUARE), *(word for it in endless for word in ("--set", it))],
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not (folder / "log.jsonl").exists() or not read_log(folder / "log.jsonl"):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(timeout=120) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert len(list_checkpoints(folder)) == 1

    def test_a_given_checkpoint_is_gone_on_from(self, data: Path, tmp_path: Path) -> None:
        def arguments(name: str, *more: str) -> list[str]:
            return [word for one in toy(data, tmp_path / name, *more) for word in ("--set", one)]

        assert run("train", SQUARE, *arguments("first")).exit_code == 0
        AcceleratorState._reset_state(True)
        (checkpoint,) = list_checkpoints(tmp_path / "first")
        done = run("train", SQUARE, "--resume", checkpoint, *arguments("second", "trainer.steps=3"))
        assert done.exit_code == 0, done.output
        assert [line["step"] for line in read_log(tmp_path / "second" / "log.jsonl")] == [3]
        AcceleratorState._reset_state(True)
        done = run("train", SQUARE, "--resume", tmp_path / "nowhere", *arguments("third"))
        assert done.exit_code == 2, done.output


def test_a_missing_file_of_a_clip_is_named(data: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "speech" / "1", frames=12)
    for mask in (clip / "lip_masks").glob("frame_[!6]*.png"):  # the middle one is looked at in opening it
        mask.unlink()
    (tmp_path / "list.txt").write_text("speech/1\n")
    more = ["data.clips.on_error=raise"]
    training = prepare_training(load_recipe(SQUARE, toy(tmp_path / "list.txt", tmp_path / "run", *more)))
    with pytest.raises(InputError, match="lip_masks"):
        training.run()
    assert np.all([not list((tmp_path / "run").glob("step-*"))])
