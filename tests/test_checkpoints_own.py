"""A folder of this project's own is checked before it is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from stableavatar.checkpoints.defaults import read_defaults, sampling_defaults
from stableavatar.checkpoints.layout import MODEL_INDEX, OWN_PARTS
from stableavatar.checkpoints.own import check_own
from stableavatar.errors import CheckpointError, InputError
from stableavatar.options import SamplingDefaults
from stableavatar.pipeline import AvatarPipeline
from toy import toy_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "toy"))


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_whole_folder_passes(whole: Path) -> None:
    check_own(whole)


@pytest.mark.parametrize("part", OWN_PARTS)
def test_every_part_is_needed(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"its {part.replace('_', ' ')}"):
        check_own(folder)
    check_own(folder, [other for other in OWN_PARTS if other != part])


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("transformer", {"ffn_dim": 128}),
        ("transformer", {"num_layers": 1}),
        ("vae", {"base_dim": 16}),
        ("text_encoder", {"d_ff": 64}),
        ("image_encoder", {"num_hidden_layers": 3}),
        ("speech_encoder", {"hidden_size": 48}),
    ],
)
def test_tensors_must_be_those_of_the_settings(folder: Path, part: str, settings: dict[str, int]) -> None:
    change(folder / part / "config.json", **settings)
    with pytest.raises(CheckpointError, match=rf"{part}: is not a checkpoint of this model"):
        AvatarPipeline.from_pretrained(folder)
    change(folder / part / "config.json", quantization_config={"quant_method": "any"})
    check_own(folder)  # quantised tensors have other names: left to diffusers


def test_an_index_of_another_pipeline(folder: Path) -> None:
    (folder / MODEL_INDEX).write_text(
        '{"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}'
    )
    with pytest.raises(CheckpointError, match="its transformer"):
        check_own(folder)


@pytest.mark.parametrize("option", [{"variant": "square"}, {"size": "14b"}])
def test_one_model_has_no_variants(whole: Path, option: dict[str, str]) -> None:
    with pytest.raises(InputError, match="is one model"):
        AvatarPipeline.from_pretrained(whole, **option)


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        (
            "text_encoder/config.json",
            {"d_model": "wide"},
            r"text_encoder/config\.json: no model can be built",
        ),
        ("text_encoder/config.json", {"num_heads": 0}, r"text_encoder"),
        ("image_encoder/config.json", {"num_attention_heads": 0}, r"image_encoder/config\.json: no model"),
        ("speech_encoder/config.json", {"num_attention_heads": 0}, r"speech_encoder/config\.json: no model"),
        ("speech_encoder/config.json", {"conv_dim": None}, r"speech_encoder/config\.json: no model"),
        ("transformer/config.json", {"num_attention_heads": 0}, r"transformer"),
        ("transformer/config.json", {"num_attention_heads": "two"}, r"transformer/config\.json: no model"),
        ("transformer/config.json", {"patch_size": 2}, r"transformer/config\.json: no model"),
        ("vae/config.json", {"dim_mult": 3}, r"vae/config\.json: no model"),
        ("vae/config.json", {"latents_mean": [0.5]}, r"vae/config\.json: latents_mean has 1 values"),
        ("vae/config.json", {"latents_std": 1.0}, r"vae/config\.json: latents_std has no list of values"),
        ("vae/config.json", {"latents_std": ["a"] * 16}, r"vae/config\.json: latents_std .*no numbers"),
        ("vae/config.json", {"latents_std": [0.0] * 16}, r"vae/config\.json: latents_std has a zero"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "describes a DDIMScheduler"),
        (
            "scheduler/scheduler_config.json",
            {"shift": "far"},
            r"scheduler_config\.json: no model can be built",
        ),
        (MODEL_INDEX, {"vae": ["diffusers", "AutoencoderKLNew"]}, r"the vae is .*AutoencoderKLNew"),
        (MODEL_INDEX, {"vae": ["os", "AutoencoderKLWan"]}, r"not AutoencoderKLWan of diffusers"),
        (MODEL_INDEX, {"image_encoder": None}, r"the image encoder is None, not CLIPVisionModel"),
        (MODEL_INDEX, {"scheduler": ["diffusers", "DDIMScheduler"]}, r"not FlowMatchEulerDiscreteScheduler"),
        (
            MODEL_INDEX,
            {"tokenizer": ["transformers", "UMT5EncoderModel"]},
            r"not a tokenizer of transformers",
        ),
        (MODEL_INDEX, {"tokenizer": ["transformers", "NoSuchTokenizer"]}, r"not a tokenizer of transformers"),
        (MODEL_INDEX, {"sampling_defaults": {"speed": 3}}, r"model_index\.json: .*unknown setting speed"),
        (MODEL_INDEX, {"sampling_defaults": []}, r"model_index\.json: sampling_defaults is no object"),
        (MODEL_INDEX, {"sampling_defaults": {"steps": "50"}}, r"model_index\.json: .*steps = '50'"),
        (MODEL_INDEX, {"sampling_defaults": {"window": 80}}, r"model_index\.json: .*not 4n\+1"),
        (MODEL_INDEX, {"sampling_defaults": {"sizes": {}}}, r"model_index\.json: .*no sizes"),
        (
            MODEL_INDEX,
            {"sampling_defaults": {"sizes": {"square": 512}}},
            r"model_index\.json: nothing can be sampled",
        ),
    ],
)
def test_damaged_settings_are_named(folder: Path, file: str, settings: dict[str, object], words: str) -> None:
    change(folder / file, **settings)
    with pytest.raises(CheckpointError, match=words) as caught:
        AvatarPipeline.from_pretrained(folder)
    if "sampling_defaults" in settings:
        with pytest.raises(CheckpointError, match=words):
            read_defaults(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_read_without_the_model(folder: Path, tmp_path: Path) -> None:
    assert read_defaults(folder) == AvatarPipeline.from_pretrained(folder).defaults
    assert read_defaults("tiny").steps == 10
    for source in (tmp_path, tmp_path / "nothing"):
        assert list(read_defaults(source).sizes) == ["square"]
        assert list(read_defaults(source, variant="rec-vec").sizes) == ["tall", "wide"]
        assert read_defaults(source, size="14b") == SamplingDefaults(**sampling_defaults("square", "14b"))


def test_a_tokenizer_that_is_cut_off(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read as JSON"):
        check_own(folder)


def test_parts_may_be_left_out(folder: Path) -> None:
    parts = ("vae", "speech_encoder", "image_encoder")
    made = AvatarPipeline.from_pretrained(folder, **dict.fromkeys(parts))
    assert [getattr(made, name) for name in parts] == [None] * 3
