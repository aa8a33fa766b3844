"""The sides of a comparison: a model, with LoRAs, with LAN, or a folder of pictures that generate.py wrote; and how
their pictures come to be, the same prompts from the same seeds on every side.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import cli
from generate import check_sampling_options, draw_pictures, drawing_settings, load_loras, merge_loras, settings
from model.checkpoint import PAPER_PEOPLE, Pipeline, load_pipeline
from model.errors import UserError
from model.files import digest_all, files_read, read_lines
from pictures import open_picture, parameters, read_parameters, write_png

LIKE = ("Steps", "Sampler", "CFG scale", "Clip skip", "Prompt weights", "Negative prompt")     # A1111's names


@dataclass(frozen=True)
class Side:
    name: str
    model: str                                 # a model, or a folder of pictures that are drawn already
    loras: tuple[str, ...] = ()                # FILE or FILE:WEIGHT
    lan: bool = False

    @property
    def drawn(self) -> bool:
        return (Path(self.model) / "images.jsonl").is_file()

    def folder(self, out: Path) -> Path:
        return Path(self.model) if self.drawn else out / "images" / self.name

    def __str__(self) -> str:
        return " + ".join([self.model, *self.loras, *["LAN"] * self.lan])


def parse_side(name: str, text: str, lan: bool = False) -> Side:
    """MODEL[+LORA[:WEIGHT]]...[+lan]"""
    model, *parts = [text] if Path(text).exists() else text.split("+")           # a path may hold a +
    return Side(name, model, tuple(part for part in parts if part != "lan"), lan or "lan" in parts)


def parse_sides(args: argparse.Namespace) -> list[Side]:
    """The baseline first, then the candidates."""
    candidates = [parse_side("candidate", args.candidate, args.lan)] if args.candidate else []
    candidates += [Side("candidate", args.model, tuple(args.lora), args.lan)] if args.lora else []
    for item in args.compare.split(",") if args.compare else []:
        name, equals, text = item.strip().partition("=")
        if not equals or not re.fullmatch(r"\w[\w.-]{0,59}", name) or name == "baseline":
            raise UserError(f"--compare {item}: expected NAME=LORA[:WEIGHT], with letters, digits, - and . in NAME")
        side = parse_side(name, f"+{text}", args.lan)
        candidates.append(Side(name, args.model, side.loras, side.lan))
    if len({side.name for side in candidates}) < len(candidates):
        raise UserError(f"--compare {args.compare}: a name stands for two candidates")
    sides = [parse_side("baseline", args.baseline or args.model), *candidates]
    for side in sides:
        for spec in side.loras:
            if not math.isfinite(cli.split_lora(spec)[1]):
                raise UserError(f"{side.name}: {spec}: the weight must be a finite number")
        if side.drawn and side.loras:
            raise UserError(f"{side.model}: a folder of pictures; a LoRA comes too late for them")
        if side.lan and (not side.loras or args.sampler == "ddpm"):
            raise UserError("LAN needs a LoRA, and a sampler that draws no noise of its own (dpm++ or ddim)")
    return sides


# Which pictures

def make_rows(args: argparse.Namespace, sides: list[Side]) -> list[dict]:
    """{file, prompt, seed} of every picture, which all sides have in common. Where pictures are drawn already it is
    they that say; the size is then theirs, too."""
    if not any(side.drawn for side in sides):
        own = str(PAPER_PEOPLE.parent / "prompts_test.txt") if args.model == "paper-people" else "parti-people"
        prompts = cli.read_prompts(args.prompts or own, args.category)[:args.limit]
        return [
            {"file": f"{n:05d}.png", "prompt": prompt, "seed": args.seed + n}
            for n, prompt in enumerate(prompt for prompt in prompts for _ in range(args.num_images))]
    first, *others = [side for side in sides if side.drawn]
    if args.prompts:
        raise UserError(f"--prompts: {first.model} has its own; leave this away")
    rows, (width, height) = read_drawn(first)
    for side in others:
        theirs, size = read_drawn(side)
        unlike = [
            (f"{len(theirs)} pictures", len(rows), len(theirs) == len(rows)),
            (f"pictures of {size[0]}x{size[1]}", f"{width}x{height}", size == (width, height)),
            *[(f"{one['file']} with the {key} {one[key]!r}", repr(row[key]), one[key] == row[key])
              for one, row in zip(theirs, rows) for key in row]]
        for found, expected, alike in unlike:
            if not alike:
                raise UserError(f"{side.model}: {found}, where {first.model} has {expected}; draw both alike")
    for option, pixels in (("width", width), ("height", height)):
        if getattr(args, option) not in (None, pixels):
            raise UserError(f"--{option} {getattr(args, option)}: the pictures of {first.model} have {pixels}")
        setattr(args, option, pixels)
    prompts = set(list(dict.fromkeys(row["prompt"] for row in rows))[:args.limit])
    return [row for row in rows if row["prompt"] in prompts]


def read_drawn(side: Side) -> tuple[list[dict], tuple[int, int]]:
    """The rows of a folder's images.jsonl, all of whose pictures are there, and their width and height."""
    folder = Path(side.model)
    rows = [{key: row[key] for key in ("file", "prompt", "seed")}
            for row in read_lines(folder / "images.jsonl", file=str, prompt=str, seed=int)]
    if not rows or any(Path(row["file"]).name != row["file"] for row in rows):
        raise UserError(f"{folder / 'images.jsonl'}: no picture in it, or one outside of its folder")
    if lost := [row["file"] for row in rows if not (folder / row["file"]).is_file()]:
        raise UserError(f"{folder}: {len(rows)} pictures in images.jsonl; {len(lost)} are not there ({lost[0]}, ...)")
    return rows, open_picture(folder / rows[0]["file"]).size


