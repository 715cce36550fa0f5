"""Parts of a pipeline that lie in main memory, and come to the device a layer at a time while they compute.

Frames are those of a pipeline that lies on the device as a whole.
"""

from typing import TYPE_CHECKING

import torch

from stableavatar.choices import Offload
from stableavatar.errors import InputError

if TYPE_CHECKING:
    from stableavatar.pipeline import AvatarPipeline

# What stays on the device. The encoders of prompt and portrait, three quarters of the published weights, act
# once a video; these act all through it.
STAYING: dict[Offload, tuple[str, ...]] = {
    "encoders": ("transformer", "vae", "speech_encoder"),
    "layers": (),
}


def check_offload(offload: str, decoder_device: str | None = None) -> None:
    """Raises InputError: an unknown name, or one that leaves no choice of the decoder's device."""
    if offload != "none" and offload not in STAYING:
        raise InputError(f"unknown offload {offload!r}: choose none, {', '.join(STAYING)}")
    if offload == "layers" and decoder_device is not None:
        raise InputError(
            "offload layers and a decoder device cannot be used together: the autoencoder's layers come to "
            "the device too. Choose offload encoders, or leave the decoder device out."
        )


def put_on(pipeline: "AvatarPipeline", device: torch.device, offload: Offload) -> "AvatarPipeline":
    """The pipeline, with what `offload` leaves there on the device, and hooks that bring the rest.

    Args:
        pipeline: as a whole on the CPU. offload: "none", "encoders" or "layers".
    """
    if offload == "none":
        return pipeline.to(device)
    # Without streams: they load ahead in the order of the first pass, and the transformer's later passes
    # leave out what its context cache holds.
    pipeline.enable_group_offload(
        onload_device=device, offload_type="leaf_level", exclude_modules=list(STAYING[offload])
    )
    return pipeline
