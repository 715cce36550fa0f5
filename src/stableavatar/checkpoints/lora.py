"""LoRA files of the video transformer: read in every naming that is about, merged into weights or attached.

==========  ===================================================================================
naming      a layer in it
==========  ===================================================================================
diffusers   ``transformer.blocks.0.attn1.to_q.lora_A.weight``
PEFT        ``base_model.model.blocks.0.attn1.to_q.lora_A.weight``, and ``adapter_config.json``
published   ``diffusion_model.blocks.0.self_attn.q.lora_A.weight`` (or ``lora_down``)
kohya       ``lora_unet_blocks_0_self_attn_q.lora_down.weight``
==========  ===================================================================================

A layer's weight grows by alpha / rank times up @ down; alpha comes from a tensor beside it, from PEFT's
settings, or is the rank. Files of distilled models also hold whole differences (``.diff``, ``.diff_b`` for a
bias, ``.diff_m`` for a block's modulation).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from stableavatar.checkpoints.files import read_json, read_state_dict
from stableavatar.checkpoints.names import TRANSFORMER, StateDict
from stableavatar.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

# Files that a folder with a LoRA holds: diffusers' and PEFT's name.
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "dit.")
_FLAT_PREFIX = re.compile(r"lora_(?:unet|transformer)_+")
_TEXT_PREFIXES = ("text_encoder.", "lora_te")
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_|lora\.)(?P<factor>A|B|down|up)(?:\.(?!weight|bias)\w+)?\.(?P<kind>weight|bias)"
)
_OFFSETS = {"diff": "weight", "diff_b": "bias"}
# Parts of a name that only other kinds of adapters have, and what these are called.
_OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr"}
_NAMED_IN_ERRORS = 3

LoraChoice = str | Path | tuple[str | Path, float]
"""A file, "FILE:SCALE", or a file and its scale."""


@dataclass(frozen=True)
class LowRank:
    """What a layer's weight grows by: scale · up @ down.

    Attributes:
        down: `[r, in]`, or `[r, in, t, h, w]` of a convolution. up: `[out, r]`, or `[out, r, 1, 1, 1]`.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    def delta(self, device: torch.device) -> torch.Tensor:
        """The whole difference, float32, of the weight's shape."""
        up, down = (factor.to(device, torch.float32) for factor in (self.up, self.down))
        product = up.flatten(1) @ down.flatten(1)
        return (self.scale * product).reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class Lora:
    """What a file adds to a transformer: `layers` by the name of the layer, `offsets` by that of the
    parameter."""

    layers: Mapping[str, LowRank]
    offsets: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that change."""
        return {f"{name}.weight" for name in self.layers} | set(self.offsets)

    def delta(self, parameter: str, device: torch.device) -> torch.Tensor | None:
        """The difference of a parameter, float32; None if it stays."""
        layer = self.layers.get(parameter.removesuffix(".weight"))
        parts = [] if layer is None or not parameter.endswith(".weight") else [layer.delta(device)]
        if parameter in self.offsets:
            parts.append(self.offsets[parameter].to(device, torch.float32))
        return sum(parts[1:], parts[0]) if parts else None

    def peft_state(self) -> StateDict:
        """Low-rank layers as PEFT names them, their scale in `up`, and differences of biases beside them.

        Raises:
            CheckpointError: there are differences that an adapter beside the weights cannot hold.
        """
        biases = {name.removesuffix(".bias"): value for name, value in self.offsets.items()}
        whole = [
            name
            for name, value in self.offsets.items()
            if value.any() and not (name.endswith(".bias") and name.removesuffix(".bias") in self.layers)
        ]
        if whole:
            raise CheckpointError(
                f"this LoRA changes {len(whole)} parameters as a whole ({', '.join(whole[:_NAMED_IN_ERRORS])}"
                "), which an adapter cannot hold: merge it, with lora= when loading"
            )
        with_bias = any(name in self.layers for name in biases)
        state: StateDict = {}
        for name, layer in self.layers.items():
            state[f"{name}.lora_A.weight"] = layer.down
            state[f"{name}.lora_B.weight"] = layer.up * layer.scale
            if with_bias:
                state[f"{name}.lora_B.bias"] = biases.get(name, torch.zeros_like(layer.up[:, 0].flatten()))
        return state


def parse_lora(text: str) -> tuple[Path, float]:
    """A file and its scale out of ``file.safetensors:0.8``; 1 where none is given.

    Raises:
        InputError: the scale is no number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or "\\" in scale or re.search(r"[A-Za-z]\w*\.\w+$", scale):
        return Path(text), 1.0  # a colon within the path
    try:
        value = float(scale)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise InputError(f"LoRA {text}: {scale!r} is no scale. Write FILE:0.8, for example.")
    return Path(path), value


