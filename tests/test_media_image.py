"""Portraits in: upright, right in colour, undistorted; and every way a picture can be wrong."""

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from media_files import write_sound, write_video
from stableavatar.errors import InputError
from stableavatar.media.image import (
    MAX_PIXELS,
    Picture,
    check_size,
    convert_picture,
    crop_box,
    fit_picture,
    read_picture,
)

SHARED = Path(__file__).parents[2] / "shared" / "samples"


def corner(width: int = 48, height: int = 32) -> Picture:
    """Blue, with a red patch at the top left."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[:] = (20, 40, 200)
    picture[: height // 4, : width // 4] = (220, 30, 20)
    return picture


def ramp(depth: int) -> NDArray[np.uint16]:
    """Grey [32, 64] from 0 to the largest number of `depth` bits."""
    row = np.linspace(0, 2**depth - 1, 64).round().astype(np.uint16)
    return np.repeat(row[None], 32, axis=0)


def png(values: NDArray[np.uint16], kind: int, transparent: bytes = b"") -> bytes:
    """A PNG with 16 bits a channel (Pillow writes those for grey only); `kind` is PNG's colour type."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.jpg", "a.ppm", "a.gif", "a 图片.jpg"]
)
def test_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    options = {"lossless": True} if name.endswith("webp") else {"quality": 95, "subsampling": 0}
    Image.fromarray(corner()).save(path, **({} if name.endswith("tiff") else options))
    picture = read_picture(path)
    assert picture.shape == (32, 48, 3)
    assert picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - corner()).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](corner())
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png"), corner())


def test_a_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    Image.fromarray(corner()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(7))
    assert read_picture(tmp_path / "a.jpg").shape == (32, 48, 3)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    colour = corner()
    alpha = np.full((32, 48), 255, np.uint8)
    alpha[:8] = 0
    alpha[8:16] = 128
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert (picture[:8] == 255).all()
    assert np.abs(picture[8:16].astype(int) - (colour[8:16].astype(int) + 255) / 2).max() <= 2
    assert np.array_equal(picture[16:], colour[16:])


def test_grey_with_transparency(tmp_path: Path) -> None:
    grey = np.full((32, 48), 60, np.uint8)
    alpha = np.full((32, 48), 255, np.uint8)
    alpha[:, :20] = 0
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert (picture[:, :20] == 255).all()
    assert (picture[:, 20:] == 60).all()


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path: Path, transparent: bool) -> None:
    image = Image.fromarray(corner()).quantize(4)
    blue = image.getpixel((40, 20))
    image.save(tmp_path / "a.png", **({"transparency": blue} if transparent else {}))
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "P"
    picture = read_picture(tmp_path / "a.png")
    assert np.abs(picture[2, 2].astype(int) - (220, 30, 20)).max() < 4
    assert np.abs(picture[20, 40].astype(int) - ((255,) * 3 if transparent else (20, 40, 200))).max() < 4


def test_grey_and_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(ramp(8).astype(np.uint8)).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png")[0, :, 1], ramp(8)[0])
    Image.fromarray(ramp(8) > 100).save(tmp_path / "b.png")
    assert np.array_equal(np.unique(read_picture(tmp_path / "b.png")), [0, 255])


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    for path in (tmp_path / "a.png", tmp_path / "a.tiff"):
        Image.fromarray(ramp(16)).save(path)
        row = read_picture(path)[0, :, 0]
        assert np.abs(row - np.linspace(0, 255, 64)).max() <= 1
    float_path = tmp_path / "f.tiff"
    Image.fromarray((ramp(16) / 65535).astype(np.float32)).save(float_path)
    assert np.abs(read_picture(float_path)[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1


@pytest.mark.parametrize("kind", [2, 4, 6])
def test_16_bit_colour_and_transparency(tmp_path: Path, kind: int) -> None:
    channels = {2: 3, 4: 2, 6: 4}[kind]
    values = np.repeat(ramp(16)[..., None], channels, axis=2)
    if kind != 2:
        values[..., -1] = 65535
        values[:4, :, -1] = 0
    (tmp_path / "a.png").write_bytes(png(values, kind))
    picture = read_picture(tmp_path / "a.png")
    assert np.abs(picture[20, :, 0] - np.linspace(0, 255, 64)).max() <= 1
    assert (picture[:4] == 255).all() == (kind != 2)


@pytest.mark.parametrize("kind", [0, 2])
def test_a_transparent_colour_of_16_bits(tmp_path: Path, kind: int) -> None:
    values = np.full((32, 32), 30_000, np.uint16)
    values[:8] = 10_000
    channels = {0: 1, 2: 3}[kind]
    data = values if channels == 1 else np.repeat(values[..., None], 3, axis=2)
    (tmp_path / "a.png").write_bytes(png(data, kind, struct.pack(">H", 10_000) * channels))
    picture = read_picture(tmp_path / "a.png")
    assert (picture[:8] == 255).all()
    assert np.abs(picture[8:].astype(int) - 117).max() <= 1


def test_cmyk(tmp_path: Path) -> None:
    Image.fromarray(corner()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_picture(tmp_path / "a.jpg").astype(int) - corner()).mean() < 6


def test_a_colour_profile_is_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(corner()).save(tmp_path / "same.png", icc_profile=srgb)
    assert np.abs(read_picture(tmp_path / "same.png").astype(int) - corner()).max() <= 2
    Image.fromarray(corner()).save(tmp_path / "swap.png", icc_profile=_swapped_profile(srgb))
    assert read_picture(tmp_path / "swap.png")[20, 40].argmax() == 0
    with caplog.at_level(logging.WARNING):
        Image.fromarray(corner()).save(tmp_path / "lab.png", icc_profile=lab)
        assert np.array_equal(read_picture(tmp_path / "lab.png"), corner())
        Image.fromarray(corner()).save(tmp_path / "junk.png", icc_profile=b"no profile")
        assert np.array_equal(read_picture(tmp_path / "junk.png"), corner())
    assert caplog.text.count("colour profile") == 2


def _swapped_profile(profile: bytes) -> bytes:
    """A profile in which the red and the blue primary have changed places."""
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_the_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(corner()), Image.new("RGB", (48, 32), (0, 255, 0))]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **options)
    assert np.abs(read_picture(tmp_path / name).astype(int) - corner()).max() < 4


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"]
)
def test_pictures_that_are_open_already(mode: str) -> None:
    opaque = Image.fromarray(corner())
    image = Image.new(mode, opaque.size) if mode in ("La", "PA", "I", "F") else opaque.convert(mode)
    picture = convert_picture(image, "of mine")
    assert picture.shape == (32, 48, 3)
    assert picture.dtype == np.uint8
    if mode.startswith(("RGB", "CMYK", "YCbCr", "HSV")):
        assert np.abs(picture.astype(int) - corner()).mean() < 4


