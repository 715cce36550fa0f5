import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import stableavatar
from stableavatar.conditioning.speech import WindowSpeech
from stableavatar.errors import InputError
from stableavatar.generation import Progress
from stableavatar.media.image import read_picture
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.media.segments import SegmentWriter
from stableavatar.options import GenerateOptions, OutputOptions, SamplingDefaults, Settings
from stableavatar.pipeline import AvatarPipeline
from stableavatar.sampling.engine import SamplingError
from stableavatar.sampling.windows import Window
from stableavatar.writing import GeneratedVideo
from toy import toy_pipeline

RATE = 16000


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    pipeline = toy_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def portrait(width: int = 48, height: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frames(pipeline: AvatarPipeline, samples: np.ndarray | None, **options: object) -> np.ndarray:
    settings = {"steps": 1, "seed": 3, "width": 32, "height": 32, **options}
    return np.stack(list(pipeline.stream(portrait(), samples, **settings)))


class TestLength:
    @pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 18, 19, 20, 21, 30])
    def test_as_many_frames_as_the_speech_has(self, pipeline: AvatarPipeline, count: int) -> None:
        """Faults 3 and 18: 18 to 20 frames are to this model what 82 to 84 are to the published one."""
        made = frames(pipeline, noise(count * 640 + 200))
        assert made.shape == (count, 32, 32, 3)
        assert made.dtype == np.uint8

    def test_a_stream_that_is_not_used_gives_its_recording_up(self, pipeline: AvatarPipeline) -> None:
        stream = pipeline.stream(portrait(), noise(640), steps=1)
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)

    def test_the_nearest_frame(self, pipeline: AvatarPipeline) -> None:
        stream = pipeline.stream(portrait(), noise(5 * 640 + 400), steps=1)
        assert stream.frame_count == 6

    def test_frames_at_30_a_second_do_not_drift(self, pipeline: AvatarPipeline) -> None:
        """Fault 7: with 533 samples a frame, 10 minutes would be a few frames too long."""
        stream = pipeline.stream(portrait(), np.zeros(600 * RATE, dtype=np.float32), steps=1, fps=30)
        assert stream.frame_count == 18000

    @pytest.mark.parametrize("samples", [1, 300, 639])
    def test_shorter_than_a_frame(self, pipeline: AvatarPipeline, samples: int) -> None:
        with pytest.raises(InputError, match="shorter than a frame"):
            pipeline.stream(portrait(), noise(samples))
        with pytest.raises(InputError, match="shorter than a frame"):
            pipeline.stream(portrait(), None, duration=samples / RATE)

    def test_silence_follows_a_recording_that_is_shorter_than_the_duration(
        self, pipeline: AvatarPipeline, tmp_path: Path
    ) -> None:
        made = pipeline.generate(portrait(), noise(5 * 640), tmp_path / "out.mp4", steps=1, duration=0.4)
        assert probe(made.path).frames == 10
        assert probe(made.path).sound_seconds == pytest.approx(0.4, abs=0.001)

    def test_silence_follows_even_a_recording_that_is_shorter_than_a_frame(
        self, pipeline: AvatarPipeline
    ) -> None:
        loud = {"duration": 0.4, "speech_normalisation": "recording"}
        assert len(frames(pipeline, noise(300), **loud)) == 10
        assert len(frames(pipeline, noise(300), duration=0.4, order="causal")) == 10

    def test_duration_and_start_cut_the_recording(self, pipeline: AvatarPipeline) -> None:
        samples = noise(3 * RATE)
        cut = frames(pipeline, samples, start=1.0, duration=0.4)
        assert len(cut) == 10
        assert np.array_equal(cut, frames(pipeline, samples[RATE : RATE + 6400]))

    def test_without_speech_a_duration_is_needed(self, pipeline: AvatarPipeline) -> None:
        assert len(frames(pipeline, None, duration=0.2)) == 5
        with pytest.raises(InputError, match="duration"):
            pipeline.stream(portrait(), None)
        with pytest.raises(InputError, match="start 5"):
            pipeline.stream(portrait(), None, duration=0.2, start=5.0)
        with pytest.raises(InputError, match="lies after the speech's end"):
            pipeline.stream(portrait(), np.zeros(16000, np.float32), duration=0.2, start=5.0)

    @pytest.mark.parametrize("name", ["fps", "order", "prompt", "steps"])
    def test_nothing_is_no_value(self, pipeline: AvatarPipeline, name: str) -> None:
        if name == "steps":  # the model's own
            assert len(frames(pipeline, noise(640), steps=None)) == 1
        else:
            with pytest.raises(InputError, match=f"{name} None"):
                pipeline.stream(portrait(), noise(640), **{name: None})

    def test_upstream_speech_may_end_long_before_the_video(self, pipeline: AvatarPipeline) -> None:
        assert len(frames(pipeline, noise(5 * 640), compat="upstream", duration=2.0)) == 49

    def test_the_last_window_is_full(self, pipeline: AvatarPipeline) -> None:
        """Fault 2: its speech is not stretched and nothing is padded with zeros that are attended to."""
        seen: list[tuple[int, object]] = []
        hook = pipeline.transformer.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append((args[0].shape[2], kwargs["padded_latent_frames"])),
            with_kwargs=True,
        )
        frames(pipeline, noise(22 * 640))
        frames(pipeline, noise(22 * 640), compat="upstream")
        hook.remove()
        assert seen == [(5, None), (5, None), (5, None), (3, 5)]


