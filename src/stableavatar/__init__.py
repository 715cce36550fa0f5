"""From one portrait and a recording to a talking video of any length.

import stableavatar

stableavatar.generate("portrait.png", "speech.wav", "out.mp4")

pipeline = stableavatar.load("tiny")  # or a folder, or a hub id
for frame in pipeline.stream("portrait.png", "speech.wav", prompt="..."):
    ...  # uint8 [height, width, 3]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stableavatar.models.transformer import StableAvatarTransformer3DModel
    from stableavatar.options import GenerateOptions, OutputOptions
    from stableavatar.pipeline import AvatarPipeline, generate, load

__version__ = "0.1.0"
__all__ = [
    "AvatarPipeline",
    "GenerateOptions",
    "OutputOptions",
    "StableAvatarTransformer3DModel",
    "__version__",
    "generate",
    "load",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `stableavatar --help` need not wait for torch.
    if name in ("AvatarPipeline", "generate", "load"):
        from stableavatar import pipeline

        return getattr(pipeline, name)
    if name in ("GenerateOptions", "OutputOptions"):
        from stableavatar import options

        return getattr(options, name)
    if name == "StableAvatarTransformer3DModel":  # by this name model_index.json finds the class
        from stableavatar.models.transformer import StableAvatarTransformer3DModel

        return StableAvatarTransformer3DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