def test_open_pictures_are_read_as_files_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.dstack([corner(), np.full((32, 48), 128, np.uint8)]))
    image.save(path, exif=exif)
    read = read_picture(path)
    assert read.shape == (48, 32, 3)
    with Image.open(path) as opened:
        assert np.array_equal(convert_picture(opened, "of mine"), read)
        assert opened.size == (48, 32)
    grey = Image.fromarray(ramp(16))
    assert np.abs(convert_picture(grey, "of mine")[0, :, 0].astype(int) - np.linspace(0, 255, 64)).max() <= 1


def test_open_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="portrait of mine: 8x32 pixels are too few"):
        convert_picture(Image.new("RGB", (8, 32)), "of mine")
    with pytest.raises(InputError, match="portrait of mine: 121 megapixels"):
        check_size("of mine", 11_000, 11_000)
    Image.fromarray(corner()).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])
    with (
        Image.open(tmp_path / "a.png") as opened,
        pytest.raises(InputError, match="portrait of mine: cut off or damaged"),
    ):
        convert_picture(opened, "of mine")
    check_size("of mine", 16, 16)


def test_the_first_frame_of_a_video(tmp_path: Path) -> None:
    first, other = np.full((48, 64, 3), 200, np.uint8), np.zeros((48, 64, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", [first] + [other] * 5, rotation=90)
    picture = read_picture(path)
    assert picture.shape == (64, 48, 3)
    assert abs(float(picture.mean()) - 200) < 4


def _empty(folder: Path) -> Path:
    (folder / "bad.png").touch()
    return folder / "bad.png"


def _folder(folder: Path) -> Path:
    (folder / "bad.png").mkdir()
    return folder / "bad.png"


def _text(folder: Path) -> Path:
    (folder / "bad.png").write_text("This is not a picture.\n" * 40)
    return folder / "bad.png"


def _sound(folder: Path) -> Path:
    return write_sound(folder / "bad.mp3", np.zeros(44100, np.float32), 44100, "libmp3lame")


def _heic(folder: Path) -> Path:
    (folder / "bad.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(200))
    return folder / "bad.heic"


def _tiny(folder: Path) -> Path:
    Image.new("RGB", (1, 1)).save(folder / "bad.png")
    return folder / "bad.png"


def _narrow(folder: Path) -> Path:
    Image.new("RGB", (200, 15)).save(folder / "bad.png")
    return folder / "bad.png"


def _no_size(folder: Path) -> Path:
    (folder / "bad.png").write_bytes(png(np.zeros((0, 0), np.uint16), 0))
    return folder / "bad.png"


def _nan(folder: Path) -> Path:
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(folder / "bad.tiff")
    return folder / "bad.tiff"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "bad.png", "no such file"),
        (_folder, "folder"),
        (_empty, "empty"),
        (_text, "not a picture"),
        (_sound, "not a picture"),
        (_heic, "HEIC"),
        (_tiny, "1x1 pixels are too few.*16"),
        (_narrow, "200x15"),
        (_no_size, "cut off|not a picture"),
        (_nan, "numbers"),
    ],
)
def test_what_is_no_portrait(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_picture(make(tmp_path))
    assert "bad" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp", "cut.gif", "cut.bmp", "cut.tiff"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_picture_that_was_cut_off(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"cut\..*(cut off|not a picture)"):
        read_picture(tmp_path / name)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_001, 10_000)])
