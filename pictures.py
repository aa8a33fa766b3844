"""Pictures as files: strange ones opened with suspicion, pixels from the decoder, PNG with the settings inside, contact
sheets.
"""

import contextlib
import io
import json
import math
import re
import warnings
from bisect import bisect_right
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from model.errors import UserError
from model.files import atomic_write
from model.preprocess import over_white

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")        # Pillow knows more: an EPS would start Ghostscript
Image.MAX_IMAGE_PIXELS = 64_000_000              # no picture of ours is larger; a bomb is refused, not unpacked
LONGEST, STRETCHED = 16_384, 50                  # pixels a side; and long side over short side
warnings.simplefilter("ignore", Image.DecompressionBombWarning)                  # `open_picture` refuses these itself


def open_picture(source: Path | bytes, where: str | None = None) -> Image.Image:
    """A picture from a file or from a file's bytes: decoded to its end, upright, and RGB, over white where it is
    transparent. Of an animation it is the first picture. `info` keeps the texts of a PNG and nothing else.

    `where` is what errors call it (default: the path). Raises UserError where it is none of FORMATS, damaged, too
    large, or not there.
    """
    where = str(source) if where is None else where
    try:
        if isinstance(source, Path) and not source.is_file():
            raise UserError(f"{where}: no such picture")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if math.prod(image.size) > Image.MAX_IMAGE_PIXELS \
                    or max(image.size) > min(LONGEST, STRETCHED * min(image.size)):
                raise too_large(where, f"{image.width}x{image.height}")
            image.load()
            texts = {key: text for key, text in image.info.items() if isinstance(text, str)}
            image = over_white(eight_bits(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError:
        raise too_large(where, "far too many") from None
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{where}: not a readable picture (none of {', '.join(FORMATS)})") from None
    except Exception as error:                   # the decoders' errors have no class in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: not a readable picture ({reason})") from None
    image.info = texts                           # the others, such as a profile of CMYK, tell of the file as it was
    return image


def too_large(where: str, size: str) -> UserError:
    return UserError(
        f"{where}: {size} pixels; at most {LONGEST} a side, {Image.MAX_IMAGE_PIXELS} in all, and {STRETCHED} times as "
        "long as wide")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, whole or float, is scaled to 8: Pillow's own convert cuts it off at 255. Other pictures
    stay as they are, but for the transparent colour that an RGB of 16 bits may have, of which Pillow keeps the high
    bytes.

    Whole numbers are of 16 bits, whatever they are kept in. Of floats nobody says which is white: it is the first of
    1, 255 and 65535 that is not passed by twofold. Where all are, the brightest pixel is white.
    """
    clear = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float32)
        values = np.where(np.isfinite(values), values, 0)
        brightest = values.max()
        usual = (1, 255, 65535) if image.mode == "F" else (65535,)
        white = next((value for value in usual if brightest < 2 * value), brightest)
        grey = (values / white * 255).round().clip(0, 255)
        return Image.fromarray(np.where(values == clear, 255, grey).astype(np.uint8))
    if isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image


def to_images(decoded: torch.Tensor) -> list[Image.Image]:
    """Decoded (B, 3, H, W), about [-1, 1] -> B pictures. Rounded half to even, as diffusers does."""
    pixels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def parameters(prompt: str, negative_prompt: str, settings: dict[str, object]) -> str:
    """The A1111 web UI's text for a picture: the prompt, "Negative prompt: ...", and one line of "Key: value, ..."."""
    def quoted(value: object) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text

    lines = [prompt] + ([f"Negative prompt: {negative_prompt}"] if negative_prompt else [])
    return "\n".join([*lines, ", ".join(f"{key}: {quoted(value)}" for key, value in settings.items())])


def read_parameters(text: str) -> dict[str, str]:
    """The settings in such a text, with "Negative prompt" as one of them. A1111's own texts are read as well."""
    *prompt, last = text.split("\n")
    found = {}
    for key, value in re.findall(r'(\w[\w ]*): ("(?:\\.|[^\\"])*"|[^,]*)(?:, |$)', last):
        found[key] = value.strip()
        with contextlib.suppress(ValueError):  # quotes that are no JSON stay as they are
            found[key] = json.loads(value) if value.startswith('"') else found[key]
    negative = "\n".join(prompt).partition("\nNegative prompt: ")[2]
    return found | ({"Negative prompt": negative} if negative else {})


def write_png(path: Path, image: Image.Image, chunks: dict[str, str] | None = None) -> None:
    """`chunks` become PNG text chunks: tEXt where latin-1 holds them, else iTXt."""
    info = PngImagePlugin.PngInfo()
    for key, text in (chunks or {}).items():
        try:
            text.encode("latin-1")
            info.add_text(key, text)
        except UnicodeEncodeError:
            info.add_itxt(key, text)
    with atomic_write(path) as part:
        image.save(part, "PNG", pnginfo=info)


def sheet(images: list[Image.Image], captions: list[str], columns: int, cell: int = 192) -> Image.Image:
    """Pictures in rows of `columns`, each fitted into `cell` x `cell` pixels over its caption of up to three lines."""
    font = ImageFont.load_default(11)
    thumbs = []
    for image in images:
        scale = min(cell / image.width, cell / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        thumbs.append(image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS))
    width, height = max(thumb.width for thumb in thumbs), max(thumb.height for thumb in thumbs)
    lines = [wrapped(caption, font, width) for caption in captions]
    pitch_x, pitch_y = width + 8, height + 14 * max(map(len, lines)) + 8
    page = Image.new("RGB", (columns * pitch_x + 8, math.ceil(len(images) / columns) * pitch_y + 8), "white")
    draw = ImageDraw.Draw(page)
    for i, (thumb, caption) in enumerate(zip(thumbs, lines, strict=True)):
        x, y = 8 + i % columns * pitch_x, 8 + i // columns * pitch_y
        page.paste(thumb, (x, y))
        for j, line in enumerate(caption):
            draw.text((x, y + height + 2 + 14 * j), line, fill="black", font=font)
    return page


def curves(series: dict[str, list[float]], width: int = 720, height: int = 150) -> Image.Image:
    """A chart for every series, one below the other: the values, pale, and their running mean."""
    font = ImageFont.load_default(12)
    page = Image.new("RGB", (width + 90, (height + 34) * len(series) + 10), "white")
    draw = ImageDraw.Draw(page)
    for row, (name, values) in enumerate(series.items()):
        top, left = row * (height + 34) + 24, 76
        low, high = min(values), max(values)
        high = high if high > low else low + (abs(low) or 1.0)

        draw.rectangle((left, top, left + width, top + height), outline="#bbbbbb")
        draw.text((left, top - 18), f"{name}: last {values[-1]:.5g}, steps 1 to {len(values)}", fill="black", font=font)
        draw.text((6, top), f"{high:.3g}", fill="#555555", font=font)
        draw.text((6, top + height - 14), f"{low:.3g}", fill="#555555", font=font)
        window = max(1, len(values) // 20)
        sums = [0.0]
        for value in values:
            sums.append(sums[-1] + value)
        means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
        for line, colour, thick in ((values, "#b8d4f0", 1), (means, "#1f5fa8", 2)):
            x = [left + width * i / max(len(line) - 1, 1) for i in range(len(line))]
            y = [top + height * (1 - (value - low) / (high - low)) for value in line]
            draw.line(list(zip(x, y)), fill=colour, width=thick)
    return page


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """At most `most` lines of at most `width` pixels, cut between words where there is a space; dots stand for the
    rest."""
    lines, rest = [], " ".join(text.split())
    while rest and len(lines) < most:
        fit = bisect_right(range(1, len(rest) + 1), width, key=lambda n: font.getlength(rest[:n]))     # characters
        if fit < len(rest):
            fit = max(rest.rfind(" ", 0, fit + 1), 0) or max(fit, 1)
        lines.append(rest[:fit])
        rest = rest[fit:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-3].rstrip() + " ..."
    return lines
