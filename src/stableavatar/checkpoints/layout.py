"""Where the parts of a model lie on disk: the published layout, diffusers layout, this project's own folders.

`is_own` tells the last from the others; `find_published` finds the published files
(`spec/3-checkpoints.md`), says which are missing, and with which command they are to be had.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stableavatar.checkpoints.files import has_weights, read_json
from stableavatar.errors import CheckpointError, InputError

VARIANTS = ("square", "rec-vec")

# The sub-folders of this project's own layout, a part each.
OWN_PARTS = (
    "transformer",
    "vae",
    "text_encoder",
    "tokenizer",
    "image_encoder",
    "speech_encoder",
    "scheduler",
)
OWN_TRANSFORMER_CLASS = "StableAvatarTransformer3DModel"
MODEL_INDEX = "model_index.json"

TINY = Path(__file__).parents[1] / "assets" / "tiny"
"""The model that ships in the package."""

# Folder names of the Wan bases: the published ones, then patterns for the same under other names.
_BASE_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "1.3b": ("Wan2.1-Fun-V1.1-1.3B-InP", "Wan2.1*1.3B*"),
    "14b": ("Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-480P-Diffusers", "Wan2.1*I2V*14B*"),
}
_OVERLAY_FOLDERS: Mapping[str, str] = {"1.3b": "StableAvatar-1.3B", "14b": "StableAvatar-14B"}
_OVERLAY_STEM = "transformer3d-"
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".gguf")

_VAE_NAMES = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "vae")
_TEXT_NAMES = ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors", "text_encoder")
_IMAGE_STEM = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
_IMAGE_NAMES = (f"{_IMAGE_STEM}.pth", f"{_IMAGE_STEM}.safetensors", "image_encoder")
_TOKENIZER_NAMES = ("google/umt5-xxl", "tokenizer")
_SPEECH_NAMES = ("wav2vec2-base-960h", "wav2vec", "speech_encoder")
VOCAL_SEPARATOR = "Kim_Vocal_2.onnx"


@dataclass(frozen=True)
class MissingPart:
    """A part that was not found: its name, what it is, where it was expected, and how to get it."""

    part: str
    what: str
    expected: Path
    command: str


@dataclass(frozen=True)
class PublishedLayout:
    """The published files that lie below a folder; what is absent is None or not in the mapping.

    Attributes:
        root: the folder that holds the others (``checkpoints``).
        bases: size (``1.3b``, ``14b``) to the folder or file of the Wan transformer.
        overlays: size to variant (``square``, ``rec-vec``, or what else stands after ``transformer3d-``) to
            StableAvatar's file.
        vae, text_encoder, tokenizer, image_encoder, speech_encoder: files and folders of the other parts.
        vocal_separator: the network that takes music away, not needed for speech alone.
    """

    root: Path
    bases: Mapping[str, Path]
    overlays: Mapping[str, Mapping[str, Path]]
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    image_encoder: Path | None
    speech_encoder: Path | None
    vocal_separator: Path | None

    def missing(
        self, variant: str | None = "square", size: str = "1.3b", parts: Iterable[str] = OWN_PARTS
    ) -> list[MissingPart]:
        """What a model of this variant and size lacks to generate videos; empty if it is all there.

        Args:
            variant: of the transformer; None for its base alone.
            size: ``1.3b`` or ``14b``.
            parts: which of `OWN_PARTS` are asked for.
        """
        _check_size(size)
        base = self.root / _BASE_FOLDERS[size][0]
        encoders = self.root / _BASE_FOLDERS["1.3b"][0]
        command = download_command(self.root, variant or VARIANTS[0], size)
        wanted = [
            ("transformer", "the Wan base transformer", self.bases.get(size), base),
            ("vae", "the video autoencoder", self.vae, encoders / _VAE_NAMES[0]),
            ("text_encoder", "the prompt encoder", self.text_encoder, encoders / _TEXT_NAMES[0]),
            ("tokenizer", "the tokenizer", self.tokenizer, encoders / _TOKENIZER_NAMES[0]),
            ("image_encoder", "the portrait encoder", self.image_encoder, encoders / _IMAGE_NAMES[0]),
            ("speech_encoder", "the speech encoder", self.speech_encoder, self.root / _SPEECH_NAMES[0]),
        ]
        absent = [
            MissingPart(part, what, where, command) for part, what, found, where in wanted if found is None
        ]
        if variant is not None and variant not in self.overlays.get(size, {}):
            file = self.root / _OVERLAY_FOLDERS[size] / f"{_OVERLAY_STEM}{variant}.pt"
            advice = command if size == "1.3b" else f"a training of your own, whose result goes to {file}"
            absent.append(MissingPart("transformer", f"the {size} transformer {variant!r}", file, advice))
        parts = set(parts)
        return [part for part in absent if part.part in parts]

    def require(
        self, variant: str | None = "square", size: str = "1.3b", parts: Iterable[str] = OWN_PARTS
    ) -> None:
        """Check that nothing is missing; for the arguments see `missing`.

        Raises:
            CheckpointError: names the missing parts, the first one's place, the variants that are there, and
                the command that gets what is missing.
        """
        missing = self.missing(variant, size, parts)
        if not missing:
            return
        what = ", ".join(part.what for part in missing)
        commands = " and ".join(dict.fromkeys(part.command for part in missing))
        variants = ", ".join(self.overlays.get(size, {})) or "none"
        raise CheckpointError(
            f"{self.root}: {what} not found (expected {missing[0].expected}; transformers there: {variants});"
            f" to be had by: {commands}"
        )

    def transformer_files(
        self, variant: str | None = "square", size: str = "1.3b"
    ) -> tuple[Path, Path | None]:
        """The base and the overlay of a variant (None: no overlay), for `loading.load_transformer`.

        Raises:
            CheckpointError: one of them is missing; see `require`.
        """
        self.require(variant, size, parts=["transformer"])
        return self.bases[size], None if variant is None else self.overlays[size][variant]


def download_command(target: Path, variant: str = "square", size: str = "1.3b") -> str:
    """The command that downloads what a model of this variant and size needs into a folder."""
    sizes = "" if size == "1.3b" else f" --model-size {size}"
    return f"stableavatar download --variant {variant}{sizes} --output {shlex.quote(str(target))}"


def find_published(root: Path | str) -> PublishedLayout:
    """Find the published files below a folder, or around it.

    Args:
        root: the folder ``checkpoints``, the folder that holds it, or one of the folders in it.

    Raises:
        CheckpointError: there is no such folder, or it is a file, or nothing published is found.
    """
    root = Path(root)
    if root.is_file():
        raise CheckpointError(
            f"{root}: is a file, and a model is a folder. If it is a single transformer, make a model of it"
            f" with: stableavatar convert CHECKPOINTS FOLDER --transformer {shlex.quote(str(root))}"
        )
    if not root.is_dir():
        raise CheckpointError(f"{root}: is no folder; get the weights with: {download_command(root)}")
    candidates = [_layout_at(folder) for folder in _roots_around(root)]
    best = max(candidates, key=_parts_found)
    if not best.bases and not best.overlays and best.vae is None:
        raise CheckpointError(
            f"{root}: holds no published weights ({_BASE_FOLDERS['1.3b'][0]}, {_OVERLAY_FOLDERS['1.3b']});"
            f" get them with: {download_command(root)}"
        )
    return best


def model_folder(source: Path | str) -> Path:
    """The folder of a model, whether it is there or not; the embedded one's for `tiny`."""
    return TINY if str(source) == "tiny" else Path(source).expanduser()


