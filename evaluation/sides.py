"""The sides of a comparison: a model, with LoRAs, with LAN, or a folder of pictures that generate.py wrote; and how
their pictures come to be, the same prompts from the same seeds on every side.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from PIL import Image
from torch import Tensor

from dataset.concepts import person_of
from dataset.images import open_picture, read_listing
from model.checkpoint import Pipeline
from model.concept import load_concept
from model.errors import UserError
from model.files import digest_all, files_read
from model.lora import split_lora
from pictures import parameters, read_parameters, write_png
from sampling import SAMPLERS, Drawing, draw_people, draw_pictures, picture_settings

LIKE = ("Steps", "Sampler", "CFG scale", "Clip skip", "Prompt weights", "Negative prompt",
        "Concept strength")                    # A1111's names, and one of ours


@dataclass(frozen=True)
class Side:
    name: str
    model: str                                 # a model, or a folder of pictures that are drawn already
    loras: tuple[str, ...] = ()                # FILE or FILE:WEIGHT
    lan: bool = False
    concept: tuple[str, float] | None = None   # FILE and strength

    @property
    def drawn(self) -> bool:
        return (Path(self.model) / "images.jsonl").is_file()

    def folder(self, out: Path) -> Path:
        return Path(self.model) if self.drawn else out / "images" / self.name

    def __str__(self) -> str:
        concept = ["{}:{:g}".format(*self.concept)] if self.concept else []
        return " + ".join([self.model, *self.loras, *concept, *["LAN"] * self.lan])


def parse_side(name: str, text: str, lan: bool = False) -> Side:
    """MODEL[+LORA[:WEIGHT]]...[+lan]"""
    model, *parts = [text] if Path(text).exists() else text.split("+")           # a path may hold a +
    return Side(name, model, tuple(part for part in parts if part != "lan"), lan or "lan" in parts)


def parse_compare(text: str, model: str, lan: bool) -> list[Side]:
    """NAME=LORA[:WEIGHT][+lan],... -> the candidates, each `model` with that."""
    sides = []
    for item in text.split(","):
        name, equals, loras = item.strip().partition("=")
        if not equals or not re.fullmatch(r"\w[\w.-]{0,59}", name) or name == "baseline":
            raise UserError(f"--compare {item}: expected NAME=LORA[:WEIGHT], with letters, digits, - and . in NAME")
        side = parse_side(name, f"+{loras}", lan)
        sides.append(Side(name, model, side.loras, side.lan))
    if len({side.name for side in sides}) < len(sides):
        raise UserError(f"--compare {text}: a name stands for two candidates")
    return sides


def check_sides(sides: list[Side], sampler: str) -> None:
    """Refuses what cannot be drawn."""
    for side in sides:
        for spec in side.loras:
            split_lora(spec)
        if side.drawn and side.loras:
            raise UserError(f"{side.model}: a folder of pictures; a LoRA comes too late for them")
        if side.lan and (not side.loras or SAMPLERS[sampler].stochastic):
            raise UserError("LAN needs a LoRA, and a sampler that draws no noise of its own (dpm++ or ddim)")


# Which pictures

def rows_to_draw(shown: list[dict], num_images: int, seed: int) -> list[dict]:
    """{file, prompt, seed} of every picture, which all sides have in common, and what else `shown` says of it, each
    {prompt} or one of `subjects`."""
    repeated = [one for one in shown for _ in range(num_images)]
    return [{"file": f"{n:05d}.png", "prompt": one["prompt"], "seed": seed + n, **one}
            for n, one in enumerate(repeated)]


def rows_drawn(sides: list[Side], limit: int | None) -> tuple[list[dict], tuple[int, int]]:
    """The rows that all sides whose pictures are drawn already have in common, of the first `limit` prompts, and the
    pictures' width and height. UserError where the sides differ."""
    first, *others = sides
    rows, size = read_drawn(first)
    for side in others:
        theirs, their_size = read_drawn(side)
        unlike = [
            (f"{len(theirs)} pictures", len(rows), len(theirs) == len(rows)),
            ("pictures of {}x{}".format(*their_size), "{}x{}".format(*size), their_size == size),
            *[(f"{one['file']} with the {key} {one.get(key)!r}", repr(row.get(key)), one.get(key) == row.get(key))
              for one, row in zip(theirs, rows) for key in row | one]]
        for found, expected, alike in unlike:
            if not alike:
                raise UserError(f"{side.model}: {found}, where {first.model} has {expected}; draw both alike")
    prompts = set(list(dict.fromkeys(row["prompt"] for row in rows))[:limit])
    return [row for row in rows if row["prompt"] in prompts], size


