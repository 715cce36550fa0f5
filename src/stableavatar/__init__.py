"""From one portrait and a recording to a talking video of any length.

import stableavatar

stableavatar.generate("portrait.png", "speech.wav", "out.mp4")

pipeline = stableavatar.load("tiny")  # or a folder, or a hub id
for frame in pipeline.stream("portrait.png", "speech.wav", prompt="..."):
    ...  # uint8 [height, width, 3]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stableavatar.errors import (
        CheckpointError,
        InputError,
        ProcessError,
        SamplingError,
        StableAvatarError,
        StoppedError,
        StorageError,
    )
    from stableavatar.generation import Progress
    from stableavatar.media.live import LiveRecording
    from stableavatar.models.transformer import StableAvatarTransformer3DModel
    from stableavatar.options import GenerateOptions, OutputOptions
    from stableavatar.pipeline import AvatarPipeline, generate, load
    from stableavatar.streams import AvatarLatents, AvatarStream, AvatarVideo
    from stableavatar.writing import GeneratedVideo

__version__ = "0.1.0"
__all__ = [
    "AvatarLatents",
    "AvatarPipeline",
    "AvatarStream",
    "AvatarVideo",
    "CheckpointError",
    "GenerateOptions",
    "GeneratedVideo",
    "InputError",
    "LiveRecording",
    "OutputOptions",
    "ProcessError",
    "Progress",
    "SamplingError",
    "StableAvatarError",
    "StableAvatarTransformer3DModel",
    "StoppedError",
    "StorageError",
    "__version__",
    "generate",
    "load",
]

# Imported when asked for: `stableavatar --help` need not wait for torch. The transformer's class is here for
# model_index.json, which finds it by this name.
_MODULES = {
    "AvatarLatents": "streams",
    "AvatarPipeline": "pipeline",
    "AvatarStream": "streams",
    "AvatarVideo": "streams",
    "CheckpointError": "errors",
    "GenerateOptions": "options",
    "GeneratedVideo": "writing",
    "InputError": "errors",
    "LiveRecording": "media.live",
    "OutputOptions": "options",
    "ProcessError": "errors",
    "Progress": "generation",
    "SamplingError": "errors",
    "StableAvatarError": "errors",
    "StableAvatarTransformer3DModel": "models.transformer",
    "StoppedError": "errors",
    "StorageError": "errors",
    "generate": "pipeline",
    "load": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
