"""LoRA files: every naming gives the same weights; merged, stacked, scaled, attached, from the command line."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from command_line import QUICK, portrait, run, speech, toy_model
from stableavatar.apps.command_options import stored_settings
from stableavatar.checkpoints.lora import (
    Lora,
    LowRank,
    lora_from_state,
    merge_loras,
    parse_lora,
    read_lora,
)
from stableavatar.checkpoints.names import TRANSFORMER
from stableavatar.errors import CheckpointError, InputError
from stableavatar.journal import weights_fingerprint
from stableavatar.media.reading import read_frames
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.pipeline import AvatarPipeline
from stableavatar.training.lora import LoraSettings, save_lora
from toy import toy_pipeline, toy_transformer

RANK = 3
LAYERS = (
    "blocks.0.attn1.to_q",
    "blocks.1.attn1.to_out.0",
    "blocks.0.attn2.add_k_proj",
    "blocks.1.attn2.v_vocal",
    "blocks.1.ffn.net.0.proj",
    "blocks.0.ffn.net.2",
    "vocal_projector.blocks.0.attn2.to_k",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.image_embedder.ff.net.0.proj",
    "proj_out",
    "patch_embedding",
)
State = dict[str, torch.Tensor]


@pytest.fixture
def model() -> StableAvatarTransformer3DModel:
    return toy_transformer()


def random_lora(model: nn.Module, scale: float = 1.0) -> Lora:
    """Factors for some layers of every kind."""
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], RANK, *(1,) * (weight.ndim - 2), generator=generator) * 0.1
        layers[name] = LowRank(down, up, scale)
    return Lora(layers)


def published(name: str) -> str:
    found = TRANSFORMER.to_published(name)
    assert found is not None
    return found


def named(lora: Lora, down: str, up: str, name: Callable[[str], str]) -> State:
    state: State = {}
    for layer, it in lora.layers.items():
        state |= {f"{name(layer)}.{down}.weight": it.down, f"{name(layer)}.{up}.weight": it.up}
    return state


NAMINGS: dict[str, Callable[[Lora], State]] = {
    "diffusers": lambda lora: named(lora, "lora_A", "lora_B", lambda name: f"transformer.{name}"),
    "diffusers before PEFT": lambda lora: named(lora, "lora.down", "lora.up", lambda name: f"transformer.{name}"),
    "PEFT": lambda lora: named(lora, "lora_A", "lora_B", lambda name: f"base_model.model.{name}"),
    "PEFT with the adapter's name": lambda lora: named(lora, "lora_A.default", "lora_B.default", str),
    "published": lambda lora: named(lora, "lora_A", "lora_B", lambda name: f"diffusion_model.{published(name)}"),
    "published, down and up": lambda lora: named(
        lora, "lora_down", "lora_up", lambda name: f"diffusion_model.{published(name)}"
    ),
    "published without a prefix": lambda lora: named(lora, "lora_A.default", "lora_B.default", published),
    "kohya": lambda lora: named(
        lora, "lora_down", "lora_up", lambda name: f"lora_unet_{published(name).replace('.', '_')}"
    ),
    "kohya with our names": lambda lora: named(
        lora, "lora_down", "lora_up", lambda name: f"lora_unet__{name.replace('.', '_')}"
    ),
}  # fmt: skip


def merged(model: nn.Module, *loras: tuple[Lora, float]) -> State:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_loras(model, loras)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    return after


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def expected(model: nn.Module, lora: Lora, scale: float) -> State:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, layer in lora.layers.items():
        delta = torch.einsum("or,r...->o...", layer.up.flatten(1), layer.down)
        state[f"{name}.weight"] += scale * layer.scale * delta
    return state


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_read(model: StableAvatarTransformer3DModel, tmp_path: Path, naming: str) -> None:
    lora = random_lora(model)
    save_file(NAMINGS[naming](lora), tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", model)
    assert found.layers.keys() == lora.layers.keys()
    wanted = expected(model, lora, 0.8)
    for name, value in merged(model, (found, 0.8)).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-5)


class TestAlpha:
    @pytest.mark.parametrize(("prefix", "dot"), [("lora_unet_", "_"), ("diffusion_model.", ".")])
    def test_beside_the_factors(self, model: StableAvatarTransformer3DModel, prefix: str, dot: str) -> None:
        def name(layer: str) -> str:
            return prefix + published(layer).replace(".", dot)

        state = named(random_lora(model), "lora_down", "lora_up", name)
        state |= {f"{name(layer)}.alpha": torch.tensor(1.5) for layer in LAYERS}
        assert {it.scale for it in lora_from_state(state, model).layers.values()} == {0.5}

    def test_in_pefts_settings(self, model: StableAvatarTransformer3DModel, tmp_path: Path) -> None:
        save_file(NAMINGS["PEFT"](random_lora(model)), tmp_path / "adapter_model.safetensors")
        settings = {"lora_alpha": 6, "r": RANK, "alpha_pattern": {"attn1.to_q": 12}, "use_rslora": False}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        scales = {name: layer.scale for name, layer in read_lora(tmp_path, model).layers.items()}
        assert scales.pop("blocks.0.attn1.to_q") == 4
        assert set(scales.values()) == {2}
        published = {**settings, "alpha_pattern": {"blocks.0.self_attn.q": 12}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(published))
        assert read_lora(tmp_path, model).layers["blocks.0.attn1.to_q"].scale == 4
        assert read_lora(tmp_path, model).layers["blocks.1.attn1.to_out.0"].scale == 2
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
        stabilised = read_lora(tmp_path, model).layers["proj_out"].scale
        assert stabilised == pytest.approx(6 / RANK**0.5)

    def test_in_diffusers_metadata(self, model: StableAvatarTransformer3DModel, tmp_path: Path) -> None:
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": RANK})}
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(NAMINGS["diffusers"](random_lora(model)), file, metadata)
        assert {it.scale for it in read_lora(tmp_path, model).layers.values()} == {2}

    def test_of_a_training_acts_where_it_is_not_read(
        self, model: StableAvatarTransformer3DModel, tmp_path: Path
    ) -> None:
        down, up = torch.randn(RANK, 32), torch.randn(32, RANK)
        layer = "blocks.0.attn1.to_q"
        factors = {f"{layer}.lora_A.default.weight": down, f"{layer}.lora_B.default.weight": up}
        file = save_lora(factors, LoraSettings(rank=RANK, alpha=4.0 * RANK), tmp_path)
        for found in (read_lora(file, model), lora_from_state(load_file(file), model)):
            delta = found.delta(f"{layer}.weight", torch.device("cpu"))
            torch.testing.assert_close(delta, 4 * up @ down)


def distilled(model: nn.Module) -> State:
    """What the few-step LoRAs for Wan 2.1 hold: every layer, and differences of norms and biases."""
    state: State = {}
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        base, _, kind = published(name).rpartition(".")
        if "vocal" in name or kind == "modulation":
            continue
        if kind == "weight" and parameter.ndim > 1:
            state[f"diffusion_model.{base}.lora_down.weight"] = torch.randn(
                2, *parameter.shape[1:], generator=generator
            )
            state[f"diffusion_model.{base}.lora_up.weight"] = torch.randn(
                parameter.shape[0], 2, *(1,) * (parameter.ndim - 2), generator=generator
            )
            state[f"diffusion_model.{base}.alpha"] = torch.tensor(1.0)
        else:
            suffix = {"weight": "diff", "bias": "diff_b"}[kind]
            state[f"diffusion_model.{base}.{suffix}"] = torch.randn(parameter.shape, generator=generator)
    state["diffusion_model.blocks.1.diff_m"] = torch.ones(1, 6, 32)
    state["diffusion_model.head.modulation.diff"] = torch.ones(1, 2, 32)
    return state


def test_distillation_loras_change_every_parameter_they_name(model: StableAvatarTransformer3DModel) -> None:
    lora = lora_from_state(distilled(model), model)
    before, after = model.state_dict(), merged(model, (lora, 0.5))
    for name, value in before.items():
        stays = "vocal" in name or name == "blocks.0.scale_shift_table"
        assert torch.equal(after[name], value) == stays, name
    torch.testing.assert_close(after["scale_shift_table"], before["scale_shift_table"] + 0.5)
    norm = distilled(model)["diffusion_model.blocks.0.norm3.diff"]
    torch.testing.assert_close(after["blocks.0.norm2.weight"], before["blocks.0.norm2.weight"] + 0.5 * norm)


def test_a_patch_embedding_of_text_to_video_acts_on_the_noisy_latents(
    model: StableAvatarTransformer3DModel,
) -> None:
    down, up = torch.randn(2, 16, 1, 2, 2), torch.randn(32, 2, 1, 1, 1)
    state = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    before = model.patch_embedding.weight.detach().clone()
    after = merged(model, (lora_from_state(state, model), 1.0))["patch_embedding.weight"]
    assert torch.equal(after[:, 16:], before[:, 16:])
    assert not torch.equal(after[:, :16], before[:, :16])


def test_loras_add_up_and_a_scale_of_zero_changes_nothing(model: StableAvatarTransformer3DModel) -> None:
    one, other = random_lora(model), lora_from_state(distilled(model), model)
    assert equal(merged(model, (one, 0.0), (other, 0.0)), model.state_dict())
    both, other_alone = merged(model, (one, 0.3), (other, -0.2)), merged(model, (other, -0.2))
    for name, value in expected(model, one, 0.3).items():
        change = other_alone[name] - model.state_dict()[name]
        torch.testing.assert_close(both[name], value + change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 32)}, "only one of two factors"),
        (
            {
                "blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 48),
                "blocks.0.attn1.to_q.lora_B.weight": torch.zeros(48, 2),
            },
            r"\[48, 48\] in it, \[32, 32\] in this model",
        ),
        (
            {
                "blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 32),
                "blocks.0.attn1.to_q.lora_B.weight": torch.zeros(32, 3),
            },
            "of rank 3 and 2",
        ),
        ({"blocks.7.attn1.to_q.lora_A.weight": torch.zeros(2, 32)}, "have no place in this model"),
        ({"lora_unet_down_blocks_0_attn.lora_down.weight": torch.zeros(2, 32)}, "have no place"),
        ({"blocks.0.attn1.to_q.dora_scale": torch.zeros(2, 32)}, "DoRA"),
        ({"blocks.0.attn1.to_q.hada_w1_a": torch.zeros(2, 32)}, "LoHa"),
        ({"lora_te_text_model.lora_down.weight": torch.zeros(2, 32)}, "holds nothing for the video"),
    ],
)
def test_what_cannot_be_used_is_said(model: StableAvatarTransformer3DModel, state: State, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        lora_from_state(state, model)


def test_text_encoders_layers_are_left_out_and_counted(
    model: StableAvatarTransformer3DModel, caplog: pytest.LogCaptureFixture
) -> None:
    state = NAMINGS["kohya"](random_lora(model)) | {"lora_te_layer.lora_down.weight": torch.zeros(1)}
    with caplog.at_level(logging.WARNING, logger="stableavatar"):
        assert len(lora_from_state(state, model).layers) == len(LAYERS)
    assert "1 tensors for the text encoder" in caplog.text


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a:-1", "a", -1.0),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1.0),
        ("C:\\loras\\a.safetensors:2", "C:\\loras\\a.safetensors", 2.0),
        ("12:30/a.safetensors", "12:30/a.safetensors", 1.0),
        ("take:two.safetensors", "take:two.safetensors", 1.0),
    ],
)
def test_file_and_scale(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (Path(path), scale)


@pytest.mark.parametrize("text", ["a.safetensors:high", "a.safetensors:", "a.safetensors:nan", "a:inf"])
def test_no_scale(text: str) -> None:
    with pytest.raises(InputError, match="no scale"):
        parse_lora(text)


class TestPipeline:
    PICTURE = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)

    def frames(self, pipeline: AvatarPipeline) -> np.ndarray:
        speech = np.random.default_rng(2).uniform(-0.5, 0.5, 9 * 640).astype(np.float32)
        stream = pipeline.stream(self.PICTURE, speech, steps=2, seed=3, width=32, height=32)
        return np.stack(list(stream)).astype(int)

    def test_attached_it_is_what_it_is_merged(self) -> None:
        pipeline = toy_pipeline()
        base = self.frames(pipeline)
        lora = random_lora(pipeline.transformer, 2.0)
        state = NAMINGS["published"](lora)
        state |= {f"diffusion_model.{published(name)}.alpha": torch.tensor(2.0 * RANK) for name in LAYERS}
        state["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.ones(32)
        pipeline.load_lora_weights(state, adapter_name="mine")
        whole = self.frames(pipeline)
        pipeline.set_adapters(["mine"], [0.5])
        half = self.frames(pipeline)
        pipeline.unload_lora_weights()
        assert np.array_equal(self.frames(pipeline), base)
        assert np.abs(whole - base).max() > 2
        for scale, attached in ((1.0, whole), (0.5, half)):
            other = toy_pipeline()
            merge_loras(other.transformer, [(lora_from_state(state, other.transformer), scale)])
            assert np.abs(self.frames(other) - attached).max() <= 1

    def test_two_are_attached(self) -> None:
        pipeline = toy_pipeline()
        lora = random_lora(pipeline.transformer)
        for name in ("one", "other"):
            pipeline.load_lora_weights(lora.peft_state(), adapter_name=name)
        pipeline.set_adapters(["one", "other"], [0.25, 0.5])
        other = toy_pipeline()
        merge_loras(other.transformer, [(lora, 0.75)])
        assert np.abs(self.frames(other) - self.frames(pipeline)).max() <= 1

    def test_what_an_adapter_cannot_hold_is_refused(self) -> None:
        pipeline = toy_pipeline()
        with pytest.raises(CheckpointError, match="merge it"):
            pipeline.load_lora_weights(distilled(pipeline.transformer))
        with pytest.raises(InputError, match="subfolder"):
            pipeline.load_lora_weights("anywhere", subfolder="x")

    def test_from_pretrained_merges(self, tmp_path: Path) -> None:
        lora = random_lora(toy_transformer())
        save_file(NAMINGS["diffusers"](lora), tmp_path / "lora.safetensors")
        file = str(tmp_path / "lora.safetensors")
        wanted = expected(toy_transformer(), lora, 0.5)
        for given in (f"{file}:0.5", (file, 0.5), [(file, 0.2), f"{file}:0.3"]):
            pipeline = AvatarPipeline.from_pretrained(toy_model(), lora=given)
            for name, value in pipeline.transformer.state_dict().items():
                torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-5)
        assert pipeline.origin["lora"] == [f"{file}:0.2", f"{file}:0.3"]


def test_a_video_says_what_was_done_by_hand(tmp_path: Path) -> None:
    """No command repeats it: LoRAs that were attached in a program, and starting latents."""
    pipeline = AvatarPipeline.from_pretrained(toy_model())
    pipeline.load_lora_weights(NAMINGS["diffusers"](random_lora(toy_transformer())), "person")
    face = np.zeros((32, 32, 3), np.uint8)
    options = {"steps": 1, "width": 32, "height": 32, "duration": 0.2, "seed": 1}
    pipeline.generate(face, None, tmp_path / "a.mp4", **options)
    assert stored_settings(tmp_path / "a.mp4")["by_hand"] == ["LoRA person was attached"]
    shown = run("info", tmp_path / "a.mp4")
    assert "It repeats all but this: LoRA person was attached." in shown.stdout
    pipeline.unload_lora_weights()
    latents = torch.zeros(pipeline.vae.config.z_dim, 5, 4, 4)
    pipeline.generate(face, None, tmp_path / "b.mp4", latents=latents, **options)
    assert stored_settings(tmp_path / "b.mp4")["by_hand"] == ["the starting latents were given"]
    pipeline.generate(face, None, tmp_path / "c.mp4", **options)
    assert "by_hand" not in stored_settings(tmp_path / "c.mp4")


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        file = tmp_path / "lora.safetensors"
        save_file(NAMINGS["kohya"](random_lora(toy_transformer(), 1.0)), file)
        return portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav"), file

    def test_generate(self, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
        picture, recording, lora = files

        def made(name: str, *arguments: str) -> np.ndarray:
            output = tmp_path / f"{name}.mp4"
            done = run(
                "generate",
                picture,
                recording,
                "-o",
                output,
                "--model",
                toy_model(),
                "--seed",
                "1",
                *QUICK,
                *arguments,
            )
            assert done.exit_code == 0, done.output
            return np.stack(list(read_frames(output))).astype(int)

        base = made("base")
        assert np.array_equal(made("zero", "--lora", f"{lora}:0"), base)
        whole = made("whole", "--lora", str(lora))
        assert np.abs(whole - base).max() > 2
        assert np.array_equal(made("twice", "--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5"), whole)
        said = run("info", tmp_path / "twice.mp4").output
        assert f"--lora {lora}:0.5 --lora {lora}:0.5" in said

    def test_errors(self, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
        picture, recording, lora = files
        lora.write_bytes(lora.read_bytes()[:300])
        for given, what in (
            (tmp_path / "none.safetensors", "there is no such file"),
            (tmp_path, "holds none of"),
            (lora, "download it again"),
            (f"{lora}:loud", "no scale"),
        ):
            done = run(
                "generate",
                picture,
                recording,
                "-o",
                tmp_path / "out.mp4",
                "--model",
                toy_model(),
                "--lora",
                given,
            )
            assert done.exit_code == 2
            assert what in done.output.replace("\n", " ")


def test_how_strongly_adapters_act_is_part_of_what_a_run_is_made_of() -> None:
    transformer = toy_transformer()
    plain = weights_fingerprint({"transformer": transformer})
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "a")
    seen = {plain, weights_fingerprint({"transformer": transformer})}
    transformer.set_adapters("a", 0.3)
    seen.add(weights_fingerprint({"transformer": transformer}))
    transformer.disable_lora()
    seen.add(weights_fingerprint({"transformer": transformer}))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "name", ["blocks.0.modulation.lora_{}.weight", "vocal_projector.proj_model.proj.lora_{}.weight"]
)
def test_what_is_no_layer_or_has_no_bias_is_named(name: str) -> None:
    state = {name.format("down"): torch.zeros(1, 4), name.format("up"): torch.zeros(4, 1)}
    if "proj_model" in name:
        model = toy_transformer()
        shape = dict(model.named_parameters())["vocal_projector.proj_model.proj.weight"].shape
        state = {name.format("A"): torch.zeros(1, shape[1]), name.format("B"): torch.zeros(shape[0], 1)}
        state[name.format("B").replace("weight", "bias")] = torch.zeros(shape[0])
    with pytest.raises(CheckpointError, match="place in this model"):
        lora_from_state(state, toy_transformer())
