"""Options of a command out of the fields of a dataclass, and a command line out of their values.

A field's name, type and default, and the help, heading and flag in its metadata, are written once, where the
dataclass is; see `stableavatar.options`.
"""

import functools
import inspect
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from stableavatar.errors import InputError
from stableavatar.options import GenerateOptions, OutputOptions

# Options of the command line that belong to no dataclass, as a video's metadata names them.
_MODEL_SETTINGS = ("model", "variant", "model_size", "dtype")


def with_fields(function: Callable[..., None]) -> Callable[..., None]:
    """A command that has every field of its dataclass parameters as an option, and gets them as objects.

    @app.command()
    @with_fields
    def generate(portrait: Path, options: GenerateOptions) -> None: ...
    """
    hints = get_type_hints(function, include_extras=True)
    kinds: dict[str, type[Any]] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in kinds:
            parameters += _parameters(hints[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        objects = {
            name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in kinds.items()
        }
        function(**values, **objects)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def flag_of(field: "Field[Any]") -> str:
    """How a field is called on the command line: ``--text-scale`` for text_scale."""
    flag: str = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
    return flag


def parse_size(size: str) -> tuple[int, int]:
    """Width and height in pixels out of ``512x512``.

    Raises:
        InputError: it is not of this form.
    """
    width, _, height = size.lower().replace("×", "x").partition("x")
    if not (width.strip().isdecimal() and height.strip().isdecimal()):
        raise InputError(f"size {size!r} is not understood: give width and height in pixels, such as 512x512")
    return int(width), int(height)


def stored_settings(video: Path) -> dict[str, Any]:
    """The settings that `AvatarPipeline.generate` wrote into a video, and the version that made it.

    Raises:
        InputError: the file cannot be read, or holds no settings.
    """
    from stableavatar.media.reading import METADATA_KEY, read_metadata  # FFmpeg, which help need not wait for

    try:
        settings = json.loads(read_metadata(video)[METADATA_KEY])
    except (KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{video}: holds no settings. It was not made by stableavatar, or a program that changed it took "
            "them out."
        ) from error
    return dict(settings)


def repeating_command(settings: Mapping[str, Any]) -> str:
    """The command that makes a video with these settings; the names of the files stand in capitals.

    Args:
        settings: what is in a video's metadata: the model, its variant, size, dtype and LoRAs, and values of
            `GenerateOptions` and `OutputOptions`, of which those that are the default are left out. Names
            that no option has are ignored.
    """
    words = ["stableavatar", "generate", "PORTRAIT", "SPEECH", "-o", "OUT.mp4"]
    for name in _MODEL_SETTINGS:
        if settings.get(name):
            words += ["--" + name.replace("_", "-"), str(settings[name])]
    for file in settings.get("lora") or ():
        words += ["--lora", str(file)]
    if settings.get("width") and settings.get("height"):
        words += ["--size", f"{settings['width']}x{settings['height']}"]
    for field in (*fields(GenerateOptions), *fields(OutputOptions)):
        value = settings.get(field.name)
        if field.name not in ("width", "height") and value is not None and value != field.default:
            words += [flag_of(field)] if value is True else [flag_of(field), str(value)]
    return shlex.join(words)


def _parameters(kind: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        option = typer.Option(
            flag_of(field), help=field.metadata["help"], rich_help_panel=field.metadata["panel"]
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=Annotated[hints[field.name], option],
        )
