"""Pictures from strange files: every format and mode against RGB worked out here, upright, and what is refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import score
from dataset.images import FORMATS, open_picture
from dataset.preferences import read_images
from model.errors import UserError
from pictures import parameters, read_parameters

rng = np.random.default_rng(0)
GREY = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)
DEEP = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)         # 16 bits
ALPHA = GREY.T.reshape(6, 8)
RGB = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
DEEP_RGB = rng.integers(0, 65536, (6, 8, 3), dtype=np.uint16)
CMYK = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
BLACK_AND_WHITE = (GREY > 100) * np.uint8(255)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def coded(pixels, form, mode=None, **options):
    image = Image.fromarray(pixels)
    return encoded(image.convert(mode) if mode else image, form, **options)


def png(pixels, kind, clear=b""):
    """A PNG of 16 bits a channel; Pillow writes none but grey. `kind` is 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
            + (chunk(b"tRNS", clear) if clear else b"") + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def tripled(grey):
    return np.repeat(np.asarray(grey, dtype=np.float64)[..., None], 3, axis=-1)


def on_white(colours, alpha):
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def cleared(colours, where):
    return np.where(where[..., None], 255, colours)


def deep_alpha(colours):
    return np.concatenate([colours, ALPHA[..., None].astype(np.uint16) * 257], axis=-1)