class TestResult:
    def test_the_same_seed_gives_the_same_video(self, pipeline: AvatarPipeline) -> None:
        samples = noise(20 * 640)
        first, again, other = (frames(pipeline, samples, seed=seed) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_one_minute_and_one_hour_begin_alike(self, pipeline: AvatarPipeline) -> None:
        """With n steps, what lies more than n windows before the end does not know the end."""
        samples = noise(90 * 640)
        short, long = (frames(pipeline, part, steps=2) for part in (samples[: 65 * 640], samples))
        assert np.array_equal(short[:25], long[:25])
        assert not np.array_equal(short[40:65], long[40:65])

    def test_given_latents_are_the_noise(self, pipeline: AvatarPipeline) -> None:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(16, 5, 4, 4, generator=generator)
        first, again = (frames(pipeline, noise(17 * 640), latents=latents, seed=seed) for seed in (1, 2))
        assert np.array_equal(first, again)
        with pytest.raises(InputError, match="16, 5, 4, 4"):
            frames(pipeline, noise(17 * 640), latents=latents[:, :3])

    @pytest.mark.parametrize(
        "options",
        [
            {"prompt": "someone sings"},
            {"negative_prompt": "nothing"},
            {"text_scale": 4.0},
            {"audio_scale": 4.0},
            {"guidance": "audio-native"},
            {"steps": 2},
            {"overlap": 3},
            {"window": 21},
            {"no_audio": "input"},
            {"compat": "upstream"},
            {"fit": "pad"},
            {"fps": 24.0},
            {"start": 0.1},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_every_option_changes_the_video(
        self, pipeline: AvatarPipeline, options: dict[str, object]
    ) -> None:
        """Fault 15: no option is accepted and then not used (size, seed and duration: see above)."""
        samples = noise(22 * 640) * np.linspace(0.2, 1, 22 * 640, dtype=np.float32)
        before, after = frames(pipeline, samples), frames(pipeline, samples, **options)
        common = min(len(before), len(after))
        assert not np.array_equal(before[:common], after[:common])

    def test_orders(self, pipeline: AvatarPipeline) -> None:
        """Wavefront and lockstep give the same frames; in batches they differ by rounding; causal is another
        video."""
        samples = noise(70 * 640)
        wavefront, lockstep, batches, causal, causal_batches = (
            frames(pipeline, samples, steps=3, **options)
            for options in (
                {}, {"order": "lockstep"}, {"batch_windows": 3}, {"order": "causal"},
                {"order": "causal", "batch_windows": 2},
            )
        )  # fmt: skip
        assert np.array_equal(wavefront, lockstep)
        assert np.abs(wavefront.astype(int) - batches).max() <= 1
        assert not np.array_equal(wavefront, causal)
        assert np.abs(causal.astype(int) - causal_batches).max() <= 1

    def test_batches_are_as_large_as_asked_for(self, pipeline: AvatarPipeline) -> None:
        rows: list[int] = []
        block = pipeline.transformer.blocks[0]
        hook = block.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[0]))
        frames(pipeline, noise(70 * 640), steps=3, batch_windows=2, text_scale=1.0, audio_scale=1.0)
        hook.remove()
        assert max(rows) == 2
        assert sum(rows) == 3 * 6

    @pytest.mark.parametrize(("order", "cells"), [("causal", 3), ("wavefront", 6), ("lockstep", 2 * 6 + 1)])
    def test_the_first_frame_does_not_wait_for_the_end(
        self, pipeline: AvatarPipeline, order: str, cells: int
    ) -> None:
        seen: list[Progress] = []
        stream = pipeline.stream(
            portrait(), noise(70 * 640), steps=3, width=32, height=32, order=order, progress=seen.append
        )
        next(stream)
        stream.close()
        assert seen[-1].windows == 6
        assert len([state for state in seen if state.frame == 0]) == cells

    def test_features_of_windows_that_are_done_are_let_go(
        self, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive: list[int] = []
        call = WindowSpeech.__call__

        def count(self: WindowSpeech, window: Window) -> torch.Tensor:
            features = call(self, window)
            alive.append(len(self._features))
            return features

        monkeypatch.setattr(WindowSpeech, "__call__", count)
        frames(pipeline, noise(160 * 640), steps=2)
        assert max(alive) == 2

    def test_a_pause_is_not_made_loud_if_so_asked(self, pipeline: AvatarPipeline) -> None:
        samples = noise(22 * 640)
        samples[: 17 * 640] *= 1e-5
        window, recording = (
            frames(pipeline, samples, speech_normalisation=how) for how in ("window", "recording")
        )
        assert (window[:12] != recording[:12]).mean() > 0.1

    def test_overlap_weights_change_the_video(self, pipeline: AvatarPipeline) -> None:
        samples = noise(30 * 640)
        uniform, log = (
            frames(pipeline, samples, steps=2, overlap=3, overlap_weights=weights)
            for weights in ("uniform", "log")
        )
        assert not np.array_equal(uniform, log)

    def test_the_picture_is_not_squeezed(self, pipeline: AvatarPipeline) -> None:
        """Fault 10: what reaches the encoders keeps its shape."""
        picture = Image.new("RGB", (96, 48), "black")
        ImageDraw.Draw(picture).ellipse((33, 9, 63, 39), fill="white")
        seen: list[torch.Tensor] = []
        hook = pipeline.image_encoder.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        next(pipeline.stream(picture, noise(640), steps=1, width=32, height=32))
        hook.remove()
        bright = seen[0][0].mean(dim=0) > 0
        rows, columns = bright.any(dim=1).sum().item(), bright.any(dim=0).sum().item()
        assert abs(rows - columns) <= 2

    def test_latents_that_are_no_numbers_stop_with_step_and_window(self) -> None:
        broken = toy_pipeline()
        with torch.no_grad():
            broken.transformer.proj_out.bias.fill_(float("nan"))
        with pytest.raises(SamplingError, match="step 1 of 2 in window 1: try"):
            next(broken.stream(portrait(), noise(640)))


class TestFile:
    def test_a_file_with_picture_and_sound(self, pipeline: AvatarPipeline, tmp_path: Path) -> None:
        """Fault 6: the file has the sound, in time with the frames."""
        seen: list[Progress] = []
        made = pipeline.generate(
            portrait(), noise(30 * 640), tmp_path / "out.mp4", seed=5, aspect="square", progress=seen.append
        )
        info = probe(made.path)
        assert (info.width, info.height, info.fps, info.frames) == (32, 32, Fraction(25), 30)
        assert info.sound_seconds == pytest.approx(30 / 25, abs=0.001)
        assert len(list(read_frames(made.path))) == 30
        assert "5" in read_metadata(made.path)["stableavatar"]
        assert len(seen) == 2 * 3 + 30
        assert {(p.step, p.window) for p in seen} == {
            (step, window) for step in (1, 2) for window in (1, 2, 3)
        }
        assert [p.frame for p in seen] == sorted(p.frame for p in seen)
        assert [p.share for p in seen] == sorted(p.share for p in seen)
        assert seen[-1].frame == seen[-1].frames == 30
        assert (seen[-1].share, seen[-1].seconds_left) == (1, 0)
        assert list(tmp_path.iterdir()) == [made.path]

    def test_frames_go_to_the_file_as_they_come(
        self, pipeline: AvatarPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault 5: no frame waits for the ones after it."""
        written: list[int] = []
        write = SegmentWriter.write

        def count(self: SegmentWriter, frame: np.ndarray) -> None:
            write(self, frame)
            written.append(1)

        monkeypatch.setattr(SegmentWriter, "write", count)
        waiting: list[int] = []

        def progress(state: Progress) -> None:
            waiting.append(state.frame - len(written))

        pipeline.generate(
            portrait(), noise(30 * 640), tmp_path / "out.mp4", aspect="square", progress=progress
        )
        assert max(waiting) == 1
        assert len(written) == 30

    def test_the_settings_in_a_file_repeat_it(self, pipeline: AvatarPipeline, tmp_path: Path) -> None:
        def make(name: str, **options: object) -> tuple[GeneratedVideo, np.ndarray]:
            pictures = OutputOptions(frames=str(tmp_path / name))  # a text will do for a path
            made = pipeline.generate(
                portrait(), noise(10 * 640), tmp_path / f"{name}.mp4", output_options=pictures, **options
            )
            return made, np.stack([read_picture(file) for file in sorted((tmp_path / name).iterdir())])

        first, frames_of_first = make("first", prompt='你好 "quoted"')
        settings = json.loads(read_metadata(first.path)["stableavatar"])
        assert settings.pop("version") == stableavatar.__version__
        how_it_was_made = {name: settings.pop(name) for name in ("dtype", "quality", "preset")}
        assert how_it_was_made == {"dtype": "float32", "quality": 18, "preset": "medium"}
        assert settings["seed"] == first.options.seed
        _, frames_of_second = make("second", **settings)
        assert frames_of_first.shape == (10, 32, 32, 3)
        assert np.array_equal(frames_of_first, frames_of_second)

    def test_frames_that_are_no_numbers_are_not_written_as_black(self, tmp_path: Path) -> None:
        broken = toy_pipeline()
        with torch.no_grad():
            broken.vae.decoder.conv_out.bias.fill_(float("nan"))
        with pytest.raises(SamplingError, match="frame 1 came"):
            broken.generate(portrait(), noise(640), tmp_path / "out.mp4", steps=1)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_left_when_it_fails(self, tmp_path: Path) -> None:
        broken = toy_pipeline()
        with torch.no_grad():
            broken.transformer.proj_out.bias.fill_(float("nan"))
        with pytest.raises(SamplingError):
            broken.generate(portrait(), noise(640), tmp_path / "out.mp4")
        assert list(tmp_path.iterdir()) == []


class TestLoading:
    def test_a_saved_pipeline_comes_back(self, pipeline: AvatarPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path)
        again = stableavatar.load(tmp_path, device="cpu")
        assert again.defaults == pipeline.defaults
        samples = noise(5 * 640)
        assert np.array_equal(frames(pipeline, samples), frames(again, samples))

    def test_half_precision_leaves_speech_and_time_in_float32(
        self, pipeline: AvatarPipeline, tmp_path: Path
    ) -> None:
        pipeline.save_pretrained(tmp_path)
        half = stableavatar.load(tmp_path, device="cpu", dtype="bfloat16")
        for name, value in pipeline.speech_encoder.state_dict().items():
            assert torch.equal(half.speech_encoder.state_dict()[name], value), name  # nor was rounded
        assert half.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert half.transformer.condition_embedder.time_proj.weight.dtype == torch.float32
        assert half.vae.dtype == torch.bfloat16
        assert half.speech_encoder.dtype == torch.float32
        exact, near = (frames(p, noise(5 * 640)).astype(int) for p in (pipeline, half))
        assert 0 < abs(exact - near).mean() < 3

    def test_portraits_of_every_kind_are_read_alike(self, pipeline: AvatarPipeline, tmp_path: Path) -> None:
        """A Pillow image is turned upright and laid over white as a file is."""
        image = Image.fromarray(np.dstack([portrait(), np.full((40, 48), 128, dtype=np.uint8)]))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "portrait.png", exif=exif)
        made = [
            np.stack(list(pipeline.stream(given, noise(640), steps=1, seed=1)))
            for given in (tmp_path / "portrait.png", Image.open(tmp_path / "portrait.png"))
        ]
        assert np.array_equal(*made)
        with pytest.raises(InputError, match="16"):
            pipeline.stream(portrait()[:1, :1], noise(640))

    def test_what_is_not_there(self) -> None:
        with pytest.raises(InputError, match="no such file or folder"):
            stableavatar.load("./nowhere/at all")

    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(InputError, match="cannot be used here"):
            stableavatar.load("tiny", device="cuda:7" if not torch.cuda.is_available() else "xla")
        with pytest.raises(InputError, match="float8"):
            stableavatar.load("tiny", device="cpu", dtype="float8")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"width": 500, "height": 512}, "nearest is 496"),
            ({"width": 512, "height": 505}, "height 505 .* nearest is 512"),
            ({"width": 512}, "both width and height"),
            ({"window": 80}, "nearest are 77 and 81"),
            ({"window": 17, "overlap": 5}, "choose 2 to 4"),
            ({"steps": 0}, "steps 0 is too small"),
            ({"steps": 2.5}, "steps 2.5 is not of type int"),
            ({"steps": "10"}, "steps '10' is not of type int"),
            ({"seed": True}, "seed True is not of type int"),
            ({"fps": "25"}, "fps '25' is not of type float"),
            ({"prompt": 3}, "prompt 3 is not of type str"),
            ({"window": 5}, "window 5 is too small"),
            ({"fps": 0}, "fps 0"),
            ({"fps": float("nan")}, "not a number"),
            ({"duration": 0}, "more than 0"),
            ({"text_scale": -1}, "text scale -1"),
            ({"seed": -1}, "seed -1"),
            ({"duration": 1e308}, "duration 1e.308 is too large: 10000000 at most"),
            ({"start": 1e308}, "start 1e.308 is too large: 10000000 at most"),
            ({"prompt": "caf\udce9"}, r"prompt 'caf\\udce9' has what is no character"),
            ({"negative_prompt": "\ud800"}, r"negative prompt '\\ud800' has what is no character"),
            ({"steps": np.float64(2.0)}, "steps .*2.0.* is not of type int"),
            ({"steps": np.bool_(True)}, "is not of type int"),
            ({"fps": np.float32("nan")}, "not a number"),
            ({"text_scale": Fraction(10**400)}, "text scale .* is not of type float"),
            ({"width": 512, "height": 512, "aspect": "square"}, "not both"),
        ],
    )
    def test_what_cannot_be_is_said(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            GenerateOptions(**options)

    def test_an_option_that_is_not_there(self, pipeline: AvatarPipeline) -> None:
        with pytest.raises(InputError, match="no option stepps; did you mean steps"):
            pipeline.stream(portrait(), noise(640), stepps=3)

    def test_a_model_s_overlap_that_does_not_fit_a_given_window(self) -> None:
        with pytest.raises(InputError, match="choose 2 to 2"):
            Settings.resolve(GenerateOptions(window=9), SamplingDefaults(), picture=(9, 9), seed=0)

    def test_auto_aspect_takes_the_nearest_shape(self) -> None:
        defaults = SamplingDefaults()
        assert defaults.size_for("auto", 1080, 1920) == (480, 832)
        assert defaults.size_for("auto", 1920, 1080) == (832, 480)
        assert defaults.size_for("auto", 900, 1000) == (512, 512)
        assert defaults.size_for("wide", 10, 1000) == (832, 480)
        with pytest.raises(InputError, match="no tall size"):
            SamplingDefaults(sizes={"square": (32, 32)}).size_for("tall", 1, 1)

    def test_numbers_of_other_libraries_become_pythons(self) -> None:
        options = GenerateOptions(
            steps=np.int64(3), seed=np.uint32(7), fps=Fraction(30000, 1001), text_scale=np.float64(2.5),
            duration=np.float32(0.5), audio_scale=np.int16(2),
        )  # fmt: skip
        given = (options.steps, options.seed, options.text_scale, options.duration, options.audio_scale)
        assert given == (3, 7, 2.5, 0.5, 2)
        assert [type(it) for it in given] == [int, int, float, float, int]
        assert options.frame_rate == Fraction(30000, 1001)
        assert json.dumps(asdict(options))
        assert type(OutputOptions(quality=np.int8(20)).quality) is int

    def test_broadcast_frame_rates(self) -> None:
        assert GenerateOptions(fps=29.97).frame_rate == Fraction(30000, 1001)
        assert GenerateOptions(fps=25).frame_rate == 25
