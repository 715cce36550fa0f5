"""Parts of a pipeline that lie in main memory, and come to the device a layer at a time while they compute.

Frames are those of a pipeline that lies on the device as a whole.
"""

from typing import TYPE_CHECKING

import torch

from stableavatar.choices import Offload
from stableavatar.errors import InputError
from stableavatar.placement.device import choose_device

if TYPE_CHECKING:
    from stableavatar.pipeline import AvatarPipeline

# What stays on the device. The encoders of prompt and portrait, three quarters of the published weights, act
# once a video; these act all through it.
STAYING: dict[Offload, tuple[str, ...]] = {
    "encoders": ("transformer", "vae", "speech_encoder"),
    "layers": (),
}


def check_placement(offload: str, decoder_device: str | None = None) -> None:
    """To be called before a large model is read.

    Raises:
        InputError: an unknown way of offloading, a decoder's device that is not there, or both together where
            that leaves no choice of the device.
    """
    if decoder_device is not None:
        choose_device(decoder_device)
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
