"""Recipes: a training as a YAML file, every key of which is a field of a dataclass.

    extends: 1.3b-square.yaml     another recipe, of which this one says what differs
    model: ...                    ModelChoice
    data: ...                     DataChoice
    objective: ...                ObjectiveSettings
    trainer: ...                  TrainerSettings
    lora: ...                     LoraSettings, or nothing
    validation: ...               ValidationSettings, or nothing

Unknown keys, values of another type and out of range are refused, with the key's place.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from stableavatar.choices import ModelSize, StoredDtype, Variant
from stableavatar.data.dataset import ClipDatasetSettings
from stableavatar.errors import InputError
from stableavatar.training.lora import LoraSettings
from stableavatar.training.objective import ObjectiveSettings
from stableavatar.training.settings import TrainerSettings

_FORBID: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class EmbeddedModel:
    """The small model that ships in the package: transformer, prompt and portrait encoder, trained together.

    Attributes:
        heads: of 64 channels each.
        layers: blocks of the transformer.
        start: a folder with a `transformer`, `text_encoder` and `image_encoder` of these sizes to go on from,
            of which the transformer may know fewer latent channels; None: from scratch.
    """

    __pydantic_config__: ClassVar = _FORBID

    heads: int = 3
    layers: int = 6
    start: Path | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.layers < 1:
            raise InputError("model.embedded: heads and layers must be at least 1")


@dataclass(frozen=True)
class ModelChoice:
    """What is trained, and from where it starts.

    Attributes:
        source: a folder: the published checkpoints, or this project's own; `tiny` is the embedded model.
        size: of the published checkpoints, in parameters.
        variant: the published transformer that the training goes on from; None: the base video model, whose
            audio adapter starts anew.
        transformer: a transformer's file or folder to go on from, such as a training's export, in the
            variant's place.
        embedded: train a small model of these sizes instead; of `source` only `vae`, `speech_encoder` and,
            where there is one, `text_encoder` are taken, which stay as they are.
        dtype: of the weights; those that are trained need float32, those beside a LoRA do not.
        encoder_dtype: of the frozen encoders.
        offload_encoders: keep them in main memory between uses.
    """

    __pydantic_config__: ClassVar = _FORBID

    source: Path = Path("checkpoints")
    size: ModelSize = "1.3b"
    variant: Variant | None = None
    transformer: Path | None = None
    embedded: EmbeddedModel | None = None
    dtype: StoredDtype = "float32"
    encoder_dtype: StoredDtype = "bfloat16"
    offload_encoders: bool = False

    def __post_init__(self) -> None:
        if self.variant is not None and self.transformer is not None:
            raise InputError("model: give a variant or a transformer to go on from, not both")
        if self.embedded is not None and (self.variant is not None or self.transformer is not None):
            raise InputError(
                "model: an embedded model goes on from embedded.start, not variant or transformer"
            )


@dataclass(frozen=True)
class DataChoice:
    """Clips by path lists and folders, or a cache of what the encoders made of them.

    Attributes:
        lists: files with a clip folder a line.
        folders: below which every clip folder is taken.
        puppets: stores of rendered clips (`python -m stableavatar.data.puppets store`).
        cache: made by `stableavatar cache-latents`; clips and encoders are then not read.
        clips: how samples are drawn.
        sizes: of clips, "512x512" (width x height), that are trained on; others are refused, or left out
            where `clips.on_error` is `skip`. None: any.
        window_frames: with a cache: its samples, of `clips.frames`, are longer than what is trained on, which
            are windows of so many frames; one encoding of a clip then serves many.
    """

    __pydantic_config__: ClassVar = _FORBID

    lists: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    puppets: tuple[Path, ...] = ()
    cache: Path | None = None
    clips: ClipDatasetSettings = field(default_factory=ClipDatasetSettings)
    sizes: tuple[str, ...] | None = None
    window_frames: int | None = None

    def __post_init__(self) -> None:
        if not (self.lists or self.folders or self.puppets or self.cache):
            raise InputError("data: name lists, folders, puppets or a cache")
        for size in self.sizes or ():
            if not re.fullmatch("[0-9]+x[0-9]+", size):
                raise InputError(f"data.sizes are as 512x512, width and height, not {size!r}")

    @property
    def pixel_sizes(self) -> list[tuple[int, int]] | None:
        """`sizes` in numbers."""
        if self.sizes is None:
            return None
        pairs = (size.split("x") for size in self.sizes)
        return [(int(width), int(height)) for width, height in pairs]


@dataclass(frozen=True)
class ValidationCase:
    """A portrait that says a recording.

    Attributes:
        portrait: the picture's file.
        speech: the recording's.
        prompt: what is to be seen.
        seconds: of the recording, from its beginning; None: all of it.
    """

    __pydantic_config__: ClassVar = _FORBID

    portrait: Path
    speech: Path
    prompt: str = "The protagonist is talking"
    seconds: float | None = None


@dataclass(frozen=True)
class ValidationSettings:
    """Videos that the model as it stands makes every `trainer.callback_every` steps.

    Attributes:
        cases: who says what.
        options: of `generate` (`steps`, `width`, ...), which its checks hold for.
    """

    __pydantic_config__: ClassVar = _FORBID

    cases: tuple[ValidationCase, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A training, complete.

    Attributes:
        output: folder for checkpoints, log, validation videos and the result.
        trainer: how the loop runs.
        data: what is trained on.
        model: what is trained, and from where it starts.
        objective: what the loss is made of.
        lora: train factors beside frozen weights; None: train the weights.
        validation: videos made on the way; None: none.
    """

    __pydantic_config__: ClassVar = _FORBID

    output: Path
    trainer: TrainerSettings
    data: DataChoice
    model: ModelChoice = field(default_factory=ModelChoice)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    lora: LoraSettings | None = None
    validation: ValidationSettings | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.model.embedded is not None:
            raise InputError("model: a LoRA is trained beside a model that is there: leave embedded out")
        if self.lora is None and self.model.dtype != "float32":
            raise InputError("model: weights that are trained need dtype float32; those beside a LoRA do not")
        if not self.data.clips.masks and self.objective.mask_loss != "none":
            raise InputError(
                f"objective: mask_loss {self.objective.mask_loss} needs masks: set data.clips.masks, or "
                "mask_loss none"
            )
        if self.model.dtype != "float32" and self.trainer.precision == "fp32":
            raise InputError(f"model: dtype {self.model.dtype} needs trainer.precision bf16")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: of the YAML file; paths in it count from the working folder.
        overrides: such as `trainer.batch_size=2`, the value in YAML.

    Raises:
        InputError: the file or one that it extends cannot be read, or a value cannot be; with its place.
    """
    values = _read(path, ())
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            raise InputError(f"{override!r} sets nothing: write trainer.batch_size=2, for example")
        value = _parsed(text, f"the value of {name}")
        for key in reversed(name.split(".")):
            value = {key: value}
        values = _merged(values, value)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"recipe {path}: {place}: {_in_words(first)}{more}") from error
    except InputError as error:
        raise InputError(f"recipe {path}: {error}") from error


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read ({error})") from error
    values = _parsed(text, f"recipe {path}")
    if not isinstance(values, dict):
        raise InputError(f"recipe {path}: holds no settings")
    extends = values.pop("extends", None)
    if extends is None:
        return values
    base = path.parent / str(extends)
    if base in seen:
        raise InputError(f"recipe {path}: extends {base}, which extends it")
    return _merged(_read(base, (*seen, path)), values)


def _parsed(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mappings within each other."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value)
        result[key] = value
    return result


def _in_words(error: Mapping[str, Any]) -> str:
    if error["type"] == "unexpected_keyword_argument":
        return "there is no such setting"
    if error["type"] == "missing":
        return "is not given"
    return f"{error['msg']}, not {error['input']!r}"
