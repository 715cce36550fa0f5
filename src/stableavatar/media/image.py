"""Portraits: any still picture (or the first frame of a video) as upright sRGB, fitted to a size undistorted.

Stills are decoded with Pillow (docs/decisions/0001): it knows EXIF orientation, palettes and colour profiles.
"""

import io
import logging
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from stableavatar.choices import Fit
from stableavatar.errors import InputError
from stableavatar.media.files import check_file, reason_of
from stableavatar.media.reading import read_frames

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]

MIN_SIDE = 16
MAX_PIXELS = 120_000_000
# A little above the middle: faces are in the upper half of most portraits that are taller than wanted.
DEFAULT_FOCUS = (0.5, 0.25)

# What people have pictures in. Some of Pillow's other readers run programs (EPS); none is for photographs.
_FORMATS = {
    "AVIF",
    "BMP",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
}
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}


def read_picture(path: str | Path, *, most_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in `path` as uint8 [height, width, 3] sRGB, upright by its EXIF orientation.

    Transparency lies over white; palettes, grey, CMYK and 16 bits a channel are converted, a profile is
    applied; of an animation or a video it is the first frame.

    Raises InputError: missing, a folder, empty, no picture, cut off or damaged, a side under 16 pixels, more
    than `most_pixels` (120 megapixels; found from the header, before anything is decoded).
    """
    absolute = check_file(path, "portrait")
    Image.init()
    formats = sorted(_FORMATS & Image.OPEN.keys())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(absolute, formats=formats)
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(path, int(found.group(1)) if found else None, most_pixels) from error
    except UnidentifiedImageError as error:
        frame = _first_frame(path, absolute)
        if frame is None:
            raise _not_a_picture(path, absolute) from error
        check_size(path, frame.shape[1], frame.shape[0], most_pixels)
        return frame
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    with image:
        return convert_picture(image, path, most_pixels=most_pixels)


def convert_picture(image: Image.Image, name: str | Path, *, most_pixels: int = MAX_PIXELS) -> Picture:
    """An open picture as uint8 [height, width, 3] sRGB, as `read_picture` gives it; `image` is not changed.

    `name` is what errors call it. Raises InputError: damaged, colours that cannot be converted, a side under
    16 pixels, more than `most_pixels`.
    """
    check_size(name, *image.size, most_pixels)
    try:
        image.load()
        colour, alpha = _split(_upright(image, name), name)
        colour = _to_srgb(colour, image.info.get("icc_profile"), name)
    except _DAMAGED as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(name, error) from error
    except MemoryError as error:
        raise InputError(f"portrait {name}: there is too little memory for it. Make it smaller.") from error
    if alpha is not None:
        white = Image.new("RGB", colour.size, (255, 255, 255))
        white.paste(colour, mask=alpha)
        colour = white
    return np.array(colour, dtype=np.uint8)


def fit_picture(
    picture: Picture,
    width: int,
    height: int,
    fit: Fit = "crop",
    focus: tuple[float, float] = DEFAULT_FOCUS,
) -> Picture:
    """A picture [H, W, 3] as uint8 [height, width, 3], by antialiased Lanczos resampling.

    - "crop" keeps the aspect ratio and cuts what is too much; `focus` says where: (0, 0) keeps the left and
      top edges, (1, 1) the right and bottom ones, (0.5, 0.5) the middle. The default keeps more of the top.
    - "pad" keeps the whole picture, in the middle of bars in the median colour of the edges they continue.
    - "stretch" distorts it to the size.

    Raises InputError for another `fit`, a `focus` outside 0 to 1, or a size below 1.
    """
    if fit not in get_args(Fit):
        raise InputError(f"fit {fit!r} is not known: choose one of {', '.join(get_args(Fit))}")
    if width < 1 or height < 1:
        raise InputError(f"a size of {width}x{height} is not possible")
    if not all(0 <= value <= 1 for value in focus):
        raise InputError(f"focus {focus} is out of range: both numbers must be from 0 to 1")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {picture.shape}")
    image = Image.fromarray(np.ascontiguousarray(picture))
    if fit == "pad":
        return _pad(image, picture, width, height)
    box: tuple[float, float, float, float] = (0.0, 0.0, float(image.width), float(image.height))
    if fit == "crop":
        box = crop_box(image.width, image.height, width, height, focus)
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def crop_box(
    source_width: int, source_height: int, width: int, height: int, focus: tuple[float, float]
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of the source: its largest part with the aspect width : height."""
    scale = max(width / source_width, height / source_height)
    part_width = min(width / scale, float(source_width))
    part_height = min(height / scale, float(source_height))
    left = (source_width - part_width) * focus[0]
    top = (source_height - part_height) * focus[1]
    return (
        left,
        top,
        min(left + part_width, float(source_width)),
        min(top + part_height, float(source_height)),
    )


def _pad(image: Image.Image, picture: Picture, width: int, height: int) -> Picture:
    scale = min(width / image.width, height / image.height)
    inner = (max(1, min(width, round(image.width * scale))), max(1, min(height, round(image.height * scale))))
    if inner[0] < width:
        edges = np.concatenate([picture[:, 0], picture[:, -1]])
    else:
        edges = np.concatenate([picture[0], picture[-1]])
    result = np.empty((height, width, 3), dtype=np.uint8)
    result[:] = np.median(edges, axis=0).round()
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    result[top : top + inner[1], left : left + inner[0]] = np.asarray(
        image.resize(inner, Image.Resampling.LANCZOS)
    )
    return result


def check_size(name: str | Path, width: int, height: int, most_pixels: int = MAX_PIXELS) -> None:
    """Raise InputError for a side under 16 pixels, or too many pixels; `name` is in the message."""
    if width * height > most_pixels:
        raise _too_large(name, width * height, most_pixels)
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"portrait {name}: {width}x{height} pixels are too few, it needs at least {MIN_SIDE} on each "
            "side. Give a larger picture."
        )


