"""A model's own settings for sampling, read without loading it."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from stableavatar.checkpoints import hub
from stableavatar.checkpoints.files import read_json
from stableavatar.checkpoints.layout import MODEL_INDEX, model_folder
from stableavatar.errors import CheckpointError, InputError
from stableavatar.options import STEP_CACHE_COEFFICIENTS, GenerateOptions, SamplingDefaults

# Which aspects the published transformers were trained at; those of 14B at every one.
_TRAINED_AT: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("1.3b", "square"): ("square",),
    ("1.3b", "rec-vec"): ("tall", "wide"),
}


def sampling_defaults(variant: str | None, size: str) -> dict[str, Any]:
    """What a published transformer's own settings differ in from `SamplingDefaults`: trained sizes, and the
    step cache's polynomial. Of no variant, such as the outcome of a training, the sizes are not known.
    """
    made: dict[str, Any] = {}
    if variant is not None and (aspects := _TRAINED_AT.get((size, variant))) is not None:
        made["sizes"] = {aspect: SamplingDefaults().sizes[aspect] for aspect in aspects}
    if (coefficients := STEP_CACHE_COEFFICIENTS[size]) != SamplingDefaults().step_cache_coefficients:
        made["step_cache_coefficients"] = coefficients
    return made


def read_defaults(
    source: str | Path, *, variant: str | None = None, size: str | None = None
) -> SamplingDefaults:
    """The settings of the model that `stableavatar.load` makes of the same arguments.

    Of a hub id, `model_index.json` is fetched. What is neither "tiny" nor of this project's layout is taken
    for published checkpoints, whether they are on the disk or not.

    Raises:
        CheckpointError: its `model_index.json` is damaged, or names settings that cannot be.
    """
    folder = model_folder(source)
    index = folder / MODEL_INDEX if folder.exists() else hub.model_index(str(source))
    if index is None or not index.is_file():
        return SamplingDefaults(**sampling_defaults(variant or "square", size or "1.3b"))
    return check_defaults(index, read_json(index).get("sampling_defaults"))


def check_defaults(file: Path, defaults: Any) -> SamplingDefaults:
    """A model's settings as they stand in `file`: known names, of the right type, and within their bounds;
    None gives the published models'.

    Raises:
        CheckpointError: they are not that.
    """
    if defaults is None:
        return SamplingDefaults()
    if not isinstance(defaults, dict):
        raise CheckpointError(f"{file}: sampling_defaults is no object of names and values; correct it")
    known = [f.name for f in fields(SamplingDefaults)]
    if unknown := [key for key in defaults if key not in known]:
        raise CheckpointError(
            f"{file}: sampling_defaults has the unknown setting {', '.join(unknown)}; known are "
            f"{', '.join(known)}. Remove it, or get the release that the model was made with"
        )
    types = get_type_hints(SamplingDefaults)
    for key, value in defaults.items():
        kind = get_origin(types[key]) or types[key]
        allowed = {float: int | float, tuple: list | tuple}.get(kind, kind)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise CheckpointError(f"{file}: sampling_defaults has {key} = {value!r}, not a value for it")
    try:
        whole = SamplingDefaults(**defaults)
        if not whole.sizes:
            raise ValueError("there are no sizes")
        own = ("sizes", "step_cache_coefficients")
        others = {name: getattr(whole, name) for name in known if name not in own}
        for width, height in whole.sizes.values():
            GenerateOptions(width=width, height=height, **others)
    except (InputError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file}: nothing can be sampled with its sampling_defaults ({reason}); correct them, or get the "
            "file again"
        ) from error
    return whole
