"""Picture files that others made: opened with suspicion, listed with their prompts, encoded."""

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import NoneType

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model.checkpoint import Pipeline
from model.errors import UserError
from model.files import read_lines
from model.preprocess import has_alpha, over_white

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")        # Pillow knows more: an EPS would start Ghostscript
Image.MAX_IMAGE_PIXELS = 64_000_000              # no picture of ours is larger; a bomb is refused, not unpacked
LONGEST, STRETCHED = 16_384, 50                  # pixels a side; and long side over short side
warnings.simplefilter("ignore", Image.DecompressionBombWarning)                  # `open_picture` refuses these itself


def open_picture(source: Path | bytes, where: str | None = None, keep_alpha: bool = False) -> Image.Image:
    """A picture from a file or from a file's bytes: decoded to its end, upright, and RGB, over white where it is
    transparent; with `keep_alpha` such a picture is RGBA. Of an animation it is the first picture. `info` keeps the
    texts of a PNG and nothing else.

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
            image = eight_bits(ImageOps.exif_transpose(image))
            image = image.convert("RGBA") if keep_alpha and has_alpha(image) else over_white(image)
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


def lies_in(folder: Path, name: str) -> bool:
    """Whether the name that a list has for a file leads to a place in the folder, its links followed."""
    root = os.path.realpath(folder)
    try:
        path = os.path.realpath(os.path.join(root, name))
        return not os.path.isabs(name) and os.path.commonpath((root, path)) == root
    except ValueError:                           # with a zero byte or half an emoji: no file has such a name
        return True


def read_listing(path: Path, folders: Sequence[Path] = (), **more: type) -> list[dict]:
    """The lines of an images.jsonl, one a picture: `file`, `prompt`, and what else is asked for, each of its type; what
    may be None is left out where it is not there. `folders` are those with such files (default: the list's own)."""
    rows = read_lines(path, file=str, prompt=str, **more)
    for row in rows:
        if ".." in Path(row["file"]).parts or not all(lies_in(one, row["file"]) for one in folders or [path.parent]):
            raise UserError(f"{path}: {row['file']!r:.200} lies outside the folder, or is a link to there")
        people = row.get("concept_images") or []
        if "concept_images" in more and not all(isinstance(name, str) for name in people):
            raise UserError(f"{path}: concept_images is {people!r:.60}; a list of pictures was expected")
    if not rows:
        raise UserError(f"{path}: no picture in it")
    return [{key: row[key] for key in ("file", "prompt", *more) if row.get(key) is not None}
            | {"prompt": row["prompt"].encode(errors="replace").decode()} for row in rows]      # half an emoji: ?


def read_captions(path: Path, folders: Sequence[Path] = ()) -> list[dict]:
    """{file, prompt} as scorers and people read them: where a picture was drawn of a person, so that its prompt has a
    concept's placeholder in it, its caption is its prompt."""
    rows = read_listing(path, folders, concept_images=(list, NoneType), caption=(str, NoneType))
    return [{"file": row["file"], "prompt": row["caption" if {"concept_images", "caption"} <= row.keys() else "prompt"]}
            for row in rows]


@torch.no_grad()
def to_latent(image: Image.Image, pipeline: Pipeline) -> Tensor:
    """A picture of a size that the VAE takes -> its scaled latent (4, h, w), the mean of the VAE's posterior."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    pixels = pixels.to(pipeline.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    return pipeline.vae.to_latent(pipeline.vae.encode(pixels)[0])[0]


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover the size, and cut around the centre."""
    return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