def _upright(image: Image.Image, path: str | Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGED as error:
        logger.warning("portrait %s: its EXIF data cannot be read (%s); it is not turned", path, error)
        return image.copy()


def _split(image: Image.Image, path: str | Path) -> tuple[Image.Image, Image.Image | None]:
    """The colours (mode L, RGB or CMYK) and the opacity (mode L, or None where all is opaque)."""
    transparent = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        opacity = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        return Image.fromarray(_to_8_bit(values, path)), opacity if transparent is not None else None
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # PNG with 16 bits a channel: Pillow keeps the high byte of colours, but not of the transparent one.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow takes this one to
    if image.has_transparency_data:
        complete = image.convert("RGBA")
        grey = image.mode in ("L", "LA", "La", "1")
        return complete.convert("RGB").convert("L" if grey else "RGB"), complete.getchannel("A")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB"), None


def _to_8_bit(values: NDArray[np.generic], path: str | Path) -> Picture:
    """Grey of 16 or 32 bits, or floating point, scaled (not clipped) to 8 bits."""
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all() or grey.min() < 0:
        raise InputError(f"portrait {path}: not all its pixels are numbers from 0 up. Save it as 8-bit PNG.")
    largest = float(grey.max())
    if values.dtype.kind == "f":
        full = next((top for top in (1.0, 255.0, 65535.0) if largest <= top), largest)
    else:
        full = 65535.0 if largest <= 65535 else float(2**31 - 1)
    return (grey * (255 / full)).round().astype(np.uint8)


def _to_srgb(image: Image.Image, profile: bytes | None, path: str | Path) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
            if mode == "L" and image.mode == "RGB":
                image = image.convert("L")
            if mode == image.mode:
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
                return cast(Image.Image, converted)
            logger.warning("portrait %s: its colour profile is for other colours and is left out", path)
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("portrait %s: its colour profile cannot be used (%s)", path, error)
    return image.convert("RGB")


def _first_frame(path: str | Path, absolute: Path) -> Picture | None:
    """The first frame of a video, or None where `path` is none."""
    if _is_heif(absolute):
        return None
    try:
        frames = read_frames(path, "portrait")
        try:
            return next(frames, None)
        finally:
            frames.close()
    except InputError as error:
        logger.debug("%s", error)
        return None


def _is_heif(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _not_a_picture(path: str | Path, absolute: Path) -> InputError:
    if _is_heif(absolute):
        return InputError(f"portrait {path}: HEIC pictures are not supported. Save it as JPEG or PNG.")
    return InputError(
        f"portrait {path}: not a picture, or one damaged from its beginning. Give a JPEG, PNG or WebP file."
    )


def _damaged(path: str | Path, error: BaseException) -> InputError:
    return InputError(
        f"portrait {path}: cut off or damaged ({reason_of(error)}). Fetch the file again or save it anew."
    )


def _too_large(path: str | Path, pixels: int | None, most: int) -> InputError:
    size = "too many pixels" if pixels is None else f"{pixels / 1e6:.3g} megapixels"
    return InputError(
        f"portrait {path}: {size}, at most {most / 1e6:g} megapixels are accepted. Make it smaller."
    )
