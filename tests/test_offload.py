"""Parts that lie in main memory, or on disk, until they compute: the same frames."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from PIL import Image

import stableavatar
from command_line import run
from media_files import tone
from stableavatar.choices import Offload
from stableavatar.errors import InputError
from stableavatar.jobs.worker import ModelChoice
from stableavatar.media.reading import read_frames
from stableavatar.media.wav import write_wav
from stableavatar.pipeline import AvatarPipeline
from stableavatar.placement.offload import put_on
from toy import toy_folder, toy_pipeline

PORTRAIT = np.full((32, 32, 3), 120, np.uint8)
SPEECH = tone(1.3, 16_000)
CPU = torch.device("cpu")
MODULES = {"transformer", "vae", "speech_encoder", "text_encoder", "image_encoder"}


def frames_of(pipeline: AvatarPipeline, **options: Any) -> np.ndarray:
    return np.stack(list(pipeline.stream(PORTRAIT, SPEECH, prompt="a", seed=3, **options)))


def onto_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What is off the device has no values at all here: a layer that nobody brings gives noise."""
    enable: Callable[..., None] = AvatarPipeline.enable_group_offload

    def enable_to_disk(pipeline: AvatarPipeline, **options: Any) -> None:
        # diffusers writes a table that two layers share twice, the second time when its values are gone.
        encoder = pipeline.text_encoder.encoder
        encoder.embed_tokens = copy.deepcopy(encoder.embed_tokens)
        enable(pipeline, **options, offload_to_disk_path=str(folder))

    monkeypatch.setattr(AvatarPipeline, "enable_group_offload", enable_to_disk)


@pytest.mark.parametrize(
    ("offload", "away"), [("encoders", {"text_encoder", "image_encoder"}), ("layers", MODULES)]
)
@pytest.mark.parametrize("options", [{}, {"order": "causal", "step_cache": 0.1, "decoder_tiling": True}])
def test_frames_are_those_of_a_pipeline_on_the_device(
    offload: Offload,
    away: set[str],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = frames_of(toy_pipeline(), **options)
    onto_disk(monkeypatch, tmp_path)
    pipeline = put_on(toy_pipeline(), CPU, offload)
    assert {name for name in MODULES if _is_group_offload_enabled(getattr(pipeline, name))} == away
    for _ in range(2):
        assert np.array_equal(frames_of(pipeline, **options), expected)


def test_the_command_and_python_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, portrait = toy_folder(tmp_path / "toy"), tmp_path / "a.png"
    Image.fromarray(PORTRAIT).save(portrait)
    speech = tmp_path / "a.wav"
    write_wav(speech, [SPEECH], 16_000, 1)
    stableavatar.generate(portrait, speech, tmp_path / "plain.mp4", model=model, seed=3)
    enabled: list[str] = []
    enable: Callable[..., None] = AvatarPipeline.enable_group_offload

    def note(pipeline: AvatarPipeline, **options: Any) -> None:
        enabled.append(options["offload_type"])
        enable(pipeline, **options)

    monkeypatch.setattr(AvatarPipeline, "enable_group_offload", note)
    stableavatar.generate(portrait, speech, tmp_path / "python.mp4", model=model, seed=3, offload="encoders")
    done = run(
        "generate", portrait, speech, "-o", tmp_path / "command.mp4", "--model", model,
        "--seed", "3", "--offload", "layers",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(enabled) == 2
    plain, python, command = (
        list(read_frames(tmp_path / f"{name}.mp4")) for name in ("plain", "python", "command")
    )
    assert np.array_equal(plain, python)
    assert np.array_equal(plain, command)


def test_what_cannot_be_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose none, encoders, layers"):
        stableavatar.load("nowhere", offload="everything")  # type: ignore[arg-type]
    model = ModelChoice("nowhere", offload="layers", sampling={"decoder_device": "cpu"})
    with pytest.raises(InputError, match="cannot be used together"):
        model.load()
    for name in ("a.png", "a.wav"):
        (tmp_path / name).touch()
    Image.fromarray(PORTRAIT).save(tmp_path / "a.png")
    write_wav(tmp_path / "a.wav", [SPEECH], 16_000, 1)
    done = run(
        "generate", tmp_path / "a.png", tmp_path / "a.wav", "-o", tmp_path / "a.mp4", "--model", "nowhere",
        "--offload", "layers", "--decoder-device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "cannot be used together" in done.output


def test_a_worker_offloads(tmp_path: Path) -> None:
    pipeline = ModelChoice(str(toy_folder(tmp_path / "toy")), offload="encoders").load()
    assert _is_group_offload_enabled(pipeline.text_encoder)
    assert not _is_group_offload_enabled(pipeline.transformer)


def test_hooks_that_hand_on_copies_keep_the_context() -> None:
    """accelerate's name of the CPU is cpu:0, which is another device to it: each call gets copies."""
    pipeline = toy_pipeline()
    expected = frames_of(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(frames_of(pipeline), expected)
