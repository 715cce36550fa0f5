"""The commands for data: ``stableavatar prepare`` and its single steps; see `stableavatar.apps.cli`.

The long options with underscores are those of the published scripts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stableavatar.apps.console import memory_advice
from stableavatar.errors import InputError

if TYPE_CHECKING:
    from stableavatar.data.clips import MaskKind

RootOption = Annotated[
    Path, typer.Option("--folder-root", "--folder_root", help="A folder of clip folders 00001, 00002, ...")
]
StartOption = Annotated[int, typer.Option(min=0, help="The first number.")]
EndOption = Annotated[int, typer.Option(min=0, help="The number after the last.")]


@memory_advice("Give fewer --workers, or videos of fewer pixels")
def prepare(
    raw: Annotated[Path, typer.Argument(metavar="RAW_FOLDER", help="Videos, sub-folders included.")],
    data: Annotated[Path, typer.Argument(metavar="DATA_FOLDER", help="Made if need be.")],
    kind: Annotated[
        Literal["speech", "singing", "dancing"], typer.Option(help="What all of the videos show.")
    ] = "speech",
    prompt: Annotated[str | None, typer.Option(help="By default what the kind says.")] = None,
    least_seconds: Annotated[float, typer.Option(help="Shorter stretches are dropped.")] = 3.24,
    most_seconds: Annotated[float, typer.Option(help="Longer ones are cut into several clips.")] = 20.0,
    least_face: Annotated[float, typer.Option(help="Height of the face, in heights of the picture.")] = 0.08,
    most_motion: Annotated[
        float, typer.Option(help="Of the background: mean difference, of 255, from a stretch's beginning.")
    ] = 12.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes, a video each.")] = 1,
) -> None:
    """Make clip folders for training of raw videos.

    A clip is one shot with one face, a still background and sound, at 25 frames a second, cut to the trained
    shape nearest to the video's. DATA_FOLDER/report.html says what was kept, what not, and why. An
    interrupted run goes on with the next video; another run does only what is new.
    """
    from stableavatar.data import prepare as preparing
    from stableavatar.data.stretches import PrepareSettings

    settings = PrepareSettings(
        kind, prompt, least_seconds, most_seconds, least_face=least_face, most_motion=most_motion
    )
    counts = preparing.prepare(
        raw, data, settings, workers=workers, tell=lambda line: typer.echo(line, err=True)
    )
    if not counts["kept"]:
        raise InputError(f"{data}: no clip of {counts['videos']} videos: {data / preparing.REPORT} says why")
    typer.echo(
        f"{data}: {counts['kept']} clips of {counts['videos']} videos, {counts['dropped']} stretches "
        f"dropped; see {data / preparing.REPORT}"
    )


def extract_audio(
    video: Annotated[
        Path, typer.Option("--video", "--video_path", help="A video with sound, or any recording.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", "--saved_audio_path", help="The WAV to write.")],
) -> None:
    """Write the sound of a video as mono WAV at 16 kHz."""
    from stableavatar.data import extract

    typer.echo(f"{output}: {extract.extract_audio(video, output):.2f} s")


def extract_frames(
    video: Annotated[Path, typer.Option("--video", "--video_path", help="A video.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")],
) -> None:
    """Write the frames of a video as frame_0.png, frame_1.png and on."""
    from stableavatar.data import extract

    typer.echo(f"{output}: {extract.extract_frames(video, output)} frames")


def separate_vocals(
    recording: Annotated[
        Path,
        typer.Option("--recording", "--audio_file_path", help="Any sound file, or a video with sound."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", "--saved_vocal_path", help="The WAV to write.")],
    network: Annotated[
        Path,
        typer.Option("--network", "--audio_separator_model_file", help="An MDX network as ONNX file."),
    ] = Path("checkpoints/Kim_Vocal_2.onnx"),
    n_fft: Annotated[
        int, typer.Option(min=512, help="Samples of a spectrum, as the network was trained.")
    ] = 7680,
    compensation: Annotated[
        float, typer.Option(help="What the voice is multiplied by, as published with the network.")
    ] = 1.009,
) -> None:
    """Take the music out of a recording: the voice as stereo WAV at 44.1 kHz, of any length."""
    from stableavatar.data import vocals

    separator = vocals.VocalSeparator(network, n_fft=n_fft, compensation=compensation)
    typer.echo(f"{output}: {vocals.separate_vocals(separator, recording, output):.2f} s")


def extract_face_masks(folder_root: RootOption, start: StartOption = 0, end: EndOption = 10**9) -> None:
    """Write face_masks into numbered clip folders; those that are complete are kept."""
    _extract_masks(folder_root, start, end, "face_masks")


def extract_lip_masks(folder_root: RootOption, start: StartOption = 0, end: EndOption = 10**9) -> None:
    """Write lip_masks into numbered clip folders; those that are complete are kept."""
    _extract_masks(folder_root, start, end, "lip_masks")


def _extract_masks(root: Path, start: int, end: int, kind: "MaskKind") -> None:
    from stableavatar.data import extract
    from stableavatar.data.landmarks import FaceLandmarker

    clips = extract.numbered_clips(root, start, end)
    landmarker = FaceLandmarker()
    failed = []
    for number, clip in enumerate(clips, 1):
        try:
            said = f"{extract.extract_masks(landmarker, clip, [kind])} masks"
        except InputError as error:
            failed.append(clip)
            said = str(error)
        typer.echo(f"{number}/{len(clips)} {clip / kind}: {said}", err=clip in failed)
    if failed:
        raise InputError(f"{len(failed)} of {len(clips)} clips have no {kind}: see above")
