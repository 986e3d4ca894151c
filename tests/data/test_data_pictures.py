"""Encoded images of every kind, and bytes that are none: pixels, or one line that says why not."""

import io
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from data.pictures import FORMATS, MOST_PIXELS, decode


def picture(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_each_format_is_read(kind: str, mode: str) -> None:
    content = encoded(picture(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert(mode))
    assert np.array_equal(np.asarray(decode(content, mode)), expected)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(decode(memoryview(content), mode)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("asked", ["L", "RGB"])
def test_each_mode_is_converted(mode: str, asked: str) -> None:
    image = picture("RGB" if mode == "RGBA" else mode) if mode != "RGBA" else picture("RGBA")
    content = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    decoded = decode(content, asked)  # type: ignore[arg-type]
    assert (decoded.mode, decoded.size) == (asked, (12, 8))
    stored = Image.open(io.BytesIO(content))
    assert stored.mode == mode
    assert np.array_equal(np.asarray(decoded), np.asarray(stored.convert(asked)))
    assert decode(content).mode == mode


def test_alpha_is_dropped_and_a_palette_with_it() -> None:
    image = Image.new("RGBA", (2, 1), (200, 10, 30, 0))
    assert decode(encoded(image), "RGB").getpixel((0, 0)) == (200, 10, 30)
    palette = image.convert("P")
    assert decode(encoded(palette, transparency=0), "RGB").size == (2, 1)


def test_adobe_cmyk_photographs_are_not_negatives() -> None:
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert decode(encoded(white, "JPEG"), "RGB").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_picture_is_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 0 and 9 are no orientations
    content = encoded(picture(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert expected.size == ((8, 12) if orientation in (5, 6, 7, 8) else (12, 8))
    assert np.array_equal(np.asarray(decode(content, "RGB")), np.asarray(expected))


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff" * 3]
)
def test_an_exif_block_that_cannot_be_read_asks_for_nothing(block: bytes) -> None:
    plain = encoded(picture(), "JPEG")
    with_block = encoded(picture(), "JPEG", exif=block)
    assert np.array_equal(np.asarray(decode(with_block, "RGB")), np.asarray(decode(plain, "RGB")))


def test_of_an_animation_the_first_frame_is_read() -> None:
    first, second = Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 250)
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert decode(content, "L").getpixel((0, 0)) == 10


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_grey_of_more_than_8_bits_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="pixels do not fit in 8 bits"):
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"), "L")


def test_of_16_bit_colour_the_upper_half_is_read() -> None:
    row = struct.pack(">6H", 0x12FF, 0x3400, 0x5678, 0xFFFF, 0x0001, 0x80FF)
    content = png(2, 1, depth=16, colour=2, rows=b"\0" + row)
    assert list(np.asarray(decode(content, "RGB")).ravel()) == [0x12, 0x34, 0x56, 0xFF, 0x00, 0x80]


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 10_000, 40_000, 2**31 - 1])
def test_a_few_bytes_that_ask_for_gigabytes_are_refused_unread(side: int) -> None:
    content = png(side, side, depth=8, colour=2, rows=bytes(100))
    assert len(content) < 100
    assert side * side > MOST_PIXELS
    with pytest.raises(ValueError, match="pixels") as refused:
        decode(content, "RGB")
    assert "\n" not in str(refused.value)


def test_a_bomb_of_text_is_refused() -> None:
    bomb = b"k\0\0" + zlib.compress(bytes(80_000_000))
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    content = png(1, 1, depth=8, colour=0, rows=b"\0\0")
    with pytest.raises(ValueError, match="ecompress"):
        decode(content[:33] + chunk + content[33:], "L")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_file_of_which_a_part_is_missing_is_refused(kind: str) -> None:
    content = encoded(picture(size=(40, 40)), kind)
    for kept in (0, 1, 3, 10, len(content) // 3, len(content) // 2, len(content) * 3 // 4):
        with pytest.raises(ValueError, match=r"\w+") as refused:
            decode(content[:kept], "RGB")
        assert "\n" not in str(refused.value)


def test_formats_that_run_programs_or_were_not_asked_for_are_not_tried() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(evil) print\n"
    for content in (eps, encoded(picture(), "ICO"), encoded(picture(), "PCX"), b"<svg/>", b"GIF89a"):
        with pytest.raises(ValueError, match="JPEG, PNG, BMP"):
            decode(content, "RGB")


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_altered_files_are_pixels_or_one_line(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"]))
    content = bytearray(SEEDS[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(content), "RGB")
    except ValueError as error:
        said = str(error).splitlines()
        assert len(said) == 1
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= MOST_PIXELS


def seed_file(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), kind, **({} if kind in ("BMP", "GIF", "PPM") else {"exif": exif}))


SEEDS = {kind: seed_file(kind) for kind in FORMATS}


def test_threads_decode_as_one() -> None:
    contents = [encoded(picture(size=(64 + number, 64)), "JPEG") for number in range(40)]
    alone = [decode(content, "RGB").tobytes() for content in contents]
    found: dict[int, bytes] = {}

    def work(first: int) -> None:
        for number in range(first, 40, 4):
            found[number] = decode(contents[number], "RGB").tobytes()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(40)] == alone
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
