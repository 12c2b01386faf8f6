"""Files from anywhere: what is no plain picture is refused at little cost, and nothing survives but pixels."""

import asyncio
import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin

from services.chassis import errors
from services.user_svc.pictures import MAX_SIDE, PictureError, Pictures, shrink

CANARY = b"secret-place-47.3769N"


def picture(width: int = 400, height: int = 300, mode: str = "RGB") -> Image.Image:
    """Red on its left, blue on its right."""
    image = Image.new("RGB", (width, height), "blue")
    ImageDraw.Draw(image).rectangle((0, 0, width // 2 - 1, height), fill="red")
    return image.convert(mode)


def written(image: Image.Image, kind: str, **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def color(image: Image.Image, place: tuple[int, int]) -> tuple[int, ...]:
    pixel = image.convert("RGB").getpixel(place)
    assert isinstance(pixel, tuple)
    return pixel


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_says(width: int, height: int) -> bytes:
    """A PNG whose header promises more than there is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PNG, JPEG, WEBP = (written(picture(), kind) for kind in ("PNG", "JPEG", "WEBP"))
LOSSLESS = written(picture(), "WEBP", lossless=True)
EXTENDED = written(picture(mode="RGBA"), "WEBP", exif=b"Exif\0\0" + bytes(8))
GOOD = {"png": PNG, "jpeg": JPEG, "webp": WEBP, "lossless": LOSSLESS, "extended": EXTENDED}


@pytest.mark.parametrize("name", GOOD)
def test_makes_a_small_webp(name: str):
    result = opened(shrink(GOOD[name]))
    assert (result.format, result.size) == ("WEBP", (256, 192))
    left, right = color(result, (30, 90)), color(result, (220, 90))
    assert left[0] > 200 > 100 > left[2]
    assert right[2] > 200 > 100 > right[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_takes_every_kind_of_pixels(mode: str):
    image = picture(mode="L" if mode == "I;16" else "RGB").convert(mode)
    data = written(image, "JPEG" if mode == "CMYK" else "PNG")
    assert opened(shrink(data)).size == (256, 192)


def test_keeps_small_ones_small_and_transparency_transparent():
    data = written(Image.new("RGBA", (20, 10), (255, 0, 0, 0)), "PNG")
    result = opened(shrink(data))
    assert (result.size, result.mode) == ((20, 10), "RGBA")
    assert result.getchannel("A").getextrema() == (0, 0)


def test_turns_it_as_the_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side
    result = opened(shrink(written(picture(), "JPEG", exif=exif))).convert("RGB")
    assert result.size == (192, 256)
    assert color(result, (96, 20))[0] > 200 > color(result, (96, 230))[0]


def with_metadata(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = CANARY.decode()  # ImageDescription
    exif.get_ifd(0x8825)[29] = CANARY.decode()  # GPSDateStamp
    more: dict[str, Any] = {"exif": exif, "icc_profile": CANARY * 10}
    if kind == "JPEG":
        more["comment"] = CANARY
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", CANARY.decode())
        info.add_itxt("XML:com.adobe.xmp", CANARY.decode())
        more["pnginfo"] = info
    if kind == "WEBP":
        more["xmp"] = CANARY
    return written(picture(), kind, **more)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_metadata_survives(kind: str):
    data = with_metadata(kind)
    assert CANARY in data
    result = shrink(data)
    assert CANARY not in result
    for name in (b"EXIF", b"XMP ", b"ICCP"):
        assert name not in result
    assert not opened(result).getexif()


def refused_as(data: bytes) -> str:
    with pytest.raises(PictureError) as refused:
        shrink(data)
    return str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG",
        b"GIF89a" + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        b"<?xml version='1.0'?><svg/>",
        b"<html><script>alert(1)</script>",
        b"%PDF-1.7\n" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        b"BM" + bytes(100),
        b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
        b"\0\0\0\x20ftypavif" + bytes(100),
        b"II*\0" + bytes(100),
    ],
)
def test_refuses_other_files(data: bytes):
    assert "neither PNG nor JPEG nor WebP" in refused_as(data)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO"])
def test_refuses_real_pictures_of_other_kinds(kind: str):
    assert "neither PNG nor JPEG nor WebP" in refused_as(written(picture(64, 64), kind))


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_refuses_bombs_by_what_they_say(size: tuple[int, int]):
    assert "4,096" in refused_as(png_that_says(*size))
    jpeg = bytearray(JPEG)
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = struct.pack(">HH", min(size[1], 65535), min(size[0], 65535))
    assert "4,096" in refused_as(bytes(jpeg))
    extended = bytearray(EXTENDED)
    extended[24:27], extended[27:30] = (
        (min(side, 1 << 24) - 1).to_bytes(4, "little", signed=True)[:3] for side in size
    )
    assert "4,096" in refused_as(bytes(extended))


def test_takes_the_largest_and_refuses_what_is_not_there():
    data = written(Image.new("L", (MAX_SIDE, MAX_SIDE)), "PNG")
    assert opened(shrink(data)).size == (256, 256)
    assert "damaged" in refused_as(png_that_says(4000, 4000))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_refuses_what_moves(kind: str):
    frames = [picture(40, 40), picture(40, 40).rotate(90), picture(40, 40).rotate(180)]
    data = written(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert "animated" in refused_as(data)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("tail", [b"PK\x05\x06" + bytes(18), b"<script>alert(1)</script>", b"\0"])
def test_refuses_two_files_in_one(name: str, tail: bytes):
    assert "something else behind it" in refused_as(GOOD[name] + tail)


@pytest.mark.parametrize("name", GOOD)
def test_refuses_what_is_cut_off(name: str):
    data = GOOD[name]
    for length in {*range(1, min(len(data), 200)), len(data) // 2, len(data) - 1}:
        refused_as(data[:length])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(GOOD)),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damage_is_refused_or_harmless(name: str, changes: list[tuple[float, int]]):
    data = bytearray(GOOD[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        result = opened(shrink(bytes(data)))
    except PictureError:
        return
    assert result.format == "WEBP"
    assert max(result.size) <= 256


@settings(max_examples=100, deadline=None)
@given(
    head=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x10\0\0\0WEBPVP8X"]), rest=st.binary()
)
def test_noise_is_refused(head: bytes, rest: bytes):
    refused_as(head + rest)


async def test_of_many_at_once_some_wait_and_the_others_are_refused():
    pictures = Pictures()
    try:
        outcomes = await asyncio.gather(
            *(pictures.avatar(PNG, "image") for _ in range(40)), return_exceptions=True
        )
        refusals = [each for each in outcomes if isinstance(each, errors.Error)]
        assert [each.reason for each in refusals] == ["OVERLOADED"] * 23
        assert all(opened(each).size == (256, 192) for each in outcomes if isinstance(each, bytes))
        await pictures.avatar(PNG, "image")
    finally:
        pictures.close()
