"""The command line: what it takes, what it writes, what it says."""

import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress as Bar

from command_line import QUICK, portrait, run, speech, start, toy_model
from media_files import tone, write_sound, write_video, write_wav
from published_toy import write_published
from stableavatar import __version__
from stableavatar.apps import cli, progress
from stableavatar.apps.command_options import flag_of, parse_size, repeating_command
from stableavatar.checkpoints import hub
from stableavatar.errors import InputError
from stableavatar.generation import Progress
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.options import GenerateOptions, OutputOptions

# A value for every option that is not its default, and fits the others.
GENERATION = {
    "prompt": "她在说话 -- loudly",
    "negative_prompt": "blur",
    "width": 48,
    "height": 32,
    "aspect": "auto",  # an option of its own below: it excludes width and height
    "fit": "pad",
    "steps": 1,
    "guidance": "audio-native",
    "text_scale": 1.5,
    "audio_scale": 2.5,
    "window": 13,
    "overlap": 3,
    "overlap_weights": "log",
    "order": "lockstep",
    "batch_windows": 2,
    "step_cache": 0.05,
    "decoder_device": "cpu",
    "decoder_tiling": True,
    "seed": 11,
    "fps": 20.0,
    "start": 0.1,
    "duration": 1.0,
    "no_audio": "input",
    "speech_normalisation": "recording",
    "compat": "upstream",
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A portrait, a recording of 0.6 s, and the name of a video that is to be made."""
    return portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav"), tmp_path / "out.mp4"


def settings_in(video: Path) -> dict[str, object]:
    return dict(json.loads(read_metadata(video)["stableavatar"]))


def generate(picture: Path, recording: Path, output: Path, *more: str | Path) -> str:
    result = run("generate", picture, recording, "-o", output, "--model", toy_model(), *QUICK, *more)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_field_is_an_option_with_help_and_a_heading() -> None:
    command = typer.main.get_command(cli.app)
    options = {p.name: p for p in command.commands["generate"].params}  # type: ignore[attr-defined]
    for field in (*fields(GenerateOptions), *fields(OutputOptions)):
        option = options[field.name]
        assert option.opts == [flag_of(field)]
        assert option.default == field.default
        assert len(option.help) > 15
        assert option.rich_help_panel
    assert flag_of(next(f for f in fields(OutputOptions) if f.name == "frames")) == "--frames-folder"


def test_every_option_reaches_the_pipeline(files: tuple[Path, Path, Path]) -> None:
    picture, recording, output = files
    speech(recording, 1.2)
    assert set(GENERATION) == {f.name for f in fields(GenerateOptions)}
    arguments = []
    for field in fields(GenerateOptions):
        if field.name != "aspect":
            assert GENERATION[field.name] != field.default
            value = GENERATION[field.name]
            arguments += [flag_of(field)] if value is True else [flag_of(field), str(value)]
    result = run(
        *["generate", picture, recording, "-o", output, "--model", toy_model(), *arguments],
        *["--quality", "33", "--preset", "superfast", "--frames-folder", output.with_name("frames")],
        *["--dtype", "bfloat16"],
    )
    assert result.exit_code == 0, result.output
    model = {"version": __version__, "model": str(toy_model()), "dtype": "bfloat16"}
    assert settings_in(output) == {**model, **GENERATION, "quality": 33, "preset": "superfast"}
    found = probe(output)
    # 1 s at 20 frames/s, of which compat makes 4n+1 frames.
    assert (found.width, found.height, found.fps, found.frames) == (48, 32, 20, 17)
    assert len(list(output.with_name("frames").glob("*.png"))) == 17
    encoder = output.read_bytes()  # x264 writes its settings into the stream
    assert b"crf=33.0" in encoder
    assert b"subme=1 " in encoder  # of superfast


def test_a_decoder_device_is_refused_before_a_model_is_looked_for(files: tuple[Path, Path, Path]) -> None:
    picture, recording, output = files
    arguments = ["-o", output, "--model", "./nowhere", "--decoder-device", "meta"]
    result = run("generate", picture, recording, *arguments)
    assert result.exit_code == 2
    assert "'meta' cannot be used here" in " ".join(result.stderr.split())


def test_aspect_takes_the_size_of_the_model(files: tuple[Path, Path, Path]) -> None:
    picture, recording, output = files
    arguments = [a for a in QUICK if a not in ("--size", "32x32")]
    result = run(
        *["generate", picture, recording, "-o", output, "--model", toy_model(), "--aspect", "wide"],
        *arguments,
    )
    assert result.exit_code == 0, result.output
    assert (probe(output).width, probe(output).height) == (64, 32)


def test_one_line_at_the_end(files: tuple[Path, Path, Path]) -> None:
    line = generate(*files, "--seed", "5")
    assert re.fullmatch(
        rf"{re.escape(str(files[2]))}: 15 frames, 0\.60 s at 25 frames/s, 32x32, seed 5, made in [\d.]+ s, "
        r"the first frame after [\d.]+ s\n",
        line,
    )


def test_info_gives_the_command_that_repeats_a_video(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    picture, recording, output = files
    generate(
        picture,
        recording,
        output,
        "--prompt",
        "it's [she]",
        "--fps",
        "20",
        "--start",
        "0.1",
        "--quality",
        "9",
    )
    shown = run("info", output)
    assert shown.exit_code == 0
    assert re.search(rf"^seed +{settings_in(output)['seed']}$", shown.stdout, re.MULTILINE)
    words = shlex.split(shown.stdout.splitlines()[-1])
    again = tmp_path / "again.mp4"
    named = {"PORTRAIT": picture, "SPEECH": recording, "OUT.mp4": again}
    assert words[0] == "stableavatar"
    assert named.keys() < set(words)
    result = run(*(named.get(word, word) for word in words[1:]))
    assert result.exit_code == 0, result.output
    assert settings_in(again) == settings_in(output)
    for first, second in zip(read_frames(output), read_frames(again), strict=True):
        np.testing.assert_array_equal(first, second)


def test_defaults_are_left_out_of_the_repeating_command() -> None:
    settings = {"version": "1", "prompt": "The protagonist is talking", "width": 32, "height": 48, "seed": 3}
    command = repeating_command({**settings, "fps": 25.0, "compat": None})
    assert command == "stableavatar generate PORTRAIT SPEECH -o OUT.mp4 --size 32x48 --seed 3"
    assert repeating_command({"decoder_tiling": True}).endswith(" --decoder-tiling")
    assert repeating_command({"decoder_tiling": False}).endswith(" OUT.mp4")
    model = {"model": "a b", "variant": "rec-vec", "model_size": "1.3b", "dtype": "float32"}
    command = repeating_command({**model, "seed": 3, "quality": 18, "preset": "slow"})
    assert command.endswith(
        "--model 'a b' --variant rec-vec --model-size 1.3b --dtype float32 --seed 3 --preset slow"
    )


def test_info_on_a_file_from_elsewhere(files: tuple[Path, Path, Path]) -> None:
    result = run("info", files[1])
    assert result.exit_code == 2
    assert "holds no settings" in result.stderr


def test_info_says_what_is_installed_found_and_supported(tmp_path: Path) -> None:
    result = run("info", "--checkpoints", tmp_path / "none")
    assert result.exit_code == 0, result.output
    for line in (
        r"torch +" + re.escape(torch.__version__), r"cpu +\d+ processors", r"tiny +\S", r"auto +takes \w+",
        r".*none +.*stableavatar download .*--output", r"written +MP4 with libx264 for video and aac for sound",
        r"attention +\w+", r"hub cache +\S",
    ):  # fmt: skip
        assert re.search(rf"^  {line}", result.stdout, re.MULTILINE), line


def test_published_weights_are_found_used_and_converted(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    picture, recording, output = files
    published = write_published(tmp_path / "checkpoints")
    shown = run("info", "--checkpoints", published).stdout
    assert re.search(r"^  1\.3b square +ready", shown, re.MULTILINE)
    assert re.search(r"^  1\.3b rec-vec +ready", shown, re.MULTILINE)
    assert re.search(r"^  14b square +lacks the Wan base transformer", shown, re.MULTILINE)

    own, file = tmp_path / "own", tmp_path / "back.safetensors"
    result = run("convert", published, own, "--variant", "rec-vec", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert run("convert", published, own).exit_code == 2
    assert run("export", own / "transformer", file).exit_code == 0
    assert file.is_file()

    frames = []
    more = ["--window", "17", "--overlap", "2", "--seed", "1", "--overwrite"]
    for model in (
        [published],
        [published, "--variant", "rec-vec"],
        [published, "--dtype", "bfloat16"],
        [own],
    ):
        result = run("generate", picture, recording, "-o", output, *QUICK, *more, "--model", *model)
        assert result.exit_code == 0, result.output
        frames.append(np.stack(list(read_frames(output))))
    assert not np.array_equal(frames[0], frames[1])  # another variant
    assert not np.array_equal(frames[0], frames[2])  # another dtype


def test_download_passes_on_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(hub, "download", lambda *args, **kwargs: calls.append((args, kwargs)) or args[0])
    asked = ["--output", tmp_path, "--variant", "rec-vec", "--model-size", "14b"]
    result = run("download", *asked, "--repository", "a/b", "--revision", "c")
    assert result.exit_code == 0, result.output
    assert calls == [((tmp_path, "rec-vec", "14b"), {"repo_id": "a/b", "revision": "c"})]
    assert "for training a transformer of 14B" in result.stdout
    monkeypatch.setattr(
        hub,
        "download_vocal_separator",
        lambda *args, **kwargs: calls.append((args, kwargs)) or args[0] / "it",
    )
    assert run("download", "--vocals", "-o", tmp_path, "--revision", "c").exit_code == 0
    assert calls[1:] == [((tmp_path,), {"repo_id": hub.PUBLISHED_REPOSITORY, "revision": "c"})]
    assert "leave --variant" in run("download", "--vocals", "--variant", "square").stderr
    for other in (["--vocals"], ["--variant", "square"], ["-o", tmp_path], ["--model-size", "14b"]):
        refused = run("download", "--landmarks", *other)
        assert refused.exit_code == 2, other
        assert "--landmarks" in refused.stderr


def test_the_download_command_that_is_advised_can_be_typed(tmp_path: Path) -> None:
    from stableavatar.checkpoints.layout import download_command

    words = shlex.split(download_command(tmp_path, "rec-vec", "14b"))
    command = typer.main.get_command(cli.app).commands["download"]  # type: ignore[attr-defined]
    assert words[:2] == ["stableavatar", "download"]
    assert command.make_context("download", words[2:]).params["model_size"] == "14b"


def test_version_and_help_come_without_torch() -> None:
    code = (
        "import sys, typer.testing, stableavatar.apps.cli as cli\n"
        "runner = typer.testing.CliRunner()\n"
        "for words in (['--help'], ['generate', '--help'], ['--version']):\n"
        "    result = runner.invoke(cli.app, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    print(result.stdout)\n"
        "heavy = {'torch', 'av', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"stableavatar {__version__}" in done.stdout
    assert "stableavatar generate portrait.png speech.wav -o talk.mp4" in done.stdout


@pytest.mark.parametrize(
    ("text", "size"), [("512x384", (512, 384)), ("64X32", (64, 32)), ("64 × 32", (64, 32))]
)
def test_size(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["512", "x", "512x", "ax16", "16x16x16", "-16x16", "²x²"])
def test_no_size(text: str) -> None:
    with pytest.raises(InputError, match="such as 512x512"):
        parse_size(text)


def state(share: float | None, frame: int = 0, left: float | None = 70.0) -> Progress:
    known = share is not None
    return Progress(
        2, 5, 1, 3 if known else None, frame, 90 if known else None, share, left if known else None
    )


def test_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.display() as show:
        show.stage("loading toy")
        for done in range(1, 100):
            now[0] += 1
            show(state(done / 100))
        show(state(1, 90))
    assert capsys.readouterr().err.splitlines() == [
        "loading toy",
        *(
            f"making the video: {done}%, step 2/5, window 1/3, frame 0/90, 1 min 10 s left"
            for done in range(1, 100, 10)
        ),
        "making the video: 100%, step 2/5, window 1/3, frame 90/90",
    ]


def test_lines_where_the_end_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.display() as show:
        show(state(None, 7))
    assert capsys.readouterr().err == "making the video: step 2/5, window 1, frame 7\n"


def test_a_bar_where_there_is_one() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with Bar(*progress.COLUMNS, console=console, auto_refresh=False) as bar:
        show = progress.BarDisplay(bar)
        show.stage("loading toy")
        bar.refresh()
        show(state(0.25))
        bar.refresh()
        show(state(0.5, 45, 3.04))
        bar.refresh()
    text = screen.getvalue()
    assert "Loading toy" in text
    assert re.search(r"Making the video .* 25% step 2/5, window 1/3, frame 0/90, 1 min 10 s left", text)
    assert re.search(r"Making the video .* 50% step 2/5, window 1/3, frame 45/90, 3\.0 s left", text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (250, "4 min 10 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_verbose_tells_what_is_done(tmp_path: Path) -> None:
    published = write_published(tmp_path / "checkpoints")
    result = run("convert", published, tmp_path / "own", "-v")
    assert "INFO stableavatar.checkpoints.convert: converting the vae" in result.stderr


# Odd but legal input: the video has the right length to the frame, and sound of that length.


def sounds(folder: Path, kind: str) -> tuple[Path, int]:
    """A recording of a kind, and the frames of 25 a second that it fills."""
    path = folder / "speech.wav"
    if kind == "silence":
        return write_wav(path, np.zeros(8000, np.float32), 16000), 12  # 12.5: to the even
    if kind == "0.1 s":
        return speech(path, 0.1), 2  # 2.5
    if kind == "8 kHz":
        return speech(path, 0.5 + 0.02, 8000), 13
    if kind == "192 kHz":
        return speech(path, 0.4, 192000), 10
    if kind == "5.1":
        samples = np.repeat(tone(0.4, 48000)[:, None], 6, axis=1)
        return write_sound(folder / "speech.flac", samples, 48000, "flac", layout="5.1"), 10
    if kind == "a video":
        frames = [np.full((32, 32, 3), 90, np.uint8)] * 10
        return write_video(folder / "speech.mp4", frames, tone(0.4, 48000)), 10
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["silence", "0.1 s", "8 kHz", "192 kHz", "5.1", "a video"])
def test_odd_recordings(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.mp4"
    recording, frames = sounds(tmp_path, kind)
    generate(portrait(tmp_path / "portrait.png"), recording, output)
    found = probe(output)
    assert (found.width, found.height, found.fps, found.frames) == (32, 32, 25, frames)
    assert found.sound_seconds == pytest.approx(frames / 25, abs=1e-3)
    decoded = list(read_frames(output))
    assert len(decoded) == frames
    assert float(np.std(decoded[0])) > 1  # a picture, not a plane


@pytest.mark.parametrize("kind", ["16 bit", "palette", "grey with transparency", "a video"])
def test_odd_pictures(tmp_path: Path, kind: str) -> None:
    picture = tmp_path / "portrait.png"
    plain = Image.open(portrait(picture))
    if kind == "16 bit":
        Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257).save(picture)
    elif kind == "palette":
        plain.quantize(64).save(picture)
    elif kind == "grey with transparency":
        plain.convert("LA").save(picture)
    else:
        picture = write_video(tmp_path / "portrait.mp4", [np.asarray(plain)] * 3)
    generate(picture, speech(tmp_path / "speech.wav", 0.2), tmp_path / "out.mp4")
    assert probe(tmp_path / "out.mp4").frames == 5


def test_spaces_and_other_scripts_in_paths(tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner 会说话的"
    folder.mkdir()
    picture, recording = portrait(folder / "肖像 1.png"), speech(folder / "录音 1.wav", 0.2)
    line = generate(picture, recording, folder / "视频 out.mp4")
    assert "视频 out.mp4: 5 frames" in line
    assert probe(folder / "视频 out.mp4").frames == 5
    assert sorted(f.name for f in folder.iterdir()) == sorted(["肖像 1.png", "录音 1.wav", "视频 out.mp4"])


def test_an_output_that_is_there_is_kept_unless_it_may_be_replaced(files: tuple[Path, Path, Path]) -> None:
    picture, recording, output = files
    output.write_bytes(b"mine")
    result = run("generate", picture, recording, "-o", output, "--model", toy_model(), *QUICK)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert output.read_bytes() == b"mine"
    generate(picture, recording, output, "--overwrite")
    assert probe(output).frames == 15


def test_the_whole_command_as_a_process(files: tuple[Path, Path, Path]) -> None:
    """Nothing but our own lines: libraries have bars and warnings of their own."""
    picture, recording, output = files
    process = start("generate", picture, recording, "-o", output, "--model", toy_model(), *QUICK)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert printed.startswith(f"{output}: 15 frames")
    assert printed.count("\n") == 1
    ours = re.compile(r"loading .*|reading portrait, speech and prompt|making the video: \d+%, .*")
    assert [line for line in said.splitlines() if not ours.fullmatch(line)] == []


def test_options_have_types() -> None:
    """What typer cannot show it would take for text."""
    hints = get_type_hints(GenerateOptions)
    shown = run("generate", "--help").stdout
    assert "<three-branch|audio-nati" in shown
    assert hints.keys() == {f.name for f in fields(GenerateOptions)}
