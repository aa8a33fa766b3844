"""Pictures as we write them: PNG with the settings inside, contact sheets, curves."""

import contextlib
import json
import math
import re
from bisect import bisect_right
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from model.files import atomic_write


def parameters(prompt: str, negative_prompt: str, settings: dict[str, object]) -> str:
    """The A1111 web UI's text for a picture: the prompt, "Negative prompt: ...", and one line of "Key: value, ..."."""
    def quoted(value: object) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text

    lines = [prompt] + ([f"Negative prompt: {negative_prompt}"] if negative_prompt else [])
    return "\n".join([*lines, ", ".join(f"{key}: {quoted(value)}" for key, value in settings.items())])


def read_parameters(text: str) -> dict[str, str]:
    """The settings in such a text, with "Negative prompt" as one of them. A1111's own texts are read as well. Of the
    settings' line 4,000 characters count: to look through it takes time by its square."""
    *prompt, last = text.split("\n")
    found = {}
    for key, value in re.findall(r'(\w[\w ]*): ("(?:\\.|[^\\"])*"|[^,]*)(?:, |$)', last[:4000]):
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
    canvas = ImageDraw.Draw(page)
    for i, (thumb, caption) in enumerate(zip(thumbs, lines, strict=True)):
        x, y = 8 + i % columns * pitch_x, 8 + i // columns * pitch_y
        page.paste(thumb, (x, y))
        for j, line in enumerate(caption):
            canvas.text((x, y + height + 2 + 14 * j), line, fill="black", font=font)
    return page


def curves(series: dict[str, list[float]], width: int = 720, height: int = 150) -> Image.Image:
    """A chart for every series, one below the other: the values, pale, and their running mean."""
    font = ImageFont.load_default(12)
    page = Image.new("RGB", (width + 90, (height + 34) * len(series) + 10), "white")
    canvas = ImageDraw.Draw(page)
    for row, (name, values) in enumerate(series.items()):
        values = [value if abs(value) < 1e30 else 0.0 for value in values]       # a line to infinity takes seconds
        top, left = row * (height + 34) + 24, 76
        low, high = min(values), max(values)
        high = high if high > low else low + (abs(low) or 1.0)

        canvas.rectangle((left, top, left + width, top + height), outline="#bbbbbb")
        title = f"{name}: last {values[-1]:.5g}, steps 1 to {len(values)}"
        canvas.text((left, top - 18), title, fill="black", font=font)
        canvas.text((6, top), f"{high:.3g}", fill="#555555", font=font)
        canvas.text((6, top + height - 14), f"{low:.3g}", fill="#555555", font=font)
        window = max(1, len(values) // 20)
        sums = [0.0]
        for value in values:
            sums.append(sums[-1] + value)
        means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
        for line, colour, thick in ((values, "#b8d4f0", 1), (means, "#1f5fa8", 2)):
            x = [left + width * i / max(len(line) - 1, 1) for i in range(len(line))]
            y = [top + height * (1 - (value - low) / (high - low)) for value in line]
            canvas.line(list(zip(x, y)), fill=colour, width=thick)
    return page


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """At most `most` lines of at most `width` pixels, cut between words where there is a space; dots stand for the
    rest."""
    lines, rest = [], " ".join(text.split())[:1000]            # no three lines hold more
    while rest and len(lines) < most:
        fit = bisect_right(range(1, len(rest) + 1), width, key=lambda n: font.getlength(rest[:n]))     # characters
        if fit < len(rest):
            fit = max(rest.rfind(" ", 0, fit + 1), 0) or max(fit, 1)
        lines.append(rest[:fit])
        rest = rest[fit:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-3].rstrip() + " ..."
    return lines