def read_drawn(side: Side) -> tuple[list[dict], tuple[int, int]]:
    """The rows of a folder's images.jsonl, all of whose pictures are there, and their width and height."""
    folder = Path(side.model)
    rows = read_listing(folder / "images.jsonl", seed=int, concept_images=(list, NoneType), caption=(str, NoneType))
    if odd := [row["seed"] for row in rows if not 0 <= row["seed"] < 2**64]:
        raise UserError(f"{folder / 'images.jsonl'}: seed is {odd[0]!r:.40}; a whole number below 2**64 was expected")
    if nested := [row["file"] for row in rows if Path(row["file"]).name != row["file"]]:
        raise UserError(f"{folder / 'images.jsonl'}: {nested[0]!r:.200} lies in a folder of its own; pictures right "
                        "beside the list were expected")
    if lost := [row["file"] for row in rows if not (folder / row["file"]).is_file()]:
        raise UserError(f"{folder}: {len(rows)} pictures in images.jsonl; {len(lost)} are not there ({lost[0]}, ...)")
    return rows, open_picture(folder / rows[0]["file"]).size


def unlike_settings(sides: list[Side], drawing: Drawing, rows: list[dict]) -> list[str]:
    """How the sides were not drawn alike, in words: what sampler or guidance do is then judged along with the models.
    Pictures tell how they were drawn (generate.py's and A1111's do); those that do not are not compared."""
    found: dict[str, dict[str, list[str]]] = {}
    for side in sides:
        concept = {"Concept strength": f"{side.concept[1]:g}"} if side.concept else {}
        text = parameters("", drawing.negative_prompt, drawing.settings() | concept)
        if side.drawn:
            text = open_picture(Path(side.model) / rows[0]["file"]).info.get("parameters")
        settings = read_parameters(text) if isinstance(text, str) else None
        for name in LIKE if settings else ():
            found.setdefault(name, {}).setdefault(settings.get(name, "the default"), []).append(side.name)
    return [f"{name} is " + " and ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
            for name, values in found.items() if len(values) > 1]


# Drawing

def load_side(side: Side, load: Callable[[str], Pipeline]) -> tuple[Pipeline, str]:
    """`load` a model -> the side's pipeline, and the digest of all the files that it was read from."""
    with files_read() as files:
        pipeline = load(side.model)
        pipeline.add_loras(side.loras)
        if side.concept:
            pipeline.concept = load_concept(side.concept[0], pipeline, side.concept[1])
    return pipeline, digest_all(files)


def drawn_digest(side: Side, rows: list[dict]) -> str:
    """Of pictures that were drawn elsewhere."""
    return digest_all([Path(side.model) / name for name in ("images.jsonl", *(row["file"] for row in rows))])


def draw_side(
    side: Side, load: Callable[[str], Pipeline], drawing: Drawing, out: Path, chunks: list[list[dict]],
    batch_size: int, progress: Callable,
) -> None:
    """Draws the batches that are not all there."""
    folder = side.folder(out)
    batches = [chunk[i:i + batch_size] for chunk in chunks for i in range(0, len(chunk), batch_size)]
    batches = [batch for batch in batches if not all((folder / row["file"]).is_file() for row in batch)]
    if not batches:
        return
    pipeline, _ = load_side(side, load)
    if not side.lan:
        pipeline.merge_loras()
    person = person_of(pipeline.concept) if side.concept and side.concept[1] else None

    def drawn(batch: list[dict]) -> Iterator[tuple[Tensor, Image.Image]]:
        prompts, seeds = [row["prompt"] for row in batch], [row["seed"] for row in batch]
        if person:
            return draw_people(pipeline, drawing, prompts, seeds, list(map(person, batch)), side.lan)
        return draw_pictures(pipeline, drawing, prompts, seeds, side.lan)

    pictures = ((row, image) for batch in batches for row, (_, image) in zip(batch, drawn(batch), strict=True))
    for row, image in progress(pictures, sum(map(len, batches)), f"drawing {side.name}"):
        if not (folder / row["file"]).is_file():
            settings = picture_settings(pipeline, drawing, row["seed"], side.lan)
            write_png(folder / row["file"], image, {
                "parameters": parameters(row["prompt"], drawing.negative_prompt, settings)})
