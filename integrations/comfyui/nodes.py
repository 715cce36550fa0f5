"""Nodes: load a model, put portrait and speech together, sample, decode. All they do is call the package.

Progress is shown on the node that works, and Cancel stops it within a step.
"""

from collections.abc import Callable
from typing import Any, ClassVar, get_args

import comfy.model_management
import comfy.utils
import numpy as np
import torch

from stableavatar import load
from stableavatar.choices import Offload
from stableavatar.media.audio import Speech
from stableavatar.options import GenerateOptions

CATEGORY = "StableAvatar"
PIPELINE, CONDITIONS, LATENTS = "STABLEAVATAR_PIPELINE", "STABLEAVATAR_CONDITIONS", "STABLEAVATAR_LATENTS"
_PARTS = 1000  # of a progress bar
_ORDER = "wavefront is smoother; causal is what streams of the server make, and repeats them."
_OFFLOAD = "What stays in main memory: the encoders, which act once a video, or all layers, which is slower."
# Else ComfyUI's page rounds to tenths: 29.97 frames a second would be 30.
_TO_A_THOUSANDTH = {"step": 0.001, "round": 0.001}
_TO_A_HUNDREDTH = {"step": 0.1, "round": 0.01}

Inputs = dict[str, dict[str, tuple[Any, ...]]]


class LoadStableAvatar:
    """A model, on its device."""

    RETURN_TYPES: ClassVar = (PIPELINE,)
    RETURN_NAMES: ClassVar = ("pipeline",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "tiny ships with the package; or a folder of weights, or a hub id."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802  (ComfyUI's name)
        """What the node asks for."""
        return {
            "required": {
                "model": ("STRING", {"default": "tiny", "tooltip": "tiny, a folder of weights, or a hub id"}),
                "variant": (["default", "square", "rec-vec"], {"tooltip": "Of published weights alone."}),
                "dtype": (["auto", "float32", "bfloat16", "float16"], {"default": "auto"}),
            },
            "optional": {
                "lora": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "FILE or FILE:SCALE, one a line"},
                ),
                "size": (["default", "1.3b", "14b"], {"tooltip": "Of published weights alone."}),
                "offload": (list(get_args(Offload)), {"tooltip": _OFFLOAD}),
            },
        }

    def load(
        self,
        model: str,
        variant: str,
        dtype: str,
        lora: str = "",
        size: str = "default",
        offload: Offload = "none",
    ) -> tuple[Any]:
        """Load it where ComfyUI computes, in place of the models that are there."""
        files = [line.strip() for line in lora.splitlines() if line.strip()]
        published = {
            name: value for name, value in (("variant", variant), ("size", size)) if value != "default"
        }
        comfy.model_management.unload_all_models()
        device = str(comfy.model_management.get_torch_device())
        return (load(model, device=device, dtype=dtype, lora=files, offload=offload, **published),)


