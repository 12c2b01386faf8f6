"""Pictures that people send: read with suspicion, and written anew so that nothing survives but what is seen.

Decoding is left to a thread, one file at a time: a picture of 4,096 by 4,096 pixels takes 64 MiB while it is read. What
a file says of its size is looked at before anything is decoded (CWE-409); what is said of its type never counts.
"""

import asyncio
import io
import struct
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps

from services.chassis import errors

MAX_BYTES = 1 << 20
MAX_SIDE = 4096
SIDE = 256
_FORMATS = ("PNG", "JPEG", "WEBP")
_QUEUE = 16

# Sizes are checked here, before decoding; Pillow's own check would warn about some and refuse others.
Image.MAX_IMAGE_PIXELS = None


class Pictures:
    """Reads pictures in threads of its own."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = ThreadPoolExecutor(threads, "pictures")
        self._room = threads + _QUEUE

    async def avatar(self, data: bytes, field: str) -> bytes:
        """The picture as a WebP of at most 256 by 256 pixels without metadata.

        Raises INVALID_ARGUMENT (AVATAR_INVALID), naming the field, or RESOURCE_EXHAUSTED (OVERLOADED).
        """
        if len(data) > MAX_BYTES:
            raise _invalid("is larger than 1 MiB", field)
        if self._room <= 0:
            raise errors.resource_exhausted(
                "OVERLOADED", "Too many pictures are being read.", retry_seconds=1
            )
        self._room -= 1
        loop = asyncio.get_running_loop()
        future = self._threads.submit(shrink, data)
        # By the thread's future: who gives up waiting leaves its work behind.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave))
        try:
            return await asyncio.wrap_future(future)
        except PictureError as error:
            raise _invalid(str(error), field) from error

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _leave(self) -> None:
        self._room += 1


class PictureError(Exception):
    """What is wrong with a file."""


def shrink(data: bytes) -> bytes:
    """A WebP of at most 256 by 256 pixels of what the file shows. Raises PictureError."""
    width, height = _size(data)
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE:
        raise PictureError("has more than 4,096 by 4,096 pixels")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # MPO is a JPEG with further pictures behind it, as phones write them: the first one is meant.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise PictureError("is animated")
            if max(image.size) > MAX_SIDE:  # another frame than the first header said
                raise PictureError("has more than 4,096 by 4,096 pixels")
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG is not read at its full size
            image.load()
            turned = _turned(image)
            seen = turned.convert("RGBA" if turned.has_transparency_data else "RGB")
            seen.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            # Pixels alone: what an image object remembers of its file stays behind.
            clean = Image.frombytes(seen.mode, seen.size, seen.tobytes())
            written = io.BytesIO()
            clean.save(written, "WEBP", quality=85, method=4)
            return written.getvalue()
    except PictureError:
        raise
    except Exception as error:  # decoders of files from anywhere raise whatever they like
        raise PictureError("is damaged") from error


def _turned(image: Image.Image) -> Image.Image:
    """The picture as the camera was held; as it is where what is said of that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the same decoders
        return image


def _size(data: bytes) -> tuple[int, int]:
    """Width and height by the header, of a file that ends where its format says. Raises PictureError."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _size_of_png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _size_of_jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _size_of_webp(data)
    except (struct.error, IndexError) as error:
        raise PictureError("is cut off") from error
    raise PictureError("is neither PNG nor JPEG nor WebP")


def _size_of_png(data: bytes) -> tuple[int, int]:
    """PNG (Third Edition), sections 5.3 and 11.2.1."""
    if data[12:16] != b"IHDR":
        raise PictureError("is damaged")
    place = 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        place += 12 + length
        if kind == b"acTL":
            raise PictureError("is animated")
        if kind == b"IEND":
            break
    if place != len(data):
        raise PictureError("is cut off, or has something else behind it")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _size_of_jpeg(data: bytes) -> tuple[int, int]:
    """ITU-T T.81, annex B: segments up to the first frame header."""
    if not data.endswith(b"\xff\xd9"):
        raise PictureError("is cut off, or has something else behind it")
    place = 2
    while True:
        marker, kind, length = struct.unpack_from(">BBH", data, place)
        if marker != 0xFF or length < 2:
            raise PictureError("is damaged")
        if kind == 0xFF:  # a fill byte
            place += 1
            continue
        if 0xC0 <= kind <= 0xCF and kind not in {0xC4, 0xC8, 0xCC}:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        if kind in {0xD9, 0xDA}:
            raise PictureError("is damaged")
        place += 2 + length


def _size_of_webp(data: bytes) -> tuple[int, int]:
    """RFC 9649, section 2."""
    size, kind = struct.unpack_from("<I4x4s", data, 4)
    if size + 8 != len(data):
        raise PictureError("is cut off, or has something else behind it")
    if kind == b"VP8X":
        if data[20] & 0x02:
            raise PictureError("is animated")
        # The canvas; Pillow's decoder makes room for it when it opens the file.
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise PictureError("is damaged")


def _invalid(what: str, field: str) -> errors.Error:
    return errors.invalid_argument("AVATAR_INVALID", f"The picture {what}.", field=field)