def read_lora(source: Path | str, model: nn.Module) -> Lora:
    """Read a LoRA for a transformer.

    Args:
        source: a file (safetensors or .pt), or a folder with one of `LORA_FILES`.
        model: which it is for.

    Raises:
        CheckpointError: missing or damaged; for another model; another kind of adapter than LoRA.
    """
    path = lora_file(source)
    return _Parser(f"LoRA {path}", model, _settings(path)).parse(read_state_dict(path))


def lora_file(source: Path | str) -> Path:
    """The file of a LoRA: itself, or the one in a folder. Raises CheckpointError where there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in LORA_FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"LoRA {path}: the folder holds none of {', '.join(LORA_FILES)}")
        path = found[0]
    elif not path.is_file():
        raise CheckpointError(f"LoRA {path}: there is no such file or folder")
    return path


def lora_from_state(state: Mapping[str, torch.Tensor], model: nn.Module) -> Lora:
    """A LoRA out of its tensors in any naming. Raises CheckpointError as `read_lora`."""
    return _Parser("this LoRA", model, {}).parse(state)


@torch.no_grad()
def merge_loras(model: nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
    """Add LoRAs times their scales to a model's parameters; sums are float32, rounded once."""
    parameters = _parameters(model)
    for name in sorted(set().union(*(lora.parameters for lora, _ in loras))):
        parameter = parameters[name]
        value = parameter.float()
        for lora, scale in loras:
            delta = lora.delta(name, parameter.device)
            if delta is not None:
                value = value + scale * delta
        parameter.copy_(value)


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's settings of a LoRA: beside the file, or in diffusers' metadata of it."""
    beside = path.with_name("adapter_config.json")
    if beside.is_file() and path.name.startswith("adapter_model"):
        return read_json(beside)
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("lora_adapter_metadata")
    except (OSError, SafetensorError):
        return {}  # no safetensors: `read_state_dict` says what is wrong, if anything is
    try:
        settings = json.loads(stored) if stored else {}
    except ValueError as error:
        raise CheckpointError(f"LoRA {path}: its metadata cannot be read ({error})") from error
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


@dataclass(frozen=True)
class _Parser:
    """Gives the tensors of a LoRA the places that they have in a model."""

    source: str
    model: nn.Module
    settings: Mapping[str, Any]

    def parse(self, state: Mapping[str, torch.Tensor]) -> Lora:
        factors: dict[str, dict[str, torch.Tensor]] = {}
        alphas: dict[str, float] = {}
        offsets: dict[str, torch.Tensor] = {}
        unknown: list[str] = []
        text = 0
        for name, tensor in state.items():
            if name.startswith(_TEXT_PREFIXES):
                text += 1
                continue
            for mark, kind in _OTHERS.items():
                if mark in name:
                    raise CheckpointError(
                        f"{self.source}: holds a {kind} ({name}), only LoRA is read. Have the tool that made "
                        "it extract a LoRA."
                    )
            module, _, last = name.rpartition(".")
            if match := _FACTOR.fullmatch(name):
                place = self._place(match["module"], self._modules)
                kind = {"A": "down", "B": "up"}.get(match["factor"], match["factor"])
                if place is not None:
                    factors.setdefault(place, {})[kind if match["kind"] == "weight" else f"{kind}_bias"] = (
                        tensor
                    )
            elif last == "alpha":
                place = self._place(module, self._modules)
                if place is not None:
                    alphas[place] = float(tensor)
            else:
                if last in _OFFSETS:
                    place = self._place(f"{module}.{_OFFSETS[last]}", self._parameters) or self._place(
                        module, self._parameters
                    )
                else:
                    place = (
                        self._place(f"{module}.modulation", self._parameters) if last == "diff_m" else None
                    )
                if place is not None:
                    offsets[place] = tensor
            if place is None:
                unknown.append(name)
        if text:
            logger.warning("%s: %d tensors for the text encoder are left out", self.source, text)
        if unknown:
            raise CheckpointError(
                f"{self.source}: {len(unknown)} of its {len(state)} tensors have no place in this model "
                f"({', '.join(unknown[:_NAMED_IN_ERRORS])}); it was made for another"
            )
        layers = {}
        for place, parts in factors.items():
            layers[place] = self._layer(place, parts, alphas.get(place))
            if "up_bias" in parts:
                bias = layers[place].scale * parts["up_bias"].float()
                offsets[f"{place}.bias"] = offsets.get(f"{place}.bias", 0) + bias
        if not layers and not offsets:
            raise CheckpointError(f"{self.source}: holds nothing for the video transformer")
        return self._fitted(Lora(layers, offsets))

    def _layer(self, place: str, parts: Mapping[str, torch.Tensor], alpha: float | None) -> LowRank:
        if "down" not in parts or "up" not in parts:
            raise CheckpointError(
                f"{self.source}: of {place} only one of two factors is there; it is damaged"
            )
        rank = parts["down"].shape[0]
        if alpha is None:
            alpha = self._alpha(place, rank)
            if self.settings.get("use_rslora"):
                alpha *= rank**0.5
        return LowRank(parts["down"], parts["up"], alpha / rank)

    def _alpha(self, place: str, rank: int) -> float:
        given = self.settings.get("alpha_pattern") or {}
        patterns = {self._place(name, self._modules) or name: alpha for name, alpha in given.items()}
        chosen = get_pattern_key(patterns.keys(), place)
        return float(patterns.get(chosen, self.settings.get("lora_alpha") or rank))

    def _fitted(self, lora: Lora) -> Lora:
        """With the shapes of the model's parameters, or an error that says which are of another.

        A LoRA of a text-to-video model has a patch embedding without the channels of the condition: its
        difference is nothing there.
        """
        layers, offsets = dict(lora.layers), dict(lora.offsets)
        shapes = {name: tuple(parameter.shape) for name, parameter in _parameters(self.model).items()}
        patches = "patch_embedding"
        if patches in layers:
            down = _widened(layers[patches].down, shapes[f"{patches}.weight"])
            layers[patches] = LowRank(down, layers[patches].up, layers[patches].scale)
        if f"{patches}.weight" in offsets:
            offsets[f"{patches}.weight"] = _widened(offsets[f"{patches}.weight"], shapes[f"{patches}.weight"])
        found = {f"{name}.weight": (it.up.shape[0], *it.down.shape[1:]) for name, it in layers.items()}
        for name, shape in [*found.items(), *((name, tuple(it.shape)) for name, it in offsets.items())]:
            if name not in shapes:
                raise CheckpointError(
                    f"{self.source}: {name} has no place in this model; it was made for another"
                )
            if shape != shapes[name]:
                raise CheckpointError(
                    f"{self.source}: {name} is {list(shape)} in it, {list(shapes[name])} in this model; it "
                    "was made for another size"
                )
        for name, layer in layers.items():
            if layer.up.shape[1] != layer.down.shape[0]:
                raise CheckpointError(
                    f"{self.source}: the two factors of {name} are of rank {layer.up.shape[1]} and "
                    f"{layer.down.shape[0]}; it is damaged"
                )
        return Lora(layers, offsets)

    @cached_property
    def _modules(self) -> dict[str, str]:
        return _spellings(name.removesuffix(".weight") for name in _parameters(self.model))

    @cached_property
    def _parameters(self) -> dict[str, str]:
        return _spellings(_parameters(self.model))

    @staticmethod
    def _place(name: str, spellings: Mapping[str, str]) -> str | None:
        """Our name of what a file calls so."""
        if flat := _FLAT_PREFIX.match(name):
            return spellings.get(name[flat.end() :].replace(".", "_"))
        while name not in spellings:
            prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)
        return spellings[name]


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's own parameters by name, whether adapters are attached to it or not."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """Every way in which files spell a name, to ours: with dots, with underscores, and both as published."""
    result: dict[str, str] = {}
    for name in names:
        for spelling in (name, TRANSFORMER.to_published(name) or name):
            result[spelling] = name
            result[spelling.replace(".", "_")] = name
    return result


def _widened(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros for the input channels that a difference `[out, in, t, h, w]` lacks."""
    missing = shape[1] - tensor.shape[1]
    if missing <= 0 or tensor.ndim != len(shape):
        return tensor
    return nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, missing))


def chosen_loras(lora: LoraChoice | Sequence[LoraChoice]) -> list[tuple[str | Path, float]]:
    """Files that are there, and their scales.

    Args:
        lora: one or several, each "FILE", "FILE:0.8", or a file and its scale.
    """
    alone = isinstance(lora, str | Path) or (len(lora) == 2 and isinstance(lora[1], int | float))
    several: Any = [lora] if alone else lora
    chosen = [
        parse_lora(it) if isinstance(it, str) else (it, 1.0) if isinstance(it, Path) else it for it in several
    ]
    for file, _ in chosen:
        lora_file(file)
    return chosen
