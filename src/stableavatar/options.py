"""Options of generation: one typed source of names, defaults, checks and help for the Python API and the
command line."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stableavatar.choices import (
    Aspect,
    Compat,
    Fit,
    GuidanceRule,
    NoAudio,
    Order,
    OverlapWeights,
    Preset,
    SpeechNormalisation,
)
from stableavatar.errors import InputError
from stableavatar.media.timing import parse_fps

# Wan's usual negative prompt, which users of the published weights expect.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

LONGEST = 10_000_000  # seconds, a third of a year: what is longer is a slip
SIZE_MULTIPLE = 16  # pixels: 8 of the autoencoder, 2 of the transformer's patches

# Headings under which the command line's help lists the options.
PICTURE = "What is to be seen"
SAMPLING = "How it is made (by default as suits the model)"
TIME = "Time"
EXPERT = "For comparisons with the published code"
FILE = "The file"


def _option(default: Any, help: str, *, panel: str, **more: Any) -> Any:
    """A field; `more` are its checks (minimum, maximum, above), and its flag where that is not its name."""
    return field(default=default, metadata={"help": help, "panel": panel, **more})


@dataclass(frozen=True)
class GenerateOptions:
    """How a video is made. `None` stands for the model's own setting (see `SamplingDefaults`).

    Raises:
        InputError: a value that cannot be, when the object is made.
    """

    prompt: str = _option(
        "The protagonist is talking",
        "What is to be seen: first frame, behaviour, background. Vague prompts give vague motion.",
        panel=PICTURE,
    )
    negative_prompt: str | None = _option(
        None, "What is not to be seen; by default the list that the model was trained for.", panel=PICTURE
    )
    width: int | None = _option(
        None,
        "Width in pixels, a multiple of 16. Far from the trained sizes faces distort.",
        panel=PICTURE,
        minimum=16,
    )
    height: int | None = _option(None, "Height in pixels, a multiple of 16.", panel=PICTURE, minimum=16)
    aspect: Aspect = _option(
        "auto",
        "Which of the model's sizes to use when no width and height are given; auto looks at the picture.",
        panel=PICTURE,
    )
    fit: Fit = _option(
        "crop",
        "How the portrait is brought to the size: crop the edges, pad with a border, or stretch it.",
        panel=PICTURE,
    )
    steps: int | None = _option(
        None,
        "Denoising steps. Fewer are faster and blur lips and teeth; more than 50 change little.",
        panel=SAMPLING,
        minimum=1,
    )
    guidance: GuidanceRule = _option(
        "three-branch",
        "How prompt and speech are enforced: three-branch (as published), or audio-native (our reading of "
        "the paper's idea).",
        panel=SAMPLING,
    )
    text_scale: float | None = _option(
        None,
        "Strength of the prompt: 3 to 6 for the published models, 2 for tiny; for audio-native guidance 1. "
        "Higher follows it more closely and burns colours.",
        panel=SAMPLING,
        minimum=0,
    )
    audio_scale: float | None = _option(
        None,
        "Strength of the speech: 3 to 6 for the published models, 2 for tiny; for audio-native guidance 2. "
        "Lower mumbles, higher exaggerates the mouth.",
        panel=SAMPLING,
        minimum=0,
    )
    window: int | None = _option(
        None,
        "Frames of a window, 4n+1. Longer than trained loses sharpness, shorter loses motion.",
        panel=SAMPLING,
        minimum=9,
    )
    overlap: int | None = _option(
        None,
        "Latent frames (of 4 frames) that windows share: 5 to 15 of the published models' 21, 3 of tiny's 9. "
        "More is smoother and slower.",
        panel=SAMPLING,
        minimum=2,
    )
    overlap_weights: OverlapWeights = _option(
        "uniform", "Ramp from window to window: uniform or log.", panel=SAMPLING
    )
    order: Order = _option(
        "wavefront",
        "Which window takes its next step: wavefront (the video comes out from its beginning on, in constant "
        "memory), lockstep (the same video, all of it at the end), or causal (first frames after one window; "
        "no window hears from its successor, so another video).",
        panel=SAMPLING,
    )
    batch_windows: int = _option(
        1,
        "Windows that are computed at once: the same video but for rounding, in more memory. Meant for GPUs.",
        panel=SAMPLING,
        minimum=1,
    )
    step_cache: float = _option(
        0.0,
        "Leave out steps whose estimated change is below this (TeaCache), usually 0.05 to 0.1. Higher is "
        "faster and less exact; 0 runs every step. Takes main memory for every window alive.",
        panel=SAMPLING,
        minimum=0,
        maximum=1,
    )
    decoder_device: str | None = _option(
        None,
        "Where the autoencoder computes, such as cpu or cuda:1; by default where the transformer does. The "
        "cpu leaves a GPU's memory to the transformer.",
        panel=SAMPLING,
    )
    decoder_tiling: bool = _option(
        False,
        "Decode large pictures in overlapping tiles with blended seams, for a GPU that a tile fits into and "
        "the picture does not. Not quite the same pictures; takes more main memory.",
        panel=SAMPLING,
    )
    seed: int | None = _option(
        None,
        "The number that the noise grows from; the same seed repeats a video. By default a new one.",
        panel=SAMPLING,
        minimum=0,
    )
    fps: float = _option(
        25.0,
        "Frames a second of the video. The model was trained at 20 to 30.",
        panel=TIME,
        minimum=1,
        maximum=120,
    )
    start: float = _option(
        0.0, "Where in the recording to begin, in seconds.", panel=TIME, minimum=0, maximum=LONGEST
    )
    duration: float | None = _option(
        None,
        "Length of the video in seconds; by default the recording's. Silence follows a shorter recording.",
        panel=TIME,
        above=0,
        maximum=LONGEST,
    )
    no_audio: NoAudio = _option(
        "output",
        "What the guidance's branches without speech hear: zeros after the audio adapter (output, as "
        "published) or before it (input, as in training).",
        panel=EXPERT,
    )
    speech_normalisation: SpeechNormalisation = _option(
        "window",
        "Loudness is evened out in every window (as published; pauses get loud) or over the recording.",
        panel=EXPERT,
    )
    compat: Compat | None = _option(
        None,
        "upstream: plan windows and round latents as the published code does, to repeat an earlier result.",
        panel=EXPERT,
    )

    def __post_init__(self) -> None:
        _check_values(self)
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


# Of the rescaling polynomial, highest power first, for Wan 2.1 (spec 2, "Step caches").
STEP_CACHE_COEFFICIENTS = {
    "1.3b": (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    "14b": (2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """A model's own settings; those of the published models unless given.

    Attributes:
        steps: see `GenerateOptions`, as of the next five.
        text_scale: strength of the prompt.
        audio_scale: strength of the speech.
        window: frames.
        overlap: latent frames.
        negative_prompt: what is not to be seen.
        sizes: width and height in pixels for each aspect that the model was trained at.
        step_cache_coefficients: see `sampling.step_cache.steps_to_run`; (1, 0) takes the embedding's change
            as it is.
    """

    steps: int = 50
    text_scale: float = 3.0
    audio_scale: float = 5.0
    window: int = 81
    overlap: int = 5
    negative_prompt: str = NEGATIVE_PROMPT
    sizes: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: {"square": (512, 512), "tall": (480, 832), "wide": (832, 480)}
    )
    step_cache_coefficients: tuple[float, ...] = STEP_CACHE_COEFFICIENTS["1.3b"]

    def __post_init__(self) -> None:
        pairs = {aspect: (int(width), int(height)) for aspect, (width, height) in self.sizes.items()}
        object.__setattr__(self, "sizes", pairs)  # JSON has lists
        polynomial = tuple(float(value) for value in self.step_cache_coefficients)
        object.__setattr__(self, "step_cache_coefficients", polynomial)

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

            return min(self.sizes.values(), key=misfit)
        if aspect not in self.sizes:
            raise InputError(
                f"this model has no {aspect} size; choose one of {', '.join(self.sizes)}, or width and height"
            )
        return self.sizes[aspect]


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
        picture: tuple[int, int],
        seed: int,
    ) -> "Settings":
        """`options`, with the model's settings, a size that fits a picture's (width, height) and a seed in
        place of None.

        Raises:
            InputError: the model has no size of the aspect, or the overlap does not fit the window.
        """
        if options.width is not None and options.height is not None:
            size = options.width, options.height
        else:
            size = defaults.size_for(options.aspect, *picture)
        fallback = {
            **asdict(defaults),
            **(AUDIO_NATIVE_WEIGHTS if options.guidance == "audio-native" else {}),
            "width": size[0],
            "height": size[1],
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
        panel=FILE,
        minimum=0,
        maximum=51,
    )
    preset: Preset = _option("medium", "H.264 preset: slower ones make smaller files.", panel=FILE)
    live: bool = _option(
        False,
        "Write fragmented MP4 under its final name, which plays while it grows; it cannot be resumed.",
        panel=FILE,
    )
    checkpoint_every: float = _option(
        30.0,
        "Seconds after which the state is saved, from which --resume goes on.",
        panel=FILE,
        minimum=0,
    )
    frames: Path | None = _option(
        None,
        "A new or empty folder for the frames as PNG files, beside the video.",
        panel=FILE,
        flag="--frames-folder",
    )

    def __post_init__(self) -> None:
        _check_values(self)
        if isinstance(self.frames, str):
            object.__setattr__(self, "frames", Path(self.frames))


def generate_options(values: Mapping[str, Any]) -> GenerateOptions:
    """The options of `AvatarPipeline.generate` and `stream`. Raises InputError: there is no such option, or
    not with this value."""
    known = [f.name for f in fields(GenerateOptions)]
    for name in values:
        check_name(name, known, "option")
    return GenerateOptions(**values)


def check_name(name: str, known: Sequence[str], what: str) -> None:
    """Raise InputError, which calls it `what`, unless a name is among those that are known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"there is no {what} {name}" + (f"; did you mean {near[0]}?" if near else ""))


