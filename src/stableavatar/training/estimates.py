"""Memory and time of recipes, computed from sizes; nothing here is measured.

python -m stableavatar.training.estimates --out docs/scaling.md
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stableavatar.config import SIZES
from stableavatar.data.clips import SHAPES
from stableavatar.errors import InputError, with_status
from stableavatar.evaluation.report import put_between
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.lora import LoraSettings, add_lora
from stableavatar.training.parameters import freeze_others, trained_by_recipe
from stableavatar.training.recipes import Recipe, load_recipe

GIBIBYTE = 2**30
# What is assumed of a GPU, and how much of its products' rate a training reaches.
GPU_TFLOPS = 312  # bfloat16, dense, of an A100
REACHED = 0.4
START, END = (
    "<!-- estimates: written by stableavatar.training.estimates -->",
    "<!-- end of estimates -->",
)


@dataclass(frozen=True)
class Estimate:
    """Of one recipe on a number of GPUs, per GPU.

    Attributes:
        weights, gradients, optimizer, average, activations: bytes.
        operations: multiplications and additions of a clip's forward pass, again where it is recomputed, and
            of its backward pass: as many for what flows through, and as many for weights that are trained.
        trained: parameters.
        loaded: bytes of the transformer as a process reads it, before it is spread.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    operations: float
    trained: int
    loaded: float

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def seconds(self, clips: int) -> float:
        """Of a step of so many clips on the assumed GPU."""
        return clips * self.operations / (GPU_TFLOPS * 1e12 * REACHED)


def estimate(recipe: Recipe, gpus: int) -> Estimate:
    """Compute the estimate of a recipe for its largest clips.

    Weights, gradients and states lie on every GPU, or are spread over them (FSDP2), whole only for the block
    that runs and for what is not in blocks. Of activations what autograd keeps is counted; with gradient
    checkpointing the input of every block, the audio adapter's too, and what is within a block one at a time.

    Raises:
        InputError: the recipe trains the embedded model, whose sizes are not among those of `config.SIZES`.
    """
    if _is_embedded(recipe):
        raise InputError("estimates are of the published sizes")
    settings = SIZES[recipe.model.size].transformer
    with torch.device("meta"):
        model = StableAvatarTransformer3DModel(**settings)
    _train_as(model, recipe.lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    of_frozen = 2 if recipe.model.dtype == "bfloat16" else 4
    of_optimizer = 2 if recipe.trainer.optimizer.kind == "adamw-8bit" else 8
    share = gpus if recipe.trainer.sharding == "fsdp2" else 1
    block = sum(p.numel() for p in model.blocks[0].parameters())
    outside = trained + frozen - sum(p.numel() for p in model.blocks.parameters())
    frames = (recipe.data.clips.frames - 1) // 4 + 1
    shapes = {
        shape for path in recipe.data.lists for name, shape in SHAPES.items() if f"_{name}_" in path.name
    }
    width, height = max(shapes or {SHAPES["square"]}, key=lambda shape: shape[0] * shape[1])
    clips = recipe.trainer.batch_size
    recomputed = recipe.trainer.gradient_checkpointing
    outer, blocks = _activations(
        recipe.model.size, frames, height // 8, width // 8, _features(recipe), recipe.lora
    )
    if recomputed:
        activations = outer + sum(it.between * it.count for it in blocks) + max(it.inside for it in blocks)
    else:
        activations = outer + sum(it.inside * it.count for it in blocks)
    passes = 1 + recomputed + (1 if recipe.lora is not None else 2)
    spread = 1 / share
    return Estimate(
        weights=(4 * trained + of_frozen * frozen) * spread
        + (4 * (block + outside) if share > 1 else 0)
        + 2 * block,
        gradients=4 * trained * spread,
        optimizer=of_optimizer * trained * spread,
        average=4 * trained * spread if recipe.trainer.ema_decay else 0.0,
        activations=clips * activations,
        operations=passes
        * _forward_operations(recipe.model.size, frames, height // 8, width // 8, _features(recipe)),
        trained=trained,
        loaded=4 * trained + of_frozen * frozen,
    )


def _is_embedded(recipe: Recipe) -> bool:
    return recipe.model.embedded is not None or str(recipe.model.source) == "tiny"


def _features(recipe: Recipe) -> int:
    """Speech features of a clip."""
    return int(recipe.data.clips.frames / 25 * 50)


def _train_as(model: StableAvatarTransformer3DModel, lora: LoraSettings | None) -> None:
    if lora is not None:
        add_lora(model, lora)
    else:
        freeze_others(model, trained_by_recipe)


def _sizes(size: str) -> dict[str, Any]:
    """The transformer's settings, those that follow from others filled in."""
    with torch.device("meta"):
        config = StableAvatarTransformer3DModel(**{**SIZES[size].transformer, "num_layers": 0}).config
    return {**config, "num_layers": SIZES[size].transformer["num_layers"]}


def _inputs(
    config: Mapping[str, Any], frames: int, height: int, width: int, features: int
) -> list[torch.Tensor]:
    shapes = (
        (1, config["out_channels"], frames, height, width),
        (1, config["in_channels"] - config["out_channels"], frames, height, width),
        (1,),
        (1, config["text_length"], config["text_dim"]),
        (1, 257, config["image_dim"]),
        (1, features, config["audio_dim"]),
    )
    return [torch.zeros(shape) for shape in shapes]


def _pretend(model: nn.Module) -> None:
    """Parameters on "meta" into such as claim to lie on a CPU, where there is autocast; within a
    FakeTensorMode."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                made = torch.zeros(value.shape, dtype=value.dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=value.requires_grad)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a kind, how many there are, and bytes: that the backward pass needs of what is within one,
    and of its input."""

    count: int
    inside: int
    between: int


@functools.cache
def _activations(
    size: str, frames: int, height: int, width: int, features: int, lora: LoraSettings | None
) -> tuple[int, tuple[_Blocks, _Blocks]]:
    """Bytes that the backward pass of a clip needs, of what autograd keeps in bfloat16, outside all blocks;
    and the transformer's blocks and the audio adapter's."""
    clip = frames, height, width, features
    config = _sizes(size)
    counts = {name: config[name] for name in ("num_layers", "audio_layers")}
    one, inputs = _kept({**config, **dict.fromkeys(counts, 1)}, lora, clip)
    blocks = []
    for (name, count), between in zip(counts.items(), inputs, strict=True):
        two, _ = _kept({**config, **dict.fromkeys(counts, 1), name: 2}, lora, clip)
        blocks.append(_Blocks(count, two - one, between))
    return one - sum(it.inside for it in blocks), (blocks[0], blocks[1])


def _kept(
    config: Mapping[str, Any], lora: LoraSettings | None, clip: tuple[int, int, int, int]
) -> tuple[int, list[int]]:
    """Bytes that autograd keeps of a forward pass, and of the inputs of a block and of one of the audio
    adapter's."""
    with torch.device("meta"):
        model = StableAvatarTransformer3DModel.from_config(config)
        _train_as(model, lora)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend(model)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, Any] = {}
        inputs: dict[str, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        for name, blocks in (("video", model.blocks), ("audio", model.vocal_projector.blocks)):
            blocks[0].register_forward_pre_hook(
                lambda _, given, name=name: inputs.__setitem__(name, given[0].nbytes)
            )
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        ):
            model(*_inputs(config, *clip))
        return sum(storage.nbytes() for storage in kept.values()), [inputs["video"], inputs["audio"]]


@functools.cache
@torch.no_grad()
def _forward_operations(size: str, frames: int, height: int, width: int, features: int) -> float:
    config = _sizes(size)
    # Tensors without values, that claim to lie on a CPU: there is no autocast, which the model switches off
    # in places, for those that say they have none. A CPU's attention is not among what the counter knows.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False, custom_mapping=attention) as counter,
    ):
        counted = StableAvatarTransformer3DModel.from_config(config)
        counted(*_inputs(config, frames, height, width, features))
    return float(counter.get_total_flops())