class StableAvatarConditions:
    """Portrait, speech and what is to be seen."""

    RETURN_TYPES: ClassVar = (CONDITIONS,)
    RETURN_NAMES: ClassVar = ("conditions",)
    FUNCTION = "condition"
    CATEGORY = CATEGORY
    DESCRIPTION = "A portrait, a recording, and a sentence: first frame - behaviour - background."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """What the node asks for."""
        return {
            "required": {
                "portrait": ("IMAGE",),
                "prompt": ("STRING", {"default": _default("prompt"), "multiline": True}),
                "width": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2048, "step": 16, "tooltip": "0: as trained"},
                ),
                "height": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2048, "step": 16, "tooltip": "0: as trained"},
                ),
                "fps": ("FLOAT", {"default": 25.0, "min": 1.0, "max": 120.0, **_TO_A_THOUSANDTH}),
                "duration": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 86400.0,
                        "tooltip": "0: as the speech",
                        **_TO_A_THOUSANDTH,
                    },
                ),
            },
            "optional": {
                "speech": ("AUDIO",),
                "negative_prompt": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "empty: the model's own"},
                ),
            },
        }

    def condition(
        self,
        portrait: torch.Tensor,
        prompt: str,
        width: int,
        height: int,
        fps: float,
        duration: float,
        speech: dict[str, Any] | None = None,
        negative_prompt: str = "",
    ) -> tuple[dict[str, Any]]:
        """ComfyUI's picture and sound as the package takes them."""
        picture = (portrait[0, ..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        samples = None
        if speech is not None:
            waveform = speech["waveform"][0].float().cpu().numpy().T  # [samples, channels]
            with Speech.from_array(np.ascontiguousarray(waveform), int(speech["sample_rate"])) as heard:
                samples = heard.samples(0, len(heard))
        options: dict[str, Any] = {"prompt": prompt, "fps": fps}
        if width or height:  # of one alone the package says what is missing
            options |= {"width": width or None, "height": height or None}
        if duration:
            options["duration"] = duration
        if negative_prompt.strip():
            options["negative_prompt"] = negative_prompt
        return ({"portrait": picture, "speech": samples, "options": options},)


class StableAvatarSample:
    """Latents of the whole video."""

    RETURN_TYPES: ClassVar = (LATENTS,)
    RETURN_NAMES: ClassVar = ("latents",)
    FUNCTION = "sample"
    CATEGORY = CATEGORY
    DESCRIPTION = "0 stands for the model's own setting."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """What the node asks for."""
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "conditions": (CONDITIONS,),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1, "control_after_generate": True}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 200, "tooltip": _help("steps")}),
                "text_scale": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 20.0,
                        "tooltip": _help("text_scale"),
                        **_TO_A_HUNDREDTH,
                    },
                ),
                "audio_scale": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 20.0,
                        "tooltip": _help("audio_scale"),
                        **_TO_A_HUNDREDTH,
                    },
                ),
                "overlap": ("INT", {"default": 0, "min": 0, "max": 40, "tooltip": _help("overlap")}),
                "order": (["wavefront", "causal"], {"default": "wavefront", "tooltip": _ORDER}),
            },
            "optional": {
                "window": ("INT", {"default": 0, "min": 0, "max": 161, "tooltip": _help("window")}),
                "decoder_tiling": ("BOOLEAN", {"default": False, "tooltip": _help("decoder_tiling")}),
            },
        }

    def sample(
        self,
        pipeline: Any,
        conditions: dict[str, Any],
        seed: int,
        steps: int,
        text_scale: float,
        audio_scale: float,
        overlap: int,
        order: str,
        window: int = 0,
        decoder_tiling: bool = False,
    ) -> tuple[Any]:
        """Denoise every window."""
        chosen = {
            "steps": steps,
            "text_scale": text_scale,
            "audio_scale": audio_scale,
            "overlap": overlap,
            "window": window,
            "decoder_tiling": decoder_tiling,
        }
        made = pipeline.sample_latents(
            conditions["portrait"],
            conditions["speech"],
            seed=seed,
            order=order,
            progress=_shown(),
            **conditions["options"],
            **{name: value for name, value in chosen.items() if value},
        )
        return (made,)


class StableAvatarDecode:
    """Latents into pictures."""

    RETURN_TYPES: ClassVar = ("IMAGE", "FLOAT")
    RETURN_NAMES: ClassVar = ("images", "fps")
    FUNCTION = "decode"
    CATEGORY = CATEGORY
    DESCRIPTION = "Every frame, and frames a second, for Create Video."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """What the node asks for."""
        return {"required": {"pipeline": (PIPELINE,), "latents": (LATENTS,)}}

    def decode(self, pipeline: Any, latents: Any) -> tuple[torch.Tensor, float]:
        """ComfyUI's pictures, float32 `[frames, height, width, 3]` in 0 to 1."""
        options = latents.options
        images = torch.empty(latents.frame_count, options.height, options.width, 3)
        bar = comfy.utils.ProgressBar(latents.frame_count)
        for number, frame in enumerate(pipeline.decode_latents(latents)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            images[number] = torch.from_numpy(frame).float() / 255
            bar.update_absolute(number + 1)
        return images, float(latents.frame_rate)


def _shown() -> Callable[[Any], None]:
    """Progress on the node, and an end where Cancel was pressed."""
    bar = comfy.utils.ProgressBar(_PARTS)

    def show(progress: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(round(_PARTS * (progress.share or 0.0)), _PARTS)

    return show


def _default(name: str) -> Any:
    return GenerateOptions.__dataclass_fields__[name].default


def _help(name: str) -> str:
    return str(GenerateOptions.__dataclass_fields__[name].metadata["help"])


NODE_CLASS_MAPPINGS = {
    "LoadStableAvatar": LoadStableAvatar,
    "StableAvatarConditions": StableAvatarConditions,
    "StableAvatarSample": StableAvatarSample,
    "StableAvatarDecode": StableAvatarDecode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadStableAvatar": "Load StableAvatar",
    "StableAvatarConditions": "StableAvatar Conditions",
    "StableAvatarSample": "StableAvatar Sample",
    "StableAvatarDecode": "StableAvatar Decode",
}