def is_own(path: Path | str) -> bool:
    """Whether a folder is of this project's own layout, and not of published checkpoints.

    Raises:
        CheckpointError: it is neither, or there is no such folder.
    """
    path = Path(path)
    config = path / "transformer" / "config.json"
    if config.is_file():
        kind = read_json(config).get("_class_name")
        if kind not in (OWN_TRANSFORMER_CLASS, "WanTransformer3DModel"):
            raise CheckpointError(
                f"{config}: describes a {kind}, not a transformer that this project computes"
            )
        return bool(kind == OWN_TRANSFORMER_CLASS)
    find_published(path)
    return False


def _roots_around(root: Path) -> Iterable[Path]:
    yield root
    yield root / "checkpoints"
    inside = [*_OVERLAY_FOLDERS.values(), *(name for names in _BASE_FOLDERS.values() for name in names)]
    absolute = root.resolve()  # a relative path such as "." has no parent in its text
    if any(absolute.match(pattern) for pattern in inside):
        yield absolute.parent


def _parts_found(layout: PublishedLayout) -> int:
    others = (layout.vae, layout.text_encoder, layout.tokenizer, layout.image_encoder, layout.speech_encoder)
    return 2 * len(layout.bases) + 2 * len(layout.overlays) + sum(part is not None for part in others)


def _layout_at(root: Path) -> PublishedLayout:
    folders = {size: _first_folder(root, patterns) for size, patterns in _BASE_FOLDERS.items()}
    bases = {size: base for size, folder in folders.items() if folder and (base := _transformer_in(folder))}
    overlays = {size: _overlays_in(root / folder) for size, folder in _OVERLAY_FOLDERS.items()}
    # The encoders are the same files in both bases.
    places = [folder for folder in folders.values() if folder is not None]
    return PublishedLayout(
        root=root,
        bases=bases,
        overlays={size: found for size, found in overlays.items() if found},
        vae=_first_file(places, _VAE_NAMES),
        text_encoder=_first_file(places, _TEXT_NAMES),
        tokenizer=_first_file(places, _TOKENIZER_NAMES),
        image_encoder=_first_file(places, _IMAGE_NAMES),
        speech_encoder=_first_file([root], _SPEECH_NAMES),
        vocal_separator=_first_file([root], (VOCAL_SEPARATOR,)),
    )


def _first_folder(root: Path, patterns: Iterable[str]) -> Path | None:
    for pattern in patterns:
        if folders := sorted(folder for folder in root.glob(pattern) if folder.is_dir()):
            return folders[0]
    return None


def _first_file(places: Iterable[Path], file_names: Iterable[str]) -> Path | None:
    places = list(places)
    for name in file_names:
        for place in places:
            if (place / name).is_file() or ((place / name).is_dir() and any((place / name).iterdir())):
                return place / name
    return None


def _transformer_in(folder: Path) -> Path | None:
    """The folder (or file) that `read_state_dict` reads as the base: in diffusers layout, a sub-folder."""
    for place in (folder, folder / "transformer"):
        if has_weights(place):
            return place
    quantised = sorted(folder.glob("*.gguf"))
    return quantised[0] if quantised else None


def _overlays_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    files = sorted(f for f in folder.glob(f"{_OVERLAY_STEM}*") if f.suffix in _WEIGHT_SUFFIXES)
    # Of two files of one variant, safetensors (sorted last) wins over .pt.
    return {file.stem.removeprefix(_OVERLAY_STEM): file for file in sorted(files, key=_prefer_safetensors)}


def _prefer_safetensors(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _check_size(size: str) -> None:
    if size not in _BASE_FOLDERS:
        raise InputError(f"unknown model size {size!r}: choose one of {', '.join(_BASE_FOLDERS)}")
