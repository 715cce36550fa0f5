"""Options of generation: one typed source of names, defaults, checks and help for the Python API and the
command line."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from stableavatar.conditioning.speech import SpeechNormalisation
from stableavatar.errors import InputError
from stableavatar.media.timing import parse_fps
from stableavatar.sampling.guidance import GuidanceRule
from stableavatar.sampling.windows import Compat, OverlapWeights

Fit = Literal["crop", "pad", "stretch"]
Aspect = Literal["auto", "square", "tall", "wide"]
NoAudio = Literal["output", "input"]
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
]

SIZE_MULTIPLE = 16  # pixels: 8 of the autoencoder, 2 of the transformer's patches


def _option(default: Any, help: str, **checks: Any) -> Any:
    return field(default=default, metadata={"help": help, **checks})


@dataclass(frozen=True)
class GenerateOptions:
    """How a video is made. `None` stands for the model's own setting (see `SamplingDefaults`).

    Raises:
        InputError: a value that cannot be, when the object is made.
    """

    prompt: str = _option(
        "The protagonist is talking",
        "What is to be seen: first frame, behaviour, background. Vague prompts give vague motion.",
    )
    negative_prompt: str | None = _option(
        None, "What is not to be seen; by default the list that the model was trained for."
    )
    width: int | None = _option(
        None, "Width in pixels, a multiple of 16. Far from the trained sizes faces distort.", minimum=16
    )
    height: int | None = _option(None, "Height in pixels, a multiple of 16.", minimum=16)
    aspect: Aspect = _option(
        "auto",
        "Which of the model's sizes to use when no width and height are given; auto looks at the picture.",
    )
    fit: Fit = _option(
        "crop", "How the portrait is brought to the size: crop the edges, pad with a border, or stretch it."
    )
    steps: int | None = _option(
        None,
        "Denoising steps. Fewer are faster and blur lips and teeth; more than 50 change little.",
        minimum=1,
    )
    guidance: GuidanceRule = _option(
        "three-branch",
        "How prompt and speech are enforced: three-branch (as published), or audio-native (our reading of "
        "the paper's idea).",
    )
    text_scale: float | None = _option(
        None,
        "Strength of the prompt, usually 3 to 6. Higher follows it more closely and burns colours.",
        minimum=0,
    )
    audio_scale: float | None = _option(
        None,
        "Strength of the speech, usually 3 to 6. Lower mumbles, higher exaggerates the mouth.",
        minimum=0,
    )
    window: int | None = _option(
        None,
        "Frames of a window, 4n+1. Longer than trained loses sharpness, shorter loses motion.",
        minimum=5,
    )
    overlap: int | None = _option(
        None,
        "Latent frames (of 4 frames) that windows share, 5 to 15. More is smoother and slower.",
        minimum=2,
    )
    overlap_weights: OverlapWeights = _option("uniform", "Ramp from window to window: uniform or log.")
    seed: int | None = _option(
        None,
        "The number that the noise grows from; the same seed repeats a video. By default a new one.",
        minimum=0,
    )
    fps: float = _option(
        25.0, "Frames a second of the video. The model was trained at 20 to 30.", minimum=1, maximum=120
    )
    start: float = _option(0.0, "Where in the recording to begin, in seconds.", minimum=0)
    duration: float | None = _option(
        None, "Length of the video in seconds; by default the recording's.", above=0
    )
    no_audio: NoAudio = _option(
        "output",
        "What the guidance's branches without speech hear: zeros after the audio adapter (output, as "
        "published) or before it (input, as in training).",
    )
    speech_normalisation: SpeechNormalisation = _option(
        "window",
        "Loudness is evened out in every window (as published; pauses get loud) or over the recording.",
    )
    compat: Compat | None = _option(
        None,
        "upstream: plan windows and round latents as the published code does, to repeat an earlier result.",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_range(f.name, getattr(self, f.name), f.metadata)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and value % SIZE_MULTIPLE:
                nearest = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
                raise InputError(
                    f"{name} {value} is not a multiple of {SIZE_MULTIPLE}; the nearest is {nearest}"
                )
        if (self.width is None) != (self.height is None):
            raise InputError("give both width and height, or neither")
        if self.width is not None and self.aspect != "auto":
            raise InputError("give width and height, or aspect, not both")
        if self.window is not None and (self.window - 1) % 4:
            lower = self.window - (self.window - 1) % 4
            raise InputError(
                f"a window of {self.window} frames is not 4n+1; the nearest are {lower} and {lower + 4}"
            )
        if self.window is not None and self.overlap is not None:
            check_overlap(self.window, self.overlap)

    @property
    def frame_rate(self) -> Fraction:
        """Frames a second as an exact fraction: 29.97 means 30000/1001."""
        return parse_fps(self.fps)


# Weights of Audio Native Guidance where none are given. They mean more than a scale does: the guided
# prediction is (1 + both) times the full one minus the rest.
AUDIO_NATIVE_WEIGHTS = {"text_scale": 1.0, "audio_scale": 2.0}


@dataclass(frozen=True)
class SamplingDefaults:
    """A model's own settings; those of the released models unless given.

    Attributes:
        steps, text_scale, audio_scale, window (frames), overlap (latent frames): see `GenerateOptions`.
        sizes: width and height in pixels for each aspect that the model was trained at.
    """

    steps: int = 50
    text_scale: float = 3.0
    audio_scale: float = 5.0
    window: int = 81
    overlap: int = 5
    sizes: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: {"square": (512, 512), "tall": (480, 832), "wide": (832, 480)}
    )

    def size_for(self, aspect: Aspect, picture_width: int, picture_height: int) -> tuple[int, int]:
        """Width and height for an aspect; auto takes the size whose shape is nearest to the picture's.

        Raises:
            InputError: the model has no size of that aspect.
        """
        if aspect == "auto":
            shape = picture_width / picture_height

            def misfit(size: tuple[int, int]) -> float:
                ratio = size[0] / size[1] / shape
                return max(ratio, 1 / ratio)

            return min((tuple2(size) for size in self.sizes.values()), key=misfit)
        if aspect not in self.sizes:
            raise InputError(
                f"this model has no {aspect} size; choose one of {', '.join(self.sizes)}, or width and height"
            )
        return tuple2(self.sizes[aspect])


@dataclass(frozen=True)
class Settings(GenerateOptions):
    """Options with everything that was left open filled in; with them a video can be repeated."""

    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 50
    text_scale: float = 3.0
    audio_scale: float = 5.0
    window: int = 81
    overlap: int = 5
    seed: int = 0

    @classmethod
    def resolve(
        cls,
        options: GenerateOptions,
        defaults: SamplingDefaults,
        *,
        size: tuple[int, int],
        negative_prompt: str,
        seed: int,
    ) -> "Settings":
        """`options`, with the model's settings, a size (width, height), a negative prompt and a seed in place
        of None.

        Raises:
            InputError: the overlap does not fit the window.
        """
        fallback = {
            **asdict(defaults),
            **(AUDIO_NATIVE_WEIGHTS if options.guidance == "audio-native" else {}),
            "width": size[0],
            "height": size[1],
            "negative_prompt": negative_prompt,
            "seed": seed,
        }
        chosen = {f.name: getattr(options, f.name) for f in fields(options)}
        for name, value in chosen.items():
            if value is None and name in fallback:
                chosen[name] = fallback[name]
        chosen["aspect"] = "auto"  # width and height now say it
        return cls(**chosen)


@dataclass(frozen=True)
class OutputOptions:
    """How the file is written.

    Raises:
        InputError: a value that cannot be, when the object is made.
    """

    quality: int = _option(
        18,
        "H.264 quality, 0 to 51; lower is better and larger, 18 looks like the frames.",
        minimum=0,
        maximum=51,
    )
    preset: Preset = _option("medium", "H.264 preset: slower ones make smaller files.")
    frames: Path | None = _option(None, "A folder for the frames as PNG files, beside the video.")

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_range(f.name, getattr(self, f.name), f.metadata)


def tuple2(size: Any) -> tuple[int, int]:
    """A pair that may have been read from JSON."""
    width, height = size
    return int(width), int(height)


def check_overlap(window: int, overlap: int) -> None:
    """Raise InputError unless `overlap` latent frames fit a window of `window` frames."""
    latents = (window - 1) // 4 + 1
    if not 2 <= overlap < latents:
        raise InputError(
            f"an overlap of {overlap} latent frames does not fit a window of {window} frames "
            f"({latents} latent frames): choose 2 to {latents - 1}"
        )


def _check_range(name: str, value: Any, checks: Mapping[str, Any]) -> None:
    if value is None or isinstance(value, str | Path):
        return
    label = name.replace("_", " ")
    if value != value or value in (float("inf"), float("-inf")):
        raise InputError(f"{label} {value} is not a number")
    if "minimum" in checks and value < checks["minimum"]:
        raise InputError(f"{label} {value} is too small: {checks['minimum']} or more")
    if "maximum" in checks and value > checks["maximum"]:
        raise InputError(f"{label} {value} is too large: {checks['maximum']} at most")
    if "above" in checks and value <= checks["above"]:
        raise InputError(f"{label} {value} is too small: more than {checks['above']}")