def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path, width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    # No pixel follows the header: whatever decodes fails in another way.
    data = bytearray(png(np.zeros((1, 1), np.uint16), 0))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "huge.png").write_bytes(data)
    with pytest.raises(InputError, match=r"huge\.png: \d+ megapixels, at most 120"):
        read_picture(tmp_path / "huge.png")


def disc(width: int, height: int) -> Picture:
    """A white disc in the middle of a dark picture; its diameter is half of the shorter side."""
    y, x = np.mgrid[:height, :width]
    radius = min(width, height) / 4
    inside = np.hypot(x - (width - 1) / 2, y - (height - 1) / 2) <= radius
    return np.where(inside[..., None], np.uint8(255), np.uint8(20)).repeat(3, axis=2)


def extent(picture: Picture) -> tuple[float, float]:
    bright = picture[..., 0] / 255.0 > 0.5
    return float(bright.sum(axis=1).max()), float(bright.sum(axis=0).max())


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (640, 360), (97, 301)])
@pytest.mark.parametrize("target", [(128, 128), (480, 832), (832, 480)])
def test_a_circle_stays_a_circle(fit: str, width: int, height: int, target: tuple[int, int]) -> None:
    fitted = fit_picture(disc(width, height), *target, fit=fit, focus=(0.5, 0.5))  # type: ignore[arg-type]
    assert fitted.shape == (target[1], target[0], 3)
    across, down = extent(fitted)
    ratio = max if fit == "crop" else min
    diameter = min(width, height) / 2 * ratio(target[0] / width, target[1] / height)
    assert across == pytest.approx(min(diameter, target[0]), abs=2 + diameter / 50)
    assert down == pytest.approx(min(diameter, target[1]), abs=2 + diameter / 50)


def test_stretching_distorts() -> None:
    across, down = extent(fit_picture(disc(400, 200), 128, 128, fit="stretch"))
    assert down == pytest.approx(2 * across, abs=4)


def test_focus_says_what_is_kept() -> None:
    tall = np.repeat(np.linspace(0, 250, 400).astype(np.uint8)[:, None, None], 100, axis=1).repeat(3, axis=2)
    means = [float(fit_picture(tall, 64, 64, focus=(0.5, y)).mean()) for y in (0.0, 0.25, 0.5, 1.0)]
    assert means[0] == pytest.approx(250 / 8, abs=2)
    assert means[3] == pytest.approx(250 * 7 / 8, abs=2)
    assert fit_picture(tall, 64, 64).mean() == means[1] < means[2] == pytest.approx(125, abs=2)


def test_bars_continue_the_edges_they_touch() -> None:
    picture = np.full((100, 50, 3), 90, np.uint8)
    picture[:, 0] = picture[:, -1] = (10, 200, 30)
    fitted = fit_picture(picture, 64, 64, fit="pad")
    assert (fitted[:, :10] == (10, 200, 30)).all()
    assert (fitted[:, -10:] == (10, 200, 30)).all()
    assert np.abs(fitted[32, 32].astype(int) - 90).max() <= 1


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    fitted = fit_picture(stripes, 64, 64)
    assert np.abs(fitted.astype(int) - 127).max() < 12


def test_the_right_size_is_left_alone() -> None:
    assert np.array_equal(fit_picture(corner(), 48, 32), corner())


@settings(max_examples=60, deadline=None)
@given(
    *[st.integers(16, 4000)] * 4,
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_crop_boxes(
    source_width: int, source_height: int, width: int, height: int, focus: tuple[float, float]
) -> None:
    left, top, right, bottom = crop_box(source_width, source_height, width, height, focus)
    assert 0 <= left < right <= source_width
    assert 0 <= top < bottom <= source_height
    assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=1e-6)
    whole = (right - left == pytest.approx(source_width), bottom - top == pytest.approx(source_height))
    assert any(whole)


@settings(max_examples=25, deadline=None)
@given(*[st.integers(16, 300)] * 2, *[st.integers(1, 300)] * 2, st.sampled_from(["crop", "pad", "stretch"]))
def test_any_size_fits_any_other(
    source_width: int, source_height: int, width: int, height: int, fit: str
) -> None:
    picture = np.zeros((source_height, source_width, 3), np.uint8)
    assert fit_picture(picture, width, height, fit).shape == (height, width, 3)  # type: ignore[arg-type]


def test_impossible_fits() -> None:
    with pytest.raises(InputError, match="crop, pad, stretch"):
        fit_picture(corner(), 64, 64, fit="squeeze")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="focus"):
        fit_picture(corner(), 64, 64, focus=(0.5, 1.1))
    with pytest.raises(InputError, match="0x64"):
        fit_picture(corner(), 0, 64)
    with pytest.raises(ValueError, match="uint8"):
        fit_picture(corner().astype(np.float32), 64, 64)  # type: ignore[arg-type]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample portraits are not beside the checkout")
def test_sample_portraits() -> None:
    for path in sorted((SHARED / "portraits").iterdir()):
        picture = read_picture(path)
        assert min(picture.shape[:2]) > 200
        assert fit_picture(picture, 128, 128).std() > 20