def unlike_settings(args: argparse.Namespace, sides: list[Side], rows: list[dict]) -> list[str]:
    """How the sides were not drawn alike, in words: what sampler or guidance do is then judged along with the models.
    Pictures tell how they were drawn (generate.py's and A1111's do); those that do not are not compared."""
    found: dict[str, dict[str, list[str]]] = {}
    for side in sides:
        text = parameters("", args.negative_prompt, drawing_settings(args))
        if side.drawn:
            text = open_picture(Path(side.model) / rows[0]["file"]).info.get("parameters")
        told = read_parameters(text) if isinstance(text, str) else None
        for name in LIKE if told else ():
            found.setdefault(name, {}).setdefault(told.get(name, "the default"), []).append(side.name)
    return [f"{name} is " + " and ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
            for name, values in found.items() if len(values) > 1]


# Drawing

def load_side(args, side: Side, device: torch.device, dtype: torch.dtype) -> tuple[Pipeline, str]:
    """-> the pipeline, and the digest of all the files that it was read from."""
    with files_read() as files:
        pipeline = load_pipeline(side.model, device, dtype, args.vae, args.prediction_type)
        load_loras(pipeline, list(side.loras))
    check_sampling_options(args, pipeline)
    return pipeline, digest_all(files)


def drawn_digest(side: Side, rows: list[dict]) -> str:
    """Of pictures that were drawn elsewhere."""
    return digest_all([Path(side.model) / name for name in ("images.jsonl", *(row["file"] for row in rows))])


def draw_side(
    args: argparse.Namespace, side: Side, out: Path, chunks: list[list[dict]], device: torch.device, dtype: torch.dtype
) -> None:
    """Draws the batches that are not all there."""
    size, folder = args.batch_size, side.folder(out)
    batches = [chunk[i:i + size] for chunk in chunks for i in range(0, len(chunk), size)]
    batches = [batch for batch in batches if not all((folder / row["file"]).is_file() for row in batch)]
    if not batches:
        return
    pipeline, _ = load_side(args, side, device, dtype)
    if not side.lan:
        merge_loras(pipeline)
    as_drawn = argparse.Namespace(**{**vars(args), "lora": side.loras, "lan": side.lan})
    pictures = ((row, image) for batch in batches for row, (_, image) in zip(batch, draw_pictures(
        args, pipeline, [row["prompt"] for row in batch], [row["seed"] for row in batch], side.lan), strict=True))
    for row, image in cli.progress(pictures, sum(map(len, batches)), f"drawing {side.name}"):
        if not (folder / row["file"]).is_file():
            about = parameters(row["prompt"], args.negative_prompt, settings(as_drawn, pipeline, row["seed"]))
            write_png(folder / row["file"], image, {"parameters": about})
