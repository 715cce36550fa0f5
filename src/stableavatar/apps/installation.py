"""What `stableavatar info` tells: what is installed, what weights are found, what is read and written."""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import av
import torch
from huggingface_hub import CacheNotFound, constants, scan_cache_dir

from stableavatar import __version__
from stableavatar.checkpoints.hub import BASE_14B_REPOSITORY, PUBLISHED_REPOSITORY
from stableavatar.checkpoints.layout import TINY, find_published, is_own
from stableavatar.choices import ModelSize, Variant
from stableavatar.errors import StableAvatarError
from stableavatar.media.image import MAX_PIXELS
from stableavatar.placement.device import choose_device, choose_dtype

_LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub",
    "tokenizers", "av", "numpy", "pillow",
)  # fmt: skip
# Kernels of attention by diffusers' names, and the package that each of them comes in.
_KERNELS = {
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers",
}


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: names, and what is to be said of each."""

    title: str
    rows: list[tuple[str, str]]


def survey(checkpoints: Path) -> list[Section]:
    """Everything about this installation, and about the weights in a folder."""
    return [
        Section("Installed", _installed()),
        Section("Devices", _devices()),
        Section("Models", [("tiny", _tiny()), *_published(checkpoints), *_cached()]),
        Section("Media", _media()),
    ]


def _installed() -> list[tuple[str, str]]:
    return [
        ("stableavatar", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, importlib.metadata.version(name)) for name in _LIBRARIES),
    ]


def _devices() -> list[tuple[str, str]]:
    rows = [
        ("cpu", f"{os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads; {_memory()}")
    ]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{found.name}, {found.total_memory / 1e9:.1f} GB"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple's GPU"))
    chosen = choose_device("auto")
    dtype = str(choose_dtype("auto", chosen)).removeprefix("torch.")
    rows.append(("auto", f"takes {chosen} with {dtype}"))
    kernels = [name for name, package in _KERNELS.items() if importlib.util.find_spec(package)]
    active = os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
    rows.append(
        (
            "attention",
            f"{active} (DIFFUSERS_ATTN_BACKEND chooses), available: {', '.join(['native', *kernels])}",
        )
    )
    return rows


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "memory unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB of memory"


def _tiny() -> str:
    if not TINY.is_dir():
        return f"not in this installation ({TINY} is missing)"
    size = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file())
    return f"ready, {size / 1e6:.1f} MB in {TINY}"


def _published(folder: Path) -> list[tuple[str, str]]:
    try:
        if (folder / "transformer").is_dir() and is_own(folder):
            return [(str(folder), "ready, a folder of this project's own")]
        found = find_published(folder)
    except StableAvatarError as error:
        return [(str(folder), str(error).removeprefix(f"{folder}: "))]
    rows = []
    for size, variant in product(get_args(ModelSize), get_args(Variant)):
        missing = found.missing(variant, size)
        state = "ready"
        if missing:
            parts = ", ".join(dict.fromkeys(part.what for part in missing))
            state = f"lacks {parts}; get it with: {missing[0].command}"
        rows.append((f"{size} {variant}", f"{state} ({found.root})"))
    return rows


def _cached() -> list[tuple[str, str]]:
    try:
        repositories = {found.repo_id: found.size_on_disk for found in scan_cache_dir().repos}
    except CacheNotFound:
        repositories = {}
    wanted = [name for name in (PUBLISHED_REPOSITORY, BASE_14B_REPOSITORY) if name in repositories]
    states = [f"{name} ({repositories[name] / 1e9:.1f} GB)" for name in wanted]
    return [("hub cache", f"{', '.join(states) or 'holds no published weights'} ({constants.HF_HUB_CACHE})")]


def _media() -> list[tuple[str, str]]:
    encoders = [(name, kind) for name, kind in (("libx264", "video"), ("aac", "sound"))]
    written = [f"{name} for {kind}" for name, kind in encoders if _can_encode(name)]
    lacking = [name for name, _ in encoders if not _can_encode(name)]
    text = f"MP4 with {' and '.join(written)}" if written else "nothing"
    if lacking:
        text += f"; PyAV was built without {' and '.join(lacking)}: install its wheel with pip"
    return [
        ("written", text),
        ("read", f"sound and video that FFmpeg reads (PyAV {av.__version__}), pictures that Pillow reads"),
        ("pictures", f"16 pixels to {MAX_PIXELS / 1e6:.0f} megapixels"),
    ]


def _can_encode(name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