PALETTE = Image.fromarray(GREY // 16).convert("P")               # 16 indices, of which each has its colour
PALETTE.putpalette(list(rng.integers(0, 256, 48)))
COLOURS = np.asarray(PALETTE.convert("RGB"), dtype=np.float64)
INDICES = np.asarray(PALETTE)
FADES = bytes(range(0, 256, 17))                                 # an alpha for each index
LESS_INK = (255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255
FLAT = np.full((16, 16, 4), (200, 30, 90, 40), dtype=np.uint8)
LA, RGBA = np.stack([GREY, ALPHA], -1), np.concatenate([RGB, ALPHA[..., None]], -1)
FLOATS = DEEP / np.float32(65535)
ODD = FLOATS.copy()
ODD[0, 0], ODD[0, 1], ODD[0, 2], ODD[5, 7] = np.nan, -0.2, -np.inf, 1.05
ODD_GREY = np.where(np.isfinite(ODD), ODD, 0).clip(0, 1) * 255

CASES = {
    **{f"RGB {form}": (coded(RGB, form), RGB) for form in ("PNG", "BMP", "TIFF")},
    "RGB WEBP": (coded(RGB, "WEBP", lossless=True), RGB),
    **{f"L {form}": (coded(GREY, form), tripled(GREY)) for form in ("PNG", "BMP", "TIFF", "GIF")},
    **{f"1 {form}": (coded(BLACK_AND_WHITE, form, "1"), tripled(BLACK_AND_WHITE)) for form in ("PNG", "BMP", "TIFF")},
    "L JPEG": (coded(FLAT[..., 0], "JPEG", quality=100), tripled(FLAT[..., 0])),
    "RGB JPEG": (coded(FLAT[..., :3], "JPEG", quality=100), FLAT[..., :3]),
    # Grey of more than 8 bits
    "I;16 PNG": (coded(DEEP, "PNG"), tripled(DEEP / 257)),
    "I;16 TIFF": (coded(DEEP, "TIFF"), tripled(DEEP / 257)),
    "I;16B TIFF": (coded(DEEP.astype(">u2"), "TIFF"), tripled(DEEP / 257)),
    "I TIFF": (coded(DEEP.astype(np.int32), "TIFF"), tripled(DEEP / 257)),
    "I TIFF, 31 bits": (coded(DEEP.astype(np.int32) * 32768, "TIFF"), tripled(DEEP / 257)),
    "I;16 PNG, dark": (coded(DEEP // 300, "PNG"), tripled(DEEP // 300 / 257)),
    "I;16 PNG, a clear grey": (png(DEEP, 0, DEEP[2, 3].tobytes()[::-1]),
                               cleared(tripled(DEEP / 257), DEEP == DEEP[2, 3])),
    "F TIFF": (coded(FLOATS, "TIFF"), tripled(DEEP / 257)),
    "F TIFF of 255": (coded(FLOATS * 255, "TIFF"), tripled(DEEP / 257)),
    "F TIFF of 65535": (coded(DEEP.astype(np.float32), "TIFF"), tripled(DEEP / 257)),
    "F TIFF of millions": (coded(FLOATS * np.float32(5e6), "TIFF"), tripled(DEEP / 257)),
    "F TIFF with NaN and overshoot": (coded(ODD, "TIFF"), tripled(ODD_GREY)),
    "F TIFF, black": (coded(FLOATS * 0, "TIFF"), tripled(GREY * 0)),
    # Colours of 16 bits, of which Pillow keeps the high bytes
    "RGB PNG, 16 bits": (png(DEEP_RGB, 2), DEEP_RGB >> 8),
    "RGB PNG, 16 bits, a clear colour": (png(DEEP_RGB, 2, DEEP_RGB[1, 1].astype(">u2").tobytes()),
                                         cleared(DEEP_RGB >> 8, (DEEP_RGB == DEEP_RGB[1, 1]).all(-1))),
    "LA PNG, 16 bits": (png(deep_alpha(DEEP[..., None]), 4), on_white(tripled(DEEP / 257), ALPHA)),
    "RGBA PNG, 16 bits": (png(deep_alpha(DEEP_RGB), 6), on_white(DEEP_RGB / 257, ALPHA)),
    # Transparency
    **{f"LA {form}": (coded(LA, form), on_white(tripled(GREY), ALPHA)) for form in ("PNG", "TIFF")},
    **{f"RGBA {form}": (coded(RGBA, form), on_white(RGB, ALPHA)) for form in ("PNG", "TIFF")},
    "RGBA WEBP": (coded(RGBA, "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA)),
    "L PNG, a clear grey": (coded(GREY, "PNG", transparency=int(GREY[2, 3])),
                            cleared(tripled(GREY), GREY == GREY[2, 3])),
    "RGB PNG, a clear colour": (coded(RGB, "PNG", transparency=tuple(RGB[1, 1].tolist())),
                                cleared(RGB, (RGB == RGB[1, 1]).all(-1))),
    # Palettes
    **{f"P {form}": (encoded(PALETTE, form), COLOURS) for form in ("PNG", "GIF", "BMP", "TIFF")},
    **{f"P {form}, a clear colour": (encoded(PALETTE, form, transparency=7), cleared(COLOURS, INDICES == 7))
       for form in ("PNG", "GIF")},
    "P PNG, fading": (encoded(PALETTE, "PNG", transparency=FADES),
                      on_white(COLOURS, np.frombuffer(FADES, np.uint8)[INDICES])),
    "PA TIFF": (encoded(PALETTE.convert("PA"), "TIFF"), COLOURS),
    # Ink
    "CMYK TIFF": (encoded(Image.frombytes("CMYK", (8, 6), CMYK.tobytes()), "TIFF"), LESS_INK),
    "CMYK JPEG": (encoded(Image.frombytes("CMYK", (16, 16), FLAT.tobytes()), "JPEG", quality=100),
                  (255.0 - FLAT[..., :3]) * (255.0 - FLAT[..., 3:]) / 255),
    # Several pictures in a file
    "GIF, animated": (encoded(PALETTE, "GIF", save_all=True, append_images=[Image.new("P", (8, 6))]), COLOURS),
    "JPEG of a phone": (encoded(Image.fromarray(FLAT[..., :3]), "MPO", quality=100, save_all=True,
                                append_images=[Image.new("RGB", (16, 16))]), FLAT[..., :3]),
}


@pytest.mark.parametrize("content, wanted", CASES.values(), ids=CASES)
def test_every_kind_becomes_the_same_rgb(content, wanted):
    image = open_picture(content, "here")
    assert image.mode == "RGB" and image.size == wanted.shape[1::-1]
    # Pillow rounds ink and the high bytes of 16 bits on its own; JPEG a little more.
    np.testing.assert_allclose(np.asarray(image, dtype=np.float64), wanted, atol=2 if content[:2] == b"\xff\xd8" else 1)


TURNED = {
    1: lambda up: up, 2: lambda up: up[:, ::-1], 3: lambda up: up[::-1, ::-1], 4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1), 6: np.rot90, 7: lambda up: np.rot90(up, 2).swapaxes(0, 1),
    8: lambda up: np.rot90(up, -1)}


@pytest.mark.parametrize("form, options", [
    ("JPEG", {"quality": 100}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_all_orientations_come_out_upright(form, options):
    upright = np.repeat(np.repeat(np.array([[[250, 20, 20], [20, 250, 20], [20, 20, 250]],
                                            [[0, 0, 0], [255, 255, 255], [128, 128, 128]]], np.uint8), 16, 0), 16, 1)
    for number, turned in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = number
        image = open_picture(coded(np.ascontiguousarray(turned(upright)), form, exif=exif, **options))
        assert image.size == (48, 32), number
        assert np.abs(np.asarray(image).astype(int) - upright)[4::8, 4::8].max() < 12, number


def test_texts_stay_and_nothing_else_does(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 10")
    info.add_itxt("note", "雨")
    Image.new("LA", (8, 6)).save(tmp_path / "a.png", pnginfo=info, dpi=(30, 30), icc_profile=b"of grey")
    assert open_picture(tmp_path / "a.png").info == {"parameters": "a cat\nSteps: 10", "note": "雨"}


# What is refused

NOISE = Image.effect_noise((64, 64), 80)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_half_a_picture_is_none(tmp_path, form):
    content = encoded(NOISE if form == "GIF" else NOISE.convert("RGB"), form)
    assert open_picture(content, "whole").size == (64, 64)
    path = tmp_path / "half"
    for length in (len(content) // 2, 20, 0):
        path.write_bytes(content[:length])
        for source in (path, content[:length]):
            with pytest.raises(UserError, match="^here: not a readable picture") as error:
                open_picture(source, "here")
            assert "\n" not in str(error.value)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file\nshowpage\n%%EOF\n"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")          # pictures.py's own is undone here
def test_what_is_no_picture_is_refused_in_one_line(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, content in {
            "eps.png": EPS, "text.png": b"<html>", "empty.png": b"", "ppm.png": b"P6 1 1 255 abc",
            "wide.png": encoded(Image.new("L", (6000, 100)), "PNG"),
            "long.png": encoded(Image.new("1", (16_500, 600)), "PNG"),
            "big.png": encoded(Image.new("1", (9000, 8000)), "PNG"),
            "bomb.png": encoded(Image.new("1", (14_000, 14_000)), "PNG")}.items():
        (tmp_path / name).write_bytes(content)
    for name, words in {
            "eps.png": "not a readable picture (none of PNG, JPEG, ", "text.png": "not a readable picture",
            "empty.png": "not a readable picture", "ppm.png": "not a readable picture",
            "folder.png": "no such picture", "missing.png": "no such picture", "nul\0.png": "no such picture",
            "half \ud83d.png": "no such picture", "x" * 300 + ".png": "not a readable picture (",
            "wide.png": "6000x100 pixels; at most 16384 a side, 64000000 in all, and 50 times as long as wide",
            "long.png": "16500x600 pixels; at most", "big.png": "9000x8000 pixels; at most",
            "bomb.png": "far too many pixels; at most"}.items():
        with pytest.raises(UserError) as error:
            open_picture(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {words}") and "\n" not in str(error.value)


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(coded(RGB, "PNG"))
    assert np.array_equal(open_picture(path), RGB)
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="caf\udce9.png: not a readable picture"):
        open_picture(path)


# One way for all programs

def test_preferences_and_score_see_the_same_pixels(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    NOISE.convert("RGB").resize((40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    for name in ("I;16 PNG", "LA PNG", "P PNG, fading", "CMYK JPEG"):
        (tmp_path / f"{name}.png").write_bytes(CASES[name][0])
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "metadata.jsonl").write_text("".join(f'{{"file_name": "{name}", "text": ""}}\n' for name in names))
    scored = []
    monkeypatch.setattr(score, "load_scorer", lambda *_: lambda images, _: scored.extend(images) or torch.zeros(5))
    rows, bad = [{"file": name, "prompt": "", "scores": {}} for name in names], {}
    score.score_all("any", tmp_path, rows, bad, 5, torch.device("cpu"), torch.float32)
    preferred = [pair.load()[1]["w"] for pair in read_images(tmp_path)]
    assert not bad and len(scored) == 5 and scored[-1].size == (20, 40)
    assert all(a.mode == b.mode == "RGB" and a.tobytes() == b.tobytes() for a, b in zip(scored, preferred, strict=True))


def test_settings_are_read_back():
    """Ours, with quotes and several lines; A1111's; and quotes that somebody broke."""
    settings = {"Steps": 5, "Model": 'my, "model": v1', "CFG scale": "7"}
    text = parameters("a cat\nand a dog", "bad, (ugly)", settings)
    assert read_parameters(text) == {"Steps": "5", "Model": 'my, "model": v1', "CFG scale": "7",
                                     "Negative prompt": "bad, (ugly)"}
    assert read_parameters("a\nSteps: 20, Size: 1x2, Version: v1.10.1")["Version"] == "v1.10.1"
    assert read_parameters('a\nSteps: 20, Model: "\\q"') == {"Steps": "20", "Model": '"\\q"'}
    assert read_parameters("") == read_parameters("a, b") == {}
    assert read_parameters(f"a\nSteps: 20, Note: {'x' * 4000}, Size: 1x2") == {"Steps": "20", "Note": "x" * 3983}
