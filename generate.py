"""Draws pictures from prompts.

    python generate.py --prompt "a woman with red hair, blue shirt and white trousers, waving on a beach" --out out
    python generate.py --prompts paper_people/prompts_test.txt --limit 24 --lora run/lora.safetensors:0.5 --out tuned
    python generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts parti-people --num-images 4
    python generate.py --model majicmix.safetensors --prompts FILE.txt --height 1024 --width 704 --prompt-weights a1111
    python generate.py --prompt "a man with red hair, waving in a room" --best-of 8
    python generate.py --model owner/name --prompt "a sks person on a beach" --concept FILE --concept-image me.png

Writes OUT/00000.png ... (all pictures of the first prompt, then of the second, ...), each with its settings inside in
the form that A1111 and others read; OUT/images.jsonl; OUT/sheet.png; with --save-latents OUT/latents.safetensors.
A picture depends on its prompt, its seed and the settings alone: not on the batch, the device, or its neighbours.
With --best-of N, --optimise-noise, --suffixes or --excite, ways to better pictures without training, images.jsonl has
the score that was reached and those on the way, and what was changed; docs/methods.md has the equations and the costs.
With --concept (see train_concept.py) it has the person's pictures, and a caption for scorers, without the placeholder.
Stopped and started again with the same command, it goes on; OUT/generate.json knows what the folder was begun with.
"""

import cli

# isort: split
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset.concepts import check_subjects, person_of, subjects
from dataset.folder import clear_unfinished, locked, open_manifest, write_manifest
from dataset.images import open_picture
from dataset.sources import score_pool
from model.builtin import BUILT_IN, default_scorer, named
from model.checkpoint import Pipeline, load_pipeline
from model.compiled import compile_unet
from model.concept import load_concept
from model.errors import UserError
from model.files import digest_all, digest_of, files_read, parse_object, read_tensors, write_tensors, write_text
from model.scorers import digest_of_scorer, load_reward, load_scorer
from pictures import parameters, sheet, write_png
from sampling import (
    SAMPLERS,
    Drawing,
    draw_best,
    draw_excited,
    draw_optimised,
    draw_people,
    draw_pictures,
    draw_with_suffixes,
    picture_settings,
    split_words,
)

SHEET_PICTURES = 64
# Not in generate.json; and there, but names, whose contents are inputs.
NOT_NOTED = ("out", "device", "batch_size", "compile", "prompt", "limit", "way", "shown")
MAY_CHANGE = ("model", "vae", "prompts", "category", "scorer", "suffixes", "concept", "concept_image")
WAYS = ("best_of", "optimise_noise", "suffixes", "excite")     # to better pictures without training, each in sampling/
# Noted where they are given: folders of before they came go on.
LATER = (*WAYS, "noise_lr", "scorer", "concept", "concept_image", "concept_strength")


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    cli.add_prompt_options(parser, ".txt, .jsonl, .tsv, .csv, or the word parti-people")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="repeatable; weight 1 unless given")
    parser.add_argument("--lan", action="store_true", help="with --lora: keep the base model's colours (Eq. 7)")
    parser.add_argument("--best-of", type=cli.whole(2), metavar="N", help="each picture is the best of N by the scorer")
    parser.add_argument(
        "--optimise-noise", type=cli.whole(1), metavar="ITERATIONS", help="move the noise along the scorer's gradient")
    parser.add_argument(
        "--noise-lr", type=cli.real(above=0), metavar="RATE", help="with --optimise-noise: how far (default: 5)")
    parser.add_argument(
        "--suffixes", metavar="FILE", help="append to a prompt what of these phrases, one a line, raises its score")
    parser.add_argument(
        "--excite", metavar="WORD,...", help="words of the prompts that a picture must attend to (Attend-and-Excite)")
    parser.add_argument("--scorer", help="with the first three of these: see model/scorers.py (default: the model's "
                        "own scorer/ if it has one, else pickscore)")
    parser.add_argument("--num-images", type=cli.whole(1), default=1, help="pictures a prompt")
    parser.add_argument("--out", default="out", metavar="DIR", help="the same command goes on with it")
    parser.add_argument("--save-latents", action="store_true", help="also the final scaled latents, float32")
    cli.add_concept_options(parser)
    cli.add_drawing_options(parser, SAMPLERS)
    args = parser.parse_args()
    listing = None if args.prompt else args.prompts
    args.prompt += cli.read_prompts(args.prompts, args.category) if args.prompts else []
    args.prompt = args.prompt[:args.limit]
    if not args.prompt:
        raise UserError("no prompt; give --prompt TEXT or --prompts FILE")
    if args.lan and (not args.lora or SAMPLERS[args.sampler].stochastic):
        raise UserError("--lan needs --lora, and a sampler that draws no noise of its own (dpm++ or ddim)")
    check_way(args)
    args.concept_strength = cli.concept_strength(
        args.concept, args.concept_image, args.concept_strength, args.prompt_weights)
    if args.concept and args.way:
        raise UserError(f"--concept goes without --{args.way.replace('_', '-')}")
    args.shown = [{"prompt": prompt} for prompt in args.prompt]
    if args.concept:
        args.shown = subjects(args.prompt, listing, args.concept_image)[:args.limit]
    return args


