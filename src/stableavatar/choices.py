"""The values that options choose from.

They stand apart from the code that acts on them, so that options can be read, checked and explained without
waiting for torch.
"""

from typing import Literal

Fit = Literal["crop", "pad", "stretch"]
Aspect = Literal["auto", "square", "tall", "wide"]
GuidanceRule = Literal["three-branch", "audio-native"]
OverlapWeights = Literal["uniform", "log"]
NoAudio = Literal["output", "input"]
SpeechNormalisation = Literal["window", "recording"]
Order = Literal["lockstep", "wavefront", "causal"]
Compat = Literal["upstream"]
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
]
Variant = Literal["square", "rec-vec"]
ModelSize = Literal["1.3b", "14b"]
StoredDtype = Literal["float32", "bfloat16", "float16"]
Dtype = Literal["auto", StoredDtype]
Offload = Literal["none", "encoders", "layers"]