def _attention_operations(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object
) -> int:
    """Of shapes [B, heads, n, D], [B, heads, m, D] and [B, heads, m, E]: every query by every key, and every
    weight by every value."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def table(folder: Path, gpus: Sequence[int]) -> str:
    """The text with the table, of every recipe in a folder."""
    headings = [
        "recipe", "GPUs", "trained, millions", "weights", "gradients", "optimizer", "activations",
        "GiB in all", "PFLOP a clip", "seconds a step", "days", "GiB of main memory",
    ]  # fmt: skip
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    for path in sorted(folder.glob("*.yaml")):
        recipe = load_recipe(path)
        if _is_embedded(recipe):
            continue
        spread = recipe.trainer.sharding == "fsdp2"
        for count in gpus if spread else [1]:
            found = estimate(recipe, count)
            seconds = found.seconds(recipe.trainer.batch_size * recipe.trainer.accumulation)
            sizes = (found.weights, found.gradients, found.optimizer, found.activations, found.memory)
            cells = [
                path.stem,
                str(count) if spread else "any",
                f"{found.trained / 1e6:,.0f}",
                *(f"{size / GIBIBYTE:,.1f}" for size in sizes),
                f"{found.operations / 1e15:.2f}",
                f"{seconds:.1f}",
                f"{seconds * recipe.trainer.steps / 86_400:.1f}",
                f"{found.loaded / GIBIBYTE:,.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "Computed from sizes, not measured; GiB a GPU, for the recipe's largest clips.",
            "",
            "- Left out: the encoders (cache-latents, or offload_encoders, with which every process keeps "
            "them in main memory), what the CUDA libraries take, and what is sent between GPUs.",
            "- Operations are counted of a forward pass, times four: it is computed anew for the gradients, "
            "which cost two more. For a LoRA times three.",
            f"- Seconds at {REACHED:.0%} of {GPU_TFLOPS} TFLOP/s; days of the recipe's steps.",
            "- Main memory is what is read of the transformer at the start: where trainer.sharding is fsdp2 "
            "(the lines with a number of GPUs) by the first process alone, else, with DeepSpeed and "
            "accelerate's FSDP too, by every process. GGUF and 8-bit files are expanded by every process.",
            "",
            *lines,
        ]
    )


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m stableavatar.training.estimates", description=__doc__)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--out", type=Path, help="a document with the markers; by default it is printed")
    options = parser.parse_args(arguments)
    text = table(options.recipes, options.gpus)
    if options.out is None:
        print(text)
    else:
        put_between(options.out, text, START, END, title="Scaling")
    return 0


if __name__ == "__main__":
    sys.exit(main())