def check_way(args) -> None:
    """Which of WAYS is asked for, as `way`; refuses what does not go with it, and fills in what does."""
    ways = [name for name in WAYS if getattr(args, name) is not None]
    options = [f"--{name.replace('_', '-')}" for name in ways]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(options)}: give one of them")
    args.way = ways[0] if ways else None
    if args.way in ("optimise_noise", "excite") and (args.lan or SAMPLERS[args.sampler].stochastic):
        raise UserError(f"{options[0]} needs a sampler that draws no noise of its own (dpm++ or ddim), and no --lan")
    if args.way == "excite" and args.compile:
        raise UserError("--excite goes without --compile: it looks into the U-Net's attention")
    if args.way == "excite" and args.prompt_weights != "off":
        raise UserError("--excite goes without --prompt-weights, which makes other tokens of a prompt")
    if args.noise_lr and args.way != "optimise_noise":
        raise UserError("--noise-lr goes with --optimise-noise")
    if args.scorer and args.way in (None, "excite"):
        raise UserError("--scorer goes with --best-of, --optimise-noise or --suffixes")
    if args.way == "optimise_noise":
        args.noise_lr = args.noise_lr or 5.0
    if args.way not in (None, "excite"):
        args.scorer = args.scorer or default_scorer(args.model)


def hint_at_vocabulary(prompts: list[str], words: list[str]) -> None:
    """A model that ships with the repository knows few words; others are drawn, but mean nothing to it."""
    unknown = sorted({word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower())} - set(words))
    if unknown:
        print(f"the model does not know: {', '.join(unknown[:10])}. It knows: {', '.join(words)}", file=sys.stderr)


def way_to_draw(args, pipeline: Pipeline, drawing: Drawing) -> tuple[Callable, dict[str, str]]:
    """-> prompt, seed -> what was found (see the head), latent, picture; and digests of what it reads."""
    def draw(prompt: str, seeds: Sequence[int]) -> Iterator[tuple[Tensor, Image.Image]]:
        for i in range(0, len(seeds), args.batch_size):
            some = seeds[i:i + args.batch_size]
            yield from draw_pictures(pipeline, drawing, [prompt] * len(some), some, args.lan)

    if args.way == "excite":
        words = split_words(args.excite, args.prompt, pipeline.tokenizer)
        return partial(draw_excited, pipeline, drawing, words), {}
    phrases = list(dict.fromkeys(cli.read_prompts(args.suffixes))) if args.way == "suffixes" else []
    with files_read() as files:
        scorer = (load_reward if args.way == "optimise_noise" else load_scorer)(args.scorer, pipeline.device)
    inputs = {"scorer": digest_of_scorer(args.scorer, files)}
    if args.way == "optimise_noise":
        return partial(draw_optimised, pipeline, drawing, scorer, args.optimise_noise, args.noise_lr), inputs
    score = partial(score_pool, scorer)
    if args.way == "best_of":
        return partial(draw_best, draw, score, args.best_of), inputs
    return draw_with_suffixes(draw, score, phrases, args.seed), inputs | {"suffixes": digest_of(phrases)}


