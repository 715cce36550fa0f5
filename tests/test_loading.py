"""What loading is given, which dtype the parts have, and what a pipeline made of parts knows."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import stableavatar
from hub_server import Hub, hub_for
from stableavatar import pipeline as module
from stableavatar.checkpoints import hub
from stableavatar.config import SIZES, is_published_size
from stableavatar.errors import CheckpointError, InputError
from stableavatar.pipeline import AvatarPipeline
from toy import toy_folder, toy_pipeline

PICTURE = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
SAMPLES = (np.random.default_rng(0).standard_normal(5 * 640) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_for(monkeypatch, tmp_path / "cache") as server:
        yield server


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "what"),
        [("lore", "did you mean lora"), ("cache_folder", "did you mean"), ("text_encode", "text_encoder"),
         ("zzz", "argument of loading zzz$")],
    )  # fmt: skip
    def test_one_that_is_not_there(self, folder: Path, name: str, what: str) -> None:
        for load in (stableavatar.load, AvatarPipeline.from_pretrained):
            with pytest.raises(InputError, match=what):
                load(folder, **{name: "x"})

    def test_parts_and_diffusers_arguments_are_taken(self, folder: Path) -> None:
        given = toy_pipeline().vae
        made = AvatarPipeline.from_pretrained(
            folder, vae=given, low_cpu_mem_usage=True, use_safetensors=True, local_files_only=True
        )
        assert made.vae is given

    def test_the_former_name_of_dtype(self, folder: Path) -> None:
        for made in (
            AvatarPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16),
            stableavatar.load(folder, device="cpu", torch_dtype=torch.bfloat16),
        ):
            assert made.transformer.dtype == torch.bfloat16
        with pytest.raises(InputError, match="one of them, not both"):
            AvatarPipeline.from_pretrained(folder, dtype=torch.float32, torch_dtype=torch.bfloat16)
        assert AvatarPipeline.from_pretrained(folder).transformer.dtype == torch.float32


class TestHub:
    def test_local_files_only_asks_nobody(self, server: Hub, folder: Path) -> None:
        server.repositories["someone/toy"] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        with pytest.raises(CheckpointError, match="no complete copy here"):
            AvatarPipeline.from_pretrained("someone/toy", local_files_only=True)
        assert server.fetched == []
        assert server.tokens == set()
        AvatarPipeline.from_pretrained("someone/toy")
        server.tokens.clear()
        made = AvatarPipeline.from_pretrained("someone/toy", local_files_only=True)
        assert made.origin == {"model": "someone/toy"}
        assert server.tokens == set()

    def test_what_published_weights_cannot_have_is_refused_before_they_are_fetched(self, server: Hub) -> None:
        with pytest.raises(InputError, match="low_cpu_mem_usage cannot be used with the published"):
            AvatarPipeline.from_pretrained(hub.PUBLISHED_REPOSITORY, low_cpu_mem_usage=True)
        assert server.fetched == []


class TestGenerate:
    def test_options_are_looked_at_before_the_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: object, **__: object) -> None:
            raise AssertionError("loaded")

        monkeypatch.setattr(module, "load", load)
        with pytest.raises(InputError, match="did you mean steps"):
            stableavatar.generate(PICTURE, SAMPLES, tmp_path / "out.mp4", stepps=3)
        with pytest.raises(InputError, match="steps 0"):
            stableavatar.generate(PICTURE, SAMPLES, tmp_path / "out.mp4", steps=0, resume=False)

    def test_the_size_reaches_loading(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="model size choose"):
            stableavatar.generate(PICTURE, SAMPLES, tmp_path / "out.mp4", model=folder, size="14b")
        made = stableavatar.generate(
            PICTURE,
            SAMPLES,
            tmp_path / "out.mp4",
            model=folder,
            device="cpu",
            steps=1,
            progress=lambda _: None,
        )
        assert made.frame_count == 5


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_to_leaves_in_float32_what_loading_does(self, folder: Path, dtype: torch.dtype) -> None:
        loaded = AvatarPipeline.from_pretrained(folder, dtype=dtype)
        for moved in (
            AvatarPipeline.from_pretrained(folder).to(dtype),
            AvatarPipeline.from_pretrained(folder).to("cpu", dtype),
            AvatarPipeline.from_pretrained(folder).to(device="cpu", dtype=dtype),
        ):
            assert isinstance(moved, AvatarPipeline)
            for part in ("transformer", "vae", "text_encoder", "image_encoder", "speech_encoder"):
                expected = getattr(loaded, part).state_dict()
                for name, value in getattr(moved, part).state_dict().items():
                    assert value.dtype == expected[name].dtype, (part, name)
                    assert torch.equal(value, expected[name]), (part, name)
        assert moved.transformer.condition_embedder.time_proj.weight.dtype == torch.float32
        assert moved.speech_encoder.dtype == torch.float32
        assert len(list(moved.to(torch.bfloat16).stream(PICTURE, SAMPLES, steps=1))) == 5

    def test_a_device_alone_changes_no_dtype(self, folder: Path) -> None:
        moved = AvatarPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cpu")
        assert moved.transformer.dtype == torch.bfloat16
        assert moved.to(torch.float32).transformer.dtype == torch.float32


class TestParts:
    def test_settings_that_are_lost_are_said(self, caplog: pytest.LogCaptureFixture) -> None:
        toy = toy_pipeline()
        assert "sampling_defaults" not in caplog.text
        assert AvatarPipeline.from_pipe(toy).defaults.window == 17
        assert "sampling_defaults" not in caplog.text
        with caplog.at_level(logging.WARNING):
            assert AvatarPipeline(**toy.components).defaults.window == 81
        assert "no sampling_defaults are given" in caplog.text

    def test_published_sizes_are_known(self) -> None:
        assert all(is_published_size(size.transformer) for size in SIZES.values())
        assert not is_published_size(toy_pipeline().transformer.config)


class TestCall:
    def test_it_gives_the_frames_of_the_stream(self) -> None:
        toy, options = toy_pipeline(), {"steps": 1, "seed": 3, "width": 32, "height": 32}
        made = toy(PICTURE, SAMPLES, **options)
        streamed = toy.stream(PICTURE, SAMPLES, **options)
        assert np.array_equal(np.stack([np.asarray(it) for it in made.frames[0]]), np.stack(list(streamed)))
        assert len(made.frames) == 1
        assert made.frames[0][0].size == (32, 32)
        assert (made.frame_rate, made.options) == (streamed.frame_rate, streamed.options)
        assert made.to_tuple()[0] is made.frames
