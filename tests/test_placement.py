"""What is applied to a model from outside: the same numbers, by a shorter way."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch.profiler import ProfilerActivity, profile

from stableavatar.pipeline import AvatarPipeline
from stableavatar.placement.slow_kernels import (
    ONEDNN_SIZE,
    QuickRMSNorm,
    SmallCausalConv3d,
    avoid_slow_kernels,
)
from stableavatar.sampling.decoding import stream_decode

SLOW = "aten::slow_conv3d"


def convolution(**options) -> WanCausalConv3d:
    torch.manual_seed(0)
    return WanCausalConv3d(6, 10, **options)


def kernels(work: Callable[..., object], *inputs: torch.Tensor) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
        work(*inputs)
    return {event.key for event in seen.key_averages()}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
        {"kernel_size": (3, 1, 1), "stride": (2, 1, 1)},
        {"kernel_size": 3, "stride": (2, 2, 2), "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "memory": 2},
        {"kernel_size": 3, "padding": 1, "memory": 1},
    ],
)
def test_small_convolutions_give_the_same_numbers(options: dict) -> None:
    memory = options.pop("memory", None)
    inputs = [torch.randn(1, 6, 7, 9, 11)]
    if memory:
        inputs.append(torch.randn(1, 6, memory, 9, 11))
    module = convolution(**options)
    expected = module(*inputs)
    avoid_slow_kernels(module)
    assert type(module) is SmallCausalConv3d
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-5, atol=1e-6)
    assert not any(key.startswith(SLOW) for key in kernels(module, *inputs))


def test_torch_still_has_the_slow_path_and_its_limit() -> None:
    """If this fails, torch has changed, and `placement.slow_kernels` may be of no use any more."""
    module = convolution(kernel_size=3, padding=1)
    below, above = torch.randn(1, 6, 2, 48, 48), torch.randn(1, 6, 70, 49, 8)
    assert ONEDNN_SIZE < 6 * 72 * 51
    assert any(key.startswith(SLOW) for key in kernels(module, below))
    assert not any(key.startswith(SLOW) for key in kernels(module, above))


def test_gradients_and_other_inputs_are_as_before() -> None:
    module, small = convolution(kernel_size=3, padding=1), convolution(kernel_size=3, padding=1)
    avoid_slow_kernels(small)
    clip = torch.randn(1, 6, 4, 8, 8)
    for one in (module, small):
        one(clip).square().mean().backward()
    torch.testing.assert_close(small.weight.grad, module.weight.grad)
    torch.testing.assert_close(small.bias.grad, module.bias.grad)
    for other in (torch.randn(2, 6, 4, 8, 8), torch.randn(1, 6, 60, 80, 8)):
        torch.testing.assert_close(small(other), module(other), rtol=0, atol=0)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_give_the_same_numbers(images: bool, bias: bool) -> None:
    torch.manual_seed(0)
    norm = WanRMS_norm(8, images=images, bias=bias)
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2)
    shape = (2, 8, 5, 4) if images else (2, 8, 3, 5, 4)
    pictures = [
        torch.randn(shape),
        torch.zeros(shape),
        torch.full(shape, 1e-14),
        torch.randn(shape).bfloat16(),
    ]
    expected = [norm(picture) for picture in pictures]
    avoid_slow_kernels(norm)
    assert type(norm) is QuickRMSNorm
    for picture, wanted in zip(pictures, expected, strict=True):
        torch.testing.assert_close(norm(picture), wanted, rtol=1e-6, atol=1e-6)
    assert not any("norm" in key for key in kernels(norm, pictures[0]))


def test_a_pipeline_decodes_without_the_slow_path() -> None:
    vae = AvatarPipeline.from_pretrained("tiny").vae
    latents = torch.randn(vae.config.z_dim, 3, 16, 16)

    def decode() -> None:
        assert len(list(stream_decode(vae, latents.unbind(1)))) == 9

    assert not any(key.startswith(SLOW) for key in kernels(decode))