def draw_all(
    out: Path, pipeline: Pipeline, drawing: Drawing, rows: list[dict], lan: bool, batch_size: int, save_latents: bool,
    columns: int, way: Callable | None, note: dict[str, str],
) -> None:
    """Draws what is not there yet of `rows`, each {file, prompt, seed}, and, where the pipeline has a concept,
    concept_images; the sheet shows `columns` pictures a prompt.
    With a `way`, see `way_to_draw`, a picture is drawn by itself, and has `note` among its settings."""
    def latent_file(row: dict) -> Path:
        return out / "partial" / row["file"].replace(".png", ".safetensors")

    def is_done(row: dict) -> bool:
        kept = not save_latents or latent_file(row).is_file() or (out / "latents.safetensors").is_file()
        return (out / row["file"]).is_file() and kept

    def line_of(row: dict) -> dict:
        """With what was found while it was drawn; the picture has it."""
        if not way:
            return row
        told = open_picture(out / row["file"]).info.get("hg-dpo")
        if told is None:
            raise UserError(f"{out / row['file']}: its notes are gone, by another program perhaps; remove it, and it "
                            "is drawn again")
        return row | parse_object(told, f"{out / row['file']}, its notes", {"found": dict})["found"]

    person = person_of(pipeline.concept) if pipeline.concept else None
    # A batch is drawn again unless all of it is there: in another batch a picture would be rounded differently.
    batch_size = 1 if way else batch_size
    batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [batch for batch in batches if not all(map(is_done, batch))]

    def drawn() -> Iterator[tuple[dict, dict, Tensor, Image.Image]]:
        for batch in batches:
            if way:
                yield batch[0], *way(batch[0]["prompt"], batch[0]["seed"])
                continue
            prompts, seeds = [row["prompt"] for row in batch], [row["seed"] for row in batch]
            if person:
                pictures = draw_people(pipeline, drawing, prompts, seeds, list(map(person, batch)), lan)
            else:
                pictures = draw_pictures(pipeline, drawing, prompts, seeds, lan)
            for row, (latent, image) in zip(batch, pictures):
                yield row, {}, latent, image

    try:
        for row, found, latent, image in cli.progress(drawn(), sum(map(len, batches)), "drawing"):
            if not is_done(row):
                line = row | found
                settings = picture_settings(pipeline, drawing, line["seed"], lan) | note
                more = {"scheduler": pipeline.configs["scheduler"], "dtype": str(pipeline.dtype),
                        "model": pipeline.name} | ({"found": found} if way else {})
                if save_latents:
                    write_tensors(latent_file(row), {"latents": latent})
                write_png(out / row["file"], image, {
                    "parameters": parameters(line["prompt"], drawing.negative_prompt, settings),
                    "hg-dpo": json.dumps({**settings, **more})})
    finally:                                     # after Ctrl-C, too: what is finished is listed and shown
        if done := [line_of(row) for row in rows if is_done(row)]:
            write_text(out / "images.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done))
            columns = columns if 1 < columns <= 10 else min(8, len(rows))
            captions = [f"{row['seed']}: {row['prompt']}" for row in done[:SHEET_PICTURES]]
            shown = [open_picture(out / row["file"]) for row in done[:SHEET_PICTURES]]
            write_png(out / "sheet.png", sheet(shown, captions, columns))
    if save_latents and not (out / "latents.safetensors").is_file():
        latents = [read_tensors(latent_file(row))["latents"] for row in rows]
        write_tensors(out / "latents.safetensors", {"latents": torch.stack(latents)})
    shutil.rmtree(out / "partial", ignore_errors=True)
    if len(rows) > SHEET_PICTURES:
        print(f"{out / 'sheet.png'} shows the first {SHEET_PICTURES} of {len(rows)}")


def main() -> None:
    args = parse_args()
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    with files_read() as files:
        pipeline = load_pipeline(args.model, device, dtype, args.vae, args.prediction_type)
        pipeline.add_loras(args.lora)
    if not args.lan:
        pipeline.merge_loras()
    if args.compile:
        compile_unet(pipeline.unet)
    drawing = Drawing.of(vars(args)).for_model(pipeline)
    if args.model in BUILT_IN:
        hint_at_vocabulary(args.prompt, named(BUILT_IN[args.model].vocabulary)())
    inputs = {"model": digest_all(files), "prompt": digest_of(args.prompt)}
    if args.concept:
        with files_read() as files:
            concept = load_concept(args.concept, pipeline, args.concept_strength)
        inputs |= {"concept": digest_all(files),
                   "concept_image": check_subjects(args.shown, concept, pipeline.tokenizer)}
        pipeline.concept = concept if args.concept_strength else None
    shown = [row for row in args.shown for _ in range(args.num_images)]
    rows = [{"file": f"{n:05d}.png", "prompt": row["prompt"], "seed": args.seed + n * (args.best_of or 1), **row}
            for n, row in enumerate(shown)]
    out, manifest = Path(args.out), Path(args.out) / "generate.json"
    options = vars(args) | asdict(drawing) | {"dtype": cli.name_of(dtype)}
    options = {name: value for name, value in options.items()
               if name not in NOT_NOTED and (value not in (None, []) or name not in LATER)}
    way, note = None, {}
    if args.way:
        way, more = way_to_draw(args, pipeline, drawing)
        note, inputs = {"Drawn with": f"--{args.way.replace('_', '-')} {options[args.way]}"}, inputs | more
    with locked(out):
        open_manifest(manifest, options, inputs, MAY_CHANGE)
        write_manifest(manifest, options, inputs)
        clear_unfinished(out)
        print(
            f"drawing {len(rows)} pictures of {drawing.width}x{drawing.height} with {pipeline.name}, "
            f"{SAMPLERS[drawing.sampler].label}, {drawing.steps} steps, guidance {drawing.guidance:g}, "
            f"{''.join(f'{how}, ' for how in note.values())}on {device} in {options['dtype']} to {out}")
        draw_all(
            out, pipeline, drawing, rows, args.lan, args.batch_size, args.save_latents, args.num_images, way, note)


if __name__ == "__main__":
    cli.run(main)
