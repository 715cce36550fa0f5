"""How much fine detail pictures have, band by band: what the autoencoder's loss holds against the truth."""

import torch
import torch.nn.functional as F


def detail(clips: torch.Tensor) -> torch.Tensor:
    """How much fine detail there is around each place of clips [B, 3, F, H, W], sides in fours, at least 16:
    [B, 12, F, H/4-3, W/4-3].

    Brightness in blocks of 2x2 pixels, laid in each of the four ways, split into three bands (Haar's:
    from above to below, from left to right, across); of each the root mean square over 7x7 blocks. Errors
    of pixels alone are smallest where hair and cloth, whose place the latents cannot tell, are left smooth;
    this one is smallest where they have as much detail as the truth. Bands and ways stand for themselves:
    a sum of them is won cheapest by a weave of pixels, which a decoder that draws 2x2 at a time has at hand.
    The error is squared, for how much detail there is is not known to the pixel either, and the middle of
    what may be there (which absolute errors ask for) is less than its mean.
    """
    grey = clips.mean(dim=1)
    height, width = grey.shape[-2] - 2, grey.shape[-1] - 2
    energies = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        laid = grey[..., down : down + height, right : right + width]
        first, second = laid[..., ::2, ::2], laid[..., ::2, 1::2]
        third, fourth = laid[..., 1::2, ::2], laid[..., 1::2, 1::2]
        energies += [
            (first + second - third - fourth).square(),
            (first - second + third - fourth).square(),
            # In pictures a third of the others.
            (3 * (first - second - third + fourth)).square(),
        ]
    energy = F.avg_pool3d(torch.stack(energies, dim=1), (1, 7, 7), stride=(1, 2, 2))
    # A step of one level of 255: below it detail is rounding.
    return (energy + 1 / 127.5**2).sqrt()
