"""What a training starts from, and a LoRA beside it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from command_line import run, toy_model
from published_toy import write_published
from recipe_toys import SQUARE, toy, write_data
from stableavatar.checkpoints import loading
from stableavatar.checkpoints.lora import merge_loras, read_lora
from stableavatar.errors import InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.pipeline import AvatarPipeline
from stableavatar.training.recipes import ModelChoice, load_recipe
from stableavatar.training.run import cache_latents, prepare_training
from stableavatar.training.start import load_start, open_clips, start_device
from toy import toy_transformer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


class TestStart:
    def test_of_a_model_that_is_spread_the_first_process_alone_has_values(self) -> None:
        spread, whole = (load_recipe(SQUARE, [f"trainer.sharding={way}"]) for way in ("fsdp2", "none"))
        homes = [start_device(recipe, leads=leads) for recipe in (spread, whole) for leads in (True, False)]
        assert homes == ["cpu", "meta", "cpu", "cpu"]

    def test_without_its_values_it_is_the_same_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_published(tmp_path)
        fresh: list[dict[str, torch.Tensor]] = []
        made = loading._fresh_audio
        monkeypatch.setattr(loading, "_fresh_audio", lambda *given: fresh.append(made(*given)) or fresh[-1])
        for variant in (None, "square"):
            whole, empty = (load_start(ModelChoice(tmp_path, variant=variant), at) for at in ("cpu", "meta"))
            assert all(value.is_meta for value in empty.parameters())
            assert empty.config == whole.config
            wanted = {name: (value.shape, value.dtype) for name, value in whole.state_dict().items()}
            assert {n: (v.shape, v.dtype) for n, v in empty.state_dict().items()} == wanted
        assert fresh[0].keys() == fresh[1].keys()
        assert [{value.is_meta for value in state.values()} for state in fresh] == [{False}, {True}]

    def test_the_base_starts_with_a_new_adapter_and_a_variant_with_its_own(
        self, data: Path, tmp_path: Path
    ) -> None:
        write_published(tmp_path / "checkpoints")
        started = {}
        for name, variant in (("base", "null"), ("square", "square")):
            AcceleratorState._reset_state(True)
            more = [f"model.source={tmp_path / 'checkpoints'}", f"model.variant={variant}"]
            training = prepare_training(load_recipe(SQUARE, toy(data, tmp_path / name, *more)))
            state = training.avatar.transformer.state_dict()
            started[name] = {key: value.clone() for key, value in state.items()}
            assert training.run()[0].step == 2
        assert not started["base"]["blocks.0.attn2.k_vocal.weight"].any()
        assert started["square"]["blocks.0.attn2.k_vocal.weight"].any()

    def test_what_it_made_becomes_a_model_to_generate_with(self, data: Path, tmp_path: Path) -> None:
        published = tmp_path / "checkpoints"
        write_published(published)
        more = [f"model.source={published}", "model.variant=square"]
        _, made = prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "run", *more))).run()
        done = run("convert", published, tmp_path / "mine", "--transformer", made)
        assert done.exit_code == 0, done.output
        wanted = StableAvatarTransformer3DModel.from_pretrained(made).state_dict()
        mine = AvatarPipeline.from_pretrained(tmp_path / "mine")
        for name, value in mine.transformer.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)

    def test_it_goes_on_from_an_export(self, data: Path, tmp_path: Path) -> None:
        _, made = prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "first"))).run()
        AcceleratorState._reset_state(True)
        more = [f"model.transformer={made}"]
        second = prepare_training(load_recipe(SQUARE, toy(data, tmp_path / "second", *more)))
        exported = StableAvatarTransformer3DModel.from_pretrained(made).state_dict()
        for name, value in second.avatar.transformer.state_dict().items():
            assert torch.equal(value, exported[name]), name


class TestLora:
    def test_its_file_is_the_model_that_was_trained(self, data: Path, tmp_path: Path) -> None:
        path = SQUARE.with_name("1.3b-square-lora.yaml")
        more = ["lora.rank=3", "lora.alpha=6", "model.dtype=float32", "trainer.optimizer.learning_rate=0.1"]
        training = prepare_training(load_recipe(path, toy(data, tmp_path, *more)))
        _, made = training.run()
        trained = training.avatar.transformer
        merged = toy_transformer()
        merge_loras(merged, [(read_lora(made, merged), 1.0)])
        arguments = inputs()
        with torch.no_grad():
            found, wanted, base = (
                model(*arguments).sample for model in (merged, trained.eval(), toy_transformer())
            )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (wanted - base).abs().max() > 1e-2
        pipeline = AvatarPipeline.from_pretrained(toy_model())
        pipeline.load_lora_weights(made)
        with torch.no_grad():
            torch.testing.assert_close(pipeline.transformer(*arguments).sample, wanted, rtol=1e-4, atol=1e-5)

    def test_unknown_layers_are_refused(self, data: Path, tmp_path: Path) -> None:
        path = SQUARE.with_name("1.3b-square-lora.yaml")
        more = ["lora.targets=[to_qk]", "model.dtype=float32"]
        with pytest.raises(InputError, match="to_qk"):
            prepare_training(load_recipe(path, toy(data, tmp_path, *more)))

    def test_of_a_base_model_the_new_adapter_is_trained_whole_beside_it(
        self, data: Path, tmp_path: Path
    ) -> None:
        published = write_published(tmp_path / "checkpoints")
        more = [
            f"model.source={published}", "lora.rank=2", "model.dtype=float32", "trainer.optimizer.learning_rate=0.01"
        ]  # fmt: skip
        path = SQUARE.with_name("1.3b-square-lora.yaml")
        training = prepare_training(load_recipe(path, toy(data, tmp_path / "run", *more)))
        before = {name: value.clone() for name, value in training.avatar.transformer.state_dict().items()}
        _, made = training.run()

        folder = tmp_path / "run" / "transformer"
        written = StableAvatarTransformer3DModel.from_pretrained(folder).state_dict()
        for name, value in written.items():
            old = before.get(name, before.get(re.sub(r"\.(weight|bias)$", r".base_layer.\1", name)))
            assert old is not None, name
            assert torch.equal(value, old) == ("vocal" not in name), name
        found = read_lora(made, StableAvatarTransformer3DModel.from_pretrained(folder))
        assert found.layers
        assert not any("vocal" in name for name in found.layers)

        # The two together are what was trained.
        done = run("convert", published, tmp_path / "mine", "--transformer", folder)
        assert done.exit_code == 0, done.output
        mine = AvatarPipeline.from_pretrained(tmp_path / "mine", lora=made)
        arguments = inputs(mine.transformer)
        with torch.no_grad():
            wanted = training.avatar.transformer.eval()(*arguments).sample
            torch.testing.assert_close(mine.transformer(*arguments).sample, wanted, rtol=1e-4, atol=1e-5)


def inputs(model: StableAvatarTransformer3DModel | None = None) -> tuple[torch.Tensor, ...]:
    sizes = (model or toy_transformer()).config
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (1, 16, 3, 4, 4), (1, 20, 3, 4, 4), (1,), (1, sizes.text_length, sizes.text_dim), (1, 5, sizes.image_dim),
        (1, 18, sizes.audio_dim),
    )  # fmt: skip
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_a_cache_of_other_encoders_is_refused_by_a_training_that_loads_none(
    data: Path, tmp_path: Path
) -> None:
    made = cache_latents(
        load_recipe(SQUARE, toy(data, tmp_path / "run")), tmp_path / "cache", passes=1, dtype=torch.float32
    )
    assert made == 4
    other = shutil.copytree(toy_model(), tmp_path / "other")
    (file,) = (other / "vae").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for source, fits in ((toy_model(), True), (other, False)):
        AcceleratorState._reset_state(True)
        more = [f"data.cache={tmp_path / 'cache'}", f"model.source={source}"]
        recipe = load_recipe(SQUARE, [*toy(data, tmp_path / "run"), *more])
        if fits:
            assert prepare_training(recipe).trainer.step == 0
        else:
            with pytest.raises(InputError, match="made with other encoders than those of model"):
                prepare_training(recipe)


def test_a_clip_that_is_named_twice_comes_once(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By two lists, or by a list and the folder that it lies in."""
    (tmp_path / "again").symlink_to(data.parent / "speech")
    recipe = load_recipe(SQUARE, [*toy(data, tmp_path), f"data.folders=[{tmp_path}]"])
    clips = open_clips(recipe.data).clips
    assert [clip.name for clip in clips] == [str(data.parent / "speech" / f"{k:05d}") for k in range(4)]
    assert "4 of 8 clips are named more than once" in caplog.text