def check_overlap(window: int, overlap: int) -> None:
    """Raise InputError unless `overlap` latent frames fit a window of `window` frames."""
    latents = (window - 1) // 4 + 1
    if not 2 <= overlap < latents:
        raise InputError(
            f"an overlap of {overlap} latent frames does not fit a window of {window} frames "
            f"({latents} latent frames): choose 2 to {latents - 1}"
        )


def choices_of(annotation: Any) -> tuple[str, ...]:
    """What a field of this type chooses from; nothing where it takes any value."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for part in get_args(annotation) for choice in choices_of(part))
    return ()


def _check_values(options: Any) -> None:
    types = get_type_hints(type(options))
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None:
            if type(None) not in _members(types[f.name]):
                raise InputError(f"{f.name.replace('_', ' ')} None: give a value, or leave it out")
            continue
        kinds = [kind for kind in (bool, int, float, str, Path) if kind in _members(types[f.name])]
        label = f.name.replace("_", " ")
        value = _as_pythons(value, kinds)
        if kinds and not _is_a(value, kinds):
            raise InputError(
                f"{label} {value!r} is not of type {' or '.join(kind.__name__ for kind in kinds)}"
            )
        if isinstance(value, str) and not _is_unicode(value):
            raise InputError(f"{label} {value!r} has what is no character: give it as UTF-8")
        object.__setattr__(options, f.name, value)
        choices = choices_of(types[f.name])
        if choices and value not in choices:
            raise InputError(f"{label} {value!r} is not known: choose one of {', '.join(choices)}")
        _check_range(f.name, value, f.metadata)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(hint) or (hint,)


def _as_pythons(value: Any, kinds: list[type[Any]]) -> Any:
    """A number of numpy, say, as Python's own; everything else as it is."""
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, Integral) and (int in kinds or float in kinds):
        return int(value)
    if isinstance(value, Real) and float in kinds:
        try:
            return float(value)
        except OverflowError:
            return value
    return value


def _is_unicode(text: str) -> bool:
    """Not of bytes that the command line could not read as its encoding has them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_a(value: Any, kinds: list[type[Any]]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    accepted: list[type[Any]] = [
        *kinds,
        *([int] if float in kinds else []),
        *([str] if Path in kinds else []),
    ]
    return isinstance(value, tuple(accepted))


def _check_range(name: str, value: Any, checks: Mapping[str, Any]) -> None:
    if isinstance(value, str | Path):
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
