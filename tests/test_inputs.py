"""Portrait and speech in every form, and what is refused before anything is written."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import QUICK, portrait, run, speech, toy_model
from media_files import write_wav
from stableavatar.errors import InputError
from stableavatar.inputs import _cut
from stableavatar.options import GenerateOptions, OutputOptions
from stableavatar.pipeline import AvatarPipeline
from toy import toy_pipeline

PICTURE = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
SAMPLES = (np.random.default_rng(0).standard_normal(5 * 640) * 0.1).astype(np.float32)
ONE_STEP = {"steps": 1, "seed": 3, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return toy_pipeline()


class TestOutputThatIsAnInput:
    """A recording or a portrait is not written over, by whichever name it is called."""

    @pytest.mark.parametrize("live", [True, False])
    @pytest.mark.parametrize("role", ["portrait", "recording"])
    @pytest.mark.parametrize("name", ["same.mp4", "link.mp4", "same.unfinished.mp4"])
    def test_generate(
        self, pipeline: AvatarPipeline, tmp_path: Path, live: bool, role: str, name: str
    ) -> None:
        given = (speech if role == "recording" else portrait)(tmp_path / "given.png")
        source = given.rename(tmp_path / ("same.unfinished.mp4" if "unfinished" in name else "same.mp4"))
        (tmp_path / "link.mp4").symlink_to(source)
        output = tmp_path / ("link.mp4" if name == "link.mp4" else "same.mp4")
        before = source.read_bytes()
        picture, said = (PICTURE, source) if role == "recording" else (str(source), SAMPLES)
        for resume in (None, False):
            with pytest.raises(InputError, match=f"is the {role} itself"):
                pipeline.generate(
                    picture, said, output, output_options=OutputOptions(live=live), resume=resume, **ONE_STEP
                )
        assert source.read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {source.name, "link.mp4"}

    @pytest.mark.parametrize("more", [[], ["--live"]])
    @pytest.mark.parametrize("role", ["portrait", "recording"])
    def test_the_command(self, tmp_path: Path, more: list[str], role: str) -> None:
        picture, recording = portrait(tmp_path / "p.png"), speech(tmp_path / "s.wav")
        source = (picture if role == "portrait" else recording).rename(tmp_path / "it.mp4")
        before = source.read_bytes()
        picture, recording = (source, recording) if role == "portrait" else (picture, source)
        model = tmp_path / "no model"  # it is not looked at
        result = run(
            *["generate", picture, recording, "-o", source, "--overwrite", "--model", model], *QUICK, *more
        )
        assert result.exit_code == 2
        assert f"is the {role} itself" in result.stderr
        assert source.read_bytes() == before

    def test_another_file_of_the_same_folder_is_none(self, pipeline: AvatarPipeline, tmp_path: Path) -> None:
        made = pipeline.generate(PICTURE, speech(tmp_path / "s.wav", 0.1), tmp_path / "out.mp4", **ONE_STEP)
        assert made.path is not None
        assert made.path.exists()


class TestPortrait:
    @pytest.mark.parametrize("given", [None, b"bytes", [1, 2], 3])
    def test_what_is_none(self, pipeline: AvatarPipeline, given: object) -> None:
        with pytest.raises(InputError, match=r"a portrait cannot be .*: give a file"):
            pipeline.stream(given, SAMPLES)


class TestSpeech:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_tensor_is_an_array(self, pipeline: AvatarPipeline, tmp_path: Path, dtype: torch.dtype) -> None:
        tensor = torch.from_numpy(SAMPLES).to(dtype).requires_grad_()
        array, made = (
            np.stack(list(pipeline.stream(PICTURE, given, **ONE_STEP))) for given in (SAMPLES, tensor)
        )
        assert np.array_equal(array, made)
        assert pipeline.stream(PICTURE, tensor).frame_count == 5
        latents = pipeline.sample_latents(PICTURE, tensor, **ONE_STEP)
        assert latents.frame_count == 5
        video = pipeline.generate(PICTURE, tensor, tmp_path / "out.mp4", **ONE_STEP)
        assert video.frame_count == 5

    @pytest.mark.parametrize(
        ("given", "what"),
        [
            (3, "of type int: give"),
            ([0.0, 0.1], "of type list of numbers: give"),
            ([np.float32(0.1)], "of type list of numbers: give"),
            (b"RIFF", "of type bytes: give"),
        ],
    )
    def test_what_is_none(self, pipeline: AvatarPipeline, given: object, what: str) -> None:
        with pytest.raises(InputError, match=f"speech cannot be {what}"):
            pipeline.stream(PICTURE, given)

    @pytest.mark.parametrize("kind", [list, deque])
    def test_a_list_of_blocks_arrives(self, pipeline: AvatarPipeline, kind: Any) -> None:
        blocks = kind([SAMPLES[:1000], torch.from_numpy(SAMPLES[1000:])])
        assert len(list(pipeline.stream(PICTURE, blocks, **ONE_STEP))) == 5

    @pytest.mark.parametrize(("samples", "enough"), [(300, False), (500, False), (639, False), (640, True)])
    def test_less_than_a_frame_is_refused_however_it_is_read(
        self, pipeline: AvatarPipeline, tmp_path: Path, samples: int, enough: bool
    ) -> None:
        file = write_wav(tmp_path / "speech.wav", SAMPLES[:samples], 16000)
        ways = (
            lambda: list(pipeline.stream(PICTURE, file, order="causal", **ONE_STEP)),
            lambda: list(pipeline.stream(PICTURE, [SAMPLES[:samples]], **ONE_STEP)),
            lambda: list(pipeline.stream(PICTURE, file, **ONE_STEP)),
            lambda: pipeline.generate(PICTURE, file, tmp_path / "out.mp4", order="causal", **ONE_STEP),
        )
        for way in ways:
            if enough:
                way()
            else:
                with pytest.raises(InputError, match="shorter than a frame"):
                    way()

    def test_lengths_are_said_as_they_are(self, pipeline: AvatarPipeline) -> None:
        speech = np.pad(SAMPLES, (0, 640))[:639]
        for given in (speech, [speech]):
            with pytest.raises(InputError, match=r"\(0\.0399375 s\) is shorter than a frame \(0\.04 s\)"):
                list(pipeline.stream(PICTURE, given, **ONE_STEP))

    def test_a_cut_is_exact(self, pipeline: AvatarPipeline) -> None:
        half = 0.00015625  # as a float a little more than 2.5 samples; times 16000 in floats exactly that
        assert np.array_equal(_cut(SAMPLES, GenerateOptions(start=half)), SAMPLES[3:])
        assert np.array_equal(_cut(SAMPLES, GenerateOptions(duration=half)), SAMPLES[:3])
        for times in ({"start": 1e7}, {"start": 1e7, "duration": 1e7}):
            with pytest.raises(InputError, match="lies after the speech's end"):
                pipeline.stream(PICTURE, SAMPLES, **times)
        assert pipeline.stream(PICTURE, None, duration=1e7, **ONE_STEP).frame_count == 250_000_000


def test_the_command_refuses_what_is_no_character(tmp_path: Path) -> None:
    files = portrait(tmp_path / "p.png"), speech(tmp_path / "s.wav")
    output = tmp_path / "out.mp4"
    for option in ("--prompt", "--negative-prompt"):
        result = run("generate", *files, "-o", output, "--model", toy_model(), *QUICK, option, "caf\udce9")
        assert result.exit_code == 2
        assert "has what is no character" in result.stderr
    assert not output.exists()
